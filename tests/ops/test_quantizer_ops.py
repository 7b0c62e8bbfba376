"""The quantizer as torch ops: the bits of `_core`, for any number of threads, and its errors."""

import numpy as np
import pytest
from layers import random_layer, random_state

torch = pytest.importorskip("torch")
from aqlm_c import _core  # noqa: E402
from aqlm_c.core import extensions  # noqa: E402

OPS = extensions.ops

# out, in, K, B, g: outputs around pieces and tiles, one and several codebooks, codes of 1 and of 2 bytes.
SHAPES = [(48, 64, 2, 4, 8), (130, 256, 2, 8, 8), (33, 96, 3, 3, 4), (40, 128, 1, 10, 16), (70, 264, 4, 5, 8)]
IDS = ["{2}x{3}g{4}-{0}x{1}".format(*shape) for shape in SHAPES]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def to_torch(x):
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def same(name, *arguments, **options):
    """The results of `_core`'s function, once the op is seen to give the same ones."""
    expected = getattr(_core, name)(*arguments, **options)
    found = getattr(OPS, name)(*map(to_torch, arguments), **{key: to_torch(x) for key, x in options.items()})
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    pairs = list(zip(found, expected, strict=True)) if isinstance(expected, tuple) else [(found, expected)]
    for tensor, array in pairs:
        if isinstance(array, float):
            assert tensor.shape == () and tensor.dtype == torch.float64 and tensor.item() == array
        else:
            assert tensor.numpy().dtype == array.dtype and tensor.shape == array.shape
            assert tensor.numpy().tobytes() == array.tobytes()
    return expected


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_same_bits_as_core(shape, threads):
    out, inp, K, B, g = shape
    W, H = random_layer(out, inp)
    scales = np.abs(W).mean(1)
    X = np.random.default_rng(1).standard_normal((2100, inp)).astype(np.float32)
    totals = np.zeros((inp, inp)), torch.zeros(inp, inp, dtype=torch.float64)
    _core.accumulate_hessian(totals[0], X)
    assert OPS.accumulate_hessian(totals[1], torch.from_numpy(X)) is None
    assert np.array_equal(totals[0], totals[1].numpy())
    crosses = np.zeros((inp, inp - 1)), torch.zeros(inp, inp - 1, dtype=torch.float64)
    _core.accumulate_product(crosses[0], X, np.ascontiguousarray(X[:, 1:]))
    assert OPS.accumulate_product(crosses[1], torch.from_numpy(X), torch.from_numpy(X)[:, 1:]) is None
    assert np.array_equal(crosses[0], crosses[1].numpy())
    same("correct_weight", W, (H[::-1] / 8).copy(), H, 0.5, 1e-2)

    same("residual_kmeans", W, scales, K, B, g, column_weight=np.diag(H).copy())
    codes, codebooks = same("residual_kmeans", W, scales, K, B, g, 10, 1e-4, 3)
    factor = same("factor_hessian", H, g, 1e-2)
    for beam_size, pairs in [(1, False), (5, False)] + [(0, False), (3, True)] * (K > 1 and B <= 8):
        same("search_ldl", W, *factor, codebooks, scales, beam_size, pairs)
        codes = same("search_sweep", codes, W, H, codebooks, scales, beam_size, seed=7, pairs=pairs)
    moments = np.zeros((2, codebooks.size + out))
    *_, moments = same("update_adam", codebooks, scales, moments, W, H, codes, 3, 1e-3)
    same("update_adam", codebooks, scales, moments, W, H, codes, 2, 1e-3, 3)
    codebooks = same("update_codebooks", codebooks, W, H, codes, scales, 6)
    scales = same("update_scales", scales, W, H, codes, codebooks)
    same("quantization_error", W, H, codes, codebooks, scales)
    same("quantization_error", W, H)
    same("gaussian_reference", np.linalg.eigvalsh(H.astype(np.float64)), 2.0)
    same("unpack_codes", same("pack_codes", codes, B), B)


