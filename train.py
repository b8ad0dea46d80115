"""Train: load a frozen backbone, add adapters and a head, fit them, and keep what was trained.

    python train.py                                           digits on vit_micro, both embedded
    python train.py --dataset cifar100 --rank 8               CIFAR-100 on ViT-S/16, downloaded
    python train.py --dataset path/to/photos --weights FILE   your own photos, your own weights
    python train.py --method adaptertune vpt --seeds 0,1,2    several runs and a table of them
    torchrun --nproc-per-node 2 train.py …                    two processes, one GPU each if present

The recipe begins from the paper's (https://arxiv.org/abs/2603.14706): AdamW, weight decay 0.05,
linear warm-up over a tenth of the steps and then a cosine to zero, gradients clipped to norm 1,
random resized crops and flips. What differs from the paper's code is listed in assets/results, "The
paper's code". The epoch kept is the last whose validation accuracy is within √2 standard errors of
the best (`standard_error`), which on few validation images is nearly always the last one. The test
set is read once, at the very end, with the weights of that epoch.

A run leaves runs/NAME/ with adapters.safetensors (only the trained tensors), result.json,
metrics.csv, predictions.csv, config.json, split.json, README.md and, where matplotlib is installed,
curves.svg and mistakes.png. Until it finishes, state.pt is kept there: --resume continues exactly
where the run was stopped, on the same kind of device.

In order: training, several processes, setting up, a run's folder, opening a run, the terminal,
pictures, options.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:  # a container's first process: the kernel ignores default handlers
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))

import argparse
import contextlib
import copy
import csv
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import platform
import posixpath
import re
import shlex
import statistics
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import adaptertune
import data
import vit

# Peak learning rates by method, for data sets of any size. They were chosen on validation over
# pairs of backbone and data set (assets/results, Learning rates; for clip-adapter,
# fewshot-rates.txt). zero-shot trains nothing. The paper's 1e-3 for adapters is for 50 epochs on
# large data sets and too low for a short run. AdaptFormer's rate is the one for rank 64 (see
# `default_rate`). Those of `head` and `full` are the highest that `fit_to_backbone` sets; those of
# adapters hold up to the width of DeiT-tiny (`width_factor`).
RATES = {
    "adaptertune": 5e-3,
    "adaptformer": 1e-2,
    "vpt": 5e-3,
    "clip-adapter": 3e-3,
    "zero-shot": 1e-3,
    "head": 2e-2,
    "full": 2.5e-4,
    "scratch": 1e-3,
}
# The highest peak learning rate of a new head where the backbone is adapted too; lowered likewise.
HEAD_RATE = 1e-2
# The columns of the table of epochs.
COLUMNS = ("epoch", "loss", "train%", "val%", "img/s", "elapsed", "left")
# Those of metrics.csv: also the "seconds" of training and evaluation so far (in result.json, of
# training only), the learning rate of the epoch's last step, the mean validation loss. Unlike
# "loss", which is of augmented images, it has neither label smoothing nor class weights.
FILE_COLUMNS = (*COLUMNS, "seconds", "lr", "val_loss")
# With at most this many classes, tables of predictions have the probability of each.
EACH = 20
UNEVEN = 3  # above this ratio of class sizes, accuracy is also given as a mean over classes

# -------------------------------------------------------------------------------------- training


@dataclass
class State:
    """The progress of a run. With the weights and the optimiser it is all that --resume needs."""

    epoch: int = 1
    first_epoch: int = 1  # where the schedule begins; not 1 if a finished run got more epochs
    # Of the current epoch (end_epoch resets them):
    step: int = 0  # steps done
    seen: int = 0  # images
    hits: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # summed
    epoch_time: float = 0.0  # seconds
    # Of the run:
    train_time: float = 0.0  # of the finished epochs
    eval_time: float = 0.0
    rows: list[list[str]] = field(default_factory=list)  # of metrics.csv
    best_val: float = -1.0  # percent
    chosen_epoch: int = 0
    chosen_val: float = math.nan
    chosen: dict[str, Tensor] = field(default_factory=dict)  # the weights of that epoch


@dataclass
class Run:
    """Everything that one training run works with."""

    options: argparse.Namespace
    folder: Path
    dataset: data.Dataset
    model: vit.ViT
    batches: data.Batches
    device: torch.device
    bf16: bool
    meta: dict  # goes into adapters.safetensors
    backbone: vit.Backbone
    state: State = field(default_factory=State)
    head_note: str = ""  # with --init-lora: where the head's weights come from
    features_time: float = 0.0  # seconds for features that were computed once
    originals: data.Dataset | None = None  # the images, if `dataset` has their features instead
    predictions: dict[str, "Predictions"] = field(default_factory=dict)  # of val and test
    tested_before: bool = False  # it gets more epochs

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(adaptertune.trained(self.model).values())

    @functools.cached_property
    def class_weights(self) -> Tensor:
        """The weight of each class in the loss, [K]: 1, or with --class-weights the inverse of its
        share of the training images, scaled to a mean of 1 over these images."""
        sizes = class_sizes(self.dataset).float()
        if not self.options.class_weights:
            return torch.ones_like(sizes).to(self.device)
        return (sizes.sum() / (len(sizes) * sizes)).to(self.device)

    @functools.cached_property
    def compiled(self) -> Callable[[Tensor], Tensor]:
        """model.features, compiled by torch; on a GPU as one CUDA graph each for forward and
        backward, because launching the kernels one by one takes longer than running them."""
        torch.compiler.reset()  # torch limits how often it compiles, and earlier runs count
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return torch.compile(self.model.features, dynamic=False, mode=mode)

    @functools.cached_property
    def prototype_sizes(self) -> Tensor | None:
        """How many training images each class's prototype is the mean of, [K]; None without
        prototypes."""
        if self.meta.get("classifier") != "prototypes":
            return None
        return class_sizes(self.dataset).to(self.device)

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], or their cached features [B, D], to logits [B, K].

        Training may use bf16. Evaluation uses fp32, like the exported network. The head is always
        in fp32: in bf16 two logits are easily equal.
        """
        if images.ndim == 2:
            return self.model.head(images)
        training = self.model.training
        # Only full training batches use the compiled network: evaluation uses the plain one, and a
        # smaller last batch isn't worth a compilation.
        compiled = self.options.compile and training and len(images) == self.batches.share
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and training):
            features = self.compiled(images) if compiled else self.model.features(images)
        return self.model.head(features.float())


@dataclass
class Predictions:
    """A network's predictions for n images."""

    best: Tensor  # [n], the class with the highest logit
    second: Tensor  # [n], the runner-up
    probability: Tensor  # [n], of `best`
    loss: Tensor  # [n], cross-entropy with the label, without smoothing
    labels: Tensor  # [n]
    each: Tensor | None = None  # [n, K], the probability of each class, if K is at most EACH

    @property
    def accuracy(self) -> float:
        """Top-1, in percent; NaN without images."""
        return 100 * (self.best == self.labels).double().mean().item()

    def by_class(self, classes: int) -> tuple[Tensor, Tensor]:
        """Hits and images of each class, each [K]."""
        hits = torch.bincount(self.labels[self.best == self.labels], minlength=classes)
        images = torch.bincount(self.labels, minlength=classes)
        return hits, images

    def class_accuracy(self, classes: int) -> float:
        """The mean accuracy in percent over the classes that have images."""
        hits, images = self.by_class(classes)
        return 100 * (hits / images)[images > 0].mean().item()


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and nothing is half done."""


stop_asked: list[int] = []  # signals received
callers_handlers: dict[int, Callable | signal.Handlers | None] = {}  # before `run_program`


def on_stop(handler: Callable | signal.Handlers) -> None:
    """Let `handler` handle Ctrl-C and SIGTERM, unless a thread of another program runs this one:
    only the main thread may set handlers."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)


def ask_stop(number: int, frame: object) -> None:
    """Signal handler: record the signal. If Ctrl-C comes again, the caller's handler is called: it
    ends a program at once, and interrupts a notebook's cell without ending the notebook. SIGTERM
    may come again before the run is saved: batch systems and torchrun both send it."""
    stop_asked.append(number)
    if number == signal.SIGINT:
        signal.signal(number, callers_handlers.get(number) or signal.SIG_DFL)


def stop_at_once(number: int, frame: object) -> None:
    """Signal handler: raise a KeyboardInterrupt wherever the program is."""
    stop_asked.append(number)
    raise KeyboardInterrupt


