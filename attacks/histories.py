"""Writers, retention and readers in several processes on one run, and the history of what they saw, checked.

    python -m attacks.histories                       # 100,000 operations
    python -m attacks.histories --operations=3000 --readers=3 --seed=1 --directory=/dev/shm

One writer at a time saves, takes the run back, deletes and records metrics, with retention on; others stand by and try
to get in. Now and then the writer is killed in the middle of something, and another takes over. Readers restore and
list all the time. Every process logs what it did, with CLOCK_MONOTONIC before and after; `history_check` then says
what no run that keeps its promises could have answered. An anomaly is exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attacks.history_check import CHANGES, Keep, Operation, check
from attacks.states import KINDS, differences, state_of, step_of
from ckpt_hooks import BestN, CheckpointManager, EveryNSteps, LatestN
from ckpt_hooks.errors import CheckpointNotFoundError, InvalidArgumentError, RunLockedError

__all__ = ["attack", "read_history"]

_KINDS = ("tiny", "mixed")  # by the save's number
assert set(_KINDS) <= set(KINDS)
_STEP_BITS, _COUNT_BITS = 20, 20
_CELL = struct.Struct("<q")
_STOP, _LIVE_WRITER, _FIRST_COUNT = 0, 1, 2
_MAX_PROCESSES = 4096


def attack(directory: Path, *, operations: int, readers: int, standby: int, seed: int, kill_secs: float) -> Path:
    """Runs the processes until they have done `operations`; returns the folder of their logs.

    Args:
      directory: an empty one; gets ``run`` and ``logs``.
      standby: how many writers wait for the one that is at work.
      kill_secs: how long a writer lives on average, until it is killed.
    """
    logs = directory / "logs"
    logs.mkdir()
    shared = _Shared()
    rng = random.Random(seed)
    log = _Log(logs / "driver")
    children: dict[int, int] = {}  # pid: index

    def start(work: Callable[[_Process], None]) -> None:
        index = start.index = getattr(start, "index", -1) + 1  # type: ignore[attr-defined]
        children[_fork(work, _Process(index, directory, shared, rng.randrange(2**32)))] = index

    for _ in range(1 + standby):
        start(_write)
    for number in range(readers):
        start(_read_long if number % 2 == 0 else _read_fresh)
    try:
        while shared.count() < operations:
            time.sleep(rng.expovariate(1 / kill_secs))
            victim = shared.get(_LIVE_WRITER)
            if victim in children:
                begin_ns = time.monotonic_ns()
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                log.write({"index": children.pop(victim), "begin": begin_ns, "end": time.monotonic_ns()})
                start(_write)
            _require_alive(children)
    finally:
        shared.set(_STOP, 1)
        failed = [children[pid] for pid in children if os.waitpid(pid, 0)[1]]
    if failed:
        raise RuntimeError(f"processes {failed} ended with an error, which they have printed")
    return logs


def _require_alive(children: dict[int, int]) -> None:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        raise RuntimeError(f"process {children.pop(pid)} ended with status {status}, which it should not")


def _fork(work: Callable[[_Process], None], process: _Process) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        logging.disable(logging.CRITICAL)
        process.start()
        work(process)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


class _Shared:
    """Numbers that the processes share: whether to stop, who writes, how much each has done."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _MAX_PROCESSES * _CELL.size)

    def get(self, cell: int) -> int:
        return int(_CELL.unpack_from(self._memory, cell * _CELL.size)[0])

    def set(self, cell: int, value: int) -> None:
        _CELL.pack_into(self._memory, cell * _CELL.size, value)

    def count(self) -> int:
        return sum(self.get(cell) for cell in range(_FIRST_COUNT, _MAX_PROCESSES))


class _Log:
    """Lines of JSON, each of which is in the file when `write` returns, also if the process is killed then."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, row: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(row).encode() + b"\n")


class _Process:
    """One process of the attack: its part of the log, its random numbers."""

    def __init__(self, index: int, directory: Path, shared: _Shared, seed: int) -> None:
        self.index = index
        self.run = directory / "run"
        self.shared = shared
        self.rng = random.Random(seed)
        self._path = directory / "logs" / f"process_{index:04d}"
        self._done = 0

    def start(self) -> None:
        self._log = _Log(self._path)

    @property
    def is_stopped(self) -> bool:
        return bool(self.shared.get(_STOP))

    @contextlib.contextmanager
    def operation(self, name: str, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Logs what is done inside, with what is put into the dict; what is raised inside is an anomaly."""
        row = {"process": name, "kind": kind, **fields}
        begin_ns = time.monotonic_ns()
        if kind in CHANGES:
            self._log.write({**row, "begin_ns": begin_ns})  # a change may be the last thing that the process does
        try:
            yield row
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}"
        end_ns = row.pop("done_ns", None) or time.monotonic_ns()
        self._log.write({**row, "begin_ns": begin_ns, "end_ns": end_ns})
        self._done += 1
        self.shared.set(_FIRST_COUNT + self.index, self._done)


