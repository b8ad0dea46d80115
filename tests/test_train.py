"""The command line, run as a user runs it."""

import csv
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Evil, runner, write_backbone, write_cifar10, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptertune
import data
import train
import vit

EXPORT = shlex.quote(str(ROOT / "export.py"))
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture
def unstopped(monkeypatch, few_pictures):
    """Forget signals that have arrived."""
    monkeypatch.setattr(train, "stop_asked", [])


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, unstopped):
    """A function that runs train.py's main in an empty folder and returns the output.

    An error must be one line.
    """
    monkeypatch.chdir(tmp_path)
    return runner(train.main, capsys)


def quick(weights, *more):
    """Options of a run that takes a second; if an option is given twice, the later value counts."""
    common = ["--epochs", 3, "--limit", 200, "--batch", 32, "--lr", 0.01]
    return ["--weights", weights, *common, *more]


def read_table(folder):
    """The rows of metrics.csv, including its header."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def without_times(rows):
    """The columns that the same command reproduces: epoch, loss, accuracies."""
    return [row[:4] for row in rows]


def printed_rows(out):
    """The cells of the table of epochs on the terminal, including its header."""
    lines = [line.split() for line in out.splitlines()]
    return [
        cells for cells in lines if len(cells) == 7 and (cells[0] == "epoch" or cells[0].isdigit())
    ]


def stated_test(out):
    """The test accuracies that the terminal shows."""
    return re.findall(r"^test +([\d.]+) %", out, re.M)


# ---------------------------------------------------------------------------------------- one run


def test_what_a_run_says(run, tiny_weights, tmp_path):
    """The terminal shows environment, parameters, data, the chosen epoch and the next step."""
    out = run(*quick(tiny_weights))
    assert re.search(
        r"^env      torch [\d.+a-z]+ · cpu \d+ threads?( \(.* CPUs\))? · (fp32|bf16) · seed 0$",
        out,
        re.M,
    )
    assert re.search(r"^backbone tiny 16px, [\d,]+ frozen, 2 heads, GELU$", out, re.M)
    assert "pixels   mean 0.5 0.5 0.5, std 0.5 0.5 0.5\n" in out
    assert "warning" not in out
    assert re.search(r"^trained  [\d,]+ \([\d.]+ %\): adapters 1,104, head 330$", out, re.M)
    data_line = "data     digits: 200 of 1,294 train / 50 of 144 val / 359 test, 10 classes"
    assert f"{data_line} (--limit: a quick look, not the data set's result)\n" in out

    table = read_table(tmp_path / "runs/digits-adaptertune-r8-n200-s0")
    assert len(table) == 4
    for row in table[1:]:
        text = " ".join(row)
        table_part = r"\d \d\.\d{3} \d+\.\d\d \d+\.\d\d \d+ \d+:\d\d \d+:\d\d"
        assert re.fullmatch(table_part + r" \d+\.\d\d \d\S* \d\.\d{4}", text)
    result = json.loads(Path("runs/digits-adaptertune-r8-n200-s0/result.json").read_text())
    how = rf"\(epoch {result['epoch']}, chosen on val; test read once\)"
    chosen = rf"^test     {result['test_accuracy']:.2f} %   {how}$"
    assert re.search(chosen, out, re.M)
    cost = r"^cost     \d+:\d\d training, \d+:\d\d evaluation, peak \d+\.\d GiB$"
    assert re.search(cost, out, re.M)
    assert out.endswith(f"next     python {EXPORT} runs/digits-adaptertune-r8-n200-s0\n")


def test_what_is_guessed_is_said(run, tmp_path):
    """A file that states nothing gives a warning that names the guesses; options prevent it."""
    model = vit.ViT(vit.Config(width=64, depth=1, heads=1, patch=4, image_size=16))
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    command = ["--weights", tmp_path / "bare.safetensors", "--limit", 64, "--epochs", 1]
    out = run(*command, "--name", "a")
    assert "pixels   mean 0.485 0.456 0.406, std 0.229 0.224 0.225\n" in out
    assert "frozen, 1 head (guessed), GELU\n" in out
    assert "warning  heads 1, ImageNet's mean, ImageNet's std: guessed" in out
    assert "if that is wrong: --backbone, or --heads, --mean, --std\n" in out
    by_hand = ["--heads", 4, "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"]
    out = run(*command, *by_hand, "--mlp-act", "quick_gelu", "--name", "b")
    assert "frozen, 4 heads (given), QuickGELU\n" in out
    assert "pixels   mean 0.5 0.5 0.5, std 0.2 0.2 0.2\n" in out
    assert "warning" not in out
    _, meta = adaptertune.read(tmp_path / "runs/b/adapters.safetensors")
    assert (meta["mean"], meta["std"]) == ([0.5] * 3, [0.2] * 3)
    assert "4 heads (given), QuickGELU" in run("--eval", "runs/b")


@pytest.mark.usefixtures("pictures")
def test_what_a_run_leaves(run, tiny_weights, tmp_path):
    """The folder holds a finished run's files; adapters.safetensors has what was trained."""
    out = run(*quick(tiny_weights))
    folder = tmp_path / "runs/digits-adaptertune-r8-n200-s0"
    files = {"adapters.safetensors", "metrics.csv", "config.json", "result.json", "split.json"}
    files |= {"predictions.csv", "README.md"}
    if HAS_MATPLOTLIB:
        files |= {"curves.svg", "mistakes.png"}
    assert {path.name for path in folder.iterdir()} == files

    keys = {"head.weight", "head.bias"}
    for block in (0, 1):
        for part in ("down", "up"):
            keys.add(f"blocks.{block}.adapter.{part}.weight")
            keys.add(f"blocks.{block}.adapter.{part}.bias")
    with safe_open(folder / "adapters.safetensors", "pt") as file:
        assert set(file.keys()) == keys
        meta = json.loads(file.metadata()["adaptertune"])
    expected = {
        "method": "adaptertune",
        "rank": 8,
        "placement": [0, 1],
        "backbone": "tiny",
        "image_size": 16,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "classes": [str(i) for i in range(10)],
        "dataset": "digits",
        "seed": 0,
        "fingerprint": adaptertune.fingerprint(vit.load(tiny_weights)[0]),
    }
    assert expected.items() <= meta.items()
    assert stated_test(out) == [f"{meta['test_accuracy']:.2f}"]
    result = json.loads((folder / "result.json").read_text())
    assert result["trained"] == 1434
    assert meta.pop("version") == adaptertune.VERSION
    assert meta.items() <= {key: result.get(key) for key in meta}.items()


