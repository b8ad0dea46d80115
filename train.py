"""Train: load a frozen backbone, put adapters into it, fit them and the head, and keep the little that was learnt.

    python train.py                                           digits on the embedded vit_micro, offline
    python train.py --dataset cifar100 --rank 8               CIFAR-100 on ViT-S/16, both downloaded
    python train.py --dataset path/to/photos --weights FILE   your own class folders on your own weights

The recipe is the paper's (https://arxiv.org/abs/2603.14706): AdamW, weight decay 0.05 on weight matrices alone, linear
warm-up over a tenth of the steps and then a cosine to zero, gradients clipped to norm 1, random resized crops and flips.
The epoch is chosen by validation accuracy, and the test set is read once, at the very end, with the weights of that epoch.

A run leaves runs/NAME/ with adapters.safetensors (the trained tensors alone), metrics.csv, curves.svg and config.json;
state.pt stands there while the run is unfinished, so that --resume goes on exactly where it was stopped.
"""
import argparse
import functools
import json
import math
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptertune
import data
import vit

# Learning rates that suit a batch of 128; the first is the paper's for adapters.
LEARNING_RATES = {"adaptertune": 1e-3, "head": 1e-3, "full": 1e-4, "scratch": 1e-3}
COLUMNS = ("epoch", "loss", "train%", "val%", "img/s", "elapsed", "left")


class Stopped(Exception):  # noqa: N818 (not an error)
    """Ctrl-C or a termination signal, taken up between two steps."""


