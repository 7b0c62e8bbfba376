"""A sweep from SPACE.yaml to a directory of rows: in this process, or by one worker for each GPU."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import int_between, missing, wrong
from ..recipe import yaml_text
from ..versions import __version__
from .rows import COMPLETE, FAILED, Row, best_of, mark_pareto, read_rows, replaced, table, write_tables
from .space import Space
from .store import Store, open_store, row_facts, worker_name

try:
    from .worker import Bench, locked
except ModuleNotFoundError as error:
    raise missing(error) from error

__all__ = ["Space", "SweepResult", "Worker", "sweep"]

log = logging.getLogger("aqlm_c")

_TAIL = 2000  # bytes of a worker's log in which its last line is looked for

OnRows = Callable[[Sequence[Row]], None]


@dataclasses.dataclass
class SweepResult:
    """What a sweep found. rows: of all trials and foreign models, those with a result and those that failed, "pareto"
    where none is as low in all objectives; complete: whether every trial has one. best: that of best.yaml. files: that
    were written.
    """

    rows: list[Row]
    objectives: tuple[str, ...]
    count: int
    best: Row | None = None
    files: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all trials are done, failed ones among them."""
        return sum(row.get("foreign") is None for row in self.rows) >= self.count

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**dataclasses.asdict(self), "objectives": list(self.objectives), "complete": self.complete}

    def __rich__(self) -> Any:
        return table(self.rows, self.objectives, self.count)


@dataclasses.dataclass(frozen=True)
class Worker:
    """One process of a sweep. name: of its rows. share: every how many-th trial of a grid in files is its own. first:
    whether it evaluates foreign models. device, threads: of its runs.
    """

    name: str
    share: tuple[int, int] | None = None
    first: bool = True
    device: str = "auto"
    threads: int | None = None

    def run(self, space: Space, out: Path, progress: Any = None, on_rows: OnRows | None = None) -> list[Row]:
        """Run trials until there are none left; all rows."""
        bench = Bench(space, out, self.device, self.threads, progress)
        _check_facts(space, out, bench)
        store = open_store(space, out, self.name, self.share)
        try:
            known = {row["key"] for row in store.rows()}
            for name in space.foreign if self.first else ():
                if f"foreign: {name}" not in known:
                    store.add({**bench.foreign(name), **row_facts(1, self.name)})
            for trial in store.trials():
                store.finish(trial, {**bench.run(trial.point, trial.number), **row_facts(trial.attempt, self.name)})
                rows = store.rows()
                if space.keep == "best":
                    _keep_best(rows, space, out)
                if on_rows is not None:
                    on_rows(rows)
            return store.rows()
        finally:
            store.close()


def sweep(
    space: Space | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    worker: Worker | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Any = None,
    on_rows: OnRows | None = None,
) -> SweepResult:
    """Run what `space` (a file, its fields, or a `Space`) tries, and evaluate it; rows go to the directory `out` as
    they are made, and the same call goes on with those that are missing.

    workers: processes on this machine, one for each GPU if not given, else one; a single one is this process. worker:
    this process is that one, of others that run elsewhere. device, threads: of each. progress: `on_phase(name)`.
    on_rows: is told all rows that are known by now. At the end, or of what there is where another worker goes on:
    trials.csv, trials.parquet, and best.yaml, which `aqlm-c quantize --config` takes.

    Raises ValueError for what is wrong in `space`, before any work; for rows of other settings in `out`, and where no
    worker could begin; ImportError where a storage asks for a package that is not installed.
    """
    if not isinstance(space, Space):
        space = Space.from_dict(space) if isinstance(space, Mapping) else Space.from_file(space)
    place = Path(out)
    (place / "rows").mkdir(parents=True, exist_ok=True)
    count = workers or (1 if worker is not None else _gpus(device))
    int_between("workers", count, 1, 1024)
    if worker is not None or count == 1:
        own = worker or Worker(worker_name(None), device=device, threads=threads)
        rows = own.run(space, place, progress, on_rows)
    else:
        _run_workers(space, place, count, Worker("", device=device, threads=threads), on_rows)
        rows = _all_rows(space, place)
    return finish(space, place, rows)


def finish(space: Space, out: Path, rows: list[Row]) -> SweepResult:
    """Tables and best.yaml of the rows that there are."""
    rows = mark_pareto(rows, space.objectives)
    best = best_of(rows, space.objectives)
    result = SweepResult(rows, space.objectives, space.count, best)
    result.files = [str(path) for path in write_tables(rows, out)]
    if best is not None:
        result.files.append(str(replaced(out / "best.yaml", best_yaml(space, out, best).encode())))
        if space.keep == "best":
            _keep_best(rows, space, out)
    return result