def test_the_terminal_and_metrics_csv_have_the_same_rows(run, tiny_weights, tmp_path):
    """Every cell of the table of epochs is in metrics.csv, in the same order, followed by seconds,
    learning rate and validation loss (without smoothing and dropout)."""
    out = run(*quick(tiny_weights, "--dropout", 0.3, "--name", "a"))
    table = read_table(tmp_path / "runs/a")
    assert [row[0] for row in table] == ["epoch", "1", "2", "3"]
    assert printed_rows(out) == [row[:7] for row in table]
    assert table[0][7:] == ["seconds", "lr", "val_loss"]
    seconds = [float(row[7]) for row in table[1:]]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]
    # 7 steps an epoch, 2 of them for the warm-up
    rates = [0.01 * train.schedule(step, 21) for step in (6, 13, 20)]
    assert [float(row[8]) for row in table[1:]] == pytest.approx(rates, rel=1e-2)
    (options,) = train.parse(["--eval", "runs/a"])
    opened = train.open_run(options)
    opened.model.eval()
    batches = list(opened.batches.eval(opened.dataset.val, 1.0))
    logits = torch.cat([opened.model(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    chosen = json.loads((tmp_path / "runs/a/result.json").read_text())["epoch"]
    assert float(table[chosen][9]) == pytest.approx(loss, abs=1e-4)


def test_of_many_epochs_the_terminal_shows_every_tenth(run, tiny_weights, tmp_path):
    """Of more than 40 epochs, the terminal shows every tenth row; metrics.csv has all rows."""
    out = run(*quick(tiny_weights, "--method", "head", "--cached", "--epochs", 50, "--name", "a"))
    head, *rows = read_table(tmp_path / "runs/a")
    assert [row[0] for row in rows] == [str(epoch) for epoch in range(1, 51)]
    assert printed_rows(out) == [row[:7] for row in (head, *rows[9::10])]


def test_the_embedded_default_learns(run, tmp_path):
    """Two epochs on digits with vit_micro and defaults give over 85 %; adapters are small."""
    out = run("--epochs", 2)
    (accuracy,) = stated_test(out)
    assert float(accuracy) > 85
    adapters = tmp_path / "runs/digits-adaptertune-r8-s0/adapters.safetensors"
    assert adapters.stat().st_size < 300_000


def test_the_embedded_backbone_is_small():
    """vit_micro has at most 2 million parameters and 4 MB, and its file states its shape."""
    weights = ROOT / "assets" / "vit_micro.safetensors"
    assert weights.stat().st_size <= 4_000_000
    model, backbone = vit.load(weights, name="vit_micro")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert vit.load(weights)[1].config == backbone.config


def test_same_command_same_metrics(run, tiny_weights, tmp_path):
    """The same command gives the same numbers and the same file; another seed gives others."""
    arguments = quick(tiny_weights, "--dropout", 0.3)
    for name in ("a", "b"):
        run(*arguments, "--name", name)
    run(*arguments, "--name", "c", "--seeds", 1)
    metrics = {name: without_times(read_table(tmp_path / "runs" / name)) for name in "abc"}
    assert metrics["a"] == metrics["b"]
    assert metrics["a"] != metrics["c"]
    first = (tmp_path / "runs/a/adapters.safetensors").read_bytes()
    assert (tmp_path / "runs/b/adapters.safetensors").read_bytes() == first
    assert (tmp_path / "runs/c/adapters.safetensors").read_bytes() != first


def test_frozen_tensors_stay_and_have_no_gradient(tiny_weights, tmp_path, monkeypatch, unstopped):
    """Training changes every adapter and the head, and gives no gradient to anything else."""
    monkeypatch.chdir(tmp_path)
    (options,) = train.parse([str(each) for each in quick(tiny_weights)])
    prepared = train.prepare(options)
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    train.fit(prepared)
    after = prepared.model.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != adaptertune.is_added(name), name
    for name, parameter in prepared.model.named_parameters():
        assert (parameter.grad is not None) == adaptertune.is_added(name), name
    for name, tensor in load_file(tiny_weights).items():
        assert torch.equal(tensor, after[name]), name


def test_diverging_training_says_so(run, tiny_weights, tmp_path):
    """A loss that isn't finite ends the run with advice, and nothing is left behind."""
    diverging = ["--method", "full", "--lr", 1000, "--weight-decay", 900]
    assert "lower --lr (1000)" in run(*quick(tiny_weights, *diverging), status=1)
    assert not (tmp_path / "runs").exists()


def test_every_method_trains_with_rotary_positions(run, tmp_path):
    """Adapters, prompts and, in bf16, a whole network train with rotary positions; the whole
    network is then a backbone at another image size."""
    shape = {"rope": True, "registers": 4, "layer_scale": True, "qkv_bias": False}
    weights = write_tiny(tmp_path / "w.safetensors", seed=0, **shape)
    few = ["--epochs", 1, "--limit", 64]
    methods = {"adaptertune": ["--rank", 2], "adaptformer": ["--rank", 4], "vpt": []}
    for method, more in methods.items():
        options = ["--method", method, *more, "--image-size", 24, "--name", method]
        run(*quick(weights, *few, *options))
        assert stated_test(run("--eval", f"runs/{method}"))
    run(*quick(weights, *few, "--method", "full", "--amp", "bf16", "--name", "full"))
    whole = tmp_path / "runs/full/adapters.safetensors"
    config = vit.load(whole)[1].config
    assert config == vit.Config(**TINY | shape)
    out = run(*quick(whole, *few, "--image-size", 20, "--name", "next"))
    assert "backbone full 20px, " in out


def test_bf16_is_for_training_alone(tiny_weights):
    """The network trains in bf16, nearly as in fp32, and is evaluated in fp32."""
    options, *_ = train.parse(["--weights", str(tiny_weights), "--limit", "64", "--amp", "bf16"])
    run = train.prepare(options)
    x, _ = next(run.batches.eval(run.dataset.val, 1.0))
    exact = run.model(x)
    run.model.train()
    rounded = run.logits(x)
    assert rounded.dtype is torch.float32
    assert not torch.allclose(rounded, exact, atol=1e-5)
    assert torch.allclose(rounded, exact, atol=0.02)
    run.model.eval()
    assert torch.equal(run.logits(x), exact)


def test_a_batch_in_parts_teaches_what_the_whole_teaches(tiny_weights, monkeypatch):
    """On a CPU, a large batch passes through the network in parts: gradients, loss and hits are
    those of the whole batch, even if its parts and classes differ in weight."""
    weights = ["--weights", str(tiny_weights), "--amp", "off", "--label-smoothing", "0.1"]
    options, *_ = train.parse([*weights, "--shots", "20", "--batch", "151", "--class-weights"])
    run = train.prepare(options)
    run.class_weights = torch.linspace(0.5, 2, 10)
    run.model.train()
    images, labels = next(run.batches.train(run.dataset, 0, 1))
    assert len(labels) == 151  # x 16 patches: two parts, of 76 and 75 images
    found = []
    for parts in (train.count_parts(run.model, images), 1):
        monkeypatch.setattr(train, "count_parts", lambda *_, parts=parts: parts)
        still = torch.optim.SGD(run.parameters, lr=0)
        loss, hits = train.take_step(run, still, images, labels, len(labels))
        gradients = torch.cat([each.grad.flatten() for each in run.parameters])
        found.append((parts, loss, hits, gradients))
    (parts, loss, hits, gradients), (_, whole_loss, whole_hits, whole) = found
    assert parts == 2
    assert hits == whole_hits
    assert torch.allclose(loss, whole_loss, atol=1e-6)
    assert torch.allclose(gradients, whole, atol=1e-6)
    assert whole.norm() > 0.1
    losses = torch.nn.functional.cross_entropy(
        run.logits(images), labels, label_smoothing=0.1, reduction="none"
    )
    assert torch.allclose(loss, (losses * run.class_weights[labels]).mean(), atol=1e-6)


def test_compiled_training_is_the_plain_one(run, tmp_path):
    """--compile changes how the steps are computed, not what they do; the last batch is smaller."""
    try:
        train.check_compiler(train.choose_device("auto"))
    except ValueError as error:
        pytest.skip(str(error))
    weights = write_tiny(tmp_path / "one.safetensors", seed=0, depth=1)  # each block takes seconds
    arguments = quick(weights, "--amp", "off", "--epochs", 2)
    run(*arguments, "--name", "plain")
    run(*arguments, "--name", "compiled", "--compile")
    plain = load_file(tmp_path / "runs/plain/adapters.safetensors")
    compiled = load_file(tmp_path / "runs/compiled/adapters.safetensors")
    for name, tensor in plain.items():
        assert torch.allclose(compiled[name], tensor, atol=1e-4), name
    assert any(not torch.equal(compiled[name], tensor) for name, tensor in plain.items())


def test_a_device_that_nothing_was_tried_on(monkeypatch):
    """A device other than CPU and CUDA is refused before it fails half-way, even if it exists."""
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    with pytest.raises(ValueError, match="device 'mps' can't be used here; choose auto, cpu or"):
        train.choose_device("mps")
    assert train.choose_device("cpu").type == "cpu"


def test_a_compiler_that_is_missing(run, tiny_weights, monkeypatch):
    """Without a compiler, --compile gives a one-line error that says what torch lacks."""

    def compile(function, **_):  # noqa: A001
        raise RuntimeError("no C++ compiler\nfor many reasons")

    monkeypatch.setattr(torch, "compile", compile)
    error = run(*quick(tiny_weights, "--compile"), status=1)
    assert "--compile can't be used here (no C++ compiler); leave it out" in error


def test_auto_precision_is_settled_once(run, tiny_weights, tmp_path, monkeypatch, unstopped):
    """--amp auto takes the faster type and records it, and a resumed run keeps it."""
    for share, amp, word in ((0.5, "bf16", "bf16"), (0.9, "off", "fp32")):
        monkeypatch.setattr(train, "time_bf16", lambda share=share: share)
        assert f"· {word} · seed 0" in run(*quick(tiny_weights, "--name", word, "--epochs", 1))
        assert json.loads((tmp_path / f"runs/{word}/config.json").read_text())["amp"] == amp

    arguments = quick(tiny_weights, "--epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "time_bf16", lambda: 0.5)
        stop_at(patch, 2, signal.SIGTERM)
        assert train.main([str(each) for each in arguments]) == 143
    train.stop_asked.clear()
    assert "· bf16 · seed 0" in run(*arguments, "--resume")


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_faster_type_is_measured(monkeypatch, slow):
    """time_bf16 finds the faster type if the other type's products are computed three times."""
    plain = torch.nn.functional.linear

    def linear(x, weight):
        for _ in range(3 if x.dtype is slow else 1):
            plain(x[:512].float(), weight.float())

    monkeypatch.setattr(train.F, "linear", linear)
    assert (train.time_bf16.__wrapped__() < 0.7) == (slow is torch.float32)


def test_schedule():
    """The learning rate rises over a tenth of the steps and falls as a cosine to zero."""
    factors = [train.schedule(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    falling = factors[10:]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == len(falling)


@pytest.mark.usefixtures("unstopped")
def test_training_is_the_stated_recipe(tiny_weights, tmp_path, monkeypatch):
    """Losses and weights are those of the loop that is written out here: label smoothing, class
    weights, gradients clipped to a norm of 1, AdamW that decays matrices only, a separate peak rate
    for the head, and the schedule for both rates."""
    monkeypatch.chdir(tmp_path)
    recipe = ["--lr", 0.02, "--head-lr", 0.05, "--weight-decay", 0.3, "--label-smoothing", 0.2]
    command = quick(tiny_weights, *recipe, "--class-weights", "--epochs", 2, "--amp", "off")
    command += ["--seed", 3]
    (options,) = train.parse([str(each) for each in command])
    twin = train.prepare(options)
    run = train.prepare(options)
    train.fit(run)

    weights = adaptertune.trained(twin.model)
    groups = []
    for name, parameter in weights.items():
        peak = 0.05 if name.startswith("head.") else 0.02
        decay = 0.3 if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "peak": peak})
    optimizer = torch.optim.AdamW(groups)
    sizes = torch.bincount(twin.dataset.train.labels)
    class_weights = 200 / (10 * sizes)
    norms = []
    losses = []
    after = []  # the weights at the end of each epoch
    for epoch in (1, 2):
        total = 0.0
        for images, labels in twin.batches.train(twin.dataset, seed=3, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * train.schedule(len(norms), 14)
            logits = twin.model(images)
            each = torch.nn.functional.cross_entropy(
                logits, labels, label_smoothing=0.2, reduction="none"
            )
            loss = (each * class_weights[labels]).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).item())
            optimizer.step()
            total += loss.item() * len(labels)
        losses.append(total / 200)
        after.append({name: value.detach().clone() for name, value in weights.items()})

    assert max(norms) > 1.2  # otherwise nothing would be clipped
    assert [float(row[1]) for row in run.state.rows] == pytest.approx(losses, abs=6e-4)
    expected = after[run.state.chosen_epoch - 1]
    for name, tensor in adaptertune.trained(run.model).items():
        assert torch.allclose(tensor, expected[name], atol=1e-4), name


# ------------------------------------------------------------------------------------- many runs


@pytest.mark.usefixtures("pictures")
def test_seeds(run, tiny_weights, tmp_path):
    """Several seeds give a row of mean and standard deviation, a .csv and a picture. Each run has a
    heading."""
    out = run(*quick(tiny_weights, "--seeds", "0,1", "--method", "head"))
    assert "\nrun      1 of 2: head, learning rate 0.01, seed 0\n" in out
    heading = r"^run      2 of 2: head, learning rate 0.01, seed 1; about \d:\d\d left for all$"
    assert re.search(heading, out, re.M)
    again = run(*quick(tiny_weights, "--seeds", "0,1", "--method", "head"))
    assert re.search("^run      2 of 2: head, learning rate 0.01, seed 1$", again, re.M)  # kept
    first, second = map(float, stated_test(out))
    assert first != second
    row = re.search(r"^head +330 +([\d.]+) ± ([\d.]+) ", out, re.M)
    assert float(row[1]) == pytest.approx((first + second) / 2, abs=0.011)
    assert float(row[2]) == pytest.approx(abs(first - second) / 2**0.5, abs=0.02)
    names = {"digits-head-n200-s0", "digits-head-n200-s1", "digits-comparison.csv"}
    if HAS_MATPLOTLIB:
        names.add("digits-comparison.svg")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == names


def test_scratch_leaves_a_backbone(run, tmp_path):
    """A network trained from random weights is the backbone of the next run."""
    few = ["--epochs", 1, "--limit", 64, "--test-share", 0.05]
    run("--scratch", "--backbone", "vit_micro", *few, "--name", "base")
    weights = tmp_path / "runs/base/adapters.safetensors"
    model, backbone = vit.load(weights, head=True)
    assert backbone.config == vit.BACKBONES["vit_micro"].config
    assert model.head.weight.shape == (10, 128)
    assert len(train.load_run("runs/base", weights).classes) == 10  # not an exit, as by --scratch
    out = run("--weights", weights, *few, "--name", "next")
    assert "backbone base 32px, 809,856 frozen" in out


def test_a_run_is_not_overwritten_by_another(run, tiny_weights, tmp_path):
    """The same command finds its folder again, even with another --data-dir; other options get a
    numbered folder, or are refused if --name was given."""
    run(*quick(tiny_weights))
    again = run(*quick(tiny_weights, "--dropout", 0.2))
    assert "saved    runs/digits-adaptertune-r8-n200-s0-2/adapters.safetensors" in again
    note = "note     runs/digits-adaptertune-r8-n200-s0 holds a run with dropout 0.0, not 0.2; this"
    assert again.startswith(f"{note} one goes to runs/digits-adaptertune-r8-n200-s0-2\n")
    assert "runs/digits-adaptertune-r8-n200-s0-3/" in run(*quick(tiny_weights, "--lr", 0.1))
    for more, number in (((), ""), (("--dropout", 0.2), "-2"), (("--lr", 0.1), "-3")):
        kept = run(*quick(tiny_weights, "--offline", "--data-dir", tmp_path, *more))
        assert kept.startswith(f"kept     runs/digits-adaptertune-r8-n200-s0{number}/adapters")
    run(*quick(tiny_weights, "--name", "a"))
    error = run(*quick(tiny_weights, "--name", "a", "--dropout", 0.2), status=1)
    assert "runs/a holds a run with other options (dropout 0.0, not 0.2); give this one" in error


# ----------------------------------------------------------------------- the finished run, again


@pytest.mark.parametrize("method", ["adaptertune", "head", "full"])
def test_eval_reproduces_the_test_accuracy(run, tiny_weights, method):
    """--eval gives the same test accuracy from the saved tensors."""
    out = run(*quick(tiny_weights, "--method", method, "--name", "a"))
    (stated,) = stated_test(out)
    expected = f"test     {stated} %   (its file says {stated} %)"
    again = run("--eval", "runs/a", "--batch", 7)
    assert expected in again
    assert "recipe" not in again  # nothing is trained


def test_another_backbone_is_refused_by_name(run, tiny_weights, tmp_path):
    """Adapters of another backbone are refused with both names and fingerprints."""
    other = write_tiny(tmp_path / "other.safetensors", seed=1)
    run(*quick(tiny_weights, "--name", "a"))
    error = run("--eval", "runs/a", "--weights", other, status=1)
    message = r"trained on tiny \([0-9a-f]{16}\), not on other \([0-9a-f]{16}\)"
    assert re.search(message, error)
    (tmp_path / "new").mkdir()
    shutil.copy(other, tmp_path / "new/tiny.safetensors")  # of the same name
    error = run("--eval", "runs/a", "--weights", "new/tiny.safetensors", status=1)
    named = r"trained on tiny \(\w+\), not on tiny \(\w+\) of \S*new/tiny.safetensors; give that"
    assert re.search(named, error)


def test_photos(run, photos, tiny_weights, tmp_path):
    """A folder of photos trains, and split.json says which photo was in which part."""
    out = run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--name", "a"))
    assert "data     photos: 43 train / 5 val / 12 test, 3 classes" in out
    parts = json.loads((tmp_path / "runs/a/split.json").read_text())
    assert [len(parts[part]) for part in ("train", "val", "test")] == [43, 5, 12]
    names = parts["train"] + parts["val"] + parts["test"]
    assert len(set(names)) == 60


def test_eval_with_what_the_run_was_not_trained_with(run, tiny_weights):
    """An option that would change a finished run's network is refused by name, and so is one that
    would have no effect."""
    run(*quick(tiny_weights, "--epochs", 1, "--name", "a"))
    for changed, named in (
        (["--heads", 4], "heads 2, not 4"),
        (["--mlp-act", "quick_gelu"], "mlp act gelu, not quick_gelu"),
    ):
        error = run("--eval", "runs/a", *changed, status=1)
        assert f"runs/a/adapters.safetensors was trained with {named}" in error
    for option in (
        "--image-size 32",
        "--rank 8",
        "--method vpt",
        "--lr 3",
        "--seed 5",
        "--scratch",
    ):
        for what in (["--eval", "runs/a"], ["--predict", "runs/a", "x.jpg"]):
            error = run(*option.split(), *what, status=2)
            named, _, _ = error.removeprefix("error: ").partition(" is for training; --eval")
            assert option.split()[0] in named.split("/")


@pytest.mark.parametrize("dataset", ["photos", "digits"])
def test_a_run_keeps_its_split(dataset, run, photos, tiny_weights, tmp_path):
    """split.json alone decides what a run trains and tests on when it is resumed or opened."""
    where = photos if dataset == "photos" else dataset
    command = ["--dataset", where, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a")]
    run(*command)
    path = tmp_path / "runs/a/split.json"
    listed = json.loads(path.read_text())
    listed["test"], listed["train"] = listed["train"][:7], listed["test"]
    path.write_text(json.dumps(listed))
    (options,) = train.parse([str(each) for each in command])
    resumed = train.prepare(options).dataset
    opened = train.open_run(train.options_of("runs/a")).dataset
    for split in (resumed, opened):
        for part in ("train", "val", "test"):
            assert getattr(split, part).names == listed[part]
    whole = train.read_dataset(str(where), "data", 16, False).train
    for name, pixels, label in zip(
        resumed.test.names, resumed.test.pixels, resumed.test.labels, strict=True
    ):
        at = whole.names.index(name)
        assert torch.equal(pixels, whole.pixels[at]) and label == whole.labels[at]


def test_a_run_without_its_split(run, tiny_weights, tmp_path):
    """Without split.json a run isn't split again: it might be tested on its training images."""
    command = quick(tiny_weights, "--name", "a")
    run(*command, "--epochs", 1)
    (tmp_path / "runs/a/split.json").unlink()
    message = "split.json is missing: nothing else says which images were trained on; restore it"
    assert message in run(*command, "--epochs", 2, "--resume", status=1)
    assert message in run("--eval", "runs/a", status=1)


def test_the_same_command_again(run, tiny_weights, tmp_path):
    """The same command, with or without --resume, leaves every file as it is, and says so with the
    result."""
    command = quick(tiny_weights, "--epochs", 1, "--name", "a")
    (accuracy,) = re.findall(r"test     ([\d.]+) %", run(*command))
    files = {path: path.read_bytes() for path in (tmp_path / "runs/a").iterdir()}
    for again in (command, [*command, "--resume"]):
        out = run(*again)
        assert "kept     runs/a/adapters.safetensors, finished before with" in out
        assert f"with test accuracy {accuracy} %; to train it again, delete" in out
        assert "epoch" not in out
        assert {path: path.read_bytes() for path in (tmp_path / "runs/a").iterdir()} == files


@pytest.mark.parametrize("option", [["--epochs", 2], ["--batch", 16], ["--min-scale", 0.5]])
def test_a_finished_run_of_other_options_is_not_kept(option, run, tiny_weights):
    """A run with an option given by hand isn't kept for a command that leaves it to the data."""
    command = ["--weights", tiny_weights, "--limit", 40, "--method", "head", "--name", "a"]
    run(*command, *option)
    assert "kept" in run(*command, *option)
    error = run(*command, status=1)
    name = option[0].removeprefix("--").replace("-", "_")
    assert f"a run with other options ({name} {option[1]}, not the default); give" in error


def test_a_finished_run_whose_weights_were_replaced(run, tiny_weights, tmp_path):
    """If --weights became another network, the same command doesn't return the old result."""
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny_weights, weights)
    command = quick(weights, "--epochs", 1, "--name", "a")
    run(*command)
    write_tiny(weights, seed=1)
    error = run(*command, status=1)
    assert "was trained on another backbone" in error
    assert "weights.safetensors is (" in error


def test_a_run_from_before_an_option_came(run, tiny_weights, tmp_path):
    """An option that is missing in an older config.json counts as off."""
    command = quick(tiny_weights, "--epochs", 1, "--name", "a")
    run(*command)
    path = tmp_path / "runs/a/config.json"
    saved = json.loads(path.read_text())
    del saved["no_flip"]
    path.write_text(json.dumps(saved))
    assert "kept" in run(*command)
    error = run(*command, "--no-flip", status=1)
    assert "other options (no_flip none, not True)" in error


def test_an_option_that_was_left_out_is_named(run, tiny_weights):
    """A refusal says which of two values is the default."""
    command = quick(tiny_weights, "--epochs", 1, "--name", "a")
    run(*command, "--weight-decay", 0.1)
    error = run(*command, status=1)
    assert "other options (weight_decay 0.1, not 0.05 (the default)); give" in error


def test_a_config_that_disagrees_with_the_adapters(run, tiny_weights, tmp_path):
    """A run whose config.json says another placement or rank than its adapters have is refused."""
    run(*quick(tiny_weights, "--epochs", 1, "--every", 2, "--name", "a"))
    path = tmp_path / "runs/a/config.json"
    config = json.loads(path.read_text())
    for changed, named in (
        ({"every": 1}, "placement [0], not [0, 1]"),
        ({"rank": 4}, "rank 8, not 4"),
        ({"scale": 2.0}, "scale 1.0, not 2.0"),
        ({"act": "relu"}, "act gelu, not relu"),
        ({"reads": "mlp"}, "reads block, not mlp"),
        ({"image_size": 32}, "image size 16, not 32"),
        ({"method": "vpt", "prompts": 10}, "method adaptertune, not vpt"),
    ):
        path.write_text(json.dumps(config | changed))
        error = run("--eval", "runs/a", status=1)
        assert f"runs/a/adapters.safetensors was trained with {named}" in error


def test_a_change_of_method_is_named(run, tiny_weights):
    """A refusal names the option that was given, not the rate that follows from it."""
    command = [each for each in quick(tiny_weights, "--name", "a") if each not in ("--lr", 0.01)]
    run(*command, "--epochs", 1)
    error = run(*command, "--epochs", 1, "--method", "adaptformer", status=1)
    assert "other options (method adaptertune, not adaptformer)" in error
    error = run(*command, "--epochs", 1, "--method", "adaptformer", "--rank", 8, status=1)
    assert "other options (method adaptertune, not adaptformer)" in error


def test_skipped_files_are_counted(run, photos, tiny_weights):
    """Files that aren't photos, broken links and photos outside the class folders are counted in
    one line."""
    for name in ("a.txt", "b.txt"):
        (photos / "leaf" / name).write_text("no photo")
    (photos / "leaf" / "gone.png").symlink_to(photos / "nothing.png")
    shutil.copy(photos / "leaf/00.png", photos / "loose.png")
    quick_look = quick(tiny_weights, "--limit", 0, "--epochs", 1)
    line = "skipped  4 files, not photos or outside the class folders, such as "
    assert f"{line}{photos}/loose.png\n" in run("--dataset", photos, *quick_look, "--name", "a")

    parts = photos.parent / "parts"
    shutil.copytree(photos, parts / "train", symlinks=True)
    shutil.copytree(photos, parts / "holdout", symlinks=True)
    out = run("--dataset", parts, *quick_look, "--name", "b")
    # In train the same 4 files, and all 61 photos of the folder beside it.
    assert "skipped  65 files, not photos or outside the class folders, such as " in out


def test_test_images_that_were_trained_on(run, photos, tiny_weights):
    """Copies of training photos in test/ are counted in a warning, and so are photos that are in
    two classes; each warning names a pair."""
    parts = photos.parent / "parts"
    shutil.copytree(photos, parts / "train")
    for name in ("apple", "leaf", "sky"):
        (parts / "test" / name).mkdir(parents=True)
        (photos / name / "00.png").rename(parts / "test" / name / "other.png")
        (parts / "train" / name / "01.png").rename(parts / "test" / name / "moved.png")
    out = run("--dataset", parts, *quick(tiny_weights, "--limit", 0, "--epochs", 1))
    # A tenth of train went to val, so perhaps not all three copies are trained on.
    found = "warning  (\\d) of 6 test images are training images too, such as (\\S+) and (\\S+)\n"
    ((copies, one, other),) = re.findall(found, out)
    assert 1 <= int(copies) <= 3
    assert (parts / one).read_bytes() == (parts / other).read_bytes()
    assert "in several classes" not in out

    shutil.copy(parts / "test/apple/other.png", parts / "test/leaf/odd.png")
    shutil.copy(parts / "test/apple/other.png", parts / "test/sky/odder.png")
    train.read_dataset.cache_clear()
    out = run("--dataset", parts, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "b"))
    pair = "test/leaf/odd.png and train/apple/00.png"
    assert f"warning  1 photo in several classes, such as {pair}\n" in out


def test_few_images_to_evaluate_on(run, photos, tiny_weights):
    """A note says what one of few images counts for, and which class has no test image."""
    for photo in sorted((photos / "sky").iterdir())[1:]:
        photo.unlink()
    out = run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1))
    assert "note     3 validation images: each is 33.3 points of accuracy\n" in out
    assert "note     8 test images: each is 12.5 points of accuracy\n" in out
    assert "note     no test image of 1 class, such as sky\n" in out
    out = run(*quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "b"))
    assert "points of accuracy" not in out


