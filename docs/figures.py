"""Draws the figures of docs/: python docs/figures.py, a minute or two on one core; the same files every time.

The layer is synthetic: Gaussian weights, inputs whose covariance has eigenvalues proportional to 1 / k in a random
basis, and channels of different sizes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from aqlm_c import AqlmConfig, Format, Hessian, _core, quantize_weight

FOLDER = Path(__file__).resolve().parent / "figures"
BLUE, ORANGE, GREEN, GREY = "#3f51b5", "#e07b00", "#2e8b57", "#777777"
STYLE = {"font.size": 11, "svg.hashsalt": "aqlm_c", "svg.fonttype": "path", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "figure.facecolor": "white"}


def layer(out_features=512, in_features=512, seed=0):
    """A weight [out, in] and the H of its inputs."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((in_features, in_features)))
    sizes = np.exp(0.5 * rng.standard_normal(in_features))
    covariance = (basis / np.arange(1, in_features + 1)) @ basis.T * np.outer(sizes, sizes)
    return rng.standard_normal((out_features, in_features)).astype(np.float32), covariance.astype(np.float32)


def save(figure, name):
    figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def representation():
    """A group of eight weights as a scale times the sum of two entries, real ones of a quantized weight."""
    W, H = layer(128, 128)
    found = quantize_weight(W, H, "2x4g8")
    codes = found.codes[0, 0].astype(int) % 16
    entries = [found.codebooks[k, codes[k], 0] for k in range(2)]
    scale = float(found.scales[0, 0, 0, 0])
    figure, axes = plt.subplots(1, 5, figsize=(10, 2.6), gridspec_kw={"width_ratios": [3, 3, 3, 3, 3]})
    tables = found.codebooks[:, :, 0]
    high = np.abs(tables).max()
    for k, axis in ((0, axes[0]), (1, axes[1])):
        axis.imshow(tables[k], cmap="RdBu", vmin=-high, vmax=high, aspect="auto")
        axis.add_patch(plt.Rectangle((-0.5, codes[k] - 0.5), 8, 1, fill=False, color="black", linewidth=2))
        axis.set_title(f"codebook {k + 1}\ncode {codes[k]}", color=(BLUE, ORANGE)[k])
        axis.set_xticks([]), axis.set_yticks([0, 5, 10, 15])
    for k, colour in ((0, BLUE), (1, ORANGE)):
        axes[2].bar(np.arange(8) + 0.4 * k - 0.2, entries[k], 0.4, color=colour)
    axes[2].set_title("the two entries")
    axes[3].bar(np.arange(8), sum(entries), 0.8, color=GREY)
    axes[3].set_title("their sum")
    axes[4].bar(np.arange(8) - 0.2, scale * sum(entries), 0.4, color=GREEN, label="decoded")
    axes[4].bar(np.arange(8) + 0.2, W[0, :8], 0.4, color="black", label="weight")
    axes[4].set_title(f"times the row's\nscale, {scale:.2f}")
    axes[4].legend(frameon=False, fontsize=8)
    for axis in axes[2:]:
        axis.set_xticks([]), axis.axhline(0, color="black", linewidth=0.5)
    figure.tight_layout()
    save(figure, "representation")


def solver():
    """The error after each step: from the start of k-means, with LDL passes and without, and the paper's recipe."""
    W, H = layer()
    hessian = Hessian(H)
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    starts = [("LDL passes, then sweeps (ldl, the default)", BLUE, {}), ("sweeps alone", ORANGE, {"ldl_passes": 0})]
    for label, colour, options in starts:
        found = quantize_weight(W, hessian, AqlmConfig.from_scheme("2x8g8", max_sweeps=8, **options))
        steps = [error for _, error in found.history]
        axis.plot(range(len(steps)), steps, ".-", color=colour, label=label)
        changes = [i for i, (step, _) in enumerate(found.history) if "sweep" in step]
        if changes and not options:
            axis.axvline(changes[0] - 0.5, color=GREY, linewidth=0.8, linestyle=":")
    rate = Format.parse("2x8g8").bits_per_weight(*W.shape)
    bound = _core.gaussian_reference(hessian.eigenvalues, rate) * np.mean(W**2) * len(W) * np.trace(H)
    axis.axhline(bound / np.einsum("oi,ij,oj", W, H, W), color=GREEN, linestyle="--", label="Gaussian reference")
    axis.set(yscale="log", xlabel="steps: a search, codebooks, scales", ylabel="relative error")
    axis.legend(frameon=False)
    save(figure, "solver")


def rates():
    """Relative error by true bits, of several schemes and of GPTQ, beside the Gaussian reference."""
    W, H = layer()
    hessian = Hessian(H)
    signal = np.einsum("oi,ij,oj", W, H, W)
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    bits = np.linspace(0.9, 4.6, 60)
    power = np.mean(W**2) * len(W) * np.trace(H) / signal
    eigenvalues = hessian.eigenvalues
    reference = [power * _core.gaussian_reference(eigenvalues, rate) for rate in bits]
    axis.plot(bits, reference, "--", color=GREEN, label="Gaussian reference")
    gptq = {"method": "gptq", "group_size": 64}
    families = [
        ("AQLM, groups of 8", BLUE, "1x8g8 2x8g8 3x8g8 4x8g8", {"max_sweeps": 4}),
        ("AQLM, groups of 4", ORANGE, "2x2g4 2x4g4 2x6g4 2x8g4", {"max_sweeps": 4}),
        ("GPTQ, groups of 64", GREY, "2x8g8 3x8g8 4x8g8", gptq),
    ]
    for label, colour, schemes, options in families:
        points = []
        for scheme in schemes.split():
            found = quantize_weight(W, hessian, AqlmConfig.from_scheme(scheme, **options))
            points.append((found.bits_per_weight, found.relative_error))
            if options is not gptq:
                axis.annotate(scheme, points[-1], textcoords="offset points", xytext=(5, 5), fontsize=9, color=colour)
        axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axis.set(yscale="log", xlabel="true bits per weight", ylabel="relative error")
    axis.legend(frameon=False)
    save(figure, "rates")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        representation()
        solver()
        rates()
