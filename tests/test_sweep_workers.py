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

SMALL = {"configurations": 4, "epochs": 4, "train_pictures": 96, "test_pictures": 16, "makers": [], "size": 48, "resize": 52, "batch_size": 8,
         "noise_levels": [50]}


def table(swept):
    """Annotator and rule -> configuration, epoch, threshold and score."""
    return {(a, rule): choose(swept.runs, rule, a) for a in swept.annotators for rule in RULES[:4]}


def hits(swept):
    """What every configuration measured, number for number."""
    return [(r.val.hits.tolist(), r.val.cls.tolist(), r.test.epochs.tolist(), r.test.hits.tolist()) for r in swept.runs]


def start(reports):
    command = [Path(sys.executable).parent / "wsol", "sweep", "toy", "--overrides", json.dumps(SMALL)]
    env = os.environ | {"WSOL_REPORTS": str(reports), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def at_work(reports):
    """Signs of life of workers: one for each configuration that somebody trains just now."""
    return list(reports.rglob("search/alive/*-*"))


def wait_for(condition, *workers):
    for _ in range(3_000):
        if condition():
            return
        assert all(w.poll() is None for w in workers), "a worker ended too early"
        time.sleep(.02)
    raise AssertionError("nothing happened for a minute")


def freeze_in_the_middle(worker, reports):
    """Let a worker stand still after the first epoch of a configuration and before its last."""
    def in_the_middle():
        worker.send_signal(signal.SIGSTOP)
        if at_work(reports) and list(reports.rglob("configuration-*/epoch-*")) and not list(reports.rglob("configuration-*/test-*")):
            return True
        worker.send_signal(signal.SIGCONT)
        return False
    wait_for(in_the_middle, worker)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals of POSIX")
def test_two_workers_one_killed(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    load("toy")["train"]                                       # drawn before anybody needs it
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    monkeypatch.setenv("WSOL_REPORTS", str(alone))
    [expected] = sweep_worker("toy", overrides=SMALL)
    workers = [start(shared)]
    try:
        freeze_in_the_middle(workers[0], shared)
        workers.append(start(shared))
        wait_for(lambda: len(at_work(shared)) == 2, *workers)      # the second leaves the configuration of the first alone
        workers[0].kill()
        assert workers[0].wait() == -signal.SIGKILL
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
    assert len(hits(expected)) == 4 and all(hits(expected).count(one) == 1 for one in hits(expected))      # there is something to choose from
    assert hits(found) == hits(expected)
    assert table(found) == table(expected)
