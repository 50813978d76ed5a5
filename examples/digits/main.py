"""Trains a Flax model on handwritten digits, and resumes where it was stopped.

    python -m examples.digits.main --workdir=/tmp/digits
    python -m examples.digits.main --workdir=/tmp/digits --config.num_steps=500

Press Ctrl-C, send it SIGTERM or SIGKILL; the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from examples.digits.train import evaluate, train

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"

_CONFIG = config_flags.DEFINE_config_file("config", str(DEFAULT_CONFIG), "What to train.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the checkpoints are.", required=True)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    state = train(_CONFIG.value, _WORKDIR.value)
    print(f"test accuracy {float(evaluate(state)['accuracy']):.4f}")


if __name__ == "__main__":
    app.run(main)
