"""The report page as a whole: animated figures, missing files, costs; the README's headline; who makes which table and figure."""
import ast
import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import pytest

from wsol_nb import pipeline, reports as library
from wsol_nb.claims import write_claims
from wsol_nb.core import DataError
from wsol_nb.pipeline import SUITES, Call, picture
from wsol_nb.reports import (BEGIN, END, FILLS, HEADLINE, Run, build_report, caption_figure, check_readme, costs, expected_files, headline,
                             missing_files, producers, published, read_result, readme_block, record, score_rows, snapshot, table_number,
                             without_producer)

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "reports" / "snapshot"
needs_snapshot = pytest.mark.skipif(not SNAPSHOT.is_dir(), reason="no snapshot is committed")
CALL = Call("06_trcamv", "mini_ytov1", figures=("trcamv_strip", "trcamv_clip.gif"))


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "mini_ytov1"
    backbone: str = "mini_sst"
    seed: int = 0


def film(path, frames=3):
    """An animated GIF of a few grey frames."""
    from PIL import Image
    pictures = [Image.new("L", (8, 6), 60 * k) for k in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0)


@pytest.fixture
def suite(reports, monkeypatch):
    """A mini suite of one call that has left a result of two seeds, a picture and an animated one."""
    from matplotlib.figure import Figure
    monkeypatch.setitem(SUITES, "mini", (CALL,))
    run = Run("06_trcamv", "mini_ytov1")
    for seed, value in enumerate((40., 44.)):
        config = Config(seed=seed)
        record(run, "full", config, score_rows("II-1", "TrCAM-V with CLIP", config, {"CorLoc": value}, "class=Avg"), seconds=1.)
    library.save_figure(run, "trcamv_strip", Figure(), "Seven frames.", title="A strip")
    film(run.figures / "trcamv_clip.gif")
    caption_figure(run, "trcamv_clip.gif", "A bird that walks.", "A localized clip")
    return run


def test_an_animated_figure_reaches_page_folder_and_snapshot(suite, reports):
    from PIL import Image
    text = build_report("mini", 2).read_text()
    shown = re.search(r'<figure id="trcamv_clip"><img alt="A localized clip" src="data:image/gif;base64,', text)
    assert shown and text.index('id="06_trcamv"') < shown.start() and "A bird that walks." in text
    assert missing_files("mini", 2) == [] and 'id="missing"' not in text
    snapshot("mini", 2)
    for folder in ("mini", "snapshot"):
        with Image.open(reports / folder / "figures" / "trcamv_clip.gif") as copied:
            assert copied.n_frames == 3
    page = (reports / "snapshot/index.html").read_text()
    assert '<img alt="A localized clip" src="figures/trcamv_clip.gif"' in page and "base64" not in page
    assert (reports / "snapshot/figures/trcamv_clip.json").exists()
    assert not list((reports / "snapshot/results").rglob("*.gif"))


def test_the_pipeline_waits_for_animated_figures():
    outputs = pipeline.outputs(CALL, "r", 1)
    assert outputs[-2:] == ["r/results/06_trcamv/mini_ytov1/trcamv_strip.png", "r/results/06_trcamv/mini_ytov1/trcamv_clip.gif"]
    assert all((ROOT / "Snakefile").read_text().count(text) == n for text, n in (("pipeline.picture(f)", 2), ('{f}.png', 0)))
    full = [c for c in SUITES["full"] if c.stem == "06_trcamv"]
    assert full and all("trcamv_clip.gif" in c.figures for c in full)
    assert '"trcamv_clip.gif"' in "".join(pipeline.code_cells(ROOT / "nbs/06_trcamv.ipynb"))


@pytest.mark.parametrize("lost", ["trcamv_clip.gif", "trcamv_clip.json", "trcamv_strip.png"])
def test_a_missing_picture_is_named_on_the_page(suite, lost):
    (suite.figures / lost).unlink()
    name = next(picture(f) for f in CALL.figures if Path(f).stem == Path(lost).stem)
    assert missing_files("mini", 2) == [f"results/06_trcamv/mini_ytov1/{name}"]
    text = build_report("mini", 2).read_text()
    assert "Missing files (1)" in text and f"results/06_trcamv/mini_ytov1/{name}" in text
    assert f'id="{Path(lost).stem}"' not in text


