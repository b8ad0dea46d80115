"""CSV tables of training runs, continued by the same command; the paths of published files.

bench_pairs.py, bench_rates.py and bench_tokens.py take options, paths and tables from here. A row
is a run; a run that the table already holds isn't repeated.
"""

import argparse
import contextlib
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Name: the option that gives its folder, and the path in that folder. See test_real.py.
PUBLISHED = {
    "cifar100": ("restored", "cifar-100-python"),
    "flowers12": ("real", "data/flowers12"),
    "pets370": ("real", "data/pets370"),
    "clip": ("restored", "clip_vitb16_visual.safetensors"),
    "deit": ("real", "weights/deit_tiny_patch16_224.safetensors"),
    "small": ("real", "weights/vit_cifar10_p4_d128_l4_h4.safetensors"),
}


def integers(text: str) -> list[int]:
    """Option type: integers separated by commas."""
    return [int(part) for part in text.split(",")]


def make_parser(description: str, out: str, seeds: str) -> argparse.ArgumentParser:
    """A parser with the options that all tables of runs share, and their defaults."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # it is in the description; this keeps errors to one line
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = {"type": Path, "default": Path(), "metavar": "DIR"}
    parser.add_argument("--real", **folder, help="published weights and photos, see test_real.py")
    parser.add_argument("--restored", **folder, help="CIFAR-100 and CLIP's image tower, see there")
    parser.add_argument("--seeds", type=integers, default=seeds, metavar="I,…", help=f"({seeds})")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"table ({out})")
    parser.add_argument("--table", action="store_true", help="print what --out holds")
    return parser


def find(name: str, options: argparse.Namespace) -> Path:
    """The path of published weights or images. FileNotFoundError if it doesn't exist."""
    option, place = PUBLISHED[name]
    path = (getattr(options, option) / place).resolve()
    if not path.exists():
        hint = f"give the folder that has {place} as --{option}"
        raise FileNotFoundError(f"there is no {path}; {hint}")
    return path


def begin(path: Path, columns: tuple[str, ...]) -> None:
    """Create a table without rows, unless the file exists."""
    if not path.exists():
        path.write_text(",".join(columns) + "\n")


def read_rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The runs in a table. ValueError if the columns differ or the last row is cut off."""
    text = path.read_text()
    lines = text.splitlines()
    if lines[:1] != [",".join(columns)]:
        raise ValueError(f"{path} doesn't begin with {','.join(columns)}; give another --out")
    if not text.endswith("\n"):
        raise ValueError(f"the last row of {path} has no end; complete or delete it")
    return list(csv.DictReader(lines))


def add_row(path: Path, row: dict) -> None:
    """Add a run to a table, and print it."""
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(row.values())
    print(*row.values(), flush=True)


def commit() -> str:
    """The repository's commit, shortened, with "+" if files other than those of assets/results were
    changed since; "" without git."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = [*git, "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, check=True).stdout.decode().strip()
        command = [*git, "diff", "--quiet", "HEAD", "--", ":!assets/results"]
        changed = subprocess.run(command, capture_output=True, check=False).returncode
        return f"{found}+" if changed else found
    return ""


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation; for one value the mean alone, for none ""."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    return text


def call(main: Callable[[], None]) -> None:
    """Run a benchmark; an error or Ctrl-C ends it with one line."""
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
