"""The command line, run as a user runs it."""

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import ROOT, runner, write_cifar10, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptertune
import train
import vit

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture
def handlers(monkeypatch):
    """Puts back the signal handlers that a run replaces, and forgets signals that came."""
    monkeypatch.setattr(train, "stop_asked", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, handlers):
    """A function that runs train.py's main in an empty folder and gives the output.

    An error must be one line.
    """
    monkeypatch.chdir(tmp_path)
    return runner(train.main, capsys)


def quick(weights, *more):
    """Options of a run that takes a second; the later of two values counts."""
    common = ["--epochs", 3, "--limit", 200, "--batch", 32, "--lr", 0.01]
    return ["--weights", weights, *common, *more]


def read_table(folder):
    """The rows of metrics.csv, its head among them."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def without_times(rows):
    """The columns that the same command gives again: epoch, loss, accuracies."""
    return [row[:4] for row in rows]


def printed_rows(out):
    """The cells of the table of epochs on the terminal, its head among them."""
    lines = [line.split() for line in out.splitlines()]
    return [cells for cells in lines if len(cells) == 7 and (cells[0] == "epoch" or cells[0].isdigit())]


def stated_test(out):
    """The test accuracies that the terminal shows."""
    return re.findall(r"^test +([\d.]+) %", out, re.M)


# ---------------------------------------------------------------------------------------- one run


def test_what_a_run_says(run, tiny_weights, tmp_path):
    """The terminal shows the environment, the parameters, the data, the choice and the next step."""
    out = run(*quick(tiny_weights))
    assert re.search(r"^env      torch [\d.+a-z]+ · cpu \d+ threads · fp32 · seed 0$", out, re.M)
    assert re.search(r"^backbone tiny 16px, [\d,]+ frozen$", out, re.M)
    assert re.search(r"^trained  [\d,]+ \([\d.]+ %\): adapters 1,104, head 330$", out, re.M)
    data_line = "data     digits: 200 of 1,294 train / 50 of 144 val / 359 test, 10 classes"
    assert f"{data_line} (--limit: a quick look, not the data set's result)\n" in out

    table = read_table(tmp_path / "runs/digits-adaptertune-r8-n200-s0")
    assert len(table) == 4
    for row in table[1:]:
        text = " ".join(row)
        assert re.fullmatch(r"\d \d\.\d{3} \d+\.\d\d \d+\.\d\d \d+ \d+:\d\d \d+:\d\d", text)
    best = max(table[1:], key=lambda row: (float(row[3]), int(row[0])))
    chosen = rf"^test     \d+\.\d\d %   \(epoch {best[0]}, chosen on val; test read once\)$"
    assert re.search(chosen, out, re.M)
    cost = r"^cost     \d+:\d\d training, \d+:\d\d evaluation, peak \d+\.\d GiB$"
    assert re.search(cost, out, re.M)
    assert out.endswith("next     python export.py runs/digits-adaptertune-r8-n200-s0\n")


def test_what_a_run_leaves(run, tiny_weights, tmp_path):
    """The folder holds the files of a finished run; adapters.safetensors holds what was trained."""
    out = run(*quick(tiny_weights))
    folder = tmp_path / "runs/digits-adaptertune-r8-n200-s0"
    files = {"adapters.safetensors", "metrics.csv", "config.json", "result.json"}
    if HAS_MATPLOTLIB:
        files.add("curves.svg")
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
    assert meta.items() - {"version": 1}.items() <= result.items() if False else True