def test_photos_that_came_since(run, photos, tiny_weights, tmp_path):
    """A finished run that is kept says how many photos of its folder it doesn't know."""
    command = ["--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1)]
    run(*command)
    assert "came since then" not in run(*command)
    shutil.copy(photos / "sky/00.png", photos / "sky/new.png")
    shutil.copy(photos / "sky/01.png", photos / "sky/newer.png")
    train.list_photos.cache_clear()
    note = "note     2 photos came since then, such as sky/new.png; a run with another --name"
    assert f"{note} uses them, in a new split\n" in run(*command)
    (tmp_path / "runs/photos-adaptertune-r8-s0/split.json").unlink()
    assert run(*command).startswith("kept ")
    shutil.rmtree(photos)
    train.list_photos.cache_clear()
    for again in (command, [*command, "--resume"]):
        assert run(*again).startswith("kept ")


def test_files_that_were_moved(run, photos, tiny_weights, tmp_path):
    """--resume continues a run whose photos and weights are elsewhere now, unless they are others.
    Nothing is trained again."""
    weights = shutil.copy(tiny_weights, tmp_path / "w.safetensors")
    options = ["--limit", 0, "--epochs", 2, "--batch", 8, "--name", "a"]
    run("--dataset", photos, "--weights", weights, *options)
    before = load_file(tmp_path / "runs/a/adapters.safetensors")
    mine = shutil.move(photos, tmp_path / "mine")
    other = shutil.move(weights, tmp_path / "other.safetensors")
    train.read_dataset.cache_clear()
    command = ["--dataset", mine, "--weights", other, *options, "--epochs", 3]
    assert "other options (dataset " in run(*command, status=1)
    out = run(*command, "--resume")
    assert "more     1 epoch from the weights of epoch" in out
    assert load_file(tmp_path / "runs/a/adapters.safetensors").keys() == before.keys()
    assert "kept" in run(*command)

    # Of a finished run, with --resume, too.
    again = ["--dataset", shutil.move(mine, tmp_path / "again"), *command[2:]]
    assert "other options (dataset " in run(*again, status=1)
    assert "kept" in run(*again, "--resume")
    photo = tmp_path / "again/sky/03.png"
    content = photo.read_bytes()
    shutil.copy(photo.with_name("04.png"), photo)
    assert "other options (dataset " in run(*again, "--resume", status=1)
    photo.unlink()
    train.list_photos.cache_clear()
    assert "other options (dataset " in run(*again, "--resume", status=1)
    config = tmp_path / "runs/a/config.json"
    saved = config.read_text()
    config.write_text(saved.replace('"backbone": ""', '"backbone": "vit_s16"'))
    other = shutil.move(other, tmp_path / "gone.safetensors")
    assert "other options (weights " in run(*command[:2], *options, "--resume", status=1)
    config.write_text(saved)
    shutil.move(other, tmp_path / "other.safetensors")
    photo.write_bytes(content)
    shutil.move(tmp_path / "again", mine)
    train.list_photos.cache_clear()

    (tmp_path / "other.safetensors").unlink()
    write_tiny(tmp_path / "third.safetensors", seed=1)
    command = ["--dataset", mine, "--weights", tmp_path / "third.safetensors", *options]
    error = run(*command, "--epochs", 4, "--resume", status=1)
    assert "was trained on another backbone" in error


def test_photos_that_come_and_go(run, photos, tiny_weights, tmp_path):
    """New photos belong to no part. Evaluation reports missing ones, and training stops."""
    photos = shutil.copytree(photos, tmp_path / "mine")
    command = [
        "--dataset",
        photos,
        *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"),
    ]
    out = run(*command)
    (accuracy,) = re.findall(r"test     ([\d.]+) %", out)
    listed = json.loads((tmp_path / "runs/a/split.json").read_text())
    some = photos / listed["train"][0]
    shutil.copy(some, photos / "apple" / "0new.png")
    shutil.copy(some, photos / "sky" / "znew.png")
    train.read_dataset.cache_clear()
    out = run("--eval", "runs/a")
    left_out = (
        "split    left out: 2 images that runs/a/split.json doesn't list; another --name uses"
    )
    assert f"{left_out} them\n" in out
    assert f"test     {accuracy} %" in out

    train.read_dataset.cache_clear()
    some.unlink()
    out = run("--eval", "runs/a")
    assert f"split    gone: 1 image of runs/a/split.json, such as {listed['train'][0]}" in out
    assert f"test     {accuracy} %" in out
    train.read_dataset.cache_clear()
    (photos / listed["val"][0]).unlink()
    assert "saved    runs/a/predictions-incomplete.csv" in run("--eval", "runs/a")
    tested = [row["split"] for row in read_predictions(tmp_path / "runs/a/predictions.csv")]
    assert tested.count("test") == len(listed["test"])
    message = f"gone: 2 images of runs/a/split.json, such as {listed['train'][0]}; put them back"
    (tmp_path / "runs/a/state.pt").touch()  # as if it had been stopped
    assert message in run(*command, "--resume", status=1)


def test_a_split_holds_wherever_the_photos_are(run, photos, tiny_weights, tmp_path):
    """A copy of the folder has the same split, even with other names or one photo less, so no
    training photo is tested. Photos that were never in the run are another data set."""
    run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"))
    listed = json.loads((tmp_path / "runs/a/split.json").read_text())
    copy = shutil.copytree(photos, tmp_path / "elsewhere")
    for folder in (copy, f"{copy}/", os.path.relpath(copy)):
        out = run("--eval", "runs/a", "--dataset", folder)
        assert "43 train / 5 val / 12 test" in out
        assert "split    " not in out
    (copy / listed["train"][0]).unlink()
    train.read_dataset.cache_clear()
    shutil.copytree(
        copy, tmp_path / "renamed", copy_function=lambda a, b: shutil.copy(a, f"{b}.png")
    )
    out = run("--eval", "runs/a", "--dataset", tmp_path / "renamed")
    assert "split    left out: 47 images that the run was trained or chosen on\n" in out
    assert "0 train / 0 val / 12 test" in out
    out = run("--eval", "runs/a", "--dataset", copy)
    assert "42 train / 5 val / 12 test" in out
    assert f"split    gone: 1 image of runs/a/split.json, such as {listed['train'][0]}\n" in out

    from PIL import Image

    for path in copy.rglob("*.png"):
        with Image.open(path) as photo:
            photo.resize((20, 20)).save(path.with_name(f"new{path.name}"))
        path.unlink()
    train.read_dataset.cache_clear()
    assert "split    " not in run("--eval", "runs/a", "--dataset", copy)


def test_photos_whose_content_changed(run, photos, tiny_weights, tmp_path):
    """A test photo overwritten by a training photo is neither tested nor trained on."""
    arguments = ["--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1)]
    run(*arguments, "--name", "a")
    path = tmp_path / "runs/a/split.json"
    listed = json.loads(path.read_text())
    shutil.copy(photos / listed["train"][0], photos / listed["test"][0])
    train.read_dataset.cache_clear()
    out = run("--eval", "runs/a")
    assert "43 train / 5 val / 11 test" in out
    line = f"split    other files by now: 1 image of runs/a/split.json, such as {listed['test'][0]}"
    assert line in out
    (tmp_path / "runs/a/state.pt").touch()  # as if it had been stopped
    assert "error: other files by now: 1 image" in run(
        *arguments, "--name", "a", "--resume", status=1
    )

    path.write_text(json.dumps(listed | {"test": [*listed["test"], listed["train"][0]]}))
    error = run("--eval", "runs/a", status=1)
    assert f"split.json lists {listed['train'][0]} twice" in error
    path.unlink()
    (tmp_path / "runs/a/state.pt").unlink()
    for again in (["--eval", "runs/a"], [*arguments, "--epochs", 2, "--name", "a", "--resume"]):
        error = run(*again, status=1)
        message = "runs/a/split.json is missing: nothing else says which images were trained on"
        assert message in error


def test_names_of_several_runs():
    """With several runs, what differs follows --name."""
    grid = train.parse(["--name", "x", "--seeds", "0,3", "--ranks", "2,4"])
    names = [train.run_name(options) for options in grid]
    assert names == ["x-rank-2-s0", "x-rank-2-s3", "x-rank-4-s0", "x-rank-4-s3"]
    assert [train.run_name(options) for options in train.parse(["--name", "x"])] == ["x"]


def test_a_name_with_special_characters(run, tiny_weights, tmp_path):
    """A name that would be a pattern of file names is only a name."""
    for name in ("a**b", "[a]"):
        run(*quick(tiny_weights, "--epochs", 1, "--limit", 40, "--name", name))
        assert (tmp_path / "runs" / name / "result.json").exists()
        assert not (tmp_path / "runs" / name / "state.pt").exists()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "/tmp/a"])
def test_names_that_are_no_folder_below_runs(run, tiny_weights, tmp_path, name):
    """A run's name must be that of a folder directly below runs/."""
    error = run(*quick(tiny_weights, "--name", name), status=2)
    assert "give the name of a folder below runs/, without / in it" in error
    assert list(tmp_path.iterdir()) == []


def test_classes_are_matched_by_name(run, photos, tiny_weights, tmp_path):
    """A class keeps its number, whatever the order of the folders; an unknown class is refused."""
    photos = shutil.copytree(photos, tmp_path / "mine")
    command = [
        "--dataset",
        photos,
        *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"),
    ]
    run(*command)
    path = tmp_path / "runs/a/split.json"
    listed = json.loads(path.read_text())
    listed["classes"] = ["sky", "apple", "leaf"]
    path.write_text(json.dumps(listed))
    assert "with classes" in run("--eval", "runs/a", status=1)  # the adapters' file disagrees
    (options,) = train.parse([str(each) for each in command])
    test = train.prepare(options).dataset.test
    folders = [name.split("/")[0] for name in test.names]
    expected = {"sky": 0, "apple": 1, "leaf": 2}
    assert test.labels.tolist() == [expected[folder] for folder in folders]
    train.read_dataset.cache_clear()
    (photos / "leaf").rename(photos / "zebra")
    error = run("--eval", "runs/a", status=1)
    assert "it has zebra, which the run doesn't know" in error


# ------------------------------------------------------------------- looking at the result


def read_predictions(path):
    """The rows of predictions.csv as dictionaries."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("pictures")
def test_predictions_of_every_image(run, photos, tiny_weights, tmp_path, monkeypatch):
    """predictions.csv has each image of val and test once; its hits give the accuracies, and the
    worst classes are named. With many classes it has no probability of each."""
    for i in range(6):  # photos in the wrong folder, which will be mistaken
        (photos / f"leaf/{i:02}.png").rename(photos / f"sky/leaf{i:02}.png")
        (photos / f"sky/{i:02}.png").rename(photos / f"leaf/sky{i:02}.png")
    command = quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a")
    out = run("--dataset", photos, *command)
    folder = tmp_path / "runs/a"
    rows = read_predictions(folder / "predictions.csv")
    columns = ["file", "split", "label", "prediction", "probability", "runner-up"]
    each_class = [f"probability of {name}" for name in ("apple", "leaf", "sky")]
    assert list(rows[0]) == columns + each_class
    with monkeypatch.context() as patch:
        patch.setattr(train, "EACH", 2)  # more classes than this get no columns
        run("--dataset", photos, *command, "--name", "b")
    plain = read_predictions(tmp_path / "runs/b/predictions.csv")
    assert plain == [{name: row[name] for name in columns} for row in rows]
    listed = json.loads((folder / "split.json").read_text())
    for part in ("val", "test"):
        of_part = [row for row in rows if row["split"] == part]
        assert [row["file"] for row in of_part] == listed[part]
        assert all(row["label"] == row["file"].split("/")[0] for row in of_part)
        right = sum(row["label"] == row["prediction"] for row in of_part)
        result = json.loads((folder / "result.json").read_text())
        assert result[f"{part}_accuracy"] == pytest.approx(100 * right / len(of_part))
    tested = [row for row in rows if row["split"] == "test"]
    worst = []
    for name in ("apple", "leaf", "sky"):
        hits = [row["label"] == row["prediction"] for row in tested if row["label"] == name]
        if not all(hits):
            worst.append((sum(hits) / len(hits), f"{name} ({sum(hits)}/{len(hits)} right)"))
    stated = re.findall("^worst    (.*)$", out, re.M)
    assert stated == [", ".join(text for _, text in sorted(worst))]
    torch.manual_seed(0)
    model = train.load_run(folder)
    number = torch.rand(1)
    assert torch.equal(number, torch.rand(1, generator=torch.Generator().manual_seed(0)))
    _, probabilities = model.predict([photos / row["file"] for row in tested])
    for row, each in zip(tested, probabilities, strict=True):
        best, second = each.topk(2).indices.tolist()
        assert (row["prediction"], row["runner-up"]) == (model.classes[best], model.classes[second])
        assert float(row["probability"]) == pytest.approx(float(each[best]), abs=1e-3)
        stated_each = [float(row[f"probability of {name}"]) for name in model.classes]
        assert stated_each == pytest.approx(each.tolist(), abs=1e-3)
    before = (folder / "predictions.csv").read_bytes()
    (folder / "predictions.csv").unlink()
    assert stated == re.findall("^worst    (.*)$", run("--eval", "runs/a"), re.M)
    assert (folder / "predictions.csv").read_bytes() == before
    if HAS_MATPLOTLIB:
        assert (folder / "mistakes.png").read_bytes().startswith(b"\x89PNG")


def test_another_folder_is_tested_whole(run, photos, tiny_weights, tmp_path):
    """--eval --dataset OTHER tests every photo that the run wasn't trained or chosen on. Classes
    are matched by name, and some may be missing."""
    from PIL import Image

    run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"))
    for name, count in (("sky", 5), ("apple", 4)):
        (tmp_path / "other" / name).mkdir(parents=True)
        for i in range(count):
            colour = (40 * i, 20, 250 - 30 * i)
            Image.new("RGB", (24, 24), colour).save(tmp_path / f"other/{name}/{i}.png")
    trained_on = json.loads((tmp_path / "runs/a/split.json").read_text())["train"][0]
    shutil.copy(photos / trained_on, tmp_path / "other/sky/copy.png")
    out = run("--eval", "runs/a", "--dataset", "other")
    assert "split    left out: 1 image that the run was trained or chosen on\n" in out
    assert "other: 0 train / 0 val / 9 test" in out
    assert "(another folder, 9 images)" in out
    assert "recipe" not in out
    shutil.copytree(tmp_path / "other", tmp_path / "elsewhere/other")
    run("--eval", "runs/a", "--dataset", "elsewhere/other")
    (tmp_path / "elsewhere/other/sky/0.png").unlink()  # read anew in the same process
    again = run("--eval", "runs/a", "--dataset", "elsewhere/other")
    assert "(another folder, 8 images)" in again
    tables = sorted((tmp_path / "runs/a").glob("predictions-other-*.csv"), key=os.path.getmtime)
    assert len(tables) == 2  # of two folders with one name
    table = tables[0]
    rows = read_predictions(table)
    assert sorted(row["label"] for row in rows) == ["apple"] * 4 + ["sky"] * 5
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert stated_test(out) == [f"{100 * right / 9:.2f}"]
    # The same name isn't the same photo.
    listed = json.loads((tmp_path / "runs/a/split.json").read_text())
    for name in (listed["train"][1], listed["test"][0]):
        (tmp_path / "other" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (24, 24), (9, 99, 199)).save(tmp_path / "other" / name)
    train.read_dataset.cache_clear()
    assert "other: 0 train / 0 val / 11 test" in run("--eval", "runs/a", "--dataset", "other")
    for file in (tmp_path / "other").rglob("*.png"):
        shutil.copy(photos / trained_on, file)
    train.read_dataset.cache_clear()
    error = run("--eval", "runs/a", "--dataset", "other", status=1)
    assert error == "error: other has only images that the run was trained on\n"


def test_labelling_that_is_stopped(run, photos, tiny_weights, tmp_path, monkeypatch, capsys):
    """Ctrl-C leaves the labels so far in the table, and says how many they are."""
    run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"))
    plain = train.Classifier.preprocess
    calls = itertools.count()

    def preprocess(model, photo):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return plain(model, photo)

    monkeypatch.setattr(data, "usable_cpus", lambda: 1)
    monkeypatch.setattr(train.Classifier, "preprocess", preprocess)
    assert train.main(["--predict", "runs/a", str(photos), "--csv", "out.csv"]) == 130
    assert "saved    out.csv (3 of 60 photos labelled)\n" in capsys.readouterr().err
    assert len(read_predictions(tmp_path / "out.csv")) == 3
    calls = itertools.count(3)  # stopped at once: the earlier table stays
    assert train.main(["--predict", "runs/a", str(photos), "--csv", "out.csv"]) == 130
    assert "saved" not in capsys.readouterr().err
    assert len(read_predictions(tmp_path / "out.csv")) == 3


def test_photos_are_labelled_in_their_order(run, photos, tiny_weights, tmp_path, monkeypatch):
    """Several photos are decoded at once and labelled as a batch: the rows are in the order of the
    photos, those that can't be read among them, and the same as for each photo alone."""
    run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"))
    files = sorted(photos.rglob("*.png"))[::7]
    for i in (0, 4, 5):
        files[i].write_bytes(b"no photo")
    tables = {}
    for cpus in (1, 3):
        monkeypatch.setattr(data, "usable_cpus", lambda cpus=cpus: cpus)
        assert train.main(["--predict", "runs/a", *map(str, files), "--csv", "out.csv"]) == 1
        tables[cpus] = read_predictions(tmp_path / "out.csv")
    assert [row["file"] for row in tables[3]] == list(map(str, files))
    assert [i for i, row in enumerate(tables[3]) if not row["prediction"]] == [0, 4, 5]
    for alone, together in zip(tables[1], tables[3], strict=True):
        assert alone["prediction"] == together["prediction"]
        if alone["prediction"]:
            assert float(alone["probability"]) == pytest.approx(
                float(together["probability"]), abs=2e-4
            )
    model = train.load_run("runs/a")
    readable = [file for i, file in enumerate(files) if i not in (0, 4, 5)]
    labels, probabilities = model.predict(readable)
    assert labels == [row["prediction"] for row in tables[3] if row["prediction"]]
    assert len({f"{value:.3f}" for value in probabilities[:, 0].tolist()}) > 3  # they differ