@dataclass
class State:
    """How far a run has come: with weights and optimiser all that --resume needs."""
    epoch: int = 1
    step: int = 0  # steps done in this epoch
    loss: float = 0.0  # summed over the images of this epoch so far
    hits: int = 0
    seen: int = 0
    train_time: float = 0.0  # seconds
    eval_time: float = 0.0
    epoch_time: float = 0.0
    rows: list[list[str]] = field(default_factory=list)
    best_epoch: int = 0
    best_val: float = -1.0  # percent
    best: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """Everything that one training run works with."""
    options: argparse.Namespace
    seed: int
    folder: Path
    data: data.Dataset
    model: vit.ViT
    batches: data.Batches
    device: torch.device
    bf16: bool
    meta: dict  # goes into adapters.safetensors
    state: State = field(default_factory=State)

    def autocast(self) -> torch.autocast:
        """The precision that forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


# ------------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; wrong usage prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(
        description="Adapt a frozen Vision Transformer by zero-initialised low-rank adapters.", allow_abbrev=False,
        epilog="Without arguments: the embedded digits on the embedded vit_micro, offline, in half a minute.")
    parser.error = lambda message: parser.exit(2, f"error: {message}; python train.py --help lists all options\n")
    add = parser.add_argument_group("task").add_argument
    add("--dataset", default="digits", metavar="NAME|FOLDER",
        help=f"{', '.join(data.DATASETS)}, or a folder of class folders, or one with train/, val/, test/ (default digits)")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are kept or downloaded to (default data)")
    add("--limit", type=count, default=0, metavar="N", help="a quick look: train on N images, choose by N/4 (default 0, all)")
    add("--offline", action="store_true", help="never use the network")

    add = parser.add_argument_group("backbone").add_argument
    add("--backbone", choices=vit.BACKBONES, metavar="NAME", default="",
        help=f"{', '.join(vit.BACKBONES)} (default vit_s16; vit_micro for digits)")
    add("--weights", default="", metavar="FILE", help="a .safetensors or .pth file instead of the download; its shape is "
        "read off it, unless --backbone names it")
    add("--heads", type=count, default=0, metavar="N", help="attention heads, if not 64 channels wide (default 0, by width)")
    add("--image-size", type=count, default=0, metavar="PIXELS", help="side of the network's input (default 0, its own)")
    add("--scratch", action="store_true", help="train --backbone whole from random weights, nothing loaded")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=("adaptertune", "head", "full"), default="adaptertune", metavar="NAME",
        help="adaptertune (default), head (linear probe) or full (fine-tune everything)")
    add("--rank", type=int, default=8, metavar="R", help="width of the adapters' bottleneck (default 8)")
    add("--every", type=int, default=1, metavar="K", help="an adapter after every K-th block (default 1)")
    add("--blocks", type=integers, default=None, metavar="I,J,…", help="adapters after these blocks, from 0 (default all)")
    add("--init", choices=("zero", "small"), default="zero", help="up-projection: zeros (default) or N(0, 1e-4²)")
    add("--scale", type=float, default=1.0, metavar="S", help="factor of the adapters' output (default 1)")
    add("--learn-scale", action="store_true", help="train that factor, one for each adapter")
    add("--dropout", type=float, default=0.0, metavar="P", help="dropout inside the adapters, 0 to 1 (default 0, off)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=0, metavar="N", help="passes over the training images (default 10; digits 30)")
    add("--batch", type=positive, default=128, metavar="N", help="images in a step (default 128)")
    add("--lr", type=float, default=0.0, metavar="LR", help="peak learning rate (default by method: "
        + ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items()) + ")")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="on weight matrices only (default 0.05)")
    add("--label-smoothing", type=float, default=0.0, metavar="P", help="0 to 1 (default 0, off)")
    add("--min-scale", type=float, default=0.0, metavar="A", help="smallest area of a training crop, 0 to 1, 1 for no crop "
        "(default by data set: 0.08, digits 0.6)")
    add("--seeds", type=integers, default=[0], metavar="I,J,…", help="one run for each, mean and spread last (default 0)")
    add("--amp", choices=("auto", "bf16", "off"), default="auto",
        help="mixed precision: bf16 where it is faster (CUDA, CPUs with AMX), always, or never (default auto)")
    add("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (default auto: cuda if there is one)")

    add = parser.add_argument_group("run").add_argument
    add("--name", default="", metavar="NAME", help="folder below runs/ (default from data set, method, rank and seed)")
    add("--resume", action="store_true", help="go on with a stopped run; finished ones are kept as they are")
    add("--eval", default="", metavar="runs/NAME", help="don't train: load a finished run and read its test set again")
    options = parser.parse_args(arguments)
    if options.eval:  # the run's own options, unless the command line says otherwise
        parser.set_defaults(**read_config(Path(options.eval), parser.error))
        options = parser.parse_args(arguments)
    if options.scratch and (options.weights or options.method != parser.get_default("method")):
        parser.error("--scratch starts from random weights and trains all of them; leave out --weights and --method")
    options.method = "scratch" if options.scratch else options.method
    if not options.backbone and not options.weights:
        options.backbone = "vit_micro" if options.dataset == "digits" else "vit_s16"
    options.lr = options.lr or LEARNING_RATES[options.method]
    options.epochs = options.epochs or (30 if options.dataset == "digits" else 10)
    return options


def read_config(folder: Path, error: Callable) -> dict:
    """The options of a run."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return error(f"no run in {folder}")


def integers(text: str) -> list[int]:
    """Option type: integers with commas between."""
    return [int(part) for part in text.split(",")]


def count(text: str) -> int:
    """Option type: an integer from 0 on."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def positive(text: str) -> int:
    """Option type: an integer from 1 on."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


# ------------------------------------------------------------------------------------------------------ setting things up


