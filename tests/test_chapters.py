"""Chapters as commands: what papermill says and leaves behind, for right and for wrong parameters."""
import json
import re
from pathlib import Path

import pytest

from wsol_nb.core import SettingsError

ROOT = Path(__file__).resolve().parents[1]

CHAPTER = "nbs/01_cams.ipynb"


def papermill(run, reports, tmp_path, *parameters, **more):
    out = tmp_path / "out.ipynb"
    return run("papermill", CHAPTER, out, *parameters, "--no-progress-bar", timeout=600,
               env={"WSOL_REPORTS": str(reports), "OMP_NUM_THREADS": "1", **more.pop("env", {})}, **more)


@pytest.mark.parametrize("parameters, message", [
    (["-p", "dataset", "nonsense"], "unknown dataset 'nonsense'"),
    (["-p", "datset", "cub"], "unknown parameter 'datset' (did you mean 'dataset'?)"),
], ids=["dataset", "name"])
def test_wrong_parameters_stop_at_once(run, reports, tmp_path, parameters, message):
    done = papermill(run, reports, tmp_path, *parameters)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-2000:]
    assert not list(reports.rglob("*.json"))


@pytest.mark.parametrize("notebook", ["01_cams", "02_dips", "03_tedloc", "04_protocol", "05_drone", "06_trcamv",
                                      *sorted(f"baselines/{p.stem}" for p in ROOT.glob("nbs/baselines/*.ipynb"))])
@pytest.mark.parametrize("given, message", [
    ({"variant": "nonsense"}, "unknown variant 'nonsense'"),
    ({"overrides": {"learning_rate": .1}}, "'learning_rate'"),
    ({"overrides": {"lr": "1e-3"}}, "must be float, got '1e-3' (str)"),     # what YAML makes of 1e-3
    ({"overrides": {"lr": -1.}}, "'lr' must be at least 0"),
    ({"n_seeds": 0}, "'n_seeds' must be at least 1"),
    ({"seed": "0"}, "'seed' must be int"),
    ({"dataset": "folder"}, None), ({"dataset": "folder:/my/photos"}, None), ({"variant": "full, full"}, None),
], ids=str)
def test_check_cell(notebook, given, message):
    """The notebook's second cell, run as papermill runs it: right after the parameters and what replaces them."""
    cells = [c for c in json.loads((ROOT / f"nbs/{notebook}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    names = {}
    exec("".join(cells[0]["source"]), names)
    names.update(given)
    if message is None:
        exec("".join(cells[1]["source"]), names)
    else:
        with pytest.raises(SettingsError, match=re.escape(message)):
            exec("".join(cells[1]["source"]), names)


def test_missing_data_is_explained(run, reports, tmp_path):
    done = papermill(run, reports, tmp_path, "-p", "dataset", "cub", env={"WSOL_DATA": str(tmp_path / "nowhere")})
    assert done.returncode != 0
    assert "DataError" in done.stderr and str(tmp_path / "nowhere") in done.stderr, done.stderr[-2000:]
    assert not list(reports.rglob("*.json"))


def test_a_run_writes_its_result_and_figures(run, reports, tmp_path):
    """From another folder, with an override: the result carries the hash, and no table counts it."""
    done = papermill(run, reports, tmp_path, "-y", "{overrides: {epochs: 1}}", "-p", "seed", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    results = list((reports / "toy/results/01_cams").glob("toy-full-seed3-*.json"))
    assert len(results) == 1, list(reports.rglob("*"))
    result = json.loads(results[0].read_text())
    assert result["settings"]["epochs"] == 1 and result["overrides"] == {"epochs": 1}
    assert {"commit", "device", "seconds", "versions"} <= set(result)
    values = {r["metric"]: r["value"] for r in result["scores"] if r["table"] == "01_cams" and r["method"] == "CAM"}
    assert {"MaxBoxAcc", "MaxBoxAccV2", "IoU", "Top-1 loc", "cls"} <= set(values)
    assert all(0 <= v <= 100 for v in values.values())
    assert list(reports.glob("toy/results/01_cams/toy-*/figure_1_4.png"))


def test_reports_that_cannot_be_written(run, tmp_path):
    """A report root below a file: one clear error, no result."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = papermill(run, blocked / "reports", tmp_path, "-y", "{overrides: {epochs: 1}}")
    assert done.returncode != 0
    assert "cannot write" in done.stderr, done.stderr[-2000:]