@pytest.mark.usefixtures("pictures")
def test_what_the_network_sees_is_stated(run, photos, tiny_weights, monkeypatch):
    """A run on photos says which part of them the network sees, and mistakes.png shows that."""
    axes = pytest.importorskip("matplotlib.axes")
    for i in range(12):  # labels that say nothing, for mistakes
        (photos / f"leaf/{i:02}.png").rename(photos / f"sky/leaf{i:02}.png")
    shown = []
    monkeypatch.setattr(axes.Axes, "imshow", lambda self, pixels: shown.append(pixels.shape))
    out = run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1))
    pattern = r"^view     .* photo, (\d+) x (\d+) pixels, .* the middle (\d+) x (\d+) \((\d+) %\)"
    found = re.search(pattern, out, re.M)
    width, height, side, again, share = map(int, found.groups())
    assert width == 40
    assert height in range(30, 50)
    assert side == again == round(0.875 * min(width, height))
    assert share == round(100 * side**2 / (width * height))
    assert "; with --squash all of it\n" in out
    assert "subfolders" not in out
    size = TINY["image_size"]
    assert set(shown) == {(size, size, 3)}
    out = run("--eval", "runs/photos-adaptertune-r8-s0")
    assert re.search(r"^view     .* the middle .* \(\d+ %\)$", out, re.M)  # it takes no --squash

    out = run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1), "--squash")
    assert "evaluation and labelling see all, squashed to a square\n" in out
    assert "saved    runs/photos-adaptertune-r8-squashed-s0/adapters.safetensors" in out


def test_a_run_without_center(run, tiny_weights):
    """A run's file says which part of a photo the network sees; one that doesn't is refused."""
    run(*quick(tiny_weights, "--epochs", 1, "--name", "a"))
    path = Path("runs/a/adapters.safetensors")
    tensors, meta = adaptertune.read(path)
    assert meta["center"] == 1
    del meta["center"]
    save_file(tensors, path, {"adaptertune": json.dumps(meta)})
    with pytest.raises(ValueError, match="is damaged: its metadata lack center"):
        train.load_run("runs/a")


def test_what_would_mislead_is_noted(run, photos, tiny_weights, capsys):
    """Notes on a class with few test images, on subfolders in train and in test, and on a network
    that knows one class only; a run can be evaluated on new photos of a single class."""
    for path in (photos / "leaf").glob("*[1-9].png"):
        path.unlink()  # two of 20 are left
    for path in (photos / "sky").iterdir():
        (photos / "sky" / f"part{path.stem[1]}").mkdir(exist_ok=True)
        path.rename(photos / f"sky/part{path.stem[1]}" / path.name)
    for i in range(3):
        shutil.copy(photos / f"apple/0{i}.png", photos / f"leaf/apple{i}.png")
    options = ["--limit", 0, "--epochs", 1, "--lr", 1e-9, "--head-lr", 1e-9, "--name", "a"]
    command = ["--dataset", photos, *quick(tiny_weights), *options, "--test-share", 0.5]
    out = run(*command)
    few = re.search(
        r"^note     (\d+) test images? of leaf: each is ([\d.]+) points of the", out, re.M
    )
    assert float(few[2]) == pytest.approx(100 / (3 * int(few[1])), rel=1e-2)
    split = json.loads(Path("runs/a/split.json").read_text())
    parts = [{Path(name).parent for name in split[part]} for part in ("train", "test")]
    shared = {str(folder) for folder in parts[0] & parts[1] if folder.name.startswith("part")}
    noted = f"note     photos of {len(shared)} subfolders, such as {min(shared)}, are in train"
    assert noted in out
    worst = re.search("^worst    (.*)$", out, re.M)[1]
    assert worst.count(" right)") == 3  # all classes, since they are uneven
    smallest = r"as a mean over classes, of which the smallest has (\d+) images?\)"
    assert re.search(smallest, Path("runs/a/README.md").read_text())[1] == few[1]

    alone = photos.with_name("alone")
    shutil.copytree(photos / "apple", alone / "apple")
    (alone / "apple/00.png").rename(alone / "apple/renamed.png")
    with (alone / "apple/renamed.png").open("ab") as file:
        file.write(b"changed")
    assert re.search(
        r"\(another folder, \d+ images?\)", run("--eval", "runs/a", "--dataset", alone)
    )
    shutil.copytree(photos, alone.with_name("above") / "inner")
    error = run("--eval", "runs/a", "--dataset", alone.with_name("above"), status=1)
    assert re.search("it has inner, which the run doesn't know.*; do you mean .*above/inner", error)
    opened = train.open_run(train.options_of("runs/a"))
    train.predict_all(opened)
    for label in (0, 2):
        found = opened.predictions["test"]
        found.best = torch.full_like(found.best, label)
        train.report_test(opened, "")
        name = opened.dataset.classes[label]
        assert f"warning  each test image is taken for {name}\n" in capsys.readouterr().out
        found.best[0] = 1
        train.report_test(opened, "")
        assert "warning" not in capsys.readouterr().out
    error = run(*quick(tiny_weights, "--dataset", alone), status=1)
    assert "at least 2 class folders are needed" in error


def test_photos_are_labelled(run, photos, tiny_weights, tmp_path, capsys):
    """--predict labels files and folders as the run's own test did, even without its data set; a
    bad photo is reported and skipped."""
    run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"))
    expected = {}
    for row in read_predictions(tmp_path / "runs/a/predictions.csv"):
        expected[Path(row["file"]).name, row["label"]] = row["prediction"]
    elsewhere = Path(shutil.move(photos, tmp_path / "elsewhere"))
    (tmp_path / "runs/a/state.pt").touch()  # as if it were getting more epochs
    (elsewhere / "apple/broken.png").write_bytes(b"no photo")
    (elsewhere / "apple/notes.txt").write_text("no photo either")
    capsys.readouterr()
    command = ["--predict", "runs/a", str(elsewhere), "gone.jpg", "--csv", "out.csv"]
    assert train.main(command) == 1  # since some weren't read
    out, err = capsys.readouterr()
    skipped = [line for line in err.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 3
    assert re.fullmatch("skipped  1 file, not photos, such as .*notes.txt", skipped[0])
    assert "broken.png" in skipped[1]
    assert skipped[2] == "skipped  no photo at gone.jpg"
    assert err.endswith("saved    out.csv (60 of 62 photos labelled)\n")
    rows = read_predictions(tmp_path / "out.csv")
    assert len(rows) == 62
    empty = [row for row in rows if not any(list(row.values())[1:])]
    assert [Path(row["file"]).name for row in empty] == ["broken.png", "gone.jpg"]
    rows = [row for row in rows if row not in empty]
    assert len(rows) == len(out.splitlines()) == 60
    for row in rows:
        each = {name: float(row[f"probability of {name}"]) for name in ("apple", "leaf", "sky")}
        assert sum(each.values()) == pytest.approx(1, abs=2e-4)
        assert each[row["prediction"]] == max(each.values()) == float(row["probability"])
    known = 0
    for row, line in zip(rows, out.splitlines(), strict=True):
        file = Path(row["file"])
        percent = f"{100 * float(row['probability']):.0f}"
        assert line.startswith(f"{file}  {row['prediction']} ")
        assert abs(float(re.search(r" ([\d.]+) %", line)[1]) - float(percent)) <= 1
        if (file.name, file.parent.name) in expected:
            assert row["prediction"] == expected[file.name, file.parent.name]
            known += 1
    assert known == 17
    assert train.main(["--predict", "runs/a", "gone.jpg"]) == 1
    capsys.readouterr()
    for command, message in (
        (["--predict", "runs/a"], "give photos or folders to label"),
        (["--predict", "gone.jpg", "other.jpg"], "no finished run there; give runs/NAME first"),
        (["--predict", "a", "other.jpg"], "no finished run there (do you mean runs/a?); give"),
        (["--predict", "runs/a/config.json", "x.jpg"], "there (do you mean runs/a?); give"),
        (["--predict", "runs/a", "x.jpg", "--csv", "runs/a/README.md"], "is no table of labels"),
        (["--predict", "runs/a", "x.jpg", "--eval", "runs/a"], "exclude each other; give one"),
        (["--predict", "runs/a", "x.jpg", "--csv", "nowhere/x.csv"], "in a folder that exists"),
        (["--predict", "runs/a", "x.jpg", "--csv", "runs"], "give a file in a folder that exists"),
        (["--csv", "x.csv"], "--csv is for --predict"),
        (["--eval", "runs/a", "--resume"], "--resume is for training"),
        (["--predict", "runs/a", "x.jpg", "--name", "b"], "--name is for training; --eval"),
        (["--predict", "runs/a", "x.jpg", "--plot", "features"], "--plot is for training and --ev"),
        (["--predict", "runs/a", "x.jpg", "--dataset", "x"], "--dataset is for training and --ev"),
    ):
        assert message in run(*command, status=2)


def test_the_model_cards_commands_run(run, photos, tiny_weights, tmp_path):
    """A run's README.md describes it in the hub's form, and its commands and Python code run."""
    name = 'a "b"'
    command = quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", name)
    out = run("--dataset", photos, *command)
    card = (tmp_path / "runs" / name / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    stated = dict(line.split(": ", 1) for line in front.splitlines())
    assert json.loads(stated["pipeline_tag"]) == "image-classification"
    assert json.loads(stated["metrics"]) == ["accuracy"]
    assert "datasets" not in stated  # the hub has no "photos"
    (accuracy,) = stated_test(out)
    assert f"{accuracy} % of 12 test images are right" in text
    assert "3 classes: `apple`, `leaf`, `sky`." in text
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "photo.jpg")
    shutil.rmtree(photos)
    commands = re.search("```bash\n(.*?)```", text, re.S)[1].splitlines()
    assert len(commands) == 2
    for line in commands:
        _, script, *arguments = shlex.split(line)
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / name / "model.onnx").exists()
    code = re.search("```python\n(.*?)```", text, re.S)[1]
    found = {}
    exec(code, found)
    assert found["labels"][0] in ("apple", "leaf", "sky")
    assert found["probabilities"].shape == (1, 3)