@pytest.mark.parametrize("of_bytes", [False, True])
def test_buffer_steps_have_the_bits_of_core(of_bytes, threads):
    generator = np.random.default_rng(0)
    kinds = (np.int8, np.uint8) if of_bytes else (np.float32, np.float32)
    given = [generator.standard_normal((130, 96)).astype(np.float32), *(np.zeros((130, 96), kind) for kind in kinds)]
    given.append(np.zeros((2, 49), np.float32) if of_bytes else None)
    tensors = [None if one is None else torch.from_numpy(one.copy()) for one in given]
    for step in (1, 2, 3):
        gradient = torch.from_numpy(generator.standard_normal((130, 96)).astype(np.float32)).bfloat16()
        buffer, *moments = given
        _core.buffer_step(buffer, gradient.float().numpy(), *moments, 3.0, 1e-2, 0.5, 0.95, step)
        buffer, *moments = tensors
        assert OPS.buffer_step(buffer, gradient.T.contiguous().T, *moments, 3.0, 1e-2, 0.5, 0.95, step) is None
    for array, tensor in zip(given, tensors, strict=True):
        assert array is None or array.tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_buffer_steps_are_those_of_torchs_adam(beta1):
    """Up to last bits: of each of 20 steps at most one in a million of its size."""
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(48, 264, generator=generator)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.Adam([theirs], lr=1e-2, betas=(beta1, 0.95), eps=1e-12)
    first, second = (torch.zeros_like(ours) for _ in range(2))
    for step in range(1, 21):
        gradient = 1e-4 * torch.randn(48, 264, generator=generator) * torch.rand(264, generator=generator)
        theirs.grad = gradient / 16
        optimizer.step()
        OPS.buffer_step(ours, gradient, first, second, None, 16.0, 1e-2, beta1, 0.95, step)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(second, optimizer.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=0)


def test_strided_arguments_are_copied_and_none_is_changed():
    W, H = map(torch.from_numpy, random_layer(24, 64))
    state = [torch.from_numpy(x) for x in random_state(24, 64, 2, 4, 8)]
    given = [W, H, *state]
    strided = [t.mT.contiguous().mT if t.dim() == 2 else t for t in given]
    before = [t.clone() for t in given]
    codes, codebooks, scales = state
    for W_, H_, *_ in (given, strided):
        results = [
            OPS.search_sweep(codes, W_, H_, codebooks, scales, 2),
            OPS.update_codebooks(codebooks, W_, H_, codes, scales, 3),
            OPS.update_scales(scales, W_, H_, codes, codebooks),
        ]
        if W_ is W:
            expected = results
    assert all(map(torch.equal, results, expected))
    assert all(map(torch.equal, given, before))


def valid():
    W, H = map(torch.from_numpy, random_layer(4, 32))
    codes, codebooks, scales = map(torch.from_numpy, random_state(4, 32, 2, 4, 8))
    return {"codes": codes, "weight": W, "H": H, "codebooks": codebooks, "scales": scales}


def numbers(*shape, dtype=torch.float32, fill=0.0):
    return torch.full(shape, fill, dtype=dtype)


NAN, F64 = float("nan"), torch.float64


