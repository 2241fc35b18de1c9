"""How threads wait: looked up before they are started, left to the user where he has said it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npd import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of so many cores on which so many threads want to run, this one among them."""

    def make(cores: int, running: int, *, of: int | None = None, **environment: str) -> str | None:
        load = tmp_path / "loadavg"
        load.write_text(f"0.1 0.2 0.3 {running}/321 4711\n")
        monkeypatch.setattr(threads, "LOAD", load)
        monkeypatch.setattr(threads, "cores", lambda: cores)
        monkeypatch.setattr(os, "cpu_count", lambda: of or cores)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        for name in (*threads.ASKED, "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back
        monkeypatch.delenv("OMP_WAIT_POLICY")
        if "OMP_WAIT_POLICY" in environment:
            monkeypatch.setenv("OMP_WAIT_POLICY", environment["OMP_WAIT_POLICY"])
        threads.wait_politely()
        return os.environ.get("OMP_WAIT_POLICY")

    return make


def test_on_a_quiet_machine_nothing_changes(machine):
    assert machine(2, 1) is None
    assert machine(16, 1) is None


def test_threads_sleep_where_others_want_their_cores(machine):
    assert machine(2, 2) == "PASSIVE"
    assert machine(16, 4) == "PASSIVE"
    assert machine(8, 5, OMP_NUM_THREADS="4") is None  # four of eight cores are free: a worker beside a trainer
    assert machine(8, 6, OMP_NUM_THREADS="4") == "PASSIVE"
    assert machine(2, 2, OMP_NUM_THREADS="1") is None  # nobody to wait for
    assert machine(2, 5, of=64) is None  # four others on 64 cores hardly meet on these two
    assert machine(2, 60, of=64) == "PASSIVE"


@pytest.mark.parametrize("name", threads.ASKED)
def test_the_user_has_the_word(machine, name):
    assert machine(2, 9, **{name: "ACTIVE"}) == ("ACTIVE" if name == "OMP_WAIT_POLICY" else None)


def test_where_the_system_does_not_say_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "LOAD", tmp_path / "none")
    assert threads.others_running() == 0


def test_it_is_asked_before_pytorch_is_loaded():
    """In a process of its own, where the load is that of a busy machine."""
    code = (
        "import sys, os, pathlib; read = pathlib.Path.read_text\n"
        "pathlib.Path.read_text = lambda self, *a, **k: '9 9 9 99/99 9' if self.name == 'loadavg' else read(self, *a, **k)\n"
        "import npd; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in threads.ASKED} | {"OMP_NUM_THREADS": "64"}
    if not Path("/proc/loadavg").exists():
        pytest.skip("this system has no /proc/loadavg")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PASSIVE", "False"]