def test_a_missing_result_is_named_on_the_page(suite):
    assert missing_files("mini", 3) == ["results/06_trcamv/mini_ytov1-full-seed2.json"]
    assert [p.name for p in expected_files("mini", 3)] == ["mini_ytov1-full-seed0.json", "mini_ytov1-full-seed1.json"]
    assert "mini_ytov1-full-seed2.json" in build_report("mini", 3).read_text()


def test_what_it_cost_stands_at_the_end(suite, reports):
    folder = reports / "mini/notebooks"
    folder.mkdir()
    for name, seconds in {"06_trcamv-mini_ytov1": 600., "summary": 30., "01_cams-mini_cub": 999.}.items():      # the last belongs to no call
        (folder / f"{name}.ipynb").write_text(json.dumps({"cells": [], "metadata": {"papermill": {"duration": seconds}}}))
    found = costs("mini")
    assert found[["notebook", "seconds"]].values.tolist() == [["06_trcamv", 600.], ["07_summary", 30.], ["sum", 630.]]
    assert found.loc[0, "runs"] == 2 and found.loc[0, "device"].startswith(("CPU", "NVIDIA"))
    text = build_report("mini").read_text()
    assert text.index('id="06_trcamv"') < text.index('id="runs"') < text.index('id="costs"') and "10.5 minutes" in text
    (folder / "summary.ipynb").write_text(json.dumps({"cells": [], "metadata": {}}))      # run by something else: no row
    assert costs("mini")["seconds"].tolist() == [600., 600.]


def comparison(verdict, low, high):
    return {"claim": "C13", "comparison": "TrCAM-V localizes better than LayerCAM", "difference": (low + high) / 2, "low": low, "high": high,
            "verdict": verdict, "seeds": 2, "pictures": 9, "reason": ""}


def test_a_claim_that_fails_says_why_and_one_that_holds_does_not(suite):
    config = Config()
    scores = {"TrCAM-V": (45., 45.), "LayerCAM": (56., 66.)}
    rows = [row for name, values in scores.items() for split, value in zip(("validation", "test"), values)
            for row in score_rows("06_trcamv", name, config, {"CorLoc": value}, f"threshold={split}")]
    record(suite, "full", config, rows, seconds=1.)
    write_claims(suite.figures, "mini_ytov1", [comparison("fails", -20., -2.)])
    (found,) = library.claims_of("mini")
    assert found["reason"] == "CorLoc 45.0 against 56.0; not because of the threshold: with the best of the test split 45.0 against 66.0"
    page = build_report("mini").read_text()
    said = f"<span class=because>1 of 1 comparisons fails: TrCAM-V localizes better than LayerCAM, on mini_ytov1 (-11.0; -20.0 to -2.0): {found['reason']}"
    assert said in page
    write_claims(suite.figures, "mini_ytov1", [comparison("holds", 2., 20.)])
    rows = library.claims_of("mini")
    assert rows[0]["reason"] == "" and "class=because" not in library._claims_part(rows)


def test_a_reason_needs_the_result_files_of_the_report(suite):
    """Other seeds than those of the report explain nothing in it."""
    record(suite, "full", Config(seed=7), score_rows("06_trcamv", "TrCAM-V", Config(), {"CorLoc": 45.}, "threshold=validation")
           + score_rows("06_trcamv", "LayerCAM", Config(), {"CorLoc": 56.}, "threshold=validation"), seconds=1.)
    write_claims(suite.figures, "mini_ytov1", [comparison("fails", -20., -2.)])
    assert "CorLoc 45.0 against 56.0" in library.claims_of("mini")[0]["reason"]
    assert library.claims_of("mini", expected_files("mini", 2))[0]["reason"] == "the result files hold no measurement that explains it"


def test_long_tables_fold_and_short_ones_do_not():
    short, long = (library.pd.DataFrame({"method": ["CAM"] * n}) for n in (library.LONG, library.LONG + 1))
    assert library.html_table(short).startswith('<div class="frame">') and library.html_table(long, fold=False).startswith('<div class="frame">')
    assert library.html_table(long).startswith(f'<details class="long"><summary>{library.LONG + 1} rows</summary><div class="frame">')


