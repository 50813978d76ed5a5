"""`examples/multihost.py` does what it says: one signal, one step, one end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.processes
def test_a_sharded_training_goes_on_with_as_many_processes_and_with_fewer(tmp_path: Path) -> None:
    """One process gets SIGTERM, both save one step; two end bit-identical, and one but for rounding."""
    command = [sys.executable, "examples/multihost.py", "--first=2", "--num_steps=400", f"--workdir={tmp_path}"]
    process = subprocess.run(
        [*command, "--then", "2", "1"], cwd=REPOSITORY, capture_output=True, text=True, timeout=400
    )
    output = process.stdout
    assert process.returncode == 0, output + process.stderr
    saved = re.search(r"SIGTERM to process 1: step (\d+) is saved, exit codes \[143, 143\]", output)
    assert saved and 80 <= int(saved[1]) < 400
    assert f"resumed from step {saved[1]} with 2 processes" in output
    assert f"resumed from step {saved[1]} with 1 processes" in output
    first, second = re.findall(r"step 400: (\d+) of 6 parameters bit-identical", output)
    assert first == "6" and int(second) <= 6
    assert not list(tmp_path.iterdir()), "the runs are removed at the end"


def test_the_slurm_script_is_valid_shell() -> None:
    """`bash -n` reads it, and it asks for what docs/cluster.md explains."""
    script = REPOSITORY / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for option in re.findall(r"`#SBATCH (\S+)`", (REPOSITORY / "docs" / "cluster.md").read_text()):
        assert f"#SBATCH {option}\n" in script.read_text(), option
