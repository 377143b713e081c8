"""`wsol_nb.metrics` against the plain reference over thousands of random and adversarial maps: no difference allowed."""
import pickle
import resource
import subprocess
import sys

import cv2
import numpy as np
import pytest
import reference_evaluation as reference
import torch
from hypothesis import given, settings, strategies as st

from wsol_nb.core import DataError, OutputError
from wsol_nb.metrics import (BoxEvaluator, MaskEvaluator, Sweep, _OptionalCache, all_boxes_at_thresholds, box_iou,
                             boxes_at_thresholds, normalize_maps, otsu_threshold, prepare_map)

GRID = np.arange(0, 1, .001)
COARSE = np.array([0., .004, .1, .25, .5, .51, .75, .9, .999])


# --- maps --------------------------------------------------------------------------------------

def one(random, height, width):
    return (np.arange(height * width) == random.integers(height * width)).reshape(height, width).astype(float)


def checkerboard(random, height, width):
    y, x = np.mgrid[:height, :width]
    return np.where((x + y) % 2, random.random((height, width)), random.choice([0, .3]))


def lines(random, height, width):
    out = np.zeros((height, width))
    for _ in range(random.integers(1, 6)):
        value = random.integers(1, 5) / 4
        if random.random() < .5:
            out[random.integers(height), :] = value
        else:
            out[:, random.integers(width)] = value
    return out


def nested_rings(random, height, width):
    y, x = np.mgrid[:height, :width]
    distance = np.maximum(abs(y - height // 2), abs(x - width // 2))
    out = (distance % 2 == 0) * random.random(distance.max() + 1)[distance]
    return np.where(random.random((height, width)) < .03, 0, out)       # some rings leak


def equal_blocks(random, height, width):
    out, side = np.zeros((height, width)), random.integers(1, 4)
    for _ in range(6):
        y, x = random.integers(max(1, height - side + 1)), random.integers(max(1, width - side + 1))
        out[y:y + side, x:x + side] = random.choice([.5, 1.])
    return out


def dots(random, height, width):
    out = np.zeros((height, width))
    out[::2, ::2] = random.random(out[::2, ::2].shape)
    return out


def few_levels(random, height, width):
    count = random.integers(2, 8)
    return random.integers(0, count, (height, width)) / (count - 1) * random.choice([1., .7, .2])


def spiral(random, height, width):
    """A corridor that winds inwards between walls, with steps in its floor: hard for filling holes."""
    out, y, x, (dy, dx) = np.ones((height, width)), 0, 0, (0, 1)
    floor = np.sort(random.random(height * width)) * random.choice([0, .8])
    seen = np.zeros((height + 4, width + 4), bool)
    seen[:2], seen[-2:], seen[:, :2], seen[:, -2:] = True, True, True, True
    for k in range(height * width):
        out[y, x], seen[y + 2, x + 2] = floor[k], True
        if seen[y + 2 + 2 * dy, x + 2 + 2 * dx]:
            dy, dx = dx, -dy
        if seen[y + 2 + dy, x + 2 + dx]:
            break
        y, x = y + dy, x + dx
    return out if random.random() < .5 else out[::-1, ::-1].copy()


KINDS = {
    "flat": lambda random, h, w: np.full((h, w), random.choice([0., 1e-9, .003, .5, 1.])),
    "noise": lambda random, h, w: random.random((h, w)),
    "binary": lambda random, h, w: (random.random((h, w)) < random.uniform(.05, .95)).astype(float),
    "one pixel": lambda random, h, w: one(random, h, w) * random.choice([1., .01]),
    "all but one": lambda random, h, w: 1 - one(random, h, w),
    "ramp": lambda random, h, w: np.sort(random.random(h * w)).reshape(h, w),
    "checkerboard": checkerboard, "lines": lines, "rings": nested_rings, "blocks": equal_blocks, "dots": dots,
    "few levels": few_levels, "spiral": spiral,
}


def make(kind, seed, height, width):
    return np.ascontiguousarray(KINDS[kind](np.random.default_rng(seed), height, width), float)


def check(scoremap, thresholds=GRID):
    """Our boxes at all thresholds against the reference, asked once for each distinct threshold of the byte map."""
    thresholds, peak = np.asarray(thresholds), reference.as_levels(scoremap).max()
    limits = np.array([int(threshold * peak) for threshold in thresholds])
    _, first, place = np.unique(limits, return_index=True, return_inverse=True)
    single = np.array(reference.boxes_at_thresholds(scoremap, thresholds[first]))[:, 0]
    every = reference.boxes_at_thresholds(scoremap, thresholds[first], True)
    sweep = Sweep(scoremap)
    assert np.array_equal(boxes_at_thresholds(sweep, thresholds), single[place])
    for found, expected in zip(all_boxes_at_thresholds(sweep, thresholds[first]), every, strict=True):
        assert found.tolist() == sorted(map(list, expected))


# --- boxes -------------------------------------------------------------------------------------

@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**32), st.integers(1, 13), st.integers(1, 13))
def test_boxes_equal_the_reference(kind, seed, height, width):
    check(make(kind, seed, height, width))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_many_small_maps(kind):
    """A few thousand maps in all; the smallest hold every tie there is."""
    random = np.random.default_rng(0)
    for seed in range(250):
        height, width = random.integers(1, 10, 2)
        check(make(kind, seed, height, width), COARSE)


