"""`make reports` through Snakemake on the toy suite: complete, incremental, resumable, exclusive."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wsol_nb import pipeline

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the repository, so that the pipeline's bookkeeping of this clone stays as it is."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("nbs", "wsol_nb", "Snakefile", "settings.ini", "reports"):
        source = ROOT / name
        if name == "reports":
            source, target = ROOT / "reports/published", copy / "reports/published"
        else:
            target = copy / name
        if source.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        else:
            subprocess.run(["cp", str(source), str(target)], check=True)
    return copy


def snakemake(place, wait=True, *more):
    scripts = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    for name in ("WSOL_REPORTS", "IN_TEST"):
        env.pop(name, None)
    command = [str(scripts / "snakemake"), "--cores", "2", "--nolock", "--rerun-incomplete", "--show-failed-logs",
               "--config", "suite=toy", "seeds=1", *more]
    process = subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    if not wait:
        return process
    out, _ = process.communicate(timeout=560)
    return process.returncode, out


def test_killed_then_resumed_then_nothing_to_do(place):
    killed = snakemake(place, wait=False)
    folder = place / "reports/toy"
    end = time.time() + 240
    while time.time() < end and not list(folder.glob("logs/01_cams-toy.txt")):
        time.sleep(.2)
    time.sleep(4)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / "index.html").exists()
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())                      # whatever is there is whole

    code, out = snakemake(place)
    assert code == 0, out[-3000:]
    page = (folder / "index.html").read_text()
    call = pipeline.SUITES["toy"][0]
    for path in pipeline.outputs(call, folder, 1):
        assert Path(path).exists()
    assert len(list((folder / "tables").glob("table_*.csv"))) >= 28
    for figure in call.figures:
        assert f'id="{figure}"' in page
    assert (folder / "notebooks/01_cams-toy.html").exists()

    start = time.time()
    code, out = snakemake(place)
    assert code == 0 and "Nothing to be done" in out, out[-2000:]
    assert time.time() - start < 60                      # the budget is 15 s; a loaded machine gets slack

    (folder / "tables/table_2_1.md").unlink()            # a missing file is made again, without running the notebook
    before = {p: p.stat().st_mtime_ns for p in folder.glob("results/**/*.json")}
    code, out = snakemake(place)
    assert code == 0 and (folder / "tables/table_2_1.md").exists(), out[-2000:]
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("results/**/*.json")}

    weights = place / "wsol_nb/weights/mini_cnn.safetensors"      # other weights make the results stale
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"other")
    code, out = snakemake(place, True, "--dry-run")
    assert code == 0 and "01_cams on toy" in out, out[-2000:]


def test_weights_and_recipes_are_inputs(place, monkeypatch):
    """Of calls on embedded data: the shipped weights that the notebook or its method names, and the modules that draw the data"""
    monkeypatch.setattr(pipeline, "base_dir", lambda: place)
    pipeline.module_graph.cache_clear()
    folder = place / "wsol_nb/weights"
    folder.mkdir(exist_ok=True)
    for name in ("mini_cnn", "mini_sst.dino", "mini_sst.contrastive", "mini_clip", "mini_rpn"):
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    names = lambda notebook, dataset: {Path(f).name.removesuffix(".safetensors") for f in pipeline.weights(notebook, dataset)}
    cams = place / "nbs/01_cams.ipynb"
    assert "mini_cnn" in names(cams, "toy") and "mini_rpn" not in names(cams, "mini_cub") and not names(cams, "cub")
    own = place / "nbs/07_trial.ipynb"
    cell = {"cell_type": "code", "source": "backbone('mini_sst', size=96)"}
    own.write_text(json.dumps({"cells": [cell]}))
    assert names(own, "mini_cub") == {"mini_sst.dino", "mini_sst.contrastive"}
    assert pipeline.source_hash(own, "mini_cub") != pipeline.source_hash(own, "cub")
    own.write_text(json.dumps({"cells": [cell | {"source": "from wsol_nb import cams"}]}))
    assert "mini_cnn" in names(own, "mini_cub")                      # what a method's module names
    own.unlink()
    assert {Path(f).stem for f in pipeline.data_sources("mini_ytov1")} >= {"synth", "synth_video"}
    assert "synth_video" not in {Path(f).stem for f in pipeline.data_sources("mini_ilsvrc")}
    code, out = snakemake(place, True, "--filegraph")
    assert code == 0 and "weights/mini_cnn.safetensors" in out and "weights/mini_rpn" not in out, out[-3000:]
    pipeline.module_graph.cache_clear()


def test_suites_and_profile_parse(place):
    """Every suite builds its graph; the SLURM profile holds only options Snakemake knows."""
    code, out = snakemake(place, True, "--dry-run", "--config", "suite=full", "seeds=3")
    assert code == 0 and "cub-full-seed2.json" in out, out[-2000:]
    profile = (ROOT / "profiles/slurm/config.yaml").read_text()
    known = subprocess.run([str(Path(sys.executable).parent / "snakemake"), "--help"], capture_output=True, text=True).stdout
    for line in profile.splitlines():
        if line and line[0].isalpha():
            assert f"--{line.split(':')[0]}" in known, line
