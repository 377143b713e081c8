"""How much faster `wsol_nb.metrics` is than a straightforward OpenCV and NumPy implementation.

    python benchmarks/bench_metrics.py [--maps 5] [--size 224] [--seed 0]

Both run in this process, on one thread, on the same maps; times are CPU times. Every map is also checked: boxes and counts
must be equal. The ratio of a kind of map is the median over its maps, the last line the median over all maps.
"""
import argparse
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from wsol_nb.metrics import BoxEvaluator, MaskEvaluator, boxes_at_thresholds, prepare_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference_evaluation as reference  # noqa: E402

THRESHOLDS = np.arange(0, 1, .001)


def blobs(random: np.random.Generator, size: int, count: int) -> np.ndarray:
    """A few soft spots of random place, width and height."""
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.zeros((size, size))
    for _ in range(count):
        cy, cx, width = random.uniform(.2, .8), random.uniform(.2, .8), random.uniform(.06, .25)
        out += random.uniform(.3, 1) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width ** 2))
    return out


def texture(random: np.random.Generator, size: int, grain: float) -> np.ndarray:
    """Smooth noise of unit variance."""
    out = cv2.GaussianBlur(random.standard_normal((size, size)), (0, 0), grain)
    return out / out.std()


def kinds(random: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    """One map of each kind a localizer may produce."""
    nearest = F.interpolate(torch.from_numpy(attention(random))[None, None], (size, size))[0, 0]
    return {
        "smooth blobs": prepare_map(blobs(random, size, 3), size),
        "CAM 28×28": prepare_map(blobs(random, 28, 3) + .05 * random.standard_normal((28, 28)), size),
        "CAM 14×14 + noise": prepare_map(blobs(random, 14, 3) + .1 * random.standard_normal((14, 14)), size)
        * .9 + .1 * random.random((size, size)),
        "attention 14×14": prepare_map(attention(random), size),
        "attention, nearest": prepare_map(nearest, size),
        "texture, coarse": prepare_map(blobs(random, size, 2) + .15 * texture(random, size, 2.), size),
        "texture, fine": prepare_map(blobs(random, size, 2) + .1 * texture(random, size, 1.), size),
    }


def attention(random: np.random.Generator) -> np.ndarray:
    """Attention of a class token to 14×14 patches: spiky, with some structure."""
    return random.exponential(size=(14, 14)) ** 1.5 + blobs(random, 14, 2)


def seconds(function, repeats: int = 1) -> tuple[float, object]:
    """CPU time of the fastest of several calls, and its answer."""
    best = np.inf
    for _ in range(repeats):
        start = time.process_time()
        answer = function()
        best = min(best, time.process_time() - start)
    return best, answer


def compare_boxes(scoremap: np.ndarray) -> tuple[float, float]:
    """Seconds of the reference and ours for the boxes at all thresholds."""
    slow, expected = seconds(lambda: reference.boxes_at_thresholds(scoremap, THRESHOLDS))
    fast, found = seconds(lambda: boxes_at_thresholds(scoremap, THRESHOLDS), 5)
    if not np.array_equal([boxes[0] for boxes in expected], found):
        raise SystemExit("boxes differ from the reference")
    return slow, fast


def compare_accumulate(scoremap: np.ndarray, multi_contour: bool) -> tuple[float, float]:
    """Seconds of the reference and ours to add one map to an evaluation."""
    height, width = scoremap.shape
    truth = {0: np.array([[width // 4, height // 4, width * 3 // 4, height * 3 // 4]])}
    expected = reference.BoxReference(truth, THRESHOLDS, multi_contour=multi_contour)
    slow, _ = seconds(lambda: expected.accumulate(scoremap, 0))

    def once() -> BoxEvaluator:
        evaluator.accumulate(scoremap, 0)
        return evaluator

    fast = np.inf
    for _ in range(5):
        evaluator = BoxEvaluator(truth, THRESHOLDS, multi_contour=multi_contour)
        fast = min(fast, seconds(once)[0])
    if not np.array_equal(evaluator.curves()["IoU"], expected.values[0] * 100.):
        raise SystemExit("IoU differs from the reference")
    return slow, fast


def compare_masks(scoremap: np.ndarray) -> tuple[float, float]:
    """Seconds of two `np.histogram` calls and ours."""
    mask = np.zeros(scoremap.shape, np.uint8)
    mask[scoremap.shape[0] // 4: -(scoremap.shape[0] // 4), scoremap.shape[1] // 4: -(scoremap.shape[1] // 4)] = 1

    def run(kind) -> object:
        evaluator = kind(THRESHOLDS)
        return seconds(lambda: evaluator.accumulate(scoremap, mask))[0], evaluator

    slow, expected = min((run(reference.MaskReference) for _ in range(5)), key=lambda pair: pair[0])
    fast, found = min((run(MaskEvaluator) for _ in range(15)), key=lambda pair: pair[0])
    if not np.array_equal(found.counts, [expected.negatives, expected.positives]):
        raise SystemExit("counts differ from the reference")
    return slow, fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=5, help="maps of each kind (default 5)")
    parser.add_argument("--size", type=int, default=224, help="side of a map (default 224)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    random = np.random.default_rng(arguments.seed)
    columns = {"boxes": compare_boxes, "accumulate": lambda m: compare_accumulate(m, False),
               "accumulate, all contours": lambda m: compare_accumulate(m, True), "PxAP": compare_masks}
    for compare in columns.values():          # compile
        compare(prepare_map(random.random((8, 8)), 16))
    times: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for _ in range(arguments.maps):
        for kind, scoremap in kinds(random, arguments.size).items():
            times.setdefault(kind, []).append({name: compare(scoremap) for name, compare in columns.items()})
    print(f"{arguments.maps} maps of {arguments.size}×{arguments.size} of each kind, OpenCV {cv2.__version__}; "
          "CPU time on one thread,\nmedian milliseconds, reference / ours = times faster\n")
    print(f"{'':20s}" + "".join(f"{name:>30s}" for name in columns))
    for kind, rows in [*times.items(), ("all maps", sum(times.values(), []))]:
        cells = []
        for name in columns:
            slow, fast = (np.array([row[name][i] for row in rows]) for i in (0, 1))
            cells.append(f"{np.median(slow) * 1e3:10.1f} / {np.median(fast) * 1e3:6.2f} = {np.median(slow / fast):5.1f}×")
        print(f"{kind:20s}" + "".join(f"{cell:>30s}" for cell in cells))


if __name__ == "__main__":
    main()
