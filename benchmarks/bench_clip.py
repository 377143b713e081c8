"""CLIP maps per second: a batch of images against one by one, mini_clip and a large tower with random weights.

    python benchmarks/bench_clip.py                                            # mini_clip at 96 pixels, ViT-B/16 at 224
    python benchmarks/bench_clip.py --models mini_clip --images 64 --threads 2
    python benchmarks/bench_clip.py --models open_clip:ViT-L-14 --images 4 --json out.json

Random weights cost as much as trained ones. Text is embedded once per data set and is not part of the figures.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from wsol_nb.clip_cams import CLIP_METHODS, ClipES, clip_maps, prompts_of
from wsol_nb.core import default_device, generator, write_json
from wsol_nb.models import load_clip

NAMES = ["red-crested blue finch", "white-winged brown sparrow", "orange-billed green warbler", "white-throated grey shrike"]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini_clip", "open_clip:ViT-B-16-quickgelu"])
    parser.add_argument("--methods", nargs="+", default=list(CLIP_METHODS), choices=list(CLIP_METHODS))
    parser.add_argument("--images", type=int, default=16, help="images per batch")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--threads", type=int, default=1, help="1: figures per core, whatever else the machine does")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def seconds(work, repeats: int, device: torch.device) -> float:
    """The fastest of a few runs, in seconds of processor time on a CPU (with one thread) and of the clock otherwise."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    found = []
    for _ in range(repeats + 1):                      # the first one warms up
        start = clock()
        work()
        torch.cuda.synchronize() if device.type == "cuda" else None
        found.append(clock() - start)
    return min(found[1:])


def measure(name: str, methods: list[str], args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Maps per second of each method of one model."""
    torch.manual_seed(0)
    clip = load_clip(name, pretrained=False)
    model, size = clip.model.to(device), clip.model.visual.image_size[0]
    images = torch.randn(args.images, 3, size, size, generator=generator("images")).to(device)
    labels, found = torch.arange(args.images, device=device) % len(NAMES), {}
    for kind in methods:
        settings = prompts_of("mini_cub").settings(kind) | ({} if issubclass(CLIP_METHODS[kind], ClipES) else {"templates": "photo"})
        method = clip_maps(kind, model, clip.tokenizer, NAMES, **settings)
        together = seconds(lambda: method(images, labels), args.repeats, device)
        alone = seconds(lambda: [method(images[i:i + 1], labels[i:i + 1]) for i in range(len(images))], args.repeats, device)
        tower = seconds(lambda: torch.no_grad()(model.visual)(images), args.repeats, device)
        found[kind] = {"batch": args.images / together, "one by one": args.images / alone, "tower alone": args.images / tower}
    return found


def main() -> None:
    args, device = options(), default_device()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread{'s' * (args.threads > 1)}"
    figures = {name: measure(name, args.methods, args, device) for name in args.models}
    print(f"maps per second, batches of {args.images}, {where}")
    for name, methods in figures.items():
        print(name)
        for kind, found in methods.items():
            each = ", ".join(f"{how} {value:.1f}" for how, value in found.items())
            print(f"  {kind:8} {each}; batch ÷ one by one {found['batch'] / found['one by one']:.2f}")
    if args.json:
        write_json(args.json, {"settings": json.loads(json.dumps(vars(args), default=str)), "device": where, "figures": figures})


if __name__ == "__main__":
    main()
