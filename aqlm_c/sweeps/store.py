"""Who runs which trial, and where rows are kept: files of a directory, or an Optuna study that machines share."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import require, wrong
from .rows import COMPLETE, Row, RowFile, failed_row, objectives_of, read_rows
from .space import Point, Range, Space, digest_of, key_of, masked

log = logging.getLogger("aqlm_c")

_OPENED = 4  # times that a storage is tried
_GIVEN_UP = "its worker ended without an answer, {} times"


class Trial(NamedTuple):
    """One to run. number: as it is shown. attempt: from 1 on."""

    number: int
    point: Point
    attempt: int

    @property
    def key(self) -> str:
        """The point's, as rows have it."""
        return key_of(self.point)


class Store(Protocol):
    """What a worker asks for. trials: those to run, one after another, until there are none that nobody runs or will
    run; it waits for those of other workers, which may end without an answer.
    """

    def trials(self) -> Iterator[Trial]: ...
    def finish(self, trial: Trial, row: Row) -> bool:
        """Keep the row of a trial; whether it counts: another worker may have run it meanwhile."""

    def add(self, row: Row) -> None:
        """Keep a row of no trial."""

    def rows(self) -> list[Row]: ...
    def close(self) -> None: ...


def worker_name(index: int | None) -> str:
    """Of this process's rows."""
    return f"{platform.node() or 'machine'}-{os.getpid()}" if index is None else f"worker-{index}"


class FileStore:
    """A grid in a directory that all workers see. A trial is claimed by a lock on a file of its own, which the system
    takes back when a process ends in any way; the file counts how often it was begun.
    """

    def __init__(self, space: Space, out: Path, worker: str, share: tuple[int, int] | None = None) -> None:
        self._rows, self._claims = out / "rows", out / "claims"
        self._claims.mkdir(parents=True, exist_ok=True)
        self._file = RowFile(self._rows / f"{worker}.jsonl")
        self._attempts = space.attempts
        points = list(enumerate(space.points()))
        self._points = points if share is None else points[share[0] :: share[1]]

    def trials(self) -> Iterator[Trial]:
        """Those of the grid without a row."""
        self._file.open()
        while True:
            waiting, done = 0, {row["key"] for row in self.rows()}
            for number, point in self._points:
                key = key_of(point)
                if key in done:
                    continue
                with open(self._claims / digest_of(key), "a+b") as claim:
                    if not _lock(claim):
                        waiting += 1
                        continue
                    if self._done(key):  # since it was looked at
                        continue
                    trial = Trial(number, point, self._begin(claim))
                    if trial.attempt > self._attempts:
                        self.finish(trial, failed_row(_GIVEN_UP.format(self._attempts)))
                        continue
                    yield trial
            if not waiting:
                return
            time.sleep(1.0)

    def finish(self, trial: Trial, row: Row) -> bool:
        """Append the row."""
        self._file.add({"key": trial.key, "trial": trial.number, "params": trial.point, **row})
        return True

    def add(self, row: Row) -> None:
        """Append a row of no trial."""
        self._file.add(row)

    def rows(self) -> list[Row]:
        """Of all workers."""
        return read_rows(self._rows)

    def close(self) -> None:
        """Give the file of rows free."""
        self._file.close()

    def _done(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows())

    @staticmethod
    def _begin(claim: Any) -> int:
        """Count one more attempt; its number."""
        claim.seek(0, os.SEEK_END)
        claim.write(b".")
        claim.flush()
        os.fsync(claim.fileno())
        return int(claim.tell())


def _lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_store(space: Space, out: Path, worker: str, share: tuple[int, int] | None = None) -> Store:
    """The store that a sweep asks for: files for a grid, a journal in `out` for ranges, or what `space.storage` says.

    Raises ImportError, with its cure, where Optuna is asked for and not installed; ValueError for a storage that cannot
    be opened and for a study of other settings.
    """
    if space.storage is None and not space.has_ranges:
        return FileStore(space, out, worker, share)
    return StudyStore(space, out, worker)


