"""Quantization on a device: blocks that come and go, activations near it, H of a part of the layers at a time.

Without a GPU the same code is run with CPU tensors: verbs by the torch ops, which have the bits of `_core`, and blocks
that are copied as to another device.
"""

import copy
import dataclasses

import pytest
import torch
from tiny import random_model, random_tokens, tiny_llama
from transformers import MixtralConfig, PreTrainedModel

import aqlm_c
from aqlm_c.calibrate.activations import capture
from aqlm_c.calibrate.hessians import HessianSums
from aqlm_c.calibrate.offload import OffloadedTensors, Room
from aqlm_c.calibrate.sources import SequenceCalibration
from aqlm_c.core import arrays
from aqlm_c.methods import METHODS, get_method
from aqlm_c.model.blocks import find_blocks
from aqlm_c.model.residence import Residence
from aqlm_c.pipeline import block as stages
from aqlm_c.pipeline import estimate, pipeline
from aqlm_c.pipeline.estimate import Estimator, Rates, Work, fitting_batch_size, groups_of, plan_on_device
from aqlm_c.pipeline.plan import make_plan, works_of
from aqlm_c.recipe import AqlmConfig
from aqlm_c.train.block import _Tuner

CPU = torch.device("cpu")
TIES = hasattr(PreTrainedModel, "get_expanded_tied_weights_keys")
FEW = {"ldl_passes": 1, "max_sweeps": 1, "init_max_iter": 3, "finetune_held_out": 0.25}


def tiny_mixtral(**options):
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    return random_model(MixtralConfig(**sizes, **heads, **{"num_local_experts": 4, **options}))


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


@pytest.fixture
def as_on_a_device(monkeypatch):
    """What is done for a GPU, on the CPU; gives the residences that were made."""
    made, init = [], Residence.__init__

    def make(self, model, device, files=None, moves=None):
        init(self, model, device, files, moves=True)
        made.append(self)

    monkeypatch.setattr(Residence, "__init__", make)
    monkeypatch.setattr(arrays, "of_tensor", lambda tensor: tensor.detach())
    return made


MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=3, tie_word_embeddings=False),
    "tied": lambda: tiny_llama(num_hidden_layers=3),
    "moe": tiny_mixtral,
}


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_comes_block_by_block_has_the_bits_of_one_that_is_there(kind, resumed, tmp_path, request):
    if kind == "tied" and not TIES:
        pytest.skip("tied embeddings need transformers 5")
    rules = {"embed": "2x4g8"} if kind == "tied" else {r"layers\.1\..*v_proj": "dense"}
    config = AqlmConfig.from_scheme("1x4g8", rules=rules, finetune_epochs=1, finetune_search=1, **FEW)
    model, tokens = MODELS[kind](), random_tokens(8, 24)
    aqlm_c.quantize_model(model, tokens, config)
    made, other = request.getfixturevalue("as_on_a_device"), MODELS[kind]()
    work_dir = tmp_path / "work" if resumed else None
    if resumed:
        aqlm_c.quantize_model(MODELS[kind](), tokens, config, work_dir=work_dir)
        max(work_dir.glob("*.safetensors")).unlink()
    aqlm_c.quantize_model(other, tokens, config, work_dir=work_dir)
    assert_same(other, model)
    assert all(residence.moves and not residence._at_home and not residence._uses for residence in made)


@pytest.mark.parametrize("takes_more", [False, True])
def test_blocks_come_once_for_the_output_layer(takes_more, request, monkeypatch):
    """Unless the model takes more of the blocks than what the last one returns."""

    def model():
        model, first = MODELS["llama"](), []
        if takes_more:
            model.model.layers[0].register_forward_hook(lambda *call: first.append(call[2]))
            model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + first.pop(),))
        return model

    config = AqlmConfig.from_scheme("1x4g8", rules={"lm_head": "2x4g8"}, finetune_epochs=0, **FEW)
    plain, other, tokens = model(), model(), random_tokens(8, 24)
    aqlm_c.quantize_model(plain, tokens, config, batch_size=2)
    request.getfixturevalue("as_on_a_device")
    begun, of_output = [], SequenceCalibration.of_output
    fetch, users = Residence.fetch, []

    def fetched(self, block):
        if begun and block is not self.model and not self._uses.get(id(block)):
            users.append(block)
        fetch(self, block)

    def watched(*args):
        begun.append(True)
        try:
            return of_output(*args)
        finally:
            begun.clear()

    monkeypatch.setattr(Residence, "fetch", fetched)
    monkeypatch.setattr(SequenceCalibration, "of_output", watched)
    aqlm_c.quantize_model(other, tokens, config, batch_size=2)
    assert_same(other, plain)
    assert len(users) == 3 * (2 + 4 * takes_more)  # to be passed through, for the first batch; for each of four


