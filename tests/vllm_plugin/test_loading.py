"""What a rank keeps of a checkpoint's layers, without vLLM."""

import itertools

import pytest
import torch
from tolerances import max_error
from weights import dense, random_weight

from aqlm_c.format import WEIGHT, Format
from aqlm_c.nn.embedding import QuantizedEmbedding
from aqlm_c.vllm.loading import (
    PADDING,
    PartsLoading,
    Share,
    cut_dense,
    cut_quantized,
    even_places,
    kept_groups,
)

SCHEMES = {"2x8g8": (2, 8, 1, 8), "1x16g8": (1, 16, 1, 8), "3x8g4o2": (3, 8, 2, 4), "2x5g16": (2, 5, 1, 16)}
OUT, IN = 48, 64
NAME = "model.layers.0.mlp.down_proj"
CPU = torch.device("cpu")


def stored(scheme, seed=0, out=OUT, in_features=IN):
    tensors = random_weight((out, in_features, *SCHEMES[scheme]), seed=seed)
    return dict(zip(WEIGHT, tensors, strict=True))


def everything(n):
    return torch.arange(n)


def loading(*schemes, **options):
    return PartsLoading(NAME, {Format.parse(scheme) for scheme in schemes}, CPU, torch.float32, **options)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_have_all_outputs(scheme, ranks):
    tensors = stored(scheme)
    shares = [even_places(NAME, OUT, OUT // ranks, rank, ranks) for rank in range(ranks)]
    cut = [cut_quantized(NAME, tensors, Share(share, everything(IN)), {Format.parse(scheme)}) for share in shares]
    assert torch.equal(torch.cat([dense(**each) for each in cut]), dense(**tensors))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_have_all_inputs(scheme, ranks):
    tensors = stored(scheme)
    shares = [even_places(NAME, IN, IN // ranks, rank, ranks) for rank in range(ranks)]
    cut = [cut_quantized(NAME, tensors, Share(everything(OUT), share), {Format.parse(scheme)}) for share in shares]
    assert torch.equal(torch.cat([dense(**each) for each in cut], dim=1), dense(**tensors))


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_split_group_names_its_layer(side):
    share = Share(torch.arange(3, 27), everything(IN)) if side == "out" else Share(everything(OUT), torch.arange(36))
    with pytest.raises(ValueError, match=f"tensor_parallel_size: .*{side}puts .*{NAME}.*{side}_group_size="):
        cut_quantized(NAME, stored("3x8g4o2" if side == "out" else "2x8g8"), share, set(map(Format.parse, SCHEMES)))


def test_groups_of_places():
    assert kept_groups(NAME, "in", torch.tensor([8, 9, 10, 11, 0, 1, 2, 3]), 4).tolist() == [2, 0]
    assert kept_groups(NAME, "out", torch.tensor([2, 3, PADDING, PADDING]), 2).tolist() == [1, PADDING]
    for places in ([0, 1, 2], [1, 2], [0, 2], [0, PADDING], [3, 2]):
        with pytest.raises(ValueError, match="tensor_parallel_size"):
            kept_groups(NAME, "out", torch.tensor(places), 2)


def test_padding_is_zero():
    places = torch.tensor([5, 4, PADDING, PADDING])
    tensors, weight = stored("2x8g8"), torch.randn(OUT, IN)
    got = cut_quantized(NAME, tensors, Share(places, everything(IN)), {Format()})
    assert torch.equal(dense(**got)[:2], dense(**tensors)[[5, 4]]) and not dense(**got)[2:].any()
    got = cut_dense(NAME, weight, Share(places, everything(IN)))
    assert torch.equal(got[:2], weight[[5, 4]]) and not got[2:].any()


def broken(**changes):
    tensors = stored("2x8g8")
    return tensors | {name: change(tensors[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (broken(codes=lambda t: t.short()), r"down_proj.codes: got torch.int16 .* expected torch.int8"),
        (broken(codes=lambda t: t[:, :, :1]), r"down_proj.codes: got .*\[48, 8, 1\], expected .*\[48, 8, 2\]"),
        (broken(codes=lambda t: t[0]), "down_proj.codes: got"),
        (broken(codes=lambda t: t[:0]), "down_proj.codes: got"),
        (broken(scales=lambda t: t[1:]), r"down_proj.scales: got .*\[47, 1, 1, 1\]"),
        (broken(scales=lambda t: t.half()), "down_proj.scales: got torch.float16"),
        (broken(codebooks=lambda t: t[0]), "down_proj.codebooks: got"),
        (broken(codebooks=lambda t: t.long()), "down_proj.codebooks: got torch.int64"),
        (broken(codebooks=lambda t: t[:, :100]), "expected 2x8g8, as config.json says"),
        (stored("3x8g4o2"), "expected 2x8g8, as config.json says"),
        (stored("2x8g8", in_features=IN // 2), "in_features: got 32, expected at least 64 of layer model.layers.0"),
        (stored("2x8g8", out=OUT // 2), "out_features: got 24, expected at least 48"),
    ],
)
def test_tensors_that_do_not_fit(tensors, message):
    with pytest.raises(ValueError, match=message):
        cut_quantized(NAME, tensors, Share(everything(OUT), everything(IN)), {Format.parse("2x8g8")})


@pytest.mark.parametrize("order", list(itertools.permutations(WEIGHT)))
def test_tensors_come_in_any_order(order):
    tensors, parts = stored("2x8g8"), loading("2x8g8")
    whole = [parts.add("q", name, tensors[name]) for name in order]
    assert whole[:2] == [None, None] and set(whole[2]) == set(WEIGHT)
    assert parts.sizes(whole[2]) == (OUT, IN)
    parts.settle("q", Share(everything(OUT), everything(IN)))
    (layer,) = parts.finish(["q"])
    assert torch.equal(dense(layer.codes, layer.codebooks, layer.scales), dense(**tensors))
    assert layer.codes.data_ptr() != tensors["codes"].data_ptr()  # the file may go


def test_parts_of_other_formats_and_dense_ones():
    parts, weight = loading("2x8g8", "1x16g8"), torch.randn(OUT, IN, dtype=torch.bfloat16)
    for part, tensors in (("q", stored("2x8g8")), ("k", stored("1x16g8")), ("v", {"weight": weight})):
        for name, tensor in tensors.items():
            whole = parts.add(part, name, tensor)
        assert whole is not None
        parts.settle(part, Share(torch.arange(16, 32), everything(IN)))
    q, k, v = parts.finish(["q", "k", "v"])
    assert (q.scheme, k.scheme) == ("2x8g8", "1x16g8")
    assert v.weight.dtype == torch.float32 and torch.equal(v.weight, weight[16:32].float())


def test_embeddings():
    parts, tensors = loading("2x8g8", is_embedding=True), stored("2x8g8")
    for name, tensor in tensors.items():
        parts.add(None, name, tensor)
    parts.settle(None, Share(torch.cat([torch.arange(24, 48), torch.full((8,), PADDING)]), everything(IN)))
    (embedding,) = parts.finish([None])
    assert isinstance(embedding, QuantizedEmbedding) and embedding.num_embeddings == 32
    rows, truth = embedding(torch.tensor([0, 23, 31])), dense(**tensors)[[24, 47]]
    assert max_error(rows[:2], truth) <= 1e-6 * truth.abs().max() and not rows[2].any()


def test_what_is_missing_or_too_much():
    parts, tensors = loading("2x8g8"), stored("2x8g8")
    with pytest.raises(ValueError, match=f"{NAME}.codes: missing"):
        parts.finish([None])
    parts.add("q", "codes", tensors["codes"])
    parts.add("q", "codebooks", tensors["codebooks"])
    with pytest.raises(ValueError, match=f"{NAME}.q.scales: missing"):
        parts.finish(["q"])
    with pytest.raises(ValueError, match=f"{NAME}.q.codes: unexpected"):
        parts.add("q", "codes", tensors["codes"])
    with pytest.raises(ValueError, match=f"{NAME}.q.weight: unexpected beside codebooks, codes"):
        parts.add("q", "weight", torch.zeros(OUT, IN))
    parts.add((0, "w1"), "weight", torch.zeros(OUT, IN))
    with pytest.raises(ValueError, match=f"{NAME}.0.w1.scales: unexpected"):
        parts.add((0, "w1"), "scales", tensors["scales"])


def test_values_are_checked():
    for name, spoil, message in (
        ("codes", lambda t: t.fill_(127), "got codes from 127"),
        ("scales", lambda t: t.fill_(float("nan")), "got NaN or Inf"),
    ):
        parts, tensors = loading("2x5g16"), stored("2x5g16")
        spoil(tensors[name])
        for each, tensor in tensors.items():
            parts.add(None, each, tensor)
        with pytest.raises(ValueError, match=f"{NAME}.{name}: {message}"):
            parts.settle(None, Share(everything(OUT), everything(IN)))


def test_even_places_name_the_layer():
    assert even_places(NAME, 12, 4, 1, 3).tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match=f"{NAME}: got 13"):
        even_places(NAME, 13, 4, 1, 3)
