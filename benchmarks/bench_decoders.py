"""What joining upsampling and convolution saves in the heads: CPU seconds of a forward and a backward pass, both ways, in one run.

python benchmarks/bench_decoders.py [--pictures 32] [--repeats 8]
"""
import argparse
import time
from statistics import median

import torch

from wsol_nb.decoders import LocalizationHead, UNet, halving_widths
from wsol_nb.models import as_written, backbone


def cases(pictures):
    "Name, module and input; sizes of the embedded data sets and of the thesis"
    few = max(1, pictures // 8)
    yield "head of mini_sst at 96 pixels", LocalizationHead(128, halving_widths(128, 8)), torch.randn(pictures, 128, 12, 12)
    yield "head of ViT-S/16 at 224 pixels", LocalizationHead(), torch.randn(few, 384, 14, 14)
    yield "U-Net on mini_cnn at 96 pixels", UNet(backbone("mini_cnn", pretrained=False)), torch.randn(pictures, 3, 96, 96)


def seconds(module, x, repeats):
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        module(x).square().mean().backward()
        times.append(time.process_time() - start)
    return median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("milliseconds of one CPU thread per picture and training step (forward and backward)")
    for name, module, x in cases(args.pictures):
        joined = 1e3 * seconds(module.train(), x, args.repeats) / len(x)
        with as_written(module):
            apart = 1e3 * seconds(module, x, args.repeats) / len(x)
        print(f"{name}: {apart:.1f} apart, {joined:.1f} joined, {apart / joined:.2f} times as fast")


if __name__ == "__main__":
    main()
