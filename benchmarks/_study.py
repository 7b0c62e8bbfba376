"""Rows of a study on disk, and what they say: for ablation.py. Needs no torch.

A study is a set of trials, each a point with a seed. NAME.jsonl begins with a line of its settings; each finished
trial adds a line. Of several processes each writes a file of its own, NAME.I.jsonl.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Key = tuple[str, int]  # point, seed
BySeed = dict[int, float]


def key(row: Row) -> Key:
    return row["point"], row["seed"]


def _lines(path: Path) -> tuple[list[Row], int]:
    """Whole lines of a file, and how many bytes they are: what a killed run began to write after them is left out."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict) or ("settings" if number == 1 else "scores") not in fields:
            raise ValueError(f"--out: got {path.name}: line {number}: no row of a study, expected another folder")
        found.append(fields)
    return found, len(whole)


def size_text(point: str) -> str:
    return point.removesuffix("+pv")


def size(point: str) -> float:
    return float(size_text(point))


def in_order(study: str, rows: list[Row]) -> list[Row]:
    """Rows by size, where points have one, and by seed."""
    if study in ("domain", "format"):
        places = {point: place for place, point in enumerate(dict.fromkeys(row["point"] for row in rows))}
        return sorted(rows, key=lambda row: (places[row["point"]], row["seed"]))
    return sorted(rows, key=lambda row: (row["point"].endswith("+pv"), size(row["point"]), row["seed"]))


def check_settings(path: Path, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError, naming them, where the settings in a file are not those of the run."""
    here, there = json.loads(json.dumps(expected)), dict(got)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        said = "; ".join(f"{name} {json.dumps(there.get(name))} (here {json.dumps(here.get(name))})" for name in names)
        raise ValueError(f"--out: got {path.name} of other settings: {said}, expected the same or another folder")


class Found(NamedTuple):
    """What the files of a study hold. rows: each trial once, in the order of point and seed in which they came."""

    settings: dict[str, Any] | None
    headers: list[Row]
    rows: list[Row]


def files_of(out: Path, study: str) -> list[Path]:
    """NAME.jsonl, then those of several processes by number."""
    parts = [path for path in out.glob(f"{study}.*.jsonl") if path.suffixes[-2][1:].isdecimal()]
    return [*(path for path in [out / f"{study}.jsonl"] if path.is_file()), *sorted(parts)]


def load(out: Path, study: str, settings: Mapping[str, Any] | None = None) -> Found:
    """All rows of a study; ValueError for files of other settings, or whose settings are not those of each other."""
    headers, rows = list[Row](), dict[Key, Row]()
    for path in files_of(out, study):
        lines, _ = _lines(path)
        if not lines:
            continue
        settings = lines[0]["settings"] if settings is None else settings
        check_settings(path, lines[0]["settings"], settings)
        headers.append(lines[0])
        for row in lines[1:]:
            rows.setdefault(key(row), row)
    return Found(None if settings is None else dict(settings), headers, list(rows.values()))


def load_one(path: Path) -> list[Row]:
    """The rows of one file, none where it is not there."""
    return _lines(path)[0][1:] if path.is_file() else []


class Writer:
    """Adds rows to the end of a file, each on disk before the next trial begins; one process at a time."""

    def __init__(self, path: Path, header: Row) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise ValueError(f"--out: got {path.name}, which another run writes, expected --index of --of") from None
        lines, size = _lines(path)
        if lines:
            check_settings(path, lines[0]["settings"], header["settings"])
        self.file.truncate(size)
        if not lines:
            self.add(header)

    def add(self, row: Row) -> None:
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def share(trials: Sequence[Key], base: Iterable[Row], done: Iterable[Row], index: int, of: int) -> list[Key]:
    """Every `of`-th trial that `base`, the rows of NAME.jsonl, lacks, from number `index` on, without those done by
    now: which are whose does not depend on when each process starts.
    """
    have, finished = {key(row) for row in base}, {key(row) for row in done}
    missing = [trial for trial in trials if trial not in have]
    return [trial for trial in missing[index::of] if trial not in finished]


class Spread(NamedTuple):
    """Mean and sample standard deviation (None of one value) over n seeds."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        if not values:
            return cls(math.nan, None, 0)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def clear(self) -> bool:
        """Whether it is beyond twice its spread: what is not is not claimed. Of three seeds without any change one time
        in 13 is, and beyond its spread itself one in 4.
        """
        return self.deviation is not None and abs(self.mean) > 2 * self.deviation

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.deviation is None else f" ± {self.deviation:.2g}")


