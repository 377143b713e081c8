"""Chapter 4's public entry points, and pseudo boxes made by the command."""
import numpy as np
import pytest

from wsol_nb import annotators
from wsol_nb.cli import main
from wsol_nb.core import DataError
from wsol_nb.datasets import load, read_metadata
from wsol_nb.selection import read_pseudo_boxes


def test_public_names():
    import wsol_nb.protocol as protocol
    for name in ("select", "choose", "annotate", "refine", "noisy_boxes", "full_grid", "shared_grid", "sample", "RULES"):
        assert name in protocol.__all__ and hasattr(protocol, name), name


def test_annotate_writes_the_text_layout(tmp_path, capsys, monkeypatch):
    """Boxes of a stand-in for Selective Search (its package may be absent), through the trained judge, on disk and back."""
    def windows(picture, **settings):
        h, w = picture.shape[:2]
        return np.array([[x, y, min(w - 1, x + w // 2), min(h - 1, y + h // 2)] for x in range(0, w, 16) for y in range(0, h, 16)])

    monkeypatch.setattr(annotators, "selective_search", windows)
    assert main(["annotate", "toy", "--annotator", "ss", "--judge-epochs", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mean IoU" in printed and "pointing game" in printed and "upper bound over all proposals" in printed
    val = load("toy")["val"]
    found = read_pseudo_boxes(tmp_path, val)
    assert set(found) == {item.id for item in val}
    assert [i.label for i in read_metadata(tmp_path, "val")] == val.labels.tolist()


def test_unusable_pseudo_boxes(tmp_path):
    val = load("toy")["val"]
    (tmp_path / "localization.txt").write_text(f"{val[0].id},0,0,5,5\n")
    with pytest.raises(DataError, match=r"localization.txt: no box for .* \(15 of 16"):
        read_pseudo_boxes(tmp_path, val)
