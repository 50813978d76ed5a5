"""Being asked to stop, being killed, and Ctrl-C: real processes, real signals."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt_hooks
from ckpt_hooks import BestN, CheckpointHook, CheckpointManager, LatestN, Preempted
from ckpt_hooks.errors import SaveFailedError
from ckpt_hooks.storage import commit
from tests.faulty import fail

REPOSITORY = Path(ckpt_hooks.__file__).parents[1]

# A loop without end: prints "start <step>" when it has resumed and "step <step>" before each call of the hook.
TRAINING = """
import logging, os, signal, sys, time
import numpy as np
from ckpt_hooks import CheckpointHook, Preempted

directory, mode = sys.argv[1:]
logging.basicConfig()
options = {}
if mode == "polled":
    options["raise_on_preemption"] = False
if mode == "stuck":
    signal.signal(signal.SIGTERM, lambda *arguments: print("mine too", flush=True))

with CheckpointHook(directory, every_n_steps=7 if mode == "fast" else 1000, keep=3, **options) as hook:
    state = hook.restore({"w": np.zeros(1000), "step": 0})
    assert (state["w"] == state["step"]).all() and hook.start_step == state["step"], state
    print("start", hook.start_step, os.getpid(), flush=True)
    step = hook.start_step
    while True:
        step += 1
        state = {"w": state["w"] + 1, "step": step}
        if mode == "stuck":
            print("stuck", flush=True)
            time.sleep(600)
        print("step", step, flush=True)
        saved = hook(step, state)
        if mode == "fast" and saved and step % 3 == 0:
            hook.wait()
            print("committed", step, flush=True)
        if mode == "polled" and saved and hook.preempted:
            print("leaving", step, saved, flush=True)
            break
        if mode != "fast":
            time.sleep(0.001)
print("after the loop", flush=True)
"""


# Starts such a loop, in a process of its own, for each line that it reads; one import serves them all.
FORKING = f"""
import os, sys, ckpt_hooks
for row in sys.stdin:
    if not os.fork():
        exec({TRAINING!r})
    _, status = os.wait()
    # On a row of its own: a kill may have come in the middle of one.
    print("\\nended", os.waitstatus_to_exitcode(status), flush=True)
