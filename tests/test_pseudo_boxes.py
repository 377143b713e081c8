"""Published pseudo boxes, read and scored by this project, give the published figures (thesis table 4.1).

The boxes were made on a 224×224 grid and truncated when scaled back to the pictures, so they return to the grid by rounding
up, while true boxes are truncated (see `resize_boxes`). An image counts with its best true box.

Published boxes and those of `wsol annotate` lie in different layouts and are found and read alike.
"""
import copy
import os

import numpy as np
import pytest
from PIL import Image

from wsol_nb import protocol
from wsol_nb.annotators import Annotation, with_boxes
from wsol_nb.cli import main
from wsol_nb.datasets import load, read_metadata, write_metadata
from wsol_nb.metrics import best_ious, resize_boxes
from wsol_nb.protocol import SETTINGS, gather_annotators, shared_boxes
from wsol_nb.selection import pseudo_folders, published_home, read_pseudo_boxes

FOLDER = published_home()
PUBLISHED = {    # mean IoU in percent, from the annotators' own files
    ("CUB", "ss"): 39.9869, ("CUB", "rpn"): 71.3420, ("CUB", "clip"): 68.8076,
    ("ILSVRC", "ss"): 45.0791, ("ILSVRC", "rpn"): 61.0830, ("ILSVRC", "clip"): 64.4136,
}


@pytest.mark.skipif(FOLDER is None, reason="no published pseudo boxes in WSOL_DATA")
@pytest.mark.parametrize("dataset", ["CUB", "ILSVRC"])
def test_mean_iou_of_published_annotators(dataset):
    def boxes(source, rounding):
        split = read_metadata(FOLDER / source / dataset, "val")
        return {item.id: resize_boxes(item.boxes, (item.width, item.height), 224, rounding) for item in split if len(item.boxes)}

    truth = boxes("gt", "down")
    assert len(truth) == {"CUB": 1_000, "ILSVRC": 10_000}[dataset]
    assert sum(map(len, truth.values())) == {"CUB": 1_000, "ILSVRC": 18_532}[dataset]
    for (name, source), published in PUBLISHED.items():
        if name == dataset:
            found = best_ious(boxes(source, "up"), truth)
            assert np.mean(found) * 100 == pytest.approx(published, abs=.01), (dataset, source)


@pytest.mark.skipif(FOLDER is None, reason="no published pseudo boxes in WSOL_DATA")
@pytest.mark.parametrize("key, dataset", [("cub", "CUB"), ("ilsvrc", "ILSVRC")])
def test_published_boxes_are_annotators_of_the_data_set(key, dataset):
    """The chapter reads every published annotator for its data set, true boxes not among them."""
    data = type("Real", (), {"key": key, "__getitem__": lambda self, name: read_metadata(FOLDER / "gt" / dataset, name)})()
    found = shared_boxes(data)
    assert {"CLIP", "RPN", "SS"} <= set(found) and "GT" not in found
    assert {len(boxes) for boxes in found.values()} == {len(data["val"])}


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Two empty folders of WSOL_DATA."""
    found = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setenv("WSOL_DATA", os.pathsep.join(map(str, found)))
    return found


@pytest.fixture
def toy():
    return load("toy")


def boxed(split, edge):
    return with_boxes(split, [np.array([edge, 2, i.width - 3, i.height - 4]) for i in split])


def like(data, key):
    """The same pictures under another key."""
    other = copy.copy(data)
    other.key = key
    return other


@pytest.mark.parametrize("key, dataset", [("cub", "CUB"), ("ilsvrc", "ILSVRC")])
def test_both_layouts_are_interchangeable(toy, roots, key, dataset):
    toy["val"]
    data, (first, second) = like(toy, key), roots
    assert shared_boxes(data) == {}
    write_metadata(second / "pseudo_boxes" / "rpn" / dataset, boxed(data["val"], 5))
    write_metadata(second / "pseudo_boxes" / "gt" / dataset, data["val"])
    published = shared_boxes(data)
    assert list(published) == ["RPN"] and len(published["RPN"]) == len(data["val"])
    write_metadata(first / "pseudo_boxes" / key / "rpn", boxed(data["val"], 5))
    assert pseudo_folders(key)["RPN"] == first / "pseudo_boxes" / key / "rpn" / "val"
    own = shared_boxes(data)
    assert all(np.array_equal(own["RPN"][id], box) for id, box in published["RPN"].items())
    write_metadata(first / "pseudo_boxes" / key / "ss", boxed(data["val"], 9))
    assert list(shared_boxes(data)) == ["RPN", "SS"]                         # of two folders
    assert {"RPN", "SS"} <= set(gather_annotators(data, SETTINGS["toy"]))


def test_own_boxes_do_not_hide_the_published_ones(toy, roots):
    first, second = roots
    write_metadata(first / "pseudo_boxes" / "toy" / "ss", boxed(toy["val"], 5))
    for source in ("gt", "ss", "rpn", "clip"):
        assert published_home() is None
        for dataset in ("CUB", "ILSVRC"):
            write_metadata(second / "pseudo_boxes" / source / dataset, boxed(toy["val"], 5))
    assert published_home() == second / "pseudo_boxes"


def test_boxes_of_another_split_are_passed_over(toy, roots):
    """After `wsol annotate toy --split test` the chapter goes on as if nothing lay there."""
    toy["val"], toy["test"]
    write_metadata(roots[0] / "pseudo_boxes" / "toy" / "ss", boxed(toy["test"], 5))
    assert shared_boxes(toy) == {} and list(pseudo_folders("toy", "test")) == ["SS"]
    write_metadata(roots[0] / "pseudo_boxes" / "toy" / "ss", boxed(toy["val"], 5))
    assert list(shared_boxes(toy)) == ["SS"]


def test_boxes_of_a_folder_are_found_again(tmp_path, roots, monkeypatch, capsys):
    """`wsol annotate folder:PATH` writes where the chapter looks, however the path is spelled."""
    for name in ("ant", "bee"):
        (tmp_path / "My pictures" / name).mkdir(parents=True)
        for k in range(10):
            Image.new("RGB", (40, 30), (20 * k, 90, 10)).save(tmp_path / "My pictures" / name / f"{k}.png")
    monkeypatch.setattr(protocol, "make_pseudo_boxes", lambda data, annotator, config, split: Annotation(boxed(data[split], 5), {"drawn": 1}, {}))
    key = f"folder:{tmp_path / 'My pictures'}"
    assert main(["annotate", key, "--annotator", "ss"]) == 0
    assert str(pseudo_folders(key)["SS"]) in capsys.readouterr().out
    for spelled in (key, f"folder:{tmp_path / 'first' / '..' / 'My pictures'}"):
        data = load(spelled)
        found = shared_boxes(data)
        assert list(found) == ["SS"] and set(found["SS"]) == {item.id for item in data["val"]}
    assert len(read_pseudo_boxes(pseudo_folders(key)["SS"], load(key)["val"])) == len(load(key)["val"])
