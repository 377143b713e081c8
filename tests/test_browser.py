"""JupyterLab in a headless browser: opens chapter 1, runs every cell, ends without an error."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab server on copies of the notebooks; yields (url, token)."""
    shutil.copytree(ROOT / "nbs", tmp_path / "root/nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WSOL_REPORTS": str(tmp_path / "reports"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
           "JUPYTER_DATA_DIR": str(tmp_path / "share"), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "work"), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=secret", f"--ServerApp.root_dir={tmp_path / 'root'}"]
    server = subprocess.Popen(command, env=env, stdout=open(tmp_path / "lab.log", "w"), stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api?token=secret", timeout=5)
            break
        except OSError:
            time.sleep(.5)
    else:
        pytest.fail((tmp_path / "lab.log").read_text()[-2000:])
    yield url, "secret"
    server.terminate()
    server.wait(20)


def api(lab, path):
    url, token = lab
    with urllib.request.urlopen(f"{url}/api/{path}{'&' if '?' in path else '?'}token={token}", timeout=30) as answer:
        return json.load(answer)


def wait_for(condition, seconds, what):
    end = time.time() + seconds
    while time.time() < end:
        try:
            if condition():
                return
        except OSError:      # the server answers 500 while a file is being written or a kernel starts
            pass
        time.sleep(.3)
    pytest.fail(f"timed out: {what}")


def test_chapter_runs_in_jupyterlab(lab, tmp_path):
    url, token = lab
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch_persistent_context(str(tmp_path / "profile"), executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(90_000)
        page.goto(f"{url}/lab/tree/nbs/01_cams.ipynb?token={token}&reset")
        page.wait_for_selector(".jp-NotebookPanel-notebook .jp-Cell")
        page.wait_for_selector(".jp-KernelName:has-text('Python 3')")
        wait_for(lambda: [k["execution_state"] for k in api(lab, "kernels")] == ["idle"], 90, "kernel ready")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()

        code = []

        def all_run():
            """Save, and look whether the last cell ran or one failed: between cells the kernel is idle for a moment, too."""
            page.keyboard.press("Control+s")
            time.sleep(2)
            code[:] = [c for c in api(lab, "contents/nbs/01_cams.ipynb")["content"]["cells"] if c["cell_type"] == "code"]
            failed = any(o["output_type"] == "error" for c in code for o in c["outputs"])
            return failed or all(c["execution_count"] for c in code)

        wait_for(all_run, 300, "every cell has run")
        browser.close()
    errors = [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, errors[0]
    assert all(c["execution_count"] for c in code)