"""


class Training:
    """A training process and what it has printed so far."""

    def __init__(self, run: Path, mode: str = "plain", script: str = TRAINING) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(run), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        )
        self.rows: list[str] = []

    def read_until(self, beginning: str) -> str:
        """The next row with this beginning."""
        assert self.process.stdout is not None
        for row in self.process.stdout:
            self.rows.append(row.strip())
            if row.startswith(beginning):
                return row.strip()
            if row.startswith("ended"):
                self.process.kill()
        raise AssertionError(f"ended without {beginning!r}: {self.rows[-5:]} {self.end()[1]}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Waits for its end: (exit code, what it wrote to stderr)."""
        out, err = self.process.communicate(timeout=60)
        self.rows += out.splitlines()
        return self.process.returncode, err

    def last(self, word: str) -> int:
        rows = [row.split() for row in self.rows]
        return max((int(row[1]) for row in rows if row[:1] == [word] and len(row) > 1), default=0)

    def saved_steps(self) -> list[int]:
        return CheckpointManager(self.run).steps()


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Starts training processes of one run, which do not outlive the test."""
    started: list[Training] = []

    def start(*arguments: str) -> Training:
        started.append(Training(tmp_path / "run", *arguments))
        return started[-1]

    yield start
    for training in started:
        training.process.kill()
        training.process.communicate()


# ------------------------------------------------------------------ processes


def test_sigterm_saves_commits_and_exits_with_143(train: Callable[..., Training]) -> None:
    """On SIGTERM the very next call saves its step, waits for the commit and ends the process with exit code 143."""
    training = train()
    training.read_until("step 5")
    training.send(signal.SIGTERM)
    code, errors = training.end()
    assert code == 143
    last = training.last("step")
    assert last >= 5
    assert training.saved_steps() == [last]
    assert CheckpointManager(training.run).verify(last) == []
    assert "after the loop" not in training.rows
    assert "Traceback" not in errors
    assert f"step {last} is saved" in errors

    resumed = train()
    assert resumed.read_until("start").split()[1] == str(last)


def test_a_polled_preemption_saves_and_lets_the_loop_end(train: Callable[..., Training]) -> None:
    """With raise_on_preemption=False the call saves, says True, `preempted` is True, and the program goes on."""
    training = train("polled")
    training.read_until("step 5")
    training.send(signal.SIGTERM)
    code, errors = training.end()
    assert code == 0, errors
    last = training.last("step")
    assert training.rows[-2:] == [f"leaving {last} True", "after the loop"]
    assert training.saved_steps() == [last]


def test_a_second_signal_ends_the_process_at_once(train: Callable[..., Training]) -> None:
    """Where the loop does not come back, a second SIGTERM ends the process, whatever handler the user has."""
    training = train("stuck")
    training.read_until("stuck")
    training.send(signal.SIGTERM)
    training.read_until("mine too")
    training.send(signal.SIGTERM)
    code, _ = training.end()
    assert code == -signal.SIGTERM
    assert training.saved_steps() == []


def test_ctrl_c_leaves_a_valid_run(train: Callable[..., Training]) -> None:
    """Ctrl-C in the middle of training, saves in flight, raises KeyboardInterrupt and leaves a run that resumes."""
    training = train("fast")
    training.read_until("step 40")
    training.send(signal.SIGINT)
    code, errors = training.end()
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    steps = training.saved_steps()
    assert steps
    manager = CheckpointManager(training.run)
    assert all(manager.verify(step) == [] for step in steps)

    resumed = train("fast")
    assert resumed.read_until("start").split()[1] == str(steps[-1])
    resumed.read_until("committed")
    resumed.send(signal.SIGTERM)
    resumed.end()
    assert all(path.name.isdigit() for path in training.run.iterdir())  # nothing of the interrupted save is left


def test_sigkill_at_random_moments_loses_nothing_that_was_acknowledged(train: Callable[..., Training]) -> None:
    """Killed 20 times at random moments, a run never loses a checkpoint that was committed, or has a wrong value."""
    moments = random.Random(7)
    training = train("fast", FORKING)
    assert training.process.stdin is not None
    committed = 0
    for _ in range(20):
        training.process.stdin.write("again\n")
        training.process.stdin.flush()
        _, start, pid = training.read_until("start").split()  # it has checked that each value is the step's
        assert int(start) >= committed
        training.read_until("committed")
        time.sleep(moments.random() * 0.03)
        os.kill(int(pid), signal.SIGKILL)
        assert training.read_until("ended") == f"ended {-signal.SIGKILL}"
        committed = training.last("committed")
    manager = CheckpointManager(training.run)
    steps = manager.steps()
    assert steps[-1] >= committed
    for step in steps:
        assert manager.verify(step) == []
        np.testing.assert_array_equal(manager.restore(step=step)["w"], np.full(1000, float(step)))


# A loop that is fed by a worker which knows nothing of signals, forked when the hook listens already.
FEEDING = """
import multiprocessing, os, signal, sys
import numpy as np
from ckpt_hooks import CheckpointHook

def feed(queue):
    while True:
        queue.put(np.zeros(3))

with CheckpointHook(sys.argv[1], every_n_steps=2) as hook:
    context = multiprocessing.get_context("fork")
    queue = context.Queue(2)
    context.Process(target=feed, args=(queue,), daemon=True).start()
    for step in range(1, 6):
        if step == 4 and sys.argv[2] == "asked":
            os.kill(os.getpid(), signal.SIGTERM)
        hook(step, {"w": queue.get()})