def best_yaml(space: Space, out: Path, best: Row) -> str:
    """The run of a row, with its figures as a comment; in proxy mode of all blocks, which the trial did not have."""
    fields = {name: value for name, value in best["config"].items() if name != "threads"}
    fields["out"] = str(out / "best")
    lines = [f"aqlm_c {__version__}: trial {best['trial']} of a sweep of {space.count}"]
    lines += [f"{name}: {best[name]}" for name in ("perplexity", "kl", "bits", "bytes") if best.get(name) is not None]
    if space.proxy_blocks is not None:
        for name in ("layers", "statistics"):
            fields.pop(name, None)
        lines.append(f"figures of its first {space.proxy_blocks} blocks alone, which were quantized; this is of all")
    return "".join(f"# {line}\n" for line in lines) + yaml_text(fields)


def _check_facts(space: Space, out: Path, bench: Bench) -> None:
    """Write what rows of `out` have in common, or raise ValueError where it is not what they have."""
    now = json.loads(json.dumps({**space.settings(), **bench.facts()}))
    path = out / "sweep.json"
    with locked(out / "sweep.lock"):
        if not path.exists():
            replaced(path, json.dumps({"settings": now, "space": space.shown()}, indent=2).encode())
            return
        try:
            known = json.loads(path.read_bytes())["settings"]
        except (ValueError, KeyError, TypeError):
            raise wrong("out", str(out), f"a directory whose {path.name} is that of a sweep") from None
    if names := [name for name in {**known, **now} if known.get(name) != now.get(name)]:
        said = "; ".join(f"{name} {json.dumps(known.get(name))}, here {json.dumps(now.get(name))}" for name in names)
        raise wrong("out", str(out), f"rows of the same settings, or another directory ({said})")


def _keep_best(rows: Sequence[Row], space: Space, out: Path) -> None:
    """Remove models of rows that are not the best by now; those of trials that run stay."""
    import shutil

    best = best_of(rows, space.objectives)
    for row in rows:
        if row["trial"] is not None and (best is None or row["key"] != best["key"]):
            shutil.rmtree(out / "models" / f"{row['trial']:05d}", ignore_errors=True)


def _all_rows(space: Space, out: Path) -> list[Row]:
    """Those of all workers, also on other machines."""
    if space.storage is None and not space.has_ranges:
        return read_rows(out / "rows")
    store: Store = open_store(space, out, "reader")
    try:
        return store.rows()
    finally:
        store.close()


def _gpus(device: str) -> int:
    """Workers where none are asked for."""
    import torch

    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def _run_workers(space: Space, out: Path, count: int, like: Worker, on_rows: OnRows | None) -> None:
    """Run processes until all have ended; ValueError with what one said where none did any work."""
    open_store(space, out, "reader").close()  # says what is wrong, and makes a database's tables
    replaced(out / "space.yaml", yaml_text(space.original).encode())
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    running = {index: _started(index, count, out, logs, like) for index in range(count)}
    ended: dict[int, int] = {}
    try:
        while len(ended) < count:
            time.sleep(0.5)
            for index, process in running.items():
                if index not in ended and process.poll() is not None:
                    ended[index] = process.returncode
                    if process.returncode:
                        log.warning("worker %d ended (%s), others go on", index, _reason(process.returncode))
            if on_rows is not None:
                on_rows(read_rows(out / "rows"))
    finally:
        for process in running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
    if all(ended.values()) and not any(row["state"] in (COMPLETE, FAILED) for row in read_rows(out / "rows")):
        raise ValueError(f"workers: none could begin: {_last_line(logs / 'worker-0.log')}")


def _started(index: int, count: int, out: Path, logs: Path, like: Worker) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aqlm_c", "sweep", str(out / "space.yaml"), "--out", str(out)]
    command += ["--worker", str(index), "--device", like.device, "--quiet"]
    threads = like.threads or max(1, (os.cpu_count() or 1) // count)
    with open(logs / f"worker-{index}.log", "ab") as file:
        environment = {**os.environ, **_visible(index, like.device)}
        return subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )


def _visible(index: int, device: str) -> dict[str, str]:
    """Of several GPUs a worker sees one."""
    import torch

    n = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if n < 2:
        return {}
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if len(names) == n else [str(number) for number in range(n)]
    return {"CUDA_VISIBLE_DEVICES": names[index % n]}


def _reason(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _last_line(path: Path) -> str:
    lines = path.read_bytes()[-_TAIL:].decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("aqlm-c: ") if lines else "it said nothing"
