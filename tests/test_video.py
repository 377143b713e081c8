"""Readers of video data sets on fixtures in the original layouts: counts, cleaning rules, and what happens to damaged files"""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from wsol_nb.cli import main
from wsol_nb.core import DataError
from wsol_nb.datasets import collecting, load, open_item
from wsol_nb.video import (BEYOND, SWAPPED, ShotSampler, draw_videos, read_clips, read_frames, read_ytov1, read_ytov2, shots_of,
                           split_counts)

SIZE = (40, 30)


def frame(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)
    return path


def sticks(path, *boxes):
    cells = np.empty((1, len(boxes)), object)
    for k, box in enumerate(boxes):
        cells[0, k] = np.array([box], float)
    savemat(f"{path}_sticks.mat", {"coor": cells})


@pytest.fixture
def v1(tmp_path):
    """Two classes: eight training videos (seven labelled), one test video; two shots of two frames; one empty shot in each class"""
    root = tmp_path / "ytov1"
    for name, special in ("boat", BEYOND), ("horse", SWAPPED):
        for video in range(1, 10):
            for shot in "001", "002":
                for k in (1, 2):
                    frame(root / f"{name}/data/{video:04d}/shots/{shot}/frame{k:04d}.jpg")
            if video != 8:
                sticks(root / f"{name}/data/{video:04d}/shots/002/frame0001.jpg", [2, 3, 20, 19])
        (root / f"{name}/data/0001/shots/003").mkdir()
        (root / f"{name}/sets").mkdir()
        (root / f"{name}/sets/train.txt").write_text("".join(f"{k:04d}\n" for k in range(1, 9)))
        (root / f"{name}/sets/test.txt").write_text("0009\n")
        frame(root / f"{special}.jpg")
    sticks(root / f"{SWAPPED}.jpg", [30.4, 2, 10.2, 20])
    sticks(root / f"{BEYOND}.jpg", [5, 6, 90, 20], [-3, -2, 8, 9])
    for name, number in ("boat", "0006"), ("horse", "0004"):      # the special frames must be evaluated: test videos
        lists = root / name / "sets"
        (lists / "train.txt").write_text("".join(f"{k:04d}\n" for k in range(1, 9) if f"{k:04d}" != number))
        (lists / "test.txt").write_text(f"{number}\n0009\n")
    return root


def test_v1_counts_and_cleaning(v1):
    data = read_ytov1(v1, "ytov1")
    counts = split_counts(data)
    assert data.classes == ["boat", "horse"]
    assert counts["train"]["videos"] == [2, 2] and counts["train"]["shots"] in ([4, 4], [5, 4], [4, 5], [5, 5])
    assert counts["val"] == {"videos": [5, 5], "shots": [5, 5], "frames": [5, 5], "boxes": [5, 5]}
    assert counts["test"] == {"videos": [2, 2], "shots": [3, 3], "frames": [3, 3], "boxes": [4, 3]}
    boxes = data["test"].boxes()
    assert boxes[f"{SWAPPED}.jpg"].tolist() == [[10, 2, 30, 20]]
    assert boxes[f"{BEYOND}.jpg"].tolist() == [[5, 6, SIZE[0] - 1, 20], [0, 0, 8, 9]]
    assert data["test"].repairs == {"swapped": 1, "beyond": 1, "negative": 1}


