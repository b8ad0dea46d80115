"""Methods side by side at 224 px, every option at its default: the tables of assets/results.

    python tests/bench_pairs.py --real DIR --restored DIR --out pairs.csv [--work DIR]
                                [--pairs flowers12-deit] [--methods full] [--seeds 0,1] [--jobs 2]
    python tests/bench_pairs.py --table --out pairs.csv

Each run is a command of train.py in the work folder, where its log is left, too. A run that the
.csv holds isn't repeated, and one that was stopped goes on, so the same command finishes what was
interrupted. --jobs is how many run at once; each has its share of the CPU's threads. DIR are the
folders that test_real.py names (published weights and photos; CIFAR-100 and CLIP's image tower).
"""

import argparse
import concurrent.futures
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

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
    "cifar100-deit": ("cifar100", "deit", ["--epochs", "10"]),
}
COLUMNS = ("pair", "method", "seed", "trained", "val_accuracy", "test_accuracy", "made_with")
KEY = COLUMNS[:3]  # the columns that say which run it is
writing = threading.Lock()  # of the .csv


def options_of(pair: str, method: str, seed: int, options: argparse.Namespace) -> list[str]:
    """What train.py is called with."""
    dataset, weights, more = PAIRS[pair]
    files = {
        "deit": options.real / "weights" / "deit_tiny_patch16_224.safetensors",
        "clip": options.restored / "clip_vitb16_visual.safetensors",
    }
    found = ["--dataset", str(options.real / "data" / dataset)]
    if dataset == "cifar100":
        found = ["--dataset", dataset, "--data-dir", str(options.restored), "--offline"]
    found += ["--weights", str(files[weights]), *more, *METHODS[method], "--seed", str(seed)]
    return [*found, "--name", f"{pair}-{method}-s{seed}", "--resume"]


def train(pair: str, method: str, seed: int, options: argparse.Namespace) -> None:
    """Make one run, or finish it, and add its row to the .csv."""
    name = f"{pair}-{method}-s{seed}"
    command = [sys.executable, str(ROOT / "train.py"), *options_of(pair, method, seed, options)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // options.jobs))
    with (options.work / f"{name}.log").open("a") as log:
        subprocess.run(
            command,
            cwd=options.work,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    written = options.work / "runs" / name / "result.json"
    if not written.exists():
        print(f"{name} has no result; see {options.work / name}.log", flush=True)
        return
    result = json.loads(written.read_text())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    row = [pair, method, seed, result["trained"]]
    row += [f"{result[key]:.2f}" for key in ("val_accuracy", "test_accuracy")]
    row += [f"torch {torch.__version__}, {device}"]
    with writing, options.out.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
    print(*row, flush=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The runs that a .csv holds."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def print_table(path: Path) -> None:
    """Print test accuracy by pair and method: mean ± standard deviation over seeds, and how many
    seeds if not three."""
    rows = read_rows(path)
    print(f"| | {' | '.join(METHODS)} |\n|---|{'--:|' * len(METHODS)}")
    for pair in PAIRS:
        cells = []
        for method in METHODS:
            tests = [
                float(row["test_accuracy"])
                for row in rows
                if (row["pair"], row["method"]) == (pair, method)
            ]
            cell = ""
            if tests:
                cell = f"{statistics.mean(tests):.2f}"
            if len(tests) > 1:
                cell += f" ± {statistics.stdev(tests):.2f}"
            if len(tests) in (1, 2):
                cell += f" ({len(tests)})"
            cells.append(cell)
        if any(cells):
            print(f"| {pair} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=lambda name: Path(name).resolve())
    parser.add_argument("--restored", type=lambda name: Path(name).resolve())
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--work", type=Path, default=Path(), help="where the runs are left")
    parser.add_argument("--out", type=Path, default=Path("pairs.csv"))
    parser.add_argument("--table", action="store_true", help="print what --out holds")
    options = parser.parse_args()
    if options.table:
        print_table(options.out)
        return
    if not options.out.exists():
        options.out.write_text(",".join(COLUMNS) + "\n")
    done = {tuple(row[name] for name in KEY) for row in read_rows(options.out)}
    options.work.mkdir(parents=True, exist_ok=True)
    runs = itertools.product(options.seeds.split(","), options.pairs, options.methods)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(train, pair, method, int(seed), options)
            for seed, pair, method in runs
            if (pair, method, seed) not in done
        ]
        try:
            for each in concurrent.futures.as_completed(waiting):
                each.result()
        except BaseException:  # Ctrl-C, which the runs have got too
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
