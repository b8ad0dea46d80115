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
import functools
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptertune
import cli
import data
import vit

NOT_KEPT = ("resume", "eval", "name", "label", "plot", "spectrum")  # options that config.json leaves out
VOCABULARIES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz")


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
            "image_size": size, "mean": backbone.norm[0], "std": backbone.norm[1], "interpolation": "bicubic",
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
    batches = data.Batches(size, backbone.norm, batch, device)
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
    tower, scale = vit.load_text(weights, quick_gelu=run.model.config.quick_gelu)
    vocab = vocab or data.hub_file(repo or "openai/clip-vit-base-patch16", "merges.txt", offline=options.offline)
    tokenizer = adaptertune.Tokenizer(vocab)
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
    cli.describe(run)
    try:
        if "classifier" in run.meta:
            zero_shot(run)
        if run.options.epochs:
            print()
            for row in (cli.COLUMNS, *(row for row in state.rows if run.options.epochs <= 40 or int(row[0]) % 10 == 0)):
                cli.print_row(row)
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
                       f"{val:.2f}", f"{state.seen / state.epoch_time:.0f}", cli.clock(elapsed), cli.clock(left)])
    if epochs <= 40 or state.epoch % 10 == 0:
        cli.print_row(state.rows[-1])
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
    (run.folder / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in (cli.COLUMNS, *run.state.rows)))
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


# --------------------------------------------------------------------------------------- how much rank; the end of a run


def estimate_rank(options: argparse.Namespace, seed: int) -> int:
    """The rank that takes 90 % of what the first step could take from the loss (adaptertune.spectrum), seen on four fifths of
    the training images, 4,000 at most: less time than an epoch takes. Prints it and draws the spectra.

    The head is fitted to one half of them and the gradient taken from the other: its own images leave a head nothing to learn
    wherever it can follow them. The softmax is flattened by a temperature of 4, so that the gradient doesn't come from the few
    images alone that the head gets wrong. Both were chosen by what is steady over seeds (assets/results/rank-predictions.txt).
    """
    name, started = f"{options.name or Path(options.dataset).resolve().name}-spectrum", time.perf_counter()
    own = {"method": "head", "rank": None, "name": name, "resume": True, "epochs": 12, "lr": cli.RATES["head"][0]}
    run = prepare(argparse.Namespace(**vars(options) | own), seed)
    order = data.stratified_order(run.data.train.labels, f"spectrum/{seed}")[:min(4000, round(0.8 * len(run.data.train)))]
    one, other = (run.data.train[half] for half in order.tensor_split(2))
    fit_head(run, cache_features(run, one, "train"), cache_features(run, run.data.val, "val"))
    G, C = adaptertune.shift_gradients(run.model, run.batches.eval(other, run.data.center),
                                       loss=lambda logits, labels: F.cross_entropy(logits / 4, labels))
    rank = cli.spectra(adaptertune.spectrum(G, C), Path("runs") / f"{name}.svg")
    print(f"spectrum rank {rank} takes 90 % of it (a start, not a prescription); {cli.clock(time.perf_counter() - started)}")
    return rank


def fit_head(run: Run, train: data.Images, val: data.Images) -> None:
    """Fit the head to features, without a word, up to the epoch of the least loss on val, and freeze it."""
    run.data, best = replace(run.data, train=train), math.inf
    optimizer = torch.optim.AdamW(adaptertune.groups(run.model, run.options.weight_decay))
    for epoch in range(1, run.options.epochs + 1):
        run.state = State(epoch)
        train_epoch(run, optimizer)
        with torch.no_grad():
            loss = F.cross_entropy(run.model.head(val.pixels.to(run.device)), val.labels.to(run.device)).item()
        if not loss >= best:  # without val images it is NaN, and the last epoch counts
            best, weights = loss, {name: value.clone() for name, value in run.model.head.state_dict().items()}
    run.model.head.load_state_dict(weights)
    run.model.requires_grad_(False).eval()


def finish(run: Run) -> dict:
    """Write what stays, report it, remove what was only for --resume. Returns result.json."""
    count = adaptertune.count(run.model)
    result = run.meta | {"trained": sum(count.values()) - count["frozen"], "seconds": run.state.train_time,
                         "memory": cli.peak_memory(run.device)}
    write_records(run)
    adaptertune.save(run.folder / "adapters.safetensors", run.model, run.meta)
    (run.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (run.folder / "state.pt").unlink(missing_ok=True)
    cli.conclude(run, result)
    return result


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
    cli.peak_memory(run.device, reset=True)
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
    grid, folders = cli.parse(arguments), []
    try:
        if grid[0].eval:
            run, folders = open_run(grid[0]), [Path(grid[0].eval)]
            cli.describe(run)
            print(f"test     {evaluate(run, run.data.test, 'test'):.2f} %   (its file says {run.meta['test_accuracy']:.2f} %)")
        elif grid[0].spectrum:
            estimate_rank(grid[0], grid[0].seeds[0])
        else:
            results = [(options.label, train(options, seed)) for options in grid for seed in options.seeds]
            folders = [result["folder"] for _, result in results[::len(grid[0].seeds)]]  # the first seed's
            together = Path("runs", grid[0].name or results[0][1]["dataset"])
            if len(results) > 1:
                cli.compare(results, together.with_name(f"{together.name}-comparison"))
        if grid[0].plot and folders:
            opened = (open_run(cli.parse(["--eval", str(folder)])[0]) for folder in folders)
            cli.look(opened, folders[0] / "test" if len(folders) == 1 else together)
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
