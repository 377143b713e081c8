"""The evaluation of localization maps written down as plainly as possible, with OpenCV and NumPy.

It thresholds every map at every threshold and traces its outlines again each time: slow, but each step can be read off
the definition. Tests compare `wsol_nb.metrics` with it, `benchmarks/bench_metrics.py` measures against it.
"""
import cv2
import numpy as np


def as_levels(scoremap: np.ndarray) -> np.ndarray:
    """A map (H, W) in [0, 1] as bytes."""
    return (scoremap * 255).astype(np.uint8)


def outline_box(contour: np.ndarray, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a contour: one past its last pixel, within the picture."""
    x, y, width, height = cv2.boundingRect(contour)
    return x, y, min(x + width, shape[1] - 1), min(y + height, shape[0] - 1)


def boxes_at(levels: np.ndarray, threshold: float, multi_contour: bool = False) -> list[tuple[int, int, int, int]]:
    """The box of the largest contour, or the boxes of all, at a threshold relative to the maximum."""
    _, binary = cv2.threshold(levels, int(threshold * np.max(levels)), 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return [(0, 0, 0, 0)]
    if not multi_contour:
        contours = [max(contours, key=cv2.contourArea)]
    return [outline_box(contour, levels.shape) for contour in contours]


def boxes_at_thresholds(scoremap: np.ndarray, thresholds: np.ndarray, multi_contour: bool = False) -> list[list]:
    """The boxes at each threshold."""
    levels = as_levels(scoremap)
    return [boxes_at(levels, threshold, multi_contour) for threshold in thresholds]


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) IoU of inclusive boxes (n, 4) and (m, 4)."""
    x0, y0 = (np.maximum(a[:, None, k], b[None, :, k]) for k in (0, 1))
    x1, y1 = (np.minimum(a[:, None, k], b[None, :, k]) for k in (2, 3))
    overlap = np.maximum(x1 - x0 + 1, 0) * np.maximum(y1 - y0 + 1, 0)
    area_a = (a[:, 2] - a[:, 0] + 1) * (a[:, 3] - a[:, 1] + 1)
    area_b = (b[:, 2] - b[:, 0] + 1) * (b[:, 3] - b[:, 1] + 1)
    return overlap / (area_a[:, None] + area_b[None] - overlap)


class BoxReference:
    """Counts per threshold, image by image."""

    def __init__(self, gt_boxes, thresholds, iou_thresholds=(30, 50, 70), multi_contour=False, labels=None):
        self.gt_boxes = {image_id: np.asarray(boxes) for image_id, boxes in gt_boxes.items()}
        self.thresholds, self.multi_contour, self.labels = thresholds, multi_contour, labels
        self.hits = {delta: np.zeros(len(thresholds)) for delta in iou_thresholds}
        self.top = {k: np.zeros(len(thresholds)) for k in (1, 5)}
        self.iou_sum, self.right, self.images, self.values = np.zeros(len(thresholds)), 0, 0, []

    def accumulate(self, scoremap, image_id, logits=None):
        truth = self.gt_boxes[image_id]
        found = boxes_at_thresholds(scoremap, self.thresholds, self.multi_contour)
        values = np.array([iou_matrix(np.array(boxes), truth).max() for boxes in found])
        for delta, hits in self.hits.items():
            hits[values >= delta / 100] += 1
        if logits is not None:
            ranking = np.argsort(-np.asarray(logits), kind="stable")
            self.right += ranking[0] == self.labels[image_id]
            for k, hits in self.top.items():
                hits[(values >= .5) & (self.labels[image_id] in ranking[:k])] += 1
        self.iou_sum += values
        self.values.append(values)
        self.images += 1

    def compute(self) -> dict:
        per_iou = {delta: hits.max() * 100. / self.images for delta, hits in self.hits.items()}
        out = {"MaxBoxAcc": per_iou[50], "MaxBoxAccV2": np.mean(list(per_iou.values())), "per_iou": per_iou,
               "IoU": (self.iou_sum / self.images * 100.).max(),
               "best_threshold": self.thresholds[self.hits[50].argmax()]}
        if self.labels is not None:
            out |= {f"Top-{k} loc": hits.max() * 100. / self.images for k, hits in self.top.items()}
            out["cls"] = self.right * 100. / self.images
        return out


class MaskReference:
    """Two histograms over all pixels, by `np.histogram`."""

    def __init__(self, thresholds):
        self.edges = np.append(thresholds, [1., 2., 3.])
        self.positives = np.zeros(len(self.edges) - 1)
        self.negatives = np.zeros(len(self.edges) - 1)

    def accumulate(self, scoremap, mask):
        self.positives += np.histogram(scoremap[mask == 1], bins=self.edges)[0]
        self.negatives += np.histogram(scoremap[mask == 0], bins=self.edges)[0]

    def compute(self) -> dict:
        found, false = self.positives[::-1].cumsum(), self.negatives[::-1].cumsum()
        recall, seen = found / self.positives.sum(), found + false > 0
        area, before = 0., 0.
        for i in range(1, len(found)):
            if seen[i]:
                area += found[i] / (found[i] + false[i]) * (recall[i] - recall[i - 1])
        return {"PxAP": area * 100.}
