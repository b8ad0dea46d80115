"""The command line: the options of train.py, and what runs and graphs show, as lines, tables and pictures.

Several values of an option are a grid of runs (`expand`), which end in one table (`compare`). Pictures are SVG, written by hand
(`svg`): a run's curves, accuracy over rank or over what was trained, what the head sees of the test images and who is taken for
whom (`look`), and the spectrum that tells how much rank a task needs (`spectra`).
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import html
import itertools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import adaptertune
import data
import vit

if TYPE_CHECKING:
    import train

# Peak learning rates, in general and for vit_micro. The paper's for adapters is 1e-3, for thousands of steps; the head's is
# from DeiT-tiny on 2,000 images of CIFAR-100 (README.md), vit_micro's are from the validation images of digits, CLIP-Adapter's
# from those of flowers (assets/results).
RATES = {"adaptertune": (1e-3, 5e-3), "adaptformer": (1e-3, 5e-3), "vpt": (1e-2, 5e-2), "clip-adapter": (3e-3, 3e-3),
         "zero-shot": (1e-3, 1e-3), "head": (1e-2, 1e-2), "full": (1e-4, 5e-4), "scratch": (1e-3, 1e-3)}
GRID = ("method", "rank", "every", "blocks", "init")  # options that may have several values, each with each
COLUMNS = ("epoch", "loss", "train%", "val%", "img/s", "elapsed", "left")


# ----------------------------------------------------------------------------------------------------------- options


def parse(arguments: list[str] | None = None) -> list[argparse.Namespace]:
    """The options of each run but for its seed; wrong usage prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(
        description="Adapt a frozen Vision Transformer by zero-initialised low-rank adapters.", allow_abbrev=False,
        epilog="Without arguments: the embedded digits on the embedded vit_micro, offline, within a minute.")
    parser.error = lambda message: parser.exit(2, f"error: {message}; python train.py --help lists all options\n")
    add = parser.add_argument_group("task").add_argument
    add("--dataset", default="digits", metavar="NAME", help=f"{', '.join(data.DATASETS)}, or a folder (default digits)")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to (default data)")
    add("--limit", type=int, default=0, metavar="N", help="a quick look: train on N images, choose by N/4 (default 0, all)")
    add("--shots", type=int, default=0, metavar="K", help="train on K images of each class (default 0, all)")
    add("--test-share", type=float, default=0.0, metavar="P", help="share of a folder without test/ that becomes the test set, "
        "drawn by seed (default 0: a fifth, the same for all seeds)")
    add("--offline", action="store_true", help="never use the network")
    add = parser.add_argument_group("backbone").add_argument
    add("--backbone", choices=vit.BACKBONES, metavar="NAME", default="", help=f"{', '.join(vit.BACKBONES)} (default vit_s16; "
        "vit_micro for digits)")
    add("--weights", default="", metavar="FILE", help="a .safetensors or .pth file instead of the download")
    add("--heads", type=int, default=0, metavar="N", help="attention heads of --weights (default 0: 64 channels each)")
    add("--image-size", type=int, default=0, metavar="PIXELS", help="side of the input (default 0: the backbone's own)")
    add_method_options(parser)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=0, metavar="N", help="passes over the training images (default 10; digits 12; "
        "cached features 100)")
    add("--cached", action="store_true", default=None, help="train on features that are computed once, without augmentation: "
        "head (clip-adapter and zero-shot always do)")
    add("--batch", type=int, default=0, metavar="N", help="images in a step (default 128; 32 if there are less than 5,000)")
    add("--lr", type=float, default=0.0, metavar="LR", help="peak learning rate (default by method and backbone)")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="on weight matrices only (default 0.05; 0 for off)")
    add("--label-smoothing", type=float, default=0.0, metavar="P", help="0 to 1 (default 0, off)")
    add("--min-scale", type=float, default=0.0, metavar="A", help="least area of a training crop (default 0.08, digits 0.85)")
    add("--seeds", type=integers, default=[0], metavar="I,J,…", help="a run for each, mean and spread at the end (default 0)")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="bf16 where it is faster (default), always or never")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default auto: cuda if there is one)")
    add = parser.add_argument_group("run").add_argument
    add("--name", default="", help="folder below runs/ (default from data set, method, rank and seed)")
    add("--resume", action="store_true", help="go on with stopped runs; finished ones are kept as they are")
    add("--eval", default="", metavar="runs/NAME", help="don't train: load a finished run and read its test set again")
    add("--spectrum", action="store_true", help="don't train: say how much rank the task needs, from one pass over its images")
    add("--plot", choices=("features",), help="draw what the head sees of the test images, and who is taken for whom")
    options = parser.parse_args(arguments)
    if options.eval:  # the run's own options, unless the command line says otherwise
        if not (saved := Path(options.eval) / "config.json").is_file():
            parser.error(f"no run in {options.eval}: {saved} is missing")
        saved = json.loads(saved.read_text())
        parser.set_defaults(**saved | {name: [saved[name]] for name in GRID if name in saved})
        options = parser.parse_args(arguments)
    return [complete(each, parser) for each in expand(options)]


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """The options that belong to methods; None stands for the method's own default."""
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=[each for each in RATES if each != "scratch"], nargs="+", default=["adaptertune"], metavar="NAME",
        help=f"{', '.join(list(RATES)[:-1])}; several are compared (default adaptertune)")
    add("--scratch", dest="method", action="store_const", const=["scratch"], help="train all of --backbone from random weights")
    add("--rank", "--ranks", type=ranks, default=[None], metavar="R,…", help="width of the bottlenecks, "
        f"several are compared; auto asks --spectrum ({by_method('rank')}: a quarter of the embedding)")
    add("--every", type=integers, default=[1], metavar="K,…", help="an adapter in every K-th block (default 1)")
    add("--blocks", type=placement, default=[None], nargs="+", metavar="I,J,…", help="adapters in these blocks, counted "
        "from 0, or first6, last6 (default all); several sets with spaces between are compared")
    add("--adapter-input", dest="reads", choices=adaptertune.READS, help="what adapters read: the block's output, the MLP's "
        f"input before (raw) or after its LayerNorm (ln), or the MLP's output ({by_method('reads')})")
    add("--adapter-act", dest="act", choices=(*adaptertune.ACTS, "mlp"), help="their nonlinearity, mlp for that of the "
        f"block's MLP ({by_method('act')}); adapters that read ln through it cost next to nothing once exported")
    add("--init", type=lambda text: text.split(","), default=[None], metavar="zero|small|FILE", help="up-projection: zeros "
        "(default) or N(0, 1e-4²); or the adapters of a file, ours or AdaptFormer's")
    add("--scale", type=float, metavar="S", help=f"factor of the adapters' output ({by_method('scale')})")
    add("--learn-scale", action="store_true", default=None, help="train that factor, one for each adapter")
    add("--dropout", type=float, metavar="P", help=f"dropout inside the adapters, 0 for off ({by_method('dropout')})")
    add("--prompts", type=int, metavar="N", help=f"vpt's tokens in a block ({by_method('prompts')})")
    add("--shallow", dest="deep", action="store_false", default=None, help="vpt: prompts enter at the first block alone")
    add = parser.add_argument_group("clip-adapter, zero-shot").add_argument
    add("--ratio", type=float, metavar="A", help="share of the image adapter, 0 for none (default 0.2; 0.6 if fine-grained)")
    add("--text-ratio", type=float, metavar="B", help="share of the text adapter (default 0, none)")
    add("--learn-ratio", action="store_true", default=None, help="train those that aren't 0")
    add("--classifier", choices=("text", "prototypes"), help="class embeddings from their names (default) or training images")
    add("--template", default="", help='such as "a photo of a {}." (default by data set, as published)')
    add("--text-weights", default="", metavar="FILE", help="CLIP's text tower (default: in the backbone's file)")
    add("--vocab", default="", metavar="FILE", help="merges.txt or bpe_simple_vocab_16e6.txt.gz (default: beside the weights)")


