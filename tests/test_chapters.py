"""Chapters as commands: what papermill says and leaves behind, for right and for wrong parameters."""
import json
import os

import pytest

CHAPTER = "nbs/01_cams.ipynb"


def papermill(run, reports, tmp_path, *parameters, **more):
    out = tmp_path / "out.ipynb"
    return run("papermill", CHAPTER, out, *parameters, "--no-progress-bar", timeout=600,
               env={"WSOL_REPORTS": str(reports), "OMP_NUM_THREADS": "1", **more.pop("env", {})}, **more)


@pytest.mark.parametrize("parameters, message", [
    (["-p", "dataset", "nonsense"], "unknown dataset 'nonsense'"),
    (["-p", "variant", "nonsense"], "unknown variant 'nonsense'"),
    (["-y", "{overrides: {learning_rate: 0.1}}"], "unknown setting of CamConfig 'learning_rate'"),
    (["-y", "{overrides: {lr: 1e-3}}"], "must be float, got '1e-3' (str)"),
    (["-p", "datset", "cub"], "unknown parameter 'datset' (did you mean 'dataset'?)"),
], ids=["dataset", "variant", "override", "type", "name"])
def test_wrong_parameters_stop_at_once(run, reports, tmp_path, parameters, message):
    done = papermill(run, reports, tmp_path, *parameters)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1] or message in done.stderr, done.stderr[-2000:]
    assert not list(reports.rglob("*.json"))


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


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/1/mounts"), reason="needs a place that cannot be written")
def test_reports_that_cannot_be_written(run, tmp_path):
    """A report root below a file: one clear error, no result."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = papermill(run, blocked / "reports", tmp_path, "-y", "{overrides: {epochs: 1}}")
    assert done.returncode != 0
    assert "cannot write" in done.stderr, done.stderr[-2000:]