# ---- residence --------------------------------------------------------------------------------------------------


def test_a_dense_block_comes_home_as_the_tensors_it_had():
    model = tiny_llama()
    block = model.model.layers[0]
    there = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    with Residence(model, CPU, (), moves=True) as residence:
        residence.read_ahead(block)
        with residence.using(block):
            assert all(there[name] != parameter.data_ptr() for name, parameter in block.named_parameters())
            with residence.running():
                model(random_tokens(1, 4))
            assert all(there[name] != parameter.data_ptr() for name, parameter in block.named_parameters())
            block.input_layernorm.weight.data.add_(1)  # as fine-tuning does
    home = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    assert {name for name in there if there[name] != home[name]} <= {name for name in there if "norm" in name}
    assert block.input_layernorm.weight.mean() > 1.5


def test_a_tensor_that_blocks_share_is_not_read_before_it_is_written_to():
    model = tiny_llama(num_hidden_layers=3)
    first, second, third = model.model.layers
    second.input_layernorm = third.input_layernorm = first.input_layernorm  # before all, or while the first is there
    start = first.input_layernorm.weight.detach().clone()
    with Residence(model, CPU, (), moves=True) as residence:
        residence.read_ahead(second)
        with residence.using(first):
            first.input_layernorm.weight.data.add_(1)
            residence.read_ahead(third)
        with residence.using(second):
            assert torch.equal(second.input_layernorm.weight, start + 1)
            second.input_layernorm.weight.data.add_(1)
        with residence.using(third):
            assert torch.equal(third.input_layernorm.weight, start + 2)
        residence.read_ahead(first)
        with torch.no_grad():
            first.input_layernorm.weight.add_(1)  # at home
        with residence.using(first):
            assert torch.equal(first.input_layernorm.weight, start + 3)
        residence.read_ahead(second)
        read = next(iter(residence._coming[id(second)].result().values()))
        with residence.using(second):
            assert any(
                tensor is read.tensor and tensor.data_ptr() == read.there.data_ptr() for tensor in second.parameters()
            )


def test_an_error_leaves_everything_at_home():
    model = tiny_llama()
    there = [parameter.data_ptr() for parameter in model.parameters() if parameter.ndim > 1]
    with pytest.raises(KeyboardInterrupt), Residence(model, CPU, (), moves=True) as residence:
        residence.fetch(model.model.layers[1])
        residence.read_ahead(model.model.layers[0])
        with residence.using(model):
            raise KeyboardInterrupt
    assert [parameter.data_ptr() for parameter in model.parameters() if parameter.ndim > 1] == there
    assert not residence._uses and not residence._at_home


def test_blocks_are_the_entries_of_outermost_lists():
    model = tiny_mixtral()
    aqlm_c.model.experts.unfuse(model)
    assert Residence(model, CPU, ()).blocks() == list(model.model.layers)