def choose_device(name: str, amp: str) -> tuple[torch.device, bool]:
    """The device, and whether to use bf16 there. On a CPU that needs AMX tiles: with AVX-512 alone a bf16 step takes
    twice as long as one in fp32 (tests/bench_amp.py)."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here; choose auto, cpu or, with a GPU, cuda") from error
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    return device, amp == "bf16" or (amp == "auto" and fast)


def load_backbone(*, backbone: str, weights: str, heads: int, image_size: int, offline: bool) -> tuple[vit.ViT, vit.Backbone]:
    """The pretrained network by name or from a file, and what it wants of its input."""
    if weights:
        path = Path(weights)
    elif backbone == "vit_micro":
        path = data.ASSETS / "vit_micro.safetensors"
    else:
        path = data.hub_file(vit.BACKBONES[backbone].repo, "model.safetensors", offline=offline)
    return vit.load(path, name=backbone, heads=heads, image_size=image_size)


def add_trainable(model: vit.ViT, meta: dict) -> None:
    """Give the network what the method trains: adapters and a new head, as `meta` describes them, with the rest frozen."""
    if meta["method"] == "adaptertune":
        keys = ("rank", "placement", "init", "scale", "learn_scale", "dropout")
        adaptertune.add_adapters(model, **{key: meta[key] for key in keys})
    model.head = nn.Linear(model.config.width, len(meta["classes"]))
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
    adaptertune.freeze(model, everything=meta["method"] in ("full", "scratch"))


read_dataset = functools.lru_cache(maxsize=1)(data.read)  # the seeds of one command split the same images


def prepare(options: argparse.Namespace, seed: int) -> Run:
    """Load everything, so that all that can be wrong is found before the run's folder is made."""
    device, bf16 = choose_device(options.device, options.amp)
    torch.manual_seed(data.checksum(f"{seed}/init"))
    method = options.method
    if method == "scratch":
        backbone = vit.BACKBONES[options.backbone].at(options.image_size)
        model = vit.ViT(backbone.config)
        model.init_weights()
    else:
        model, backbone = load_backbone(backbone=options.backbone, weights=options.weights, heads=options.heads,
                                        image_size=options.image_size, offline=options.offline)
    images = data.split(read_dataset(options.dataset, options.data_dir, backbone.config.image_size, options.offline),
                        seed=seed, limit=options.limit)
    meta = {"method": method, "backbone": options.backbone or Path(options.weights).stem, 
            "fingerprint": "" if method == "scratch" else adaptertune.fingerprint(model),
            "image_size": backbone.config.image_size, "mean": backbone.norm[0], "std": backbone.norm[1],
            "interpolation": backbone.interpolation, "center": images.center, "dataset": images.name,
            "classes": images.classes, "seed": seed, "limit": options.limit}
    if method == "adaptertune":
        blocks = adaptertune.choose_blocks(backbone.config.depth, every=options.every, blocks=options.blocks)
        meta |= {"rank": options.rank, "placement": blocks, "init": options.init, "scale": options.scale,
                 "learn_scale": options.learn_scale, "dropout": options.dropout}
    elif method != "head":
        meta["config"] = asdict(backbone.config)  # the file then is a backbone of its own
    add_trainable(model, meta)
    images.min_scale = options.min_scale or images.min_scale
    return Run(options, seed, run_folder(options, seed), images.to(device), model.to(device),
               data.Batches(backbone.config.image_size, backbone.norm, backbone.interpolation, options.batch),
               device, bf16, meta)


def run_folder(options: argparse.Namespace, seed: int) -> Path:
    """runs/NAME; an unfinished run or another run's results in it are never overwritten."""
    parts = [Path(options.dataset).resolve().name, options.method]
    parts += [f"r{options.rank}"] * (options.method == "adaptertune") + [f"n{options.limit}"] * bool(options.limit)
    name = options.name or "-".join(parts)
    folder = Path("runs") / (name if options.name and len(options.seeds) == 1 else f"{name}-s{seed}")
    if options.resume or not (folder / "config.json").exists():
        return folder
    if (folder / "state.pt").exists():
        raise ValueError(f"{folder} holds an unfinished run; go on with --resume, or delete the folder")
    if json.loads((folder / "config.json").read_text()) != config(options, seed):
        raise ValueError(f"{folder} holds a run with other options; give this one a --name, or delete the folder")
    return folder


def config(options: argparse.Namespace, seed: int) -> dict:
    """What config.json holds: every option, as JSON gives it back."""
    return {key: value for key, value in vars(options).items() if key not in ("resume", "eval")} | {"seeds": [seed]}


