"""How long a training step takes in bf16 against fp32, on this machine's CPU or GPU: DeiT-tiny's shape with rank-8 adapters,
random weights, batches of random images. The two are timed in turn, in pairs, after a warm-up; the figure is the ratio of
the medians.

    python tests/bench_amp.py [--batch 32] [--pairs 10]
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import adaptertune  # noqa: E402
import vit  # noqa: E402


def step(model, images, bf16):
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss = model(images).float().square().mean()
    loss.backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = vit.ViT(vit.BACKBONES["deit_ti16"].config, classes=10)
    model.init_weights()
    adaptertune.add_adapters(model, rank=8, placement=list(range(12)), init="small")
    adaptertune.freeze(model)
    model, images = model.to(device), torch.randn(options.batch, 3, 224, 224, device=device)
    times = {False: [], True: []}
    for pair in range(options.pairs + 2):
        for bf16 in (False, True):
            seconds = step(model, images, bf16)
            if pair >= 2:
                times[bf16].append(seconds)
    medians = {bf16: statistics.median(values) for bf16, values in times.items()}
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, "
          f"AMX {torch.cpu._is_amx_tile_supported()}, batch {options.batch}, median of {options.pairs}")
    for bf16, name in ((False, "fp32"), (True, "bf16")):
        print(f"{name} {1000 * medians[bf16]:8.1f} ms a step, {options.batch / medians[bf16]:7.1f} images/s")
    print(f"ratio {medians[True] / medians[False]:.2f} (bf16 to fp32)")


if __name__ == "__main__":
    main()