def stop_if_asked() -> None:
    """Raise Stopped if any process received a signal. All processes call this together, at points
    where nothing is half done."""
    if any_process(bool(stop_asked)):
        raise Stopped


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at a step counted from 0: linear warm-up over a tenth of the
    steps, then a cosine to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_epochs(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """The training loop, from the epoch and step in run.state to the last epoch."""
    state = run.state
    least = least_accuracy(run)
    if not run.options.epochs:  # nothing to train, but what follows may be interrupted too
        save_state(run, optimizer)
    while state.epoch <= run.options.epochs:
        train_epoch(run, optimizer)
        predictions = predict(run, run.dataset.val, "validation")
        val = predictions.accuracy
        state.best_val = max(state.best_val, val)
        # Choose the last epoch that can't be told from the best: it has seen the most images.
        margin = standard_error(state.best_val, len(run.dataset.val))
        if math.isnan(val) or val >= max(state.best_val - margin, least):
            state.chosen_epoch = state.epoch
            state.chosen_val = val
            state.chosen = copy_of(adaptertune.saved_tensors(run.model))
        rate = optimizer.param_groups[0]["lr"]
        end_epoch(state, predictions, rate, run.options.epochs)
        save_state(run, optimizer)


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, which training doesn't change."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def least_accuracy(run: Run) -> float:
    """The validation accuracy that an epoch needs at least to be chosen: that of a finished run's
    weights for epochs that are added to it, so that these don't replace better weights."""
    if run.state.first_epoch > 1:  # result.json is that of the fewer epochs until the end
        return read_result(run.folder)["val_accuracy"] or 0.0
    return 0.0


def train_epoch(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """The remaining steps of the epoch in run.state.

    Raises:
        ValueError: the loss isn't finite.
    """
    state = run.state
    options = run.options
    steps = run.batches.count(run.dataset.train)
    run.model.train()
    first = state.step  # not 0 if a stopped run continues
    started = time.perf_counter()
    before = started
    for images, labels in run.batches.train(run.dataset, options.seed, state.epoch, first=first):
        stop_if_asked()  # here, between two steps, weights and optimiser agree
        # Like the batches, learning rate and dropout depend only on the position, so a resumed run
        # takes the same steps as one that wasn't stopped.
        position = (state.epoch - state.first_epoch) * steps + state.step
        total = (options.epochs - state.first_epoch + 1) * steps
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(position, total)
        # Dropout has a key of its own: the crops are drawn by (seed, epoch, step) alone.
        key = f"dropout/{options.seed}/{state.epoch}/{state.step}"
        torch.manual_seed(data.seed_from(key) + run.batches.rank)

        # The images of this batch in all processes. The last batch may be smaller.
        batch = min(options.batch, len(run.dataset.train) - state.step * options.batch)
        loss, hits = take_step(run, optimizer, images, labels, batch)

        # Sums over the augmented images, kept as tensors so that nothing waits for a GPU.
        state.loss = state.loss + loss.double() * batch
        state.hits = state.hits + hits
        state.seen += batch
        state.step += 1
        now = time.perf_counter()
        state.epoch_time += now - before
        before = now
        what = f"epoch {state.epoch}/{options.epochs}, step"
        data.progress(what, state.step, steps, started, first)
    finite = math.isfinite(state.loss)  # this waits for a GPU
    state.epoch_time += time.perf_counter() - before
    if not finite:
        raise ValueError(
            f"the loss became {state.loss.item()} in epoch {state.epoch}; "
            f"lower --lr ({options.lr:g}) and give another --name"
        )


def take_step(
    run: Run, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step on a batch of images.

    Args:
        images, labels: this process's part of the batch.
        batch: the number of images in the whole batch.

    Returns:
        The mean loss and the hits of the whole batch, before the step.
    """
    optimizer.zero_grad()
    loss = torch.zeros((), device=run.device)
    hits = torch.zeros((), dtype=torch.int64, device=run.device)
    parts = 1 if run.options.compile else count_parts(run.model, images)
    for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
        if run.prototype_sizes is None:
            logits = run.logits(x)
        else:
            logits = run.model.head.leave_one_out(x, y, run.prototype_sizes)
        losses = F.cross_entropy(
            logits, y, label_smoothing=run.options.label_smoothing, reduction="none"
        )
        # The label's weight applies to the whole smoothed loss, unlike torch's own `weight`.
        part_loss = (losses * run.class_weights[y]).sum() / batch
        part_loss.backward()  # adds to the gradients of the earlier parts
        loss += part_loss.detach()
        hits += (logits.argmax(dim=-1) == y).sum()
    check_gradients(run)
    loss, hits = sum_gradients(run.parameters, loss, hits)
    nn.utils.clip_grad_norm_(run.parameters, 1.0)
    optimizer.step()
    return loss, hits


def check_gradients(run: Run) -> None:
    """Raise a ValueError for a trained parameter without a gradient, which would never change. It
    may be in a module of a new method that no forward calls."""
    if all(parameter.grad is not None for parameter in run.parameters):
        return
    weights = adaptertune.trained(run.model)
    idle = [name for name, parameter in weights.items() if parameter.grad is None]
    raise ValueError(
        f"{', '.join(idle[:3])} can't be trained: the loss doesn't depend on it; "
        "does a forward call that module?"
    )


def count_parts(model: vit.ViT, images: Tensor) -> int:
    """The number of parts in which a batch [B, 3, S, S] passes through the network.

    A CPU takes about 2,048 patches at a time. For DeiT-tiny at 224 px these are 8 images instead of
    32: training then needs half of the memory for activations and no more time
    (tests/bench_train.py), and computing the features of 128 images takes 0.84 of the time. A GPU
    needs large products, and cached features [B, D] are small.
    """
    if images.ndim == 2 or images.device.type != "cpu":
        return 1
    patches = len(images) * model.config.grid**2
    return max(1, min(len(images), math.ceil(patches / 2048)))


def in_parts(network: Callable[[Tensor], Tensor], model: vit.ViT, images: Tensor) -> Tensor:
    """Apply `network`, which calls `model`, to a batch one part after the other (`count_parts`)."""
    parts = images.tensor_split(count_parts(model, images))
    return torch.cat([network(part) for part in parts])


def standard_error(accuracy: float, images: int) -> float:
    """The standard error of the difference between two such accuracies on different images, in
    percentage points. One hit and one miss are added, so that 100 % on a few images isn't taken for
    certain.

    Here both accuracies are on the same images, so the error of their difference is smaller. With
    the larger error, a run on few images keeps one of its last epochs, which has tested better on
    digits: 0.6 points, six seeds, 12 epochs; with 20 there is no difference (CHANGELOG, Tried).
    """
    p = (accuracy / 100 * images + 1) / (images + 2)
    return 100 * math.sqrt(2 * p * (1 - p) / max(1, images))


def end_epoch(state: State, val: Predictions, rate: float, epochs: int) -> None:
    """Record and print the epoch's row, and advance to the next epoch.

    Args:
        rate: the learning rate of the epoch's last step.
    """
    state.train_time += state.epoch_time
    elapsed = state.train_time + state.eval_time
    left = elapsed / state.epoch * (epochs - state.epoch)
    row = [
        str(state.epoch),
        f"{state.loss.item() / state.seen:.3f}",
        f"{100 * state.hits.item() / state.seen:.2f}",
        f"{val.accuracy:.2f}",
        f"{state.seen / state.epoch_time:.0f}",
        data.clock_text(elapsed),
        data.clock_text(left),
        f"{elapsed:.2f}",
        f"{rate:.3g}",
        f"{val.loss.mean().item():.4f}",
    ]
    state.rows.append(row)
    if is_shown(state.epoch, epochs):
        print_row(row)
    state.epoch += 1
    state.step = 0
    state.seen = 0
    state.hits = torch.zeros((), dtype=torch.int64)
    state.loss = torch.zeros((), dtype=torch.float64)
    state.epoch_time = 0.0


@torch.inference_mode()
def predict(run: Run, images: data.Images, what: str) -> Predictions:
    """The network's predictions for images. Each process computes a part and gets all of them."""
    K = len(run.dataset.classes)
    columns = 4 + K if K <= EACH else 4  # logits of all images would take much memory
    table = torch.zeros(columns, len(images), dtype=torch.float64, device=run.device)
    rows = torch.arange(len(images), device=run.device).split(run.batches.batch)
    seen = 0
    started = time.perf_counter()
    run.model.eval()
    for part, (x, labels) in zip(rows, run.batches.eval(images, run.dataset.center), strict=True):
        stop_if_asked()
        logits = in_parts(run.logits, run.model, x)
        probabilities = logits.softmax(dim=-1)  # [B, K]
        highest, classes = probabilities.topk(2)
        loss = F.cross_entropy(logits, labels, reduction="none")
        found = [*classes.T, highest[:, 0], loss]
        if K <= EACH:
            found += probabilities.T
        here = part[run.batches.rank :: run.batches.world]
        table[:, here] = torch.stack(found).double()
        seen = min(seen + run.batches.batch, len(images))
        data.progress(what, seen, len(images), started)
    table = sum_over_processes(table).cpu()
    run.state.eval_time += time.perf_counter() - started
    return Predictions(
        best=table[0].long(),
        second=table[1].long(),
        probability=table[2],
        loss=table[3],
        labels=images.labels.cpu(),
        each=table[4:].T if K <= EACH else None,
    )


def predict_all(run: Run) -> None:
    """Set run.predictions for validation, if it has images, and for test."""
    for part in ("val", "test"):
        images = getattr(run.dataset, part)
        if len(images):
            run.predictions[part] = predict(run, images, part)


def validate_zero_shot(run: Run) -> None:
    """Print the zero-shot validation accuracy (no bottlenecks), and add it to the metadata."""
    with run.model.head.zero_shot():
        val = predict(run, run.dataset.val, "zero-shot").accuracy
    if math.isnan(val):
        return
    run.meta["zero_shot_val_accuracy"] = val
    print(f"zeroshot {val:.2f} %   (val, by {run.options.classifier} alone, before training)")
    chance = 100 / len(run.dataset.classes)
    error = 100 * math.sqrt(chance / 100 * (1 - chance / 100) / len(run.dataset.val))
    near = val < min(chance + 2 * error, (chance + 100) / 2)
    if run.options.classifier == "text" and near:
        text = f"that is hardly above chance, {chance:.2f} %: are both towers and the vocabulary "
        print(f"warning  {text}of one CLIP, and are the classes' names plain English?")


def fit(run: Run) -> None:
    """Train or continue training, restore the weights of the chosen epoch, read the test set."""
    state = run.state
    groups = adaptertune.parameter_groups(
        run.model, run.options.weight_decay, run.options.lr, run.options.head_lr
    )
    # With fused=True a GPU takes a step in one launch.
    optimizer = torch.optim.AdamW(groups, fused=run.device.type == "cuda")
    found = (run.folder / "state.pt").exists()
    if found:
        load_state(run, optimizer)
    elif (run.folder / "adapters.safetensors").exists():
        add_epochs(run)
    run.tested_before = (run.folder / "adapters.safetensors").exists()
    try:
        if run.options.method in adaptertune.CLIP_METHODS:
            validate_zero_shot(run)
        if run.options.epochs:
            print_header(state.rows, run.options.epochs)
        train_epochs(run, optimizer)
        run.model.load_state_dict(state.chosen, strict=False)
        predict_all(run)
        if not run.options.epochs and "val" in run.predictions:  # no epoch has been validated
            state.chosen_val = run.predictions["val"].accuracy
        run.meta["epoch"] = state.chosen_epoch
        run.meta["val_accuracy"] = None if math.isnan(state.chosen_val) else state.chosen_val
        run.meta["test_accuracy"] = run.predictions["test"].accuracy
        if is_uneven(run.dataset.train, run.dataset.test):
            classes = len(run.dataset.classes)
            run.meta["test_class_accuracy"] = run.predictions["test"].class_accuracy(classes)
    except Stopped:
        save_state(run, optimizer)
        raise


def set_up_and_fit(run: Run) -> dict:
    """Describe a prepared run, compute features if it uses cached ones, train it and write its
    files. Returns the content of result.json."""
    options = run.options
    wait_for_all()  # before the first one writes anything
    peak_memory(run.device, reset=True)
    describe(run)
    describe_recipe(run)
    clip = options.method in adaptertune.CLIP_METHODS
    if clip and options.classifier == "text":  # before the slow part
        embed_class_names(run)
    if options.cached:
        started = time.perf_counter()
        run.originals = run.dataset
        run.dataset = cache_features(run)
        run.features_time = time.perf_counter() - started
    if clip and options.classifier == "prototypes":
        average_class_images(run)
    run.dataset = place_images(run.dataset, run.device)
    on_stop(ask_stop)  # from here on a step is completed first
    fit(run)
    on_stop(stop_at_once)
    return finish(run)


def finish(run: Run) -> dict:
    """Write the final files, report, and remove the file that was for --resume; the first process
    does this. Returns the content of result.json."""
    result = run.meta | {
        "trained": sum(parameter.numel() for parameter in run.parameters),
        "seconds": run.state.train_time,
        "memory": peak_memory(run.device),
    }
    factors = learnt_factors(run.model)
    if factors:
        result["learnt"] = factors  # "scale", "ratio" and "text_ratio" are where they began
    if not run.batches.rank:
        write_records(run)
        with data.replacing(run.folder / "adapters.safetensors") as file:
            adaptertune.save(file, run.model, run.meta)
        write_json(run.folder / "result.json", result)
        write_predictions(run, run.folder / "predictions.csv")
        data.write_file(run.folder / "README.md", model_card(run))
        conclude(run)
        (run.folder / "state.pt").unlink(missing_ok=True)  # last: until then --resume finishes
    wait_for_all()
    return result


def learnt_factors(model: vit.ViT) -> dict[str, list[float]]:
    """The learnt scales of adapters, or ratios of a ClipHead: {"scale": [1.1, 0.9]}."""
    factors: dict[str, list[float]] = {}
    for name, parameter in adaptertune.trained(model).items():
        if parameter.ndim == 0:
            factors.setdefault(name.rpartition(".")[2], []).append(parameter.item())
    return factors


def train_run(options: argparse.Namespace) -> dict:
    """One run, from loading to the report. Returns the content of result.json with the "folder",
    and with "kept" if the run was finished before."""
    if options.cached and dist.is_initialized():
        raise ValueError(f"{options.method} trains on cached features: one process, not torchrun")
    folder = run_folder(options)
    with at_work(folder):
        if run_folder(options) != folder:
            raise ValueError(f"another process has begun a run in {folder}; run this again")
        if is_unfinished(folder) and not options.resume:
            raise ValueError(
                f"{folder} holds an unfinished run; go on with --resume, or delete that folder"
            )
        finished = find_finished(options, folder)
        if finished:
            return finished | {"folder": folder, "kept": True}
        check_own(folder)
        if is_first():
            check_writable(folder)
        run = prepare(options, folder)
        describe_folder(options, folder)
        return set_up_and_fit(run) | {"folder": folder}


# -------------------------------------------------------------------------------- several processes


def join_processes() -> None:
    """Connect the processes that torchrun started, if any; only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        gpus = torch.cuda.is_available()
        # torch waits for the others, perhaps in vain, without looking at Python's signal handlers.
        on_stop(signal.SIG_DFL)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        on_stop(stop_at_once)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the process ends


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the only process, or the first one, which prints and writes."""
    return rank_and_world()[0] == 0


def wait_for_all() -> None:
    """Wait until every process gets here: a sum waits for all of them."""
    any_process(False)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run the block before all others do."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def any_process(value: bool) -> bool:
    """Whether `value` is true in any of the processes."""
    return bool(sum_over_processes(torch.tensor(int(value))))


def sum_over_processes(sums: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place. It must have the same shape in each."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def sum_gradients(
    parameters: list[nn.Parameter], loss: Tensor, hits: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum gradients, loss and hits over all processes in one exchange; return loss and hits."""
    if not dist.is_initialized():
        return loss, hits
    summed = [parameter.grad for parameter in parameters]
    summed += [loss, hits.to(loss)]
    of_all = sum_over_processes(nn.utils.parameters_to_vector(summed))
    nn.utils.vector_to_parameters(of_all, summed)
    *_, loss, hits = summed
    return loss, hits.long()


# ------------------------------------------------------------------------------------ setting up


def class_sizes(dataset: data.Dataset) -> Tensor:
    """How many training images each class has, [K]."""
    return torch.bincount(dataset.train.labels.cpu(), minlength=len(dataset.classes))


def is_uneven(*parts: data.Images) -> bool:
    """Whether classes differ so much in size, in any part, that accuracy alone would mislead."""
    for images in parts:
        sizes = torch.bincount(images.labels.cpu())
        sizes = sizes[sizes > 0]
        if len(sizes) and sizes.max() > UNEVEN * sizes.min():
            return True
    return False


def choose_device(name: str) -> torch.device:
    """The device that --device names. Raises ValueError if it can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_initialized():
        if not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= set(os.environ):
            raise ValueError(
                "LOCAL_RANK and LOCAL_WORLD_SIZE, which say which GPU each process gets, aren't "
                "set; start the processes with torchrun"
            )
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if here > torch.cuda.device_count():
            raise ValueError(
                f"{here} processes want a GPU each, and there are {torch.cuda.device_count()}; "
                "start as many, or give --device cpu"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # Apple's mps has no float64, for one thing
            raise NotImplementedError
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} can't be used here; choose auto, cpu or, with a GPU, cuda"
        ) from error
    return device


def be_repeatable(device: torch.device, bitwise: bool = True) -> None:
    """Make the process use this device, if it is a GPU, and compute fp32 products in fp32 instead
    of TF32. `bitwise` also makes a run reproducible to the bit: by default the backward pass of
    attention adds in any order.

    `bitwise` isn't for a compiled network: with it, the kernels that torch 2.11 fused changed
    features by 23 % and gradients by 29 %, and training ended 0.4 points lower.
    """
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(bitwise)
    if not bitwise:
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow; for debugging
    # torch checks this variable once, at the first matrix product. Left set, it is parsed at every
    # product, which takes as long as the rest of a small network's step. So: set it, multiply once,
    # unset it. It guards against one cuBLAS handle on several streams, which doesn't happen here.
    variable = "CUBLAS_WORKSPACE_CONFIG"
    before = os.environ.get(variable)
    os.environ[variable] = ":4096:8"
    try:
        torch.ones(1, 1, device="cuda").mm(torch.ones(1, 1, device="cuda"))
    except RuntimeError:  # the calling program multiplied before this, so it is too late
        torch.use_deterministic_algorithms(False)
    del os.environ[variable]
    if before is not None:
        os.environ[variable] = before


def check_compiler(device: torch.device) -> None:
    """Raise a ValueError if torch.compile can't be used: it needs a C++ compiler, or Triton."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # a missing compiler can raise anything
        reason = vit.first_line(error)
        raise ValueError(f"--compile can't be used here ({reason}); leave it out") from error


def place_images(dataset: data.Dataset, device: torch.device) -> data.Dataset:
    """Move the images to `device` if it is a GPU and they take at most half of its free memory."""
    torch.cuda.empty_cache()  # an earlier run may have left memory there
    size = sum(images.nbytes for images in dataset.parts.values())
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        return dataset
    return replace(dataset, **{part: images.to(device) for part, images in dataset.parts.items()})


def choose_bf16(device: torch.device) -> bool:
    """Whether --amp auto means bf16: if bf16 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return time_bf16() < 0.7


@functools.cache
def time_bf16() -> float:
    """How long this CPU takes for a matrix product in bf16, as a share of its time in fp32.

    It is measured because a CPU's flags don't tell. A training step gains less than its products:
    where they took 0.5, steps took 0.5 (large networks) to 0.8 (small ones; tests/bench_train.py).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(10):
        for dtype, times in seconds.items():
            x = torch.ones(2048, 256, dtype=dtype)
            weight = torch.ones(1024, 256, dtype=dtype)
            started = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    # The shortest times hardly depend on what else is running.
    return min(seconds[torch.bfloat16]) / min(seconds[torch.float32])


def load_backbone(options: argparse.Namespace) -> tuple[vit.ViT, vit.Backbone]:
    """The network that the options name, and what it expects of its input."""
    name = options.backbone
    if options.method == "scratch":
        backbone = vit.BACKBONES[name].at(options.image_size)
        return vit.ViT(backbone.config), backbone  # `adapt` gives it random weights
    if options.weights:
        path = Path(options.weights)
        if options.weights in vit.BACKBONES and not path.exists():
            raise ValueError(f"--weights takes a file; {path} is the name of a --backbone")
    elif name == "vit_micro":
        path = data.ASSETS / "vit_micro.safetensors"
    elif not vit.BACKBONES[name].repo:
        raise ValueError(f"--backbone {name} isn't published on the hub; give its --weights FILE")
    else:
        path = data.hub_file(vit.BACKBONES[name].repo, "model.safetensors", offline=options.offline)
    return vit.load(
        path,
        name=name,
        image_size=options.image_size,
        # CLIP's projection is loaded as the head; with --init-lora so is a classifier.
        head=options.method in adaptertune.CLIP_METHODS or bool(options.init_lora),
        lora=options.init_lora,
        heads=options.heads,
        quick_gelu=options.mlp_act == "quick_gelu" if options.mlp_act else None,
        mean=options.mean or None,
        std=options.std or None,
    )


def backbone_name(options: argparse.Namespace) -> str:
    """The name of the backbone, or else of its file."""
    weights = Path(options.weights)
    if weights.stem == "adapters":  # a run of --scratch or --method full
        weights = weights.parent
    return options.backbone or weights.stem


def adapt_backbone(model: vit.ViT, options: argparse.Namespace, classes: int) -> dict:
    """Adapt a backbone by the method that the options name; return the settings in effect."""
    settings = {name: getattr(options, name) for name in adaptertune.METHODS[options.method]}
    if options.method in adaptertune.PLACED_METHODS:
        settings["placement"] = adaptertune.choose_blocks(
            model.config.depth, every=options.every, blocks=options.blocks
        )
    if options.init in (None, *adaptertune.INITS):  # None where a method has no --init
        return adaptertune.adapt(model, options.method, classes, **settings)
    settings["init"] = "zero"
    used = adaptertune.adapt(model, options.method, classes, **settings)
    if not options.eval:
        start_from_file(model, options.init, used)
    return used | {"init": options.init}


def start_from_file(model: vit.ViT, path: str, used: dict) -> None:
    """Initialise the adapters from --init FILE, ours or AdaptFormer's.

    Args:
        used: the settings in effect. A file of ours must have the same settings and the same
            backbone; otherwise its adapters would compute something else here.
    """
    tensors, saved = vit.read_tensors(path)
    if any("lora_" in name for name in tensors):
        raise ValueError(f"--init {path}: {vit.IS_LORA}")
    present = {name: used[name] for name in ("reads", "act", "scale", "placement")}
    present = dict(adaptertune.unseen_settings(model)) | present
    present["fingerprint"] = adaptertune.fingerprint(model)
    adaptertune.check_same(path, saved, present)
    try:
        adaptertune.start_from(model, tensors)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"--init {path}: {vit.first_line(error)}") from error


def start_head(model: vit.ViT, given: nn.Module, classes: list[str], epochs: int) -> str:
    """Initialise a new head from the classifier that came with a LoRA or with the weights, if it
    has as many classes. Returns what was done, for the terminal.

    Args:
        given: that classifier; another module, or CLIP's projection, if there is none.

    Raises:
        ValueError: the classifier can't be used, and with 0 epochs a new one wouldn't be trained.
    """
    K = len(classes)
    fault = "neither the LoRA nor the weights have a classifier that can be used"
    classifier = isinstance(given, nn.Linear) and given.bias is not None
    if classifier and model.config.norm_pre:  # CLIP's projection has no bias, or timm's zeros
        classifier = bool(given.bias.any())
    if classifier:
        if given.out_features == K:
            model.head.load_state_dict(given.state_dict())
            order = f"row 0 is taken for {classes[0]!r}, row 1 for {classes[1]!r} and so on"
            return f"the LoRA's or its weights' own, {K} classes: {order}"
        fault = f"the one that came along has {given.out_features} classes, the data set {K}"
    if not epochs:
        raise ValueError(f"{fault}; leave out --epochs 0 to train a new head")
    return f"new, since {fault}"


read_dataset = functools.lru_cache(maxsize=1)(data.read)  # the seeds split the same images


def images_of(options: argparse.Namespace, size: int) -> tuple:
    """The arguments of data.read for a run whose network takes images of this size."""
    return options.dataset, options.data_dir, size, options.offline, options.squash


@torch.no_grad()
def spread_of_features(model: vit.ViT, dataset: data.Dataset, batches: data.Batches) -> float:
    """The mean of Σ|f - f̄| over 32 training images with features f [D]."""
    index = torch.linspace(0, len(dataset.train) - 1, 32).long().unique()
    alone = replace(batches, rank=0, world=1)  # not a part for each process
    model.eval()
    features = []
    for x, _ in alone.eval(dataset.train[index], dataset.center):
        features.append(in_parts(model.features, model, x))
    features = torch.cat(features)  # [n, D]
    return (features - features.mean(dim=0)).abs().sum(dim=1).mean().item()


def width_factor(width: int) -> float:
    """The factor of the learning rate of adapters and of full fine-tuning in a backbone of this
    width: 1 up to 192, DeiT-tiny's, then 192 / width. A step of AdamW changes what a matrix gives
    in proportion to the number of its inputs (muP, https://arxiv.org/abs/2203.03466, Table 3). Of
    an adapter that is true of V alone; that the factor suits adapters was measured on CLIP
    (assets/results, Learning rates)."""
    return min(1.0, 192 / width)


def fit_to_backbone(
    options: argparse.Namespace,
    model: vit.ViT,
    dataset: data.Dataset,
    batches: data.Batches,
) -> None:
    """Set the learning rates of a new linear head, of adapters and of full fine-tuning, unless they
    are given.

    An early step of AdamW moves each weight by about the learning rate. Apart from a shift that is
    the same for all images, such a step moves the logit of an image with features f by up to the
    head's learning rate times Σ|f - f̄|. The head's rate is the one at which this bound is 1 on
    average, but at most HEAD_RATE, or RATES["head"] for `head`. Over the backbones and image sizes
    that were tried, Σ|f - f̄| varies from 60 to 380; it is highest at the backbone's own image size.
    There the best rate of `full` is lower by as much, for which no derivation is known. So it is a
    fiftieth of 1 / mean Σ|f - f̄|, times `width_factor`, at most RATES["full"] and at least a
    hundredth of it (assets/results, Learning rates). The rate of adapters follows the width alone.
    All processes use the first one's measurement.
    """
    if options.head_lr and options.lr:
        return
    model.to(batches.device)
    spread = 0.0 if batches.rank else spread_of_features(model, dataset, batches)
    spread = sum_over_processes(torch.tensor(spread, dtype=torch.float64)).item()
    unit = 1 / max(1e-9, spread)
    highest = RATES["head"] if options.method == "head" else HEAD_RATE
    options.head_lr = options.head_lr or two_digits(min(highest, unit))
    if options.method == "full":
        rate = unit / 50 * width_factor(model.config.width)
        rate = max(RATES["full"] / 100, min(RATES["full"], rate))
        options.lr = options.lr or two_digits(rate)
    elif options.method in adaptertune.ADAPTER_METHODS:
        rate = default_rate(options.method, options.rank) * width_factor(model.config.width)
        options.lr = options.lr or two_digits(rate)
    options.lr = options.lr or options.head_lr


def split_dataset(dataset: data.Dataset, options: argparse.Namespace, folder: Path) -> data.Dataset:
    """Split a data set by the split.json in the run's folder, if there is a run; else by the seed.

    So a split stays the same if photos are added or removed, and a class keeps its number.

    Raises:
        ValueError: a stopped run lacks photos or its split.json; or the classes aren't the run's.
    """
    path = folder / "split.json"
    if not path.exists():
        if (folder / "state.pt").exists() or (folder / "adapters.safetensors").exists():
            raise ValueError(
                f"{path} is missing: nothing else says which images were trained on; restore it"
            )
        return data.split(
            dataset,
            seed=options.seed,
            limit=options.limit,
            shots=options.shots,
            test_share=options.test_share,
        )
    listed = read_split(path)
    sums = listed.pop("checksums")
    classes = listed.pop("classes")
    dataset = data.match_classes(dataset, classes, some=bool(options.eval))
    in_folder = set(dataset.everything.names)
    in_split = list(itertools.chain(*listed.values()))
    # A folder with fewer than half of the split's names is another one. A few names may be the same
    # by chance (IMG_0001.jpg).
    if options.eval and len(in_folder.intersection(in_split)) < len(in_split) / 2:
        return take_as_test(dataset, listed, sums)
    dataset, moved = data.split_by(dataset, listed, sums)
    for images, what in ((moved.missing, "gone"), (moved.changed, "other files by now")):
        if not images:
            continue
        text = f"{counted(len(images), 'image')} of {path}, such as {images[0]}"
        if not options.eval:
            raise ValueError(f"{what}: {text}; put them back, or train again with another --name")
        print(f"split    {what}: {text}")
    if not len(dataset.test):
        raise ValueError(f"none of the test images that {path} lists is in {options.dataset}")
    if moved.new and not options.limit and not options.shots:  # which leave images out themselves
        left_out = counted(moved.new, "image")
        print(f"split    left out: {left_out} that {path} doesn't list; another --name uses them")
    return dataset


def take_as_test(
    dataset: data.Dataset, listed: dict[str, list[str]], sums: dict[str, str]
) -> data.Dataset:
    """Use another folder than the run's own as test set: all of it (or its test/, if it has one)
    except copies of images that the run was trained or validated on.

    Args:
        listed: names of the run's own images in train, val and test.
        sums: their checksums.

    Raises:
        ValueError: the folder holds only such copies.
    """
    dataset = data.all_as_test(dataset)
    known = {sums[name] for part in ("train", "val") for name in listed[part] if name in sums}
    test = dataset.test
    new = [i for i, name in enumerate(test.names) if dataset.sums.get(name) not in known]
    copies = len(test) - len(new)
    if not new:
        raise ValueError(f"{dataset.name} has only images that the run was trained on")
    if copies:
        print(
            f"split    left out: {counted(copies, 'image')} that the run was trained or chosen on"
        )
    return replace(dataset, test=test[torch.tensor(new)])


def load_both(options: argparse.Namespace) -> tuple[vit.ViT, vit.Backbone, data.Dataset]:
    """A run's backbone, as `load_backbone` returns it, and its images, not yet split. Both are
    downloaded if they aren't there."""
    data.check_name(options.dataset)  # before a backbone is downloaded
    model, backbone = load_backbone(options)
    by_text = options.method in adaptertune.CLIP_METHODS and options.classifier == "text"
    if by_text and model.config.norm_pre:  # else `adapt` says that it is no CLIP
        find_text(options)  # before photos are decoded
    dataset = read_dataset(*images_of(options, backbone.config.image_size))
    return model, backbone, dataset


def prepare(options: argparse.Namespace, folder: Path | None = None) -> Run:
    """Load everything that a run needs, before anything is written.

    Args:
        folder: the run's folder; derived from the options if left out.
    """
    folder = folder or run_folder(options)
    compiled = options.compile and not options.cached
    device = choose_device(options.device)
    be_repeatable(device, bitwise=not compiled)
    if compiled:
        check_compiler(device)
    with first_process_first():  # it downloads
        torch.manual_seed(data.seed_from(f"{options.seed}/init"))
        model, backbone, dataset = load_both(options)
    dataset = split_dataset(dataset, options, folder)
    data.check_split(dataset)
    check_prototypes(options, dataset)
    options = copy.copy(options)  # of this run alone
    fit_to_data(options, dataset)
    take_up(options, folder)
    if options.amp == "auto":
        bf16 = any_process(choose_bf16(device))  # the same in all processes
        options.amp = "bf16" if bf16 else "off"
    dataset.min_scale = options.min_scale
    dataset.flip = dataset.flip and not options.no_flip
    size = backbone.config.image_size
    batches = data.Batches(size, backbone.norm, options.batch, device, *rank_and_world())
    fit_to_backbone(options, model, dataset, batches)
    meta = describe_network(options, model, backbone) | describe_task(options, dataset)
    given = model.head  # before a new one takes its place
    meta |= adapt_backbone(model, options, len(dataset.classes))
    note = ""
    if options.init_lora and options.method not in adaptertune.CLIP_METHODS:
        note = start_head(model, given, dataset.classes, options.epochs)
    model.to(device)
    bf16 = options.amp == "bf16"
    return Run(
        options=options,
        folder=folder,
        dataset=dataset,
        model=model,
        batches=batches,
        device=device,
        bf16=bf16,
        meta=meta,
        backbone=backbone,
        head_note=note,
    )


def take_up(options: argparse.Namespace, folder: Path) -> None:
    """Set what isn't given as it was in the run that the folder holds, if there is one."""
    begun = (folder / "config.json").exists()
    if any_process(begun) != begun:
        raise ValueError(f"{folder} isn't the same for all processes; let them share runs/")
    if not begun:
        return
    saved = read_config(folder)
    for name in ("amp", "lr", "head_lr"):
        if getattr(options, name) == AUTO[name]:
            setattr(options, name, saved.get(name, AUTO[name]))


def check_prototypes(options: argparse.Namespace, dataset: data.Dataset) -> None:
    """Refuse to train against prototypes of one image each: an image is compared with the other
    images of its class, and there are none."""
    prototypes = options.method == "clip-adapter" and options.classifier == "prototypes"
    if prototypes and class_sizes(dataset).max() == 1:
        raise ValueError(
            "clip-adapter can't be trained on prototypes of one image each; give more images "
            "(--shots), or --method zero-shot, or --classifier text"
        )


def describe_network(options: argparse.Namespace, model: vit.ViT, backbone: vit.Backbone) -> dict:
    """The metadata of a network that isn't adapted yet."""
    scratch = options.method == "scratch"
    meta = {
        "method": options.method,
        "backbone": backbone_name(options),
        "license": backbone.license,
        "fingerprint": "" if scratch else adaptertune.fingerprint(model),
        "image_size": backbone.config.image_size,
        "mean": backbone.norm[0],
        "std": backbone.norm[1],
        **dict(adaptertune.unseen_settings(model)),
        "interpolation": "bicubic",
    }
    if options.method in adaptertune.CLIP_METHODS:
        meta["classifier"] = options.classifier
    return meta


def describe_task(options: argparse.Namespace, dataset: data.Dataset) -> dict:
    """The metadata of what a run is trained on, and how."""
    meta = {
        "dataset": dataset.name,
        "classes": dataset.classes,
        "seed": options.seed,
        "limit": options.limit,
        "shots": options.shots,
        "epochs": options.epochs,
        "lr": options.lr,
        "head_lr": options.head_lr,
    }
    # A program that doesn't know `squash` misses `center`, and stops instead of cutting photos.
    if dataset.squash:
        meta["squash"] = True
    else:
        meta["center"] = dataset.center
    return meta


def cache_features(run: Run) -> data.Dataset:
    """The data set with the features [n, D] that the head reads in place of images.

    Training and validation images share a table of features, whichever part an image is in. So runs
    with other seeds, which draw other parts of the same images, find them on the disk. (Zero-shot
    by class names computes those of its validation images alone.) For images in rows 3, 7 and 9 of
    the pixels, the table has rows 0, 1 and 2.
    """
    features = {}
    for group in (("train", "val"), ("test",)):
        parts = {part: getattr(run.dataset, part) for part in group}
        if group[0] == "train" and not trains_on_images(run.options):
            images = parts.pop("train")
            features["train"] = data.Images(
                torch.zeros(len(images), 0), images.labels, images.names
            )
        rows = torch.cat([images.rows for images in parts.values()]).unique()
        everything = data.Images(run.dataset.train.table, torch.zeros(len(rows)), rows=rows)
        found = find_features(run, everything, " and ".join(parts))
        for part, images in parts.items():
            places = torch.searchsorted(rows, images.rows)
            features[part] = data.Images(found, images.labels, images.names, places)
    return replace(run.dataset, **features)


def trains_on_images(options: argparse.Namespace) -> bool:
    """Whether training images have an effect; zero-shot CLIP by class names needs none."""
    return options.method != "zero-shot" or options.classifier != "text"


def find_features(run: Run, images: data.Images, what: str) -> Tensor:
    """The features of images, [n, D], computed once, not augmented. They are cached on disk by
    backbone, normalisation and content, for other runs to use."""
    # All that features depend on. The fingerprint covers only weights, without the positions.
    network = (run.meta["fingerprint"], run.model.config, run.batches.norm)
    key = hashlib.sha256(repr((network, run.dataset.center)).encode())
    if run.model.pos_embed is not None:
        key.update(run.model.pos_embed.detach().cpu().numpy().tobytes())
    key.update(images.checksum().encode())
    path = data.cache_folder() / "features" / f"{key.hexdigest()[:24]}.safetensors"
    if not path.exists():
        features = compute_features(run, images, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_file(path, to_safetensors({"features": features}))
    tensors, _ = vit.read_tensors(path)
    features = tensors.get("features")
    if features is None or features.shape != (len(images), run.model.config.width):
        raise ValueError(f"{path} is damaged; delete it, and it is computed again")
    return features


@torch.inference_mode()
def compute_features(run: Run, images: data.Images, what: str) -> Tensor:
    """The features of images that the head reads, without augmentation: [n, D], on the CPU."""
    features = []
    total = run.batches.count(images)
    started = time.perf_counter()
    run.model.eval()
    for x, _ in run.batches.eval(images, run.dataset.center):
        features.append(in_parts(run.model.features, run.model, x).cpu())
        data.progress(f"features of {what}, batch", len(features), total, started)
    return torch.cat(features)


@torch.no_grad()
def embed_class_names(run: Run) -> None:
    """Set a ClipHead's class matrix to embeddings of the class names, and its scale to CLIP's."""
    options = run.options
    weights, vocab = find_text(options)
    tower, scale = vit.load_text(weights, quick_gelu=run.model.config.quick_gelu)
    tokenizer = vit.Tokenizer(vocab)
    E = len(run.model.head.projection)
    if tower.head.out_features != E:
        raise ValueError(
            f"{weights}: its text tower gives {tower.head.out_features} numbers, the image tower "
            f"{E}: they aren't of one CLIP"
        )
    if scale is None:
        scale = 100.0
        print(f"warning  scale 100, CLIP's highest: guessed, since {weights} states no logit_scale")
    vocabulary = len(tower.token_embed.weight)
    if tokenizer.size != vocabulary:
        raise ValueError(
            f"{vocab} has {tokenizer.size} ids, {weights} {vocabulary}; give its --vocab"
        )
    run.meta["template"] = options.template or data.template_of(run.dataset.name)
    sentences = data.sentences(run.dataset.classes, run.meta["template"])
    check_sentences(sentences, tokenizer, len(tower.pos_embed))
    heads = tower.config.heads
    named = options.backbone and not options.text_weights
    guess = " (guessed)" if tower.heads_are_guessed and not named else ""
    print(f"text     {sentences[0]!r}, …; text tower of {counted(heads, 'head')}{guess}")
    run.model.head.classes = tower(tokenizer(sentences, len(tower.pos_embed))).to(run.device)
    run.model.head.scale.fill_(scale)


def check_sentences(sentences: list[str], tokenizer: vit.Tokenizer, length: int) -> None:
    """Raise a ValueError for sentences that are too long for CLIP's text tower, or the same for two
    classes, which it then can't tell apart."""
    before: dict[tuple, str] = {}
    for sentence in sentences:
        ids = tuple(tokenizer.encode(sentence))
        if len(ids) + 2 > length:  # with the marks of start and end
            raise ValueError(
                f"{sentence[:60]!r}… has {len(ids)} tokens, the text tower takes {length - 2}; "
                "shorten --template or the class's name"
            )
        if ids in before:
            raise ValueError(
                f"{before[ids]!r} and {sentence!r} are the same for CLIP; rename one of the classes"
            )
        before[ids] = sentence


VOCABULARIES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz")  # of CLIP, in either form


def find_text(options: argparse.Namespace) -> tuple[Path, Path]:
    """The weights of CLIP's text tower, and its vocabulary: --vocab, else one beside the weights,
    else the hub's."""
    repo = vit.BACKBONES[options.backbone].repo if options.backbone else ""
    given = options.text_weights or options.weights
    weights = Path(given or data.hub_file(repo, "model.safetensors", offline=options.offline))
    if options.vocab:
        return weights, Path(options.vocab)
    for name in VOCABULARIES:
        if weights.with_name(name).exists():
            return weights, weights.with_name(name)
    repo = repo or "openai/clip-vit-base-patch16"
    return weights, data.hub_file(repo, "merges.txt", offline=options.offline, option="--vocab")


@torch.no_grad()
def average_class_images(run: Run) -> None:
    """Set a ClipHead's class matrix to class means, from cached features of the training images."""
    head = run.model.head
    features = run.dataset.train.pixels.to(run.device)  # [n, D], of cache_features
    embeddings = features @ head.projection.T  # [n, E]
    head.classes = adaptertune.prototypes(embeddings, run.dataset.train.labels.to(run.device))


# ----------------------------------------------------------------------------------- a run's folder


def run_name(options: argparse.Namespace) -> str:
    """A name such as digits-adaptertune-r8-s0; or --name, followed by what differs in the grid."""
    if options.name:
        parts = [options.name, *re.findall(r"[\w.-]+", options.label)]
        if len(options.seeds) > 1:
            parts.append(f"s{options.seed}")
        return "-".join(parts)
    parts = [Path(options.dataset).resolve().name, options.method]
    numbers = {"r": options.rank, "p": options.prompts, "k": options.shots, "n": options.limit}
    parts += [f"{letter}{number}" for letter, number in numbers.items() if number]
    if options.squash:
        parts.append("squashed")
    if options.every > 1:
        parts.append(f"every{options.every}")
    if options.blocks:
        parts.append("b" + ".".join(map(str, options.blocks))[:60])  # run_folder numbers repeats
    if options.method in adaptertune.ADAPTER_METHODS and options.init != "zero":
        parts.append(Path(options.init).stem)
    return "-".join([*parts, f"s{options.seed}"])


def run_folder(options: argparse.Namespace) -> Path:
    """The folder of these options: runs/NAME, or runs/NAME-2 and so on if other runs have the name.
    With --name it is the first one alone.

    Raises:
        ValueError: a run with other options has the --name or, with --resume, is unfinished; or
            --resume gives a finished run no more epochs than it has.
    """
    first = Path("runs") / run_name(options)
    folder = first
    number = 1
    fault = ""  # of the first folder that isn't passed over, if none holds this run
    while (folder / "config.json").exists() and not (options.name and fault):
        difference = find_difference(folder, options)
        if not difference:
            return folder
        other = f"{folder} holds a run with other options ({difference})"
        if options.resume and is_unfinished(folder):
            advice = "go on with its own options, or give this one another --name"
            fault = fault or f"{other}; {advice}"
        elif options.resume and difference.startswith("epochs "):
            advice = "give --resume more epochs than it has, to add some"
            fault = fault or f"{folder} has {difference}; {advice}"
        elif options.name:
            fault = fault or f"{other}; give this one another --name, or delete that folder"
        number += 1
        folder = Path(f"{first}-{number}")
    if fault:
        raise ValueError(fault)
    return folder


def find_difference(folder: Path, options: argparse.Namespace) -> str:
    """How the run in a folder differs from these options; "" if it is the same run. With --resume
    it is also the same run if it is finished and the options have more epochs, or if its files have
    been moved. Where epochs are to be trained, `split_dataset` compares the photos' content, and
    `check_backbone` the weights'."""
    saved = read_config(folder)
    kept = kept_options(options)
    more = (options.epochs or 0) > saved["epochs"]
    if options.resume and more and not is_unfinished(folder):
        del kept["epochs"]
    if options.resume:
        for name in ("dataset", "weights", "init_lora"):
            moved = kept[name] not in ("", saved.get(name))
            if moved and saved.get(name) and not is_at(saved[name]):
                del kept[name]
    kept_as_it_is = not more and not is_unfinished(folder)
    if "dataset" not in kept and kept_as_it_is and not has_photos_of(folder, options.dataset):
        return f"dataset {saved['dataset']}, not {options.dataset}"
    derived = ("lr", "head_lr", "label_smoothing", "cached")  # follow from others: named last
    for key in sorted(kept, key=lambda key: (key != "method", key in derived)):
        value = kept[key]
        before = saved.get(key)
        default = key in AUTO and value == AUTO[key]
        auto = default and key in saved.get("auto", [])
        new = key not in saved and not value  # an option that came later, and is off
        if before == value or key in MAY_DIFFER or auto or new:
            continue
        now = "the default" if default else in_words(key, value)
        return f"{key} {in_words(key, before)}, not {now}"
    return ""


def is_at(path: str) -> bool:
    """Whether a file or folder that config.json names is there; data sets always are."""
    return path in data.DATASETS or Path(path).exists()


def in_words(name: str, value: object) -> str:
    """An option's value for a message: "none" for one that isn't given."""
    if value in ("", None):
        return "none"
    return f"{value} (the default)" if value == make_parser().get_default(name) else str(value)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder's run was stopped before its end, or before the end of added epochs."""
    if (folder / "state.pt").exists():
        return True
    # config.json is written before state.pt: a kill between the two leaves it with more epochs.
    finished = (folder / "result.json").exists()
    return finished and read_result(folder)["epochs"] < read_config(folder)["epochs"]


def find_finished(options: argparse.Namespace, folder: Path) -> dict:
    """The result.json of a run that is already finished, and a line on the terminal that says so;
    {} if there is something to train."""
    path = folder / "adapters.safetensors"
    if not path.exists() or (folder / "state.pt").exists():
        return {}
    result = read_result(folder)
    if options.weights or options.init_lora:  # files that may have been replaced since
        model, _ = load_backbone(options)
        check_backbone(path, result["fingerprint"], adaptertune.fingerprint(model), options)
    if options.resume and (options.epochs or 0) > result["epochs"]:
        return {}
    print(
        f"kept     {path}, finished before with test accuracy {result['test_accuracy']:.2f} %; to "
        "train it again, delete that folder or give a --name"
    )
    if is_first():
        with contextlib.suppress(ValueError, OSError):  # the folder or split.json can't be used
            describe_new_photos(options, folder)
    return result


def has_photos_of(folder: Path, place: str) -> bool:
    """Whether all photos of a finished run are in another folder, by name and content."""
    with contextlib.suppress(ValueError, OSError):  # the folder or split.json can't be used
        sums = read_split(folder / "split.json")["checksums"]
        return all(data.file_crc(Path(place, name)) == crc for name, crc in sums.items())
    return False


list_photos = functools.lru_cache(maxsize=1)(data.list_photos)  # all runs have the same


def describe_new_photos(options: argparse.Namespace, folder: Path) -> None:
    """Print how many photos came to a finished run's folder of photos since it was trained."""
    if options.dataset in data.DATASETS or options.limit or options.shots:
        return
    listed = read_split(folder / "split.json")
    known = {*listed["train"], *listed["val"], *listed["test"]}
    new = [name for name in list_photos(options.dataset) if name not in known]
    if new:
        text = f"{counted(len(new), 'photo')} came since then, such as {data.printable(new[0])}"
        print(f"note     {text}; a run with another --name uses them, in a new split")


def check_backbone(path: Path, trained_on: str, present: str, options: argparse.Namespace) -> None:
    """Raise a ValueError if the fingerprints show that a run's file was trained on another backbone
    than the options name."""
    if present != trained_on:
        raise ValueError(
            f"{path} was trained on another backbone ({trained_on}) than "
            f"{given_weights(options) or options.backbone} is ({present}); give that one, or "
            "another --name"
        )


def given_weights(options: argparse.Namespace) -> str:
    """The files that the backbone's weights come from; "" if they are its own."""
    return " with ".join(filter(None, (options.weights, options.init_lora)))


def describe_folder(options: argparse.Namespace, folder: Path) -> None:
    """Print a note if a run's folder may be unexpected."""
    if (folder / "config.json").exists():
        return
    if options.resume:
        print(f"note     there is nothing to resume at {folder}: it begins")
    first = Path("runs") / run_name(options)
    if folder != first:
        difference = find_difference(first, options)
        text = f"note     {first} holds a run with {difference}; this one goes to {folder}"
        resumed = copy.copy(options)
        resumed.resume = True
        saved = read_config(first)
        kept = kept_options(options)
        same_files = all(kept[name] == saved.get(name) for name in PATHS)
        if same_files and not find_difference(first, resumed):
            text += "; --resume would add epochs to it"
        print(text)


def check_own(folder: Path) -> None:
    """Raise a ValueError if a folder that holds no run has files that a run would overwrite."""
    if (folder / "config.json").exists():
        return
    names = ("README.md", "metrics.csv", "predictions.csv", "result.json", "split.json")
    for name in (*names, "curves.svg", "mistakes.png"):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} holds no run, but a file that a run writes: move {name}, or give "
                "another --name"
            )


def check_writable(folder: Path, instead: str = "--name") -> None:
    """Raise a ValueError if files can't be written to a folder, which needn't exist yet.

    Args:
        instead: the option that names another folder.
    """
    place = folder
    while not place.exists():
        if place.is_symlink():  # such as one to a disk that isn't mounted
            raise ValueError(f"{place} is a link to nothing; mend it or remove it")
        place = place.parent
    # Not with tempfile, which on Windows retries for hours in a folder that can't be written to.
    probe = place / "write-test.part"
    try:
        data.remove_odd(probe)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        if not place.exists():  # another process has removed it, as it was empty
            return check_writable(folder, instead)
        raise ValueError(
            f"can't write to {place.resolve()} ({error.strerror}); change to another folder, or "
            f"give another {instead}"
        ) from error


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Lock a run's folder. It is made if it doesn't exist, and removed again if it is still empty.

    Raises:
        ValueError: another process is at work in it, or it can't be made.
    """
    if not is_first():  # the first process holds the lock for all
        yield
        return
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    if not folder.is_dir():
        check_writable(folder)
    with data.locked(folder, folder=True, wait=False):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # they aren't empty
                for each in new:
                    each.rmdir()


def kept_options(options: argparse.Namespace) -> dict:
    """The options that config.json holds: every one that says what the run is, with absolute
    paths."""
    kept = {name: value for name, value in vars(options).items() if name not in NOT_KEPT}
    for name in PATHS:
        kept[name] = absolute(kept[name])
    return kept | {"seeds": [options.seed]}


def absolute(path: str) -> str:
    """The absolute path of a file or folder; the name of a data set, or "", as it is."""
    return os.path.abspath(path) if path and path not in data.DATASETS else path  # noqa: PTH100


def read_json(path: Path, table: dict[str, Callable], required: Sequence[str]) -> dict:
    """Read a JSON file of a run.

    Args:
        table: what the values of its keys may be (see adaptertune.check_types).
        required: keys that it must have.

    Raises:
        ValueError: the file is missing or damaged, or the table doesn't allow a value.
    """
    if not path.exists():
        hint = maybe_below(path.parent)
        raise ValueError(f"no run in {path.parent}: {path} is missing{hint}")
    with vit.refusing(path, "restore it, or delete that folder and train again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        adaptertune.check_types(content, table, required)
    return content


def maybe_below(folder: str | Path) -> str:
    """A hint for a folder that holds no run: perhaps it is one of runs/, or the run is the folder
    around a file."""
    folder = Path(folder)
    for place in (Path("runs") / folder, folder.parent):
        if place != folder and (place / "split.json").exists():
            return f" (do you mean {place}?)"
    return ""


def read_config(folder: Path) -> dict:
    """A run's options, with values checked; options that no longer exist are left out.

    Raises:
        ValueError: as read_json.
    """
    if vit.is_lora(folder):
        raise ValueError(f"{folder}: {vit.IS_LORA}")
    table = {}
    for action in make_parser()._actions:
        if action.dest not in NOT_KEPT:
            table[action.dest] = functools.partial(option_allows, action)
    table["method"] = adaptertune.choice(tuple(adaptertune.METHODS))
    table["seeds"] = adaptertune.several(adaptertune.whole(0), least=1)
    table["auto"] = adaptertune.several(adaptertune.choice(tuple(AUTO)))
    table["epochs"] = adaptertune.whole(0)  # never None, unlike on the command line
    required = ("method", "seeds", "dataset", "data_dir", "epochs", "amp")
    saved = read_json(folder / "config.json", table, required)
    return {name: saved[name] for name in table if name in saved}


def option_allows(action: argparse.Action, value: object) -> bool:
    """Whether an option can have a value: parsing the value's text gives the value back."""
    if isinstance(value, bool) or action.nargs == 0:
        return isinstance(value, bool | None) and action.nargs == 0
    if value == action.default or [value] == action.default:  # options of GRID have lists
        return True
    if value is None:
        return False
    if action.choices:
        return value in list(action.choices)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        found = action.type(text)
    except (ValueError, argparse.ArgumentTypeError):
        return False
    if action.dest in GRID and action.dest != "blocks":  # several on the command line, one in a run
        return [value] == found
    return value == found


def read_result(folder: Path) -> dict:
    """A finished run's result.json: the metadata of its adapters, and what it cost."""
    number = adaptertune.real(0)
    table = adaptertune.META | {"trained": number, "seconds": number, "memory": number}
    required = ("trained", "seconds", "memory", "test_accuracy", "val_accuracy", "lr")
    required += ("fingerprint", "method", "dataset", "backbone", "epochs", "epoch")
    return read_json(folder / "result.json", table, required)


def read_split(path: Path) -> dict:
    """A run's split.json: the names of the images in train, val and test; their checksums; and the
    classes, in order."""
    names = adaptertune.several(adaptertune.text)
    table = {"train": names, "val": names, "test": names, "classes": names}
    table["checksums"] = adaptertune.by_name(adaptertune.text)
    found = read_json(path, table, tuple(table))
    return {name: found[name] for name in table}


def read_metrics(path: Path, epochs: int) -> list[list[str]]:
    """The rows of a finished run's metrics.csv.

    Raises:
        ValueError: it is missing or damaged.
    """
    with vit.refusing(path, "without it no epochs can be added: train again with another --name"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1 : 1 + epochs]
        check_rows(rows, epochs)
    return rows


def check_rows(rows: list[list[str]], epochs: int) -> None:
    """Raise a ValueError unless these are the rows of that many epochs."""
    if len(rows) != epochs:
        raise ValueError(f"rows of {len(rows)} epochs")
    for number, row in enumerate(rows, start=1):
        values = dict(zip(FILE_COLUMNS, row, strict=True))
        if values["epoch"] != str(number) or not all(isinstance(cell, str) for cell in row):
            raise ValueError(f"no row for epoch {number}")
        for name, most in (("loss", 1e30), ("train%", 100), ("seconds", 1e9), ("val%", 100)):
            value = float(values[name])
            if not 0 <= value <= most and not (name == "val%" and math.isnan(value)):
                raise ValueError(f"{name} {values[name]} in epoch {number}")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file."""
    data.write_file(path, json.dumps(content, indent=1) + "\n")


def to_csv(header: Iterable, rows: Iterable[Iterable]) -> str:
    """A table as CSV text."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow(row)
    return table.getvalue()


def write_csv(path: Path, header: Iterable, rows: Iterable[Iterable]) -> None:
    """Write a table as a CSV file."""
    data.write_file(path, to_csv(header, rows))


def write_records(run: Run) -> None:
    """Write config.json, metrics.csv, and split.json: which image is in which part."""
    run.folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    made = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), **versions}
    made["environment"] = environment(run)
    config = kept_options(run.options) | {"made": made}
    write_json(run.folder / "config.json", config)
    write_csv(run.folder / "metrics.csv", FILE_COLUMNS, run.state.rows)
    listed = {"classes": run.dataset.classes}
    for part, images in run.dataset.parts.items():
        listed[part] = images.names
    used = itertools.chain(listed["train"], listed["val"], listed["test"])
    sums = run.dataset.sums
    listed["checksums"] = {name: sums[name] for name in used if name in sums}
    write_json(run.folder / "split.json", listed)


def save_state(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Write state.pt in the first process: weights, optimiser and State are the same in all."""
    if not run.batches.rank:
        weights = adaptertune.saved_tensors(run.model)
        state = vars(run.state) | {"weights": weights, "optimizer": optimizer.state_dict()}
        state["fingerprint"] = run.meta["fingerprint"]
        state["environment"] = environment(run)
        write_records(run)
        with data.replacing(run.folder / "state.pt") as file:
            torch.save(state, file)
    wait_for_all()  # torchrun ends all processes when the first one ends


def load_state(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Restore an interrupted run completely, or raise a ValueError."""
    path = run.folder / "state.pt"
    advice = "delete that folder and train again"
    with vit.refusing(path, advice):
        vit.check_archive(path)
        with zipfile.ZipFile(path) as archive:  # torch.save's format; it has a checksum per member
            if archive.testzip():
                raise ValueError("a checksum differs")
        saved = torch.load(path, map_location=run.device, weights_only=True)
        vit.check_size(saved, path)
        trained_on = saved.pop("fingerprint")
        before = str(saved.pop("environment", ""))
    check_backbone(path, trained_on, run.meta["fingerprint"], run.options)
    with vit.refusing(path, advice):
        weights = saved.pop("weights")
        load_optimizer(optimizer, saved.pop("optimizer"))
        check_state(saved, weights, run)
        run.model.load_state_dict(weights, strict=False)
    for name, value in saved.items():
        setattr(run.state, name, value)
    where = "after the last epoch"
    if run.state.epoch <= run.options.epochs:
        steps = counted(run.batches.count(run.dataset.train), "step")
        where = f"epoch {run.state.epoch}, after {run.state.step} of {steps}"
    print(f"resumed  {where}")
    if before and before != environment(run):
        print(
            f"note     stopped on {before}; results may differ a little from an undisturbed run's"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore an optimiser's moments and rates; its settings come from the options and the device.
    Raises a ValueError if the moments don't fit the parameters."""
    present = optimizer.state_dict()
    present["state"] = saved["state"]
    optimizer.load_state_dict(present)
    for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group["lr"] = float(before["lr"])  # for metrics.csv, if stopped after an epoch's last step
    for parameter, moments in optimizer.state.items():
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        for name, shape in shapes.items():
            if moments[name].shape != shape or not moments[name].isfinite().all():
                raise ValueError(f"the optimiser's {name} has another shape, or isn't finite")


def check_state(saved: dict, weights: dict[str, Tensor], run: Run) -> None:
    """Raise a ValueError unless a run can have this State and these weights."""
    start = vars(State())
    if set(saved) != set(start):
        raise ValueError("a part is missing")
    for name, value in start.items():
        if type(saved[name]) is not type(value):
            raise ValueError(f"{name} is of another type")
    state = State(**saved)
    for name in ("hits", "loss"):
        tensor = saved[name]
        if tensor.shape or tensor.dtype != start[name].dtype or tensor.device.type == "meta":
            raise ValueError(f"{name} isn't a scalar of {start[name].dtype}")
    steps = run.batches.count(run.dataset.train)
    epochs = run.options.epochs
    if not (
        1 <= state.first_epoch <= state.epoch <= epochs + 1
        and 0 <= state.chosen_epoch < state.epoch
        and 0 <= state.step <= steps
        and 0 <= state.seen <= len(run.dataset.train)
        and all(0 <= each < 1e9 for each in (state.epoch_time, state.train_time, state.eval_time))
        and (math.isnan(state.best_val) or -1 <= state.best_val <= 100)
    ):
        raise ValueError("impossible epochs, steps, times or accuracies")
    check_rows(state.rows, state.epoch - 1)
    shapes = {name: each.shape for name, each in adaptertune.saved_tensors(run.model).items()}
    for tensors in (weights, state.chosen):
        found = {name: each.shape for name, each in tensors.items()}
        none_chosen = tensors is state.chosen and not tensors
        if found != shapes and not none_chosen:
            raise ValueError("weights are missing, or of another shape")


def add_epochs(run: Run) -> None:
    """Set run.state and the weights to the end of a finished run, to add epochs to it. These start
    from the weights of the chosen epoch, with a new schedule and a new optimiser."""
    state = run.state
    path = run.folder / "adapters.safetensors"
    adaptertune.load(path, run.model, name=run.meta["backbone"])
    result = read_result(run.folder)
    epochs = result["epochs"]
    state.rows = read_metrics(run.folder / "metrics.csv", epochs)
    state.epoch = epochs + 1
    state.first_epoch = state.epoch
    state.train_time = result["seconds"]
    state.chosen_epoch = result["epoch"]
    state.chosen_val = math.nan if result["val_accuracy"] is None else result["val_accuracy"]
    if state.rows:
        elapsed = float(state.rows[-1][FILE_COLUMNS.index("seconds")])
        state.eval_time = max(0.0, elapsed - state.train_time)
    vals = [float(row[COLUMNS.index("val%")]) for row in state.rows]
    state.best_val = max(vals, default=state.chosen_val)  # after 0 epochs: the initial accuracy
    state.chosen = copy_of(adaptertune.saved_tensors(run.model))
    added = run.options.epochs - epochs
    print(
        f"more     {counted(added, 'epoch')} from the weights of epoch {state.chosen_epoch}; "
        "warm-up and cosine begin again"
    )


# --------------------------------------------------------------------------------- opening a run


# Metadata in which the network of --eval may differ from the run's; `load` compares fingerprints.
EVAL_MAY_CHANGE = ("backbone", "license", "fingerprint", "init")
# Metadata that a run's adapters.safetensors must have.
REQUIRED_META = ("method", "backbone", "license", "fingerprint", "image_size", "mean", "std")
REQUIRED_META += ("dataset", "classes", "seed", "epochs", "val_accuracy", "test_accuracy")


def open_network(options: argparse.Namespace) -> tuple[vit.ViT, vit.Backbone, dict]:
    """The network of the finished run that --eval names, with the trained tensors; its backbone;
    and its metadata.

    Raises:
        ValueError: there is no finished run, or it used another backbone or other settings.
    """
    path = Path(options.eval) / "adapters.safetensors"
    if not path.exists() and (path.parent / "state.pt").exists():
        raise ValueError(f"{path.parent} holds an unfinished run; continue it with --resume")
    _, meta = adaptertune.read(path, REQUIRED_META)  # fails before anything is loaded
    if "center" not in meta and not meta.get("squash"):
        raise ValueError(f"{path} is damaged: its metadata lack center")
    model, backbone = load_backbone(options)
    present = describe_network(options, model, backbone)
    file = given_weights(options)
    adaptertune.check_fingerprint(meta, present["fingerprint"], present["backbone"], file)
    present |= adapt_backbone(model, options, len(meta["classes"]))
    compared = {name: value for name, value in present.items() if name not in EVAL_MAY_CHANGE}
    adaptertune.check_same(path, meta, compared)  # before tensors, for an error that names settings
    adaptertune.load(path, model, name=present["backbone"])
    return model, backbone, present | meta


def open_run(options: argparse.Namespace, need_data: bool = True) -> Run:
    """The finished run that --eval names: its data, and its network with the trained tensors.

    Args:
        need_data: if False and the data set can't be used, it is None and a note is printed.

    Raises:
        ValueError: no finished run there, or the backbone isn't the one that it was trained on.
    """
    folder = Path(options.eval)
    device = choose_device(options.device)
    be_repeatable(device)
    model, backbone, meta = open_network(options)
    model.to(device)
    size = meta["image_size"]
    batches = data.Batches(size, backbone.norm, options.batch or 128, device)
    run = Run(
        options=options,
        folder=folder,
        dataset=None,  # read below
        model=model,
        batches=batches,
        device=device,
        bf16=False,
        meta=meta,
        backbone=backbone,
    )
    try:
        if not Path(options.dataset).is_dir() and options.dataset not in data.DATASETS:
            raise ValueError(
                f"no folder {options.dataset}; if the run's photos are elsewhere now, give that "
                "--dataset FOLDER"
            )
        where = images_of(options, size)
        if absolute(options.dataset) == read_config(folder)["dataset"]:
            dataset = read_dataset(*where)
        else:  # it may have changed since it was evaluated, and needn't have all classes
            dataset = data.read(*where, some=True)
        dataset = split_dataset(dataset, options, folder)
        path = folder / "adapters.safetensors"
        adaptertune.check_same(path, meta, {"classes": dataset.classes})
        run.dataset = dataset
    except (ValueError, OSError) as error:  # OSError: a folder that may not be read
        if need_data:
            raise
        print(f"note     the run's data set can't be used: {error}")
    return run


@dataclass
class Classifier:
    """A finished run for use in your own code, without its data set (see load_run)."""

    network: vit.ViT  # normalised images [B, 3, S, S] to logits [B, K]; in eval mode
    classes: list[str]
    image_size: int  # S
    center: float  # the network sees this share of each side of a photo's square
    batches: data.Batches
    square: data.Square  # what a photo becomes before that share is cut out

    def preprocess(self, photo: data.Photo) -> Tensor:
        """A photo as input of the network: [1, 3, S, S].

        Raises:
            ValueError: the photo can't be read.
        """
        pixels = data.read_photo(photo, self.square)[None].to(self.batches.device)
        return self.batches.central(pixels, self.center)

    @torch.no_grad()
    def classify(
        self, photos: list[data.Photo], batch: int, mapped: Callable = map
    ) -> Iterator[Tensor | ValueError]:
        """Each photo's probabilities [K], or why it can't be read.

        Args:
            mapped: `map`, or that of a pool of threads, which decode the photos of a batch at once.
        """

        def read(photo: data.Photo) -> Tensor | ValueError:
            try:
                return self.preprocess(photo)
            except ValueError as error:
                return error

        for first in range(0, len(photos), batch):
            found = list(mapped(read, photos[first : first + batch]))
            readable = [i for i, x in enumerate(found) if isinstance(x, Tensor)]
            if readable:
                logits = self.network(torch.cat([found[i] for i in readable]))
                for i, scores in zip(readable, logits.softmax(dim=-1).cpu(), strict=True):
                    found[i] = scores
            yield from found

    def predict(self, photos: "Iterable[data.Photo] | data.Photo") -> tuple[list[str], Tensor]:
        """The labels of n photos, and the probabilities [n, K]. A photo is a path, the content of a
        file as bytes, a binary file, or Pillow's image; a single one needn't be in a list. For
        tensors, call `network`.

        A large JPEG is decoded at a smaller size, unless it is given as Pillow's image, so the
        probabilities may differ a little between the two.

        Raises:
            ValueError: a photo can't be read, or none is given.
        """
        file = isinstance(photos, str | Path | bytes) or hasattr(photos, "read")
        if file or not isinstance(photos, Iterable):
            photos = [photos]
        photos = list(photos)
        if not photos:
            raise ValueError("no photos to label")
        # Without threads: the same open file may be in the list twice, and a program may be ending.
        found = []
        for scores in self.classify(photos, batch=32):
            if isinstance(scores, ValueError):
                raise scores
            found.append(scores)
        probabilities = torch.stack(found)
        labels = [self.classes[best] for best in probabilities.argmax(dim=-1).tolist()]
        return labels, probabilities


def load_run(
    folder: str | Path, weights: str | Path = "", init_lora: str | Path = "", device: str = "cpu"
) -> Classifier:
    """A finished run for use in your own code, without its data set:

        model = train.load_run("runs/NAME")
        labels, probabilities = model.predict(["photo.jpg", "other.jpg"])

    Threads may share the result. A process that is forked after this can't use torch's threads, so
    load it in each worker of a server, not before they are forked.

    Args:
        weights: the path of the backbone's file, if it has moved.
        init_lora: the path of the LoRA, if it has moved.
        device: "cpu"; "cuda" for a GPU; "auto" for a GPU if there is one. On a GPU, torch's own
            settings hold: by default, its convolutions have TF32's precision.

    Raises:
        ValueError: no finished run there, or the backbone isn't the one that it was trained on.
    """
    moved = {"weights": weights, "init_lora": init_lora}
    moved = {name: str(path) for name, path in moved.items() if path}
    with torch.random.fork_rng(devices=[]):  # weights are drawn before the loaded ones replace them
        return open_classifier(options_of(folder, device=str(device), **moved))


def open_classifier(options: argparse.Namespace) -> Classifier:
    """The Classifier of the run that --eval names, on the device that --device names."""
    device = choose_device(options.device)
    model, _, meta = open_network(options)
    model = model.eval().requires_grad_(False).to(device)
    batches = data.Batches(meta["image_size"], (meta["mean"], meta["std"]), 1, device)
    square = square_of(meta)
    center = center_of(meta)
    return Classifier(model, meta["classes"], meta["image_size"], center, batches, square)


def center_of(meta: dict) -> float:
    """The share of each side of a photo's square that a network with these metadata sees."""
    return 1.0 if meta.get("squash") else meta["center"]


def square_of(meta: dict) -> data.Square:
    """The squares of photos that a network with these metadata was trained on."""
    side = data.stored_side(meta["image_size"], center_of(meta))
    return data.Square(side, meta.get("squash", False))


# ---------------------------------------------------------------------------------- the terminal

WIDTHS = (6, 8, 9, 8, 9, 10, 10)
FEW = 50  # with fewer images to evaluate on, a note says what one of them counts for


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """The peak memory in GiB since the last `reset`: the GPU's, else the process's (0 if that is
    unavailable)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text())  # some containers don't have it
    return int(peak[1]) / 2**20 if peak else 0.0


def environment(run: Run) -> str:
    """What a run's rounding depends on: torch's version, device, threads, processes, precision."""
    if run.device.type == "cuda":
        where = torch.cuda.get_device_name(run.device)
    else:
        where = counted(torch.get_num_threads(), "thread")
    precision = "bf16" if run.bf16 else "fp32"
    device = f"{run.device.type} {where}"
    if run.batches.world > 1:
        device = f"{run.batches.world} processes, each {device}"
    return f"torch {torch.__version__} · {device} · {precision}"


def describe(run: Run) -> None:
    """Print the lines above the table: environment, backbone, trained parameters and data."""
    text = f"{environment(run)} · seed {run.options.seed}"
    if run.device.type == "cpu" and math.isfinite(data.cpu_limit()):
        text += f" (this process may use {data.cpu_limit():g} CPUs)"
    print(f"env      {text}")

    counts = adaptertune.count(run.model)
    describe_backbone(run.backbone, run.meta, counts["frozen"])
    describe_trained(counts, run.meta["epochs"])
    if run.head_note:
        print(f"head     {run.head_note}")

    describe_data(run.dataset, run.options)
    if is_uneven(run.dataset.train):
        describe_classes(run)


def describe_recipe(run: Run) -> None:
    """Print how a run is trained; nothing for 0 epochs."""
    options = run.options
    if not options.epochs:
        return
    steps = counted(run.batches.count(run.dataset.train), "step")
    text = f"recipe   {counted(options.epochs, 'epoch')} of {steps}, batch {options.batch}"
    text += f", learning rate {options.lr:g}"
    if options.head_lr != options.lr:
        text += f" (head {options.head_lr:g})"
    if not options.cached:
        text += f", crops of {options.min_scale:g} to 1 of the area"
        text += ", mirrored at random" if run.dataset.flip else ""
    if options.label_smoothing:
        text += f", label smoothing {options.label_smoothing:g}"
    print(text)


def describe_trained(counts: dict[str, int], epochs: int) -> None:
    """Print what is trained and saved; with 0 epochs it is only saved."""
    total = sum(counts.values())
    trained = total - counts["frozen"]
    text = f"trained  {trained:,} ({100 * trained / total:.2f} %)"
    if trained and not epochs:
        text = "trained  nothing; kept are"
    parts = [name for name in ("adapters", "head", "backbone") if counts[name]]
    if parts:
        text += ": " + ", ".join(f"{name} {counts[name]:,}" for name in parts)
    print(text)


def describe_backbone(backbone: vit.Backbone, meta: dict, frozen: int) -> None:
    """Print the network's name and shape, the normalisation, and what was guessed."""
    heads = counted(backbone.config.heads, "head")
    if "heads" in backbone.source:
        heads += f" ({backbone.source['heads']})"
    act = "QuickGELU" if backbone.config.quick_gelu else "GELU"
    size = backbone.config.image_size
    print(f"backbone {meta['backbone']} {size}px, {frozen:,} frozen, {heads}, {act}")
    print(f"pixels   {vit.describe_norm(backbone.norm)}")
    if backbone.note:
        print(f"weights  {backbone.note}")
    if backbone.lora:
        print(f"lora     {backbone.lora}")
    if backbone.guessed:
        print(
            f"warning  {', '.join(backbone.guessed.values())}: guessed, since nothing beside the "
            f"weights states it; if that is wrong: --backbone, or {', '.join(backbone.guessed)}"
        )


def describe_data(images: data.Dataset, options: argparse.Namespace) -> None:
    """Print the numbers of images and classes, and what was left out."""
    train = of_all(len(images.train), images.whole[0])
    val = of_all(len(images.val), images.whole[1])
    text = f"data     {images.name}: {train} train / {val} val / {len(images.test):,} test, "
    text += f"{len(images.classes)} classes"
    if options.limit:
        text += " (--limit: a quick look, not the data set's result)"
    print(text)
    describe_missing(images.classes, images.val, "validation")
    describe_missing(images.classes, images.test, "test")
    for part, what in ((images.val, "validation image"), (images.test, "test image")):
        if 0 < len(part) < FEW:
            text = f"{counted(len(part), what)}: each is {100 / len(part):.3g} points of accuracy"
            print(f"note     {text}")
    if is_uneven(images.train, images.test):
        describe_smallest(images)
    if options.dataset in data.DATASETS and Path(options.dataset).is_dir():
        print(f"note     that is the built-in set; the folder of this name is ./{options.dataset}")
    if images.skipped:
        skipped = counted(len(images.skipped), "file")
        print(
            f"skipped  {skipped}, not photos or outside the class folders, such as "
            f"{images.skipped[0]}"
        )
    describe_copies(images)
    describe_subfolders(images)
    describe_view(images, training=not options.eval)


def describe_subfolders(images: data.Dataset) -> None:
    """Print a note if photos of one subfolder of a class are in train and in test."""
    folders_of = {}  # by class
    for name, label in zip(images.train.names, images.train.labels.tolist(), strict=True):
        folders_of.setdefault(label, set()).add(posixpath.dirname(name))
    subfolders = set()
    for folders in folders_of.values():
        subfolders |= folders - {posixpath.commonpath(folders)}
    shared = subfolders.intersection(posixpath.dirname(name) for name in images.test.names)
    if shared:
        print(
            f"note     photos of {counted(len(shared), 'subfolder')}, such as {min(shared)}, are "
            "in train and in test; if those of one subfolder show the same thing, split them "
            "yourself"
        )


def describe_view(images: data.Dataset, training: bool) -> None:
    """Print which part of a photo the network sees."""
    sizes = data.sample_sizes(images)
    if not sizes:
        return
    width, height = sizes[len(sizes) // 2]  # the median by the share that is seen
    text = f"view     of a typical photo, {width} x {height} pixels, evaluation and labelling see "
    if images.squash:
        print(f"{text}all, squashed to a square")
        return
    _, _, side = data.central_box(height, width, images.center)
    share = side**2 / (width * height)
    advice = "; with --squash all of it" if share < 0.75 and training else ""
    print(f"{text}the middle {side} x {side} ({100 * share:.0f} %){advice}")


def describe_smallest(images: data.Dataset) -> None:
    """Print a note if the mean over classes depends on a class with few test images."""
    sizes = images.test.labels.bincount(minlength=len(images.classes))
    tested = int((sizes > 0).sum())
    few = int(torch.where(sizes > 0, sizes, sizes.max()).argmin())
    if sizes[few] < FEW:
        count = f"{counted(int(sizes[few]), 'test image')} of {images.classes[few]}"
        points = 100 / (tested * int(sizes[few]))
        print(f"note     {count}: each is {points:.3g} points of the mean over classes")


def describe_missing(classes: list[str], images: data.Images, what: str) -> None:
    """Print a note if a part, unless it is empty, has no images of some classes."""
    sizes = torch.bincount(images.labels, minlength=len(classes))
    missing = (sizes == 0).nonzero().flatten().tolist()
    if len(images) and missing:
        noun = "class" if len(missing) == 1 else "classes"
        example = classes[missing[0]]
        print(f"note     no {what} image of {len(missing)} {noun}, such as {example}")


def describe_copies(dataset: data.Dataset) -> None:
    """Print warnings of copies of a photo: in train and in test, and in several classes."""
    if not dataset.sums:
        return
    copies = data.find_copies(dataset)
    trained = set(dataset.train.names)
    tested = set(dataset.test.names)
    everything = dataset.everything
    label = dict(zip(everything.names, everything.labels.tolist(), strict=True))
    in_both = [pair for pair in copies if pair[0] in tested and pair[1] in trained]
    if in_both:
        count = f"{len(in_both)} of {len(tested):,} test images"
        print(f"warning  {count} are training images too, such as {' and '.join(in_both[0])}")
    contrary = [pair for pair in copies if label[pair[0]] != label[pair[1]]]
    if contrary:
        photos = counted(len({first for _, first in contrary}), "photo")
        print(f"warning  {photos} in several classes, such as {' and '.join(contrary[0])}")


def describe_classes(run: Run) -> None:
    """Print the sizes of the smallest and the largest class, and whether the loss is weighted."""
    sizes = class_sizes(run.dataset)
    few = int(sizes.argmin())
    many = int(sizes.argmax())
    classes = run.dataset.classes
    text = f"from {counted(int(sizes[few]), 'training image')} ({classes[few]}) to "
    text += f"{sizes[many]:,} ({classes[many]})"
    if run.options.class_weights:
        text += ", weighted by the inverse of their sizes"
    else:
        text += "; --class-weights makes them count alike"
    print(f"classes  {text}")


def counted(number: int, noun: str) -> str:
    """A number and its noun, such as "1 thread" or "2,000 images"."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def method_text(meta: dict) -> str:
    """A method and its rank, if it has one: "adaptertune rank 8", or "head"."""
    return f"{meta['method']} rank {meta['rank']}" if meta.get("rank") else meta["method"]


def of_all(part: int, whole: int) -> str:
    """A part of a whole, such as "2,000 of 45,000"; only "45,000" if it is all."""
    return f"{part:,} of {whole:,}" if part < whole else f"{part:,}"


def print_row(cells: Iterable[str]) -> None:
    """Print one aligned row of the table of epochs."""
    padded = [f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=False)]
    print("".join(padded), flush=True)


def is_shown(epoch: int, epochs: int) -> bool:
    """Whether the terminal shows this epoch. Of more than 40 it shows every tenth."""
    return epochs <= 40 or epoch % 10 == 0


def print_header(rows: list[list[str]], epochs: int) -> None:
    """Print the header of the table of epochs, and the rows of the epochs that are done."""
    print()
    print_row(COLUMNS)
    for row in rows:
        if is_shown(int(row[0]), epochs):
            print_row(row)


def report_test(run: Run, how: str) -> None:
    """Print the accuracy on test, and the five classes with the lowest accuracies: those with
    mistakes, or of classes of uneven size any."""
    predictions = run.predictions["test"]
    text = f"test     {predictions.accuracy:.2f} %"
    K = len(run.dataset.classes)
    uneven = is_uneven(run.dataset.train, run.dataset.test)
    if uneven:
        text += f", as a mean over classes {predictions.class_accuracy(K):.2f} %"
    print(f"{text}   ({how})")
    hits, images = predictions.by_class(K)
    predicted = predictions.best.unique()
    if len(predicted) == 1 and (images > 0).sum() > 1:
        print(f"warning  each test image is taken for {run.dataset.classes[predicted]}")
    shares = hits / images  # NaN, which is sorted last, for a class without images
    worst = []
    for label in shares.argsort(stable=True)[:5].tolist():
        if hits[label] < images[label] or (uneven and images[label]):
            worst.append(f"{run.dataset.classes[label]} ({hits[label]}/{images[label]} right)")
    if worst:
        print(f"worst    {', '.join(worst)}")


def write_predictions(run: Run, path: Path) -> None:
    """Write a .csv with a row for each image of validation and test; with few classes also the
    probability of each."""
    classes = run.dataset.classes
    rows = []
    for part, found in run.predictions.items():
        images = getattr(run.dataset, part)
        columns = (images.names, found.labels, found.best, found.probability, found.second)
        for i, (name, label, best, probability, second) in enumerate(zip(*columns, strict=True)):
            row = [classes[label], classes[best], f"{probability:.4f}", classes[second]]
            if found.each is not None:
                row += as_cells(found.each[i])
            rows.append((name, part, *row))
    header = ("file", "split", "label", "prediction", "probability", "runner-up")
    write_csv(path, (*header, *columns_of(classes)), rows)


def as_cells(probabilities: Tensor) -> list[str]:
    """Probabilities [K] as cells of a table."""
    return [f"{each:.4f}" for each in probabilities.tolist()]


def columns_of(classes: list[str]) -> list[str]:
    """The headings of the columns for the probability of each class; none with many classes."""
    return [f"probability of {name}" for name in classes] if len(classes) <= EACH else []


def as_code(name: str) -> str:
    """A name as a code span in Markdown, in which no character has a special meaning."""
    plain = data.printable(name).replace("`", "'")
    return f"`{plain}`"


def front_matter(run: Run, library: str, tags: list[str]) -> str:
    """The front matter of a model card for Hugging Face's hub; it names only what is on the hub."""
    license = run.meta["license"]
    front = {"library_name": library, "pipeline_tag": "image-classification"}
    front["license"] = "unknown" if license == "not stated" else license.lower()
    if license == "DINOv3 License":  # the hub knows it only by this name
        front |= {"license": "other", "license_name": "dinov3-license"}
    if run.backbone.repo and not run.options.weights:
        front["base_model"] = run.backbone.repo
    if run.meta["dataset"] in ("cifar10", "cifar100"):
        front["datasets"] = [run.meta["dataset"]]
    front |= {"tags": tags, "metrics": ["accuracy"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    return "\n".join(["---", *lines, "---"])


def model_card(run: Run) -> str:
    """The run's README.md, a model card for Hugging Face's hub: what the model is, how accurate it
    is, and how to use it (https://huggingface.co/docs/hub/model-cards)."""
    meta = run.meta
    front = front_matter(run, "adaptertune", ["vision-transformer", meta["method"]])
    method = method_text(meta)
    if run.options.init_lora:
        method += ", with a LoRA merged"
    done = "trained" if meta["epochs"] else "evaluated"
    what = f"{as_code(meta['backbone'])} ({method}) {done} on {as_code(meta['dataset'])}"
    images = counted(len(run.dataset.train), "image")
    how = f"{images}, {counted(meta['epochs'], 'epoch')}, seed {meta['seed']}, "
    how += f"torch {torch.__version__}"
    result = f"{meta['test_accuracy']:.2f} % of {len(run.dataset.test):,} test images are right"
    if "test_class_accuracy" in meta:
        sizes = run.dataset.test.labels.bincount()
        result += f" ({meta['test_class_accuracy']:.2f} % as a mean over classes, of which the "
        result += f"smallest has {counted(int(sizes[sizes > 0].min()), 'image')})"
    if meta["val_accuracy"] is not None:
        result += f", {meta['val_accuracy']:.2f} % of {len(run.dataset.val):,} of validation"
    classes = ", ".join(map(as_code, meta["classes"]))
    held = f"adapters and head, and needs the weights of {as_code(meta['backbone'])}"
    if run.options.weights:
        held += " (`--weights FILE` says where they are)"
    if run.options.init_lora:
        held += f" with the LoRA {as_code(Path(run.options.init_lora).name)} (`--init-lora PATH`)"
    if meta["method"] in adaptertune.WHOLE_METHODS:
        held = "the whole network"
    folder = run.folder.as_posix()
    return f"""{front}
# {run.folder.name}

{what}: {how}, {time.strftime("%Y-%m-%d")}.
{result} (predictions.csv).

{len(meta["classes"])} classes: {classes}.

## Use
Where AdapterTune's train.py and export.py are, with this folder as `{folder}`:
```bash
python train.py --predict {shlex.quote(folder)} photo.jpg
python export.py {shlex.quote(folder)}
```
```python
import train

model = train.load_run({folder!r})
labels, probabilities = model.predict(["photo.jpg"])
```
adapters.safetensors holds {held} (licence: {as_code(meta["license"])}).
"""


def conclude(run: Run) -> None:
    """Print the lines below the table, and draw the pictures."""
    state = run.state
    read = "test read again" if run.tested_before else "test read once"
    if not state.rows:
        how = "nothing to choose"
    elif len(run.dataset.val):
        how = f"epoch {state.chosen_epoch}, chosen on val; {read}"
    else:
        how = f"epoch {state.chosen_epoch}, the last, as no images are left for val; {read}"
    path = run.folder / "adapters.safetensors"
    cost = f"{data.clock_text(state.train_time)} training, "
    cost += f"{data.clock_text(state.eval_time)} evaluation"
    if run.options.cached:
        cost += f", {data.clock_text(run.features_time)} features"
    memory = peak_memory(run.device)
    if memory:
        cost += f", peak {memory:.1f} GiB"
    print()
    report_test(run, how)
    for name, values in learnt_factors(run.model).items():
        lowest, highest = min(values), max(values)
        text = f"{lowest:.3f}" if len(values) == 1 else f"{lowest:.3f} to {highest:.3f}"
        print(f"learnt   {name.replace('_', ' ')} {text}")
    if state.first_epoch > 1 and state.chosen_epoch < state.first_epoch:
        print(f"note     no added epoch is as good on val; epoch {state.chosen_epoch} is kept")
    print(f"cost     {cost}")
    print(f"saved    {path} ({path.stat().st_size / 1e6:.2f} MB)")
    curves = run.folder / "curves.svg"
    mistakes = run.folder / "mistakes.png"
    if can_draw(curves, mistakes):
        if state.rows:
            draw_curves(state.rows, state.chosen_epoch, curves)
        draw_mistakes(run, mistakes)
    adapter = f"{glob.escape(run.folder.name)}.onnx_adapter"
    exported = [*run.folder.glob("*.onnx"), *run.folder.parent.glob(adapter)]
    if state.first_epoch > 1 and exported:
        print(f"note     {', '.join(map(str, exported))}: of fewer epochs; export again")
    print(f"next     python {vit.command_line([script('export.py'), str(run.folder)])}")


def script(name: str) -> str:
    """The path of one of the programs, as it is given to Python here."""
    path = Path(__file__).with_name(name)
    return name if path.parent == Path.cwd() else str(path)


@dataclass
class Summary:
    """The runs of one label, over seeds."""

    label: str
    results: list[dict]

    def values(self, key: str) -> list[float]:
        found = [result.get(key) for result in self.results]
        return [math.nan if value is None else value for value in found]

    def mean(self, key: str) -> float:
        return statistics.mean(self.values(key))

    def spread(self, key: str = "test_accuracy") -> float:
        """The standard deviation over the seeds, all of which have a value; 0 for a single run."""
        return statistics.stdev(self.values(key)) if len(self.results) > 1 else 0.0

    def in_words(self, key: str) -> str:
        """An accuracy's mean, with the standard deviation of several seeds; "-" if one lacks it."""
        if math.isnan(self.mean(key)):
            return "-"
        text = f"{self.mean(key):.2f}"
        return f"{text} ± {self.spread(key):.2f}" if len(self.results) > 1 else text

    def rates(self) -> str:
        """The learning rate. By default those of `head` and `full` follow each run's features."""
        rates = [result["lr"] for result in self.results]
        lowest, highest = (f"{rate:g}" for rate in (min(rates), max(rates)))
        if not self.trained:
            return "-"
        return lowest if lowest == highest else f"{lowest} to {highest}"

    @property
    def rank(self) -> int:
        """The rank that a label such as "rank 8" names."""
        return int(self.label.removeprefix("rank "))

    @property
    def trained(self) -> int:
        return self.results[0]["trained"]


def compare(results: list[tuple[str, dict]], path: Path) -> None:
    """Print a row for each label; write a .csv of the runs, and a picture.

    Args:
        results: label and result.json of each run.
        path: of both files, without suffix; a number is added if another comparison is there.
    """
    by_label: dict[str, list[dict]] = {}
    for label, result in results:
        by_label.setdefault(label or result["method"], []).append(result)
    summaries = [Summary(label, runs) for label, runs in by_label.items()]

    width = max(18, *(len(label) + 2 for label in by_label))
    head = f"{'trained':>12}{'test %':>16}"
    uneven = any("test_class_accuracy" in result for _, result in results)
    if uneven:
        head += f"{'class mean %':>16}"
    rate_width = max(9, *(len(each.rates()) + 2 for each in summaries))
    head += f"{'val %':>9}{'lr':>{rate_width}}{'time':>8}{'GiB':>7}"
    print(f"\n{'':<{width}}{head}")
    seeds = len(results) // len(summaries)
    for each in summaries:
        row = f"{each.trained:>12,}{each.in_words('test_accuracy'):>16}"
        if uneven:
            row += f"{each.in_words('test_class_accuracy'):>16}"
        val = each.mean("val_accuracy")
        val = "-" if math.isnan(val) else f"{val:.2f}"
        row += f"{val:>9}{each.rates():>{rate_width}}"
        memory = f"{each.mean('memory'):.2f}" if each.mean("memory") else "-"
        row += f"{data.clock_text(each.mean('seconds')):>8}{memory:>7}"
        print(f"{each.label:<{width}}{row}")
    if seeds > 1:
        print(
            f"{seeds} seeds: mean ± standard deviation between them of the accuracy, which doesn't "
            "show how far other test images would change it; mean time of training"
        )
    if not torch.cuda.is_available() and any(each.mean("memory") for each in summaries):
        print("GiB of a process, with what its earlier runs left; compare by one run a process")
    only_ranks = all(re.fullmatch(r"rank \d+", label) for label in by_label)
    elbow = find_elbow(summaries) if only_ranks and len(summaries) > 2 and seeds > 1 else None

    columns = ("label", "method", "rank", "seed", "trained", "test_accuracy", "val_accuracy")
    columns += ("epoch", "lr", "seconds", "memory")
    if uneven:
        columns += ("test_class_accuracy",)
    rows = [{"label": label, **result} for label, result in results]
    cells = [map(row.get, columns) for row in rows]
    content = to_csv(columns, cells)
    table = path.with_name(f"{path.name}.csv")
    number = 1
    while table.exists() and table.read_text(encoding="utf-8") != content:
        number += 1
        table = path.with_name(f"{path.name}-{number}.csv")
    data.write_file(table, content)
    print(f"saved    {table}")
    title = f"{results[0][1]['dataset']} on {results[0][1]['backbone']}, {counted(seeds, 'seed')}"
    draw_comparison(summaries, elbow, title, table.with_suffix(".svg"))


def chosen_by(summaries: list[Summary]) -> str:
    """The accuracy by which a rank is chosen: on validation, if all runs have one, else on test."""
    lacking = any(math.isnan(each.mean("val_accuracy")) for each in summaries)
    return "test_accuracy" if lacking else "val_accuracy"


def find_elbow(summaries: list[Summary]) -> int:
    """Print and return the elbow of runs that differ only in rank: the lowest rank whose mean is
    within a standard error of the best mean (the one-standard-error rule of Breiman et al., 1984).
    """
    key = chosen_by(summaries)
    best = max(summaries, key=lambda each: each.mean(key))
    error = best.spread(key) / len(best.results) ** 0.5
    within = best.mean(key) - error
    elbow = min(each.rank for each in summaries if each.mean(key) >= within)
    print(
        f"elbow    rank {elbow}, the least within a standard error ({error:.2f}) of the best "
        f"(rank {best.rank}), by {key.replace('_', ' ')}"
    )
    return elbow


# -------------------------------------------------------------------------------------- pictures


def can_draw(*paths: Path) -> bool:
    """Whether matplotlib can be used; if not, print which pictures are left out."""
    names = ", ".join(map(str, paths))
    try:
        import matplotlib.image  # noqa: F401 - it needs Pillow
    except ImportError:
        print(f"pictures {names} left out; to have them in later runs: pip install matplotlib")
        return False
    except Exception as error:  # its settings or MPLBACKEND, or a numpy that doesn't fit
        print(f"pictures {names} left out; matplotlib can't be used ({vit.first_line(error)})")
        return False
    return True


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, panels: int = 1, columns: int = 3):
    """A matplotlib figure of panels, up to `columns` in a row, and the list of their axes, to draw
    on; written when the block ends. Of the user's settings of matplotlib only fonts have an effect.

    Args:
        width, height: of a panel, in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(panels, columns)
    rows = math.ceil(panels / columns)
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    settings = {"svg.hashsalt": "adaptertune"}  # the same picture for the same numbers
    for key, value in matplotlib.rcParams.items():
        if key.startswith("font."):  # perhaps one that has the characters of class names
            settings[key] = value
    if "text.parse_math" in matplotlib.rcParams:
        settings["text.parse_math"] = False  # a $ in a name is a $
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks becomes a box
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for unused in axes[panels:]:
            unused.remove()
        yield figure, axes[:panels]
        with data.replacing(path) as file:
            figure.savefig(file, format=kind, metadata=metadata, bbox_inches="tight")
    print(f"saved    {path}")


def draw_curves(rows: list[list[str]], chosen_epoch: int, path: Path) -> None:
    """Draw loss and accuracy over the epochs of a run."""
    with picture(path, 4.5, 3.5, panels=2) as (figure, (loss_axes, accuracy_axes)):
        for axes in (loss_axes, accuracy_axes):
            axes.xaxis.get_major_locator().set_params(integer=True)  # epochs
        epochs = [int(row[0]) for row in rows]
        for name, axes in (("loss", loss_axes), ("train%", accuracy_axes), ("val%", accuracy_axes)):
            column = COLUMNS.index(name)
            values = [float(row[column]) for row in rows]
            axes.plot(epochs, values, marker=".", label=name.strip("%"))
        loss_axes.set(title="training loss", xlabel="epoch")
        accuracy_axes.set(title="accuracy in %", xlabel="epoch")
        accuracy_axes.axvline(chosen_epoch, color="grey", linestyle="--", label="chosen")
        accuracy_axes.legend()


def draw_mistakes(run: Run, path: Path) -> None:
    """Draw the 25 wrong predictions on test of which the network is most certain. If there are
    none, remove an earlier picture."""
    found = run.predictions["test"]
    wrong = (found.best != found.labels).nonzero().flatten()
    wrong = wrong[found.probability[wrong].argsort(descending=True)][:25].tolist()
    if not wrong:
        path.unlink(missing_ok=True)
        return
    images = (run.originals or run.dataset).test
    classes = run.dataset.classes
    with picture(path, 2.3, 2.8, panels=len(wrong), columns=5) as (figure, panels):
        for axes, i in zip(panels, wrong, strict=True):
            pixels = images[torch.tensor([i])].pixels[0]
            top, left, side = data.central_box(*pixels.shape[-2:], run.dataset.center)
            seen = pixels[:, top : top + side, left : left + side]
            axes.imshow(seen.cpu().permute(1, 2, 0).numpy())
            axes.axis("off")
            lines = [shorten(classes[found.labels[i]])]
            best = shorten(classes[found.best[i]], 18)
            lines.append(f"predicted: {best} {100 * found.probability[i]:.0f} %")
            lines.append(shorten(images.names[i]))
            axes.set_title("\n".join(lines), fontsize=8)
        figure.suptitle(
            "the most confident mistakes on test, as the network sees them: label, prediction, file"
        )


def shorten(text: str, length: int = 28) -> str:
    """A text cut to fit above a picture: its beginning and end."""
    text = data.printable(text)
    half = length // 2
    return text if len(text) <= length else f"{text[: half - 1]}…{text[-half:]}"


def draw_comparison(summaries: list[Summary], elbow: int | None, title: str, path: Path) -> None:
    """Draw test accuracy over rank, if there is an elbow; else over trained parameters."""
    if not can_draw(path):
        return
    with picture(path, 6, 4) as (figure, (axes,)):
        means = [each.mean("test_accuracy") for each in summaries]
        spreads = [each.spread() for each in summaries]
        if elbow is not None:
            ranks = [each.rank for each in summaries]
            axes.errorbar(ranks, means, yerr=spreads, marker="o", capsize=3)
            by = "validation" if chosen_by(summaries) == "val_accuracy" else "test"
            label = f"elbow by {by}: rank {elbow}"
            axes.axvline(elbow, color="grey", linestyle="--", label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [str(rank) for rank in ranks])
            axes.set_xlabel("rank")
        else:
            for each, mean, spread in zip(summaries, means, spreads, strict=True):
                name = f"{each.label} ({each.trained:,})"
                axes.errorbar(max(1, each.trained), mean, spread, marker="o", capsize=3, label=name)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")  # not 10³, which needs math in texts
            counts = [max(1, each.trained) for each in summaries]
            one_decade = max(counts) < 10 * min(counts)  # perhaps with no power of ten in it
            axes.xaxis.set_minor_formatter("{x:,.0f}" if one_decade else "")
            axes.set_xlabel("trainable parameters")
        axes.set(title=data.printable(title), ylabel="test accuracy in % (± standard deviation)")
        axes.grid(alpha=0.3)
        axes.legend()


@dataclass
class Examined:
    """A run's predictions for its test images, and their features."""

    title: str
    classes: list[str]
    names: list[str]  # of the images
    labels: Tensor  # [n]
    predictions: Tensor  # [n]
    points: Tensor  # [n, 2], the features in two dimensions
    projection: str  # how they were projected

    def confusion(self) -> Tensor:
        """Counts [K, K]: images of a class (row) by prediction (column)."""
        K = len(self.classes)
        return torch.bincount(self.labels * K + self.predictions, minlength=K * K).view(K, K)

    def most_confused(self, count: int) -> list[int]:
        """The `count` classes with the most mistakes, as label or as prediction; all if fewer."""
        wrong = self.confusion().fill_diagonal_(0)
        mistakes = wrong.sum(dim=0) + wrong.sum(dim=1)
        chosen = mistakes.argsort(descending=True, stable=True)[:count]
        return sorted(chosen.tolist())


@torch.inference_mode()
def examine(run: Run) -> Examined:
    """Features and predictions of a finished run's test images."""
    test = run.dataset.test
    features = compute_features(run, test, "test").to(run.device)
    predictions = run.model.head(features).argmax(dim=-1).cpu()
    accuracy = 100 * (predictions == test.labels).double().mean().item()
    if run.meta["method"] in adaptertune.CLIP_METHODS:
        features = run.model.head.embed(features)
    points, projection = to_two_dimensions(features.cpu())
    return Examined(
        title=f"{method_text(run.meta)}, seed {run.options.seed}, {accuracy:.2f} %",
        classes=[data.printable(each) for each in run.dataset.classes],
        names=test.names,
        labels=test.labels,
        predictions=predictions,
        points=points,
        projection=projection,
    )


def to_two_dimensions(features: Tensor) -> tuple[Tensor, str]:
    """Project features [n, D] to points [n, 2] for a plot, and name the method: t-SNE if
    scikit-learn is installed, else the first two principal components. One image gets neither."""
    if len(features) == 1:
        return torch.zeros(1, 2), "one image"
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        centred = features - features.mean(dim=0)
        components = torch.linalg.svd(centred, full_matrices=False)[2]  # [., D]
        return centred @ components[:2].T, "two principal components"
    tsne = TSNE(random_state=0, perplexity=min(30, len(features) / 4))
    return torch.from_numpy(tsne.fit_transform(features.numpy())), "t-SNE"


def plot(runs: Iterable[Run], path: Path) -> None:
    """Draw features and confusion matrices of finished runs; print frequent mistakes; write a .csv.

    Args:
        path: the files' common beginning.
    """
    examined = [examine(run) for run in runs]
    for each in examined:
        print_mistakes(each)
    table = path.with_name(f"{path.name}-features.csv")
    rows = []
    for each in examined:
        images = zip(each.names, each.labels, each.predictions, each.points, strict=True)
        for name, label, prediction, (x, y) in images:
            classes = (each.classes[label], each.classes[prediction])
            rows.append((each.title, name, *classes, f"{x:.3f}", f"{y:.3f}"))
    write_csv(table, ("run", "image", "label", "prediction", "x", "y"), rows)
    print(f"saved    {table}")
    features = path.with_name(f"{path.name}-features.svg")
    confusion = path.with_name(f"{path.name}-confusion.svg")
    if can_draw(features, confusion):
        draw_features(examined, features)
        draw_confusion(examined, confusion)


def print_mistakes(examined: Examined) -> None:
    """Print the three most frequent mistakes."""
    counts = examined.confusion()
    wrong = counts.clone().fill_diagonal_(0)
    K = len(examined.classes)
    method, _, _ = examined.title.rpartition(",")
    for place in wrong.flatten().topk(3).indices.tolist():
        true, predicted = divmod(place, K)
        if wrong[true, predicted]:
            print(
                f"mistaken {method}: {wrong[true, predicted]} of {counts[true].sum()} images of "
                f"{examined.classes[true]!r} for {examined.classes[predicted]!r}"
            )


def draw_features(examined: list[Examined], path: Path) -> None:
    """Draw the test images' features in two dimensions, at most 20 classes coloured and named."""
    import matplotlib

    with picture(path, 5, 5, panels=len(examined)) as (figure, panels):
        palette = list(matplotlib.colormaps["tab20"].colors)  # ten hues, each dark and light
        palette[14:16] = ["black", "gold"]  # instead of two greys
        if len(examined[0].classes) <= 10:
            palette = palette[::2]
        coloured = examined[0].most_confused(20)
        for axes, each in zip(panels, examined, strict=True):
            points = each.points.numpy()
            axes.scatter(points[:, 0], points[:, 1], s=6, color="lightgrey", rasterized=True)
            for colour, label in zip(palette, coloured, strict=False):
                members = points[(each.labels == label).numpy()]  # a one-element tensor is an index
                name = each.classes[label]
                axes.scatter(*members.T, s=8, color=colour, label=name, rasterized=True)
            axes.set(title=f"{each.title} ({each.projection})", xticks=[], yticks=[])
        K = len(examined[0].classes)
        title = f"the 20 of {K} classes\nwith most mistakes;\nothers grey" if K > 20 else None
        entries = panels[0].get_legend_handles_labels()
        style = {"markerscale": 2, "fontsize": 8, "title_fontsize": 8}
        figure.legend(*entries, loc="outside right upper", title=title, **style)


def draw_confusion(examined: list[Examined], path: Path) -> None:
    """Draw confusion matrices, in percent of each row's images; with more than 40 classes, only the
    20 most confused."""
    K = len(examined[0].classes)
    side = 2.5 + 0.25 * (K if K <= 40 else 20)
    with picture(path, side, side, panels=len(examined)) as (figure, panels):
        for axes, each in zip(panels, examined, strict=True):
            counts = each.confusion()
            shares = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
            shown = each.most_confused(K if K <= 40 else 20)
            part = shares[shown][:, shown].numpy()
            axes.imshow(part, cmap="Blues", vmin=0, vmax=100)
            names = [each.classes[label] for label in shown]
            axes.set_xticks(range(len(shown)), names, rotation=90)
            images = counts.sum(dim=1)[shown].tolist()
            names = [f"{name} ({n})" for name, n in zip(names, images, strict=True)]
            axes.set_yticks(range(len(shown)), names)
            for (row, column), share in np.ndenumerate(part):
                if share >= 0.5:
                    colour = "white" if share > 50 else "black"
                    place = {"ha": "center", "va": "center", "size": 6}
                    axes.text(column, row, f"{share:.0f}", color=colour, **place)
            title = each.title
            if K > 40:
                title += f"; the 20 of {K} classes with most mistakes"
            axes.set(title=title, xlabel="prediction", ylabel="label (its images): % of them")


# --------------------------------------------------------------------------------------- options

# Methods whose learning rate depends on the backbone (`fit_to_backbone`).
FITTED_METHODS = ("head", "full", *adaptertune.ADAPTER_METHODS)
ONE_RATE_METHODS = ("clip-adapter", "zero-shot", "head", "scratch")
# Options that may have several values; every combination is a run.
GRID = ("method", "rank", "every", "blocks", "init")
# Options that config.json leaves out, since they say what is done with a run. ("seed" is left out
# since config.json has "seeds".)
NOT_KEPT = ("resume", "eval", "predict", "csv", "name", "label", "plot", "seed", "download")
PATHS = ("dataset", "weights", "init_lora", "text_weights", "vocab")  # options that may name files
# Options whose default depends on data or machine, with the value that stands for "not given".
# config.json lists under "auto" which of them weren't given.
AUTO = {"epochs": None, "batch": 0, "min_scale": 0.0, "amp": "auto", "lr": 0.0, "head_lr": 0.0}
MAY_DIFFER = ("data_dir", "offline", "device", "auto")  # with other values it is still the same run
# Options that go with --predict, and those that also go with --eval. All others are as in the run.
PREDICT_OPTIONS = ("eval", "predict", "csv", "offline", "device", "backbone", "weights")
PREDICT_OPTIONS += ("init_lora", "heads", "mlp_act", "mean", "std")
EVAL_OPTIONS = (*PREDICT_OPTIONS, "dataset", "data_dir", "batch", "plot")
CLIP_OPTIONS = ("classifier", "template", "text_weights", "vocab")
LABELS_HEADER = "file,prediction,probability,runner-up"  # of the table of --predict


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (status 2) and one-line definitions of options."""

    def parse_known_args(self, arguments=None, namespace=None):
        """Like argparse's, but refuse an empty argument: it is probably a shell variable that isn't
        set, and would count as an option that isn't given."""
        for argument in sys.argv[1:] if arguments is None else arguments:
            if not argument or re.fullmatch(r"--[\w-]+=", argument):
                self.error(f"an argument is empty ({argument or repr(argument)}); give it a value")
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            for similar in difflib.get_close_matches(unknown[1], self._option_string_actions, n=1):
                message += f"; do you mean {similar}?"
        text = f"{message}; python {self.prog} --help lists all options"
        self.exit(2, f"error: {data.printable(text)}\n")

    def section(self, title: str) -> None:
        """Put the options that follow under this title."""
        self.group = self.add_argument_group(title)

    def value(self, name: str, metavar: str, kind: Callable, text: str, default, **more) -> None:
        """Add an option with a value, which `kind` parses."""
        more |= {"metavar": metavar, "type": kind, "default": default}
        self.group.add_argument(*name.split(), help=text, **more)

    def several(self, name: str, metavar: str, kind: Callable, text: str, default: list) -> None:
        """Add an option with several values; `kind` parses a text to a list of them."""
        self.value(name, metavar, kind, text, default, nargs="+", action=Several)

    def choice(self, name: str, choices: Sequence[str], text: str, default, **more) -> None:
        """Add an option that takes one of a few values."""
        more |= {"metavar": "|".join(choices), "choices": choices, "default": default}
        self.group.add_argument(name, help=text, **more)

    def switch(self, name: str, text: str, **more) -> None:
        """Add an option without a value."""
        more.setdefault("action", "store_true")
        self.group.add_argument(name, help=text, **more)


def integer(low: int, high: int = 10**9) -> Callable:
    """Option type: an integer within limits."""
    return functools.partial(read_number, int, low, high)


def number(low: float, high: float) -> Callable:
    """Option type: a number within limits."""
    return functools.partial(read_number, float, low, high)


def integers(low: int, high: int = 10**9) -> Callable:
    """Option type: distinct integers within limits, separated by commas."""
    return lambda text: distinct([read_number(int, low, high, part) for part in parts_of(text)])


def parts_of(text: str) -> list[str]:
    """The parts of a text that are separated by commas; "1," has one, as in "--ranks 1, 4"."""
    return text.removesuffix(",").split(",")


def chosen_from(choices: Sequence[str]) -> Callable:
    """Option type: some of these names, separated by commas."""

    def read(text: str) -> list[str]:
        found = parts_of(text)
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r}: choose {', '.join(choices)}")
        return found

    return read


class Several(argparse.Action):
    """Stores an option's values, which may be separated by commas, by spaces or by both."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, distinct(list(itertools.chain(*values))))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def distinct(values: list) -> list:
    """Return the values, or raise an ArgumentTypeError if one of them occurs twice."""
    for value in values:
        if values.count(value) > 1:
            raise argparse.ArgumentTypeError(f"{value} is given twice")
    return values


def read_number(kind: type, low: float, high: float, text: str) -> float:
    """Parse a number and check that it is within the limits."""
    try:
        value = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from error
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
    return value


def channels(low: float) -> Callable:
    """Option type: three numbers from `low` to 1, separated by commas."""

    def read(text: str) -> list[float]:
        values = [read_number(float, low, 1, part) for part in text.split(",")]
        if len(values) != 3:
            raise argparse.ArgumentTypeError(f"{text!r} is not three numbers such as 0.5,0.5,0.5")
        return values

    return read


def placement(text: str) -> list[int]:
    """Option type: block indices, counted from 0; or first6 (0 to 5), or last6 (-6 to -1)."""
    match = re.fullmatch(r"(first|last)([1-9]\d{0,2})", text)
    if match:
        count = int(match[2])
        return list(range(count)) if match[1] == "first" else list(range(-count, 0))
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0,1,5 or first6 or last6")
    return integers(-1000, 1000)(text)


def make_parser() -> Parser:
    """The command line's parser, with all options."""
    parser = Parser(
        prog="train.py",
        description="Adapt a frozen Vision Transformer with zero-initialised low-rank adapters.",
        epilog="Defaults are in parentheses. Several values are separated by spaces or commas, "
        "several of --blocks by spaces. Without arguments: digits on vit_micro, embedded.",
        allow_abbrev=False,
    )
    add_options(parser)
    add_training_options(parser)
    add_run_options(parser)
    add_method_options(parser)
    return parser


def parse(arguments: list[str] | None = None) -> list[argparse.Namespace]:
    """The options of each run. Wrong usage prints one line and exits with 2.

    Raises:
        ValueError: --eval or --predict names no run, or a damaged one.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.csv and not options.predict:
        parser.error("--csv is for --predict")
    if options.predict:
        check_predict(options, parser)
        options.eval = options.predict[0]
    if options.eval:
        given = given_options(arguments, parser)
        check_evaluated(given, parser)
        options = options_of(options.eval, **given)
        check_backbone_name(options, parser)
        return [options]
    grid = expand(options)
    check_used(options, {each.method for each in grid}, parser)
    for run_options in grid:
        fill_in(run_options)
        check(run_options, parser)
    return grid


def given_options(arguments: list[str] | None, parser: Parser) -> dict:
    """The options that a command line states, without the defaults of others."""
    names = vars(parser.parse_args([]))
    options = argparse.Namespace(**dict.fromkeys(names))  # argparse keeps what is already set
    stated = vars(parser.parse_args(arguments, options))
    return {name: value for name, value in stated.items() if value is not None}


def check_evaluated(given: dict, parser: Parser) -> None:
    """Refuse options that --eval and --predict would ignore."""
    for action in parser._actions:
        flag = "/".join(action.option_strings)
        if action.dest == "method":
            flag += "/--scratch"
        if action.dest in given and action.dest not in EVAL_OPTIONS:
            parser.error(f"{flag} is for training; --eval and --predict use the run's own settings")
        if "predict" in given and action.dest in given and action.dest not in PREDICT_OPTIONS:
            parser.error(f"{flag} is for training and --eval, not --predict")


def options_of(folder: str | Path, **given) -> argparse.Namespace:
    """The options of the run in a folder.

    Args:
        given: options with other values than the run's, such as where its files are now.

    Raises:
        ValueError: the folder holds no run.
    """
    (options,) = expand(make_parser().parse_args([]))
    saved = read_config(Path(folder))
    options.seed = saved["seeds"][0]
    # Somebody else's run decides what is read, but not where a data set is downloaded to.
    if not data.is_there(saved["dataset"], saved["data_dir"]):
        del saved["data_dir"]
    vars(options).update(saved | given, eval=str(folder))
    fill_in(options)
    return options


def check_predict(options: argparse.Namespace, parser: Parser) -> None:
    """Refuse --predict without photos or a finished run, or with options that don't go with it."""
    folder, *photos = options.predict
    if not photos:
        parser.error(f"--predict {folder}: give photos or folders to label after the run's folder")
    if options.eval:
        parser.error("--predict and --eval exclude each other; give one")
    if options.csv:
        check_csv(Path(options.csv), parser)
    if not (Path(folder) / "adapters.safetensors").exists():
        if (Path(folder) / "state.pt").exists():
            parser.error(f"--predict {folder}: that run is unfinished; continue it with --resume")
        advice = "give runs/NAME first, then photos"
        parser.error(f"--predict {folder}: no finished run there{maybe_below(folder)}; {advice}")


def check_csv(path: Path, parser: Parser) -> None:
    """Refuse a --csv that can't be written, or that would overwrite anything else than such a
    table, such as a photo."""
    if not path.exists() and path.parent.is_dir():
        return
    if not path.is_file():
        parser.error(f"--csv {path}: give a file in a folder that exists")
    with path.open("rb") as file:
        beginning = file.read(len(LABELS_HEADER))
    if beginning not in (b"", LABELS_HEADER.encode()):
        parser.error(f"--csv {path}: that file exists and is no table of labels; give another name")


def check_used(options: argparse.Namespace, methods: set[str], parser: Parser) -> None:
    """Refuse an option that none of the chosen methods uses."""
    owners = dict.fromkeys(("every", "blocks"), adaptertune.PLACED_METHODS)
    owners |= dict.fromkeys(CLIP_OPTIONS, adaptertune.CLIP_METHODS)
    owners["cached"] = ("head", *adaptertune.CLIP_METHODS)
    for method, settings in adaptertune.METHODS.items():
        for name in settings:
            owners[name] = (*owners.get(name, ()), method)
    for action in parser._actions:
        having = owners.get(action.dest, methods)
        if methods.isdisjoint(having) and getattr(options, action.dest) != action.default:
            flag = action.option_strings[0]
            parser.error(f"{flag} is for {', '.join(having)}, not {', '.join(sorted(methods))}")
    if options.classifier == "prototypes":
        for name in ("template", "text_weights", "vocab"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} is for --classifier text")


def add_options(parser: Parser) -> None:
    """Add the options of task and backbone. Defaults that depend on other options are 0 or empty
    here and are set in `fill_in`; the help gives them in parentheses."""
    add = parser.value
    datasets = ", ".join(data.DATASETS)
    backbones = ", ".join(vit.BACKBONES)

    parser.section("task")
    add("--dataset", "NAME", str, f"{datasets}, or a folder of photos (digits)", "digits")
    add("--data-dir", "DIR", str, "folder of the data sets; downloads go there too (data)", "data")
    quick = "for a quick look: train on N images, validate on N/4 (0: all)"
    add("--limit", "N", integer(0), quick, 0)
    few = "train on K images of each class, validate on as many, at most 4 (0: all)"
    add("--shots", "K", integer(0), few, 0)
    share = "share of the images to test on if there is no test set; drawn by seed "
    share += "(0: a fifth, the same for all seeds)"
    add("--test-share", "P", number(0, 0.9), share, 0.0)
    parser.switch("--offline", "never use the network")
    fetched = "only fetch what the run needs and decode photos; then it runs with --offline"
    parser.switch("--download", fetched)

    parser.section("backbone")
    named = f"{backbones} (vit_s16; vit_micro for digits)"
    add("--backbone", "NAME", str, named, "", choices=vit.BACKBONES)
    file = "a .safetensors, .pth or .npz file, instead of the download; config.json, "
    file += "preprocessor_config.json and open_clip_config.json beside it are read too"
    add("--weights", "FILE", str, file, "")
    lora = "folder or file of a LoRA that peft made for this backbone; merged before anything else"
    add("--init-lora", "PATH", str, lora, "")
    beside = "from the files beside --weights, else"
    heads = f"attention heads (0: {beside} the usual number for the width)"
    add("--heads", "N", integer(0, 10_000), heads, 0)
    norm = f"per channel, 0 to 1 (by backbone; {beside} ImageNet's or CLIP's)"
    add("--mean", "R,G,B", channels(0), f"mean of the pixels {norm}", [])
    add("--std", "R,G,B", channels(0.001), f"standard deviation of the pixels {norm}", [])
    gelu = f"activation of the MLPs (by backbone; {beside} QuickGELU for a CLIP)"
    parser.choice("--mlp-act", ("gelu", "quick_gelu"), gelu, "")
    add("--image-size", "PIXELS", integer(0, 2048), "side of the backbone's input (0: its own)", 0)


def add_training_options(parser: Parser) -> None:
    """Add the options of training."""
    add = parser.value

    parser.section("training")
    epochs = "passes over the images (10, up to 30 for fewer than 1,500 images; --cached 100); 0 "
    epochs += "evaluates the LoRA of --init-lora as it is, best with --method head"
    add("--epochs", "N", integer(0), epochs, None)
    cached = "for --method head: train on features computed once, without augmentation, as "
    cached += "clip-adapter and zero-shot always do"
    parser.switch("--cached", cached)
    add("--batch", "N", integer(1), "images per step (128; 32 for fewer than 5,000 images)", 0)
    rate = "peak learning rate (by method and rank; for full by features and width, at most "
    rate += f"{RATES['full']:g}; for head as --head-lr; for adapters lower above width 192)"
    add("--lr", "LR", number(1e-12, 1000), rate, 0.0)
    head = f"peak learning rate of the head (by its features, at most {HEAD_RATE:g}, for head "
    head += f"{RATES['head']:g}; as --lr for clip-adapter, scratch)"
    add("--head-lr", "LR", number(1e-12, 1000), head, 0.0)
    decay = "weight decay of the weight matrices, 0 for off (0.05)"
    add("--weight-decay", "W", number(0, 1000), decay, 0.05)
    smoothing = "label smoothing of the loss, 0 for off (0.1; CLIP's methods 0)"
    add("--label-smoothing", "P", number(0, 1), smoothing, None)
    crop = "smallest share of the image in a training crop (0.08; digits 0.85)"
    add("--min-scale", "A", number(1e-6, 1), crop, 0.0)
    squashed = "squash photos to squares, so that the network sees all of each, not its middle; "
    squashed += "long ones may need a larger --image-size"
    parser.switch("--squash", squashed)
    mirrored = "don't mirror training images: for text, signs, anything whose left and right differ"
    parser.switch("--no-flip", mirrored)
    weights = "weight the loss by the inverse of each class's size, as if all were of equal size; "
    weights += "the epoch is still chosen by plain accuracy"
    parser.switch("--class-weights", weights)
    seeds = "one run per seed; at the end their mean and standard deviation (0)"
    parser.several("--seeds --seed", "SEED", integers(0), seeds, [0])
    amp = "train in bf16; auto: only where it is faster (auto)"
    parser.choice("--amp", ("auto", "bf16", "off"), amp, "auto")
    add("--device", "NAME", str, "cpu, cuda, cuda:1 (auto: cuda if there is one)", "auto")
    compiled = "torch.compile the network: slow to start, then faster steps on a GPU, but a "
    parser.switch("--compile", compiled + "run is no longer reproducible to the bit")


def add_run_options(parser: Parser) -> None:
    """Add the options of a run's folder, and of what to do with a run."""
    add = parser.value

    parser.section("run")
    folder = "the run's folder in runs/; a finished run is never overwritten "
    folder += "(from data set, method and seed)"
    add("--name", "NAME", str, folder, "")
    more = "continue a run that was stopped; or, with more --epochs, a finished one: "
    parser.switch("--resume", more + "warm-up and cosine begin again for the added epochs")
    again = "don't train: test a finished run again, or with --dataset on other photos of its "
    add("--eval", "runs/NAME", str, again + "classes", "")
    photos = "don't train: label photos, or folders of photos, with a finished run"
    metavar = ("runs/NAME", "PHOTO")
    add("--predict", metavar, str, photos, [], nargs="+")
    add("--csv", "FILE", str, "with --predict: write the labels to this file, too", "")
    drawn = "draw the features of the test images in two dimensions, and the confusion matrix"
    parser.choice("--plot", ("features",), drawn, None)


def add_method_options(parser: Parser) -> None:
    """Add the options that belong to methods. None stands for the method's own default."""
    add = parser.value
    methods = [name for name in RATES if name != "scratch"]

    parser.section("method")
    compared = f"{', '.join(methods)}; several are compared (adaptertune)"
    parser.several("--method", "NAME", chosen_from(methods), compared, ["adaptertune"])
    scratch = {"dest": "method", "action": "store_const", "const": ["scratch"]}
    parser.switch("--scratch", "train all of --backbone from random weights", **scratch)
    width = "width of the bottlenecks; for clip-adapter 0 is a quarter of CLIP's embedding"
    parser.several("--rank --ranks", "R", integers(0, 10_000), width, [None])
    nth = "adapters in every K-th block, from the first on (1)"
    parser.several("--every", "K", integers(0), nth, [1])
    where = "adapters in these blocks, counted from 0, or first6, last6 (all)"
    add("--blocks", "I,J,…", placement, where, [None], nargs="+")
    reads = "what adapters read: the block's output (block), the MLP's input before (raw) or after "
    reads += "its LayerNorm (ln), or the MLP's output (mlp)"
    parser.choice("--adapter-input", adaptertune.READS, reads, None, dest="reads")
    act = "activation of the adapters; mlp: that of the block's MLP, so that an adapter that "
    act += "reads ln is merged into the MLP on export"
    parser.choice("--adapter-act", (*adaptertune.ACTS, "mlp"), act, None, dest="act")
    init = "up-projection: zeros or N(0, 1e-4²); or a file with adapters, ours or AdaptFormer's"
    parser.several("--init", "zero|small|FILE", parts_of, init, [None])
    add("--scale", "S", number(-(10**9), 10**9), "factor of the adapters' output", None)
    parser.switch("--learn-scale", "train this factor, one for each adapter", default=None)
    add("--dropout", "P", number(0, 1), "dropout inside the adapters, 0 for off", None)
    add("--prompts", "N", integer(1, 10_000), "prompt tokens in each block", None)
    shallow = {"dest": "deep", "action": "store_false", "default": None}
    parser.switch("--shallow", "vpt: prompts enter at the first block only", **shallow)

    parser.section("clip-adapter, zero-shot")
    image = "share of the image adapter, 0 for none; 0.6 suits fine-grained classes"
    add("--ratio", "A", number(0, 1), image, None)
    add("--text-ratio", "B", number(0, 1), "share of the text adapter, 0 for none", None)
    parser.switch("--learn-ratio", "train the ratios that aren't 0", default=None)
    source = "compare images with embeddings of class names or with means of training images (text)"
    parser.choice("--classifier", ("text", "prototypes"), source, "text")
    add("--template", "TEXT", str, 'for class names, such as "a photo of a {}." (by data set)', "")
    add("--text-weights", "FILE", str, "file of CLIP's text tower (in the backbone's file)", "")
    add("--vocab", "FILE", str, f"CLIP's {' or '.join(VOCABULARIES)} (beside the weights)", "")
    for action in parser._actions:
        if action.nargs != 0:
            action.help += defaults_of(action.dest)


def defaults_of(setting: str) -> str:
    """The default of a setting in each method that has it, for the help."""
    found = []
    for method, settings in adaptertune.METHODS.items():
        if setting in settings:
            found.append(f"{method} {settings[setting]}")
    return f" ({', '.join(found)})" if found else ""


def expand(options: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each run of the grid; `label` says what differs between them but the seed."""
    runs = []
    for values in itertools.product(*(getattr(options, name) for name in GRID)):
        run = dict(zip(GRID, values, strict=True))
        # Options that a method ignores don't multiply its runs.
        for name in ("rank", "init"):
            if name not in adaptertune.METHODS[run["method"]]:
                run[name] = None
        if run["method"] not in adaptertune.PLACED_METHODS:
            run |= {"every": 1, "blocks": None}
        if run not in runs:
            runs.append(run)
    grid = []
    for run, seed in itertools.product(runs, options.seeds):
        run_options = copy.copy(options)
        vars(run_options).update(run, label=label_of(run, runs), seed=seed)
        grid.append(run_options)
    return grid


def label_of(run: dict, runs: list[dict]) -> str:
    """The values in which a run differs from the others, such as "adaptformer rank 8"."""
    parts = []
    for name in GRID:
        values = {str(each[name]) for each in runs}
        if len(values) == 1 or not run[name]:
            continue
        value = run[name]
        if name == "blocks":
            value = ",".join(map(str, value))
        parts.append(value if name in ("method", "init") else f"{name} {value}")
    return " ".join(parts)


def default_rate(method: str, rank: int | None) -> float:
    """The peak learning rate of a method, for adapters of this rank in a backbone of DeiT-tiny's
    width or less.

    Measured, not derived. AdaptFormer needs twice the learning rate for an eighth of the units; a
    cube root passes through these two points. For AdapterTune, the learning rate of rank 8 also
    suits rank 64 (assets/results, Learning rates).
    """
    rate = RATES[method]
    if method == "adaptformer":
        rate *= (64 / max(1, rank)) ** (1 / 3)
    return two_digits(rate)


def two_digits(rate: float) -> float:
    """A learning rate, rounded."""
    return float(f"{rate:.2g}")


def fill_in(options: argparse.Namespace) -> None:
    """Set the defaults that depend on other options."""
    for name, value in adaptertune.METHODS[options.method].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    # CLIP's tower is frozen and has no adapters inside, so its features never change.
    clip = options.method in adaptertune.CLIP_METHODS
    options.cached = clip or (options.cached and options.method == "head")
    if options.method == "zero-shot":  # it trains nothing
        options.epochs = 0
    if not options.backbone and not options.weights:
        options.backbone = "vit_micro" if options.dataset == "digits" else "vit_s16"
    if options.label_smoothing is None:
        options.label_smoothing = 0.0 if clip else 0.1
    if options.method in ("head", "clip-adapter"):  # they train nothing but the head
        options.lr = options.head_lr or options.lr
    if options.method not in FITTED_METHODS:
        options.lr = options.lr or default_rate(options.method, options.rank)
    if options.method in ONE_RATE_METHODS:
        options.head_lr = options.head_lr or options.lr


def fit_to_data(options: argparse.Namespace, dataset: data.Dataset) -> None:
    """Set the defaults that depend on the data.

    An epoch of a small data set has few steps, so a run has enough epochs to see 15,000 images, but
    10 to 30. Below 5,000 images a smaller batch also gives more steps (assets/results).
    """
    options.auto = [name for name, auto in AUTO.items() if getattr(options, name) == auto]
    images = len(dataset.train)
    options.batch = options.batch or (32 if images < 5000 else 128)
    options.min_scale = options.min_scale or dataset.min_scale
    if options.epochs is not None:
        return
    if options.cached:
        options.epochs = 100  # features are cheap
    else:
        options.epochs = min(30, max(10, math.ceil(15_000 / images)))


def check(options: argparse.Namespace, parser: Parser) -> None:
    """Refuse options that contradict each other or have unusable values."""
    adapters = options.method in adaptertune.ADAPTER_METHODS
    known = options.init in adaptertune.INITS
    if adapters and vit.is_lora(options.init):
        parser.error(f"--init {options.init}: {vit.IS_LORA}")
    if adapters and not known and not Path(options.init).is_file():
        parser.error(f"--init {options.init}: choose zero, small or a file with adapters")
    check_no_epochs(options, parser)
    check_backbone_name(options, parser)
    if options.method == "clip-adapter" and not options.ratio and not options.text_ratio:
        parser.error("--ratio 0 and --text-ratio 0 leave nothing to train; use --method zero-shot")
    drive = Path(options.name).drive  # "C:" on Windows
    if options.name and (drive or not re.fullmatch(r"[^/\\\0]*[^/\\\0.][^/\\\0]*", options.name)):
        parser.error(
            f"--name {options.name}: give the name of a folder below runs/, without / in it"
        )
    if options.every != 1 and options.blocks:
        parser.error("--every and --blocks both say where the adapters go; give one")
    if options.limit and options.shots:
        parser.error("--limit and --shots both choose the training images; give one")
    if options.method == "scratch" and (options.weights or options.init_lora):
        given = "--weights" if options.weights else "--init-lora"
        parser.error(f"--scratch starts from random weights; leave out {given}")


def check_backbone_name(options: argparse.Namespace, parser: Parser) -> None:
    """Refuse a backbone that isn't a CLIP for CLIP's methods, before it is downloaded."""
    clip = options.method in adaptertune.CLIP_METHODS
    if clip and options.backbone and not vit.BACKBONES[options.backbone].config.norm_pre:
        names = [name for name, each in vit.BACKBONES.items() if each.config.norm_pre]
        parser.error(f"--method {options.method} needs a CLIP as --backbone: {', '.join(names)}")


def check_no_epochs(options: argparse.Namespace, parser: Parser) -> None:
    """Refuse --epochs 0 if untrained parameters would be evaluated."""
    if options.epochs != 0 or options.method == "zero-shot":
        return
    if not options.init_lora:
        parser.error("--epochs 0 trains nothing; it is for --init-lora, to evaluate that as it is")
    if options.method in ("vpt", "clip-adapter") or (options.init or "zero") != "zero":
        parser.error(
            "--epochs 0 evaluates a LoRA as it is; choose --method head, or adapters of --init zero"
        )


# ------------------------------------------------------------------------------------------ main


def run_grid(grid: list[argparse.Namespace]) -> None:
    """Train every run, then compare them."""
    results = []
    times = []  # seconds of the runs that weren't finished before
    stop_asked.clear()
    for options in grid:
        stop_if_asked()
        if len(grid) > 1:
            print_heading(options, len(results), len(grid), times)
        started = time.perf_counter()
        result = train_run(options)
        if "kept" not in result:
            times.append(time.perf_counter() - started)
        results.append((options.label, result))
    if not is_first():
        return
    together = Path("runs", grid[0].name or as_file_name(results[0][1]["dataset"]))
    if len(results) > 1:
        compare(results, together.with_name(f"{together.name}-comparison"))
    if grid[0].plot:
        first_seed = results[:: len(grid[0].seeds)]
        folders = [result["folder"] for _, result in first_seed]
        path = together if len(folders) > 1 else folders[0] / "test"
        plot((open_run(options_of(folder)) for folder in folders), path)


def as_file_name(name: str) -> str:
    """A data set's name as part of a file name: in somebody else's run it may be anything."""
    return re.sub(r"^\.|[/\\:\0]", "_", name) or "_"


def print_heading(options: argparse.Namespace, done: int, total: int, times: list[float]) -> None:
    """Print the line above one of several runs: which it is, and the time left for all of them,
    estimated from `times`, the seconds that earlier runs took."""
    text = options.label or options.method
    if options.lr and options.method != "zero-shot":
        text += f", learning rate {options.lr:g}"
    text += f", seed {options.seed}"
    if times:
        text += f"; about {data.clock_text(statistics.mean(times) * (total - done))} left for all"
    print(f"\nrun      {done + 1} of {total}: {text}")


def fetch_for(grid: list[argparse.Namespace]) -> None:
    """--download: fetch backbones and data sets, and decode photos, for runs that come later."""
    done = set()
    for options in grid:
        text = options.method in adaptertune.CLIP_METHODS and options.classifier == "text"
        needs = (options.backbone, options.weights, options.method == "scratch", text)
        if needs in done:
            continue
        done.add(needs)
        _, backbone, dataset = load_both(options)
        size = backbone.config.image_size
        print(f"ready    {backbone_name(options)} and {dataset.name} at {size} px; give --offline")


def evaluate_again(options: argparse.Namespace) -> None:
    """--eval: evaluate a finished run on its test set again, or on another folder."""
    run = open_run(options)
    describe(run)
    predict_all(run)
    name = ""
    how = f"its file says {run.meta['test_accuracy']:.2f} %"
    listed = read_split(run.folder / "split.json")
    if not len(run.dataset.train):
        place = zlib.crc32(absolute(options.dataset).encode())  # two folders may have one name
        name = f"-{as_file_name(run.dataset.name)}-{place:08x}"
        how = f"another folder, {counted(len(run.dataset.test), 'image')}"
    elif len(run.dataset.val) + len(run.dataset.test) < len(listed["val"] + listed["test"]):
        name = "-incomplete"  # keep the files of all images
    report_test(run, how)
    table = run.folder / f"predictions{name}.csv"
    try:
        write_predictions(run, table)
    except ValueError as error:  # such as another user's folder
        print(f"note     {error}")
        return
    print(f"saved    {table}")
    mistakes = run.folder / f"mistakes{name}.png"
    if can_draw(mistakes):
        draw_mistakes(run, mistakes)
    if options.plot:
        plot([run], run.folder / f"test{name}")


def predict_photos(options: argparse.Namespace) -> int:
    """--predict: label photos. Returns the exit status, 1 if one couldn't be read."""
    model = open_classifier(options)
    be_repeatable(model.batches.device)  # fp32, as in evaluation
    data.import_pillow()  # one error, instead of one for each photo
    photos, others = data.find_photos(options.predict[1:])
    if others:
        what = counted(len(others), "file")
        example = data.printable(str(others[0]))
        print(f"skipped  {what}, not photos, such as {example}", file=sys.stderr)
    rows = []

    def save() -> None:
        header = [*LABELS_HEADER.split(","), *columns_of(model.classes)]
        write_csv(Path(options.csv).resolve(), header, rows)
        labelled = sum(bool(label) for _, label, *_ in rows)
        part = of_all(labelled, len(photos))
        print(f"saved    {options.csv} ({part} photos labelled)", file=sys.stderr)

    try:
        data.add_heif()  # not in threads, as in data.fill_photos
        with (
            warnings.catch_warnings(action="ignore"),  # Pillow warns about large photos
            ThreadPoolExecutor(data.usable_cpus()) as pool,
        ):
            for row in label_photos(model, photos, pool):
                rows.append(row)
    except (KeyboardInterrupt, BrokenPipeError):
        if options.csv and not Path(options.csv).exists():  # an earlier table may be complete
            save()
        raise
    if options.csv:
        save()
    return 0 if all(label for _, label, *_ in rows) else 1


def label_photos(model: Classifier, photos: list[Path], pool: Executor) -> Iterator[list[str]]:
    """Label and print each photo; yields its row of the .csv. That of a photo which can't be read
    has nothing after its name. The pool's threads decode them."""
    started = time.perf_counter()
    cpus = data.usable_cpus()
    found = model.classify(photos, cpus, mapped=pool.map)  # few at a time: each line comes soon
    for number, (photo, probabilities) in enumerate(zip(photos, found, strict=True)):
        if isinstance(probabilities, ValueError):
            print(f"skipped  {data.printable(str(probabilities))}", file=sys.stderr)
            yield [str(photo), "", "", "", *("" for _ in columns_of(model.classes))]
            continue
        (first, second), (best, runner_up) = probabilities.topk(2)
        name = model.classes[best]
        other = model.classes[runner_up]
        row = [str(photo), name, f"{first:.4f}", other]
        if len(model.classes) <= EACH:
            row += as_cells(probabilities)
        text = f"{photo}  {name} {100 * first:.1f} %  ({other} {100 * second:.1f} %)"
        print(data.printable(text), flush=True)
        data.progress("photo", number + 1, len(photos), started)
        yield row


class Printable:
    """A stream that shows control characters as "\ufffd": names of files and classes, and the
    content of a damaged file, may contain them."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        data.wipe_progress()
        return self.stream.write(data.CONTROL.sub("\ufffd", text))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def prepare_process() -> None:
    """Make Ctrl-C and SIGTERM raise KeyboardInterrupt. Make stdout and stderr print each line at
    once, "?" for what a terminal can't show, and nothing if they are closed. Use no more threads
    than a container's limit allows: torch sees all CPUs of the host. With two threads on half a
    CPU, training took 2.5 times as long."""
    if "OMP_NUM_THREADS" not in os.environ and data.cpu_limit() < torch.get_num_threads():
        torch.set_num_threads(max(1, int(data.cpu_limit())))
    stop_asked.clear()
    on_stop(stop_at_once)
    null = os.open(os.devnull, os.O_RDWR)
    while null < 3:  # a stream is closed (2>&-): don't let the next file get its number
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - kept open
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)
        if not isinstance(stream, Printable):
            setattr(sys, name, Printable(stream))


def run_command(grid: list[argparse.Namespace]) -> int:
    """Do what the options ask for. Returns the exit status."""
    if grid[0].eval and dist.is_initialized():
        raise ValueError("--eval and --predict are for one process, not torchrun")
    if grid[0].predict:
        return predict_photos(grid[0])
    if grid[0].eval:
        evaluate_again(grid[0])
    elif grid[0].download:
        fetch_for(grid)
    else:
        run_grid(grid)
    return 0


def print_error(error: Exception) -> None:
    """Print one line for an error that the user can do something about; raise any other again, and
    in Python's development mode all."""
    if sys.flags.dev_mode:
        raise error
    text = str(error)
    no_memory = "DefaultCPUAllocator" in text or "could not create a primitive" in text
    if isinstance(error, MemoryError) or no_memory:
        text = "not enough memory; give a smaller --batch or --image-size"
    elif isinstance(error, torch.OutOfMemoryError):
        text = f"{text.partition('. ')[0]}; give a smaller --batch or --image-size"
    elif isinstance(error, dist.DistError) and not dist.is_initialized():
        text = f"the processes can't connect ({vit.first_line(error)}); give another --master-port"
    elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        text = f"another process ended ({vit.first_line(error)})"
    elif isinstance(error, RuntimeError):
        raise error
    elif "No usable temporary directory" in text:  # torch makes one to import its compiler
        text += "; set TMPDIR to a folder that can be written to"
    print(f"error: {data.printable(text)}", file=sys.stderr)


def run_program(work: Callable[[], int], stopped: Callable[[], str]) -> int:
    """Run `work` and return the exit status: what it returns; 1 for an error, which is printed; 130
    after Ctrl-C and 143 after SIGTERM, when the line that `stopped` returns is printed. Streams,
    the number of torch's threads and signal handlers are restored afterwards, for a notebook that
    calls `main`; so let only one thread of a process call it at a time."""
    streams = (sys.stdout, sys.stderr)
    threads = torch.get_num_threads()
    for number in (signal.SIGINT, signal.SIGTERM):
        callers_handlers[number] = signal.getsignal(number)
    prepare_process()
    try:
        return work()
    except BrokenPipeError:  # such as "| head": nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        if is_first():
            print(f"\n{stopped()}", file=sys.stderr)
        return 128 + (stop_asked[0] if stop_asked else signal.SIGINT)
    finally:
        sys.stdout, sys.stderr = streams
        torch.set_num_threads(threads)
        if threading.current_thread() is threading.main_thread():
            for number, handler in callers_handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None if Python didn't set it


def how_to_go_on(arguments: list[str] | None, grid: list[argparse.Namespace]) -> str:
    """The command that continues a stopped one; `grid` is empty if its options weren't parsed."""
    command = sys.argv if arguments is None else [script("train.py"), *arguments]
    if grid and not grid[0].eval and not grid[0].resume:
        command = [*command, "--resume"]
    program = "python"
    if dist.is_initialized():
        here = os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())  # torchrun sets it
        program = f"torchrun --nproc-per-node {here}"
    return f"stopped; to go on: {program} {vit.command_line(command)}"


def as_texts(arguments: Iterable | None) -> list[str] | None:
    """A list of arguments as texts: code may give numbers and paths."""
    if isinstance(arguments, str):
        raise ValueError(f"give a list of arguments, such as {arguments.split()}")
    return None if arguments is None else [str(argument) for argument in arguments]


def main(arguments: Iterable | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 for an error, 130 after Ctrl-C, 143 after
    SIGTERM. Wrong usage raises SystemExit(2).

    Args:
        arguments: such as ["--epochs", 5]; [] for none. If left out, those of the process, which in
            a notebook are the notebook's.
    """
    arguments = as_texts(arguments)
    grid = []

    def work() -> int:
        grid.extend(parse(arguments))
        join_processes()
        return run_command(grid)

    return run_program(work, lambda: how_to_go_on(arguments, grid))


if __name__ == "__main__":
    status = main()
    if dist.is_initialized():  # its threads may abort a process that ends in the usual way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
