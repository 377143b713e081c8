"""Chapter 4's public entry points, and pseudo boxes made by the command."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wsol_nb import annotators
from wsol_nb.cli import main
from wsol_nb.core import DataError, SettingsError
from wsol_nb.datasets import load, read_metadata
from wsol_nb.evaluation import TEST_THRESHOLDS
from wsol_nb.experiments import checkpoint_folder
from wsol_nb.metrics import MaskEvaluator
from wsol_nb.protocol import (FEW, SETTINGS, Made, MaskCurves, MaskSwept, average_precision, choose_by_masks, folders, for_method, judge, judge_choices,
                              judge_order, kept_curves, made_boxes, mask_claims, mask_sweep, one_mask_run, pixel_counts, search_of)
from wsol_nb.reports import Run
from wsol_nb.selection import Choice, RunCurves, read_pseudo_boxes
from wsol_nb.sweeps import open_study


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


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (5, 4, 6), elements=st.floats(0, 1)), arrays(np.uint8, (5, 4, 6), elements=st.sampled_from([0, 1, 255])), st.integers(1, 5))
def test_pixel_average_precision_from_groups(maps, masks, groups):
    """However pictures are grouped, the pooled value is the evaluator's; without an object pixel there is none."""
    counts = pixel_counts(enumerate(maps), masks.__getitem__, groups)
    found = average_precision(counts.sum(0))
    if not (masks == 1).any():
        assert math.isnan(found)
        return
    whole = MaskEvaluator(TEST_THRESHOLDS)
    whole.accumulate(maps, masks)
    assert found == pytest.approx(whole.compute()["PxAP"], abs=1e-9) and 0 <= found <= 100 + 1e-9


ORDER = ["fails", "open", "holds"]


@settings(max_examples=40, deadline=None)
@given(arrays(np.int64, st.integers(2, 30), elements=st.integers(-100, 100)), st.integers(-5, 5), st.integers(0, 50))
def test_more_never_makes_a_claim_worse(values, bound, gain):
    above, below = (judge("C", "", values, **{side: bound}) for side in ("above", "below"))
    assert values.min() <= above.low <= above.high <= values.max()
    more_above, more_below = (judge("C", "", values + gain, **{side: bound}) for side in ("above", "below"))
    assert ORDER.index(more_above.verdict) >= ORDER.index(above.verdict)
    assert ORDER.index(more_below.verdict) <= ORDER.index(below.verdict)


def test_an_order_never_differs_from_itself():
    scores = np.random.default_rng(0).random((50, 4)) + [0, .1, .2, 3]
    found = judge_order("C", "orders differ", scores, scores)
    assert (found.value, found.low, found.high) == (0, 0, 0) and found.verdict != "holds"


@settings(max_examples=15, deadline=None)
@given(arrays(np.int64, (40, 3), elements=st.integers(0, 1)), arrays(np.int64, (40, 3), elements=st.integers(0, 1)))
def test_an_order_has_an_interval_of_pairs(first, second):
    found = judge_order("C", "orders differ", first, second)
    assert 0 <= found.low <= found.high <= 3 and 0 <= found.value <= 3
    assert found.verdict != "holds" or found.low > 0
    assert found.verdict != "fails" or found.high == 0


