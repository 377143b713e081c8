"""Published pseudo boxes, read and scored by this project, give the published figures (thesis table 4.1).

The boxes were made on a 224×224 grid and truncated when scaled back to the pictures, so they return to the grid by rounding
up, while true boxes are truncated (see `resize_boxes`). An image counts with its best true box.
"""
import numpy as np
import pytest

from wsol_nb.core import data_path
from wsol_nb.datasets import read_metadata
from wsol_nb.metrics import best_ious, resize_boxes

FOLDER = data_path("pseudo_boxes")
PUBLISHED = {    # mean IoU in percent, from the annotators' own files
    ("CUB", "ss"): 39.9869, ("CUB", "rpn"): 71.3420, ("CUB", "clip"): 68.8076,
    ("ILSVRC", "ss"): 45.0791, ("ILSVRC", "rpn"): 61.0830, ("ILSVRC", "clip"): 64.4136,
}


@pytest.mark.skipif(FOLDER is None, reason="no folder pseudo_boxes in WSOL_DATA")
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