def expand(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each run of the grid; `label` says what is its own."""
    runs = []
    for values in itertools.product(*(getattr(options, name) for name in GRID)):
        run = dict(zip(GRID, values, strict=True))
        own = adaptertune.METHODS[run["method"]]
        run |= {"rank": None} if "rank" not in own else {}
        run |= {"every": 1, "blocks": None, "init": None} if "reads" not in own else {}
        runs += [run] * (run not in runs)
    varied = [name for name in GRID if any(run[name] != runs[0][name] for run in runs)]
    for run in runs:
        parts = [str(run[name]) if name in ("method", "init") else f"{name} {run[name]}" for name in varied if run[name]]
        run["label"] = " ".join(parts)
    return [argparse.Namespace(**vars(options) | run) for run in runs]


def by_method(name: str) -> str:
    """The defaults of a method's option, for its help."""
    return "default " + ", ".join(f"{method} {own[name]}" for method, own in adaptertune.METHODS.items() if name in own)


def complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Fill in the defaults that depend on other options, and refuse what can't be."""
    ranges = {"limit": (0, 1e9), "heads": (0, 1e4), "image_size": (0, 1e5), "epochs": (0, 1e6), "batch": (0, 1e6),
              "lr": (0, 1e3), "weight_decay": (0, 1e3), "label_smoothing": (0, 1), "min_scale": (0, 1), "dropout": (0, 1),
              "shots": (0, 1e6), "test_share": (0, 0.9), "ratio": (0, 1), "text_ratio": (0, 1), "prompts": (1, 1e4),
              "rank": (0, 1e4)}
    own = adaptertune.METHODS[options.method]
    for name, value in own.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, (low, high) in ranges.items():
        if (value := getattr(options, name)) not in (None, "auto") and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value} is not between {low:g} and {high:,.9g}")
    if "init" in own and options.init not in ("zero", "small") and not Path(options.init).is_file():
        parser.error(f"--init {options.init}: choose zero, small or a file with adapters")
    options.cached = bool("classifier" in own or (options.cached and options.method == "head"))
    if options.limit and options.shots:
        parser.error("--limit and --shots both choose the training images; give one")
    if options.method == "scratch" and options.weights:
        parser.error("--scratch starts from random weights; leave out --weights, or use --method full")
    if not options.backbone and not options.weights:
        options.backbone = "vit_micro" if options.dataset == "digits" else "vit_s16"
    options.epochs = options.epochs or (100 if options.cached else 12 if options.dataset == "digits" else 10)
    options.lr = options.lr or RATES[options.method][options.backbone == "vit_micro"]
    if options.method == "zero-shot":
        options.epochs = 0
    return options


