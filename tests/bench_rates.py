"""Which learning rate and recipe are best for each method and task: a grid of training runs.

    python tests/bench_rates.py --real DIR --restored DIR --half rule --out rates.csv
    python tests/bench_rates.py … --pairs pets-deit --methods adaptertune --rates 5e-3
                                  --recipe "--min-scale 0.5" --seeds 0,1
    python tests/bench_rates.py --table --out rates.csv

The search climbs: it tries three rates of a method, then further ones while the best is at an end.
Rates and recipe are chosen by validation accuracy alone, so each pair of data and backbone has more
images for validation than train.py would split off; the test set isn't read. The default rates were
fixed on HALVES["rule"]; the runs of HALVES["confirm"] came after that. HALVES["sharp"] has images
of the size that backbones are made for; train.fit_to_backbone comes from it.

Until 27 November 2026 the images of pets370 and digits were drawn before their test images were
split off, so these were among them; pets had 5 and 4, at 224 and 112 px 5 and 5 images per class.
So pets148-clip112 has other images than the rows of pets-clip112.

Each row of the .csv is one run; its recipe lists further options that aren't at their defaults.
The defaults changed over time, so a row names the commit of the code; each of the first 461 names
the commit that added it. Runs that the .csv holds aren't repeated, so a stopped grid can be
continued.
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import run_tables
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train

COLUMNS = ("pair", "method", "epochs", "lr", "recipe", "seed", "val_accuracy", "seconds", "commit")
METHODS = {
    "head": ["--method", "head"],
    "adaptertune": ["--method", "adaptertune", "--rank", "8"],
    "adaptertune-r64": ["--method", "adaptertune", "--rank", "64"],
    "adaptformer-r64": ["--method", "adaptformer", "--rank", "64"],
    "adaptformer-r8": ["--method", "adaptformer", "--rank", "8"],
    "vpt": ["--method", "vpt"],
    "full": ["--method", "full"],
}
RATES = ("6e-4", "1.2e-3", "2.5e-3", "5e-3", "1e-2", "2e-2", "4e-2")
FULL_RATES = ("3e-5", "6e-5", "1.2e-4", "2.5e-4", "5e-4", "1e-3", "2e-3")  # for the backbone too
# Data, training images per class, validation images per class, weights, image size.
PAIRS = {
    "pets-deit": ("pets370", 4, 4, "deit", 64),
    "digits-micro": ("digits", 20, 50, "micro", 32),
    "cifar1000-small": ("cifar100", 10, 5, "small", 32),
    "coarse300-deit": ("coarse", 15, 25, "deit", 48),
    "flowers-clip": ("flowers12", 8, 10, "clip", 48),
    "flowers-deit": ("flowers12", 15, 20, "deit", 64),
    "coarse300-small": ("coarse", 15, 25, "small", 32),
    "digits-deit": ("digits", 20, 50, "deit", 32),
    "flowers-small": ("flowers12", 15, 20, "small", 32),
    "pets-deit224": ("pets370", 4, 4, "deit", 224),
    "flowers-deit224": ("flowers12", 20, 40, "deit", 224),
    "cifar1000-deit224": ("cifar100", 10, 10, "deit", 224),
    "pets-clip112": ("pets370", 4, 4, "clip", 112),
    "pets148-clip112": ("pets370", 4, 4, "clip", 112),
    "flowers-clip112": ("flowers12", 10, 20, "clip", 112),
}
HALVES = {"rule": list(PAIRS)[:5], "confirm": list(PAIRS)[5:9], "sharp": list(PAIRS)[9:]}


def read_data(name: str, size: int, options: argparse.Namespace) -> data.Dataset:
    """A data set whose `train` holds all images but those of the test set."""
    if name in ("cifar100", "coarse"):
        folder = run_tables.find("cifar100", options)
        dataset = data.read("cifar100", str(folder.parent), offline=True)
        if name == "cifar100":
            return dataset
        classes = [each.decode() for each in data.unpickle(folder / "meta")[b"coarse_label_names"]]
        labels = torch.tensor(data.unpickle(folder / "train")[b"coarse_labels"])
        return replace(dataset, classes=classes, train=replace(dataset.train, labels=labels))
    where = "digits" if name == "digits" else str(run_tables.find(name, options))
    dataset = data.split(data.read(where, image_size=size))
    return replace(dataset, train=replace(dataset, test=None).everything)


def make_pair(name: str, seed: str, options: argparse.Namespace) -> tuple[list[str], data.Dataset]:
    """The options of train.py for a pair, and its data set, split by the seed."""
    kind, shots, choose, weights, size = PAIRS[name]
    dataset = read_data(kind, size, options)
    trained, rest = data.sample_shots(dataset.train, shots, f"rates/{seed}")
    val, _ = data.sample_shots(rest, choose, f"rates/{seed}")
    dataset = replace(dataset, train=trained, val=val, test=val[torch.arange(1)])
    if weights == "micro":
        backbone = ["--backbone", "vit_micro"]
    else:
        backbone = ["--weights", str(run_tables.find(weights, options))]
    if weights == "small":
        backbone += ["--heads", "4"]
    return [*backbone, "--image-size", str(size)], dataset


def ladder(method: str) -> tuple[str, ...]:
    """The rates that may be tried for a method, ascending."""
    return FULL_RATES if method == "full" else RATES


def climb(method: str, accuracy: Callable[[str], float]) -> None:
    """Try three rates, then further ones while the best is at an end of those tried."""
    rates = ladder(method)
    low, high = 2, 4
    while True:
        tried = [accuracy(rate) for rate in rates[low : high + 1]]
        best = tried.index(max(tried))
        if best == 0 and low > 0:
            low -= 1
        elif best == high - low and high + 1 < len(rates):
            high += 1
        else:
            return


def train_once(run: dict[str, str], options: argparse.Namespace) -> dict:
    """Train one run, and return its result.json."""
    backbone, dataset = make_pair(run["pair"], run["seed"], options)
    train.read_dataset = lambda *_: dataset
    arguments = [*backbone, *METHODS[run["method"]], *run["recipe"].split()]
    arguments += ["--lr", run["lr"], "--seeds", run["seed"]]
    if run["epochs"] != "0":
        arguments += ["--epochs", run["epochs"]]
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        place = "digits" if dataset.name == "digits" else folder
        (chosen,) = train.parse(["--dataset", place, *arguments])
        return train.train_run(chosen)


def measure(run: dict[str, str], options: argparse.Namespace, rate: str) -> float:
    """Validation accuracy of a run with this rate, from the .csv or by training it now."""
    run = run | {"lr": rate}
    for row in run_tables.read_rows(options.out, COLUMNS):
        if run.items() <= row.items():  # the same run
            return float(row["val_accuracy"])
    commit = run_tables.commit()
    try:
        result = train_once(run, options)
    except ValueError as error:
        if not str(error).startswith("the loss became"):
            raise
        print(error, flush=True)  # divergence is a result, too
        result = {"val_accuracy": 0.0, "seconds": 0.0}
    accuracy = round(result["val_accuracy"], 2)
    row = run | {"val_accuracy": f"{accuracy:.2f}", "seconds": f"{result['seconds']:.1f}"}
    run_tables.add_row(options.out, row | {"commit": commit})
    return accuracy


def accuracies(rows: list[dict[str, str]], pair: str, method: str) -> dict[str, tuple[float, str]]:
    """By rate: the accuracy with seed 0, and "*" if only tried with --head-lr at that rate."""
    found = {}
    for row in rows:
        if (row["pair"], row["method"], row["seed"]) != (pair, method, "0"):
            continue
        rate = row["lr"]
        if not row["recipe"]:
            found[rate] = (float(row["val_accuracy"]), "")
        elif row["recipe"] == f"--head-lr {rate}":
            found.setdefault(rate, (float(row["val_accuracy"]), "*"))
    return found


def print_tables(rows: list[dict[str, str]]) -> None:
    """Print the accuracy of every rate, and what each method's default rate, that of narrow
    backbones, loses to the best on the pairs on which others were tried too."""
    summary = []
    for method in METHODS:
        name, _, rank = method.partition("-r")
        default = f"{train.default_rate(name, int(rank or 8)):g}"
        rates = ladder(method)
        print(f"\n| `{method}` | {' | '.join(rates)} |\n|---|{'--:|' * len(rates)}")
        lost = {}
        for pair in PAIRS:
            found = accuracies(rows, pair, method)
            cells = [
                f"{found[rate][0]:.1f}{found[rate][1]}" if rate in found else "" for rate in rates
            ]
            if found:
                print(f"| {pair} | {' | '.join(cells)} |")
            for rate, (accuracy, _) in found.items():
                known = len(found) > 1 and pair not in HALVES["sharp"]
                if known and f"{float(rate):g}" == default:
                    lost[pair] = max(found.values())[0] - accuracy
        if lost:
            worst = max(lost, key=lost.get)
            mean = statistics.mean(lost.values())
            others = [loss for pair, loss in lost.items() if pair in HALVES["confirm"]]
            others = statistics.mean(others) if others else math.nan
            row = f"{len(lost)} | {mean:.2f} | {others:.2f} | {lost[worst]:.1f} ({worst})"
            summary.append(f"| `{method}` | {default} | {row} |")
    print("\n| | default rate | pairs | mean loss | mean loss on the four others | largest |")
    print("|---|--:|--:|--:|--:|--:|")
    print("\n".join(summary))


def main() -> None:
    parser = run_tables.make_parser(__doc__, out="rates.csv", seeds="0")
    parser.add_argument("--half", choices=HALVES, default="rule")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="+")
    parser.add_argument("--recipe", default="", help="further options of train.py")
    parser.add_argument("--epochs", default="0", help="0: train.py's default")
    options = parser.parse_args()
    if options.table:
        print_tables(run_tables.read_rows(options.out, COLUMNS))
        return
    run_tables.begin(options.out, COLUMNS)
    pairs = options.pairs or HALVES[options.half]
    for seed, pair, method in itertools.product(options.seeds, pairs, options.methods):
        run = {"pair": pair, "method": method, "epochs": options.epochs, "lr": ""}
        run |= {"recipe": options.recipe, "seed": str(seed)}
        accuracy = functools.partial(measure, run, options)
        if options.rates:
            for rate in options.rates:
                accuracy(rate)
        else:
            climb(method, accuracy)


if __name__ == "__main__":
    run_tables.call(main)