# ---- activations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_device", "in_host"), [(10**9, None), (5000, None), (0, 5000), (0, 0), (3000, 6000)])
def test_activations_are_the_same_wherever_they_are(tmp_path, on_device, in_host):
    model, tokens = tiny_llama(), random_tokens(7, 12)
    _, blocks = find_blocks(model)
    room = Room(CPU, on_device, in_host, tmp_path)
    plain, near = (capture(model, blocks, tokens, 2, place) for place in (None, room))
    for index, block in enumerate(blocks):
        found = []
        for stream in (plain, near):
            with stream.empty() as outputs:
                sums = HessianSums({"down": block.mlp.down_proj})
                sums.gather(stream, index, block, outputs)
                found.append((sums.hessians()["down"].H, [tensor.clone() for tensor in outputs.hidden]))
            stream.advance(index, block)
        assert (found[0][0] == found[1][0]).all()
        assert all(map(torch.equal, found[0][1], found[1][1]))
        assert all(map(torch.equal, plain.hidden, near.hidden))
    assert near.batch_sizes() == plain.batch_sizes() == [2, 2, 2, 1]
    near.close()
    assert room.device_left == on_device
    room.close()


def test_offloaded_tensors_are_a_list(tmp_path):
    for sizes in [(10**6, None), (0, None), (0, 0), (100, 100)]:
        room = Room(CPU, *sizes, tmp_path)
        kept = OffloadedTensors(room)
        tensors = [torch.randn(3, 4), torch.randn(2, 4).bfloat16(), torch.randn(5, 6)[:, ::2]]
        for tensor in tensors:
            kept.append(tensor)
        kept[1] = tensors[1] = torch.randn(7, 9)  # larger than what was there
        kept[0] = tensors[0] = torch.randn(3, 4)
        kept.expect([2, 0, 1])
        assert all(torch.equal(kept[i], tensors[i]) for i in (2, 0, 1, 1, 2))
        assert kept.shapes() == [tensor.shape for tensor in tensors] and len(kept) == 3
        kept.clear()
        assert len(kept) == 0 and room.device_left == sizes[0]


@pytest.mark.parametrize("copies", [3, 2, 1])
def test_targets_ahead_are_made_again_where_memory_has_no_room_for_them(copies, tmp_path, monkeypatch):
    model, other, tokens = (*(tiny_llama(num_hidden_layers=3) for _ in range(2)), random_tokens(8, 24))
    config = AqlmConfig.from_scheme("1x4g8", finetune_epochs=2, finetune_search=1, **FEW)
    plain = aqlm_c.quantize_model(model, tokens, config, batch_size=2)
    batch = 2 * 24 * 32 * 4
    room, calls = Room(CPU, 3 * batch, (4 * copies - 3) * batch, tmp_path), []
    monkeypatch.setattr(pipeline.Pipeline, "_place", lambda self, memory, stack: room)
    look_ahead = _Tuner._look_ahead
    monkeypatch.setattr(_Tuner, "_look_ahead", lambda self, *args: calls.append(self.kept) or look_ahead(self, *args))
    again = aqlm_c.quantize_model(other, tokens, config, batch_size=2)
    assert all((kept is None) == (copies < 3) for kept in calls)
    assert_same(other, model)
    assert [block.history for block in again.blocks] == [block.history for block in plain.blocks]
    assert room.device_left == 3 * batch


# ---- H of a part of the layers at a time --------------------------------------------------------------------------


def quantized_in_parts(model, tokens, config, most, monkeypatch):
    """Quantize with `most` bytes for the H of a step; how many parts its blocks were quantized in."""
    counts = []

    def groups(shapes, _):
        counts.append(len(groups_of(shapes, most)))
        return groups_of(shapes, most)

    monkeypatch.setattr(stages, "groups_of", groups)
    report = aqlm_c.quantize_model(model, tokens, config)
    return report, counts


def test_experts_in_parts_have_the_bits_of_all_at_once(monkeypatch):
    tokens, models = random_tokens(32, 24), [tiny_mixtral(), tiny_mixtral()]  # enough for each expert
    config = AqlmConfig.from_scheme("1x4g8", finetune_epochs=1, **FEW)
    (whole, _), (parts, counts) = (
        quantized_in_parts(model, tokens, config, most, monkeypatch)
        for model, most in zip(models, (None, 150_000), strict=True)
    )
    assert counts in ([3, 3], [4, 4], [5, 5])  # of two blocks; by the names that experts have
    assert_same(*models)
    assert [layer.name for layer in parts.layers] == [layer.name for layer in whole.layers]
    assert parts.blocks[0].history == whole.blocks[0].history