def integers(text: str) -> list[int]:
    """Option type: integers with commas between."""
    return [int(part) for part in text.split(",")]


def ranks(text: str) -> list[int | str]:
    """Option type: "auto", or integers."""
    return ["auto"] if text == "auto" else integers(text)


def placement(text: str) -> list[int]:
    """Option type: blocks counted from 0; first6 and last6 (-6 to -1) for the first and the last 6."""
    if match := re.fullmatch(r"(first|last)(\d+)", text):
        return list(range(int(match[2])) if match[1] == "first" else range(-int(match[2]), 0))
    return integers(text)


# -------------------------------------------------------------------------------------------------- on the terminal


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """The most memory in GiB in use since the last `reset`: the GPU's, else the process's (0 where the system doesn't tell)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20 if status.exists() else 0.0


def describe(run: train.Run) -> None:
    """The lines above the table: where it runs, what is frozen, what is trained, on what."""
    numbers, images = adaptertune.count(run.model), run.data
    where = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"env      torch {torch.__version__} · {run.device.type} {where} · {'bf16' if run.bf16 else 'fp32'} · seed", run.seed)
    print(f"backbone {run.meta['backbone']} {run.meta['image_size']}px, {numbers['frozen']:,} frozen")
    parts = ", ".join(f"{part} {numbers[part]:,}" for part in ("adapters", "head", "backbone") if numbers[part])
    total = sum(numbers.values()) - numbers["frozen"]
    print(f"trained  {total:,} ({100 * total / sum(numbers.values()):.2f} %)" + f": {parts}" * bool(parts))
    train, val = (f"{len(part):,} of {n:,}" if len(part) < n else f"{len(part):,}"
                  for part, n in zip((images.train, images.val), images.whole, strict=True))
    print(f"data     {images.name}: {train} train / {val} val / {len(images.test):,} test, {len(images.classes)} classes"
          + " (--limit: a quick look, not the data set's result)" * bool(run.options.limit))


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    """One aligned row of the table of epochs."""
    print("".join(f"{cell:>{width}}" for cell, width in zip(cells, (6, 8, 9, 8, 9, 10, 10), strict=True)), flush=True)


def conclude(run: train.Run, result: dict) -> None:
    """Draw the run's curves and print the lines below the table."""
    state, path, rows = run.state, run.folder / "adapters.safetensors", run.state.rows
    how = "nothing to choose" if not rows else f"epoch {state.best_epoch}, " + (
        "chosen on val; test read once" if len(run.data.val) else "the last, no image being left for val; test read once")
    curves = [{"name": name, "x": [int(row[0]) for row in rows], "y": [float(row[i]) for row in rows], "line": True}
              for i, name in enumerate(COLUMNS[1:4], 1)]
    if rows:
        (run.folder / "curves.svg").write_text(svg([
            {"title": "training loss", "x": "epoch", "series": curves[:1]},
            {"title": "accuracy in %", "x": "epoch", "series": curves[1:], "mark": state.best_epoch}]))
    print(f"\ntest     {result['test_accuracy']:.2f} %   ({how})")
    print(f"cost     {clock(state.train_time)} training, {clock(state.eval_time)} evaluation, peak {result['memory']:.1f} GiB")
    print(f"saved    {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"next     python export.py {run.folder}")


# ------------------------------------------------------------------------------------------------------ several runs


def compare(results: list[tuple[str, dict]], path: Path) -> None:
    """Print a row for each label, mean and standard deviation over its seeds; write a .csv of the runs, and an .svg. Of runs
    that differ in rank alone, name the elbow: the least rank whose mean is within a standard error of the best mean."""
    groups, series, elbows = {}, [], []
    for label, result in results:
        groups.setdefault(label or result["method"], []).append(result)
    width = max(18, *(len(label) + 2 for label in groups))
    print(f"\n{'':<{width}}{'trained':>12}{'test %':>16}{'val %':>9}{'lr':>9}{'time':>8}{'GiB':>7}")
    for label, runs in groups.items():
        tests = [result["test_accuracy"] for result in runs]
        mean, spread = statistics.mean(tests), statistics.stdev(tests) if len(tests) > 1 else 0.0
        val, time, memory = (statistics.mean(math.nan if result[key] is None else result[key] for result in runs)
                             for key in ("val_accuracy", "seconds", "memory"))
        chosen = "-" if math.isnan(val) else f"{val:.2f}"
        rate = f"{runs[0]['lr']:.0e}" if runs[0]["trained"] else "-"
        print(f"{label:<{width}}{runs[0]['trained']:>12,}{f'{mean:.2f} ± {spread:.2f}':>16}{chosen:>9}{rate:>9}{clock(time):>8}"
              f"{memory:>7.2f}")
        series.append({"name": label, "x": [runs[0]["trained"]], "y": [mean], "error": [spread]})
        elbows.append((mean, spread / len(tests) ** 0.5, runs[0].get("rank")))
    print(f"{len(results) // len(groups)} seeds: mean ± standard deviation of the test accuracy; mean time of training")
    panel = {"title": f"{results[0][1]['dataset']} on {results[0][1]['backbone']}: test accuracy in %"}
    if len(groups) > 2 and all(label.startswith("rank ") for label in groups):
        best, error, rank = max(elbows)
        elbow = min(r for mean, _, r in elbows if mean >= best - error)
        print(f"elbow    rank {elbow}, the least within a standard error ({error:.2f}) of the best (rank {rank})")
        ranks = [r for _, _, r in elbows]
        line = {"x": ranks, "line": True} | {name: [each[name][0] for each in series] for name in ("y", "error")}
        panel |= {"x": "rank", "log": True, "ticks": ranks, "mark": elbow, "series": [line]}
    else:
        panel |= {"x": "trained numbers", "log": True, "series": series}
    with path.with_suffix(".csv").open("w", newline="") as file:
        columns = ("label", "method", "rank", "seed", "trained", "test_accuracy", "val_accuracy", "epoch", "lr", "seconds",
                   "memory")
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"label": label, **result} for label, result in results)
    print(f"saved    {path.with_suffix('.csv')}")
    draw(path.with_suffix(".svg"), [panel])


