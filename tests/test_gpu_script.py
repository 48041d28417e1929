"""tests/gpu.sh, without a GPU: a part that fails does not stop the others, and the record is whole.

All parts on a CPU take three minutes on a quiet machine: bash tests/gpu.sh
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the parts are large on a GPU")
def test_a_part_that_fails_does_not_stop_the_rest(tmp_path):
    command = ["bash", "tests/gpu.sh", "no_such_part", "facts"]
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nothing was measured" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [(row["part"], row["status"]) for row in rows] == [
        ("no_such_part", "failed"),
        ("facts", "well"),
    ]
    assert not any(row["measured"] for row in rows)
    assert rows[1]["figures"]["copy_tb_s"] > 0
