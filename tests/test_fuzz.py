"""A few hostile cases of each kind, and those that failed once; `make fuzz` runs them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "cases", [["--to", "1"], pytest.param(["--to", "3", "--pinned"], marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_hostile_things_end_as_they_must(tmp_path, cases):
    command = [sys.executable, "-m", "tests.fuzz", *cases, "--record", str(tmp_path / "cases.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert len(lines) >= 8 * int(cases[1])  # kinds, each with so many
    assert {line["status"] for line in lines} <= {0, 1, 2, 130, 143}