class StudyStore:
    """An Optuna study, in a database or a journal file: a grid, whose points are put into its queue, or one whose
    sampler chooses.

    A worker writes a number into its running trial again and again (`Lease`). A trial whose number stands still for
    `space.lease` seconds, by the clock of the one who looks, is taken from its worker and put into the queue again.
    """

    def __init__(self, space: Space, out: Path, worker: str) -> None:
        self._optuna = require("optuna")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self.space, self.worker = space, worker
        self._rows = out / "rows"
        self._file = RowFile(self._rows / f"{worker}.jsonl")
        try:
            self._study = self._open(out)
        except BaseException:
            self._file.close()
            raise
        self._numbers = {key_of(point): n for n, point in enumerate([] if space.has_ranges else space.points())}
        self._seen: dict[int, tuple[str, float]] = {}  # of a running trial: its lease, and since when it is that
        self._mine: Any = None
        self._lease: Lease | None = None

    def _open(self, out: Path) -> Any:
        optuna, space = self._optuna, self.space
        where = space.storage or f"journal:{out / 'study.journal'}"
        for attempt in range(_OPENED):
            try:
                study = optuna.create_study(
                    storage=storage_of(optuna, where),
                    study_name=space.study,
                    directions=["minimize"] * len(space.objectives),
                    sampler=self._sampler(),
                    load_if_exists=True,
                )
                break
            except (ImportError, OSError):
                raise
            except Exception as error:  # of the database's driver, of many types
                if isinstance(error, ValueError) and str(error).startswith("storage: "):
                    raise
                if attempt + 1 == _OPENED:
                    text = _without_password(where, f"{type(error).__name__}: {error}")
                    raise wrong("storage", masked(where), f"one that can be opened: {text}") from None
                time.sleep(0.5 * (attempt + 1))  # another worker may be making the same tables
        settings = {**space.settings(), "objectives": list(space.objectives)}
        known = study.user_attrs.get("settings")
        if known is None:
            study.set_user_attr("settings", settings)
        elif known != settings:
            names = [name for name in settings if known.get(name) != settings[name]]
            raise wrong("storage", masked(where), f"no study {space.study!r} of other settings: {', '.join(names)}")
        return study

    def _sampler(self) -> Any:
        samplers, space = self._optuna.samplers, self.space
        seed = space.seed + int(digest_of(self.worker), 16) % 2**20  # workers draw other points
        if space.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        if space.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        return samplers.TPESampler(seed=seed, constant_liar=True)

    def trials(self) -> Iterator[Trial]:
        """Those of the queue, and of the sampler as long as there are not enough."""
        self._file.open()
        while True:
            self._take_from_the_dead()
            alive = self._alive()
            more = len(alive) < self.space.count if self.space.has_ranges else self._queue_missing(alive)
            if more or any(self._is(trial, "WAITING") for trial in alive):
                if (trial := self._ask()) is not None:
                    self._lease = Lease(self._beat_of(self._mine), min(self.space.lease / 4, 15.0))
                    try:
                        yield trial
                    finally:
                        self._lease.stop()
                        self._lease = None
            elif any(self._is(trial, "RUNNING") for trial in alive):
                time.sleep(min(1.0, self.space.lease / 4))
            else:
                return

    def finish(self, trial: Trial, row: Row) -> bool:
        """Tell the study and append the row, unless the trial was taken from this worker meanwhile."""
        if self._lease is not None:
            self._lease.stop()
        whole = {"key": self._key(trial), "trial": trial.number, "params": trial.point, **row}
        states = self._optuna.trial.TrialState
        values = objectives_of(row, self.space.objectives)
        complete = row["state"] == COMPLETE and not any(value != value for value in values)
        try:
            self._mine.set_user_attr("row", whole)
            if complete:
                self._study.tell(self._mine, values)
            else:
                self._study.tell(self._mine, state=states.FAIL)
        except (RuntimeError, ValueError, self._optuna.exceptions.OptunaError) as error:
            log.warning("trial %d: was taken by another worker: %s", trial.number, error)
            return False
        self._file.add(whole)
        return True

    def add(self, row: Row) -> None:
        """Append a row of no trial."""
        self._file.add(row)

    def rows(self) -> list[Row]:
        """Of all workers on all machines, and of this directory."""
        found = {row["key"]: row for row in read_rows(self._rows)}
        for trial in self._study.get_trials(deepcopy=False):
            row = trial.user_attrs.get("row")
            if row is not None and (row["key"] not in found or row["state"] == COMPLETE):
                found[row["key"]] = row
        return sorted(found.values(), key=lambda row: (row["trial"] is None, row["trial"] or 0, row["key"]))

    def close(self) -> None:
        """Give the file of rows free."""
        self._file.close()

    def _key(self, trial: Trial) -> str:
        """Points of a study may be drawn twice: they are told apart by their number."""
        return f"{trial.number}: {trial.key}" if self.space.has_ranges else trial.key

    def _is(self, trial: Any, state: str) -> bool:
        return trial.state.name == state

    def _alive(self) -> list[Any]:
        """Trials that are done, run or wait, in order; not those that were taken from a worker or given back."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if not self._is(trial, "FAIL") or "row" in trial.user_attrs]

    def _queue_missing(self, alive: list[Any]) -> bool:
        """Put the points of the grid that no trial has into the queue; whether there were some."""
        have = {trial.user_attrs.get("key") for trial in alive}
        missing = [point for point in self.space.points() if key_of(point) not in have]
        for point in missing:
            self._study.enqueue_trial({}, user_attrs={"key": key_of(point), "point": point, "attempt": 1})
        return bool(missing)

    def _ask(self) -> Trial | None:
        """Take a trial; None where it is one too many, since another worker took one at the same time."""
        mine = self._study.ask()
        attrs = mine.user_attrs
        alive = self._alive()
        if self.space.has_ranges:
            before = sum(trial.number < mine.number for trial in alive)
            superfluous = before >= self.space.count
        else:
            key = attrs.get("key")
            superfluous = key is None or any(t.user_attrs.get("key") == key and t.number < mine.number for t in alive)
        if superfluous:
            self._study.tell(mine, state=self._optuna.trial.TrialState.FAIL)
            return None
        self._mine = mine
        point = self._suggested(mine) if self.space.has_ranges else attrs["point"]
        number = mine.number if self.space.has_ranges else self._numbers.get(key_of(point), mine.number)
        return Trial(number, point, int(attrs.get("attempt", 1)))

    def _suggested(self, trial: Any) -> Point:
        (part,), found = self.space.parts, {}
        for name, values in part.items():
            if not isinstance(values, Range):
                texts = {
                    value if isinstance(value, (str, int, float)) else key_of({"": value}): value for value in values
                }
                found[name] = texts[trial.suggest_categorical(name, list(texts))]
            elif values.whole:
                step = 1 if values.step is None else int(values.step)
                found[name] = trial.suggest_int(name, int(values.low), int(values.high), step=step, log=values.log)
            else:
                found[name] = trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
        return found

    def _beat_of(self, trial: Any) -> Callable[[int], None]:
        storage, number = self._study._storage, trial._trial_id
        return lambda beat: storage.set_trial_user_attr(number, "lease", f"{self.worker} {beat}")

    def _take_from_the_dead(self) -> None:
        """Put what a worker that ended was running into the queue again, or give it up after as many attempts."""
        now, running = time.monotonic(), dict[int, tuple[str, float]]()
        for trial in self._study.get_trials(deepcopy=False):
            if self._is(trial, "RUNNING"):
                lease = str(trial.user_attrs.get("lease"))
                since = self._seen.get(trial.number)
                running[trial.number] = since if since is not None and since[0] == lease else (lease, now)
                if now - running[trial.number][1] > self.space.lease:
                    self._take(trial)
        self._seen = running

    def _take(self, trial: Any) -> None:
        storage, attempt = self._study._storage, int(trial.user_attrs.get("attempt", 1))
        states = self._optuna.trial.TrialState
        given_up = attempt >= self.space.attempts
        try:
            if "row" in trial.user_attrs:  # it had its result, and ended before it could say so
                row = trial.user_attrs["row"]
                values = objectives_of(row, self.space.objectives)
                state = states.COMPLETE if row["state"] == COMPLETE else states.FAIL
                storage.set_trial_state_values(trial._trial_id, state, values if state == states.COMPLETE else None)
                return
            if given_up:
                point = trial.user_attrs.get("point", trial.params)
                number = self._numbers.get(key_of(point), trial.number)
                row = {"trial": number, "params": point, **failed_row(_GIVEN_UP.format(attempt))}
                storage.set_trial_user_attr(trial._trial_id, "row", {"key": self._key(Trial(number, point, 1)), **row})
            storage.set_trial_state_values(trial._trial_id, states.FAIL)
        except (RuntimeError, self._optuna.exceptions.OptunaError):
            return  # another worker did, or it was finished at last
        log.warning(
            "trial %d: its worker says nothing any more, %s", trial.number, "given up" if given_up else "retried"
        )
        if not given_up:
            kept = {name: value for name, value in trial.user_attrs.items() if name in ("key", "point")}
            self._study.enqueue_trial(dict(trial.params), user_attrs={**kept, "attempt": attempt + 1})


class Lease(threading.Thread):
    """Says again and again that a trial is run, until `stop`."""

    def __init__(self, beat: Callable[[int], None], every: float) -> None:
        super().__init__(name="aqlm_c-lease", daemon=True)
        self._beat, self._every, self._ended = beat, every, threading.Event()
        self.start()

    def run(self) -> None:
        """Beat; what cannot be written now is tried again."""
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                self._beat(number)
            except Exception as error:  # a database that is away, or a trial that was taken
                log.debug("lease: %s", error)
            self._ended.wait(self._every)

    def stop(self) -> None:
        """No more beats; returns when none is under way."""
        self._ended.set()
        if self.is_alive():
            self.join()


def storage_of(optuna: Any, where: str) -> Any:
    """The storage of an Optuna URL, or of journal:FILE."""
    if where.startswith("journal:"):
        path = Path(where.removeprefix("journal:"))
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = optuna.storages.journal
        return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
    if "://" not in where:
        raise wrong("storage", where, "a URL such as postgresql://HOST/DATABASE, or journal:FILE")
    require("sqlalchemy")
    if where.startswith("postgresql://"):
        require("psycopg")
        where = where.replace("postgresql://", "postgresql+psycopg://", 1)
    return optuna.storages.RDBStorage(where, engine_kwargs={"pool_pre_ping": True})


def _without_password(where: str, text: str) -> str:
    found = re.search(r"://[^:/@]*:([^@]*)@", where)
    return text.replace(found[1], "***") if found and found[1] else text


def row_facts(attempt: int, worker: str) -> Mapping[str, Any]:
    """What each row says of who made it."""
    return {"attempt": attempt, "worker": worker, "machine": platform.node()}
