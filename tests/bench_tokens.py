"""Do fewer training tokens pay off? The same time spent on all tokens, on some, on small images.

    python tests/bench_tokens.py --real DIR --restored DIR --out tokens.csv [--size 112]
    python tests/bench_tokens.py --cost [--size 112]         what a step of each kind costs here
    python tests/bench_tokens.py --table --out tokens.csv

A schedule is a list of phases, epochs x share of the image's side x share of the patch tokens, such
as "6x1x0.5 2x1x1". Tokens are dropped as in PatchDropout (https://arxiv.org/abs/2208.07220): a new
random subset for each image and step, after the positions are added. For smaller images the
positions are resized. Each epoch sees all training images. Accuracy is measured on full images with
all tokens.

DeiT-tiny, adapters of rank 8, train.py's defaults otherwise, the last epoch. Validation images are
drawn from the training set; the test set isn't read. Runs that the .csv holds aren't repeated.
"""

import argparse
import contextlib
import io
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import run_tables
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune
import data
import train
import vit

COLUMNS = ("data", "size", "schedule", "seed", "val_accuracy", "seconds")
# Data: training images per class, validation images per class, factor of a schedule's epochs.
SETS = {"cifar100": (20, 25, 1), "flowers12": (40, 20, 3)}
PATCH = 16
# A step's cost relative to all tokens, by side and share of tokens: medians of `--cost --size 112`.
COSTS = {(1.0, 1.0): 1.0, (1.0, 0.5): 0.51, (0.71, 1.0): 0.55, (0.57, 1.0): 0.36}
SCHEDULES = (
    "10x1x1",
    "5x1x1",
    "10x1x0.5",
    "6x1x0.5 2x1x1",
    "5x0.71x1 2x1x1",
    "8x0.57x1 2x1x1",
)


@dataclass(frozen=True)
class Phase:
    """Some epochs: `side` is a share of the image's side, `keep` a share of its patch tokens."""

    epochs: int
    side: float
    keep: float

    def size(self, whole: int) -> int:
        """Pixels along a side, in whole patches."""
        return PATCH * round(self.side * whole / PATCH)


def read_schedule(text: str, factor: int = 1) -> list[Phase]:
    """The phases of a schedule, each with `factor` times its epochs."""
    phases = []
    for part in text.split():
        epochs, side, keep = part.split("x")
        phases.append(Phase(factor * int(epochs), float(side), float(keep)))
    return phases


