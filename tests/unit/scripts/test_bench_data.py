"""The scripts that measure stage 1 still run, on little: their figures are for people. (`make test-all`)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]
PHOTOGRAPHS = PROJECT / "sdxl_ray" / "demo" / "photographs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (["bench_plan.py", "--samples", "2000", "--buckets", "4"], "1000 samples"),
        (["bench_encode.py", "--tiny", "--resolutions", "64", "--num-images", "2", "--num-captions", "2"], "VAE 64x64"),
        (["decode_quality.py", str(PHOTOGRAPHS), "--resolution", "64"], "decoded at 1/8"),
        (["bench_cache.py", "scan", f"--images={PHOTOGRAPHS}"], "images/s"),
        (["bench_cache.py", "decode", f"--images={PHOTOGRAPHS}", "--variants=1", "--resolution=64"], "whole stage"),
        (["bench_cache.py", "again", "--count=300"], "once more, nothing changed"),
        (["bench_cache.py", "rows", "--rows=3000"], "planning and index of 3,000 images"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_bench_runs(script, expected):
    done = subprocess.run(
        [sys.executable, str(PROJECT / "scripts" / script[0]), *script[1:]], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout, done.stdout