def test_experts_with_few_tokens_share_one_h_in_parts_too(monkeypatch, caplog):
    tokens, models = random_tokens(4, 16), [tiny_mixtral(num_local_experts=8) for _ in range(2)]
    config = AqlmConfig.from_scheme("1x4g8", finetune_epochs=0, **FEW)
    reports = []
    for model, most in zip(models, (None, 0), strict=True):
        caplog.clear()
        report, counts = quantized_in_parts(model, tokens, config, most, monkeypatch)
        reports.append(report)
        assert "H of all experts taken" in caplog.text
    assert counts == [9, 9]
    for one, other in zip(reports[0].layers, reports[1].layers, strict=True):
        assert one.tokens == other.tokens and one.relative_error == pytest.approx(other.relative_error, rel=0.05)


# ---- estimates --------------------------------------------------------------------------------------------------

GIB = 2**30


def work_of_8b(lookahead=0, batch_size=None, **options):
    shapes = {f"self_attn.{name}_proj": (4096, 4096) for name in "qo"} | {
        f"self_attn.{name}_proj": (1024, 4096) for name in "kv"
    }
    shapes |= {"mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336)}
    config = AqlmConfig.from_scheme("2x8g8", finetune_epochs=1, finetune_lookahead=lookahead, **options)
    sizes = {"tokens": 512 * 2048, "sequence_length": 2048, "hidden_size": 4096, "config": config}
    bytes_ = {"block_bytes": 416 * 2**20, "ahead_bytes": 416 * 2**20, "start_bytes": 2004 * 2**20}
    return Work.from_shapes(shapes, **sizes, **bytes_, batch_size=batch_size)


def test_activations_stay_on_a_device_as_far_as_they_fit(tmp_path, monkeypatch):
    works = [work_of_8b()] * 32
    monkeypatch.setattr(estimate, "available_memory", lambda: 100 * GIB)
    large, small = (plan_on_device((None, limit), works, 79 * GIB, resident=GIB) for limit in (None, 24 * GIB))
    assert large.device_activations == works[0].activations() and not large.on_disk
    assert 0 < small.device_activations < works[0].activations() and small.device_bytes <= 24 * GIB
    assert small.memory_bytes > large.memory_bytes and not small.on_disk
    monkeypatch.setattr(estimate, "available_memory", lambda: GIB)
    assert plan_on_device((None, 20 * GIB), works, 79 * GIB, resident=GIB).on_disk
    room = 5 * GIB
    tight = plan_on_device((room, 20 * GIB), works, 79 * GIB, resident=GIB, work_dir=tmp_path)
    assert tight.on_disk and tight.memory_bytes <= room and tight.directory == tmp_path


def test_limits_of_a_device_are_refused_before_the_work():
    works = [work_of_8b()] * 32
    with pytest.raises(
        ValueError, match=r"device_memory_limit: got 1073741824 \(1.0 GiB\), expected at least"
    ) as caught:
        plan_on_device((None, GIB), works, 79 * GIB, resident=GIB)
    needed = int(str(caught.value).partition("at least ")[2].split()[0])
    assert plan_on_device((None, needed), works, 79 * GIB, resident=GIB).device_activations == 0
    with pytest.raises(ValueError, match=r"device: got 1020054732 .*, of the GPU's memory that is free"):
        plan_on_device((None, None), works, GIB, resident=GIB)
    with pytest.raises(ValueError, match="memory_limit: got 1073741824"):
        plan_on_device((GIB, None), works, 79 * GIB, resident=GIB)


def test_an_8b_model_fits_16_gib_of_a_gpu_and_24_of_the_host():
    works = [work_of_8b(2, 4)] * 32
    small, large = (
        plan_on_device(limits, works, 79 * GIB, resident=6 * GIB) for limits in ((24 * GIB, 16 * GIB), (10**12, None))
    )
    assert small.again and not small.on_disk and small.device_bytes <= 16 * GIB and small.memory_bytes <= 24 * GIB
    assert not large.again and large.device_activations == works[0].activations() == 3 * 512 * 2048 * 4096 * 2
    assert works[0].activations(True) == 2 * 512 * 2048 * 4096 * 2
    seconds = [Estimator(works, plan, Rates()).estimate().seconds_total for plan in (large, small)]
    assert seconds[0] < seconds[1]
    embeddings = dataclasses.replace(works[0], layers=((128256, 4096),), inputs=(4096,), comes_first=True)
    assert embeddings.device_memory() > works[0].device_memory()
    first = plan_on_device((24 * GIB, 16 * GIB), [embeddings, *works], 79 * GIB, resident=6 * GIB)
    assert first.device_activations == small.device_activations and first.device_bytes <= 16 * GIB


@pytest.mark.parametrize("gib", [1, 6, 8.7, 9, 10, 11, 12, 14, 30])
def test_a_pass_has_as_many_sequences_as_a_gpu_has_memory_for(gib):
    works = [work_of_8b(2)] * 32
    size = fitting_batch_size(int(gib * GIB), works, 79 * GIB, 4)
    assert size in (1, 2, 4) and fitting_batch_size(None, works, int(gib * GIB / 0.95), 4) == size
    whole, parts = ({n: work_of_8b(2, n).device_memory(most) for n in (4, 2, 1)} for most in (None, 0))
    assert size == next((n for needs in (whole, parts) for n, need in needs.items() if need <= gib * GIB), 1)
    assert parts[1] <= parts[2] < parts[4] and parts[1] < whole[1]
    if parts[1] > gib * GIB:
        with pytest.raises(ValueError, match=r"device_memory_limit: got .* on batches of 2048 tokens"):
            plan_on_device((None, int(gib * GIB)), [work_of_8b(2, size)] * 32, 79 * GIB, resident=GIB)


@pytest.mark.parametrize("layers", [None, "v_proj"])
def test_a_batch_takes_what_a_token_goes_through(layers):
    model, config = tiny_mixtral(), AqlmConfig.from_scheme("1x4g8", finetune_epochs=1)
    plan = make_plan(model, config, layers)
    works = works_of(model, plan, plan.config, 1024, 64)
    attention, expert = 2 * 64 + 2 * 48, 3 * (32 + 48)
    linears = [module for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    router = sum(32 + 4 for linear in linears if linear.out_features == 4)  # in some transformers no linear
    assert {work.width for work in works} == {attention + 2 * expert + router}
    plan = make_plan(tiny_llama(), AqlmConfig.from_scheme("1x4g8", rules={"embed": "2x4g8"}))
    first, second, _ = works_of(tiny_llama(), plan, plan.config, 1024, 64)
    assert first.comes_first and not second.comes_first and first.width == second.width == 2 * 64 + 2 * 48 + 3 * 96


def test_codes_that_are_searched_again_keep_weights_and_h():
    assert work_of_8b(finetune_search=1).device_memory() > work_of_8b().device_memory() + 4 * work_of_8b().weights
    assert work_of_8b(finetune_search=1).memory() > work_of_8b().memory() + 4 * work_of_8b().weights


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_batch_size_follows_the_limit(epochs, monkeypatch):
    """As on a GPU, with an invented one."""
    config = AqlmConfig.from_scheme("1x4g8", finetune_epochs=epochs, finetune_lookahead=1, **FEW)
    tokens, free, known = random_tokens(16, 96), 10**9, {}
    monkeypatch.setattr(pipeline, "is_gpu", lambda device: True)
    monkeypatch.setattr(pipeline, "free_device_memory", lambda device: free)
    fitting = pipeline.fitting_batch_size

    def recorded(limit, works, *others):
        known.update(
            {
                (n, most): max(dataclasses.replace(work, batch_size=n).device_memory(most) for work in works)
                for n in (1, 2)
                for most in (0, None)
            }
        )
        return fitting(limit, works, *others)

    monkeypatch.setattr(pipeline, "fitting_batch_size", recorded)
    whole = aqlm_c.quantize_model(tiny_llama(), tokens, config)
    assert whole.plan["batch_size"] == (4 if epochs else 16) and known[1, None] < known[2, None]
    model, other = tiny_llama(), tiny_llama()
    few = aqlm_c.quantize_model(model, tokens, config, device_memory_limit=known[2, None])
    assert few.plan["batch_size"] == 2
    monkeypatch.setattr(pipeline, "is_gpu", lambda device: False)
    aqlm_c.quantize_model(other, tokens, config, batch_size=2)
    assert_same(model, other)
    monkeypatch.setattr(pipeline, "is_gpu", lambda device: True)
    words = f"device_memory_limit: got {known[2, None]} .*, for a step of the work on batches of 384 tokens"
    with pytest.raises(ValueError, match=words):
        aqlm_c.quantize_model(tiny_llama(), tokens, config, device_memory_limit=known[2, None], batch_size=4)
    free = known[1, 0] - 1
    with pytest.raises(ValueError, match=r"device: got \d+ .*, for a step of the work on batches of 96 tokens"):
        aqlm_c.quantize_model(tiny_llama(), tokens, config)


def test_layers_of_a_module_are_in_one_group():
    shapes = {
        "a.q": (8, 8),
        "a.k": (8, 8),
        "b.0.up": (8, 8),
        "b.0.down": (8, 16),
        "b.1.up": (8, 8),
        "b.1.down": (8, 16),
    }
    assert groups_of(shapes, None) == [list(shapes)]
    assert groups_of(shapes, 10**6) == [list(shapes)]
    assert groups_of(shapes, 0) == [["a.q", "a.k"], ["b.0.up", "b.0.down"], ["b.1.up", "b.1.down"]]


# ---- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "device: got 'gpu', expected cpu, cuda, cuda:N or auto"),
        ({"device_memory_limit": "a lot"}, "device_memory_limit: got 'a lot', expected a number of bytes"),
    ],
)
def test_options_of_a_device(options, words):
    with pytest.raises(ValueError, match=words):
        aqlm_c.quantize_model(tiny_llama(), random_tokens(4, 8), "1x4g8", **options)
    with pytest.raises(ValueError, match=words):
        aqlm_c.RunConfig("model", "out", **options)


