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
import re
import shlex
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptertune
import data
import vit

# Peak learning rates. The paper's for adapters is 1e-3, for thousands of steps; the head's is from DeiT-tiny on 2,000 images
# of CIFAR-100 (README.md), and vit_micro's are from the validation images of digits (assets/results/digits-rates.txt).
RATES = {"adaptertune": 1e-3, "adaptformer": 1e-3, "head": 1e-2, "full": 1e-4, "scratch": 1e-3}
MICRO_RATES = {"adaptertune": 5e-3, "adaptformer": 5e-3, "head": 1e-2, "full": 5e-4, "scratch": 1e-3}
COLUMNS = ("epoch", "loss", "train%", "val%", "img/s", "elapsed", "left")


@dataclass
class State:
    """How far a run has come: with weights and optimiser all that --resume needs. Times in seconds."""
    epoch: int = 1
    step: int = 0  # steps done in this epoch, and of them:
    seen: int = 0  # images
    hits: int = 0  # right answers
    loss: float = 0.0  # summed over the images
    epoch_time: float = 0.0
    train_time: float = 0.0
    eval_time: float = 0.0
    rows: list[list[str]] = field(default_factory=list)
    best_epoch: int = 0
    best_val: float = -1.0  # percent
    best: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """Everything that one training run works with; `meta` goes into adapters.safetensors."""
    options: argparse.Namespace
    seed: int
    folder: Path
    data: data.Dataset
    model: vit.ViT
    batches: data.Batches
    device: torch.device
    bf16: bool
    meta: dict
    state: State = field(default_factory=State)

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to logits [B, classes], in the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(images).float()


# ------------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; wrong usage prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(
        description="Adapt a frozen Vision Transformer by zero-initialised low-rank adapters.", allow_abbrev=False,
        epilog="Without arguments: the embedded digits on the embedded vit_micro, offline, within a minute.")
    parser.error = lambda message: parser.exit(2, f"error: {message}; python train.py --help lists all options\n")
    add = parser.add_argument_group("task").add_argument
    add("--dataset", default="digits", metavar="NAME", help=f"{', '.join(data.DATASETS)}, or a folder (default digits)")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to (default data)")
    add("--limit", type=int, default=0, metavar="N", help="a quick look: train on N images, choose by N/4 (default 0, all)")
    add("--offline", action="store_true", help="never use the network")
    add = parser.add_argument_group("backbone").add_argument
    add("--backbone", choices=vit.BACKBONES, metavar="NAME", default="", help=f"{', '.join(vit.BACKBONES)} (default vit_s16; "
        "vit_micro for digits)")
    add("--weights", default="", metavar="FILE", help="a .safetensors or .pth file instead of the download")
    add("--heads", type=int, default=0, metavar="N", help="attention heads of --weights (default 0: 64 channels each)")
    add("--image-size", type=int, default=0, metavar="PIXELS", help="side of the input (default 0: the backbone's own)")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=(*adaptertune.METHODS, "head", "full"), default="adaptertune", metavar="NAME",
        help="adaptertune (default), adaptformer, head (linear probe) or full (fine-tune everything)")
    add("--scratch", dest="method", action="store_const", const="scratch", help="train all of --backbone from random weights")
    add("--rank", type=int, metavar="R", help=f"width of the adapters' bottleneck ({by_method('rank')})")
    add("--every", type=int, default=1, metavar="K", help="an adapter in every K-th block (default 1)")
    add("--blocks", type=integers, metavar="I,J,…", help="adapters in these blocks, counted from 0 (default all)")
    add("--adapter-input", dest="reads", choices=adaptertune.READS, help="what adapters read: the block's output, the MLP's "
        f"input before (raw) or after its LayerNorm (ln), or the MLP's output ({by_method('reads')})")
    add("--adapter-act", dest="act", choices=(*adaptertune.ACTS, "mlp"), help="their nonlinearity, mlp for that of the "
        f"block's MLP ({by_method('act')}); adapters that read ln through it cost next to nothing once exported")
    add("--init", choices=("zero", "small"), default="zero", help="up-projection: zeros (default) or N(0, 1e-4²)")
    add("--scale", type=float, metavar="S", help=f"factor of the adapters' output ({by_method('scale')})")
    add("--learn-scale", action="store_true", help="train that factor, one for each adapter")
    add("--dropout", type=float, metavar="P", help=f"dropout inside the adapters, 0 for off ({by_method('dropout')})")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=0, metavar="N", help="passes over the training images (default 10; digits 12)")
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
    options = parser.parse_args(arguments)
    if options.eval:  # the run's own options, unless the command line says otherwise
        if not (saved := Path(options.eval) / "config.json").is_file():
            parser.error(f"no run in {options.eval}: {saved} is missing")
        parser.set_defaults(**json.loads(saved.read_text()))
        options = parser.parse_args(arguments)
    return complete(options, parser)