def test_classes_of_unlike_sizes(run, photos, tiny_weights, tmp_path):
    """Uneven class sizes are printed, and accuracy is also given as a mean over classes."""
    for file in sorted((photos / "sky").iterdir())[5:]:
        file.unlink()
    train.read_dataset.cache_clear()
    command = ["--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 2)]
    out = run(*command, "--name", "a")
    sizes = re.search(r"^classes  from (\d+) training images \(sky\) to (\d+) \(", out, re.M)
    assert int(sizes[2]) > 3 * int(sizes[1])
    assert "; --class-weights makes them count alike\n" in out
    tested = read_predictions(tmp_path / "runs/a/predictions.csv")
    shares = []
    for name in ("apple", "leaf", "sky"):
        rows = [row for row in tested if row["split"] == "test" and row["label"] == name]
        shares.append(sum(row["prediction"] == name for row in rows) / len(rows))
    mean = 100 * sum(shares) / 3
    assert f"as a mean over classes {mean:.2f} %" in out
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert result["test_class_accuracy"] == pytest.approx(mean)
    # Shots are as many of each class, but the test images aren't.
    out = run(*command, "--shots", 2, "--name", "c")
    assert "classes  from" not in out
    assert re.search(r"^test .*, as a mean over classes [\d.]+ %", out, re.M)

    # A comparison gives both accuracies.
    table = run(*command, "--method", "adaptertune", "head", "--name", "d")
    mean = json.loads((tmp_path / "runs/d-head/result.json").read_text())["test_class_accuracy"]
    assert re.search(r"^ +trained +test % +class mean % +val %", table, re.M)
    assert re.search(rf"^head +[\d,]+ +[\d.]+ +{mean:.2f} ", table, re.M)
    assert f"{mean}" in (tmp_path / "runs/d-comparison.csv").read_text()

    weighted = run(*command, "--class-weights", "--name", "b")
    assert "weighted by the inverse of their sizes\n" in weighted
    assert read_table(tmp_path / "runs/a")[1][1] != read_table(tmp_path / "runs/b")[1][1]


def test_class_weights():
    """A class's losses count inversely to its size; over the training images their mean is 1."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    images = data.Images(torch.zeros(6, 1), labels)
    dataset = data.Dataset("x", ["a", "b", "c"], images, None, None)
    options = train.argparse.Namespace(class_weights=True)
    each = train.Run(options, None, dataset, None, None, torch.device("cpu"), False, {}, None)
    weights = each.class_weights
    assert torch.allclose(weights, torch.tensor([6 / 9, 1.0, 2.0]))
    assert weights[labels].mean().item() == pytest.approx(1)
    options.class_weights = False
    plain = train.Run(options, None, dataset, None, None, torch.device("cpu"), False, {}, None)
    assert torch.equal(plain.class_weights, torch.ones(3))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_finished_run_gets_more_epochs(
    run, tiny_weights, tmp_path, monkeypatch, capsys, stopped, unstopped
):
    """--resume with more --epochs starts where the run ended, with a new schedule; if it is
    stopped, it resumes to the same end."""
    command = quick(tiny_weights, "--epochs", 2, "--dropout", 0.1)
    run(*command)
    folder = tmp_path / "runs/digits-adaptertune-r8-n200-s0"
    first = read_table(folder)
    more = [str(each) for each in (*command, "--epochs", 4, "--resume")]
    if stopped:
        with monkeypatch.context() as patch:
            stop_at(patch, 4, signal.SIGINT)
            assert train.main(more) == 130
        train.stop_asked.clear()
        capsys.readouterr()
    else:
        first[2][7] = "1000.00"  # a long evaluation, which counts on
        (folder / "metrics.csv").write_text("\n".join(map(",".join, first)) + "\n")
    adapter = folder.with_name(f"{folder.name}.onnx_adapter")
    adapter.touch()
    out = run(*more)
    assert f"note     runs/{adapter.name}: of fewer epochs; export again\n" in out
    if not stopped:
        assert "more     2 epochs from the weights of epoch 2; warm-up and cosine begin" in out
    table = read_table(folder)
    assert table[:3] == first
    seconds = [float(row[7]) for row in table[1:]]  # of training and evaluation, so far
    assert seconds == sorted(seconds)
    assert "chosen on val; test read again)" in out
    assert [row[0] for row in table[1:]] == ["1", "2", "3", "4"]
    rates = [0.01 * train.schedule(step, 14) for step in (6, 13)]  # a new schedule
    assert [float(row[8]) for row in table[3:]] == pytest.approx(rates, rel=1e-2)
    result = json.loads((folder / "result.json").read_text())
    assert result["epochs"] == 4
    assert not (folder / "state.pt").exists()
    assert "kept" in run(*command, "--epochs", 4)
    assert "has epochs 4, not 2; give --resume more" in run(*command, "--resume", status=1)
    again = run(*command)  # two epochs alone are another run
    assert "with epochs 4, not 2; this one goes to runs/digits-adaptertune-r8-n200-s0-2\n" in again
    assert "-3; --resume would add epochs to it\n" in run(*command, "--epochs", 5)
    assert "would add" not in run(*command, "--epochs", 6, "--batch", 16)
    if stopped:  # undisturbed, for comparison
        tensors = load_file(folder / "adapters.safetensors")
        shutil.rmtree(folder)
        shutil.move(f"{folder}-2", folder)
        run(*more)
        undisturbed = load_file(folder / "adapters.safetensors")
        assert all(torch.equal(tensors[name], undisturbed[name]) for name in tensors)


@pytest.mark.usefixtures("pictures")
def test_a_picture_without_mistakes_goes(run, tiny_weights, tmp_path):
    """mistakes.png is removed if there are no mistakes, so it is never an earlier one."""
    pytest.importorskip("matplotlib")
    run(*quick(tiny_weights, "--epochs", 1, "--name", "a"))
    (options,) = train.parse(["--eval", "runs/a"])
    opened = train.open_run(options)
    train.predict_all(opened)
    assert (tmp_path / "runs/a/mistakes.png").exists()
    opened.predictions["test"].best = opened.predictions["test"].labels
    train.draw_mistakes(opened, tmp_path / "runs/a/mistakes.png")
    assert not (tmp_path / "runs/a/mistakes.png").exists()


def test_added_epochs_do_not_replace_better_weights(run, tiny_weights, tmp_path):
    """Epochs that are added to a run are kept only if validation is as good as before."""
    command = quick(tiny_weights, "--epochs", 3, "--name", "a")
    run(*command)
    before = load_file(tmp_path / "runs/a/adapters.safetensors")
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    path = tmp_path / "runs/a/result.json"
    path.write_text(json.dumps(result | {"val_accuracy": 100.0}))
    out = run(*command, "--epochs", 4, "--resume")
    assert f"(epoch {result['epoch']}, chosen on val" in out
    note = f"note     no added epoch is as good on val; epoch {result['epoch']} is kept\n"
    assert note in out
    after = load_file(tmp_path / "runs/a/adapters.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_run_with_fewer_epochs_is_meant(run, tiny_weights):
    """--resume with too few epochs says so, although an unfinished run has the next number."""
    command = quick(tiny_weights, "--epochs", 2)
    run(*command)
    run(*command, "--dropout", 0.2)
    folder = Path("runs/digits-adaptertune-r8-n200-s0-2")
    (folder / "state.pt").touch()
    error = run(*command, "--epochs", 1, "--resume", status=1)
    assert "n200-s0 has epochs 2, not 1; give --resume more epochs" in error

    folder.rename("runs/b")
    Path("runs/digits-adaptertune-r8-n200-s0/state.pt").touch()
    for name in (["--name", "b"], []):
        error = run(*command, *name, "--epochs", 3, "--resume", status=1)
        assert "(epochs 2, not 3); go on with its own options, or give this one another" in error


def test_more_epochs_that_were_cut_at_once(run, tiny_weights, tmp_path):
    """A run killed between config.json and its first state isn't taken for the longer run."""
    command = quick(tiny_weights, "--epochs", 2, "--name", "a")
    run(*command)
    path = tmp_path / "runs/a/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 4}))
    error = run(*command, "--epochs", 4, status=1)
    assert "runs/a holds an unfinished run; go on with --resume" in error
    with data.locked(tmp_path / "runs/a", folder=True):  # it isn't stopped, but running
        error = run(*command, "--epochs", 4, status=1)
    assert (
        error
        == "error: another process is at work in runs/a; wait for it, or give another --name\n"
    )
    run(*command, "--epochs", 4, "--resume")
    assert json.loads((tmp_path / "runs/a/result.json").read_text())["epochs"] == 4


def test_a_network_that_is_used_otherwise(run, photos, tiny_weights, tmp_path):
    """--predict refuses a backbone that is used otherwise than in training, and another backbone,
    even of another depth."""
    run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--epochs", 1, "--name", "a"))
    for more in (["--heads", 4], ["--mlp-act", "quick_gelu"], ["--mean", "0.1,0.1,0.1"]):
        error = run("--predict", "runs/a", photos, *more, status=1)
        assert "runs/a/adapters.safetensors was trained with" in error
    other = write_tiny(tmp_path / "deep.safetensors", seed=0, depth=3)
    error = run("--predict", "runs/a", photos, "--weights", other, status=1)
    assert re.search(r"the adapters were trained on tiny \(\w+\), not on deep \(\w+\)", error)


def test_config_says_when_and_with_what(run, tiny_weights, tmp_path):
    """config.json has resolved values, the date and the versions, which don't count as options."""
    run(*quick(tiny_weights, "--epochs", 1, "--name", "a"))
    saved = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert saved["amp"] in ("bf16", "off")
    assert saved["made"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", saved["made"]["date"])
    saved["made"]["torch"] = "0.1"
    (tmp_path / "runs/a/config.json").write_text(json.dumps(saved))
    assert "kept" in run(*quick(tiny_weights, "--epochs", 1, "--name", "a"))


# ----------------------------------------------------------------------------- stop and go on

STEPS = 7  # in an epoch of 200 images, 32 at a time
CHECKS = 2  # batches of its 50 validation images
EPOCH = STEPS + CHECKS  # places in an epoch where a run may stop
# Where a run of 3 epochs is stopped: the place, counted from its start or resumption, and the epoch
# and step from which it will resume.
STOPS = {
    "before the first step": [(0, 1, 0)],
    "in the first epoch": [(4, 1, 4)],
    "in the first validation": [(STEPS + 1, 1, STEPS)],
    "before the last epoch": [(2 * EPOCH, 3, 0)],
    "before the last step": [(2 * EPOCH + STEPS - 1, 3, STEPS - 1)],
    "in the last validation": [(2 * EPOCH + STEPS, 3, STEPS)],
    "in the test": [(3 * EPOCH + 1, 4, 0)],
    "in the first and in the last epoch": [(4, 1, 4), (2 * EPOCH - 4 + 2, 3, 2)],
}


def resumable(weights, name):
    arguments = quick(weights, "--dropout", 0.3, "--name", name, "--resume")
    return [str(each) for each in arguments]


@pytest.fixture(scope="module")
def whole(tiny_weights, tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train.signal, "signal", lambda number, handler: None)
        assert train.main(resumable(tiny_weights, "whole")) == 0
    return folder / "runs/whole"


def stop_at(patch, place, number):
    """Make a run send itself a signal at a place where it may stop, counted from 0."""
    plain = train.stop_if_asked
    places = itertools.count(-1)  # the first call comes before the run

    def stop_if_asked():
        if next(places) == place:
            assert signal.getsignal(number) is train.ask_stop
            signal.raise_signal(number)
        plain()

    patch.setattr(train, "stop_if_asked", stop_if_asked)


@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS)
def test_resuming_gives_bit_identical_adapters(
    stops, whole, tiny_weights, tmp_path, monkeypatch, unstopped
):
    """A stopped and resumed run leaves the same bytes and metrics as one that was never stopped."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/cut"
    for place, epoch, step in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, place, signal.SIGTERM)
            assert train.main(resumable(tiny_weights, "cut")) == 143
        train.stop_asked.clear()
        state = torch.load(folder / "state.pt", weights_only=True)
        assert state["epoch"] == epoch
        assert state["step"] == step
        assert not (folder / "adapters.safetensors").exists()
    assert train.main(resumable(tiny_weights, "cut")) == 0
    expected = (whole / "adapters.safetensors").read_bytes()
    assert (folder / "adapters.safetensors").read_bytes() == expected
    assert without_times(read_table(folder)) == without_times(read_table(whole))
    assert not (folder / "state.pt").exists()


class Counting(adaptertune.Adapter):
    """An adapter with a buffer: the number of its calls in training."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += self.training
        return super().forward(x)


def test_buffers_of_a_method_of_ones_own(run, tiny_weights, tmp_path, monkeypatch, capsys):
    """A buffer in an adapter is kept like a weight: it goes on where a stopped run was, and is that
    of the chosen epoch, as BatchNorm's statistics have to be."""
    monkeypatch.setattr(adaptertune, "Adapter", Counting)
    margins = iter([0, 0, -200, -200])  # the second epoch is chosen at the latest
    monkeypatch.setattr(train, "standard_error", lambda *_: next(margins))
    command = quick(tiny_weights, "--name", "a", "--batch", 16)
    with monkeypatch.context() as patch:
        stop_at(patch, 2 * EPOCH + 2, signal.SIGTERM)
        assert train.main([str(each) for each in command]) == 143
    train.stop_asked.clear()
    capsys.readouterr()
    path = tmp_path / "runs/a/state.pt"
    whole = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    for name, part in (("weights", saved["weights"]), ("chosen", saved["chosen"])):
        kept = {key: each for key, each in part.items() if not key.endswith("calls")}
        torch.save(saved | {name: kept}, path)
        assert "weights are missing" in run(*command, "--resume", status=1)
        torch.save(saved | {name: part | {"blocks.0.adapter.calls": torch.zeros(2)}}, path)
        assert "or of another shape" in run(*command, "--resume", status=1)
    path.write_bytes(whole)
    run(*command, "--resume")
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert result["epoch"] < 3
    steps = math.ceil(200 / 16)
    tensors = load_file(tmp_path / "runs/a/adapters.safetensors")
    assert tensors["blocks.1.adapter.calls"] == result["epoch"] * steps
    assert "no added epoch is as good" in run(*command, "--epochs", 4, "--resume")
    tensors = load_file(tmp_path / "runs/a/adapters.safetensors")
    assert tensors["blocks.1.adapter.calls"] == result["epoch"] * steps


def test_a_damaged_state_is_refused(run, tiny_weights, tmp_path, monkeypatch, capsys):
    """A state with a flipped bit in its weights, without a part, or cut short is refused."""
    command = quick(tiny_weights, "--name", "a")
    with monkeypatch.context() as patch:
        stop_at(patch, EPOCH + 2, signal.SIGTERM)
        assert train.main([str(each) for each in command]) == 143
    train.stop_asked.clear()
    capsys.readouterr()
    path = tmp_path / "runs/a/state.pt"
    whole = path.read_bytes()

    def assert_refused():
        error = run(*command, "--resume", status=1)
        message = (
            r"error: runs/a/state.pt can't be used \(.*\); delete that folder and train again\n"
        )
        assert re.fullmatch(message, error)

    saved = torch.load(path, weights_only=True)
    weights = saved["weights"]["blocks.1.adapter.down.weight"].numpy().tobytes()
    at = whole.index(weights)
    for offset in (0, 57, len(weights) - 1):
        damaged = bytearray(whole)
        damaged[at + offset] ^= 16
        path.write_bytes(damaged)
        assert_refused()
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused()
    for gone in ("chosen_val", "fingerprint", "optimizer", "weights"):
        torch.save({key: value for key, value in saved.items() if key != gone}, path)
        assert_refused()
    for weights in ("chosen", "weights"):
        without = {key: value for key, value in saved[weights].items() if key != "head.bias"}
        torch.save(saved | {weights: without}, path)
        assert_refused()
    path.write_bytes(whole)
    assert "test  " in run(*command, "--resume")


def test_a_file_is_never_half_written(tiny_weights, tmp_path, monkeypatch, unstopped):
    """A reader that opened a file before it is rewritten reads the old content, whole."""
    monkeypatch.chdir(tmp_path)
    (options,) = train.parse([str(each) for each in quick(tiny_weights, "--name", "a")])
    prepared = train.prepare(options)
    prepared.folder.mkdir(parents=True)
    names = ("config.json", "split.json", "metrics.csv")
    for name in names:
        (prepared.folder / name).write_text("old")
    opened = [(prepared.folder / name).open() for name in names]
    train.write_records(prepared)
    for name, file in zip(names, opened, strict=True):
        with file:
            assert file.read() == "old"
        assert (prepared.folder / name).read_text() != "old"
    assert {path.name for path in prepared.folder.iterdir()} == set(names)


def test_a_second_sigterm_is_ignored(tiny_weights, tmp_path, monkeypatch, unstopped):
    """SIGTERM may come twice, as from a batch system and from torchrun: the run is still saved."""
    monkeypatch.chdir(tmp_path)
    plain = train.save_state

    def save_state(run, optimizer):
        if train.stop_asked:
            signal.raise_signal(signal.SIGTERM)
        plain(run, optimizer)

    monkeypatch.setattr(train, "save_state", save_state)
    stop_at(monkeypatch, 4, signal.SIGTERM)
    assert train.main(resumable(tiny_weights, "cut")) == 143
    assert train.stop_asked == [signal.SIGTERM, signal.SIGTERM]
    assert torch.load(tmp_path / "runs/cut/state.pt", weights_only=True)["step"] == 4


def test_numbered_runs_are_resumed(run, tiny_weights, tmp_path, monkeypatch, capsys):
    """Of two stopped runs that differ in an option which isn't in their name, --resume continues
    the one that has its options."""
    commands = [[str(each) for each in quick(tiny_weights, "--lr", rate)] for rate in (0.01, 0.02)]
    for command in commands:
        with monkeypatch.context() as patch:
            stop_at(patch, 5, signal.SIGTERM)
            assert train.main(command) == 143
        train.stop_asked.clear()
    capsys.readouterr()
    assert f"resumed  epoch 1, after 5 of {STEPS} steps\n" in run(*commands[1], "--resume")
    assert (tmp_path / "runs/digits-adaptertune-r8-n200-s0-2/result.json").exists()
    assert (tmp_path / "runs/digits-adaptertune-r8-n200-s0/state.pt").exists()
    named = [*commands[1], "--name", "digits-adaptertune-r8-n200-s0"]
    assert "s0 holds a run with other options (lr 0.01, not 0.02)" in run(*named, status=1)
    error = run(*commands[0], "--weight-decay", 0, "--resume", status=1)
    assert "s0 holds a run with other options (weight_decay 0.05 (the default), not 0.0)" in error


def test_resuming_elsewhere_is_stated(run, tiny_weights, monkeypatch, capsys):
    """--resume says that results may differ if it has another number of threads than before."""
    command = [str(each) for each in quick(tiny_weights, "--name", "a", "--amp", "off")]
    monkeypatch.setattr(data, "cpu_limit", lambda: math.inf)
    before = torch.get_num_threads()
    for place in (0, 1):
        with monkeypatch.context() as patch:
            stop_at(patch, place, signal.SIGTERM)
            assert train.main([*command, "--resume"]) == 143
        train.stop_asked.clear()
        assert "note     stopped on" not in capsys.readouterr().out
    try:
        torch.set_num_threads(before + 1)
        out = run(*command, "--resume")
    finally:
        torch.set_num_threads(before)
    threads = "1 thread" if before == 1 else f"{before} threads"
    where = f"torch {torch.__version__} · cpu {threads} · fp32"
    assert f"note     stopped on {where}; results may differ a little" in out


@pytest.mark.usefixtures("unstopped")
@pytest.mark.parametrize("place", ["write_predictions", "conclude"])
@pytest.mark.parametrize("trains", [True, False])
def test_a_run_killed_amid_its_report_finishes(
    place, trains, tiny_weights, clip, tmp_path, monkeypatch, capsys
):
    """A run killed before it was reported still has state.pt and resumes to the same adapters,
    even if it trains nothing."""
    monkeypatch.chdir(tmp_path)
    command = [str(each) for each in quick(tiny_weights, "--name", "a")]
    if not trains:
        command = ["--weights", str(clip), "--method", "zero-shot", "--name", "a"]

    def killed(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(train, place, killed)
        with pytest.raises(SystemExit):
            train.main(command)
    assert train.main(command) == 1
    assert "unfinished run; go on with --resume" in capsys.readouterr().err
    first = (tmp_path / "runs/a/adapters.safetensors").read_bytes()
    assert train.main([*command, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "test     " in out
    assert "resumed  after the last epoch\n" in out
    assert (tmp_path / "runs/a/adapters.safetensors").read_bytes() == first
    assert (tmp_path / "runs/a/predictions.csv").exists()
    assert not (tmp_path / "runs/a/state.pt").exists()


def test_resume_on_another_backbone(run, tiny_weights, tmp_path, monkeypatch, capsys):
    """A stopped run whose --weights were replaced is refused with both fingerprints."""
    weights = shutil.copy(tiny_weights, tmp_path / "mine.safetensors")
    command = quick(weights, "--name", "a")
    with monkeypatch.context() as patch:
        stop_at(patch, 9, signal.SIGTERM)
        assert train.main([str(each) for each in command]) == 143
    train.stop_asked.clear()
    capsys.readouterr()
    write_tiny(weights, seed=1)
    error = run(*command, "--resume", status=1)
    message = r"trained on another backbone \([0-9a-f]{16}\) than \S+mine.safetensors is \("
    assert re.search(message, error)


def test_a_resumed_run_shows_the_rows_before(
    tiny_weights, tmp_path, monkeypatch, unstopped, capsys
):
    """The table of a resumed run has the rows of all its epochs, as metrics.csv has them."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 2 * EPOCH + 3, signal.SIGINT)
        assert train.main(resumable(tiny_weights, "cut")) == 130
    train.stop_asked.clear()
    before = printed_rows(capsys.readouterr().out)
    assert train.main(resumable(tiny_weights, "cut")) == 0
    rows = printed_rows(capsys.readouterr().out)
    assert rows == [row[:7] for row in read_table(tmp_path / "runs/cut")]
    assert rows[:3] == before


def test_a_second_ctrl_c_in_a_notebook(tiny_weights, tmp_path, monkeypatch, unstopped, whole):
    """The second one doesn't wait for the step, and a half-done step isn't saved: the run goes on
    from its last whole epoch. Python, and so the notebook, isn't ended."""
    monkeypatch.chdir(tmp_path)
    plain = train.take_step
    steps = itertools.count()

    def take_step(*arguments):
        if next(steps) == EPOCH + 2:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is handler  # in a program the kernel's
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", take_step)
        assert train.main(resumable(tiny_weights, "cut")) == 130
    assert signal.getsignal(signal.SIGINT) is handler is signal.default_int_handler
    state = torch.load(tmp_path / "runs/cut/state.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (2, 0)
    train.stop_asked.clear()
    assert train.main(resumable(tiny_weights, "cut")) == 0
    expected = (whole / "adapters.safetensors").read_bytes()
    assert (tmp_path / "runs/cut/adapters.safetensors").read_bytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", ["train.py", "export.py", "assets/device/label.py"])
def test_signals_of_a_containers_first_process(program, number):
    """The kernel doesn't apply default handlers to process 1, so the programs have some from the
    start, before they import torch or onnxruntime."""
    unshare = ["unshare", "--fork", "--pid"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs unshare and the right to use it")
    command = [*unshare, sys.executable, str(ROOT / program), "--help"]
    outer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    ready = False
    for _ in range(2000):  # until Python handles signals
        time.sleep(0.002)
        for child in children.read_text().split():
            caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{child}/status").read_text())
            ready = bool(int(caught[1], 16) >> (number - 1) & 1)
        if ready and number == signal.SIGTERM:
            break
        if ready and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:  # Python handles SIGINT itself
            break
    assert ready
    loaded = Path(f"/proc/{child}/maps").read_text()
    assert "libtorch" not in loaded and "onnxruntime" not in loaded  # noqa: PT018
    os.kill(int(child), number)
    assert outer.wait(20) == 128 + number


def test_arguments_of_main(monkeypatch):
    """In code, arguments may be numbers and paths; one text is refused."""
    assert train.as_texts(["--epochs", 1, Path("a")]) == ["--epochs", "1", "a"]
    assert train.as_texts(None) is None
    with pytest.raises(ValueError, match=r"a list of arguments, such as \['--epochs', '1'\]"):
        train.main("--epochs 1")
    parsed = []
    monkeypatch.setattr(train, "run_command", lambda grid: parsed.extend(grid) or 0)
    assert train.main(["--epochs", 1, "--name", Path("a")]) == 0
    assert (parsed[0].epochs, parsed[0].name) == (1, "a")


def test_lines_are_printed_at_once(monkeypatch):
    """Without a terminal too, so that the log of a killed run isn't empty."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    seen = []

    def work():
        print("a line")
        seen.append(written.getvalue())
        return 0

    assert train.run_program(work, str) == 0
    assert seen == [b"a line\n"]


def test_threads_in_a_container(monkeypatch):
    """A CPU limit below the number of threads lowers it, unless OMP_NUM_THREADS states a number."""
    monkeypatch.setattr(data, "cpu_limit", lambda: 1.5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert train.run_program(torch.get_num_threads, str) == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert train.run_program(torch.get_num_threads, str) == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_folder_for_runs_is_kept(run, tmp_path):
    """A failed run removes the folders that it made, and no others."""
    (tmp_path / "runs").mkdir(mode=0o770)
    run("--dataset", "nowhere", status=1)
    assert (tmp_path / "runs").is_dir()
    (tmp_path / "runs").rmdir()
    run("--dataset", "nowhere", status=1)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_that_is_read_only(run, tiny_weights, tmp_path, monkeypatch):
    """The same command succeeds where nothing can be written; another one fails before training."""
    command = quick(tiny_weights, "--name", "a", "--epochs", 1)
    run(*command)

    def refuse(folder, instead=""):
        raise ValueError("can't write")

    monkeypatch.setattr(train, "check_writable", refuse)
    assert "kept     runs/a" in run(*command)
    (tmp_path / "runs/b").mkdir()
    monkeypatch.setattr(train, "prepare", None)  # it isn't called
    assert run(*command, "--name", "b", status=1) == "error: can't write\n"


def test_ctrl_c_in_a_notebook(monkeypatch, capsys):
    """In a notebook, the command to resume has main's arguments, not those of the process."""

    def stop(grid):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_command", stop)
    assert train.main(["--name", "two words"]) == 130
    go_on = "stopped; to go on: python train.py --name 'two words' --resume\n"
    assert go_on in capsys.readouterr().err


def test_a_process_that_waits_in_vain_can_be_stopped(tmp_path):
    """SIGTERM ends a process whose others never come, though it waits within torch."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    alone = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "train.py"), "--limit", "40"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | alone) as process:
        for _ in range(600):
            with socket.socket() as connection:
                if not connection.connect_ex(("127.0.0.1", port)):
                    break  # it listens for the other one
            time.sleep(0.1)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM


def test_runs_that_processes_do_not_share(tiny_weights, tmp_path, monkeypatch):
    """A process without the run's folder that others have is refused, before they wait for it."""
    monkeypatch.chdir(tmp_path)
    options, *_ = train.parse([str(each) for each in quick(tiny_weights)])
    monkeypatch.setattr(train, "any_process", lambda value: True)  # some other process has it
    with pytest.raises(ValueError, match="isn't the same for all processes; let them share runs/"):
        train.prepare(options)


def test_parts_and_memory(monkeypatch):
    """A batch has no more parts than images. Where the kernel doesn't state the peak, it is 0."""
    model = vit.ViT(vit.Config(width=32, depth=1, heads=2, patch=4, image_size=512))
    assert train.count_parts(model, torch.zeros(2, 3, 512, 512)) == 2
    monkeypatch.setattr(train.Path, "read_text", lambda self: "VmRSS:  1 kB")
    assert train.peak_memory(torch.device("cpu")) == 0.0


def test_main_in_a_thread(tiny_weights, tmp_path, monkeypatch):
    """A program's thread can train, though it can't set signal handlers."""
    monkeypatch.chdir(tmp_path)
    command = [str(each) for each in quick(tiny_weights, "--epochs", 1, "--name", "a")]
    status = []
    thread = threading.Thread(target=lambda: status.append(train.main(command)))
    thread.start()
    thread.join()
    assert status == [0]


def test_a_folder_with_other_files(run, tiny_weights, tmp_path):
    """A folder that holds no run, but somebody's README.md, isn't written to."""
    folder = tmp_path / "runs/mine"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("notes")
    (folder / "notes.txt").touch()
    error = run(*quick(tiny_weights, "--name", "mine"), status=1)
    assert "runs/mine holds no run, but a file that a run writes: move README.md, or" in error
    assert (folder / "README.md").read_text() == "notes"
    (folder / "README.md").rename(folder / "about.txt")
    run(*quick(tiny_weights, "--name", "mine", "--epochs", 1))


@pytest.mark.usefixtures("pictures")
def test_settings_of_matplotlib(run, tiny_weights, monkeypatch):
    """The user's settings have no effect on pictures, and stay. A matplotlib that can't be imported
    costs the pictures only."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # LaTeX isn't installed
    out = run(*quick(tiny_weights, "--name", "a", "--epochs", 1))
    assert "saved    runs/a/curves.svg" in out
    assert matplotlib.rcParams["text.usetex"]
    assert matplotlib.rcParams["text.parse_math"]

    code = "import train, pathlib; print(train.can_draw(pathlib.Path('a.svg')))"
    environment = os.environ | {"MPLBACKEND": "none", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "pictures a.svg left out; matplotlib can't be used (" in done.stdout, done.stderr
    assert done.stdout.endswith("\nFalse\n")


def test_development_mode_shows_where_an_error_is(tmp_path):
    """An error is one line, in Python's development mode a traceback."""
    arguments = [str(ROOT / "train.py"), "--dataset", "nowhere"]
    for options, traceback in ([], False), (["-X", "dev"], True):
        command = [sys.executable, *options, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert ("in check_name" in done.stderr) == traceback, done.stderr
        assert "no data set or folder 'nowhere'" in done.stderr


def test_a_backbone_of_ones_own(run, tiny_weights, monkeypatch):
    """A row in BACKBONES without a repository takes its file from --weights, and says so."""
    _, backbone = vit.load(tiny_weights)
    own = vit.Backbone("", backbone.config, license="MIT")
    monkeypatch.setitem(vit.BACKBONES, "own", own)
    command = ["--backbone", "own", "--epochs", 1, "--limit", 50]
    error = run(*command, status=1)
    assert error == "error: --backbone own isn't published on the hub; give its --weights FILE\n"
    assert "backbone own 16px" in run(*command, "--weights", tiny_weights)
    (line,) = [line for line in vit.list_backbones() if line.startswith("own ")]
    assert line.split()[-2:] == ["MIT", "-"]
    with pytest.raises(ValueError, match=r'give its file too: vit.load\(FILE, name="own"\)'):
        vit.load("own")


def test_ctrl_c_stops_a_process(run, tiny_weights, tmp_path):
    """Ctrl-C ends a process with status 130 and the command to resume."""
    arguments = quick(tiny_weights, "--epochs", 40, "--name", "cut")
    command = [sys.executable, "-u", str(ROOT / "train.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        for line in process.stdout:
            if line.startswith("     1 "):  # the first epoch is done
                process.send_signal(signal.SIGINT)
                break
        rest, error = process.communicate(timeout=60)
    assert process.returncode == 130, rest + error
    go_on = r"stopped; to go on: python \S+train\.py --weights .* --name cut --resume\n"
    assert re.search(go_on, error)
    assert "Traceback" not in error
    assert (tmp_path / "runs/cut/state.pt").exists()

    assert "unfinished run; go on with --resume" in run(*arguments, status=1)
    different = run(*arguments, "--resume", "--rank", 4, status=1)
    assert "holds a run with other options" in different
    unfinished = run("--eval", "runs/cut", status=1)
    assert unfinished == "error: runs/cut holds an unfinished run; continue it with --resume\n"


# ------------------------------------------------------------------------------ several processes


def torchrun(arguments, folder):
    """Start two processes that train together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(ROOT / "train.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def in_pairs(weights, name, *more):
    """Options for 206 images in steps of 5, of which the two processes get 3 and 2; the last step
    has one image only."""
    common = ["--weights", weights, "--limit", "206", "--batch", "5", "--amp", "off"]
    return [*common, "--name", name, *more]


def test_two_processes_train_what_one_does(run, tiny_weights, tmp_path):
    """Half of each batch in each process gives one process's adapters and metrics, printed once."""
    run(*in_pairs(tiny_weights, "one", "--epochs", "2"))
    with torchrun(in_pairs(tiny_weights, "two", "--epochs", "2"), tmp_path) as pair:
        out, error = pair.communicate(timeout=120)
    assert pair.returncode == 0, error
    assert "2 processes, each cpu" in out
    assert out.count("\ntest ") == 1
    one, _ = adaptertune.read(tmp_path / "runs/one/adapters.safetensors")
    two, _ = adaptertune.read(tmp_path / "runs/two/adapters.safetensors")
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=0, atol=1e-5), name
    folders = tmp_path / "runs/one", tmp_path / "runs/two"
    assert without_times(read_table(folders[0])) == without_times(read_table(folders[1]))
    rows = [read_predictions(folder / "predictions.csv") for folder in folders]
    assert len(rows[0]) > 359
    for ours, theirs in zip(*rows, strict=True):
        for column in ("file", "label", "prediction", "runner-up"):
            assert ours[column] == theirs[column]


def test_two_processes_that_are_stopped_or_killed(tiny_weights, tmp_path):
    """A signal leaves a state to resume from. If one process is killed, the other reports it."""
    arguments = in_pairs(tiny_weights, "cut", "--epochs", "400")
    with torchrun(arguments, tmp_path) as pair:
        for line in pair.stdout:
            if re.match(r" +\d+ ", line):
                pair.send_signal(signal.SIGTERM)
                break
        _, error = pair.communicate(timeout=120)
    assert "stopped; to go on: torchrun --nproc-per-node 2 " in error
    assert error.count("stopped; to go on") == 1
    state = torch.load(tmp_path / "runs/cut/state.pt", weights_only=True)
    assert (state["epoch"], state["step"]) > (1, 0)

    with torchrun([*arguments, "--resume"], tmp_path) as pair:
        for line in pair.stdout:
            if re.match(r" +\d+ ", line):
                children = Path(f"/proc/{pair.pid}/task/{pair.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
                break
        _, error = pair.communicate(timeout=120)
    assert pair.returncode == 1
    assert "error: another process ended" in error


def test_more_processes_than_gpus(monkeypatch):
    """Each process needs its own GPU; the error says how many there are."""
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="aren't set; start the processes with torchrun"):
        train.choose_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="2 processes want a GPU each, and there are 1; start as"):
        train.choose_device("cuda")


def test_cached_features_want_one_process(run, tiny_weights, monkeypatch):
    """Cached features are refused under torchrun, which would only repeat their computation."""
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "any_process", bool)
    error = run(*quick(tiny_weights, "--method", "head", "--cached"), status=1)
    assert "head trains on cached features: one process, not torchrun" in error


def test_evaluation_wants_one_process(run, tiny_weights, monkeypatch):
    """--eval under torchrun is refused: every process would add all images to the sums."""
    run(*quick(tiny_weights, "--epochs", 1, "--name", "a"))
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    error = run("--eval", "runs/a", status=1)
    assert error == "error: --eval and --predict are for one process, not torchrun\n"


# ---------------------------------------------------------------------------- optional packages


@pytest.mark.usefixtures("pictures")
def test_curves(run, tiny_weights, tmp_path):
    """If matplotlib is installed, a run draws its loss and accuracy."""
    pytest.importorskip("matplotlib")
    out = run(*quick(tiny_weights, "--name", "a"))
    assert "saved    runs/a/curves.svg\n" in out
    assert "left out" not in out
    picture = tmp_path / "runs/a/curves.svg"
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    text = picture.read_text()
    for title in ("training loss", "accuracy in %", "train", "val", "chosen"):
        assert f"<!-- {title} -->" in text


def test_without_matplotlib(run, tiny_weights, tmp_path, monkeypatch):
    """Without matplotlib, a run ends well, says once what is left out, and writes no picture."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = run(*quick(tiny_weights, "--name", "a"))
    left_out = (
        "pictures runs/a/curves.svg, runs/a/mistakes.png left out; to have them in later runs"
    )
    assert re.findall("^pictures.*", out, re.M) == [f"{left_out}: pip install matplotlib"]
    assert out.count("matplotlib") == 1
    assert out.endswith(f"next     python {EXPORT} runs/a\n")
    names = {"adapters.safetensors", "metrics.csv", "config.json", "result.json", "split.json"}
    names |= {"predictions.csv", "README.md"}
    assert {path.name for path in (tmp_path / "runs/a").iterdir()} == names


def test_a_process_without_pillow_and_matplotlib(tiny_weights, tmp_path):
    """train.py starts and trains on digits without Pillow and matplotlib."""
    hidden = tmp_path / "hidden"
    for package in ("PIL", "matplotlib"):
        (hidden / package).mkdir(parents=True)
        (hidden / package / "__init__.py").write_text("raise ImportError('hidden')")
    arguments = map(str, quick(tiny_weights, "--epochs", 1))
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    paths = [str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("to have them in later runs: pip install matplotlib\n") == 1
    assert list(tmp_path.rglob("*.svg")) == []


def test_without_pillow(run, tiny_weights, tmp_path, monkeypatch):
    """Without Pillow (so without matplotlib), CIFAR trains; the error for photos names Pillow."""
    for package in ("PIL", "matplotlib", "matplotlib.image"):
        monkeypatch.setitem(sys.modules, package, None)
    write_cifar10(tmp_path / "data", monkeypatch)
    run("--dataset", "cifar10", *quick(tiny_weights))
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.png").write_bytes(b"never opened")
    needed = "error: photos need Pillow to be decoded: pip install pillow\n"
    assert run("--dataset", "photos", "--weights", tiny_weights, status=1) == needed
    # It is noticed before a backbone is downloaded, and once for all photos.
    assert run("--dataset", "photos", "--offline", status=1) == needed
    (folder,) = (tmp_path / "runs").iterdir()
    photos = [tmp_path / "photos" / name / "0.png" for name in ("a", "b")]
    assert run("--predict", folder, *photos, status=1) == needed


# --------------------------------------------------------------------------------------- bad input


def foreign(folder, tiny):
    """A file of another network."""
    save_file({"layer1.weight": torch.zeros(3)}, folder / "foreign.safetensors")
    return "foreign.safetensors"


def truncated(folder, tiny):
    """A truncated file."""
    (folder / "cut.safetensors").write_bytes(tiny.read_bytes()[:5000])
    return "cut.safetensors"


def code(folder, tiny):
    """A file that would run code."""
    torch.save({"model": Evil()}, folder / "code.pth")
    return "code.pth"


def lacking(folder, tiny):
    """A file that lacks one tensor and has an unexpected one."""
    tensors = load_file(tiny)
    del tensors["norm.bias"]
    tensors["blocks.0.more"] = torch.zeros(1)
    save_file(tensors, folder / "lacking.safetensors")
    return "lacking.safetensors"


WRONG_USAGE = [
    (["--backbone", "vit_s17"], "argument --backbone: invalid choice: 'vit_s17' .*vit_s16"),
    (["--method", "tuning"], "argument --method: 'tuning': choose adaptertune, .*head.*full"),
    (["--ranks", "1,", ","], "argument --rank/--ranks: '' is not a valid int"),
    (["--method", "head,head"], "argument --method: head is given twice"),
    (["--epoch", "1"], "unrecognized arguments: --epoch 1; do you mean --epochs\\?"),
    (["--init", "ones"], "--init ones: choose zero, small or a file with adapters"),
    (["--batch", "0"], "argument --batch: 0 is not between 1 and 1,000,000,000"),
    (["--epochs", "0"], "--epochs 0 trains nothing; it is for --init-lora"),
    (["--lr", "0"], "argument --lr: 0 is not between 1e-12 and 1,000"),
    (["--min-scale", "0"], "argument --min-scale: 0 is not between 1e-06 and 1"),
    (
        ["--blocks", "first99,last3"],
        "argument --blocks: 'first99,last3' is not like 0,1,5 or first6",
    ),
    (["--blocks", "0,0"], "argument --blocks: 0 is given twice"),
    (["--method", "head", "--rank", "4"], "--rank is for adaptertune, adaptformer, clip-adapter"),
    (
        ["--method", "head", "--dropout", "0.5"],
        "--dropout is for adaptertune, adaptformer, not head",
    ),
    (["--method", "vpt", "--every", "2"], "--every is for adaptertune, adaptformer, not vpt"),
    (["--method", "full", "--blocks", "0"], "--blocks is for adaptertune, adaptformer, not full"),
    (["--method", "full", "--cached"], "--cached is for head, clip-adapter, zero-shot, not full"),
    (["--method", "head", "full", "--shallow"], "--shallow is for vpt, not full, head"),
    (["--vocab", "merges.txt"], "--vocab is for clip-adapter, zero-shot, not adaptertune"),
    (["--method", "head", "--init", "small"], "--init is for adaptertune, adaptformer, not head"),
    (["--blocks", "middle"], "argument --blocks: 'middle' is not like 0,1,5 or first6 or last6"),
    (["--epochs", "two"], "argument --epochs: 'two' is not a valid int"),
    (["--dropout", "2"], "argument --dropout: 2 is not between 0 and 1"),
    (["--scale", "nan"], "argument --scale: nan is not between -1,000,000,000 and 1,000,000,000"),
    (["--seeds", "0,0"], "argument --seeds/--seed: 0 is given twice"),
    (["--ranks", "4,8,4"], "argument --rank/--ranks: 4 is given twice"),
    (["--seeds", "0,-1"], "argument --seeds/--seed: -1 is not between 0 and"),
    (["--every", "2", "--blocks", "0"], "--every and --blocks both say .*; give one"),
    (["--limit", "50", "--shots", "2"], "--limit and --shots both choose .*; give one"),
    (["--scratch"], "--scratch starts from random weights; leave out --weights"),
    (["--unknown"], "unrecognized arguments: --unknown"),
]
REFUSED = [
    (["--eval", "runs/none"], "no run in runs/none: runs/none/config.json is missing"),
    (["--weights", "vit_s16"], "--weights takes a file; vit_s16 is the name of a --backbone"),
    (["--dataset", "cifar99"], "no data set or folder 'cifar99': choose digits, cifar10, cifar100"),
    (["--dataset", "no/such/folder"], "no data set or folder 'no/such/folder'"),
    (["--dataset", "cifar100", "--offline"], "--offline given; put the published archive"),
    (["--rank", "0"], "rank 0: choose from 1 to the backbone's width, 32"),
    (["--rank", "33"], "rank 33: choose from 1 to the backbone's width, 32"),
    (["--every", "3"], "an adapter in every 3 blocks: choose from 1 to 2"),
    (["--blocks", "first99"], "an adapter in block 2: choose from 0 to 1, or -1 to -2"),
    (["--blocks=-3"], "an adapter in block -3: choose from 0 to 1, or -1 to -2"),
    (["--blocks", "2"], "an adapter in block 2: choose from 0 to 1, or -1 to -2"),
    (["--shots", "500"], "--shots 500: '8' of digits has only 139 images to train on"),
    (["--image-size", "18"], "image size 18 is not a multiple of the patch size 4"),
    (["--device", "cuda:99"], "device 'cuda:99' can't be used here"),
    (["--weights", "none.pth"], "no weights at none.pth"),
    (["--weights", foreign], "foreign.safetensors: not a ViT in a known layout"),
    (["--weights", truncated], "cut.safetensors is damaged or cut short"),
    (["--weights", code], "code.pth holds more than tensors.*refused"),
    (["--weights", lacking, "--heads", "2"], "1 missing: norm.bias; 1 left over: blocks.0.more"),
]


def named(arguments):
    """A test's name from its arguments."""
    words = [getattr(each, "__name__", each) for each in arguments]
    return "-".join(words)


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG_USAGE, ids=[named(each) for each, _ in WRONG_USAGE]
)
def test_wrong_usage(run, tiny_weights, tmp_path, arguments, message):
    """Wrong usage gives a one-line error and status 2, and nothing is left behind."""
    error = run("--weights", tiny_weights, *arguments, status=2)
    assert re.match(f"error: {message}", error)
    assert error.endswith("; python train.py --help lists all options\n")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "message"), REFUSED, ids=[named(each) for each, _ in REFUSED]
)
def test_bad_input(run, tiny_weights, tmp_path, arguments, message):
    """Unusable input gives a one-line error and status 1, and nothing is left behind."""
    made = [each(tmp_path, tiny_weights) if callable(each) else each for each in arguments]
    before = set(tmp_path.rglob("*"))
    error = run("--weights", tiny_weights, *made, status=1)
    assert re.search(message, error)
    assert set(tmp_path.rglob("*")) == before


def test_init_from_a_run_without_adapters(run, tiny_weights):
    """--init from a run without adapters is refused; the error names the file."""
    run(*quick(tiny_weights, "--epochs", 1, "--method", "head", "--name", "a"))
    path = "runs/a/adapters.safetensors"
    error = run(*quick(tiny_weights, "--init", path, "--name", "b"), status=1)
    assert error == f"error: --init {path}: the file holds no adapters\n"


def test_output_that_nobody_reads(tiny_weights, tmp_path):
    """Closing the output early, as `| head -1` does, ends a run without an error message."""
    arguments = shlex.join(map(str, quick(tiny_weights, "--epochs", 60)))
    command = f"{sys.executable} -u {ROOT / 'train.py'} {arguments} | head -1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("env ")
    assert done.stderr == ""
    assert not list(tmp_path.rglob("result.json"))  # a run that went on would leave one


def test_a_share_of_a_test_set_that_is_there(run, photos, tiny_weights):
    """--test-share is refused for a data set with its own test set."""
    parts = photos.parent / "parts"
    shutil.copytree(photos, parts / "train")
    shutil.copytree(photos, parts / "test")
    error = run("--dataset", parts, *quick(tiny_weights, "--test-share", "0.3"), status=1)
    assert "--test-share: parts has a test set of its own" in error


def test_a_folder_named_like_a_built_in_set(run, tiny_weights, tmp_path):
    """A built-in set's name means that set, and a note says how to get the folder of that name."""
    quick_look = quick(tiny_weights, "--epochs", 1)
    line = "note     that is the built-in set; the folder of this name is ./digits\n"
    assert line not in run(*quick_look, "--name", "a")
    (tmp_path / "digits/one").mkdir(parents=True)
    assert line in run(*quick_look, "--name", "b")
    pytest.importorskip("PIL.Image")
    assert "no images in digits/one" in run("--dataset", "./digits", *quick_look, status=1)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_terminals_that_can_not_show_a_name(photos, tiny_weights, tmp_path, encoding):
    """Characters that the terminal lacks are printed as "?"; files keep the class name."""
    (photos / "leaf").rename(photos / "葉 · leaf")
    arguments = quick(tiny_weights, "--epochs", 1, "--limit", 0, "--name", "a")
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", str(photos), *arguments]
    command += ["--plot", "features"] if importlib.util.find_spec("matplotlib") else []
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    assert ("? seed 0" if encoding == "ascii" else "· seed 0") in shown
    written = json.loads((tmp_path / "runs/a/result.json").read_text(encoding="utf-8"))
    assert "葉 · leaf" in written["classes"]
    for picture in (tmp_path / "runs/a").glob("*.svg"):
        ElementTree.parse(picture)  # is well-formed UTF-8


@pytest.mark.parametrize("program", ["train.py", "export.py"])
@pytest.mark.parametrize("module", ["torch", "argparse"])
def test_ctrl_c_during_the_imports(program, module, tmp_path):
    """Ctrl-C during the imports ends the process without a traceback."""
    slow = tmp_path / f"{module}.py"
    slow.write_text("import time\nprint(1, flush=True)\ntime.sleep(60)\n")
    (tmp_path / "onnx.py").write_text(slow.read_text())
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
    code += (
        f"sys.argv = [{program!r}]; runpy.run_path({str(ROOT / program)!r}, run_name='__main__')"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert error == ""


def test_a_name_that_is_not_utf8(run, photos, tiny_weights, tmp_path):
    """A class folder named in Latin-1 trains, with a mark in place of the odd byte."""
    (photos / "leaf").rename(os.fsdecode(os.fsencode(photos) + b"/caf\xe9"))
    out = run("--dataset", photos, *quick(tiny_weights, "--epochs", 1, "--limit", 0))
    assert "3 classes" in out
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["classes"][1] == "caf\ufffd"


def test_the_next_command(run, tiny_weights, tmp_path, monkeypatch):
    """The next command can be pasted into a shell: it says where export.py is, unless it is in the
    current folder, and a name with a space is quoted."""
    out = run(*quick(tiny_weights, "--epochs", 1, "--name", "two words"))
    assert f"next     python {EXPORT} 'runs/two words'\n" in out
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    out = run(*quick(tiny_weights, "--epochs", 1, "--name", "a"))
    assert "next     python export.py runs/a\n" in out


def test_a_backbone_that_is_no_clip(run):
    """CLIP's methods without a CLIP are refused before anything is downloaded."""
    for backbone in ([], ["--backbone", "deit_s16"]):
        error = run("--method", "zero-shot", *backbone, status=2)
        assert "--method zero-shot needs a CLIP as --backbone: clip_b32, " in error


def test_bad_photos(run, photos, tiny_weights, tmp_path):
    """A damaged photo and an empty class are named, and no run is started."""
    arguments = ["--dataset", photos, "--weights", tiny_weights]
    (photos / "sky" / "03.png").write_bytes(b"no photo")
    assert re.search(r"can't read .*sky/03.png", run(*arguments, status=1))
    (photos / "sky" / "03.png").unlink()
    (photos / "empty").mkdir()
    assert re.search("no images in .*empty", run(*arguments, status=1))
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------- help

# What the help says about each option's default.
STATED = {
    "--dataset": "(digits)",
    "--data-dir": "(data)",
    "--limit": "(0: all)",
    "--shots": "(0: all)",
    "--test-share": "(0: a fifth, the same for all seeds)",
    "--backbone": "(vit_s16; vit_micro for digits)",
    "--weights": "instead of the download",
    "--init-lora": "merged before anything else",
    "--heads": "(0: from the files beside --weights, else the usual number for the width)",
    "--mean": "beside --weights, else ImageNet's or CLIP's)",
    "--std": "beside --weights, else ImageNet's or CLIP's)",
    "--mlp-act": "(by backbone; from the files beside --weights, else QuickGELU",
    "--image-size": "(0: its own)",
    "--epochs": "(10, up to 30 for fewer than 1,500 images; --cached 100)",
    "--batch": "(128; 32 for fewer than 5,000 images)",
    "--lr": "(by method and rank; for full by features and width, at most 0.00025; for head as",
    "--head-lr": "(by its features, at most 0.01, for head 0.02; as --lr for",
    "--weight-decay": "(0.05)",
    "--label-smoothing": "(0.1; CLIP's methods 0)",
    "--min-scale": "(0.08; digits 0.85)",
    "--seeds": "(0)",
    "--amp": "(auto)",
    "--device": "(auto: cuda if there is one)",
    "--name": "(from data set, method and seed)",
    "--method": "(adaptertune)",
    "--rank": "(adaptertune 8, adaptformer 64, clip-adapter 0)",
    "--every": "(1)",
    "--blocks": "(all)",
    "--adapter-input": "(adaptertune block, adaptformer raw)",
    "--adapter-act": "(adaptertune gelu, adaptformer relu)",
    "--init": "(adaptertune zero, adaptformer zero)",
    "--scale": "(adaptertune 1.0, adaptformer 0.1)",
    "--dropout": "(adaptertune 0.0, adaptformer 0.1)",
    "--prompts": "(vpt 10)",
    "--ratio": "(clip-adapter 0.2)",
    "--text-ratio": "(clip-adapter 0.0)",
    "--classifier": "(text)",
    "--template": "(by data set)",
    "--text-weights": "(in the backbone's file)",
    "--vocab": "(beside the weights)",
}
# Options that are off by default.
SWITCHES = {"--offline", "--cached", "--resume", "--scratch", "--learn-scale", "--shallow"}
SWITCHES |= {"--learn-ratio", "--help", "--eval", "--plot", "--compile", "--no-flip"}
SWITCHES |= {"--class-weights", "--predict", "--csv", "--download", "--squash"}
# The options of settings, where they don't have the setting's name.
OPTIONS = {"reads": "--adapter-input", "act": "--adapter-act", "deep": "--shallow"}


def help_of_options(text):
    """The help's paragraph of each option."""
    paragraphs = {}
    for part in re.split(r"\n  (?=-)", text)[1:]:
        part, _, _ = part.partition("\n\n")
        option = re.search(r"--[\w-]+", part)[0]
        paragraphs[option] = " ".join(part.split())
    return paragraphs


def test_every_method_has_a_rate_and_options():
    """Each method has a learning rate, and each of its settings an option, which is None unless it
    is given: of another option with this name the method would get that one's default."""
    assert set(train.RATES) == set(adaptertune.METHODS)
    defaults = vars(train.make_parser().parse_args([]))
    for method, settings in adaptertune.METHODS.items():
        for setting in settings:
            assert defaults[setting] in (None, [None]), (method, setting)


def test_help_names_every_option_and_its_default(run, monkeypatch):
    """Every option is in the help, with its default or as a switch."""
    monkeypatch.setenv("COLUMNS", "200")
    paragraphs = help_of_options(run("--help"))
    assert set(paragraphs) == set(STATED) | SWITCHES
    for option, default in STATED.items():
        assert default in paragraphs[option], option
    (options,) = train.parse([])
    for setting in set(vars(options)) - {"label", "seed"}:  # derived
        option = OPTIONS.get(setting, "--" + setting.replace("_", "-"))
        assert option in paragraphs, setting


DIGITS = {
    "dataset": "digits",
    "data_dir": "data",
    "limit": 0,
    "shots": 0,
    "test_share": 0,
    "backbone": "vit_micro",
    "weights": "",
    "init_lora": "",
    "heads": 0,
    "image_size": 0,
    "cached": False,
    "compile": False,
    "squash": False,
    "no_flip": False,
    "class_weights": False,
    "predict": [],
    "csv": "",
    "lr": 0.0,  # by the backbone's width
    "head_lr": 0.0,  # by the features
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "seeds": [0],
    "amp": "auto",
    "device": "auto",
    "method": "adaptertune",
    "rank": 8,
    "every": 1,
    "blocks": None,
    "reads": "block",
    "act": "gelu",
    "init": "zero",
    "scale": 1.0,
    "learn_scale": False,
    "dropout": 0.0,
}
ADAPTFORMER = {"rank": 64, "reads": "raw", "act": "relu", "init": "zero", "scale": 0.1}
CLIP = ["--backbone", "clip_b16"]
CLIP_ADAPTER = {"rank": 0, "ratio": 0.2, "text_ratio": 0.0, "learn_ratio": False, "cached": True}
CLIP_ADAPTER["label_smoothing"] = 0.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], DIGITS),
        (["--dataset", "cifar10"], {"backbone": "vit_s16"}),
        (["--method", "head", "--cached"], {"cached": True}),
        (["--method", "adaptformer"], ADAPTFORMER | {"dropout": 0.1, "learn_scale": False}),
        (["--method", "adaptformer", "--rank", "8"], {"lr": 0.0, "head_lr": 0.0}),
        (["--method", "adaptformer", "--lr", "1e-3"], {"lr": 1e-3, "head_lr": 0.0}),
        (["--method", "full"], {"lr": 0.0, "head_lr": 0.0}),
        (["--method", "full", "--lr", "1e-4"], {"lr": 1e-4, "head_lr": 0.0}),
        (["--method", "full", "--head-lr", "1e-3"], {"lr": 0.0, "head_lr": 1e-3}),
        (["--method", "head"], {"lr": 0.0, "head_lr": 0.0}),
        (["--method", "head", "--lr", "1e-3"], {"lr": 1e-3, "head_lr": 1e-3}),
        (["--method", "head", "--head-lr", "1e-3"], {"lr": 1e-3, "head_lr": 1e-3}),
        (["--method", "head", "--lr", "2e-2", "--head-lr", "1e-3"], {"lr": 1e-3, "head_lr": 1e-3}),
        (["--scratch"], {"lr": 1e-3, "head_lr": 1e-3}),
        (["--method", "vpt"], {"prompts": 10, "deep": True, "lr": 5e-3, "head_lr": 0.0}),
        (["--method", "clip-adapter", *CLIP], CLIP_ADAPTER | {"classifier": "text"}),
        (["--method", "zero-shot", *CLIP], {"classifier": "text"}),
    ],
)
def test_the_stated_defaults_are_in_force(arguments, expected):
    """A run's defaults are those that the help states."""
    (options,) = train.parse(arguments)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "images", "expected"),
    [
        ([], 1_294, {"epochs": 12, "batch": 32, "min_scale": 0.5}),
        ([], 45_000, {"epochs": 10, "batch": 128}),
        ([], 5_000, {"epochs": 10, "batch": 128}),
        ([], 4_999, {"epochs": 10, "batch": 32}),
        ([], 1_501, {"epochs": 10}),
        ([], 1_499, {"epochs": 11}),
        ([], 500, {"epochs": 30}),
        ([], 20, {"epochs": 30}),
        (["--method", "head", "--cached"], 20, {"epochs": 100}),
        (["--method", "clip-adapter", "--backbone", "clip_b16"], 45_000, {"epochs": 100}),
        (["--method", "zero-shot", "--backbone", "clip_b16"], 20, {"epochs": 0}),
        (
            ["--epochs", "3", "--batch", "7", "--min-scale", "1"],
            20,
            {"epochs": 3, "batch": 7, "min_scale": 1},
        ),
    ],
)
def test_what_the_data_decide(arguments, images, expected):
    """Unless given, epochs and batch follow the number of images, and the crop the data set."""
    (options,) = train.parse(arguments)
    train_images = data.Images(torch.empty(images, 0), torch.zeros(images))
    dataset = data.Dataset("photos", ["a", "b"], train_images, None, None, min_scale=0.5)
    train.fit_to_data(options, dataset)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize("factor", [1, 100, 1000])
