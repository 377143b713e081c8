"""What the protocol costs: size of the curve store, rules per second, and images per second of the annotators.

    python benchmarks/bench_protocol.py                                  # 1,000 images × 50 epochs × 4 annotators
    python benchmarks/bench_protocol.py --images 10000 --epochs 10
    python benchmarks/bench_protocol.py --pictures photos --count 20     # Selective Search on real photographs, with its IoU

Networks have random weights, which cost as much as trained ones; they are timed without the classifier that judges proposals.
The stored counts are those of a plausible model: box accuracy that rises and falls with the threshold, smooth as measured curves are.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from wsol_nb.annotators import NOISE_LEVELS, annotate_by_maps, disturb, has_selective_search, otsu_box, selective_search
from wsol_nb.clip_cache import pseudo_maps
from wsol_nb.clip_cams import clip_maps, prompts_of
from wsol_nb.core import write_json
from wsol_nb.datasets import Split, load, open_item
from wsol_nb.evaluation import TEST_THRESHOLDS, VALIDATION_THRESHOLDS
from wsol_nb.metrics import BoxEvaluator, box_iou
from wsol_nb.mini_clip import vocabulary
from wsol_nb.models import load_clip
from wsol_nb.rpn import region_proposals, rpn
from wsol_nb.selection import LEVELS, RULES, RunCurves, choose, epoch_curves, stack_epochs


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--measured", type=int, default=3, help="epochs really evaluated; the others repeat them with noise")
    parser.add_argument("--size", type=int, default=64, help="side of a map in pixels")
    parser.add_argument("--pictures", default="toy", help="data set for the annotators")
    parser.add_argument("--count", type=int, default=16, help="pictures annotated")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def maps(count: int, size: int, seed: int):
    """Blurred spots with noise, and the boxes around them."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    for _ in range(count):
        (cx, cy), (w, h) = draws.uniform(.3, .7, 2) * size, draws.uniform(.1, .3, 2) * size
        values = np.exp(-((x - cx) / w) ** 2 - ((y - cy) / h) ** 2) + .1 * draws.random((size, size))
        yield values / values.max(), np.clip([[cx - w, cy - h, cx + w, cy + h]], 0, size - 1).astype(int)


def measure(count: int, size: int, seed: int, thresholds: np.ndarray, annotators: int):
    """Curves of one epoch and the seconds of comparing it with every annotator."""
    found = [(f"{i}", m, b) for i, (m, b) in enumerate(maps(count, size, seed))]
    seen = BoxEvaluator({id: b for id, _, b in found}, thresholds, LEVELS)
    for id, scoremap, _ in found:
        seen.accumulate(scoremap, id)
    draws = np.random.default_rng(seed)
    boxes = {f"annotator {k}": {id: disturb(b, (size, size), 10 * k, draws) for id, _, b in found} for k in range(annotators)}
    start = time.perf_counter()
    return epoch_curves(seen, boxes, 50.), time.perf_counter() - start


