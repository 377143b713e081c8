"""Full disks, blocked folders, damaged input: one clear message, nothing partial left behind."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
resource = pytest.importorskip("resource")

RECORD = """
import dataclasses, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from wsol_nb.reports import Run, record, score_rows
@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "toy"
    backbone: str = "b"
    seed: int = 0
    text: str = ""
config = Config(text="x" * int(sys.argv[1]))
print(record(Run("01_cams", "toy"), "full", config, score_rows("2.1", "CAM", config, {"PxAP": 1.}), 1.))
"""


def python(code, *args, env=None):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, **(env or {})}, timeout=120)


def test_full_disk_leaves_no_result(reports):
    """The file-size limit stands in for a full disk: the old result stays, whole; the new one is absent."""
    done = python(RECORD, 10)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    before = path.read_bytes()
    done = python(RECORD, 10_000)
    assert done.returncode != 0
    assert "OutputError: cannot write" in done.stderr and path.name in done.stderr and "WSOL_REPORTS" in done.stderr
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.read_bytes() == before
    json.loads(before)


def test_full_disk_leaves_no_figure(reports):
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from matplotlib.figure import Figure
from wsol_nb.reports import Run, save_figure
figure = Figure(); figure.subplots().imshow([[0, 1]])
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
save_figure(Run("01_cams", "toy"), "figure_1_4", figure, "caption")
"""
    done = python(code)
    assert done.returncode != 0 and "OutputError: cannot write" in done.stderr, done.stderr
    assert not [p for p in reports.rglob("*") if p.is_file()]


def test_full_standard_output(run):
    """`wsol data list > /dev/full` fails with a message and exit code 1, not with a traceback."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    scripts = Path(sys.executable).parent
    with open("/dev/full", "w") as full:
        done = subprocess.run([str(scripts / "wsol"), "data", "list"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.strip(), done.stderr


def test_report_root_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    done = python(RECORD, 10, env={"WSOL_REPORTS": str(tmp_path / "file" / "reports")})
    assert done.returncode != 0 and "cannot write" in done.stderr and "NotADirectory" not in done.stderr.splitlines()[-1]


def test_damaged_result_is_named(reports):
    """A result somebody damaged by hand stops the report with the file's name."""
    done = python(RECORD, 10)
    path = Path(done.stdout.strip())
    path.write_text(path.read_text()[:-30])
    done = python("from wsol_nb.reports import build_report; build_report('toy')")
    assert done.returncode != 0 and path.name in done.stderr and "DataError" in done.stderr, done.stderr
    assert not (reports / "toy/index.html").exists()
