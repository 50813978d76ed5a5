"""Removes the checkpoints of a run that need not stay: what `retention` says, done to a directory that others read.

The run is locked, and nothing else changes it meanwhile.
"""

from __future__ import annotations

import collections
import logging
import sys
from collections.abc import Mapping
from typing import Any

from ckpt_hooks.retention import Retention
from ckpt_hooks.run import RunDirectory
from ckpt_hooks.storage import commit

__all__ = ["known_metrics", "prune"]

_NO_METRICS: Mapping[str, Any] = {}

_log = logging.getLogger(__name__)


def prune(run: RunDirectory, keep: Retention) -> None:
    """Removes what need not stay; what cannot be removed is told, and tried again after the next save."""
    for step in _steps_to_remove(run, keep):
        run.recorded.pop(step, None)
        try:
            commit.remove_tree(f"{run.path}/{step}")
        except FileNotFoundError:
            _log.warning("step %d of %s was removed by somebody else", step, run.path)
        except OSError as error:
            # What cannot be deleted does not make the new checkpoint a failure.
            _log.warning("step %d should go, and cannot be removed: %s", step, error)
            run.older.append(step)


def _steps_to_remove(run: RunDirectory, keep: Retention) -> list[int]:
    """The checkpoints that need not stay, oldest first; the run no longer knows them."""
    while True:
        recorded = known_metrics(run, keep)
        chosen = keep.choose(recorded)
        steps = (*run.older, *run.known)
        doomed = [step for step in steps if step not in chosen and not keep.stays_for_good(step)]
        if not doomed or all(map(run.is_checkpoint, chosen)):
            break
        run.take_stock()  # somebody else removed one that was to stay: others stay in its place
    # Of a policy that counts, what is left of the others stays for good and need not be looked at again.
    run.older.clear()
    run.known = collections.deque(sorted(recorded.keys() - set(doomed) if keep.ranks else chosen))
    return [step for step in doomed if run.is_checkpoint(step)]  # and whatever else has a step's name stays


def known_metrics(run: RunDirectory, keep: Retention) -> Mapping[int, Mapping[str, Any]]:
    """{step: what it recorded} of the steps that retention chooses among."""
    if not keep.ranks:
        run.know(keep.newest)
        return dict.fromkeys(run.known, _NO_METRICS)
    run.know(sys.maxsize)
    return {step: run.metrics(step) for step in run.known}