def values(rows: Iterable[Row], value: Callable[[Row], float]) -> dict[str, BySeed]:
    """By point and seed."""
    found: dict[str, BySeed] = {}
    for row in rows:
        found.setdefault(row["point"], {})[row["seed"]] = value(row)
    return found


def log_perplexity(row: Row) -> float:
    """Mean over the texts: its exponential is the geometric mean of their perplexities."""
    return statistics.fmean(math.log(score["perplexity"]) for score in row["scores"].values())


def log_of(text: str) -> Callable[[Row], float]:
    return lambda row: math.log(row["scores"][text]["perplexity"])


def change(before: BySeed, after: BySeed) -> Spread:
    """Of logarithms, in percent, seed by seed."""
    return Spread.of(100 * math.expm1(after[seed] - before[seed]) for seed in before if seed in after)


def told(found: Spread, verbs: tuple[str, str] = ("falls", "rises")) -> str:
    if found.n < 2:
        return f"has {found.n or 'no'} seed{'s' if not found.n else ''} to be compared by: nothing is claimed"
    if not found.clear:
        return f"changes by no more than twice its spread over seeds ({found.mean:+.2g}% ± {found.deviation:.2g})"
    return f"{verbs[found.mean > 0]} by {abs(found.mean):.3g}% ± {found.deviation:.2g}"


def settled(points: Sequence[str], found: Mapping[str, BySeed]) -> str | None:
    """The first point from which on no change is clear; None where that is the first or the last one, or
    where one seed cannot tell.
    """
    for index, point in enumerate(points):
        later = [change(found[point], found[other]) for other in points[index + 1 :]]
        if not any(one.clear for one in later):
            return point if 0 < index < len(points) - 1 and all(one.n > 1 for one in later) else None
    return None


def of_sizes(points: Sequence[str], found: Mapping[str, BySeed], unit: str, aside: str = "") -> str:
    """What becomes of perplexity from the first point to the last."""
    if len(points) < 2:
        return f"one size was measured, {points[0]} {unit}"
    said = (
        f"from {points[0]} to {points[-1]} {unit}{aside} perplexity {told(change(found[points[0]], found[points[-1]]))}"
    )
    point = settled(points, found)
    return said + (f"; no change beyond {point} exceeds twice its spread" if point else "")


def conclude_samples(rows: list[Row]) -> str:
    found = values(rows, log_perplexity)
    return of_sizes(sorted(found, key=int), found, "sequences")


def conclude_tokens(rows: list[Row]) -> str:
    found = values(rows, log_perplexity)
    plain, codes = (sorted((p for p in found if p.endswith("+pv") == pv), key=size) for pv in (False, True))
    said = [of_sizes(plain, found, "M tokens")] if plain else []
    if codes:
        with_codes = of_sizes(
            [size_text(point) for point in codes], {size_text(p): found[p] for p in codes}, "M tokens"
        )
        said.append(f"with codes too, {with_codes}")
    both = [point for point in plain if f"{point}+pv" in found]
    if both:
        gain = change(found[both[-1]], found[f"{both[-1]}+pv"])
        said.append(f"at {both[-1]} M tokens, with codes instead of without, perplexity {told(gain)}")
    return "; ".join(said)


def conclude_beam(rows: list[Row]) -> str:
    found, seconds = values(rows, log_perplexity), values(rows, lambda row: math.log(row["seconds"]))
    widths = sorted((point for point in found if point != "0"), key=int)

    def time(before: str, after: str) -> str:
        return f"{1 + change(seconds[before], seconds[after]).mean / 100:.3g} times"

    said = []
    if len(widths) > 1:
        longer = f", for {time(widths[0], widths[-1])} the time,"
        said.append(of_sizes(widths, found, "states of the beam", longer))
    if "0" in found and widths:
        gain, longer = told(change(found[widths[-1]], found["0"])), time(widths[-1], "0")
        said.append(f"with exact pairs instead of a beam of {widths[-1]}, for {longer} the time, perplexity {gain}")
    return "; ".join(said) or "one width was measured"


