"""Kills a real training again and again, and shows what that cost it.

    python examples/survive.py
    python examples/survive.py --terms=10 --kills=10 --num_steps=5000 --seed=1

Trains the digits example (`examples/digits`) three times, each in processes of its own: without
interruption, interrupted by SIGTERM as a scheduler does it, and interrupted by SIGKILL, which is
what a crash looks like. After every interruption the same command starts again. The exit status
is 0 if all three runs end in the same state to the last bit, and no SIGTERM cost a step.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_hooks import CheckpointManager

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "digits.py"
CHECKPOINT_EVERY_STEPS = 50  # so often that some signals come during a save
BIT_IDENTICAL = "bit-identical"
HEADER = (
    *("run", "interruptions", "steps lost", "worst", "time to resume", "worst"),
    *("final step", "final state"),
)


@dataclass(frozen=True)
class Interruption:
    """Sends `signum`, `delay` seconds after the process has reported `step`."""

    signum: signal.Signals
    step: int
    delay: float

    @property
    def exit_code(self) -> int:
        # SIGTERM is answered by `Preempted`, with the code that a shell reports for that signal.
        return 128 + self.signum if self.signum == signal.SIGTERM else -self.signum


@dataclass(frozen=True)
class Attempt:
    """What one process did of a run, as seen from outside."""

    start_step: int
    last_step: int
    seconds_to_first_step: float


@dataclass(frozen=True)
class Run:
    """A training from the first step to the last, in as many attempts as that took."""

    directory: Path
    attempts: Sequence[Attempt]

    @property
    def steps_lost(self) -> list[int]:
        """For each interruption, how many steps had been done and had to be done again."""
        return [before.last_step - after.start_step for before, after in pairwise(self.attempts)]

    @property
    def seconds_to_resume(self) -> list[float]:
        """For each interruption, the time from the next start to the first new step."""
        return [attempt.seconds_to_first_step for attempt in self.attempts[1:]]

    @property
    def final_step(self) -> int | None:
        return CheckpointManager(self.directory).latest_step()


def main() -> int:
    args = parse_args()
    jax.config.update("jax_platforms", "cpu")  # comparing needs no accelerator
    command = training_command(args.config, args.num_steps)
    rng = random.Random(args.seed)
    terms = plan(signal.SIGTERM, args.terms, args.num_steps, rng)
    kills = plan(signal.SIGKILL, args.kills, args.num_steps, rng)
    print(
        f"Each run: {args.num_steps} steps, a checkpoint every {CHECKPOINT_EVERY_STEPS}.\n",
        flush=True,
    )
    with work_directory(args.workdir, args.keep) as workdir:
        reference = train(command, workdir / "uninterrupted", [])
        survivors = [
            train(command, workdir / "SIGTERM", terms),
            train(command, workdir / "SIGKILL", kills),
        ]
        verdicts = [compare(run, reference) for run in survivors]
        leaves = f"({len(final_state(reference))} leaves)"
        print_table([HEADER, row(reference, leaves), *map(row, survivors, verdicts)])
        finished = all(run.final_step == args.num_steps for run in [reference, *survivors])
    lossless = sum(survivors[0].steps_lost) == 0
    return 0 if finished and lossless and set(verdicts) == {BIT_IDENTICAL} else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terms", type=int, default=3, help="number of SIGTERMs (default: 3)")
    parser.add_argument("--kills", type=int, default=4, help="number of SIGKILLs (default: 4)")
    parser.add_argument("--num_steps", type=int, default=2000, help="of each run (default: 2000)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="what to train")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--workdir", type=Path, help="where to put the runs (default: temporary)")
    parser.add_argument("--keep", action="store_true", help="do not remove the runs at the end")
    return parser.parse_args()


def plan(signum: signal.Signals, count: int, num_steps: int, rng: random.Random) -> list[Interruption]:
    """Returns `count` interruptions, each at a random moment of its own share of the run."""
    share = 0.8 * num_steps / max(count, 1)  # the rest is so long that no signal comes too late
    steps = [1 + int(share * (i + rng.random())) for i in range(count)]
    return [Interruption(signum, step, delay=rng.uniform(0, 0.02)) for step in steps]


@contextmanager
def work_directory(parent: Path | None, keep: bool) -> Iterator[Path]:
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="survive-", dir=parent)).resolve()
    try:
        yield directory
    finally:
        if keep:
            print(f"The runs are in {directory}")
        else:
            shutil.rmtree(directory)


def training_command(config: Path, num_steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "examples.digits.main", f"--config={config.resolve()}"),
        f"--config.num_steps={num_steps}",
        f"--config.checkpoint_every_steps={CHECKPOINT_EVERY_STEPS}",
        "--config.log_every_steps=1",
    ]


def train(command: Sequence[str], directory: Path, interruptions: Sequence[Interruption]) -> Run:
    """Runs one training to its end, through all `interruptions`."""
    name = directory.name
    command = [*command, f"--workdir={directory}"]
    attempts = []
    for interruption in [*interruptions, None]:
        attempt = run_process(command, directory.with_suffix(".log"), interruption)
        attempts.append(attempt)
        end = interruption.signum.name if interruption else "done"
        print(f"{name:14}steps {attempt.start_step} to {attempt.last_step}, {end}", flush=True)
    return Run(directory, attempts)


def run_process(command: Sequence[str], log: Path, interruption: Interruption | None) -> Attempt:
    """Starts `command`, follows its steps, interrupts it, and checks that it ended as it should."""
    start = time.perf_counter()
    steps: list[int] = []
    seconds_to_first_step = 0.0
    pending = interruption
    with start_process(command, log) as process:
        for step in reported_steps(process):
            seconds_to_first_step = seconds_to_first_step or time.perf_counter() - start
            steps.append(step)
            if pending and step >= pending.step:
                time.sleep(pending.delay)
                process.send_signal(pending.signum)
                pending = None
        exit_code = process.wait()
    expected = interruption.exit_code if interruption else 0
    if exit_code != expected or not steps:
        raise SystemExit(
            f"{' '.join(command)}\nended with exit code {exit_code} instead of {expected}, after "
            f"{len(steps)} steps (if the signal came too late, try a larger --num_steps). "
            f"Its last words:\n{log.read_text()[-2000:]}"
        )
    return Attempt(steps[0] - 1, steps[-1], seconds_to_first_step)


@contextmanager
def start_process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    # On a CPU a program gives the same bits every time; a GPU has to be told to
    # (JAX_PLATFORMS=cuda XLA_FLAGS=--xla_gpu_deterministic_ops=true).
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    with log.open("a") as errors:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield process
    finally:  # reached early by Ctrl-C, which must not leave a training behind
        process.kill()
        process.wait()


def reported_steps(process: subprocess.Popen[str]) -> Iterator[int]:
    """Yields the number of every step, as soon as the process has printed it."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.match(r"step (\d+) ", line):
            yield int(match[1])