def store(options: argparse.Namespace) -> dict:
    """Size of one run's file, and rules per second on it."""
    val = [measure(options.images, options.size, k, VALIDATION_THRESHOLDS, 4) for k in range(options.measured)]
    test, _ = measure(options.images, options.size, 99, TEST_THRESHOLDS, 1)
    draws = np.random.default_rng(0)

    def vary(curves):
        noise = draws.normal(0, 3, curves.hits.shape).round()
        return curves._replace(hits=np.clip(curves.hits + noise, 0, options.images).astype(np.int32),
                               iou=(curves.iou + draws.normal(0, 1e-3, curves.iou.shape)).astype(np.float32))
    epochs = {e: val[e % len(val)][0] if e < len(val) else vary(val[e % len(val)][0]) for e in range(options.epochs)}
    names = [f"annotator {k}" for k in range(4)]
    tested = {e: vary(test) for e in range(0, options.epochs, max(1, options.epochs // 6))}
    rows = {e: epochs[e] for e in tested}
    run = RunCurves({}, stack_epochs(rows, names, VALIDATION_THRESHOLDS, options.images), stack_epochs(tested, ["GT"], TEST_THRESHOLDS, options.images))
    whole = RunCurves({}, stack_epochs(epochs, names, VALIDATION_THRESHOLDS, options.images), run.test)
    with tempfile.TemporaryDirectory() as folder:
        whole.save(Path(folder) / "run.npz")
        size = (Path(folder) / "run.npz").stat().st_size
    start = time.perf_counter()
    for rule in RULES:
        choose([run] * 30, rule, "annotator 1")
    return {"store, bytes": size, "test epochs": len(tested), "comparing an epoch with 4 annotators, s": np.mean([s for _, s in val]).round(3),
            "rules per second, 30 configurations": round(len(RULES) / (time.perf_counter() - start), 1)}


def annotators(options: argparse.Namespace) -> dict:
    """Images per second; for Selective Search also boxes per picture and the IoU of the best one."""
    split = load(options.pictures)["val"].subset(options.count)
    pictures, out = [open_item(item) for item in split], {}
    start = time.perf_counter()
    for _, (scoremap, _) in zip(pictures, maps(len(pictures), 28, 0)):
        otsu_box(torch.from_numpy(scoremap), (224, 224))
    out["Otsu box of a 28 × 28 map at 224, images/s"] = round(len(pictures) / (time.perf_counter() - start), 1)
    start = time.perf_counter()
    for item in split:
        for level in NOISE_LEVELS:
            disturb(item.boxes, (item.width, item.height), level, np.random.default_rng(0))
    out["noise at ten levels, images/s"] = round(len(pictures) / (time.perf_counter() - start), 1)
    if not has_selective_search():
        return out | {"Selective Search": "not run: needs opencv-contrib-python-headless"}
    start = time.perf_counter()
    found = [selective_search(np.asarray(p)) for p in pictures]
    out["Selective Search (fast), images/s"] = round(len(pictures) / (time.perf_counter() - start), 2)
    best = [box_iou(b, item.boxes).max() for b, item in zip(found, split) if len(item.boxes) and len(b)]
    return out | {"boxes per picture": float(np.mean([len(b) for b in found])), "IoU of the best box, %": round(100 * float(np.mean(best)), 1)}


def per_second(split: Split, work) -> float:
    """Images per second of `work`; one picture warms up."""
    work(split.subset(1))
    start = time.perf_counter()
    work(split)
    return round(len(split) / (time.perf_counter() - start), 2)


def networks(options: argparse.Namespace) -> dict:
    """Images per second of the annotators with a network, reading of the pictures included."""
    split, out = load(options.pictures)["val"].subset(options.count), {}
    for name in ("mini_rpn", "fasterrcnn_resnet50_fpn"):
        network = rpn(name, pretrained=False)
        out[f"{name}, images/s"] = per_second(split, lambda few: region_proposals(network, map(open_item, few), 2000))
    for name, side in (("mini_clip", 96), ("open_clip:ViT-B-16-quickgelu", 224)):
        clip, words = load_clip(name, pretrained=False), sorted(vocabulary())[:len(split.classes)]
        maps = clip_maps("clip_es", clip.model, clip.tokenizer, words, **prompts_of("mini_cub").settings("clip_es"))
        out[f"CLIP-ES with {name} and Otsu, images/s"] = per_second(split, lambda few: annotate_by_maps(few, pseudo_maps(few, maps, side, quiet=True).maps))
    return out


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    figures = {"images": chosen.images, "epochs": chosen.epochs, **store(chosen), "pictures": chosen.pictures, **annotators(chosen), **networks(chosen)}
    print(json.dumps(figures, indent=1, default=float))
    if chosen.json:
        write_json(chosen.json, json.loads(json.dumps(figures, default=float)))


if __name__ == "__main__":
    main()