print("after the loop", flush=True)
"""


@pytest.mark.parametrize(("mode", "expected"), [("plain", 0), ("asked", 143)])
def test_a_forked_worker_ends_with_the_program(tmp_path: Path, mode: str, expected: int) -> None:
    """A worker forked under the hook dies of the SIGTERM that its parent sends, so that the parent can end."""
    training = Training(tmp_path, mode, script=FEEDING)
    code, errors = training.end()
    assert code == expected, errors
    assert CheckpointManager(tmp_path).latest_step() == 4


# Ends its loop with a commit under way that takes a second, and is asked to stop meanwhile.
CLOSING = """
import os, signal, sys, threading, time
import numpy as np
from ckpt_hooks import CheckpointHook
from ckpt_hooks.storage import commit

publish = commit.publish

def publish_slowly(*args, **options):
    time.sleep(0.5)  # until the hook closes, and waits for this
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    publish(*args, **options)

commit.publish = publish_slowly
with CheckpointHook(sys.argv[1], every_n_steps=1) as hook:
    hook(1, {"w": np.zeros(3)})
    hook.close = lambda close=hook.close: (close(), print("closed", flush=True))
"""


def test_a_signal_while_the_hook_closes_loses_nothing(tmp_path: Path) -> None:
    """The hook listens until the save in flight is committed."""
    training = Training(tmp_path, script=CLOSING)
    code, errors = training.end()
    assert (code, training.rows) == (0, ["closed"]), errors
    assert CheckpointManager(tmp_path).steps() == [1]


# ------------------------------------------------------------------ in this process


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The signals that a handler of the user's gets, which is there before any hook."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def state_at(step: int) -> dict[str, Any]:
    return {"w": np.full(3, float(step))}


def test_the_call_after_the_signal_saves_and_raises(tmp_path: Path, heard: list[int]) -> None:
    """Preempted is a SystemExit with code 143 that knows its step, and the step is committed when it is raised."""
    hook = CheckpointHook(tmp_path, every_n_steps=1000)
    assert not hook.preempted
    assert not hook(1, state_at(1))
    terminate()
    assert hook.preempted
    with pytest.raises(SystemExit) as error:
        hook(2, state_at(2), metrics={"loss": 0.5})
    assert isinstance(error.value, Preempted)
    assert (error.value.code, error.value.step) == (143, 2)
    assert CheckpointManager(tmp_path).steps() == [2]
    assert CheckpointManager(tmp_path).metadata(2).metrics == {"loss": 0.5}
    hook.close()


def test_nothing_is_saved_in_the_signal_handler(tmp_path: Path, heard: list[int]) -> None:
    """The signal alone saves nothing: the state may be half-way between two steps."""
    with CheckpointHook(tmp_path / "run", every_n_steps=1) as hook:
        terminate()
        hook.wait()
        assert not (tmp_path / "run").exists()


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path: Path, heard: list[int]) -> None:
    """A preemption at a step whose save is under way, or that was just restored, is not saved a second time."""
    with CheckpointHook(tmp_path, every_n_steps=5) as hook:
        assert hook(5, state_at(5))
        terminate()
        with pytest.raises(Preempted) as error:
            hook(5, state_at(99))
    assert error.value.step == 5
    with CheckpointHook(tmp_path, every_n_steps=5) as hook:
        np.testing.assert_array_equal(hook.restore(state_at(0))["w"], np.full(3, 5.0))
        terminate()
        with pytest.raises(Preempted):
            hook(5, state_at(99))
    assert CheckpointManager(tmp_path).steps() == [5]


def test_without_raising_the_call_says_whether_it_saved(tmp_path: Path, heard: list[int]) -> None:
    """With raise_on_preemption=False, each call after the signal saves its step and waits for its commit."""
    with CheckpointHook(tmp_path, every_n_steps=1000, raise_on_preemption=False) as hook:
        assert not hook(1, state_at(1))
        terminate()
        assert hook(2, state_at(2))
        assert hook.preempted
        assert CheckpointManager(tmp_path).steps() == [2]
        assert not hook(2, state_at(2))


@pytest.mark.parametrize("calls_again", [False, True])
def test_leaving_without_the_call_that_saves_is_told(
    tmp_path: Path, heard: list[int], caplog: pytest.LogCaptureFixture, calls_again: bool
) -> None:
    """A loop that sees the signal before the hook does, and ends, is told which step it has not saved."""
    with CheckpointHook(tmp_path, every_n_steps=5, raise_on_preemption=False) as hook:
        for step in (5, 6):
            hook(step, state_at(step))
        terminate()
        assert hook.preempted
        if calls_again:
            hook(7, state_at(7))
    told = [record.message for record in caplog.records if "not saved" in record.message]
    assert told == ([] if calls_again else ["asked to stop, and closed without another call: step 6 is not saved"])


def test_what_a_signal_while_closing_does_not_save_is_told(
    tmp_path: Path, heard: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hook that is asked to stop while it waits for its last save names the later step of the loop."""
    hook = CheckpointHook(tmp_path, every_n_steps=2)
    hook(2, state_at(2))
    hook(3, state_at(3))
    wait = hook.manager.checkpointer.close

    def asked_meanwhile() -> None:
        terminate()
        wait()

    monkeypatch.setattr(hook.manager.checkpointer, "close", asked_meanwhile)
    hook.close()
    assert heard and "step 3 is not saved" in caplog.text