def conclude_domain(rows: list[Row]) -> str:
    """The loss by text calibrated on: over that of the text that is evaluated, and over the best one on average."""
    names = list(dict.fromkeys(row["point"] for row in rows))
    columns = {text: values(rows, log_of(text)) for text in rows[0]["scores"]}
    texts, found = list(columns), {name: columns[name] for name in names}
    if len(names) < 2:
        return "one text was calibrated on"
    seeds = [seed for seed in found[names[0]][names[0]] if all(seed in found[a][b] for a in names for b in names)]
    losses = {}
    for text in names:
        others = [name for name in names if name != text]
        losses[text] = {s: statistics.fmean(found[text][o][s] - found[text][text][s] for o in others) for s in seeds}
    none = dict.fromkeys(seeds, 0.0)
    whole = change(none, {s: statistics.fmean(losses[text][s] for text in names) for s in seeds})
    second, worst = sorted(names, key=lambda text: change(none, losses[text]).mean)[-2:]
    said = f"calibrated on another text than the one evaluated, of {len(names)}, perplexity {told(whole)}"
    if change(losses[second], losses[worst]).clear:
        most = change(none, losses[worst])
        said += f", most on {worst} ({most.mean:+.3g}% ± {most.deviation:.2g})"
    means = {n: {s: statistics.fmean(columns[t][n][s] for t in texts) for s in seeds} for n in names}
    order = sorted(names, key=lambda name: Spread.of(means[name].values()).mean)
    lead = change(means[order[1]], means[order[0]])
    if lead.clear:
        return (
            f"{said}; the best over all texts is {order[0]}, {-lead.mean:.3g}% ± {lead.deviation:.2g} below {order[1]}"
        )
    return f"{said}; which text is best over all, {order[0]} or {order[1]}, the seeds do not tell"


def conclude_format(rows: list[Row]) -> str:
    """Of formats with as many nominal bits a weight, which has the lower perplexity."""
    found, groups = values(rows, log_perplexity), dict[float, list[str]]()
    for row in {row["point"]: row for row in rows}.values():
        groups.setdefault(row["nominal bits"], []).append(row["point"])
    said, open_ones = list[str](), list[str]()
    for bits, points in sorted(groups.items(), reverse=True):
        if len(points) < 2:
            continue
        order = sorted(points, key=lambda point: Spread.of(found[point].values()).mean)
        gain = change(found[order[1]], found[order[0]])
        if gain.clear:
            said.append(f"{order[0]} at {bits:g} ({-gain.mean:.3g}% ± {gain.deviation:.2g} below {order[1]})")
        else:
            open_ones.append(f"at {bits:g} ({order[0]}, {order[1]})")
    if not said and not open_ones:
        return "no two formats of equal nominal bits were measured"
    found_best = f"of formats with equal nominal bits the lowest perplexity has {', '.join(said) or 'none for certain'}"
    return found_best + (f"; the seeds do not tell it {', '.join(open_ones)}" if open_ones else "")


CONCLUSIONS = {
    "samples": conclude_samples,
    "domain": conclude_domain,
    "beam": conclude_beam,
    "tokens": conclude_tokens,
    "format": conclude_format,
}


def conclusion(study: str, rows: list[Row]) -> str:
    """One sentence, of what is beyond its spread over seeds."""
    said = CONCLUSIONS[study](rows)
    return f"{said[0].upper()}{said[1:]}."


def means(rows: list[Row]) -> list[Row]:
    """A line for each point: mean ± standard deviation over seeds."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["point"], []).append(row)
    found = []
    for point, group in groups.items():
        line: Row = {"point": point, "seeds": len(group)}
        for name in ("bits", "seconds"):
            line[name] = str(Spread.of(row[name] for row in group)) if group[0][name] is not None else None
        for text in group[0]["scores"]:
            for name, head in (("perplexity", text), ("kl", f"KL {text}")):
                line[head] = str(Spread.of(row["scores"][text][name] for row in group))
        found.append(line)
    return found