# ------------------------------------------------------------------ writers


def _write(process: _Process) -> None:
    """Stands by until the run is free; then writes for a while, gives it back, and stands by again."""
    turn = 0
    while not process.is_stopped:
        turn += 1
        _Writer(process, f"{process.index}.{turn}").work()
        time.sleep(process.rng.uniform(0, 0.3))


class _Writer:
    """One manager's life."""

    def __init__(self, process: _Process, name: str) -> None:
        self._process = process
        self._rng = process.rng
        self._name = name
        self._keep, policies = _random_keep(self._rng)
        self._manager = CheckpointManager(process.run, keep=policies, async_save=self._rng.random() < 0.5)
        self._is_live = False

    def work(self) -> None:
        newest = _restore_newest(self._process, self._name, self._manager)
        self._save((newest or 0) + self._rng.randint(1, 3))
        if self._is_live:
            self._process.shared.set(_LIVE_WRITER, os.getpid())
            for _ in range(self._rng.randint(10, 200)):
                if self._process.is_stopped:
                    break
                self._change()
            self._process.shared.set(_LIVE_WRITER, 0)
        with self._process.operation(self._name, "closed"):
            self._manager.close()

    def _change(self) -> None:
        steps = self._manager.steps()
        newest = max(steps, default=0)
        choice = self._rng.random()
        if choice < 0.70 or not steps:
            self._save(newest + self._rng.randint(1, 3))
        elif choice < 0.78:
            self._save(max(self._rng.choice(steps) + self._rng.randint(-1, 0), 0), kind="force")
        elif choice < 0.82:
            step = self._rng.choice(steps)
            self._run("rollback", step, lambda: self._manager.rollback(step))
        elif choice < 0.87:
            step = self._rng.choice(steps)
            self._run("delete", step, lambda: self._manager.delete(step))
        else:
            step, loss = self._rng.choice(steps), self._random_loss()
            self._run("record", step, lambda: self._manager.record_metrics(step, {"loss": loss}), loss=loss)

    def _save(self, step: int, kind: str = "save") -> None:
        stamp, loss = _next_stamp(self._process.index, step), self._random_loss()

        def save() -> None:
            state, metrics = state_of(stamp, _kind_of(stamp)), {"loss": loss}
            metadata = {"stamp": stamp}
            self._manager.save(step, state, metrics=metrics, metadata=metadata, force=kind == "force")
            self._manager.wait()

        self._run(kind, step, save, stamp=stamp, loss=loss)

    def _run(self, kind: str, step: int, change: Callable[[], None], **fields: Any) -> None:
        with self._process.operation(self._name, kind, step=step, keep=vars(self._keep), **fields) as row:
            try:
                change()
            except (RunLockedError, InvalidArgumentError) as error:
                # Between looking and saving, somebody else may have become the writer; but only before the first save.
                if self._is_live:
                    raise
                row["refused"] = type(error).__name__
                return
            row["done_ns"] = time.monotonic_ns()
            row["steps"] = self._manager.steps()
            self._is_live = True

    def _random_loss(self) -> float:
        return math.nan if self._rng.random() < 0.1 else round(self._rng.uniform(0, 1), 3)


_stamps: Counter[int] = Counter()


def _next_stamp(index: int, step: int) -> int:
    """A number that no other save has; its last bits are the step."""
    _stamps[index] += 1
    return (((index << _COUNT_BITS) + _stamps[index]) << _STEP_BITS) + step


def _kind_of(stamp: int) -> str:
    return _KINDS[(stamp >> _STEP_BITS) % len(_KINDS)]


def _random_keep(rng: random.Random) -> tuple[Keep, Any]:
    keep = Keep(
        latest=rng.choice([1, 2, 3, 5]),
        every=rng.choice([None, None, 7]),
        best=rng.choice([None, None, 1, 2]),
    )
    policies: list[Any] = [LatestN(keep.latest or 1)]
    policies += [EveryNSteps(keep.every)] if keep.every else []
    policies += [BestN(keep.best, "loss")] if keep.best else []
    return keep, policies


# ------------------------------------------------------------------ readers


def _read_long(process: _Process) -> None:
    """Reads with one manager from the beginning to the end."""
    manager = CheckpointManager(process.run)
    while not process.is_stopped:
        _read_something(process, manager)


def _read_fresh(process: _Process) -> None:
    """Reads with a manager that knows nothing yet."""
    while not process.is_stopped:
        _read_something(process, CheckpointManager(process.run))