def by_method(name: str) -> str:
    """The defaults of an adapter option, for its help."""
    return "default " + ", ".join(f"{method} {values[name]}" for method, values in adaptertune.METHODS.items())


def complete(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Fill in the defaults that depend on other options, and refuse what can't be."""
    ranges = {"limit": (0, 1e9), "heads": (0, 1e4), "image_size": (0, 1e5), "epochs": (0, 1e6), "batch": (0, 1e6),
              "lr": (0, 1e3), "weight_decay": (0, 1e3), "label_smoothing": (0, 1), "min_scale": (0, 1), "dropout": (0, 1)}
    for name, value in adaptertune.METHODS.get(options.method, {"dropout": 0.0}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, (low, high) in ranges.items():
        if not low <= (value := getattr(options, name)) <= high:
            parser.error(f"--{name.replace('_', '-')} {value} is not between {low} and {high:,.0f}")
    if options.method == "scratch" and options.weights:
        parser.error("--scratch starts from random weights; leave out --weights, or use --method full")
    if not options.backbone and not options.weights:
        options.backbone = "vit_micro" if options.dataset == "digits" else "vit_s16"
    options.epochs = options.epochs or (12 if options.dataset == "digits" else 10)
    options.lr = options.lr or (MICRO_RATES if options.backbone == "vit_micro" else RATES)[options.method]
    return options


def integers(text: str) -> list[int]:
    """Option type: integers with commas between."""
    return [int(part) for part in text.split(",")]


# ------------------------------------------------------------------------------------------------------ setting things up


def choose_device(name: str, amp: str) -> tuple[torch.device, bool]:
    """The device, and whether to use bf16 there. A CPU needs AMX for that: with AVX-512 alone a step in bf16 takes longer
    than one in fp32 (tests/bench_amp.py)."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here; choose auto, cpu or, with a GPU, cuda") from error
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    return device, amp == "bf16" or (amp == "auto" and fast)


def load_backbone(options: argparse.Namespace) -> tuple[vit.ViT, vit.Backbone]:
    """The network that `options` name, and what it wants of its input: random for --scratch, else pretrained."""
    name, path = options.backbone, Path(options.weights)
    if options.method == "scratch":
        backbone = vit.BACKBONES[name].at(options.image_size)
        model = vit.ViT(backbone.config)
        model.init_weights()
        return model, backbone
    if name == "vit_micro" and not options.weights:
        path = data.ASSETS / "vit_micro.safetensors"
    elif not options.weights:
        path = data.hub_file(vit.BACKBONES[name].repo, "model.safetensors", offline=options.offline)
    return vit.load(path, name=name, heads=options.heads, image_size=options.image_size)


read_dataset = functools.lru_cache(maxsize=1)(data.read)  # the seeds of one command split the same images


def prepare(options: argparse.Namespace, seed: int) -> Run:
    """Load everything, so that all that can be wrong is found before the run's folder is made."""
    data.check_name(options.dataset)  # before a backbone is downloaded
    folder, (device, bf16) = run_folder(options, seed), choose_device(options.device, options.amp)
    torch.manual_seed(data.checksum(f"{seed}/init"))
    model, backbone = load_backbone(options)
    size, whole = backbone.config.image_size, options.method in ("full", "scratch")
    images = data.split(read_dataset(options.dataset, options.data_dir, size, options.offline), seed=seed, limit=options.limit)
    images.min_scale = options.min_scale or images.min_scale
    weights = Path(options.weights)
    name = options.backbone or (weights.parent.name if weights.stem == "adapters" else weights.stem)
    meta = {"method": options.method, "backbone": name, "license": backbone.license,
            "fingerprint": "" if options.method == "scratch" else adaptertune.fingerprint(model),
            "image_size": size, "mean": backbone.norm[0], "std": backbone.norm[1], "interpolation": backbone.interpolation,
            "center": images.center, "dataset": images.name, "classes": images.classes, "seed": seed, "limit": options.limit}
    if options.method in adaptertune.METHODS:
        adapters = {name: getattr(options, name) for name in adaptertune.OPTIONS}
        adapters["placement"] = adaptertune.choose_blocks(backbone.config.depth, every=options.every, blocks=options.blocks)
        adaptertune.add_adapters(model, method=options.method, **adapters)
        meta |= adapters
    elif whole:
        meta["config"] = asdict(backbone.config)  # the file then is a backbone of its own
    adaptertune.add_head(model, len(images.classes))
    adaptertune.freeze(model, everything=whole)
    batch = options.batch or (32 if len(images.train) < 5000 else 128)  # a small set needs its steps
    batches = data.Batches(size, backbone.norm, backbone.interpolation, batch, device)
    return Run(options, seed, folder, images, model.to(device), batches, device, bf16, meta)


def run_folder(options: argparse.Namespace, seed: int) -> Path:
    """runs/NAME; an unfinished run or another run's results in it are never overwritten."""
    parts = [Path(options.dataset).resolve().name, options.method]
    parts += [f"r{options.rank}"] * (options.method in adaptertune.METHODS) + [f"n{options.limit}"] * bool(options.limit)
    several = f"-s{seed}" if len(options.seeds) > 1 or not options.name else ""
    folder = Path("runs") / ((options.name or "-".join(parts)) + several)
    if options.eval:
        return Path(options.eval)
    if (folder / "config.json").exists():
        saved, here = json.loads((folder / "config.json").read_text()), ("data_dir", "offline", "device")
        if any(saved.get(key) != value for key, value in config(options, seed).items() if key not in here):
            raise ValueError(f"{folder} holds a run with other options; give this one a --name, or delete that folder")
        if (folder / "state.pt").exists() and not options.resume:
            raise ValueError(f"{folder} holds an unfinished run; go on with --resume, or delete that folder")
    return folder


def config(options: argparse.Namespace, seed: int) -> dict:
    """What config.json holds: every option."""
    return {key: value for key, value in vars(options).items() if key not in ("resume", "eval", "name")} | {"seeds": [seed]}


# ------------------------------------------------------------------------------------------------------------- training


stop_asked: list[int] = []


def ask_stop(number: int, frame: object) -> None:
    """Signal handler: note the signal. A second one kills."""
    stop_asked.append(number)
    signal.signal(number, signal.SIG_DFL)


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at a step counted from 0: up a line for a tenth of the steps, down a cosine to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_epoch(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """The rest of the epoch that run.state stands in; loss and hits are of the augmented images as they pass."""
    state, options, started = run.state, run.options, time.perf_counter()
    count, first = run.batches.count(run.data.train), run.state.step
    loss_sum, hits = torch.zeros(2, dtype=torch.float64, device=run.device)
    parameters = list(adaptertune.trained(run.model).values())
    run.model.train()
    try:
        for images, labels in run.batches.train(run.data, run.seed, state.epoch, first=first):
            if stop_asked:  # here, between two steps, weights and optimiser agree
                raise KeyboardInterrupt
            torch.manual_seed(data.checksum(f"{run.seed}/{state.epoch}/{state.step}"))  # for the adapters' dropout
            for group in optimizer.param_groups:
                group["lr"] = options.lr * schedule((state.epoch - 1) * count + state.step, options.epochs * count)
            logits = run.logits(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            loss_sum += loss.detach() * len(labels)
            hits += (logits.argmax(dim=-1) == labels).sum()
            state.seen, state.step = state.seen + len(labels), state.step + 1
            data.progress(f"epoch {state.epoch}/{options.epochs}, step", state.step, count, started, first)
    finally:
        state.loss, state.hits = state.loss + loss_sum.item(), state.hits + int(hits)
        state.epoch_time += time.perf_counter() - started
    if not math.isfinite(state.loss):
        raise ValueError(f"the loss became {state.loss} in epoch {state.epoch}; lower --lr ({options.lr:g})")


@torch.inference_mode()
def evaluate(run: Run, images: data.Images, what: str) -> float:
    """Top-1 accuracy in percent."""
    hits, seen, started = torch.zeros((), dtype=torch.long, device=run.device), 0, time.perf_counter()
    run.model.eval()
    for x, labels in run.batches.eval(images, run.data.center):
        if stop_asked:
            raise KeyboardInterrupt
        hits += (run.logits(x).argmax(dim=-1) == labels).sum()
        seen += len(labels)
        data.progress(what, seen, len(images), started)
    run.state.eval_time += time.perf_counter() - started
    return 100 * hits.item() / seen


def fit(run: Run) -> None:
    """Train to the last epoch, saving the state after each; put back the weights that did best on val, and read test."""
    state, parameters = run.state, adaptertune.trained(run.model)
    optimizer = torch.optim.AdamW(adaptertune.groups(run.model, run.options.weight_decay), lr=run.options.lr)
    if (run.folder / "state.pt").exists():
        load_state(run, optimizer)
    describe(run)
    print()
    for row in (COLUMNS, *state.rows):
        print_row(row)
    try:
        while state.epoch <= run.options.epochs:
            train_epoch(run, optimizer)
            val = evaluate(run, run.data.val, "validation")
            if val >= state.best_val:  # of equals the later one, which has seen more
                state.best_epoch, state.best_val = state.epoch, val
                state.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            end_epoch(state, val, run.options.epochs)
            save_state(run, optimizer)
        run.model.load_state_dict(state.best, strict=False)
        test = evaluate(run, run.data.test, "test")
        run.meta |= {"epoch": state.best_epoch, "val_accuracy": state.best_val, "test_accuracy": test}
    except KeyboardInterrupt:
        save_state(run, optimizer)
        raise


def end_epoch(state: State, val: float, epochs: int) -> None:
    """Print the epoch's row and stand at the start of the next."""
    state.train_time += state.epoch_time
    elapsed = state.train_time + state.eval_time
    left = elapsed / state.epoch * (epochs - state.epoch)
    state.rows.append([str(state.epoch), f"{state.loss / state.seen:.3f}", f"{100 * state.hits / state.seen:.2f}",
                       f"{val:.2f}", f"{state.seen / state.epoch_time:.0f}", clock(elapsed), clock(left)])
    print_row(state.rows[-1])
    state.epoch, state.step, state.seen, state.hits, state.loss, state.epoch_time = state.epoch + 1, 0, 0, 0, 0.0, 0.0


def save_state(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Write state.pt (weights, optimiser, State), config.json, metrics.csv and, for photos, who is in which split."""
    run.folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in adaptertune.trained(run.model).items()}
    torch.save(vars(run.state) | {"weights": weights, "optimizer": optimizer.state_dict()}, run.folder / "state.part")
    (run.folder / "state.part").replace(run.folder / "state.pt")
    (run.folder / "config.json").write_text(json.dumps(config(run.options, run.seed), indent=1) + "\n")
    (run.folder / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in (COLUMNS, *run.state.rows)))
    if run.data.train.names:
        names = {part: getattr(run.data, part).names for part in ("train", "val", "test")}
        (run.folder / "split.json").write_text(json.dumps(names, indent=1) + "\n")


def load_state(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Stand where the stopped run stood."""
    saved = torch.load(run.folder / "state.pt", map_location=run.device, weights_only=True)
    optimizer.load_state_dict(saved.pop("optimizer"))
    run.model.load_state_dict(saved.pop("weights"), strict=False)
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
    numbers, images = adaptertune.count(run.model), run.data
    where = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "bf16" if run.bf16 else "fp32"
    print(f"env      torch {torch.__version__} · {run.device.type} {where} · {precision} · seed {run.seed}")
    print(f"backbone {run.meta['backbone']} {run.meta['image_size']}px, {numbers['frozen']:,} frozen")
    parts = ", ".join(f"{part} {numbers[part]:,}" for part in ("adapters", "head", "backbone") if numbers[part])
    total = sum(numbers.values()) - numbers["frozen"]
    print(f"trained  {total:,} ({100 * total / sum(numbers.values()):.2f} %): {parts}")
    train, val = (f"{len(part):,} of {n:,}" if len(part) < n else f"{n:,}"
                  for part, n in zip((images.train, images.val), images.whole, strict=True))
    print(f"data     {images.name}: {train} train / {val} val / {len(images.test):,} test, {len(images.classes)} classes"
          + " (--limit: a quick look, not the data set's result)" * bool(run.options.limit))


def finish(run: Run) -> None:
    """Write what stays, report it, remove what was only for --resume."""
    state, path = run.state, run.folder / "adapters.safetensors"
    adaptertune.save(path, run.model, run.meta)
    (run.folder / "curves.svg").write_text(curves(state.rows, state.best_epoch))
    (run.folder / "state.pt").unlink()
    print(f"\ntest     {run.meta['test_accuracy']:.2f} %   (epoch {state.best_epoch}, chosen on val; test read once)")
    print(f"cost     {clock(state.train_time)} training, {clock(state.eval_time)} evaluation{peak_memory(run.device)}")
    print(f"saved    {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"next     python export.py {run.folder}")


def peak_memory(device: torch.device) -> str:
    """The most memory in use so far: the GPU's, else the process's (Linux)."""
    if device.type == "cuda":
        return f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the GPU"
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return f", peak {int(peak[1]) / 2**20:.1f} GiB" if peak else ""


def curves(rows: list[list[str]], best: int) -> str:
    """An SVG picture of loss (left) and accuracy (right) against epochs; the dashed line marks the epoch that was kept."""
    parts = []
    for left, title, columns in ((60, "training loss", {1: "#d62728"}), (460, "accuracy in %: train red, val blue",
                                                                         {2: "#d62728", 3: "#1f77b4"})):
        values = {column: [float(row[column]) for row in rows] for column in columns}
        low, high = min(map(min, values.values())), max(map(max, values.values()))
        xs = [left + 320 * (i + 0.5) / len(rows) for i in range(len(rows))]
        parts.append(f'<rect x="{left}" y="30" width="320" height="200" fill="none" stroke="#bbb"/>'
                     f'<path d="M{xs[best - 1]:.1f} 30v200" stroke="#bbb" stroke-dasharray="4"/><text x="{left}" y="20">{title}'
                     f'</text><text x="{left + 320}" y="246" text-anchor="end">epoch {len(rows)}</text><g text-anchor="end">'
                     f'<text x="{left - 5}" y="40">{high:g}</text><text x="{left - 5}" y="230">{low:g}</text></g>')
        for column, colour in columns.items():
            points = " ".join(f"{x:.1f},{230 - 200 * (y - low) / (high - low or 1):.1f}"
                              for x, y in zip(xs, values[column], strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="800" height="260" font-family="sans-serif" font-size="12">'
            f'<rect width="800" height="260" fill="#fff"/>{"".join(parts)}</svg>\n')


# ---------------------------------------------------------------------------------------------------------------- main


def train(options: argparse.Namespace, seed: int) -> float:
    """One run from loading to the report; returns its test accuracy in percent."""
    path = run_folder(options, seed) / "adapters.safetensors"
    if options.resume and path.exists() and not path.with_name("state.pt").exists():
        print(f"kept     {path}, finished before")
        return vit.read_tensors(path)[1]["test_accuracy"]
    run = prepare(options, seed)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_stop)
    fit(run)
    finish(run)
    return run.meta["test_accuracy"]


def open_run(options: argparse.Namespace) -> Run:
    """The finished run that `--eval` names: its data, and its network with the trained tensors in place.

    Raises:
        ValueError: no finished run there, or the backbone isn't the one that the file was trained on.
    """
    tensors, meta = vit.read_tensors(Path(options.eval) / "adapters.safetensors")
    run = prepare(options, options.seeds[0])
    adaptertune.load(run.model, tensors, meta, backbone=run.meta["fingerprint"], name=run.meta["backbone"])
    return replace(run, meta=run.meta | meta)


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
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = shlex.join(sys.argv + ["--resume"] * ("--resume" not in sys.argv))
        print(f"\nstopped; to go on: python {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