def test_the_heads_rate_follows_its_features(factor, tmp_path, run):
    """By default the head's rate is the inverse of the mean Σ|f - f̄| over training images, at most
    2e-2, or 1e-2 where the backbone is adapted. Full fine-tuning has a fiftieth of it, within
    limits. A stopped run goes on with its own rate."""
    weights = write_backbone(tmp_path / "b.safetensors", seed=0)
    tensors, meta = vit.read_tensors(weights)
    for name in ("norm.weight", "norm.bias"):  # of the last norm: it scales the features
        tensors[name] = tensors[name] * factor
    save_file(tensors, weights, {"adaptertune": json.dumps(meta)})
    common = ["--weights", weights, "--epochs", 1, "--limit", 40]
    run(*common, "--method", "head", "--name", "head")
    out = run(*common, "--name", "adapters")
    head = json.loads(Path("runs/head/result.json").read_text())
    rate = head["head_lr"]
    assert head["lr"] == rate
    result = json.loads(Path("runs/adapters/result.json").read_text())
    assert (result["lr"], result["head_lr"]) == (5e-3, min(rate, 1e-2))
    assert f"learning rate 0.005 (head {min(rate, 1e-2):g})" in out

    run(*common, "--method", "full", "--name", "full")
    full = json.loads(Path("runs/full/result.json").read_text())
    assert full["head_lr"] == min(rate, 1e-2)

    options, *_ = train.parse(["--eval", "runs/head"])
    again = train.open_run(options)
    index = torch.linspace(0, 39, 32).long()
    batches = again.batches.eval(again.dataset.train[index], again.dataset.center)
    with torch.no_grad():
        features = torch.cat([again.model.features(x) for x, _ in batches])
    spread = (features - features.mean(dim=0)).abs().sum(dim=1).mean()
    assert rate == pytest.approx(min(2e-2, 1 / spread.item()), rel=0.05)
    assert (rate < 1e-2) == (factor > 1)
    expected = min(2.5e-4, max(2.5e-6, 0.02 / spread.item()))
    assert full["lr"] == pytest.approx(expected, rel=0.05)

    config = json.loads(Path("runs/head/config.json").read_text())
    config |= {"lr": 3e-3, "head_lr": 3e-3}
    Path("runs/head/config.json").write_text(json.dumps(config))
    options, *_ = train.parse([*map(str, common), "--method", "head", "--name", "head"])
    assert train.prepare(options, Path("runs/head")).options.lr == 3e-3