def _read_something(process: _Process, manager: CheckpointManager) -> None:
    name, rng = str(process.index), process.rng
    choice = rng.random()
    if choice < 0.4:
        _restore_newest(process, name, manager)
    elif choice < 0.45:
        with process.operation(name, "newest") as row:
            row["step"] = manager.latest_step()
    elif choice < 0.5:
        with process.operation(name, "best") as row:
            row["step"] = manager.best_step("loss", "min") if manager.steps() else None
    else:
        with process.operation(name, "steps") as row:
            row["steps"] = steps = manager.steps()
        if steps:
            _look_at(process, name, manager, rng.choice([*steps, steps[-1]]))
        else:
            time.sleep(0.02)  # an empty run is read so fast that nothing else would be


def _look_at(process: _Process, name: str, manager: CheckpointManager, step: int) -> None:
    kind = process.rng.choice(["restore step", "restore step", "metadata", "verify"])
    with process.operation(name, kind, step=step) as row:
        try:
            if kind == "restore step":
                _record_value(row, manager.restore(step=step), step)
            elif kind == "metadata":
                metadata = manager.metadata(step)
                row["stamp"] = metadata.custom_metadata["stamp"]
                row["loss"] = float(metadata.metrics["loss"])
            else:
                row["problem"] = "; ".join(manager.verify(step))
        except CheckpointNotFoundError as error:
            row["refused"] = type(error).__name__


def _restore_newest(process: _Process, name: str, manager: CheckpointManager) -> int | None:
    with process.operation(name, "restore newest") as row:
        try:
            _record_value(row, manager.restore())
        except CheckpointNotFoundError:
            row["step"] = None
    return row.get("step")


def _record_value(row: dict[str, Any], restored: Any, asked: int | None = None) -> None:
    """The stamp that a restored state says it has, and whether every bit of it is of that save."""
    stamp = step_of(restored)
    if stamp is None:
        row["problem"] = "the state has no step"
        return
    row["stamp"], row["step"] = stamp, stamp % (1 << _STEP_BITS)
    row["problem"] = "; ".join(differences(restored, stamp, _kind_of(stamp)))
    if asked not in (None, row["step"]):
        row["problem"] = f"asked for step {asked}"


# ------------------------------------------------------------------ logs


def read_history(logs: Path) -> list[Operation]:
    """What all processes logged, as `check` wants it."""
    history: list[Operation] = []
    for path in sorted(logs.glob("process_*")):
        rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["process"], row["kind"], row["begin_ns"]] = row  # the second line of a change has its end
        history += [_operation(row) for row in rows.values()]
    turns = {operation.process for operation in history}
    for line in (logs / "driver").read_text().splitlines():
        row = json.loads(line)
        history += [
            Operation(turn, "killed", row["begin"], row["end"]) for turn in turns if turn.startswith(f"{row['index']}.")
        ]
    closed = {operation.process for operation in history if operation.kind == "closed"}
    return [operation for operation in history if operation.kind != "killed" or operation.process not in closed]


def _operation(row: dict[str, Any]) -> Operation:
    fields = {**row, "keep": Keep(**row.get("keep", {}))}
    if row.get("steps") is not None:
        fields["steps"] = tuple(row["steps"])
    return Operation(**fields)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000, help="at least so many (default: 100,000)")
    parser.add_argument("--readers", type=int, default=5, help="half of them with one manager for all (default: 5)")
    parser.add_argument("--standby", type=int, default=2, help="writers that wait to take over (default: 2)")
    parser.add_argument("--kill-secs", type=float, default=1.0, help="mean life of a writer (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    parser.add_argument("--directory", help="where to put the run (default: temporary)")
    parser.add_argument("--shown", type=int, default=20, help="anomalies to print (default: 20)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="histories-", dir=args.directory) as folder:
        begin_secs = time.monotonic()
        logs = attack(
            Path(folder),
            operations=args.operations,
            readers=args.readers,
            standby=args.standby,
            seed=args.seed,
            kill_secs=args.kill_secs,
        )
        history = read_history(logs)
        taken_secs = time.monotonic() - begin_secs
    anomalies = check(history)
    _report(history, anomalies, taken_secs, args.shown)
    return 1 if anomalies else 0


def _report(history: list[Operation], anomalies: list[str], taken_secs: float, shown: int) -> None:
    counts = Counter(operation.kind for operation in history)
    refused = Counter(operation.refused for operation in history if operation.refused)
    print(f"{len(history):,} operations in {taken_secs:.0f} s: " + ", ".join(f"{n:,} {k}" for k, n in counts.items()))
    print("refused: " + (", ".join(f"{n:,} {name}" for name, n in refused.items()) or "none"))
    print(f"anomalies: {len(anomalies)}")
    for anomaly in anomalies[:shown]:
        print(f"  {anomaly[:600]}")


if __name__ == "__main__":
    sys.exit(main())