def embed(self: vit.ViT, images: Tensor) -> Tensor:
    """ViT.embed for images of any size; in training it drops some of the tokens."""
    positions = vit.resize_positions(self.pos_embed, images.shape[-1] // self.config.patch)
    patches = self.patch_embed(images) + positions[:, 1:]
    B, n, D = patches.shape
    keep = round(n * Tokens.keep) if self.training else n
    if keep < n:
        chosen = torch.rand(B, n, device=patches.device).topk(keep, dim=1).indices
        patches = patches.gather(1, chosen[..., None].expand(-1, -1, D))
    class_token = (self.cls_token + positions[:, :1]).expand(B, -1, -1)
    return torch.cat([class_token, patches], dim=1)


class Tokens:
    """The share of the patch tokens that `embed` keeps at present."""

    keep = 1.0


@dataclass(frozen=True)
class PhasedBatches(data.Batches):
    """Batches whose images have the size of the epoch's phase."""

    phases: tuple[Phase, ...] = ()

    def train(
        self, dataset: data.Dataset, seed: int, epoch: int, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        last = 0
        for phase in self.phases:
            last += phase.epochs
            if epoch <= last:
                break
        Tokens.keep = phase.keep
        small = replace(self, size=phase.size(self.size))
        return data.Batches.train(small, dataset, seed, epoch, first)


def make_set(name: str, seed: int, options: argparse.Namespace) -> data.Dataset:
    """A data set with images for training and others for validation, from its training set."""
    shots, choose, _ = SETS[name]
    folder = run_tables.find(name, options)
    if name == "cifar100":
        dataset = data.read("cifar100", str(folder.parent), offline=True)
    else:
        dataset = data.read(str(folder), image_size=options.size)
    trained, rest = data.sample_shots(dataset.train, shots, f"tokens/{seed}")
    val, _ = data.sample_shots(rest, choose, f"tokens/{seed}")
    # train.py's test set is for validation here; its `val` is empty, so it keeps the last epoch.
    return replace(dataset, train=trained, val=val[torch.arange(0)], test=val)


def train_once(name: str, schedule: str, seed: int, options: argparse.Namespace) -> dict:
    """Train one run, and return its result.json."""
    phases = read_schedule(schedule, SETS[name][2])
    epochs = sum(phase.epochs for phase in phases)
    weights = run_tables.find("deit", options)
    dataset = make_set(name, seed, options)
    train.read_dataset = lambda *_: dataset
    plain = train.prepare

    def prepare(*arguments) -> train.Run:
        run = plain(*arguments)
        fields = {name: getattr(run.batches, name) for name in ("size", "norm", "batch", "device")}
        run.batches = PhasedBatches(**fields, phases=tuple(phases))
        return run

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        arguments = ["--dataset", folder, "--weights", str(weights)]
        arguments += ["--image-size", str(options.size), "--epochs", str(epochs)]
        arguments += ["--seed", str(seed)]
        (chosen,) = train.parse(arguments)
        train.prepare = prepare
        try:
            return train.train_run(chosen)
        finally:
            train.prepare = plain


def measure_costs(size: int) -> None:
    """Print the cost of a training step of 32 images by kind of phase: CPU time of one thread."""
    torch.set_num_threads(1)
    bf16 = train.time_bf16() < 0.7
    model = vit.ViT(vit.BACKBONES["deit_ti16"].config)
    model.init_weights()
    adaptertune.adapt(model, "adaptertune", 100)
    model.train()
    labels = torch.zeros(32, dtype=torch.long)
    kinds = {kind: [] for kind in COSTS}
    for _ in range(6):
        for (side, keep), seconds in kinds.items():
            Tokens.keep = keep
            pixels = Phase(1, side, keep).size(size)
            images = torch.randn(32, 3, pixels, pixels)
            started = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            seconds.append(time.thread_time() - started)
    whole = statistics.median(kinds[1.0, 1.0][1:])
    print(f"torch {torch.__version__}, one thread, {'bf16' if bf16 else 'fp32'}, batch 32")
    for (side, keep), seconds in kinds.items():
        middle = statistics.median(seconds[1:])
        print(f"{side} of the side, {keep} of the tokens: {middle:.3f} s, {middle / whole:.2f}")


def print_table(path: Path, size: int) -> None:
    """Print the validation accuracy of each schedule, and its cost in epochs with all tokens."""
    rows = [row for row in run_tables.read_rows(path, COLUMNS) if row["size"] == str(size)]
    print("| epochs x share of the side x share of the tokens | cost | " + " | ".join(SETS) + " |")
    print("|---|--:|" + "--:|" * len(SETS))
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        phases = read_schedule(schedule)
        costs = [phase.epochs * COSTS.get((phase.side, phase.keep), math.nan) for phase in phases]
        cells = []
        for name in SETS:
            vals = [
                float(row["val_accuracy"])
                for row in rows
                if (row["data"], row["schedule"]) == (name, schedule)
            ]
            cells.append(run_tables.mean_and_spread(vals))
        print(f"| {schedule} | {sum(costs):.1f} | {' | '.join(cells)} |")


def main() -> None:
    parser = run_tables.make_parser(__doc__, out="tokens.csv", seeds="0,1,2")
    parser.add_argument("--data", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--size", type=int, default=112, help="of full images")
    parser.add_argument("--cost", action="store_true", help="measure what steps cost")
    options = parser.parse_args()
    vit.ViT.embed = embed
    if options.cost:
        measure_costs(options.size)
        return
    if options.table:
        print_table(options.out, options.size)
        return
    run_tables.begin(options.out, COLUMNS)
    rows = run_tables.read_rows(options.out, COLUMNS)
    done = {(row["data"], row["size"], row["schedule"], row["seed"]) for row in rows}
    runs = itertools.product(options.data, options.seeds, options.schedules)
    for name, seed, schedule in dict.fromkeys(runs):
        if (name, str(options.size), schedule, str(seed)) in done:
            continue
        result = train_once(name, schedule, seed, options)
        row = {"data": name, "size": options.size, "schedule": schedule, "seed": seed}
        row["val_accuracy"] = f"{result['test_accuracy']:.2f}"  # see make_set
        row["seconds"] = f"{result['seconds']:.1f}"
        run_tables.add_row(options.out, row)


if __name__ == "__main__":
    run_tables.call(main)