def test_the_readme_says_what_its_report_cost(suite, reports):
    build_report("mini")
    assert "core-minutes" not in readme_block("mini")      # never papermilled
    folder = reports / "mini/notebooks"
    folder.mkdir()
    (folder / "06_trcamv-mini_ytov1.ipynb").write_text(json.dumps({"cells": [], "metadata": {"papermill": {"duration": 600.}}}))
    build_report("mini")
    threads = int(re.search(r"(\d+) threads", costs("mini").loc[0, "device"] + " 1 threads")[1])
    snapshot("mini")
    assert f"The last execution of its notebooks took {10 * threads} core-minutes together for 2 seeds" in readme_block("snapshot")


def readme_beside(reports):
    readme = reports.parent / "README.md"
    readme.write_text(f"# title\n\n{BEGIN}\n{END}\n\nrest\n")
    return readme


def test_snapshot_renews_the_readme(suite, reports):
    readme = readme_beside(reports)
    film(suite.figures / "other.gif")
    build_report("mini", 1)
    snapshot("mini", 1)
    text = readme.read_text()
    assert "| TrCAM-V | mini_ytov1 | mini_sst | 40.0 | 84.8 (YTOv1) |" in text      # seed 1 is not of this report
    assert [p.name for p in (reports / "snapshot/results/06_trcamv").glob("*.json")] == ["mini_ytov1-full-seed0.json"]
    assert headline("snapshot") in text and headline("snapshot") == headline("mini", 1)
    check_readme(readme)
    snapshot("mini", 2)
    assert "42.0 ± 2.8 (n=2)" in readme.read_text() and readme.read_text().endswith("\n\nrest\n")


def test_a_stale_headline_is_found(suite, reports):
    readme = readme_beside(reports)
    build_report("mini")
    snapshot("mini")
    check_readme(readme)
    readme.write_text(readme.read_text().replace("42.0", "92.0"))
    with pytest.raises(DataError, match="make snapshot"):
        check_readme(readme)
    readme.write_text(f"{BEGIN} {BEGIN} {END}")
    with pytest.raises(DataError, match="once each"):
        check_readme(readme)


def test_figures_of_the_headline(suite, reports):
    for name in ("figure_2_9", "figure_4_1", "figure_II_2"):
        for suffix in (".png", ".json"):
            target = reports / "mini/figures" / f"{name}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile((suite.figures / "trcamv_strip.png").with_suffix(suffix), target)
    block = readme_block("mini")
    found = re.findall(r"!\[(Figure .*?): (.*?)\]\(reports/mini/figures/(.*?)\.png\)\n\n\*\*Figure .*?\*\* Seven frames\.", block)
    where = json.loads((suite.figures / "trcamv_strip.json").read_text())["dataset"]
    assert [(number, name) for number, _, name in found] == [("Figure 2.9", "figure_2_9"), ("Figure II-2", "figure_II_2"), ("Figure 4.1", "figure_4_1")]
    titles = [title for _, title, _ in found]      # a title of the thesis that names its data set names ours instead
    assert titles[0].endswith(f"(here: {where})") and titles[2].endswith(f"(here: {where})")
    assert titles[1] == f"Localization on {where} frames (published: YTOv1)"


def test_lines_of_the_headline_name_published_rows():
    """A typing error in a method or condition would drop the published number, not fail."""
    everything = published()
    for name, dataset, cells in HEADLINE:
        for metric, (table, method, condition) in cells.items():
            if table in set(everything["table"]) and condition != "class label=predicted":      # our own line: printed for another metric
                rows = everything[(everything["table"] == table) & (everything["method"] == method) & (everything["metric"] == metric)
                                  & (everything["condition"] == condition) & (everything["dataset"] == library.twin_of(dataset))]
                assert len(rows) == 1, (name, dataset, metric)


def test_the_readme_has_its_marks():
    text = (ROOT / "README.md").read_text()
    assert library.with_block(text, f"{BEGIN}{END}") and text.index("make reports") < text.index(BEGIN)


