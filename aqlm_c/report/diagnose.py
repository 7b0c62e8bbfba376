"""What may be wrong with a quantization, from its report alone: a sentence each, with its measure and its cure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ..format import Format
from ..methods import DEFAULT, get_method
from .layers import BlockReport, LayerReport
from .report import QuantizationReport

_CODEBOOK_SHARE = 1 / 3  # of a layer's bits
_RISE = 0.02  # of the held-out error above its lowest
_FAR_DB = 3.0  # above the median layer: twice its distance
_FARTHEST_DB = 10.0  # however far the others are
_NAMED = 3


def diagnose(report: QuantizationReport) -> list[str]:
    """Sentences on what may be wrong in this run, the same thing in many layers being said once; none if all is well.

    Layers that no calibration token reached; fewer calibration tokens than twice in_features (H is then noise along
    many directions); codebooks larger than the layer's codes can use, or than a third of its bits; held-out error that
    rises while the training error falls; layers whose distance to the Gaussian reference at the true rate is 3 dB above
    the median's or over 10 dB.
    """
    rules = (_unreached, _few_tokens, _large_codebooks, _overfitting, _far_layers)
    return [sentence for rule in rules for sentence in rule(report)]


def _unreached(report: QuantizationReport) -> list[str]:
    silent = [layer for layer in report.layers if report.tokens and layer.tokens == 0]
    if not silent:
        return []
    return [
        f"No calibration token reached {_names(silent)}: quantized as if all inputs were white; give other or more "
        "calibration data, or leave such layers as they are."
    ]


def _few_tokens(report: QuantizationReport) -> list[str]:
    few = [layer for layer in report.layers if 0 < _tokens(report, layer) < 2 * layer.in_features]
    if not few:
        return []
    worst = min(few, key=lambda layer: _tokens(report, layer) / layer.in_features)
    tokens, needed = _tokens(report, worst), 2 * worst.in_features
    return [
        f"Fewer calibration tokens than twice in_features in {_names(few)}: down to {tokens:,} tokens for "
        f"in_features={worst.in_features:,}, where at least {needed:,} are needed; give {needed / tokens:.1f} times "
        "the tokens, by more or longer calibration sequences."
    ]


def _large_codebooks(report: QuantizationReport) -> list[str]:
    idle, costly = [], []
    for layer in report.layers:
        format = Format.parse(layer.scheme)
        groups = layer.out_features * layer.in_features // format.group_weights
        share = format.codebook_bits() / (layer.bits_per_weight * layer.out_features * layer.in_features)
        if format.entries > groups:
            idle.append((groups, layer))
        elif share > _CODEBOOK_SHARE:
            costly.append((share, layer))
    sentences = []
    cure = "use fewer bits per codebook (2x8 in place of 1x16), or keep small layers as they are."
    if idle:
        groups, worst = min(idle, key=lambda item: item[0])
        entries = Format.parse(worst.scheme).entries
        sentences.append(
            f"Codebook larger than the layer's codes ({worst.scheme}) in {_names([layer for _, layer in idle])}: "
            f"{entries:,} entries for as few as {groups:,} groups, {worst.bits_per_weight:.1f} true bits per weight; "
            + cure
        )
    if costly:
        share, worst = max(costly, key=lambda item: item[0])
        sentences.append(
            f"Codebooks take up to {share:.0%} of the true bits ({worst.bits_per_weight:.2f} per weight, "
            f"{worst.scheme}) in {_names([layer for _, layer in costly])}; " + cure
        )
    return sentences


def _overfitting(report: QuantizationReport) -> list[str]:
    rises = [(rise, block) for block in report.blocks if (rise := _rise(block)) > _RISE]
    if not rises:
        return []
    most = max(rise for rise, _ in rises)
    return [
        f"Held-out error rises while the training error falls in {_names([block for _, block in rises], 'block')}: "
        f"by up to {most:.0%} above its lowest, whose weights were kept; give more calibration sequences or a lower "
        "finetune_learning_rate."
    ]


def _rise(block: BlockReport) -> float:
    """The last held-out error above the lowest one, relative to it, if the training error fell meanwhile."""
    if not block.history:
        return 0.0
    lowest, training = min((held_out, training) for training, held_out in block.history)
    last_training, last = block.history[-1]
    return last / lowest - 1 if lowest > 0 and last_training < training else 0.0


def _far_layers(report: QuantizationReport) -> list[str]:
    known = [(distance, layer) for layer in report.layers if (distance := layer.db_above_true_rate) is not None]
    if not known:
        return []
    middle = median(distance for distance, _ in known)
    far = [(distance, layer) for distance, layer in known if distance > min(middle + _FAR_DB, _FARTHEST_DB)]
    if not far:
        return []
    distance, worst = max(far, key=lambda item: item[0])
    method = get_method(report.config.get("solver", DEFAULT))
    known_options = {name: report.config[name] for name in ("beam_size",) if name in report.config}
    helps = {help: None for _, layer in far for help in method.remedies(Format.parse(layer.scheme), known_options)}
    cures = ", ".join([*helps, "a scheme with smaller codebooks if they are small"])
    return [
        f"Far from the Gaussian reference at the true rate (a reference, not a bound): {_names([x for _, x in far])}, "
        f"up to {distance:.1f} dB in {worst.name} (median of all layers {middle:.1f} dB); "
        f"give such layers {cures}, or leave them out by --layers."
    ]


def _tokens(report: QuantizationReport, layer: LayerReport) -> int:
    return report.tokens if layer.tokens is None else layer.tokens


def _names(items: Sequence[LayerReport | BlockReport], what: str = "layer") -> str:
    """ "3 layers (a, b, c)" and "210 layers (a, b, c, ...)"."""
    names = ", ".join(item.name for item in items[:_NAMED]) + (", ..." if len(items) > _NAMED else "")
    return f"{len(items)} {what}{'s' if len(items) > 1 else ''} ({names})"