def test_few_samples_and_one_model_decide_nothing(monkeypatch):
    import wsol_nb.protocol as protocol
    assert [judge("C", "", np.full(n, 9.), above=1).verdict for n in (1, FEW - 1, FEW)] == ["open", "open", "holds"]
    hits = {(0, 1): np.zeros(20), (0, 2): np.full(20, 100.), (1, 1): np.zeros(20)}      # by configuration and epoch
    chosen = {"GT": (0, 1), "RPN": (0, 1), "CLIP": (0, 2), "SS": (1, 1)}
    monkeypatch.setattr(protocol, "choose", lambda runs, rule, annotator: Choice(rule, annotator, *chosen[annotator], .5, 0.))
    monkeypatch.setattr(protocol, "picture_scores", lambda swept, choice, level: hits[choice.run, choice.epoch])
    group = [SimpleNamespace(runs=[])]
    rpn, clip, ss = (judge_choices("C10", "loses little", group, ("BV-VT", "GT"), [("BV-VT", a)], below=1.5) for a in ("RPN", "CLIP", "SS"))
    assert (rpn.verdict, rpn.value) == ("open", 0) and rpn.statement.endswith("(the same model)") and "same model" in rpn.reason
    assert (clip.verdict, clip.value, clip.reason) == ("holds", -100, "")
    assert (ss.verdict, ss.value, ss.reason) == ("holds", 0, "")      # another model that does as well is evidence


def mask_curves(val, test_right):
    """A run whose epoch e has PxAP 100 on the test set where `test_right[e]`, else that of a map upside down."""
    counts = np.zeros((1, 2, 4), np.int64)
    good, bad = counts.copy(), counts.copy()
    good[0, 1, 3], good[0, 0, 0] = 10, 30
    bad[0, 1, 0], bad[0, 0, 3] = 10, 30
    return MaskCurves({}, ("GT masks", "erosion=50%"), np.array(val), np.array([0., 1]), {e: good if r else bad for e, r in enumerate(test_right)})


def test_masks_choose_configuration_and_epoch():
    runs = [mask_curves([[50, 10], [60, 5]], [False, True]), mask_curves([[60, 90], [40, 20]], [False, True])]
    right, eroded, by_class = (choose_by_masks(runs, name) for name in ("GT masks", "erosion=50%", "cls"))
    assert right[:2] == (0, 1) and right.PxAP == 100                # the tie goes to the first configuration
    assert eroded[:2] == (1, 0) and eroded.PxAP == pytest.approx(25)
    assert by_class[:2] == (0, 1)


def test_the_same_model_by_other_masks_is_open():
    run = mask_curves([[50, 50], [60, 60]], [False, True])
    swept = MaskSwept(None, None, [run], None, {"GT masks": None, "erosion=50%": None}, 0.)
    found, = mask_claims([swept])
    assert found.verdict == "open" and found.statement.endswith("(the same model)") and found.reason


def test_selection_by_masks(tmp_path, monkeypatch, capsys):
    """A small sweep with masks: chosen by right, eroded and pseudo masks, stored, and read back as it was."""
    pytest.importorskip("optuna")
    data = load("toy_masks")
    config = replace(SETTINGS["toy_masks"], configurations=1, epochs=1, train_pictures=16, test_pictures=8, erosions=(50,), size=48, resize=52,
                     pseudo_method="cam", pseudo_backbone="mini_cnn")
    swept = mask_sweep(data, config, tmp_path / "sweep", tmp_path / "pseudo")
    assert list(swept.masks) == ["GT masks", "erosion=50%", "pseudo"]
    assert swept.masks["GT masks"].error == 0 and 24 < swept.masks["erosion=50%"].error <= 25 and swept.masks["pseudo"].error > 0
    run = swept.runs[0]
    assert run.val.shape == (2, 3) and 0 <= choose_by_masks(swept.runs, "pseudo").PxAP <= 100
    assert all(7 * 48 * 48 / 2 < c.sum() <= 8 * 48 * 48 and len(c) == 8 for c in run.test.values())      # some pixels are to be ignored
    monkeypatch.setattr("wsol_nb.protocol.fit", lambda *a, **k: pytest.fail("trained again"))
    again = one_mask_run(data, swept.config, swept.search.configurations[0], swept.marked, swept.masks, tmp_path / "sweep" / "configuration-0")
    assert np.array_equal(again.val, run.val) and again.test.keys() == run.test.keys()
    (tmp_path / "sweep" / "configuration-0" / "curves.npz").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="configuration-0/curves.npz is no curve store or damaged"):
        MaskCurves.load(tmp_path / "sweep" / "configuration-0" / "curves.npz")
    monkeypatch.undo()
    repaired = mask_sweep(data, config, tmp_path / "sweep", tmp_path / "pseudo").runs[0]      # the study says done, the file is no use
    assert "is done again now" in capsys.readouterr().out
    assert np.array_equal(repaired.val, run.val)
    assert np.array_equal(MaskCurves.load(tmp_path / "sweep" / "configuration-0" / "curves.npz").val, run.val)