def test_every_binary_picture_of_three_by_four():
    for code in range(2 ** 12):
        check((code >> np.arange(12) & 1).reshape(3, 4).astype(float), [.5])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 70), (31, 64), (64, 30), (62, 63)])
@pytest.mark.parametrize("kind", ["noise", "few levels", "lines", "rings", "spiral", "dots"])
def test_long_and_odd_shapes(kind, shape):
    check(make(kind, 1, *shape), COARSE)


@pytest.mark.parametrize("seed", range(4))
def test_realistic_maps(seed):
    random = np.random.default_rng(seed)
    raw = random.random((14, 14)) + np.outer(np.hanning(14), np.hanning(14))
    cam = prepare_map(raw, (97, 120), resize=["bilinear", "cubic"][seed % 2])
    check(cam)
    check(np.clip(cam * .8 + .02 * cv2.GaussianBlur(random.standard_normal(cam.shape), (0, 0), 1.), 0, 1), COARSE)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**32),
       st.lists(st.floats(-.5, 2), min_size=1, max_size=40), st.sampled_from([np.float32, np.float64]))
def test_any_thresholds_and_types(kind, seed, thresholds, dtype):
    """Unsorted thresholds, above the maximum and below zero; float32 maps are widened first."""
    scoremap = make(kind, seed, 9, 7).astype(dtype)
    check(scoremap.astype(np.float64), thresholds)
    assert np.array_equal(boxes_at_thresholds(torch.from_numpy(scoremap), thresholds),
                          boxes_at_thresholds(scoremap.astype(np.float64), thresholds))


def test_maps_need_not_be_contiguous():
    scoremap = make("noise", 0, 20, 30)
    part = scoremap[::2, ::-1]
    assert np.array_equal(boxes_at_thresholds(part, COARSE), boxes_at_thresholds(part.copy(), COARSE))


@pytest.mark.parametrize("wrong", [[[np.nan]], [[1 + 1e-12]], [[-1e-12]], [[np.inf]], [], [[]], [0.], [[[0.], [2.]]],
                                   [[[[0.]]]]])
def test_invalid_maps(wrong):
    with pytest.raises(ValueError):
        boxes_at_thresholds(np.array(wrong), [.5])
    evaluator = BoxEvaluator({0: [[0, 0, 1, 1]]})
    with pytest.raises(ValueError):
        evaluator.accumulate(np.array(wrong), 0)
    assert len(evaluator) == 0


