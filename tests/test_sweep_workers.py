"""The sweep of chapter 4 by two `wsol sweep` processes, one of them killed in the middle: the same table of rules as by one alone."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from wsol_nb import protocol
from wsol_nb.datasets import load
from wsol_nb.protocol import RULES, choose, sweep_worker
from wsol_nb.sweeps import open_study

SMALL = {"configurations": 4, "epochs": 2, "most_step": 1, "train_pictures": 24, "test_pictures": 8, "makers": [], "size": 32, "resize": 36,
         "batch_size": 8, "noise_levels": [50]}


def table(swept):
    """Annotator and rule -> configuration, epoch, threshold and score."""
    return {(a, rule): choose(swept.runs, rule, a) for a in swept.annotators for rule in RULES[:4]}


def start(reports):
    command = [Path(sys.executable).parent / "wsol", "sweep", "toy", "--overrides", json.dumps(SMALL)]
    env = os.environ | {"WSOL_REPORTS": str(reports), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def at_work(reports):
    """Signs of life of workers: one for each configuration that somebody trains just now."""
    return list(reports.rglob("search/alive/*-*"))


def kill_at_work(victim, reports, other):
    """Kill a process while both train a configuration; it stands still while we look, so that one of the signs must be its own."""
    for _ in range(3_000):
        assert victim.poll() is None and other.poll() is None, "a worker was done before both were at work"
        victim.send_signal(signal.SIGSTOP)
        if len(at_work(reports)) == 2:
            victim.kill()
            assert victim.wait() == -signal.SIGKILL
            return
        victim.send_signal(signal.SIGCONT)
        time.sleep(.02)
    raise AssertionError("the two workers never were at work at the same time")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals of POSIX")
def test_two_workers_one_killed(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    load("toy")["train"]                                       # drawn before anybody needs it
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    monkeypatch.setenv("WSOL_REPORTS", str(alone))
    [expected] = sweep_worker("toy", overrides=SMALL)
    workers = [start(shared), start(shared)]
    try:
        kill_at_work(*workers[:1], shared, workers[1])
        out, errors = workers[1].communicate(timeout=120)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert workers[1].returncode == 0, errors
    assert out.splitlines()[-1] == "full, seed 0: 4 configurations: 4 done, 0 diverged, 0 running, 0 open"
    assert not at_work(shared)

    monkeypatch.setenv("WSOL_REPORTS", str(shared))
    monkeypatch.setattr(protocol, "fit", lambda *a, **k: pytest.fail("trained again"))
    [found] = sweep_worker("toy", overrides=SMALL)
    states = [t.state.name for t in open_study(found.search).get_trials(deepcopy=False)]
    assert sorted(states) == ["COMPLETE"] * 4 + ["FAIL"]       # the killed worker's configuration was done again by the other
    assert len(expected.runs) == 4 and len({c.run for c in table(expected).values()}) > 0
    assert table(found) == table(expected)
