"""Shared fixtures: where the repository is, and a report folder that tests may fill."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """An empty report root, set for this process and its children."""
    monkeypatch.setenv("WSOL_REPORTS", str(tmp_path / "reports"))
    return tmp_path / "reports"


@pytest.fixture
def run():
    """Run a command of this environment; returns the finished process with text output."""
    def call(*args, cwd=ROOT, timeout=300, env=None, **more):
        scripts = Path(sys.executable).parent
        command = [str(scripts / args[0]) if (scripts / args[0]).exists() else args[0], *map(str, args[1:])]
        env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", **(env or {})}
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env, **more)
    return call
