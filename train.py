"""Train: load a frozen backbone, put adapters into it, fit them and the head, and keep the little that was learnt.

    python train.py                                           digits on the embedded vit_micro, offline
    python train.py --dataset cifar100 --rank 8               CIFAR-100 on ViT-S/16, both downloaded
    python train.py --dataset path/to/photos --weights FILE   your own class folders on your own weights
    python train.py --method adaptertune vpt --seeds 0,1,2    several runs and a table of them

The recipe is the paper's (https://arxiv.org/abs/2603.14706): AdamW, weight decay 0.05 on weight matrices alone, linear
warm-up over a tenth of the steps and then a cosine to zero, gradients clipped to norm 1, random resized crops and flips.
The epoch is chosen by validation accuracy, and the test set is read once, at the very end, with the weights of that epoch.

A run leaves runs/NAME/ with adapters.safetensors (the trained tensors alone), metrics.csv, curves.svg and config.json;
state.pt stands there while the run is unfinished, so that --resume goes on exactly where it was stopped.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import os
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
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptertune
import data
import vit

# Peak learning rates, in general and for vit_micro. The paper's for adapters is 1e-3, for thousands of steps; the head's is
# from DeiT-tiny on 2,000 images of CIFAR-100 (README.md), vit_micro's are from the validation images of digits, CLIP-Adapter's
# from those of flowers (assets/results).
RATES = {"adaptertune": (1e-3, 5e-3), "adaptformer": (1e-3, 5e-3), "vpt": (1e-2, 5e-2), "clip-adapter": (3e-3, 3e-3),
         "zero-shot": (1e-3, 1e-3), "head": (1e-2, 1e-2), "full": (1e-4, 5e-4), "scratch": (1e-3, 1e-3)}
NOT_KEPT = ("resume", "eval", "name", "label", "plot", "spectrum")  # options that config.json leaves out
GRID = ("method", "rank", "every", "blocks", "init")  # options that may have several values, each with each
VOCABULARIES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz")
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
        """Images [B, 3, S, S], or their features [B, D], to logits [B, classes], in the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return (self.model.head if images.ndim == 2 else self.model)(images).float()


# ------------------------------------------------------------------------------------------------------- command line


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
    clip = "classifier" in adaptertune.METHODS[options.method]  # CLIP's projection comes as the head
    return vit.load(path, name=name, heads=options.heads, image_size=options.image_size, head=clip)


read_dataset = functools.lru_cache(maxsize=1)(data.read)  # the seeds of one command split the same images


def prepare(options: argparse.Namespace, seed: int) -> Run:
    """Load everything, so that all that can be wrong is found before the run's folder is made."""
    data.check_name(options.dataset)  # before a backbone is downloaded
    folder, (device, bf16) = run_folder(options, seed), choose_device(options.device, options.amp)
    torch.manual_seed(data.checksum(f"{seed}/init"))
    model, backbone = load_backbone(options)
    size, whole = backbone.config.image_size, options.method in ("full", "scratch")
    images = data.split(read_dataset(options.dataset, options.data_dir, size, options.offline), seed=seed, limit=options.limit,
                        shots=options.shots, test_share=options.test_share)
    images.min_scale = options.min_scale or images.min_scale
    weights = Path(options.weights)
    name = options.backbone or (weights.parent.name if weights.stem == "adapters" else weights.stem)
    meta = {"method": options.method, "backbone": name, "license": backbone.license,
            "fingerprint": "" if options.method == "scratch" else adaptertune.fingerprint(model),
            "image_size": size, "mean": backbone.norm[0], "std": backbone.norm[1], "interpolation": backbone.interpolation,
            "center": images.center, "dataset": images.name, "classes": images.classes, "seed": seed, "limit": options.limit,
            "shots": options.shots, "lr": options.lr}
    own = {name: getattr(options, name) for name in adaptertune.METHODS[options.method]}
    if "reads" in own:
        own["placement"] = adaptertune.choose_blocks(backbone.config.depth, every=options.every, blocks=options.blocks)
        file = own["init"] not in ("zero", "small")
        adaptertune.add_adapters(model, method=options.method, **own | {"init": "zero"} if file else own)
        if file:
            adaptertune.start_from(model, vit.read_tensors(own["init"])[0])
    elif "prompts" in own:
        adaptertune.add_prompts(model, **own)
    elif whole:
        meta["config"] = asdict(backbone.config)  # the file then is a backbone of its own
    if "classifier" in own:
        add_clip_head(model, len(images.classes), own)
    else:
        adaptertune.add_head(model, len(images.classes))
    adaptertune.freeze(model, everything=whole)
    batch = options.batch or (32 if len(images.train) < 5000 else 128)  # a small set needs its steps
    batches = data.Batches(size, backbone.norm, backbone.interpolation, batch, device)
    return Run(options, seed, folder, images, model.to(device), batches, device, bf16, meta | own)