@pytest.mark.parametrize(
    ("method", "width", "spread", "rate"),
    [
        (["full"], 128, 250, 8e-5),
        (["full"], 192, 250, 8e-5),
        (["full"], 384, 250, 4e-5),
        (["full"], 768, 250, 2e-5),
        (["full"], 768, 1, 2.5e-4),
        (["full"], 768, 10**5, 2.5e-6),
        (["adaptertune"], 128, 250, 5e-3),
        (["adaptertune", "--rank", "1"], 192, 250, 5e-3),
        (["adaptertune", "--rank", "64"], 192, 250, 5e-3),
        (["adaptertune"], 384, 250, 2.5e-3),
        (["adaptertune"], 768, 250, 1.3e-3),  # 1.25e-3
        (["adaptertune", "--lr", "1e-2"], 768, 250, 1e-2),
        (["adaptformer"], 192, 250, 1e-2),
        (["adaptformer", "--rank", "8"], 192, 250, 2e-2),
        (["adaptformer"], 768, 250, 2.5e-3),
        (["adaptformer", "--rank", "8"], 768, 250, 5e-3),
        (["vpt"], 768, 250, 5e-3),
    ],
)
def test_the_rate_follows_the_width(method, width, spread, rate, monkeypatch):
    """Adapters and full fine-tuning in a network wider than DeiT-tiny have a rate that is lower by
    as much; that of full fine-tuning also follows the features, within limits."""
    monkeypatch.setattr(train, "spread_of_features", lambda *_: spread)
    model = types.SimpleNamespace(config=types.SimpleNamespace(width=width), to=lambda device: None)
    batches = types.SimpleNamespace(rank=0, device="cpu")
    (options,) = train.parse(["--method", *method])
    train.fit_to_backbone(options, model, None, batches)
    assert options.lr == rate
    assert options.head_lr == train.two_digits(min(1e-2, 1 / spread))