def test_a_damaged_store_of_curves_is_none(tmp_path, capsys):
    """Of both kinds; a missing one is not spoken of, a whole one of other values is no use either."""
    path = tmp_path / "curves.npz"
    for kind in (RunCurves, MaskCurves):
        assert kept_curves(kind, path, {}) is None and capsys.readouterr().out == ""
        path.write_bytes(b"PK damaged")
        assert kept_curves(kind, path, {}) is None and "curves.npz is no curve store or damaged" in capsys.readouterr().out
        path.unlink()
    mask_curves([[50, 10]], [True]).save(path)
    assert kept_curves(MaskCurves, path, {}) is not None and kept_curves(MaskCurves, path, {"lr": 1}) is None


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_text('{"boxes"'), lambda file: file.write_text('{"a": 1}')])
def test_lost_pseudo_boxes_are_made_again(tmp_path, monkeypatch, harm):
    pytest.importorskip("optuna")
    made = []
    def make(*_):
        made.append(1)
        return Made({"a": [0, 0, 1, 1]}, {"Otsu": 1}, {"stage": (1., 0)}, 2.)
    monkeypatch.setattr("wsol_nb.protocol._make", make)
    monkeypatch.setattr("wsol_nb.protocol.clip_annotator", lambda data: None)
    first = made_boxes(None, "clip", None, tmp_path)
    made_boxes(None, "clip", None, tmp_path)
    assert len(made) == 1
    harm(tmp_path / "clip.json")
    assert made_boxes(None, "clip", None, tmp_path) == first and len(made) == 2
    made_boxes(None, "clip", None, tmp_path)
    assert len(made) == 2


def test_sweep_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WSOL_REPORTS", str(tmp_path))
    assert main(["sweep", "toy", "--variant", "full,has", "--seeds", "2", "--status"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{v}, seed {s}: not begun" for v in ("full", "has") for s in (0, 1)]
    assert main(["sweep", "toy", "--status", "--overrides", "epochs: 3"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert main(["sweep", "toy", "--status", "--variant", "hass"]) == 2
    assert "unknown variant 'hass' (did you mean 'has'?)" in capsys.readouterr().err


def everything_below(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_state_of_a_sweep_is_only_read(capsys, monkeypatch, tmp_path):
    """A sweep of other code stays, nothing is written, and a worker leaves it alone as well."""
    pytest.importorskip("optuna")
    monkeypatch.setenv("WSOL_REPORTS", str(tmp_path))
    data, run = load("toy"), Run("04_protocol", "toy")
    own = checkpoint_folder(run, "full", 0, "04_protocol", data, keep_old=True)
    other = own.parent / "0123456789ab-0123456789ab" / "configuration-0" / "curves.npz"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"hours of work")
    open_study(search_of(for_method(SETTINGS["toy"]), own))
    before = everything_below(tmp_path)
    assert main(["sweep", "toy", "--variant", "full,has", "--status"]) == 0
    assert capsys.readouterr().out.splitlines() == ["full, seed 0: 4 configurations: 0 done, 0 diverged, 0 running, 4 open", "has, seed 0: not begun"]
    assert everything_below(tmp_path) == before
    assert folders(run, data, "full", SETTINGS["toy"])[0] == own and everything_below(tmp_path) == before


def test_unusable_settings_of_a_sweep():
    with pytest.raises(SettingsError, match="unknown grid 'ful'"):
        replace(SETTINGS["toy"], grid="ful")