def test_import_compiles_nothing():
    code = ("import wsol_nb.metrics as m; from numba.core.dispatcher import Dispatcher; "
            "print(sum(len(f.signatures) for f in vars(m).values() if isinstance(f, Dispatcher)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "0"


def test_a_cache_that_cannot_be_written_does_no_harm():
    class FullDisk:
        cache_path = "here"

        def save_overload(self, signature, data):
            raise OSError(28, "No space left on device")

    cache = _OptionalCache(FullDisk())
    cache.save_overload("signature", "code")
    assert cache.cache_path == "here"


# --- box scores --------------------------------------------------------------------------------

def random_truth(random, height, width, count):
    corners = np.sort(random.integers(0, [[width], [height]], (count, 2, 2)), -1)     # box, axis, low and high
    return corners.transpose(0, 2, 1).reshape(-1, 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([GRID, GRID[::4], COARSE[::-1], [.3]]))
def test_evaluator_equals_the_reference(seed, multi_contour, thresholds):
    random, thresholds = np.random.default_rng(seed), np.array(thresholds)
    shape, count, classes = random.integers(2, 12, 2), random.integers(1, 6), random.integers(1, 8)
    truth = {i: random_truth(random, *shape, random.integers(1, 4)) for i in range(count)}
    labels = {i: int(random.integers(classes)) for i in truth}
    ours = BoxEvaluator(truth, thresholds, multi_contour=multi_contour, labels=labels)
    plain = reference.BoxReference(truth, thresholds, multi_contour=multi_contour, labels=labels)
    logits = random.integers(0, 4, (count, classes)).astype(float)
    maps = np.stack([make(random.choice(sorted(KINDS)), random.integers(2**32), *shape) for _ in truth])
    ours.accumulate(maps, list(truth), logits)
    for i in truth:
        plain.accumulate(maps[i], i, logits[i])
    found, expected = ours.compute(), plain.compute()
    assert {name: found[name] for name in expected} == expected           # to the last bit
    assert np.array_equal(ours.curves()["IoU"], plain.iou_sum / count * 100.)
    values = np.array(plain.values)
    assert np.array_equal(ours.ious("oracle"), values.max(1))
    for threshold in thresholds[:3]:
        assert np.array_equal(ours.ious(threshold), values[:, list(thresholds).index(threshold)])
    assert ours.at(found["best_thresholds"])["per_iou"] == found["per_iou"]
    if not multi_contour:
        first_best = [reference.boxes_at_thresholds(maps[i], [thresholds[values[i].argmax()]])[0][0] for i in truth]
        assert ours.boxes("oracle").tolist() == [list(box) for box in first_best]


def filled_evaluator(part=slice(None), multi_contour=False, names=lambda i: i):
    random = np.random.default_rng(5)
    truth = {names(i): random_truth(random, 12, 12, 2) for i in range(9)}
    labels = {names(i): i % 3 for i in range(9)}
    maps, logits = random.random((9, 12, 12)), random.random((9, 3))
    evaluator = BoxEvaluator(truth, GRID[::10], labels=labels, multi_contour=multi_contour)
    chosen = range(9)[part]
    evaluator.accumulate(maps[part], [names(i) for i in chosen], torch.from_numpy(logits[part]).float())
    return evaluator


@pytest.mark.parametrize("multi_contour", [False, True])
def test_merging_and_files_change_nothing(tmp_path, multi_contour):
    """Ids that look alike but differ survive a file; so do scores, errors and the wish to go on."""
    different = ["1", 1, (1,), ("1",), b"1", None, (1, (2, "a")), 1.5, frozenset({1})]
    whole, first, second = (filled_evaluator(part, multi_contour, different.__getitem__)
                            for part in (slice(9), slice(4), slice(4, 9)))
    first.save(tmp_path / "a.npz")
    second.save(tmp_path / "b.npz")
    merged = BoxEvaluator.load(tmp_path / "a.npz").merge(BoxEvaluator.load(tmp_path / "b.npz"))
    assert merged.ids == different and merged.compute() == whole.compute()
    assert merged.errors("oracle") == whole.errors("oracle") and merged.corloc() == whole.corloc()
    merged.save(tmp_path / "c.npz")
    again = BoxEvaluator.load(tmp_path / "c.npz")
    assert again.compute() == whole.compute()
    with pytest.raises(DataError, match="before"):
        again.accumulate(np.zeros((12, 12)), None, [0., 0., 0.])
    with np.load(tmp_path / "c.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    assert pickle.loads(pickle.dumps(whole)).compute() == whole.compute()      # evaluators travel between processes


def test_an_empty_evaluator_can_be_saved(tmp_path):
    BoxEvaluator({"a": [[0, 0, 1, 1]], "b": np.zeros((0, 4))}).save(tmp_path / "a.npz")
    back = BoxEvaluator.load(tmp_path / "a.npz")
    back.accumulate(np.ones((2, 2)), "a")
    assert back.compute()["MaxBoxAcc"] == 100
    with pytest.raises(DataError, match="'b' has no true boxes"):
        back.accumulate(np.ones((2, 2)), "b")


def test_a_full_disk_leaves_no_file(tmp_path):
    evaluator = filled_evaluator()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            evaluator.save(tmp_path / "a.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [b"", b"PK\x03\x04", b"not an archive"])
def test_damaged_files(tmp_path, broken):
    (tmp_path / "a.npz").write_bytes(broken)
    for kind in (BoxEvaluator, MaskEvaluator):
        with pytest.raises(DataError, match="a.npz"):
            kind.load(tmp_path / "a.npz")


def test_pickles_in_files_are_not_run(tmp_path):
    np.savez(tmp_path / "a.npz", kind=np.array("BoxEvaluator"), ids=np.array([print], object))
    with pytest.raises(DataError, match="a.npz"):
        BoxEvaluator.load(tmp_path / "a.npz")


def test_a_failed_batch_is_not_half_kept():
    evaluator = BoxEvaluator({"a": [[0, 0, 1, 1]], "b": [[0, 0, 1, 1]]})
    maps = np.zeros((2, 3, 3))
    maps[1, 0, 0] = 2
    with pytest.raises(ValueError):
        evaluator.accumulate(maps, ["a", "b"])
    with pytest.raises(DataError):
        evaluator.accumulate(np.zeros((2, 3, 3)), ["a", "a"])
    assert evaluator.ids == []


def test_classes_without_images_do_not_count():
    evaluator = BoxEvaluator({i: [[0, 0, 3, 3]] for i in range(3)}, COARSE, labels={0: 7, 1: 7, 2: 900})
    scoremap = np.zeros((6, 6))
    scoremap[:3, :3] = 1
    evaluator.accumulate(np.stack([scoremap, scoremap[::-1], scoremap]), range(3))
    assert evaluator.corloc()["per_class"] == {7: 50., 900: 100.}
    assert evaluator.corloc("per_class")["CorLoc"] == 75.


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_otsu_boxes(seed):
    """Per image: threshold the bytes above Otsu's level, take the largest contour."""
    scoremap = make("noise", seed, 9, 9) ** 2
    levels = (scoremap * 255).astype(np.uint8)
    level, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    assert otsu_threshold(levels) == level
    contours, _ = cv2.findContours((levels > level).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    evaluator = BoxEvaluator({0: [[0, 0, 4, 4]]})
    evaluator.accumulate(scoremap, 0)
    largest = max(contours, key=cv2.contourArea)
    assert evaluator.boxes("otsu")[0].tolist() == list(reference.outline_box(largest, (9, 9)))
    assert evaluator.at("otsu")["IoU"] == box_iou(evaluator.boxes("otsu"), [[0, 0, 4, 4]])[0, 0] * 100


# --- masks -------------------------------------------------------------------------------------

def scores_on_edges(random, edges, count):
    """Scores on the edges, one float beside them, and anywhere."""
    chosen = random.choice(edges[edges <= 1], count)
    beside = np.nextafter(chosen, random.integers(0, 2, count).astype(float))
    moved = np.where(random.random(count) < .5, beside, chosen)
    return np.clip(np.where(random.random(count) < .3, random.random(count), moved), 0, 1)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["usual", "quarter", "random", "repeated", "late", "ends at 1", "single"]))
def test_mask_counts_equal_the_reference(seed, kind):
    random = np.random.default_rng(seed)
    thresholds = {"usual": GRID, "quarter": np.arange(0, 1, .004), "repeated": np.array([0., .2, .2, .2, .7]),
                  "random": np.sort(random.random(random.integers(1, 300))), "late": np.array([.5, .6]),
                  "ends at 1": np.linspace(0, 1, 11), "single": np.array([0.])}[kind]
    ours, plain = MaskEvaluator(thresholds), reference.MaskReference(thresholds)
    for _ in range(3):
        scoremap = scores_on_edges(random, ours.edges, 60).reshape(6, 10)
        mask = random.choice(np.array([0, 1, 255], np.uint8), (6, 10))
        mask[0, 0], scoremap[0, 0] = 1, random.uniform(.6, 1)
        ours.accumulate(scoremap, mask)
        plain.accumulate(scoremap, mask)
    assert np.array_equal(ours.counts, [plain.negatives, plain.positives])
    assert abs(ours.compute()["PxAP"] - plain.compute()["PxAP"]) < 1e-9


def test_every_edge_falls_on_its_own_side():
    evaluator = MaskEvaluator()
    edges = np.concatenate([evaluator.edges[:-2], np.nextafter(evaluator.edges[1:-2], 0)])
    scoremap = edges[None]
    evaluator.accumulate(scoremap, np.ones(scoremap.shape, np.uint8))
    assert np.array_equal(evaluator.counts[1], np.histogram(scoremap, bins=evaluator.edges)[0])


def test_masks_batch_merge_and_mistakes(tmp_path):
    random = np.random.default_rng(0)
    scores, masks = random.random((4, 5, 6)), random.choice(np.array([0, 1, 255], np.uint8), (4, 5, 6))
    whole, parts = MaskEvaluator(), [MaskEvaluator(), MaskEvaluator()]
    whole.accumulate(scores, torch.from_numpy(masks))
    for i in range(4):
        parts[i % 2].accumulate(torch.from_numpy(scores[i]), masks[i].astype(np.int64))
    parts[0].save(tmp_path / "a.npz")
    assert MaskEvaluator.load(tmp_path / "a.npz").merge(parts[1]).compute() == whole.compute()
    before = whole.counts.copy()
    score, mask = scores[0], masks[0]
    for bad_scores, bad_mask in ((score * 3, mask), (score - .5, mask), (score * np.nan, mask), (score, mask + 7),
                                 (score, mask.astype(int) + 256), (score, mask * .5), (score, mask[:2])):
        for evaluator in (whole, MaskEvaluator([.2, .7])):
            with pytest.raises(ValueError):
                evaluator.accumulate(bad_scores, bad_mask)
    assert np.array_equal(whole.counts, before)


# --- preparing ---------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, size", [((7, 7), (224, 224)), ((14, 10), (33, 64)), ((28, 28), (14, 20))])
def test_cubic_interpolation_is_opencvs(shape, size):
    raw = np.random.default_rng(0).standard_normal(shape)
    expected = cv2.resize(raw, size[::-1], interpolation=cv2.INTER_CUBIC)
    expected = (expected - expected.min()) / (expected - expected.min()).max()
    assert abs(prepare_map(raw, size, "cubic") - expected).max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["bilinear", "cubic"]), st.sampled_from(["after_resize", "native"]),
       st.sampled_from([1e-30, 1., 1e30]))
def test_prepared_maps_are_valid(seed, resize, norm_at, scale):
    """Whatever a network gives, the evaluator accepts after preparation."""
    random = np.random.default_rng(seed)
    raw = torch.from_numpy(make(random.choice(sorted(KINDS)), seed, 6, 5)).float() * scale - random.choice([0., scale])
    found = prepare_map(raw, (17, 23), resize, norm_at)
    assert found.dtype == np.float64 and len(boxes_at_thresholds(found, COARSE)) == len(COARSE)
    if norm_at == "after_resize":
        assert found.max() in (0., 1.) and found.min() == 0.


def test_normalizing_keeps_type_and_gradient():
    maps = torch.rand(2, 3, 4, 5, requires_grad=True)
    out = normalize_maps(maps)
    out.square().sum().backward()
    assert out.dtype == maps.dtype and torch.isfinite(maps.grad).all() and maps.grad.any()