@torch.inference_mode()
def look(runs: Iterable[train.Run], path: Path) -> None:
    """Draw what the heads of finished runs read of the test images, side by side, and who is taken for whom; name the worst."""
    features, confusions = [], []
    for run in runs:
        seen, answers, started = [], [], time.perf_counter()
        run.model.eval()
        for x, _ in run.batches.eval(run.data.test, run.data.center):
            x = run.model.features(x)
            seen.append((run.model.head.embed(x) if "classifier" in run.meta else x).cpu())
            answers.append(run.model.head(x).argmax(dim=-1).cpu())
            data.progress("looking, batch", len(seen), run.batches.count(run.data.test), started)
        names, labels, answers = run.data.classes, run.data.test.labels, torch.cat(answers)
        points, title = flatten(torch.cat(seen)), f"{run.meta['method']}, {run.meta['test_accuracy']:.2f} %"
        features.append({"title": title, "series": [{"name": name, "x": points[labels == i, 0].tolist(), "y": points[
            labels == i, 1].tolist()} for i, name in enumerate(names)]})
        counts = torch.bincount(labels * len(names) + answers, minlength=len(names) ** 2).view(len(names), -1)  # [true, answer]
        confusions.append({"title": title, "cells": counts.tolist(), "names": names})
        wrong = counts - counts.diag().diag()
        for place in wrong.flatten().topk(3).indices.tolist():
            i, k = divmod(place, len(names))
            if n := int(wrong[i, k]):
                print(f"mistaken {run.meta['method']}: {n} of {counts[i].sum()} images of {names[i]!r} for {names[k]!r}")
    for what, panels in (("features", features), ("confusion", confusions)):
        draw(path.with_name(f"{path.name}-{what}.svg"), panels)


