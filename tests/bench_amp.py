"""How long a training step takes in bf16 against fp32, on this machine's CPU or GPU.

    python tests/bench_amp.py [--batch 32] [--pairs 10]

DeiT-tiny's shape with rank-8 adapters, random weights, batches of random images. The two are timed
in turn, in pairs, after a warm-up; the figure is the ratio of the medians.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune
import vit

WARM_UP = 2  # pairs that don't count


def build(device: torch.device) -> nn.Module:
    """The adapted network, on a device."""
    model = vit.ViT(vit.BACKBONES["deit_ti16"].config, classes=10)
    model.init_weights()
    adaptertune.add_adapters(model, rank=8, init="small")
    adaptertune.freeze(model)
    return model.to(device)


def time_step(model: nn.Module, images: Tensor, bf16: bool) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss = model(images).float().square().mean()
    loss.backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    fp32_times = []
    bf16_times = []
    for pair in range(options.pairs + WARM_UP):
        fp32_seconds = time_step(model, images, bf16=False)
        bf16_seconds = time_step(model, images, bf16=True)
        if pair >= WARM_UP:
            fp32_times.append(fp32_seconds)
            bf16_times.append(bf16_seconds)
    fp32 = statistics.median(fp32_times)
    bf16 = statistics.median(bf16_times)

    amx = torch.cpu._is_amx_tile_supported()
    print(
        f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, "
        f"AMX {amx}, batch {options.batch}, median of {options.pairs}"
    )
    for name, seconds in (("fp32", fp32), ("bf16", bf16)):
        rate = options.batch / seconds
        print(f"{name} {1000 * seconds:8.1f} ms a step, {rate:7.1f} images/s")
    print(f"ratio {bf16 / fp32:.2f} (bf16 to fp32)")


if __name__ == "__main__":
    main()