@pytest.mark.parametrize("is_known", [False, True])
def test_a_failed_save_is_saved_again_before_leaving(
    tmp_path: Path, heard: list[int], monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """A preemption at a step whose background save has failed, told or not, saves it again before leaving."""
    with CheckpointHook(tmp_path, every_n_steps=5, on_save_error="warn") as hook:
        with monkeypatch.context() as patch:
            fail(patch, commit, "publish", errno.EIO)
            hook(5, state_at(5))
            for thread in threading.enumerate():
                if thread.name.startswith("ckpt_hooks"):
                    thread.join()
        if is_known:
            with pytest.raises(SaveFailedError):
                hook.wait()
            assert not hook(4, state_at(4))
        terminate()
        with pytest.raises(Preempted):
            hook(5, state_at(5))
    assert CheckpointManager(tmp_path).steps() == [5]


def test_a_preemption_whose_save_fails_is_loud(tmp_path: Path, heard: list[int]) -> None:
    """If the last save cannot be done, the call raises that error and not Preempted, also with on_save_error="warn"."""
    with CheckpointHook(tmp_path / "run", every_n_steps=5, on_save_error="warn") as hook:
        (tmp_path / "run").write_text("a file is in the way")
        terminate()
        with pytest.raises(OSError, match="run"):
            hook(1, state_at(1))


def test_the_last_save_needs_no_metrics(tmp_path: Path, heard: list[int]) -> None:
    """Where nobody has recorded yet what `BestN` ranks by, the save that answers a preemption is made all the same."""
    keep = [LatestN(5), BestN(1, "accuracy", mode="max")]
    with CheckpointHook(tmp_path, every_n_steps=2, keep=keep) as hook:
        for step in (2, 4):
            hook(step, state_at(step))
        terminate()
        with pytest.raises(Preempted):
            hook(5, state_at(5))
    assert CheckpointManager(tmp_path).steps() == [2, 4, 5]


def test_a_signal_that_is_named_twice_is_one(tmp_path: Path, heard: list[int]) -> None:
    """The first one is noted, and the second one would end the process."""
    with CheckpointHook(tmp_path, preemption_signals=[signal.SIGTERM, signal.SIGTERM, 15]) as hook:
        terminate()
        assert hook.preempted and heard == [signal.SIGTERM]


def test_save_on_preemption_false_leaves_the_signals_alone(tmp_path: Path, heard: list[int]) -> None:
    """With save_on_preemption=False the hook neither hears nor answers a signal."""
    before = signal.getsignal(signal.SIGTERM)
    with CheckpointHook(tmp_path, every_n_steps=1000, save_on_preemption=False) as hook:
        assert signal.getsignal(signal.SIGTERM) is before
        terminate()
        assert heard == [signal.SIGTERM]
        assert not hook.preempted
        assert not hook(1, state_at(1))


def test_other_signals_may_be_chosen(tmp_path: Path) -> None:
    """preemption_signals says which signals are answered."""
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with CheckpointHook(tmp_path, preemption_signals=[signal.SIGUSR1]) as hook:
        assert signal.getsignal(signal.SIGTERM) is before[1]
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted):
            hook(1, state_at(1))
    assert signal.getsignal(signal.SIGUSR1) is before[0]


