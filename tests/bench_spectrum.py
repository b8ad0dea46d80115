"""Does the spectrum help to start? Adapters of one rank started as ever, or along the directions that the spectrum finds, and
uneven ranks against even ones at the same number of trained numbers.

    python tests/bench_spectrum.py --rank 8 --seeds 0,1,2,3,4 [options of train.py]

zero     V from Xavier's uniform, U = 0: what train.py does
plain    V's rows are the leading right singular vectors of the whitened gradient, as long as Xavier's; U = 0
white    the same seen through the whitening, v·C^(-1/2): what reads those directions off h; V·h as large as with Xavier's
uneven   zero, but block by block a rank goes where it is worth most, at least 1 each, the same sum

G and C as train.py --spectrum takes them, but with both halves of the images in either role, and without its temperature.
"""
import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune  # noqa: E402
import cli  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402

HEAD = {"method": "head", "rank": None, "epochs": 30, "lr": 1e-2, "resume": True}


def gradients(options, seed):
    """G [L, D, D], C [L, D, D] and the spectrum [L, D], means over both ways round."""
    run, found = train.prepare(argparse.Namespace(**vars(options) | HEAD), seed), []
    images = run.data.train[data.stratified_order(run.data.train.labels, f"spectrum/{seed}")]
    features, val = train.cache_features(run, images, "train"), train.cache_features(run, run.data.val, "val")
    halves = torch.arange(len(images)).tensor_split(2)
    for one, other in (halves, halves[::-1]):
        adaptertune.add_head(run.model, len(run.data.classes))
        train.fit_head(run, features[one], val)
        found.append(adaptertune.shift_gradients(run.model, run.batches.eval(images[other], run.data.center)))
    G, C = (torch.stack(each).mean(dim=0) for each in zip(*found, strict=True))
    return G.mean(dim=0), C, sum(adaptertune.spectrum(*each) for each in found) / 2


def directions(G, C, rank, white):
    """V [r, D]."""
    whiten, D = adaptertune.whitener(C.double()), len(C)
    V = torch.linalg.svd(G.double() @ whiten)[2][:rank]
    if not white:
        return (V * (2 * D / (rank + D)) ** 0.5).float()
    V = V @ whiten
    return (V * (2 / (rank + D) * C.double().trace() / ((V @ C.double()) * V).sum(dim=1, keepdim=True)) ** 0.5).float()


def uneven(energy, total):
    """A rank for each block, by what the next three would bring."""
    worth, ranks = torch.cat([energy[:, :1], energy.diff(dim=1)], dim=1), [1] * len(energy)
    for _ in range(total - len(energy)):
        ranks[max(range(len(ranks)), key=lambda i: worth[i, ranks[i]:ranks[i] + 3].mean().item())] += 1
    return ranks


def fit(options, seed, variant, found):
    """Validation accuracy after the first epoch, and test accuracy, in percent."""
    run, (G, C, energy) = train.prepare(options, seed), found
    blocks = run.model.blocks
    if variant == "uneven":
        for block, rank in zip(blocks, uneven(energy, options.rank * len(blocks)), strict=True):
            torch.manual_seed(data.checksum(f"{seed}/{rank}"))
            block.adapter = adaptertune.Adapter(run.model.config.width, rank)
        adaptertune.freeze(run.model)
    elif variant != "zero":
        for i, block in enumerate(blocks):
            block.adapter.down.weight.data.copy_(directions(G[i], C[i], options.rank, variant == "white"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = replace(run, folder=Path(folder))
        train.fit(run)
    return float(run.state.rows[0][3]), run.meta["test_accuracy"]


def main():
    options, results = cli.parse([*sys.argv[1:], "--name", "bench"])[0], {}
    for seed in options.seeds:
        found = gradients(options, seed)
        for variant in ("zero", "plain", "white", "uneven"):
            val, test = fit(options, seed, variant, found)
            results.setdefault(variant, []).append((val, test))
            print(f"seed {seed}  {variant:8} val after an epoch {val:6.2f} %, test {test:6.2f} %", flush=True)
    spread = statistics.stdev if len(options.seeds) > 1 else lambda values: 0.0
    for variant, pairs in results.items():
        print(f"{variant:8}", *(f"{name} {statistics.mean(values):.2f} ± {spread(values):.2f}" for name, values in zip(
            ("val after an epoch", "test"), zip(*pairs, strict=True), strict=True)), sep="  ")


if __name__ == "__main__":
    main()