def add_clip_head(model: vit.ViT, classes: int, own: dict) -> None:
    """Put a ClipHead in the place of CLIP's projection."""
    if not model.config.norm_pre or not isinstance(model.head, nn.Linear):
        raise ValueError("clip-adapter and zero-shot want CLIP's image tower with its projection; choose a clip_* --backbone")
    if "rank" in own:
        own["rank"] = own["rank"] or len(model.head.weight) // 4  # CLIP-Adapter's
    own = {name: value for name, value in own.items() if name != "classifier"}
    model.head = adaptertune.ClipHead(model.head.weight, classes, **own)


def cache_features(run: Run, images: data.Images, what: str) -> data.Images:
    """Images as the features [n, D] that the head reads, computed once without augmentation, and kept on disk by backbone,
    image size and content, for other runs to find."""
    key = hashlib.sha256(f"{run.meta['fingerprint']} {run.meta['image_size']} {run.data.center} {run.bf16}".encode())
    key.update(images.pixels.numpy())
    path = data.cache_folder() / "features" / f"{key.hexdigest()[:24]}.safetensors"
    features, started = [], time.perf_counter()
    if not path.exists():
        run.model.eval()
        for x, _ in run.batches.eval(images, run.data.center):
            if stop_asked:
                raise KeyboardInterrupt
            with torch.inference_mode(), torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                features.append(run.model.features(x).float().cpu())
            data.progress(f"features of {what}, batch", len(features), run.batches.count(images), started)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": torch.cat(features) if features else torch.zeros(0, run.model.config.width)}, f"{path}.part")
        os.replace(f"{path}.part", path)
    return replace(images, pixels=vit.read_tensors(path)[0]["features"])


@torch.no_grad()
def embed_classes(run: Run) -> None:
    """Give a ClipHead its class matrix and scale: from the classes' names, or from the training images (their features)."""
    options, head = run.options, run.model.head
    if options.classifier == "prototypes":
        images = run.data.train.pixels.to(run.device) @ head.projection.T
        head.classes = adaptertune.prototypes(images, run.data.train.labels.to(run.device))
        return
    repo, weights = vit.BACKBONES[options.backbone].repo if options.backbone else "", options.text_weights or options.weights
    weights = Path(weights or data.hub_file(repo, "model.safetensors", offline=options.offline))
    vocab = options.vocab or next(filter(Path.exists, (weights.with_name(name) for name in VOCABULARIES)), None)
    tower, scale = vit.load_text(weights)
    vocab = vocab or data.hub_file(repo or "openai/clip-vit-base-patch16", "merges.txt", offline=options.offline)
    tokenizer = data.Tokenizer(vocab)
    if tokenizer.size != len(tower.token_embed.weight):
        raise ValueError(f"{vocab} has {tokenizer.size} ids, {weights} {len(tower.token_embed.weight)}; give its --vocab")
    sentences = data.sentences(run.data.name, run.data.classes, options.template)
    head.classes = tower(tokenizer(sentences, len(tower.pos_embed))).to(run.device)
    head.scale.fill_(scale)