# ------------------------------------------------------------------------------------------------------------- training


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on what is trained; decay on matrices and convolutions only, not on biases, norms, scales, tokens, positions."""
    groups = {True: [], False: []}
    for name, parameter in adaptertune.trained(model).items():
        groups[name.endswith("weight") and parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW([{"params": groups[True], "weight_decay": weight_decay},
                              {"params": groups[False], "weight_decay": 0.0}], lr=lr)


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at a step counted from 0: up a line for a tenth of the steps, down a cosine to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


stop_asked: list[int] = []  # signals received; looked at between two steps, so that weights and optimiser agree


def ask_stop(number: int, frame: object) -> None:
    """Signal handler: note the signal; the second one stops at once."""
    if stop_asked:
        raise KeyboardInterrupt
    stop_asked.append(number)


def check_stop() -> None:
    """Raise Stopped once a signal has come."""
    if stop_asked:
        raise Stopped


def train_epoch(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """The rest of the epoch that run.state stands in; loss and hits are of the augmented images as they pass."""
    state, options, started = run.state, run.options, time.perf_counter()
    count, first = run.batches.count(run.data.train), run.state.step
    run.model.train()
    loss_sum, hits = torch.zeros(2, dtype=torch.float64, device=run.device)
    try:
        for images, labels in run.batches.train(run.data, run.seed, state.epoch, first=first):
            check_stop()
            torch.manual_seed(data.checksum(f"{run.seed}/{state.epoch}/{state.step}"))  # for the adapters' dropout
            for group in optimizer.param_groups:
                group["lr"] = options.lr * schedule((state.epoch - 1) * count + state.step, options.epochs * count)
            with run.autocast():
                logits = run.model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=options.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(adaptertune.trained(run.model).values(), 1.0)
            optimizer.step()
            loss_sum += loss.detach() * len(labels)
            hits += (logits.argmax(dim=-1) == labels).sum()
            state.seen += len(labels)
            state.step += 1
            data.progress(f"epoch {state.epoch}/{options.epochs}, step", state.step, count, started, first)
    finally:
        state.loss, state.hits = state.loss + loss_sum.item(), state.hits + int(hits)
        state.epoch_time += time.perf_counter() - started
    if not math.isfinite(state.loss):
        raise ValueError(f"the loss became {state.loss} in epoch {state.epoch}; lower --lr ({options.lr:g})")


@torch.inference_mode()
def evaluate(run: Run, images: data.Images, what: str) -> float:
    """Top-1 accuracy in percent."""
    run.model.eval()
    hits, seen, started = torch.zeros((), dtype=torch.long, device=run.device), 0, time.perf_counter()
    for x, labels in run.batches.eval(images, run.data.center):
        check_stop()
        with run.autocast():
            hits += (run.model(x).argmax(dim=-1) == labels).sum()
        seen += len(labels)
        data.progress(what, seen, len(images), started)
    run.state.eval_time += time.perf_counter() - started
    return 100 * hits.item() / seen


def fit(run: Run) -> None:
    """Train to the last epoch, keep the weights that did best on validation, and save the state after every epoch."""
    state, options = run.state, run.options
    optimizer = make_optimizer(run.model, options.lr, options.weight_decay)
    if (run.folder / "state.pt").exists():
        load_state(run, optimizer)
    parameters = adaptertune.trained(run.model)
    describe(run)
    try:
        while state.epoch <= options.epochs:
            train_epoch(run, optimizer)
            val = evaluate(run, run.data.val, "validation")
            if val > state.best_val:
                state.best_epoch, state.best_val = state.epoch, val
                state.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            state.train_time += state.epoch_time
            elapsed = state.train_time + state.eval_time
            state.rows.append([str(state.epoch), f"{state.loss / state.seen:.3f}", f"{100 * state.hits / state.seen:.2f}",
                               f"{val:.2f}", f"{state.seen / state.epoch_time:,.0f}", clock(elapsed),
                               clock(elapsed / state.epoch * (options.epochs - state.epoch))])
            print_row(state.rows[-1])
            state.epoch, state.step, state.loss, state.hits, state.seen, state.epoch_time = state.epoch + 1, 0, 0.0, 0, 0, 0.0
            save_state(run, optimizer)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.best[name])
        run.meta |= {"epoch": state.best_epoch, "val_accuracy": state.best_val,
                     "test_accuracy": evaluate(run, run.data.test, "test")}
    except Stopped:
        save_state(run, optimizer)
        raise


def save_state(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Write state.pt (weights, optimiser, State), config.json, metrics.csv and, for photos, who was in which split."""
    weights = {name: parameter.detach() for name, parameter in adaptertune.trained(run.model).items()}
    state = vars(run.state) | {"weights": weights, "optimizer": optimizer.state_dict()}
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, run.folder / "state.part")
    (run.folder / "state.part").replace(run.folder / "state.pt")
    (run.folder / "config.json").write_text(json.dumps(config(run.options, run.seed), indent=1) + "\n")
    rows = [row[:4] + [row[4].replace(",", "")] + row[5:] for row in run.state.rows]
    (run.folder / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in [list(COLUMNS), *rows]))
    if run.data.train.names:
        names = {part: getattr(run.data, part).names for part in ("train", "val", "test")}
        (run.folder / "split.json").write_text(json.dumps(names, indent=1) + "\n")


