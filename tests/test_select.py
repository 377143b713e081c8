"""`wsol select`: score maps another program wrote, here NumPy alone, in the layout of Choe et al.'s library."""
import json
import shutil

import numpy as np
import pytest

from wsol_nb.cli import main
from wsol_nb.core import DataError
from wsol_nb.selection import select

SIZE = 20       # pixels of a map; images are twice as wide and three times as high
IDS = [f"bird/{k}.jpg" for k in range(5)]
BOXES = [(2 + k, 4, 9 + k, 13) for k in range(5)]      # on the map


def text(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))


def original(box, shrink=0):
    """A box of the map in pixels of the image, its right end moved left by some columns of the map."""
    x0, y0, x1, y1 = box
    return f"{2 * x0},{3 * y0},{2 * (x1 - shrink)},{3 * y1}"


def draw(root, candidate, split, grow):
    """Maps of 0.9 in the true box widened by `grow` columns, over 0.2 in the left half."""
    for id, (x0, y0, x1, y1) in zip(IDS, BOXES):
        values = np.zeros((SIZE, SIZE), np.float32)
        values[:, :10] = .2
        values[y0:y1 + 1, x0:x1 + 1 + grow] = .9
        path = root / "maps" / candidate / split / f"{id}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)


@pytest.fixture
def root(tmp_path):
    for split in ("val", "test"):
        base = tmp_path / "metadata" / split
        text(base / "image_ids.txt", IDS)
        text(base / "class_labels.txt", [f"{id},0" for id in IDS])
        text(base / "image_sizes.txt", [f"{id},{2 * SIZE},{3 * SIZE}" for id in IDS])
        for candidate, grow in (("epoch_2", 9), ("epoch_9", 0), ("epoch_10", 0)):
            draw(tmp_path, candidate, split, grow)
    text(tmp_path / "metadata" / "test" / "localization.txt", [f"{id},{original(b)}" for id, b in zip(IDS, BOXES)])
    text(tmp_path / "pseudo.txt", [f"{id},{original(b, shrink=1)}" for id, b in zip(IDS, BOXES)])
    return tmp_path


def chosen(root, **settings):
    return select(root / "maps", root / "metadata", root / "pseudo.txt", **settings)


def test_epoch_threshold_and_score(root):
    found = chosen(root, every_rule=True)
    assert found.candidate == "epoch_9"                # ties with epoch_10, and comes first
    assert found.validation == 100 and found.test["MaxBoxAcc"] == 100
    assert found.threshold == pytest.approx(.224)      # the first of the grid with floor(τ·229) ≥ floor(.2·255)
    assert found.curves["epoch_2"] < 100
    assert set(found.rules.values()) == {100.} and list(found.rules) == ["BT-TT", "BT-VT", "BV-TT", "BV-VT"]


def test_only_the_winner_meets_the_test_set(root):
    for candidate in ("epoch_2", "epoch_10"):
        for path in (root / "maps" / candidate / "test").rglob("*.npy"):
            path.unlink()
    assert chosen(root).test["MaxBoxAcc"] == 100
    with pytest.raises(DataError, match=r"epoch_2/test/bird/0\.jpg\.npy is missing \(5 of 5"):
        chosen(root, every_rule=True)


def test_runs_with_epochs(root):
    for path in list((root / "maps").iterdir()):
        target = root / "maps" / ("lr_1" if path.name == "epoch_2" else "lr_2")
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)
    found = chosen(root, every_rule=True)
    assert found.candidate == "lr_2/epoch_9" and len(found.curves) == 3


def test_score_by_hand(root):
    """One candidate, three columns too wide. The field's box ends one pixel further right and below: 12 × 11 pixels, the object has 8 × 10."""
    shutil.rmtree(root / "maps")
    for split in ("val", "test"):
        draw(root, "only", split, grow=3)
    found = chosen(root)
    assert found.candidate == "only" and found.threshold == pytest.approx(.224)
    assert found.test == pytest.approx({"MaxBoxAcc": 100., "IoU": 100 * 80 / 132, "IoU-30": 100., "IoU-70": 0.})