def test_an_unknown_option_is_no_option():
    with pytest.raises(TypeError, match="unexpected keyword argument 'devise'"):
        aqlm_c.quantize_model(tiny_llama(), random_tokens(4, 8), "1x4g8", devise="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="device: got 'cuda', expected cpu or auto, since no CUDA device is visible"):
        aqlm_c.quantize_model(tiny_llama(), random_tokens(4, 8), "1x4g8", device="cuda")


def test_a_work_directory_is_of_one_kind_of_device(tmp_path, monkeypatch):
    config = AqlmConfig.from_scheme("1x4g8", finetune_epochs=0, **FEW)
    aqlm_c.quantize_model(tiny_llama(), random_tokens(4, 16), config, work_dir=tmp_path)
    monkeypatch.setattr(pipeline, "kind_of_device", lambda _: "a GPU")
    with pytest.raises(ValueError, match=r"holds another run .*device: 'cpu' in WORK_DIR, 'a GPU' now"):
        aqlm_c.quantize_model(tiny_llama(), random_tokens(4, 16), config, work_dir=tmp_path)


# ---- on a GPU ---------------------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and aqlm_c.core.extensions.has_cuda),
        reason="no GPU, or built without its kernels",
    ),
]
TUNED = AqlmConfig.from_scheme("2x8g8", ldl_passes=2, max_sweeps=2, finetune_epochs=1, finetune_held_out=0.25)