@needs_snapshot
def test_the_readme_says_what_the_snapshot_says(monkeypatch):
    monkeypatch.setenv("WSOL_REPORTS", str(ROOT / "reports"))
    check_readme(ROOT / "README.md")
    for path in re.findall(r"\]\((reports/snapshot/[^)]*)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).is_file(), path


@needs_snapshot
def test_the_snapshot_holds_every_table_and_figure(monkeypatch):
    monkeypatch.setenv("WSOL_REPORTS", str(ROOT / "reports"))
    filled = set(library.measured("snapshot")["table"])
    assert [r["id"] for r in pipeline.index() if r["kind"] == "table" and table_number(r["id"]) not in filled] == []
    names = [picture(f) for call in SUITES["mini"] for f in call.figures] + [f"{r['id']}.png" for r in pipeline.index() if r["kind"] != "table"]
    assert [n for n in names if not (SNAPSHOT / "figures" / n).is_file()] == []
    assert 'id="missing"' not in (SNAPSHOT / "index.html").read_text()


@needs_snapshot
def test_notebooks_fill_the_tables_they_say(monkeypatch):
    monkeypatch.setenv("WSOL_REPORTS", str(ROOT / "reports"))
    results = [read_result(p) for p in library.result_files("snapshot")]
    for name, made in producers(SUITES["mini"]).items():
        if name.startswith("table_"):
            by = {f"{r['notebook']}-{pipeline.data_name(r['dataset'])}" for r in results for row in r["scores"] if row["table"] == table_number(name)}
            assert set(made) <= by, (name, set(made) - by)


def test_everything_of_the_thesis_has_a_producer():
    assert without_producer(SUITES["mini"]) == []


COMPLETE = [
    Call("01_cams", "mini_cub"), Call("02_dips", "mini_cub"), Call("02_dips", "mini_ilsvrc"), Call("02_dips", "mini_teldrone"),
    Call("03_tedloc", "mini_cub"), Call("04_protocol", "mini_cub"), Call("04_protocol", "mini_ilsvrc"), Call("04_protocol", "mini_glas"),
    Call("05_drone", "mini_cub"), Call("05_drone", "mini_teldrone"),
    Call("06_trcamv", "mini_ytov1", figures=tuple(r["id"] for r in pipeline.index() if r["kind"] != "table"))]


def test_a_suite_that_lacks_a_producer_is_found():
    assert without_producer(COMPLETE) == []
    lacking = [dataclasses.replace(c, figures=c.figures[1:]) for c in COMPLETE]
    assert without_producer(lacking) == ["figure_1_1"]
    without = lambda notebook, dataset: without_producer([c for c in COMPLETE if (c.notebook, c.dataset) != (notebook, dataset)])
    assert without("02_dips", "mini_ilsvrc") == ["table_2_2"]
    assert without("02_dips", "mini_teldrone") == ["table_2_3"]
    assert without("04_protocol", "mini_glas") == ["table_4_9"]
    assert without("05_drone", "mini_teldrone") == ["table_I_4"]


@functools.cache
def strings(path):
    """String constants of a notebook or module."""
    text = "\n".join(pipeline.code_cells(path)) if str(path).endswith(".ipynb") else Path(path).read_text()
    return {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_what_notebooks_say_they_fill_stands_in_their_code():
    """Every table of `FILLS` is named by the notebook or a module it imports; every published table is claimed by somebody."""
    for stem, tables in FILLS.items():
        notebook = next(p for p in (ROOT / f"nbs/{stem}.ipynb", ROOT / f"nbs/baselines/{stem}.ipynb") if p.exists())
        modules = [p for p in pipeline.sources(notebook) if Path(p).stem != "reports"]      # which holds FILLS itself
        named = set().union(*map(strings, modules))
        assert set(tables) <= named, (stem, set(tables) - named)
    assert {t for tables in FILLS.values() for t in tables} == {table_number(r["id"]) for r in pipeline.index() if r["kind"] == "table"}


READINESS = (("CAM", "CAM", "", "MaxBoxAcc"), ("CAM", "centred box", "", "MaxBoxAcc"), ("CAM", "supervised decoder", "", "MaxBoxAcc"),
             ("attention", "head 0", "dino", "MaxBoxAcc"), ("attention", "mean", "dino", "MaxBoxAcc"),
             ("attention", "head 0", "contrastive", "MaxBoxAcc"), ("attention", "mean", "contrastive", "MaxBoxAcc"),
             ("CLIP", "zero-shot", "shipped", "species"), ("CLIP", "zero-shot", "shipped", "family"), ("EVA", "linear probe", "shipped", "species"))


def test_the_readme_says_what_readiness_measured():
    """The table of the mini models is typed by hand: each number must be one of `benchmarks/readiness.md`."""
    table = (ROOT / "README.md").read_text().split("| | measured | wanted |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (ROOT / "benchmarks/readiness.md").read_text().splitlines()
            if line.startswith("| ")]
    values = {tuple(row[:4]): row[4] for row in rows}
    assert [values[key] for key in READINESS if values[key] not in table] == []
