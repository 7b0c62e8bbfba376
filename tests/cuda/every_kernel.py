"""Each kernel of the quantizer a few times, on sizes so small that compute-sanitizer's slowest tools end in minutes.

    export PYTHONPATH=tests/support:.
    compute-sanitizer --tool racecheck --kernel-name kns=aqlm_cuda python tests/cuda/every_kernel.py --without-sums
    compute-sanitizer --tool initcheck python tests/cuda/every_kernel.py

Results are looked at by test_quantizer.py. --without-sums: without those of 16-bit rows, since racecheck breaks off
inside of cuBLAS, which multiplies them. --device cpu: the same calls of the C core.
"""

import argparse

import numpy as np
import torch
from layers import random_layer

from aqlm_c.core import verbs
from aqlm_c.format import Format
from aqlm_c.nn import ops

# out, in, K, B, g, beam_size, pairs: as SEARCHES of test_quantizer.py, each way a search takes.
SEARCHES = [
    *((40, 48, 2, 8, 8, 0, False), (300, 48, 2, 8, 8, 0, False), (20, 48, 2, 1, 4, 0, False)),
    *((20, 64, 2, 8, 16, 0, False), (20, 64, 2, 8, 32, 0, False), (36, 32, 3, 8, 8, 0, False)),
    *((40, 32, 3, 8, 8, 4, True), (20, 32, 4, 6, 8, 7, True), (17, 32, 8, 3, 16, 2, True)),
    *((40, 48, 1, 8, 8, 1, False), (40, 48, 1, 12, 8, 1, False), (33, 32, 1, 16, 8, 1, False)),
    *((20, 32, 2, 12, 8, 1, False), (20, 32, 2, 8, 8, 5, False), (20, 32, 3, 3, 4, 3, False)),
    *((20, 64, 2, 6, 32, 2, False),),
]


def calls(convert):
    """(what, verb, arguments) of all; convert: of arrays to the device."""
    for out, inp, K, B, g, beam_size, pairs in SEARCHES:
        W, H = random_layer(out, inp, seed=K)
        w, h = convert(W), convert(H)
        s = convert(np.sqrt(np.square(W).mean(1)).astype(np.float32))
        scheme = f"{K}x{B}g{g} {out}x{inp}"
        codes, books = verbs.residual_kmeans(w, s, Format(K, B, g), 2, 1e-3, 1, convert(np.diag(H).copy()))
        factor = verbs.factor_hessian(h, g, 1e-3)
        yield f"search_ldl {scheme}", verbs.search_ldl, (w, *factor, books, s, beam_size, pairs)
        yield f"search_sweep {scheme}", verbs.search_sweep, (codes, w, h, books, s, beam_size, 1, pairs)
        yield f"update_codebooks {scheme}", verbs.update_codebooks, (books, w, h, codes, s, 2)
        yield f"update_scales {scheme}", verbs.update_scales, (s, w, h, codes, books)
        yield f"quantization_error {scheme}", verbs.quantization_error, (w, h, codes, books, s)
        if B < 16:
            moments = convert(np.zeros((2, books.shape[0] * books.shape[1] * books.shape[2] + out)))
            yield f"update_adam {scheme}", verbs.update_adam, ((books, s, moments), w, h, codes, 1, 1e-3, 0)
        yield f"codes {scheme}", verbs.codes_from_disk, (verbs.codes_to_disk(codes, B), B)
        cross = convert(np.ascontiguousarray(H.T))
        yield f"correct_weight {out}x{inp}", verbs.correct_weight, (w, cross, h, 0.5, 1e-2)
    for n in (8, 12, 192, 576):
        yield f"hadamard {n}", verbs.hadamard, (convert(np.ones((3, n), dtype=np.float32)),)


def torch_calls(device, sums_too):
    """Those that take tensors alone."""
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        for inp in (32, 33, 96) if sums_too or dtype == torch.float32 else ():
            x = torch.randn(300, inp, device=device).to(dtype)
            sums = torch.zeros(inp, inp, dtype=torch.float64, device=device)
            yield f"accumulate_hessian {inp} {dtype}", verbs.accumulate_hessian, (sums, x)
            product = torch.zeros(inp, 32, dtype=torch.float64, device=device)
            yield f"accumulate_product {inp} {dtype}", verbs.accumulate_product, (product, x, x[:, :32].clone())
        for of_bytes in (False, True):
            kinds = (torch.int8, torch.uint8) if of_bytes else (torch.float32, torch.float32)
            moments = *(torch.zeros(9, 40, dtype=kind, device=device) for kind in kinds), None
            if of_bytes:
                moments = *moments[:2], torch.zeros(2, 2, device=device)
            offset, gradient = torch.randn(9, 40, device=device), torch.randn(9, 40, device=device).to(dtype)
            arguments = moments, 7.0, 1e-2, (0.5, 0.95), 1
            yield f"buffer_step {of_bytes} {dtype}", verbs.buffer_step, (offset, gradient, *arguments)
        for words in (96, 1001) if device == "cuda" else ():
            original, logits = torch.randn(2, 3, words, device=device).to(dtype)
            yield f"divergence {words} {dtype}", ops.divergence, (original, logits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--without-sums", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    def convert(array):
        return array if args.device == "cpu" else torch.from_numpy(np.ascontiguousarray(array)).cuda()

    done = 0
    for made in (calls(convert), torch_calls(args.device, not args.without_sums)):
        for what, verb, arguments in made:
            try:
                verb(*arguments)
                if args.device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                raise SystemExit(f"{what}: {error}") from error
            done += 1
    print(f"{done} calls")


if __name__ == "__main__":
    main()