def compare(run: Run, reference: Run) -> str:
    """Says whether both runs ended in the same state, and where not."""
    state, expected = final_state(run), final_state(reference)
    different = [path for path in state | expected if state.get(path) != expected.get(path)]
    if different:
        return f"differs in {len(different)} of {len(expected)} leaves, e.g. {different[0]}"
    return BIT_IDENTICAL


def final_state(run: Run) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns the dtype, shape and bytes of every leaf in the run's newest checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(CheckpointManager(run.directory).restore())
    return {jax.tree_util.keystr(path): exactly(leaf) for path, leaf in leaves}


def exactly(leaf: Any) -> tuple[str, tuple[int, ...], bytes]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def row(run: Run, verdict: str) -> list[str]:
    lost, seconds = run.steps_lost, run.seconds_to_resume
    costs = ["-"] * 4
    if lost:
        costs = [
            *(str(sum(lost)), str(max(lost))),
            *(f"{statistics.mean(seconds):.1f} s", f"{max(seconds):.1f} s"),
        ]
    return [run.directory.name, str(len(lost)), *costs, str(run.final_step), verdict]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints `rows` under their header: numbers to the right, the first and last columns left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    print()
    for first, *middle, last in rows:
        numbers = (cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=False))
        print("  ".join([first.ljust(widths[0]), *numbers, last]))


if __name__ == "__main__":
    # As Ctrl-C does, a SIGTERM for this program ends the training that it has started, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
