"""How near the fast CRF loss comes to the full sum, and what it costs, as Markdown tables.

    python benchmarks/bench_crf.py                       # sides 40 to 112 at scale 1, 112 and 224 at scale .5: minutes
    python benchmarks/bench_crf.py --full                # and 224 at scale 1: the sum takes about a minute per picture
    python benchmarks/bench_crf.py --accuracy none       # times only
    python benchmarks/bench_crf.py --device cuda         # the same on a GPU: wall time
    python benchmarks/bench_crf.py --json out.json

Errors are the worst of three probability maps (a soft disc, a sharp mask, a softmax of noise): of the value, |fast/exact − 1|; of the
gradient, relative L2 distance and one minus cosine. Times are forward and backward, fastest of several runs, in processor time
on one thread, beside a float32 product of two 1024×1024 matrices in the same run. On a GPU they are wall times.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from wsol_nb.core import generator, write_json
from wsol_nb.crf_loss import DenseCRFLoss, colour_axis, filter_exact, filter_fast, filter_grid, spatial_terms
from wsol_nb.synth import SCENES, BirdSet, photograph

SIGMAS = ((15., 100.), (10., 100.), (20., 100.), (10., 40.), (20., 40.))
DRAWN = BirdSet("bench_crf", SCENES["standard"], ())
LIMITS = {"value": .02, "gradient": .04, "1 − cosine": .001}      # what the loss promises


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", choices=("none", "default"), default="default")
    parser.add_argument("--full", action="store_true", help="accuracy at 224 pixels and scale 1 too")
    parser.add_argument("--times", type=int, nargs="*", default=(56, 112, 224), help="sides to measure the time at, scale 1")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7, help="the fastest of so many counts")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def shown(name: str, height: int, width: int) -> torch.Tensor:
    """3×H×W in 0–255: a photograph, or a drawn picture."""
    image = Image.fromarray(DRAWN.render("val", 3).image) if name == "drawn" else photograph(name)
    return torch.from_numpy(np.array(image.resize((width, height)), np.float32)).permute(2, 0, 1)


def pictures(height: int, width: int) -> dict[str, torch.Tensor]:
    found = {name: shown(name, height, width) for name in ("china", "chelsea", "coffee", "flower", "hubble", "drawn")}
    black, white = found["china"].clone(), found["coffee"].clone()
    black[:, :height // 2] = 0
    white[:, :, width // 3:] = 255
    noise = torch.rand(3, height, width, generator=generator("colour noise"))
    return found | {"half black": black, "two thirds white": white, "flat": torch.full((3, height, width), 93.),
                    "nearly flat": 125 + 10 * noise, "colour noise": (256 * noise).floor()}


def maps(height: int, width: int) -> torch.Tensor:
    """6×H×W: three pairs of probabilities."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    disc = 8 * (.6 - torch.hypot(y + .1, x - .15))
    noise = 2 * torch.randn(height, width, generator=generator("softmax noise"))
    probs = torch.stack([disc.sigmoid(), (disc > 0).float(), noise.sigmoid()])
    return torch.stack([probs, 1 - probs], 1).flatten(0, 1)


def errors(colours: torch.Tensor, sigma_rgb: float, sigma_xy: float, device: str) -> dict[str, float]:
    """The worst of the three maps."""
    colours, signals = colours.to(device), maps(*colours.shape[-2:])[None].to(device)
    exact, fast = (work(colours[None], signals, sigma_rgb, sigma_xy).double().view(3, -1) for work in (filter_exact, filter_fast))
    flat = signals.double().view(3, -1)
    value = ((flat * fast).sum(1) / (flat * exact).sum(1) - 1).abs()
    gradient = (fast - exact).norm(dim=1) / exact.norm(dim=1)
    return {"value": value.max().item(), "gradient": gradient.max().item(),
            "1 − cosine": (1 - F.cosine_similarity(fast, exact, 1)).max().item()}


