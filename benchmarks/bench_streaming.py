"""Frames per second of `wsol localize` with a mini model, and memory for clips of 100 and of 2,000 frames.

python benchmarks/bench_streaming.py            # TrCAM-V on mini_sst, random weights, 96 pixels
"""
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch


def walk(count, height=240, width=320):
    ground = np.random.default_rng(0).integers(60, 200, (height, width, 3), np.uint8)
    for k in range(count):
        frame = ground.copy()
        x, y = k % (width - 80), k % (height - 80)
        frame[y:y + 64, x:x + 64] = 220, 40, 40
        yield frame


def one(count: int, video: str) -> None:
    from wsol_nb.models import build
    from wsol_nb.streaming import Localizer, Source, localize_clip
    torch.manual_seed(0)
    localizer = Localizer(build("trcam_v", 10, "mini_sst", pretrained=False), 96, .5, [str(k) for k in range(10)])
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / video if video else None
        speed = localize_clip(Source("walk", walk(count), 25., count), localizer, Path(folder) / "boxes.csv", film, quiet=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count:>6,} frames, {video or 'boxes only':<10}: {peak:,.0f} MB at most; {speed}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one(int(sys.argv[1]), sys.argv[2])
    else:
        print(f"{torch.get_num_threads()} threads, 320 × 240 pixels", flush=True)
        for count in (100, 2000):
            for video in ("", "out.gif", "out.mp4"):
                subprocess.run([sys.executable, __file__, str(count), video], check=True, env={**os.environ})