def test_the_users_own_handler_hears_the_signal_too(tmp_path: Path, heard: list[int]) -> None:
    """A handler that was there before is called as well, and is back in its place after close."""
    before = signal.getsignal(signal.SIGTERM)
    with CheckpointHook(tmp_path, raise_on_preemption=False) as hook:
        assert signal.getsignal(signal.SIGTERM) is not before
        terminate()
        assert heard == [signal.SIGTERM]
        assert hook.preempted
    assert signal.getsignal(signal.SIGTERM) is before
    terminate()
    assert heard == [signal.SIGTERM] * 2


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_the_signal_is_given_back_as_it_was(tmp_path: Path, heard: list[int], before: Any) -> None:
    """After close the default, or that the signal is ignored, is what it was before."""
    signal.signal(signal.SIGTERM, before)
    hook = CheckpointHook(tmp_path)
    hook.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_put_on_top_stays(tmp_path: Path, heard: list[int]) -> None:
    """close does not take away a handler that somebody put there after the hook was made."""
    hook = CheckpointHook(tmp_path)
    later: list[int] = []

    def on_top(number: int, frame: Any) -> None:
        later.append(number)

    signal.signal(signal.SIGTERM, on_top)
    hook.close()
    assert signal.getsignal(signal.SIGTERM) is on_top
    terminate()
    assert later == [signal.SIGTERM]


def test_two_hooks_closed_in_any_order(tmp_path: Path, heard: list[int]) -> None:
    """Of two hooks both hear the signal; closing the first leaves the second listening, and the user's handler."""
    before = signal.getsignal(signal.SIGTERM)
    first = CheckpointHook(tmp_path / "first")
    second = CheckpointHook(tmp_path / "second")
    first.close()
    terminate()
    assert second.preempted
    assert not first.preempted
    assert heard == [signal.SIGTERM]
    second.close()
    terminate()
    assert heard == [signal.SIGTERM] * 2
    signal.signal(signal.SIGTERM, before)


def test_a_dropped_hook_gives_the_signals_back(tmp_path: Path, heard: list[int]) -> None:
    """A hook that is collected without close swallows no signals."""
    before = signal.getsignal(signal.SIGTERM)
    hook = CheckpointHook(tmp_path)
    del hook
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hook_that_could_not_be_made_gives_the_signals_back(tmp_path: Path, heard: list[int]) -> None:
    """A hook that is refused because of its other options does not keep the signals."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="preemption_signals"):
        CheckpointHook(tmp_path, preemption_signals=[signal.SIGTERM, 999])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hook_in_another_thread_works_without_signals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Outside of the main thread the hook saves all the same, and says once that it cannot listen to signals."""

    def train_in_thread() -> None:
        with CheckpointHook(tmp_path, every_n_steps=1) as hook:
            hook(1, state_at(1))

    thread = threading.Thread(target=train_in_thread)
    thread.start()
    thread.join()
    assert CheckpointManager(tmp_path).steps() == [1]
    assert [r for r in caplog.records if "main thread" in r.getMessage()]
    caplog.clear()
    quiet = threading.Thread(target=lambda: CheckpointHook(tmp_path, save_on_preemption=False).close())
    quiet.start()
    quiet.join()
    assert not caplog.records