def run_folder(options: argparse.Namespace, seed: int) -> Path:
    """runs/NAME; an unfinished run or another run's results in it are never overwritten."""
    own, parts = adaptertune.METHODS[options.method], [Path(options.dataset).resolve().name, options.method]
    parts += [f"{letter}{getattr(options, name)}" for letter, name in (("r", "rank"), ("p", "prompts"), ("k", "shots"),
              ("n", "limit")) if getattr(options, name) and name in ("shots", "limit", *own)]
    if options.name:
        parts = [options.name, *re.findall(r"[\w.-]+", options.label)]
    elif "reads" in own:
        parts += [f"every{options.every}"] * (options.every > 1) + ["b" + ".".join(map(str, options.blocks or []))] * bool(
            options.blocks) + [Path(options.init).stem] * (options.init != "zero")
    folder = Path("runs") / "-".join(parts + [f"s{seed}"] * (len(options.seeds) > 1 or not options.name))
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
    return {key: value for key, value in vars(options).items() if key not in NOT_KEPT} | {"seeds": [seed]}


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
    return 100 * hits.item() / seen if seen else math.nan


def fit(run: Run) -> None:
    """Train to the last epoch, saving the state after each; put back the weights that did best on val, and read test."""
    state, parameters = run.state, adaptertune.trained(run.model)
    optimizer = torch.optim.AdamW(adaptertune.groups(run.model, run.options.weight_decay), lr=run.options.lr)
    if (run.folder / "state.pt").exists():
        load_state(run, optimizer)
    describe(run)
    try:
        if "classifier" in run.meta:
            zero_shot(run)
        if run.options.epochs:
            print()
            for row in (COLUMNS, *(row for row in state.rows if run.options.epochs <= 40 or int(row[0]) % 10 == 0)):
                print_row(row)
        while state.epoch <= run.options.epochs:
            train_epoch(run, optimizer)
            val = evaluate(run, run.data.val, "validation")
            if not val < state.best_val:  # of equals the later one, which has seen more; NaN without val images
                state.best_epoch, state.best_val = state.epoch, val
                state.best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            end_epoch(state, val, run.options.epochs)
            save_state(run, optimizer)
        run.model.load_state_dict(state.best, strict=False)
        test = evaluate(run, run.data.test, "test")
        run.meta |= {"epoch": state.best_epoch, "val_accuracy": None if math.isnan(state.best_val) else state.best_val,
                     "test_accuracy": test}
    except KeyboardInterrupt:
        save_state(run, optimizer)
        raise


def zero_shot(run: Run) -> None:
    """Print what CLIP's class embeddings say of the test images before anything is trained, and note it in the file."""
    head, state = run.model.head, run.state
    image, text, head.image, head.text = head.image, head.text, None, None
    run.meta["zero_shot_accuracy"] = evaluate(run, run.data.test, "zero-shot")
    if not run.options.epochs:
        state.best_val = evaluate(run, run.data.val, "validation")
    head.image, head.text = image, text
    print(f"zeroshot {run.meta['zero_shot_accuracy']:.2f} %   (test, by {run.options.classifier} alone, before training)")


def end_epoch(state: State, val: float, epochs: int) -> None:
    """Print the epoch's row and stand at the start of the next."""
    state.train_time += state.epoch_time
    elapsed = state.train_time + state.eval_time
    left = elapsed / state.epoch * (epochs - state.epoch)
    state.rows.append([str(state.epoch), f"{state.loss / state.seen:.3f}", f"{100 * state.hits / state.seen:.2f}",
                       f"{val:.2f}", f"{state.seen / state.epoch_time:.0f}", clock(elapsed), clock(left)])
    if epochs <= 40 or state.epoch % 10 == 0:
        print_row(state.rows[-1])
    state.epoch, state.step, state.seen, state.hits, state.loss, state.epoch_time = state.epoch + 1, 0, 0, 0, 0.0, 0.0