def spectra(energy: Tensor, path: Path) -> int:
    """Print and draw how much of the first step's gain each rank takes, from adaptertune.spectrum's `energy` [L, D]. Returns
    the rank that takes 90 % of it, all blocks together; 1 if nothing was found that holds for other images."""
    total, most = energy.sum(dim=0), energy.max(dim=1)[0].clamp(min=1e-12)
    rank = max(1, adaptertune.rank_for(total))
    print(f"\n{'block':>6}{'share %':>9}{'50 % by rank':>14}{'90 % by rank':>14}")
    for i, each in enumerate(energy):
        print(f"{i:>6}{100 * most[i] / most.sum():>9.1f}{adaptertune.rank_for(each, 0.5):>14}{adaptertune.rank_for(each):>14}")
    parts = {"all blocks": total} | {f"block {i}": each for i, each in enumerate(energy)}
    series = [{"name": name, "x": list(range(1, len(y) + 1)), "y": (100 * y / total.max().clamp(min=1e-12)).tolist(),
               "line": True} for name, y in parts.items()]
    draw(path, [{"title": "what a rank can take of the first step, in %", "x": "rank", "log": True, "mark": rank,
                 "ticks": [2 ** i for i in range(len(total).bit_length())], "series": series}])
    return rank


# ------------------------------------------------------------------------------------------------ a graph against torch

# Largest |difference| from torch in fp32; ten times as much with --resize, where pixels differ by 1e-5, and for CLIP's logits,
# which are cosines multiplied by 100.
LIMIT = 1e-4


