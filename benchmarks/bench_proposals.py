"""Scoring proposals: batches with one blur per image, against one blur and one forward pass per box; and the whole harvest.

    python benchmarks/bench_proposals.py                                  # mini classifier, 96 pixels
    python benchmarks/bench_proposals.py --scorer resnet50 --size 224 --images 4 --boxes 6
    python benchmarks/bench_proposals.py --json out.json

Weights are random: speed does not depend on them. `separable` gives every box its own blur by the same two matrix products,
`dense` by a 2-D convolution with the same kernel (torchvision's), which is what a direct implementation does.
"""
import argparse
import json
import time
from pathlib import Path

import torch
from torchvision.transforms.functional import gaussian_blur

from wsol_nb.core import default_device, generator, write_json
from wsol_nb.models import attention_maps, backbone, build
from wsol_nb.proposals import (AttentionMaps, Blur, Harvest, Scorer, evaluating, find_boxes, grey_levels, outside_blurred,
                               propose, scaled, score_regions)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", default="mini_cnn", help="backbone of the classifier")
    parser.add_argument("--encoder", default="mini_sst", help="transformer whose attention is read")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=16, help="images per batch")
    parser.add_argument("--boxes", type=int, default=6, help="boxes per image")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def seconds(work, repeats: int, device: torch.device) -> float:
    """The fastest of a few runs, in seconds of processor time on a CPU and of the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    found = []
    for _ in range(repeats + 1):                      # the first one warms up
        start = clock()
        work()
        torch.cuda.synchronize() if device.type == "cuda" else None
        found.append(clock() - start)
    return min(found[1:])


def random_boxes(count: int, size: int) -> torch.Tensor:
    corners = torch.randint(size, (count, 2, 2), generator=generator("boxes", count, size)).sort(1).values
    return corners.flatten(1)                         # x0, y0, x1, y1


def one_by_one(scorer, raw, boxes, owner, classes, dense: bool) -> torch.Tensor:
    """Every box by itself: its own blur, its own forward pass."""
    blur, scores = Blur(), []
    mean, std = (torch.tensor(v, device=raw.device).view(3, 1, 1) for v in (scorer.mean, scorer.std))
    factor = raw.shape[-1] / blur.at
    kernel, sigma = 2 * round(blur.kernel // 2 * factor) + 1, blur.sigma * factor
    for box, image in zip(boxes, owner.tolist()):
        picture = raw[image:image + 1]
        soft = gaussian_blur(picture, kernel, sigma) if dense else blur(picture)
        logits = scorer.model.logits((outside_blurred(picture, soft, box[None]) - mean) / std)
        scores.append(logits.softmax(1)[0, classes[image]])
    return torch.stack(scores)


def compare_scoring(args, scorer, raw) -> dict[str, float]:
    """Milliseconds per box of the three ways, and how much faster the first is."""
    device = raw.device
    owner = torch.arange(len(raw), device=device).repeat_interleave(args.boxes)
    boxes = random_boxes(len(owner), args.size).to(device)
    classes = torch.zeros(len(raw), dtype=torch.long, device=device)
    ways = {"batched": lambda: score_regions(scorer, raw, Blur()(raw), boxes, owner, classes),
            "separable": lambda: one_by_one(scorer, raw, boxes, owner, classes, dense=False),
            "dense": lambda: one_by_one(scorer, raw, boxes, owner, classes, dense=True)}
    expected = ways["batched"]()
    for name in ("separable", "dense"):
        torch.testing.assert_close(ways[name](), expected, atol=1e-4, rtol=1e-3)
    each = {name: 1000 * seconds(work, args.repeats, device) / len(owner) for name, work in ways.items()}
    return each | {f"{name} ÷ batched": each[name] / each["batched"] for name in ("separable", "dense")}


def measure_harvest(args, scorer, raw) -> dict[str, float]:
    """Milliseconds per image of each step of a harvest."""
    device = raw.device
    source = AttentionMaps(backbone(args.encoder, pretrained=False).to(device), attention_maps)
    with evaluating(source.backbone):
        maps = source(raw)
        levels = grey_levels(scaled(maps, raw.shape[-2:]))
        labels, settings = torch.zeros(len(raw), dtype=torch.long), Harvest(size=args.size)
        steps = {"maps": lambda: source(raw),
                 "grey levels": lambda: grey_levels(scaled(maps, raw.shape[-2:])),
                 "Otsu and regions": lambda: [find_boxes(image) for image in levels],
                 "blur": lambda: Blur()(raw),
                 "all but maps": lambda: propose(maps, raw, scorer, labels, settings)}
        return {name: 1000 * seconds(work, args.repeats, device) / len(raw) for name, work in steps.items()}


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = default_device()
    raw = torch.rand(args.images, 3, args.size, args.size, generator=generator("images")).to(device)
    scorer = Scorer(build("cam", 20, backbone=args.scorer, pretrained=False).to(device).eval())
    with evaluating(scorer.model):
        scoring, steps = compare_scoring(args, scorer, raw), measure_harvest(args, scorer, raw)
    threads = f"CPU, {args.threads} thread{'s' * (args.threads > 1)}"
    where = threads if device.type == "cpu" else torch.cuda.get_device_name()
    print(f"{args.scorer} at {args.size} pixels, {args.images} images × {args.boxes} boxes, {where}")
    for name, value in scoring.items():
        print(f"  {name:22} {value:8.2f} {'×' if '÷' in name else 'ms per box'}")
    print(f"harvest with {args.encoder}, ms per image")
    for name, value in steps.items():
        print(f"  {name:22} {value:8.2f}")
    if args.json:
        write_json(args.json, {"settings": json.loads(json.dumps(vars(args), default=str)), "device": where,
                               "scoring": scoring, "harvest": steps})


if __name__ == "__main__":
    main()