def save_state(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Write state.pt: weights, optimiser, State."""
    weights = {name: parameter.detach() for name, parameter in adaptertune.trained(run.model).items()}
    write_records(run)
    torch.save(vars(run.state) | {"weights": weights, "optimizer": optimizer.state_dict()}, run.folder / "state.part")
    (run.folder / "state.part").replace(run.folder / "state.pt")


def write_records(run: Run) -> None:
    """Write config.json, metrics.csv and, for photos, who is in which split."""
    run.folder.mkdir(parents=True, exist_ok=True)
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


def estimate_rank(options: argparse.Namespace, seed: int) -> int:
    """The rank that takes 90 % of what the first step could take from the loss, all blocks together (adaptertune.spectrum),
    once a head has been fitted to the frozen features. Prints it and draws the spectra."""
    name = f"{options.name or Path(options.dataset).resolve().name}-spectrum"
    run = prepare(argparse.Namespace(**vars(options) | {"method": "head", "rank": None, "name": name, "resume": True}), seed)
    model, images, started = run.model, run.data.train, time.perf_counter()
    cached = replace(run.data, train=cache_features(run, images, "train"))
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2, weight_decay=0.05)
    for epoch in range(30):
        for x, labels in run.batches.train(cached, seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model.head(x), labels).backward()
            optimizer.step()
    model.requires_grad_(False).eval()
    shuffled = images[data.stratified_order(images.labels, f"spectrum/{seed}")]
    energy = adaptertune.spectrum(*adaptertune.shift_gradients(model, run.batches.eval(shuffled, run.data.center)))
    total = energy.sum(dim=0)
    rank, part = adaptertune.rank_for(total), energy / total.max()
    print(f"\n{'block':>6}{'share %':>9}{'50 % by rank':>14}{'90 % by rank':>14}")
    for i, each in enumerate(energy):
        print(f"{i:>6}{100 * each.max() / energy.max(dim=1)[0].sum():>9.1f}"
              f"{adaptertune.rank_for(each, 0.5):>14}{adaptertune.rank_for(each):>14}")
    x = list(range(1, len(total) + 1))
    series = [{"name": name, "x": x, "y": (100 * y).tolist(), "line": True} for name, y in (
        ("all blocks", part.sum(dim=0)), *((f"block {i}", y) for i, y in enumerate(part)))]
    path = Path("runs") / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    ticks = [2 ** i for i in range(20) if 2 ** i <= len(total)]
    path.write_text(adaptertune.svg([{"title": "what a rank can take of the first step, in %", "x": "rank", "log": True,
                                      "ticks": ticks, "mark": rank, "series": series}]))
    print(f"spectrum rank {rank} takes 90 % of it (a start, not a prescription); {clock(time.perf_counter() - started)}")
    print(f"saved    {path}")
    return rank


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
    print(f"trained  {total:,} ({100 * total / sum(numbers.values()):.2f} %)" + f": {parts}" * bool(parts))
    train, val = (f"{len(part):,} of {n:,}" if len(part) < n else f"{len(part):,}"
                  for part, n in zip((images.train, images.val), images.whole, strict=True))
    print(f"data     {images.name}: {train} train / {val} val / {len(images.test):,} test, {len(images.classes)} classes"
          + " (--limit: a quick look, not the data set's result)" * bool(run.options.limit))


def finish(run: Run) -> dict:
    """Write what stays, report it, remove what was only for --resume. Returns result.json."""
    state, path, count = run.state, run.folder / "adapters.safetensors", adaptertune.count(run.model)
    memory = peak_memory(run.device)
    write_records(run)
    adaptertune.save(path, run.model, run.meta)
    result = run.meta | {"trained": sum(count.values()) - count["frozen"], "seconds": state.train_time, "memory": memory}
    (run.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (run.folder / "state.pt").unlink(missing_ok=True)
    how = "nothing to choose" if not state.rows else f"epoch {state.best_epoch}, " + (
        "chosen on val; test read once" if len(run.data.val) else "the last, no image being left for val; test read once")
    if state.rows:
        columns = {name: [float(row[i]) for row in state.rows] for i, name in enumerate(COLUMNS[:4])}
        curves = [{"name": name, "x": columns["epoch"], "y": columns[name], "line": True} for name in COLUMNS[1:4]]
        (run.folder / "curves.svg").write_text(adaptertune.svg([
            {"title": "training loss", "x": "epoch", "series": curves[:1]},
            {"title": "accuracy in %", "x": "epoch", "series": curves[1:], "mark": state.best_epoch}]))
    print(f"\ntest     {run.meta['test_accuracy']:.2f} %   ({how})")
    print(f"cost     {clock(state.train_time)} training, {clock(state.eval_time)} evaluation, peak {memory:.1f} GiB")
    print(f"saved    {path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(f"next     python export.py {run.folder}")
    return result


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
    path.with_suffix(".svg").write_text(adaptertune.svg([panel]))
    print(f"saved    {path.with_suffix('.csv')}, {path.with_suffix('.svg')}")


@torch.inference_mode()
def look(folders: list[Path], path: Path) -> None:
    """Draw what the heads of finished runs read of the test images, side by side, and who is taken for whom; name the worst."""
    features, confusions = [], []
    for folder in folders:
        run, seen, answers, started = open_run(parse(["--eval", str(folder)])[0]), [], [], time.perf_counter()
        run.model.eval()
        for x, _ in run.batches.eval(run.data.test, run.data.center):
            x = run.model.features(x)
            seen.append((run.model.head.embed(x) if "classifier" in run.meta else x).cpu())
            answers.append(run.model.head(x).argmax(dim=-1).cpu())
            data.progress("looking, batch", len(seen), run.batches.count(run.data.test), started)
        names, labels, answers = run.data.classes, run.data.test.labels, torch.cat(answers)
        points, title = adaptertune.flatten(torch.cat(seen)), f"{run.meta['method']}, {run.meta['test_accuracy']:.2f} %"
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
        file = path.with_name(f"{path.name}-{what}.svg")
        file.write_text(adaptertune.svg(panels))
        print(f"saved    {file}")


# ---------------------------------------------------------------------------------------------------------------- main


def train(options: argparse.Namespace, seed: int) -> dict:
    """One run from loading to the report; returns its result.json, and its folder."""
    if options.rank == "auto":
        options = argparse.Namespace(**vars(options) | {"rank": estimate_rank(options, seed)})
    path = run_folder(options, seed) / "adapters.safetensors"
    if options.resume and path.exists() and not path.with_name("state.pt").exists():
        print(f"kept     {path}, finished before")
        return json.loads(path.with_name("result.json").read_text()) | {"folder": path.parent}
    run = prepare(options, seed)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_stop)
    peak_memory(run.device, reset=True)
    if run.meta.get("classifier") == "text":  # before what takes long
        embed_classes(run)
    if options.cached:
        run.data = replace(run.data, **{name: cache_features(run, getattr(run.data, name), name)
                                        for name in ("train", "val", "test")})
    if run.meta.get("classifier") == "prototypes":
        embed_classes(run)
    fit(run)
    return finish(run) | {"folder": run.folder}


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
    grid, folders = parse(arguments), []
    try:
        if grid[0].eval:
            run, folders = open_run(grid[0]), [Path(grid[0].eval)]
            describe(run)
            print(f"test     {evaluate(run, run.data.test, 'test'):.2f} %   (its file says {run.meta['test_accuracy']:.2f} %)")
        elif grid[0].spectrum:
            estimate_rank(grid[0], grid[0].seeds[0])
        else:
            results = [(options.label, train(options, seed)) for options in grid for seed in options.seeds]
            folders = [result["folder"] for _, result in results[::len(grid[0].seeds)]]  # the first seed's
            if len(results) > 1:
                compare(results, Path("runs") / f"{grid[0].name or results[0][1]['dataset']}-comparison")
        if grid[0].plot and folders:
            look(folders, folders[0] / "test" if len(folders) == 1 else Path("runs", grid[0].name or results[0][1]["dataset"]))
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