def accuracy(full: bool, device: str) -> list[dict]:
    """One row per size, σ and picture."""
    plans = [((40, 40), 1., sigmas) for sigmas in SIGMAS] + [((112, 112), .5, sigmas) for sigmas in SIGMAS]
    plans += [((80, 56), 1., SIGMAS[3]), ((112, 112), 1., SIGMAS[0]), ((224, 224), .5, SIGMAS[0]), ((224, 224), .5, SIGMAS[3])]
    plans += [((224, 224), 1., sigmas) for sigmas in (SIGMAS[0], SIGMAS[3])] * full
    rows = []
    for (height, width), scale, (sigma_rgb, sigma_xy) in plans:
        for name, colours in pictures(height, width).items():
            small = F.interpolate(colours[None], scale_factor=scale, mode="nearest")[0]
            rows.append({"size": f"{height}×{width}", "scale": scale, "σ": f"{sigma_rgb:.0f}/{sigma_xy:.0f}", "picture": name}
                        | errors(small, sigma_rgb, sigma_xy * scale, device))
    return rows


def fastest(work, repeats: int, device: str) -> float:
    """Milliseconds: of the processor, or on a GPU of the clock until it is done."""
    clock, found = time.process_time if device == "cpu" else time.perf_counter, []
    for _ in range(repeats + 1):      # the first one warms up
        start = clock()
        work()
        if device != "cpu":
            torch.accelerator.synchronize(torch.device(device))
        found.append(1000 * (clock() - start))
    return min(found[1:])


def timing(side: int, args: argparse.Namespace) -> list[dict]:
    """Forward and backward per image, for a photograph and for noise; on a CPU also the filter of GPUs, in torch alone."""
    device = args.device
    matrix = torch.rand(1024, 1024, device=device)
    probs = torch.rand(args.batch, 2, side, side, device=device).softmax(1).requires_grad_()
    loss, rows = DenseCRFLoss(scale=1.), []
    for name in ("china", "colour noise"):
        images = pictures(side, side)[name].to(device).expand(args.batch, -1, -1, -1) / 255

        def step():
            probs.grad = None
            loss(images, probs).backward()
        each, product = fastest(step, args.repeats, device) / args.batch, fastest(lambda: matrix @ matrix, 3 * args.repeats, device)
        rows.append({"side": side, "picture": name, "ms per image": each, "ms per 1024³ product": product, "images ÷ products": each / product})
        if device == "cpu":
            few, terms = slice(0, 2), spatial_terms((side, side), 100.)
            torch_only = fastest(lambda: filter_grid(images[few] * 255, probs.detach()[few], colour_axis(15.), terms), 2, device) / 2
            rows[-1]["torch alone ÷ machine code"] = torch_only / each
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    def text(value):
        return value if isinstance(value, str) else f"{value:.1e}" if 0 < value < 5e-5 else f"{value:.4g}" if value < 1 else f"{value:.3g}"
    head = list(rows[0])
    lines = [head, ["---"] * len(head)] + [[text(row[key]) for key in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def worst(rows: list[dict], by: tuple[str, ...]) -> list[dict]:
    """The largest errors of the rows that agree in `by`."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    return [dict(zip(by, key)) | {name: max(r[name] for r in group) for name in LIMITS} for key, group in groups.items()]


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = accuracy(args.full, args.device) if args.accuracy != "none" else []
    if rows:
        usual = [row for row in rows if row["picture"] != "colour noise"]
        print("Worst picture, without colour noise\n\n" + table(worst(usual, ("size", "scale", "σ"))))
        print("Worst size and σ\n\n" + table(worst(rows, ("picture",))))
        kept = all(row[name] <= limit for row in usual for name, limit in LIMITS.items())
        print(f"{'All' if kept else 'NOT ALL'} within {', '.join(f'{k} ≤ {v:g}' for k, v in LIMITS.items())}.\n")
    times = [row for side in args.times for row in timing(side, args)]
    print(table(times)) if times else None
    if args.json:
        write_json(args.json, {"accuracy": rows, "times": times})


if __name__ == "__main__":
    main()