def pictures(run: train.Run, count: int) -> Iterator[tuple[np.ndarray, torch.Tensor, np.ndarray]]:
    """`count` test images, evenly over the set, as the graph takes them, as torch takes them, and their labels:
    most, 55 at best, one by one, and then seven at a time; or in the graph's own batch."""
    images, (mean, std) = run.data.test, (torch.tensor(values).view(3, 1, 1) for values in run.batches.norm)
    index, N, single = torch.linspace(0, len(images) - 1, count).long(), run.meta["batch"], min(55, 7 * count // 8)
    for part in filter(len, index.split(N) if N else (*index[:single].split(1), *index[single:].split(7))):
        part = part[torch.arange(N or len(part)) % len(part)]  # a fixed batch is filled up
        pixels, labels = images.pixels[part], images.labels[part].numpy()
        x = run.batches.finish(pixels, data.center_boxes(len(part), *pixels.shape[-2:], run.data.center, pixels.device))
        if run.meta["input"] == "uint8" and not run.meta["resize"]:  # whole numbers, for both
            pixels = ((x * std + mean) * 255).round().byte()
            x = (pixels / 255 - mean) / std
        yield x.numpy() if run.meta["input"] == "float" else np.ascontiguousarray(pixels.permute(0, 2, 3, 1)), x, labels


def verify(exact: Callable, graph: Callable, run: train.Run, count: int | None, names: tuple, least: float = 100) -> None:
    """Print how far two functions of these `names` agree on test images, and how long a single image takes them; ValueError if
    less than `least` percent have the same top-1 or, where that is all of them, a |difference| is above LIMIT. An embedding's
    top-1 is what the run's head makes of it."""
    total = min((64 if least == 100 else 1000) if count is None else count or 10 ** 9, len(run.data.test))
    worst, seen, tops, times, started = 0.0, 0, [], [], time.perf_counter()
    limit = LIMIT * (10 if run.meta["resize"] or ("classifier" in run.meta and run.meta["output"] == "logits") else 1)

    def top1(first: np.ndarray, *labels: np.ndarray) -> np.ndarray:
        if run.meta["output"] == "embedding":
            first = run.model.head(torch.from_numpy(first)).numpy()
        return labels[0][:, 0] if labels else first.argmax(axis=1)

    for image, x, labels in pictures(run, total):
        moments, one = [time.perf_counter()], exact(image, x)
        moments, two = [*moments, time.perf_counter()], graph(image, x)
        times += [np.diff([*moments, time.perf_counter()])] * (len(labels) == (run.meta["batch"] or 1))
        worst = np.maximum(worst, np.abs(one[0] - two[0]).max())  # keeps a NaN
        tops.append([top1(*one), top1(*two), labels])
        seen += len(labels)
        data.progress("checking, image", seen, total, started)
    before, after, labels = np.concatenate(tops, axis=1)
    same, bound = 100 * (before == after).mean(), f" (limit {limit:.0e})".replace("-0", "-") * (least == 100)
    text = (f"{names[1]} against {names[0]}, {len(labels):,} test images: max |diff| {worst:.1e}{bound}, top-1 agreement "
            f"{same:.4g} %")
    if least < 100:
        text += f", accuracy {100 * (after == labels).mean():.2f} %, before {100 * (before == labels).mean():.2f} %"
    if not (same >= least and (worst <= limit or least < 100)):
        hint = f"; at least {least:g} % is wanted, --force writes it all the same" if least < 100 else ""
        raise ValueError(f"{text}: no file was written{hint}")
    print(f"check    {text} ok", flush=True)
    times = times[5:] or times  # after a warm-up
    slow, fast = 1000 * np.median(times, axis=0)
    print(f"speed    batch {run.meta['batch'] or 1}: {fast:.1f} ms {names[1]}, {slow:.1f} ms {names[0]}, ratio "
          f"{fast / slow:.2f} (median of {len(times)}, CPU, {os.cpu_count()} threads)")


# ------------------------------------------------------------------------------------------------------------ pictures

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f")


def flatten(features: Tensor) -> Tensor:
    """Features [n, D] as points [n, 2] to look at: t-SNE's where scikit-learn is installed, else two principal components."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        centred = features - features.mean(dim=0)
        return centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    return torch.from_numpy(TSNE(random_state=0, perplexity=min(30, len(features) / 4)).fit_transform(features.numpy()))


class Axis:
    """A scale from numbers to pixels, with a margin; `log` in powers of ten."""

    def __init__(self, values: list[float], start: float, length: float, log: bool = False):
        self.log, self.start, self.length = log, start, length
        values = [self.value(x) for x in values if not math.isnan(x)] or [0.0]
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - margin, high + margin

    def value(self, x: float) -> float:
        return math.log10(max(x, 1)) if self.log else x

    def __call__(self, x: float) -> float:
        return round(self.start + self.length * (self.value(x) - self.low) / (self.high - self.low), 1)

    def ticks(self) -> list[float]:
        """Powers of ten, or two to six round numbers."""
        size = self.high - self.low
        step = 10.0 ** math.floor(math.log10(size / 2))
        step = 1 if self.log else step * next(m for m in (0.5, 1, 2, 5) if size / (step * m) <= 6)
        values = [round(step * i, 12) for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [10.0 ** x for x in values] if self.log else values


def words(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    """Text in an SVG picture."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{html.escape(text)}</text>'


def svg(panels: list[dict]) -> str:
    """Panels side by side as a picture.

    A panel has a `title` and `series` or `cells` (counts [K, K], the darker the more, with `names` of the K), and perhaps `x`
    (what is along that axis; without it there are no axes), `log` (x in powers of ten), `ticks` (of x) and `mark` (an x for a
    dashed line). A series has lists `x` and `y`, and perhaps a `name`, `error` (a list, ±) and `line` (its points are joined).
    """
    parts, W, H, top = [], 330, 260, 30
    for i, panel in enumerate(panels):
        left, series, axes = 60 + i * (W + 80), panel.get("series", []), "x" in panel
        parts.append(words(left, 20, panel["title"], "start", 'font-weight="bold"') +
                     f'<rect x="{left}" y="{top}" width="{W}" height="{H}" fill="none" stroke="#ccc"/>')
        for row, counts in enumerate(cells := panel.get("cells", [])):
            w, h = W / len(cells), H / len(cells)
            parts += [f'<rect x="{left + w * k:.2f}" y="{top + h * row:.2f}" width="{w:.2f}" height="{h:.2f}" '
                      f'fill="{COLOURS[row != k]}" fill-opacity="{n / sum(counts):.3f}"/>' for k, n in enumerate(counts) if n]
            if len(cells) <= 20:
                parts.append(words(left - 4, top + h * (row + 0.5) + 4, panel["names"][row][:8], "end"))
        errors = [(each, each.get("error") or [0.0] * len(each["y"])) for each in series]
        x = Axis([v for each in series for v in each["x"]], left, W, panel.get("log", False))
        y = Axis([v + e for each, error in errors for v, e in zip(each["y"] * 2, error + [-e for e in error], strict=True)],
                 top + H, -H)
        if axes:
            parts += [f'<path d="M{left} {y(v)}h{W}" stroke="#eee"/>' + words(left - 6, y(v) + 4, f"{v:g}", "end")
                      for v in y.ticks()]
            parts += [f'<path d="M{x(v)} {top + H}v4" stroke="#999"/>{words(x(v), H + 47, f"{v:,.9g}")}'
                      for v in panel.get("ticks") or x.ticks()]
            parts.append(words(left + W / 2, H + 66, panel["x"]))
        if "mark" in panel:
            parts.append(f'<path d="M{x(panel["mark"])} {top}v{H}" stroke="#999" stroke-dasharray="4"/>')
        for k, (each, error) in enumerate(errors):
            colour = COLOURS[k % len(COLOURS)]
            points = [(x(a), y(b), y(b - e), y(b + e)) for a, b, e in zip(each["x"], each["y"], error, strict=True) if b == b]
            parts += [f'<path d="M{a} {low}V{high}" stroke="{colour}"/>' for a, _, low, high in points if low != high]
            if each.get("line"):
                line = " ".join(f"{a},{b}" for a, b, *_ in points)
                parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            else:
                r = 4 if axes else 2.5
                parts += [f'<circle cx="{a}" cy="{b}" r="{r}" fill="{colour}" fill-opacity="0.7"/>' for a, b, *_ in points]
            if points and each.get("name") and axes:
                parts.append(words(points[-1][0] + 7, points[-1][1] + 4, each["name"], "start", f'fill="{colour}"'))
            elif points and each.get("name") and len(series) <= 40:  # amid the points, on white
                a, b = (statistics.median(point[i] for point in points) for i in (0, 1))
                parts.append(words(a, b + 4, each["name"], more='paint-order="stroke" stroke="#fff" stroke-width="3"'))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * (W + 80) + 80}" height="{H + 80}" '
            f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n')


def draw(path: Path, panels: list[dict]) -> None:
    """Write a picture and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(panels))
    print(f"saved    {path}")