def small_llama(dtype=torch.bfloat16):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "tie_word_embeddings": False}
    return tiny_llama(dtype, **sizes)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=gpu) for d in (torch.float32, torch.float16, torch.bfloat16)])
def test_a_gpu_comes_as_close_as_the_cpu(dtype):
    models, tokens = [small_llama(dtype), small_llama(dtype)], random_tokens(16, 64)
    config = TUNED.replace(finetune_epochs=0)
    cpu, device = (
        aqlm_c.quantize_model(model, tokens, config, device=place)
        for model, place in zip(models, ("cpu", "cuda"), strict=True)
    )
    assert {parameter.device.type for parameter in models[1].parameters()} == {"cpu"}
    assert device.device == torch.cuda.get_device_name() and device.to_dict()["peak_device_memory_bytes"] > 0
    errors = [(one.relative_error, other.relative_error) for one, other in zip(cpu.layers, device.layers, strict=True)]
    assert all(other == pytest.approx(one, rel=0.1) for one, other in errors)  # k-means takes other ways
    assert sum(other for _, other in errors) == pytest.approx(sum(one for one, _ in errors), rel=0.02)


@pytest.mark.parametrize("limit", [pytest.param("1MiB", marks=gpu)])
def test_a_gpu_with_too_little_memory_is_refused(limit):
    model = small_llama()
    with pytest.raises(ValueError, match="device_memory_limit: got 1048576"):
        aqlm_c.quantize_model(model, random_tokens(16, 64), TUNED, device="cuda", device_memory_limit=limit)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("solver", [pytest.param(solver, marks=gpu) for solver in METHODS])