def change(root, what, split="val", candidate="epoch_9"):
    target = root / "maps" / candidate / split / "bird" / "3.jpg.npy"
    values = np.load(target)
    if what == "missing":
        target.unlink()
    elif what == "shape":
        np.save(target, values[:-1])
    elif what == "nan":
        values[3, 4] = np.nan
        np.save(target, values)
    elif what == "range":
        np.save(target, values * 255)
    elif what == "damaged":
        target.write_bytes(target.read_bytes()[:40])
    elif what == "pickle":
        np.save(target, np.array([{"a": 1}], object), allow_pickle=True)
    elif what == "colour":
        np.save(target, np.zeros((SIZE, SIZE, 3)))
    elif what == "stranger":
        np.save(target.with_name("9.jpg.npy"), values)
    elif what == "renamed":
        target.rename(target.with_name("9.jpg.npy"))


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("what, message", [
    ("missing", "3.jpg.npy is missing (1 of 5"), ("shape", "3.jpg.npy: shape (19, 20), the first map has (20, 20)"),
    ("nan", "3.jpg.npy: 1 values are NaN"), ("range", "3.jpg.npy: values from 0 to 229.5 must lie in [0, 1]"),
    ("damaged", "3.jpg.npy: no NumPy array"), ("pickle", "3.jpg.npy: no NumPy array"), ("colour", "3.jpg.npy: a score map is a 2-D array"),
    ("stranger", "9.jpg.npy belongs to no image of SPLIT"), ("renamed", "3.jpg.npy is missing (1 of 5"),
])
def test_bad_maps_are_named(root, capsys, split, what, message):
    """The chosen candidate's maps of either split: one line that names the file."""
    change(root, what, split)
    arguments = ["select", str(root / "maps"), "--metadata", str(root / "metadata"), "--pseudo", str(root / "pseudo.txt")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    bird = str(root / "maps" / "epoch_9" / split / "bird")
    assert f"{bird}/{message.replace('SPLIT', split)}" in error and error.count("\n") == 1, error


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("what", ["missing", "stranger", "renamed"])
def test_files_are_asked_for_before_any_map_is_read(root, monkeypatch, split, what):
    """The last of three candidates lacks a file: said at once, not after the others have been read."""
    change(root, what, split, "epoch_10")
    monkeypatch.setattr("wsol_nb.selection.read_map", lambda path, *rest: pytest.fail(f"{path} was read first"))
    with pytest.raises(DataError, match=rf"epoch_10/{split}/bird/[39]\.jpg\.npy (is missing|belongs to no image)"):
        chosen(root, every_rule=True)


@pytest.mark.parametrize("runs", [False, True])
def test_test_ids_that_begin_with_val(root, runs):
    """As those of ILSVRC do: the test folder of a candidate then has a folder `val`, and is no candidate for that."""
    for path in list((root / "maps").iterdir()):
        inner = path / "test" / "val"
        inner.mkdir()
        (path / "test" / "bird").rename(inner / "bird")
        if runs:
            (root / "maps" / "lr_1").mkdir(exist_ok=True)
            path.rename(root / "maps" / "lr_1" / path.name)
    for file in (root / "metadata" / "test").iterdir():
        text(file, [f"val/{row}" for row in file.read_text().split("\n")])
    found = chosen(root, every_rule=True)
    assert [name.split("/")[-1] for name in found.curves] == ["epoch_2", "epoch_9", "epoch_10"]
    assert found.candidate.endswith("epoch_9") and found.test["MaxBoxAcc"] == 100
    shutil.rmtree(root / "maps" / found.candidate / "val")      # test maps alone make no candidate either
    assert [name.split("/")[-1] for name in chosen(root).curves] == ["epoch_2", "epoch_10"]


def test_one_model_with_test_ids_that_begin_with_val(root):
    only = root / "maps" / "epoch_9"
    (only / "test" / "val").mkdir()
    (only / "test" / "bird").rename(only / "test" / "val" / "bird")
    for file in (root / "metadata" / "test").iterdir():
        text(file, [f"val/{row}" for row in file.read_text().split("\n")])
    found = select(only, root / "metadata", root / "pseudo.txt")
    assert found.candidate == "." and found.test["MaxBoxAcc"] == 100


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[:-1], "pseudo.txt: no box for 'bird/4.jpg' (1 of 5"),
    (lambda rows: rows + ["bird/7.jpg,1,1,5,5"], "pseudo.txt:6: 'bird/7.jpg' is none of the images"),
    (lambda rows: rows + [rows[0]], "pseudo.txt:6: a second box for 'bird/0.jpg'"),
    (lambda rows: ["bird/0.jpg,1,1,5"] + rows[1:], "pseudo.txt:1: expected image_id,x0,y0,x1,y1"),
    (lambda rows: ["bird/0.jpg,1,1,500,5"] + rows[1:], "pseudo.txt:1:"),
])
def test_bad_pseudo_boxes_are_named(root, change, message):
    path = root / "pseudo.txt"
    path.write_text("\n".join(change(path.read_text().split("\n"))))
    with pytest.raises(DataError) as caught:
        chosen(root)
    assert message in str(caught.value) and str(root) in str(caught.value)


def test_missing_parts_are_named(root):
    with pytest.raises(DataError, match="holds no maps: expected CANDIDATE/val/IMAGE_ID.npy"):
        select(root / "metadata" / "val", root / "metadata", root / "pseudo.txt")
    with pytest.raises(DataError, match="no pseudo boxes at .*nothing.txt"):
        select(root / "maps", root / "metadata", root / "nothing.txt")
    (root / "metadata" / "val" / "image_sizes.txt").unlink()
    with pytest.raises(DataError, match="image_sizes.txt is missing"):
        chosen(root)


def test_command(root, capsys):
    out = root / "out.json"
    arguments = ["select", str(root / "maps"), "--metadata", str(root / "metadata"), "--pseudo", str(root / "pseudo.txt"),
                 "--every-rule", "--json", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "chosen      epoch_9 of 3" in printed and "threshold   0.224" in printed and "BV-VT       MaxBoxAcc 100.00 %" in printed
    assert json.loads(out.read_text())["candidate"] == "epoch_9"
    with pytest.raises(SystemExit) as caught:
        main(["select", str(root / "maps")])
    assert caught.value.code == 2
