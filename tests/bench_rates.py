"""Which learning rate is best, by method and task: runs of train.py over a grid of rates.

    python tests/bench_rates.py --real DIR --restored DIR --pairs pets-deit digits-micro
                                --seeds 0,1 --out rates.csv

Rates are to be chosen by validation accuracy alone. A row of the .csv is one run. Runs that it
holds already aren't repeated, so that a stopped grid goes on. DIR are the folders that test_real.py
names (published weights and photos; CIFAR-100 and CLIP's image tower).
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "pair",
    "method",
    "epochs",
    "lr",
    "seed",
    "val_accuracy",
    "trained",
    "seconds",
)
KEY = ("pair", "method", "epochs", "lr", "seed")  # the columns that say which run it is
METHODS = {
    "head": ["--method", "head"],
    "adaptertune": ["--method", "adaptertune", "--rank", "8"],
    "adaptformer-r64": ["--method", "adaptformer", "--rank", "64"],
    "adaptformer-r8": ["--method", "adaptformer", "--rank", "8"],
    "vpt": ["--method", "vpt"],
    "full": ["--method", "full"],
}
RATES = (3e-4, 6e-4, 1.2e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
FULL_RATES = (3e-5, 6e-5, 1.2e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)  # of the backbone too


def pair_options(real: Path, restored: Path) -> dict[str, list[str]]:
    """The options of train.py for each pair of data and backbone."""
    deit = ["--weights", f"{real}/weights/deit_tiny_patch16_224.safetensors"]
    small = ["--weights", f"{real}/weights/vit_cifar10_p4_d128_l4_h4.safetensors", "--heads", "4"]
    cifar = ["--dataset", "cifar100", "--data-dir", f"{restored}", "--offline"]
    pets = ["--dataset", f"{real}/data/pets370"]
    flowers = ["--dataset", f"{real}/data/flowers12"]
    return {
        "pets-deit": [*pets, *deit, "--image-size", "112"],
        "cifar2000-deit": [*cifar, "--limit", "2000", *deit, "--image-size", "64"],
        "cifar400-small": [*cifar, "--limit", "400", *small],
        "digits-micro": ["--dataset", "digits"],
        "cifar2000-small": [*cifar, "--limit", "2000", *small],
        "flowers-deit": [*flowers, *deit, "--image-size", "112"],
    }


def grid(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """What says which run it is (KEY), for each run of the grid; one seed after the other."""
    for seed in options.seeds.split(","):
        for pair in options.pairs:
            for method in options.methods:
                rates = FULL_RATES if method == "full" else RATES
                for rate in rates:
                    values = (pair, method, options.epochs, str(rate), seed)
                    yield dict(zip(KEY, values, strict=True))


def train_once(arguments: list[str]) -> dict | None:
    """A run's result.json, with its number of epochs; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *arguments, "--name", "bench"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            print(f"failed: {' '.join(command)}\n{done.stderr}", file=sys.stderr)
            return None
        run = Path(folder) / "runs" / "bench"
        result = json.loads((run / "result.json").read_text())
        config = json.loads((run / "config.json").read_text())
        return result | {"epochs": config["epochs"]}


def read_done(path: Path) -> set[tuple[str, ...]]:
    """Which runs the .csv holds already. A new one is made with a header."""
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
        return set()
    done = set()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            done.add(tuple(row[name] for name in KEY))
    return done


def append(path: Path, row: dict) -> None:
    """Add a run to the .csv."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", required=True)
    parser.add_argument("--restored", required=True)
    parser.add_argument("--pairs", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", default="10")
    parser.add_argument("--out", default="rates.csv")
    options = parser.parse_args()
    of_pair = pair_options(Path(options.real).resolve(), Path(options.restored).resolve())
    path = Path(options.out)
    done = read_done(path)
    for run in grid(options):
        if tuple(run.values()) in done:
            continue
        arguments = [*of_pair[run["pair"]], *METHODS[run["method"]]]
        arguments += ["--epochs", run["epochs"], "--lr", run["lr"], "--seeds", run["seed"]]
        result = train_once(arguments)
        if result is None:
            continue
        append(path, result | run | {"epochs": result["epochs"]})
        rate = f"{float(run['lr']):<8g}"
        name = f"{run['pair']:16} {run['method']:16} {rate} seed {run['seed']}"
        print(f"{name}: val {result['val_accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