def test_a_layer_is_quantized_where_it_is(solver):
    linear, X = torch.nn.Linear(128, 96).cuda().bfloat16(), torch.randn(512, 128)
    dense = get_method(solver).is_dense(get_method(solver).options_type())
    scheme = "2x8g8" if dense else {"kmeans": "1x6g8"}.get(solver, "2x6g8")
    H, config = X.T @ X / len(X), AqlmConfig.from_scheme(scheme, solver=solver, seed=3)
    layer, solved = aqlm_c.quantize_linear(linear, H.numpy(), config)
    assert {parameter.device.type for parameter in layer.parameters()} == {"cuda"}
    assert {tensor.device.type for tensor in solved.tensors().values()} == {"cuda"}
    on_cpu = aqlm_c.quantize_weight(linear.weight.detach().cpu(), H, config, dtype="bfloat16")
    assert solved.relative_error == pytest.approx(on_cpu.relative_error, rel=0.05)
    zero = aqlm_c.quantize_weight(torch.zeros(32, 128, device="cuda"), H.cuda(), config)
    assert zero.relative_error == 0 and not zero.decode().any() and zero.decode().device.type == "cuda"


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=gpu) for kind in MODELS])
def test_a_model_on_a_gpu_stays_there_and_has_the_bits_of_one_that_comes(kind):
    models, tokens = [MODELS[kind](), MODELS[kind]().cuda()], random_tokens(8, 24)
    config = AqlmConfig.from_scheme("2x4g8", finetune_epochs=1, finetune_search=1, **FEW)
    aqlm_c.quantize_model(models[0], tokens, config, device="cuda")
    aqlm_c.quantize_model(models[1], tokens, config)
    assert {parameter.device.type for parameter in models[1].parameters()} == {"cuda"}
    assert_same(models[1].cpu(), models[0])


@pytest.mark.parametrize("tied", [pytest.param(tied, marks=gpu) for tied in (True, False)])
def test_embeddings_and_no_data_on_a_gpu(tied):
    if tied and not TIES:
        pytest.skip("tied embeddings need transformers 5")
    model = tiny_llama(tie_word_embeddings=tied)
    config = AqlmConfig.from_scheme("2x4g8", rules={"embed_tokens": "2x4g8"}, finetune_epochs=0)
    for tokens in (None, random_tokens(8, 24)):
        other = copy.deepcopy(model)
        report = aqlm_c.quantize_model(other, tokens, config, device="cuda")
        assert report.layers[0].embedding and {p.device.type for p in other.parameters()} == {"cpu"}
        assert other(random_tokens(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize("place", [pytest.param(place, marks=gpu) for place in ("host", "disk")])
def test_activations_away_from_a_gpu_change_no_bit(place, tmp_path, monkeypatch):
    models, tokens = [small_llama(), small_llama()], random_tokens(16, 64)
    aqlm_c.quantize_model(models[0], tokens, TUNED, device="cuda")
    host = {"host": None, "disk": 0}[place]
    monkeypatch.setattr(pipeline, "Room", lambda device, *_: Room(device, 0, host, tmp_path))
    aqlm_c.quantize_model(models[1], tokens, TUNED, device="cuda")
    assert_same(*models)