def load_state(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Stand where the stopped run stood."""
    if json.loads((run.folder / "config.json").read_text()) != config(run.options, run.seed):
        raise ValueError(f"{run.folder} was started with other options ({run.folder / 'config.json'}); resume with the same")
    saved = torch.load(run.folder / "state.pt", map_location=run.device, weights_only=True)
    optimizer.load_state_dict(saved.pop("optimizer"))
    with torch.no_grad():
        for name, tensor in saved.pop("weights").items():
            adaptertune.trained(run.model)[name].copy_(tensor)
    for key, value in saved.items():
        setattr(run.state, key, value)


# ------------------------------------------------------------------------------------------------------------ reporting


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    """One aligned row of the table of epochs."""
    print("".join(f"{cell:>{width}}" for cell, width in zip(cells, (6, 8, 9, 8, 9, 10, 10), strict=True)), flush=True)


def describe(run: Run) -> None:
    """The lines above the table: where it runs, what is frozen, what is trained, on what."""
    numbers, whole = adaptertune.count(run.model), run.data.whole
    where = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"env      torch {torch.__version__} · {run.device.type} {where} · {'bf16' if run.bf16 else 'fp32'} · seed {run.seed}")
    print(f"backbone {run.meta['backbone']} {run.meta['image_size']}px, {numbers['frozen']:,} frozen")
    parts = ", ".join(f"{part} {numbers[part]:,}" for part in ("adapters", "head", "backbone") if numbers[part])
    total = sum(numbers.values()) - numbers["frozen"]
    print(f"trained  {total:,} ({100 * total / sum(numbers.values()):.2f} %): {parts}")
    sizes = [f"{len(images):,}" + (f" of {n:,}" if len(images) < n else "") + f" {part}"
             for images, n, part in zip((run.data.train, run.data.val, run.data.test), (*whole, 0), ("train", "val", "test"),
                                        strict=True)]
    print(f"data     {run.data.name}: {' / '.join(sizes)}, {len(run.data.classes)} classes")
    if run.options.limit:
        print("limit    a quick look at part of the training images; not the data set's result")
    print()
    print_row(COLUMNS)
    for row in run.state.rows:
        print_row(row)


def finish(run: Run) -> None:
    """Write what stays, report it, remove what was only for --resume."""
    state, path = run.state, run.folder / "adapters.safetensors"
    adaptertune.save(path, run.model, run.meta)
    (run.folder / "curves.svg").write_text(curves(state.rows, state.best_epoch))
    (run.folder / "state.pt").unlink()
    print(f"\ntest     {run.meta['test_accuracy']:.2f} %   (epoch {state.best_epoch}, chosen on val; test read once)")
    print(f"cost     {clock(state.train_time)} training, {clock(state.eval_time)} evaluation, peak {peak_memory(run.device)}")
    print(f"saved    {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"next     python train.py --eval {run.folder}")


def peak_memory(device: torch.device) -> str:
    """The most memory in use so far: the GPU's, else the process's."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the GPU"
    if sys.platform == "win32":
        return "unknown"
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def curves(rows: list[list[str]], best: int) -> str:
    """Loss and accuracy against epochs, as an SVG picture; a line marks the epoch that was kept."""
    width, height, parts = 320, 200, []

    def panel(left: int, title: str, lines: dict[str, tuple[int, str]]) -> None:
        values = {name: [float(row[column]) for row in rows] for name, (column, _) in lines.items()}
        low, high = min(map(min, values.values())), max(map(max, values.values()))
        spread = high - low or 1.0
        xs = [left + width * (int(row[0]) - 0.5) / len(rows) for row in rows]
        parts.append(f'<rect x="{left}" y="30" width="{width}" height="{height}" fill="none" stroke="#bbb"/>'
                     f'<text x="{left}" y="20">{title}: {", ".join(lines)}</text>'
                     f'<text x="{left - 6}" y="36" text-anchor="end">{high:g}</text>'
                     f'<text x="{left - 6}" y="{30 + height}" text-anchor="end">{low:g}</text>'
                     f'<text x="{left + width}" y="{48 + height}" text-anchor="end">epoch {rows[-1][0]}</text>'
                     f'<path d="M{xs[best - 1]:.1f} 30v{height}" stroke="#bbb" stroke-dasharray="3"/>')
        for name, (_, colour) in lines.items():
            points = " ".join(f"{x:.1f},{30 + height * (high - y) / spread:.1f}" for x, y in zip(xs, values[name], strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"><title>{name}</title></polyline>')

    panel(60, "loss", {"train": (1, "#d62728")})
    panel(460, "accuracy, %", {"train (red)": (2, "#d62728"), "val (blue)": (3, "#1f77b4")})
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="800" height="270" font-family="sans-serif" font-size="12">'
            '<rect width="800" height="270" fill="#fff"/>' + "".join(parts) + "</svg>\n")


# ---------------------------------------------------------------------------------------------------------------- main


def train(options: argparse.Namespace, seed: int) -> float:
    """One run from loading to the report; returns its test accuracy in percent."""
    run = prepare(options, seed)
    path = run.folder / "adapters.safetensors"
    if options.resume and path.exists() and not (run.folder / "state.pt").exists():
        accuracy = vit.read_tensors(path)[1]["test_accuracy"]
        print(f"kept     {path}, finished before with test {accuracy:.2f} %")
        return accuracy
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_stop)
    fit(run)
    finish(run)
    return run.meta["test_accuracy"]


def open_run(options: argparse.Namespace) -> Run:
    """A finished run as `--eval` names it: its data, and its network with the trained tensors in place.

    Raises:
        ValueError: no finished run there, or the backbone isn't the one that the file was trained on.
    """
    run = prepare(options, options.seeds[0])
    tensors, meta = vit.read_tensors(Path(options.eval) / "adapters.safetensors")
    adaptertune.load(run.model, tensors, meta, backbone=run.meta["fingerprint"], name=run.meta["backbone"])
    return replace(run, folder=Path(options.eval), meta=meta)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 for an error, 130 when stopped."""
    options = parse(arguments)
    try:
        if options.eval:
            run = open_run(options)
            describe(run)
            print(f"test     {evaluate(run, run.data.test, 'test'):.2f} %   (its file says {run.meta['test_accuracy']:.2f} %)")
            return 0
        results = [train(options, seed) for seed in options.seeds]
        if len(results) > 1:
            print(f"seeds    {len(results)}: test {statistics.mean(results):.2f} ± {statistics.stdev(results):.2f} % "
                  "(mean ± standard deviation)")
        return 0
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt):
        again = "" if "--resume" in sys.argv else " --resume"
        print(f"\nstopped; go on with: python {shlex.join(sys.argv)}{again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