@pytest.mark.parametrize(
    ("verb", "change", "message"),
    [
        ("search_sweep", {"beam_size": 65}, "beam_size: got 65, expected 0 (exact pairs) or 1..64"),
        ("search_sweep", {"codes": numbers(4, 4, 2, dtype=torch.uint16, fill=16)}, "codes: got 16 at flat index 0"),
        ("search_sweep", {"codes": numbers(4, 4, 3, dtype=torch.uint16)}, "got shape [4, 4, 3], expected [4, 4, 2]"),
        ("search_sweep", {"codes": numbers(4, 4, 2, dtype=torch.int64)}, "codes: got dtype int64, expected uint16"),
        ("search_sweep", {"codebooks": numbers(2, 15, 8)}, "codebooks: got 15 entries, expected a power of two"),
        ("search_sweep", {"codebooks": numbers(2, 16, 6)}, "in_group_size must be 4, 8, 16 or 32; got out_features=4"),
        ("search_sweep", {"H": numbers(8, 8)}, "H: got shape [8, 8], expected [32, 32]"),
        ("search_sweep", {"H": numbers(32, 32, fill=NAN)}, "search_sweep: H is not positive definite"),
        ("search_sweep", {"weight": numbers(4)}, "weight: got shape [4], expected [any, any]"),
        ("search_sweep", {"scales": numbers(4, dtype=F64)}, "scales: got dtype float64, expected float32"),
        (
            "search_sweep",
            {"codes": None, "codebooks": numbers(1, 16, 8), "pairs": True},
            "pairs: got True (exact pairs",
        ),
        ("search_ldl", {"order": numbers(4, dtype=torch.int32)}, "order: expected a permutation of 0..3"),
        ("search_ldl", {"metric": numbers(4, 8)}, "metric: got shape [4, 8], expected [4, 8, 8]"),
        ("residual_kmeans", {"tolerance": NAN}, "tolerance: got nan, expected a number >= 0"),
        ("residual_kmeans", {"init_max_iter": 0}, "init_max_iter: got 0, expected at least 1"),
        ("residual_kmeans", {"num_codebooks": 9}, "num_codebooks must be in 1..8; got out_features=4"),
        ("residual_kmeans", {"column_weight": numbers(3)}, "column_weight: got shape [3], expected [32]"),
        ("factor_hessian", {"H": numbers(3, 32)}, "H: got shape [3, 32], expected a square matrix"),
        ("factor_hessian", {"relative_damp": -1.0}, "relative_damp: got -1, expected a number >= 0"),
        ("factor_hessian", {"H": numbers(32, 32)}, "factor_hessian: H is not positive definite"),
        ("correct_weight", {"cross": numbers(8, 8)}, "cross: got shape [8, 8], expected [32, 32]"),
        ("correct_weight", {"relative_damp": -1.0}, "relative_damp: got -1, expected a number >= 0"),
        ("correct_weight", {"H": numbers(32, 32, fill=-1.0)}, "correct_weight: H is not positive definite"),
        ("accumulate_product", {"y": numbers(3, 32)}, "y: got shape [3, 32], expected [5, any]"),
        ("accumulate_product", {"sum": numbers(64, 32, dtype=F64)[::2]}, "sum: got a strided tensor"),
        ("accumulate_hessian", {"sum": numbers(64, 32, dtype=F64)[::2]}, "sum: got a strided tensor"),
        ("accumulate_hessian", {"sum": numbers(32, 32)}, "sum: got dtype float32, expected float64"),
        ("update_codebooks", {"cg_steps": -1}, "cg_steps: got -1, expected at least 0"),
        ("update_adam", {"steps": -1}, "steps: got -1, expected a number >= 0"),
        ("update_adam", {"learning_rate": NAN}, "learning_rate: got nan, expected a number >= 0"),
        ("update_adam", {"moments": numbers(2, 3, dtype=F64)}, "moments: got shape [2, 3], expected [2, 260]"),
        ("buffer_step", {"step": 0}, "step: got 0, expected at least 1"),
        ("buffer_step", {"beta2": 1.0}, "beta2: got 1, expected a number in [0, 1)"),
        ("buffer_step", {"divisor": NAN}, "divisor: got nan, expected a number > 0"),
        (
            "buffer_step",
            {"first": None, "scales": None, "second": numbers(4, 32)},
            "first: got None, expected a tensor for a beta1 above 0",
        ),
        ("buffer_step", {"second": numbers(4, 32)}, "second: got dtype float32, expected uint8"),
        ("buffer_step", {"scales": numbers(2, 3)}, "scales: got shape [2, 3], expected [2, 1]"),
        ("buffer_step", {"buffer": numbers(8, 32)[::2]}, "buffer: got a strided tensor, expected one to write into"),
        ("buffer_step", {"gradient": numbers(4, 32, dtype=F64)}, "gradient: got dtype float64, expected float32"),
        ("quantization_error", {"scales": None}, "scales: got None, expected a tensor beside codes"),
        ("gaussian_reference", {"eigenvalues": numbers(0, dtype=F64)}, "eigenvalues: got none, expected at least one"),
        ("gaussian_reference", {"rate": -1.0}, "rate: got -1, expected a number >= 0"),
        ("pack_codes", {"nbits_per_codebook": 17}, "nbits_per_codebook: got 17, expected 1..16"),
        ("pack_codes", {"nbits_per_codebook": 1}, "expected 0..1 for nbits_per_codebook=1"),
        ("unpack_codes", {}, "codes: got dtype uint16, expected int8"),
        (
            "unpack_codes",
            {"codes": numbers(1, 1, 1, dtype=torch.int8, fill=8)},
            "got 8 at flat index 0, expected -8..7",
        ),
    ],
)
def test_errors(verb, change, message):
    arguments = valid() | {"order": torch.arange(4, dtype=torch.int32), "feedback": numbers(32, 32)}
    arguments |= {"metric": torch.eye(8).repeat(4, 1, 1), "num_codebooks": 2, "nbits_per_codebook": 4, "cg_steps": 1}
    arguments |= {"in_group_size": 8, "relative_damp": 0.0, "moments": numbers(2, 260, dtype=F64), "steps": 1}
    arguments |= {"learning_rate": 1e-3, "eigenvalues": numbers(3, dtype=F64, fill=1.0), "rate": 1.0}
    arguments |= {"sum": numbers(32, 32, dtype=F64), "x": numbers(5, 32), "y": numbers(5, 32)}
    arguments |= {"cross": numbers(32, 32), "alpha": 1.0}
    if verb == "buffer_step":
        arguments |= {"buffer": numbers(4, 32), "gradient": numbers(4, 32), "first": numbers(4, 32, dtype=torch.int8)}
        arguments |= {"second": numbers(4, 32, dtype=torch.uint8), "scales": numbers(2, 1), "divisor": 1.0}
        arguments |= {"beta1": 0.5, "beta2": 0.95, "step": 1}
    arguments |= change
    if arguments["codes"] is None:
        arguments["codes"] = numbers(4, 4, 1, dtype=torch.uint16)
    names = [argument.name for argument in getattr(OPS, verb).default._schema.arguments]
    with pytest.raises(ValueError) as error:
        getattr(OPS, verb)(**{name: arguments[name] for name in names if name in arguments})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_schemas_are_the_signatures_of_core():
    """Names and order of arguments, and which have defaults, are those of _core.pyi."""
    import ast
    from pathlib import Path

    import aqlm_c

    stub = ast.parse((Path(aqlm_c.__file__).parent / "_core.pyi").read_text())
    functions = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    verbs = [name for name in functions if hasattr(OPS, name) and name not in ("decode_rows", "matmul")]
    assert len(verbs) == 16
    for verb in verbs:
        arguments = getattr(OPS, verb).default._schema.arguments
        assert [a.name for a in arguments] == [a.arg for a in functions[verb].args], verb
        defaults = [ast.literal_eval(node) for node in functions[verb].defaults]
        assert [a.default_value for a in arguments if a.has_default_value()] == defaults, verb


def test_ctrl_c_stops_a_verb(threads):
    import signal
    import threading
    import time

    from aqlm_c import Format
    from aqlm_c.core import verbs

    W = torch.from_numpy(random_layer(512, 512)[0])
    arguments = (W, torch.ones(512), Format.parse("8x12g8"), 10_000, 0.0, 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = time.monotonic()
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
        with pytest.raises(KeyboardInterrupt):
            verbs.residual_kmeans(*arguments)
        assert time.monotonic() - started < 2.5
    finally:
        signal.signal(signal.SIGINT, before)
    same("residual_kmeans", W.numpy()[:64], np.ones(64, np.float32), 2, 4, 8)  # the next call is not disturbed