def test_check_compares_the_counts_with_the_published_ones(v1, monkeypatch, capsys):
    monkeypatch.setenv("WSOL_DATA", str(v1.parent))
    assert main(["data", "check", "ytov1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ytov1: val: videos 10 (5 5), shots 10 (5 5), frames 10 (5 5), boxes 10 (5 5)" in lines
    assert "ytov1: test: videos 4 (2 2), shots 6 (3 3), frames 6 (3 3), boxes 7 (4 3)" in lines
    assert f"{v1}: train has 4 videos, expected 78" in lines and f"{v1}: test has 7 boxes, expected 396" in lines
    assert sum(", expected " in line for line in lines) == 6 and any(line.startswith("ytov1: 6 problems (train ") for line in lines)
    published = {("val", "boxes"): 10, ("test", "frames"): (3, 3)}
    monkeypatch.setattr("wsol_nb.video.PUBLISHED", published)
    assert main(["data", "check", "ytov1"]) == 0 and "ytov1: 0 problems" in capsys.readouterr().out
    monkeypatch.setattr("wsol_nb.video.PUBLISHED", published | {("train", "shots"): (1, 1)})
    sticks(v1 / "boat/data/0009/shots/002/frame0001.jpg", [2, 3, 90, 19])      # one split cannot be read: the others are counted
    assert main(["data", "check", "ytov1"]) == 1
    out = capsys.readouterr().out
    assert "frame0001.jpg: box " in out and f"{v1}: train has (" in out and "ytov1: val: videos 10" in out


def test_v1_empty_shots_are_counted_and_dropped(v1):
    data = read_ytov1(v1, "ytov1")
    assert sum(data[s].skipped.get("shot without a frame", 0) for s in ("train", "val", "test")) == 2
    assert not any(shot.endswith("0001/003") for s in ("train", "val", "test") for shot in shots_of(data[s]))


def test_v1_validation_videos_are_labelled_and_train_on_nothing(v1):
    data = read_ytov1(v1, "ytov1")
    val, train = ({item.video for item in data[s]} for s in ("val", "train"))
    assert not val & train and {"boat/0008", "horse/0008"} <= train
    labelled = [f"{k:04d}" for k in range(1, 8) if k != 6]
    assert {v for v in val if v.startswith("boat")} == {f"boat/{n}" for n in draw_videos(labelled, 5, 0)}


def test_v1_box_outside_its_frame_is_an_error_that_names_it(v1):
    sticks(v1 / "boat/data/0009/shots/002/frame0001.jpg", [2, 3, 70, 20])
    with pytest.raises(DataError, match=r"0009/shots/002/frame0001.jpg: box 2,3,70,20 lies outside the image of 40 × 30"):
        read_ytov1(v1, "ytov1")["test"]
    with collecting() as problems:
        read_ytov1(v1, "ytov1")["test"]
    assert len(problems) == 1


def test_v1_frame_with_a_wrong_size_is_an_error(v1):
    frame(v1 / "boat/data/0009/shots/002/frame0001.jpg")
    sticks(v1 / "boat/data/0009/shots/002/frame0002.jpg", [2, 3, 9, 9])
    frame(v1 / "boat/data/0009/shots/002/frame0002.jpg", (44, 30))
    with pytest.raises(DataError, match=r"frame0002.jpg: the frame is 44 × 30 pixels, .*frame0001.jpg of the same shot 40 × 30"):
        read_ytov1(v1, "ytov1")["test"]


def test_frames_of_a_shot_are_of_one_size_and_whole(v1):
    data = read_ytov1(v1, "ytov1")
    positions = next(iter(shots_of(data["train"]).values()))
    path = data["train"][positions[1]].path
    frame(path, (44, 30))
    with pytest.raises(DataError, match="44 × 30"):
        read_frames(data["train"], positions)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="unreadable or truncated image"):
        read_frames(data["train"], positions)


def test_v1_missing_and_damaged_files(v1):
    note = v1 / "boat/data/0009/shots/002/frame0001.jpg_sticks.mat"
    note.write_bytes(b"no matlab")
    with pytest.raises(DataError, match="frame0001.jpg_sticks.mat: cannot be read as a MATLAB file"):
        read_ytov1(v1, "ytov1")["test"]
    savemat(note, {"other": np.zeros(4)})
    with pytest.raises(DataError, match="no variable 'coor'"):
        read_ytov1(v1, "ytov1")["test"]
    note.with_name("frame0001.jpg").unlink()
    with pytest.raises(DataError, match="its frame frame0001.jpg is missing"):
        read_ytov1(v1, "ytov1")["test"]
    note.unlink()
    (v1 / "horse/sets/test.txt").unlink()
    with pytest.raises(DataError, match="horse/sets/test.txt: cannot be read"):
        read_ytov1(v1, "ytov1")["train"]


def test_v1_video_in_both_lists_or_without_folder(v1):
    (v1 / "boat/sets/test.txt").write_text("0009\n0001\n")
    with pytest.raises(DataError, match="video 0001 is listed in train.txt too"):
        read_ytov1(v1, "ytov1")["train"]
    (v1 / "boat/sets/test.txt").write_text("0077\n")
    with pytest.raises(DataError, match="video 0077 is listed in boat/sets but has no such folder"):
        read_ytov1(v1, "ytov1")["train"]


def test_v1_split_of_empty_shots_only(v1):
    for path in (v1 / "horse/data/0009").rglob("*.*"):
        path.unlink()
    (v1 / "horse/sets/test.txt").write_text("0009\n")
    (v1 / "boat/sets/test.txt").write_text("")
    with pytest.raises(DataError, match="test split is empty, none of its 2 shots has a labelled frame"):
        read_ytov1(v1, "ytov1")["test"]


def truth(root, part, boxes):
    records = np.empty((1, len(boxes)), dtype=[("im", object), ("boxes", object)])
    for k, (number, found) in enumerate(boxes.items()):
        records[0, k] = (f"cat{number:08d}", np.array(found, float))
    path = root / f"GroundTruth/cat/bb_gt{part}_cat.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {f"bb_gt{part}": records})


@pytest.fixture
def v2(tmp_path):
    """Six videos of one shot of four frames, four training ones labelled, one test one, one without boxes"""
    root = tmp_path / "ytov2"
    for number in range(1, 25):
        frame(root / f"cat/{number:08d}.jpg")
    truth(root, "Training", {k: [[1, 2, 20, 20], [3, 4, 9, 9]] for k in (1, 6, 9, 13)})
    truth(root, "Test", {17: [[1, 2, 20, 20]], 19: [[-1, 2, 20, 20]]})
    (root / "Ranges").mkdir()
    starts = np.arange(1, 25, 4)
    savemat(root / "Ranges/ranges_cat.mat", {"ranges": np.stack([starts, starts + 3, np.arange(6) + 1]).astype(np.uint32)})
    return root


def test_v2_counts(v2):
    counts = split_counts(read_ytov2(v2, "ytov2"))
    assert counts["train"] == {"videos": [1], "shots": [1], "frames": [4], "boxes": [0]}
    assert counts["val"] == {"videos": [3], "shots": [3], "frames": [3], "boxes": [6]}
    assert counts["test"] == {"videos": [1], "shots": [1], "frames": [2], "boxes": [2]}


def test_v2_check_compares_the_test_set_and_stops_at_what_is_missing(v2, monkeypatch, capsys):
    monkeypatch.setenv("WSOL_DATA", str(v2.parent))
    assert main(["data", "check", "ytov2"]) == 1
    out = capsys.readouterr().out
    assert "ytov2: test: videos 1 (1), shots 1 (1), frames 2 (2), boxes 2 (2)" in out
    assert f"{v2}: test has 2 boxes, expected 2667" in out and "ytov2: 3 problems" in out
    (v2 / "Ranges/ranges_cat.mat").unlink()
    assert main(["data", "check", "ytov2"]) == 1
    out = capsys.readouterr().out
    assert "ranges_cat.mat: file is missing" in out and "nothing could be read" in out and ", expected " not in out


def test_v2_repeated_frame_belongs_to_one_shot_and_empty_shots_are_counted(v2):
    ranges = np.array([[1, 4, 5, 9, 13, 17, 21], [4, 4, 8, 12, 16, 20, 24], [1, 1, 2, 3, 4, 5, 6]], np.uint32)
    savemat(v2 / "Ranges/ranges_cat.mat", {"ranges": ranges})
    data = read_ytov2(v2, "ytov2")
    assert sum(sum(data[s].skipped.values()) for s in ("train", "val", "test")) == 1
    ids = [item.id for item in data["train"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["Ranges/ranges_cat.mat", "GroundTruth/cat/bb_gtTest_cat.mat"])
def test_v2_missing_mat_is_named(v2, name):
    (v2 / name).unlink()
    with pytest.raises(DataError, match=f"{Path(name).name}: file is missing"):
        read_ytov2(v2, "ytov2")["train"]


def test_v2_missing_frame_and_wrong_box(v2):
    (v2 / "cat/00000010.jpg").unlink()
    with pytest.raises(DataError, match="frame 00000010 of shot 2 is missing"):
        read_ytov2(v2, "ytov2")["train"]
    frame(v2 / "cat/00000010.jpg")
    truth(v2, "Test", {17: [[1, 2, 20, 90]]})
    with pytest.raises(DataError, match="cat/00000017.jpg: box 1,2,20,90 lies outside"):
        read_ytov2(v2, "ytov2")["test"]
    truth(v2, "Test", {5: [[1, 2, 20, 20]]})
    with pytest.raises(DataError, match="both training and test boxes"):
        read_ytov2(v2, "ytov2")["test"]


def test_an_epoch_takes_so_many_frames_of_each_shot(v1):
    train = read_ytov1(v1, "ytov1")["train"]
    sampler = ShotSampler(train, frames=1, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(train[k].shot for k in sampler) == sorted(shots_of(train)) and len(sampler) == len(shots_of(train))
    drawn = {train[k].id for epoch in range(30) for k in sampler.positions(epoch)}
    assert drawn == {item.id for item in train}


@pytest.mark.skipif(not any((Path(p) / "clips").is_dir() for p in os.environ.get("WSOL_DATA", "").split(os.pathsep) if p),
                    reason="the clips sample is not in WSOL_DATA")
def test_clips():
    data = load("clips")
    assert data.classes == ["bird", "car", "cow", "dog", "horse", "motorbike"]
    assert sum(len(data[s]) for s in data.splits) < 613
    for split in data.splits:
        assert all(len(item.boxes) == 1 for item in data[split])
        open_item(data[split][0])
    shots = {s: {item.id for item in data[s]} for s in data.splits}
    assert not shots["train"] & shots["test"]


def test_clips_frame_of_another_size(tmp_path):
    for k in (1, 2):
        frame(tmp_path / f"car/data/0001/shots/001/frame{k:04d}.jpg", (44, 30))
    (tmp_path / "clips.csv").write_text("class,folder,davis_sequence,frames,frames_with_box,width,height\ncar,car/data/0001/shots/001,x,2,2,40,30\n")
    (tmp_path / "boxes.csv").write_text("path,x0,y0,x1,y1\ncar/data/0001/shots/001/frame0001.jpg,1,2,3,4\n")
    with pytest.raises(DataError, match="44 × 30 pixels, the metadata say 40 × 30"):
        open_item(read_clips(tmp_path, "clips")["train"][0])


def clips_of(root, lines, boxes=""):
    """A sample in the layout of `clips` with stated frames of 40 × 30, of which two exist in the first clip."""
    for k in (1, 2):
        frame(root / f"car/data/0001/shots/001/frame{k:04d}.jpg")
    (root / "clips.csv").write_text("class,folder,davis_sequence,frames,frames_with_box,width,height\n" + "".join(
        f"car,car/data/{number}/shots/001,x,2,2,40,30\n" for number in lines))
    (root / "boxes.csv").write_text("path,x0,y0,x1,y1\n" + boxes)
    return read_clips(root, "clips")


def test_clips_shot_without_a_frame_is_named(tmp_path):
    (tmp_path / "car/data/0002/shots/001").mkdir(parents=True)
    with pytest.raises(DataError, match="car/data/0002/shots/001: the clip has no frame"):
        len(clips_of(tmp_path, ["0001", "0002"])["test"])


def test_clips_box_outside_its_frame_is_named(tmp_path):
    data = clips_of(tmp_path, ["0001"], "car/data/0001/shots/001/frame0001.jpg,1,2,60,9\n")
    with pytest.raises(DataError, match="boxes.csv:2: box 1,2,60,9 lies outside the image of 40 × 30"):
        data["train"]


def test_v2_frame_with_a_wrong_size_is_an_error(v2):
    frame(v2 / "cat/00000019.jpg", (44, 30))
    data = read_ytov2(v2, "ytov2")
    with pytest.raises(DataError, match="44 × 30"):
        [open_item(item) for part in data.splits for item in data[part]]