def test_processes_share_the_first_ones_measurement(monkeypatch):
    """Of several processes only the first one measures the features."""
    measured = []
    monkeypatch.setattr(train, "spread_of_features", lambda *_: 250)
    monkeypatch.setattr(train, "sum_over_processes", lambda x: measured.append(x.item()) or x)
    model = types.SimpleNamespace(config=types.SimpleNamespace(width=64), to=lambda device: None)
    for rank in (0, 1):
        (options,) = train.parse(["--method", "full"])
        batches = types.SimpleNamespace(rank=rank, device="cpu")
        train.fit_to_backbone(options, model, None, batches)
    assert measured == [250, 0]


def test_the_recipe_is_printed_and_kept(tiny_weights, run):
    """A run prints its recipe, and config.json holds it."""
    out = run("--weights", tiny_weights, "--limit", 640, "--epochs", 1)
    assert (
        "recipe   1 epoch of 20 steps, batch 32, learning rate 0.005 (head 0.01), crops of 0.85"
        in out
    )
    config = json.loads(Path("runs/digits-adaptertune-r8-n640-s0/config.json").read_text())
    assert (config["epochs"], config["batch"], config["min_scale"]) == (1, 32, 0.85)


@pytest.mark.usefixtures("unstopped")
def test_images_that_have_a_side(tiny_weights, tmp_path, monkeypatch):
    """With --no-flip no training image is mirrored, otherwise about half of them are. With
    --min-scale 1 a crop loses only what its aspect ratio takes."""
    write_cifar10(tmp_path / "data", monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = ["--weights", str(tiny_weights), "--dataset", "cifar10", "--min-scale", "1"]
    mirrored = []
    areas = []

    def crop_resize(pixels, boxes, size, *, flip=None):
        mirrored.append(torch.zeros(len(boxes)) if flip is None else flip.float())
        areas.append(boxes[:, 2] * boxes[:, 3] / (32 * 32))
        return plain(pixels, boxes, size, flip=flip)

    plain = data.crop_resize
    monkeypatch.setattr(data, "crop_resize", crop_resize)
    for more, low, high in (([], 0.3, 0.7), (["--no-flip"], 0, 0)):
        (options,) = train.parse([*command, *more])
        run = train.prepare(options)
        mirrored.clear()
        list(run.batches.train(run.dataset, 0, 1))
        assert low <= torch.cat(mirrored).mean() <= high
    assert torch.cat(areas).min() > 0.8


def test_what_is_left_to_the_data_resumes(tiny_weights, run):
    """A finished run is found again by a command that leaves epochs and batch to the data."""
    command = ["--weights", tiny_weights, "--limit", 40, "--method", "head", "--test-share", 0.1]
    run(*command)
    assert "kept" in run(*command, "--resume")
    assert "saved    runs/digits-head-n40-s0-2/adapters" in run(*command, "--epochs", 3)
    assert "kept     runs/digits-head-n40-s0-2/" in run(*command, "--epochs", 3, "--resume")


def test_dropout_is_not_drawn_like_the_crops(tiny_weights, tmp_path, monkeypatch):
    """A step's dropout has its own seed, not that of the crops; both follow from the run's seed."""
    monkeypatch.chdir(tmp_path)
    keys = []

    def seed_from(key):
        keys.append(key)
        return zlib.crc32(key.encode())

    command = ["--weights", str(tiny_weights), "--limit", "64", "--epochs", "1", "--seed", "3"]
    (options,) = train.parse(command)
    prepared = train.prepare(options)
    monkeypatch.setattr(data, "seed_from", seed_from)
    groups = adaptertune.parameter_groups(prepared.model, 0.0, 1e-3)
    train.train_epochs(prepared, torch.optim.AdamW(groups))
    assert set(keys) == {"3/1", "3/1/0", "3/1/1", "dropout/3/1/0", "dropout/3/1/1"}


@pytest.mark.parametrize(
    ("vals", "chosen"),
    [
        ([10, 50, 30], 2),
        ([50, 50, 30], 2),
        ([50, 38, 30], 1),  # of 50 images one standard error is 10 points
        ([50, 42, 34], 2),  # from the best one, not from the one before
        ([30, 50, 46], 3),
    ],
)
def test_validation_chooses_the_epoch(vals, chosen, tiny_weights, tmp_path, monkeypatch, unstopped):
    """The chosen epoch is the last that val can't tell from the best one; test is read with its
    weights, and they are saved."""
    monkeypatch.chdir(tmp_path)
    weights_at = []

    def predict(run, images, what):
        weights_at.append(run.model.head.weight.detach().clone())
        accuracy = vals[len(weights_at) - 1] if what == "validation" else 0
        zeros = torch.zeros(len(images), dtype=torch.long)
        labels = (torch.arange(len(images)) >= accuracy / 100 * len(images)).long()
        return train.Predictions(zeros, zeros, zeros, zeros.float(), labels, zeros[:, None])

    monkeypatch.setattr(train, "predict", predict)
    assert train.main([str(each) for each in quick(tiny_weights, "--name", "a")]) == 0
    tensors, meta = adaptertune.read(tmp_path / "runs/a/adapters.safetensors")
    assert meta["epoch"] == chosen
    assert meta["val_accuracy"] == vals[chosen - 1]
    assert torch.equal(tensors["head.weight"], weights_at[chosen - 1])
    assert torch.equal(weights_at[-1], weights_at[chosen - 1])  # at the reading of test
    assert not torch.equal(weights_at[0], weights_at[1])
