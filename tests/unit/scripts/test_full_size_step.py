"""scripts/full_size_step.py for real: minutes, and 8 GiB of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_step_of_sdxl_fits_in_9_gib_and_is_finite(tmp_path):
    path = tmp_path / "step.json"
    threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # tests use one
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "full_size_step.py"), "--steps", "1", "--json", str(path)],
        env=threads | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["finite"]
    assert result["unet_parameters"] == 2_567_463_684
    assert result["adapter_modules_that_moved"] == result["adapter_modules"] == 560
    assert result["peak_rss_gib"] <= 9
