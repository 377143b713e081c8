"""What remembering frozen features saves: CPU seconds of a DiPS training step per picture, without a memory, cold and warm.

python benchmarks/bench_features.py [--backbone mini_sst] [--size 96] [--pictures 32] [--views 4] [--epochs 10]

CPU time of one thread, so that other processes do not count. `epochs` weights the figures: with V views, an epoch finds a
view that was seen before with probability 1 − (1 − 1/V)^e after e epochs.
"""
import argparse
import time
from statistics import median

import torch

from wsol_nb.decoders import Remembered
from wsol_nb.experiments import CrfSettings
from wsol_nb.models import build
from wsol_nb.samplers import Sampling


def batch_of(count, size):
    torch.manual_seed(0)
    box = torch.tensor([[size // 4, size // 4, 3 * size // 4, 3 * size // 4]] * count)
    return {"image": torch.randn(count, 3, size, size), "raw": torch.rand(count, 3, size, size), "label": torch.arange(count) % 3,
            "box": box, "boxes": box[:, None], "map": torch.zeros(count, dtype=torch.long)}


def cpu_seconds(work, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="mini_sst")
    for name, default in (("size", 96), ("pictures", 32), ("views", 4), ("epochs", 10), ("seeds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build("dips", 20, args.backbone, pretrained=False, crf=CrfSettings(0.), sampling=Sampling(seeds=args.seeds)).train()
    model.class_head.requires_grad_(False)
    batch = batch_of(args.pictures, args.size)

    def step():
        sum(model.loss(batch).values()).backward()

    def forget():
        model.memory = Remembered(None)

    step()
    without = cpu_seconds(step) / args.pictures
    cold = cpu_seconds(lambda: (forget(), step())) / args.pictures
    warm = cpu_seconds(step) / args.pictures
    kept = model.memory.bytes / args.pictures
    share = sum(1 - (1 - 1 / args.views) ** e for e in range(args.epochs)) / args.epochs
    mean = share * warm + (1 - share) * cold
    print(f"{args.backbone} at {args.size} pixels, milliseconds of one CPU thread per picture and training step (no CRF):")
    print(f"  no memory {1000 * without:.1f}, first sight {1000 * cold:.1f}, remembered {1000 * warm:.1f}")
    print(f"  {args.epochs} epochs on {args.views} views: {100 * share:.0f} % remembered, {1000 * mean:.1f} on average "
          f"({without / mean:.2f} times as fast); {kept / 1e3:.0f} kB per view")


if __name__ == "__main__":
    main()
