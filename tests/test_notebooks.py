"""The state of the notebooks: exported, clean, with the parameters that commands rely on."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wsol_nb.core import PARAMETERS
from wsol_nb.pipeline import SUITES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if p.parent.name == "baselines" or re.match(r"0[1-6]_", p.name)]
PRETRAINING = [p for p in NOTEBOOKS if p.parent.name == "pretraining" and p.stem != "readiness"]      # which trains no shipped weights


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_export_and_clean_leave_no_difference(tmp_path):
    """`nbdev_export` and `nbdev_clean` on a copy give back the very files that stand here."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("nbs", "wsol_nb"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.nb[ic]"))
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, copy)
    for command in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([str(Path(sys.executable).parent / command)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    here = {p.relative_to(ROOT): p for d in ("nbs", "wsol_nb") for p in (ROOT / d).rglob("*")
            if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts}
    there = {p.relative_to(copy): p for d in ("nbs", "wsol_nb") for p in (copy / d).rglob("*") if p.suffix in (".py", ".ipynb")}
    assert set(here) == set(there)
    drifted = [str(k) for k in here if here[k].read_bytes() != there[k].read_bytes()]
    assert not drifted, f"run nbdev_export and nbdev_clean, then commit: {drifted}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_parameters_come_first_and_are_checked(path):
    """papermill runs the defaults silently when the tag is missing, so its presence is tested."""
    code = cells(path)
    tagged = [i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == [0], "exactly one cell tagged `parameters`, and it is the first code cell"
    names = {}
    exec("".join(code[0]["source"]), names)   # a cell of plain assignments
    names.pop("__builtins__")
    assert set(PARAMETERS) <= set(names)
    assert (names["dataset"], names["variant"], names["seed"], names["n_seeds"], names["overrides"]) in (
        ("toy", "full", 0, 1, {}), ("toy_masks", "full", 0, 1, {}), ("toy_video", "full", 0, 1, {}))
    assert "check_parameters(locals()" in "".join(code[1]["source"])


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda p: p.stem)
def test_pretraining_takes_two_steps_and_writes_nothing(path):
    """The defaults of a notebook that makes shipped weights are a quick look."""
    code = cells(path)
    assert [i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", [])] == [0]
    names = {}
    exec("".join(code[0]["source"]), names)
    assert (names["steps"], names["seed"], names["out"]) == (2, 0, "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small_and_tidy(path):
    """Committed notebooks are clean, small, start with a title, and hold nothing papermill should not run."""
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 300_000
    assert "nbdev_export(" not in text and "eval: false" not in text
    assert cells(path, "markdown")[0]["source"][0].startswith("# ")
    assert not re.search(r"^\s*\"?from \S+ import \*", text, re.M)
    assert "image/jpeg" not in text, "no photographs in committed outputs"


def test_calls_name_existing_notebooks():
    missing = [c.notebook for calls in SUITES.values() for c in calls if not (ROOT / "nbs" / f"{c.notebook}.ipynb").exists()]
    assert not missing


def test_published_numbers_agree_with_themselves():
    """The arithmetic checks that came with the published numbers still pass."""
    done = subprocess.run([sys.executable, str(ROOT / "reports/published/check.py")], capture_output=True, text=True)
    assert done.returncode == 0 and "2586 values in 28 tables" in done.stdout, done.stdout + done.stderr


def test_package_and_settings_agree():
    version = re.search(r"^version = (\S+)", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert f'__version__ = "{version}"' in (ROOT / "wsol_nb/__init__.py").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


def test_no_machine_paths():
    """Nothing tracked names a home folder or a folder of one machine."""
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git clone")
    leaks = [f for f in files.stdout.split() if (ROOT / f).suffix in (".py", ".ipynb", ".md", ".ini", ".txt", ".yml", ".yaml", "")
             and (ROOT / f).is_file() and re.search(rb"/(?:home|Users|work|root)/\w", (ROOT / f).read_bytes())]
    assert not leaks
