"""Methods side by side, other options at their defaults: the tables of assets/results.

    python tests/bench_pairs.py --real DIR --restored DIR --out FILE.csv [--work DIR]
                                [--pairs flowers12-deit] [--methods full] [--seeds 0,1] [--jobs 2]
    python tests/bench_pairs.py --table --out assets/results/pairs.csv

Each run is a train.py command in the work folder, which also gets its log. Runs that the .csv holds
aren't repeated, and an interrupted run is resumed, so the same command continues an interrupted
table. --jobs is the number of parallel runs; each gets its share of the CPU's threads. A run that
fails gets no row, and the others continue.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import run_tables
import torch

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "head": ["--method", "head"],
    "adaptertune-r8": ["--method", "adaptertune", "--rank", "8"],
    "adaptertune-r64": ["--method", "adaptertune", "--rank", "64"],
    "adaptformer-r8": ["--method", "adaptformer", "--rank", "8"],
    "adaptformer-r64": ["--method", "adaptformer", "--rank", "64"],
    "full": ["--method", "full"],
}
# Data, weights, further options.
PAIRS = {
    "pets370-deit": ("pets370", "deit", []),
    "pets370-clip": ("pets370", "clip", []),
    "flowers12-deit": ("flowers12", "deit", []),
    "flowers12-clip": ("flowers12", "clip", []),
    "cifar5000-deit": ("cifar100", "deit", ["--limit", "5000"]),
    "cifar5000-clip": ("cifar100", "clip", ["--limit", "5000"]),
    # A CPU takes a quarter of the time for CLIP at 112 px.
    "pets370-clip112": ("pets370", "clip", ["--image-size", "112"]),
    "flowers12-clip112": ("flowers12", "clip", ["--image-size", "112"]),
    "cifar5000-clip112": ("cifar100", "clip", ["--limit", "5000", "--image-size", "112"]),
    "cifar100-deit": ("cifar100", "deit", ["--epochs", "10"]),
}
COLUMNS = ("pair", "method", "seed", "trained", "val_accuracy", "test_accuracy", "made_with")
writing = threading.Lock()  # held while the .csv is written


def options_of(pair: str, method: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The arguments of train.py, except the run's name."""
    images, weights, more = PAIRS[pair]
    place = run_tables.find(images, options)
    dataset = ["--dataset", str(place)]
    if images == "cifar100":
        dataset = ["--dataset", images, "--data-dir", str(place.parent), "--offline"]
    weights = ["--weights", str(run_tables.find(weights, options))]
    return [*dataset, *weights, *more, *METHODS[method], "--seed", str(seed), "--resume"]


def train(run: tuple[str, str, int], arguments: list[str], options: argparse.Namespace) -> bool:
    """Start or resume one run, and add its row to the .csv. False if it failed."""
    pair, method, seed = run
    name = f"{pair}-{method}-s{seed}"
    threads = str(max(1, len(os.sched_getaffinity(0)) // options.jobs))
    log = options.work / f"{name}.log"
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments, "--name", name],
            cwd=options.work,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        lines = log.read_text().splitlines()
        print(f"{name} has no result; {log} ends: {''.join(lines[-1:])}", flush=True)
        return False
    result = json.loads((options.work / "runs" / name / "result.json").read_text())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row = {"pair": pair, "method": method, "seed": seed, "trained": result["trained"]}
    for part in ("val_accuracy", "test_accuracy"):
        row[part] = f"{result[part]:.4f}"
    row["made_with"] = f"torch {torch.__version__}, {device}"
    with writing:
        run_tables.add_row(options.out, row)
    return True


def print_table(options: argparse.Namespace) -> None:
    """Print test accuracy by pair and method: mean ± standard deviation over seeds, and the number
    of seeds if it isn't three."""
    rows = run_tables.read_rows(options.out, COLUMNS)
    print(f"| | {' | '.join(options.methods)} |\n|---|{'--:|' * len(options.methods)}")
    for pair in options.pairs:
        cells = []
        for method in options.methods:
            tests = [
                float(row["test_accuracy"])
                for row in rows
                if (row["pair"], row["method"]) == (pair, method)
            ]
            cell = run_tables.mean_and_spread(tests)
            if len(tests) not in (0, 3):
                cell += f" ({len(tests)})"
            cells.append(cell)
        if any(cells):
            print(f"| {pair} | {' | '.join(cells)} |")


def main() -> None:
    parser = run_tables.make_parser(__doc__, out="pairs.csv", seeds="0,1,2")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel runs (1)")
    parser.add_argument("--work", type=Path, default=Path(), help="where to keep the runs (here)")
    options = parser.parse_args()
    if options.table:
        print_table(options)
        return
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give 1 or more")
    run_tables.begin(options.out, COLUMNS)
    rows = run_tables.read_rows(options.out, COLUMNS)
    done = {(row["pair"], row["method"], row["seed"]) for row in rows}
    missing = {}  # by run: the arguments of train.py
    for seed, pair, method in itertools.product(options.seeds, options.pairs, options.methods):
        if (pair, method, str(seed)) not in done:
            missing[pair, method, seed] = options_of(pair, method, seed, options)
    options.work.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        # Ctrl-C, which the runs receive too, cancels those that haven't started.
        succeeded = list(pool.map(lambda item: train(*item, options), missing.items()))
    if not all(succeeded):
        failed = f"{succeeded.count(False)} of {len(succeeded)} runs failed"
        sys.exit(f"{failed}; the same command tries them again")


if __name__ == "__main__":
    run_tables.call(main)
