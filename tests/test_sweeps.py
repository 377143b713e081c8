"""Sweeps with several processes: shared out once, killed at any moment, the same table in the end."""
import os
import signal
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("optuna")

from wsol_nb.sweeps import RATE, Range, Search, describe, open_study, results, work

SPACE = {"lr": RATE, "step_size": Range(1, 9, whole=True)}
ROWS = [{"lr": 10. ** -(k % 5), "step_size": 1 + k % 9} for k in range(10)]

WORKER = """
    import os, signal, sys, time
    from pathlib import Path
    from wsol_nb.sweeps import RATE, Range, Search, work

    folder, kill, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    space = {"lr": RATE, "step_size": Range(1, 9, whole=True)}
    rows = [{"lr": 10. ** -(k % 5), "step_size": 1 + k % 9} for k in range(10)]

    def measure(number, values):
        with open(folder / "log", "a") as log:
            log.write(f"{os.getpid()} {number}\\n")
        if number == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        return None if number == 5 else values["step_size"] - values["lr"]

    work(Search(folder, space, rows), measure, quiet=True, poll=.2)
"""


def start(folder, kill=-1, pause=0.):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORKER), str(folder), str(kill), str(pause)],
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def measured(folder):
    return [tuple(map(int, line.split())) for line in (folder / "log").read_text().splitlines()]


def table(folder):
    return results(Search(folder, SPACE, ROWS)).drop(columns="seconds")


@pytest.fixture
def alone(tmp_path):
    """The table one worker makes."""
    return work(Search(tmp_path / "alone", SPACE, ROWS),
                lambda number, values: None if number == 5 else values["step_size"] - values["lr"], quiet=True).drop(columns="seconds")


def test_two_workers_give_the_table_of_one(tmp_path, alone):
    both = [start(tmp_path / "two", pause=.3) for _ in range(2)]
    assert [p.wait(240) for p in both] == [0, 0]
    assert table(tmp_path / "two").equals(alone)
    assert sorted(number for _, number in measured(tmp_path / "two")) == list(range(10))      # each once


def test_a_killed_worker_loses_its_running_trial_only(tmp_path, alone):
    folder = tmp_path / "killed"
    assert start(folder, kill=4).wait(240) == -signal.SIGKILL
    before = table(folder)
    assert before["state"].tolist() == ["done"] * 4 + ["running"] + ["open"] * 5
    assert start(folder).wait(240) == 0
    assert table(folder).equals(alone)
    assert sorted(number for _, number in measured(folder)) == sorted([*range(10), 4])
    states = [t.state.name for t in open_study(Search(folder, SPACE, ROWS)).trials]
    assert states.count("FAIL") == 1 and states.count("COMPLETE") == 9 and states.count("PRUNED") == 1


def test_the_survivor_takes_over(tmp_path, alone):
    """While this worker measures its first configuration, another comes and dies in its own; this one does what it left."""
    folder = tmp_path / "survivor"
    mine = []

    def measure(number, values):
        if not mine:
            assert start(folder, kill=1).wait(240) == -signal.SIGKILL
        mine.append(number)
        return None if number == 5 else values["step_size"] - values["lr"]

    found = work(Search(folder, SPACE, ROWS), measure, quiet=True)
    assert found.drop(columns="seconds").equals(alone)
    assert [number for _, number in measured(folder)] == [1]
    assert mine == [0, *range(2, 10), 1]
    assert describe(found) == "10 configurations: 9 done, 1 diverged, 0 running, 0 open"
