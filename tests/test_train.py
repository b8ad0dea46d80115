"""The command line, run as a user runs it."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, runner, write_cifar10, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptertune
import cli
import train
import vit


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs train.py's main with these arguments in an empty folder and gives its output; an error must be one line."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield runner(train.main, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def process(*arguments, cwd, **env):
    """The same in a process of its own: (status, output, errors)."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, env={**os.environ, **env}, timeout=300)
    return done.returncode, done.stdout, done.stderr


def quick(weights, *more):
    return "--weights", weights, "--epochs", 3, "--limit", 200, "--batch", 32, "--lr", 0.01, *more


def metrics(folder):
    """metrics.csv without the columns of time."""
    return [line.split(",")[:4] for line in (folder / "metrics.csv").read_text().splitlines()]


def test_a_run(run, tiny_weights, tmp_path):
    out = run(*quick(tiny_weights))
    folder = tmp_path / "runs" / "digits-adaptertune-r8-n200-s0"
    assert re.search(r"^env      torch [\d.+a-z]+ · cpu \d+ threads · fp32 · seed 0$", out, re.M)
    assert re.search(r"^backbone tiny 16px, [\d,]+ frozen$", out, re.M)
    assert re.search(r"^trained  [\d,]+ \([\d.]+ %\): adapters 1,104, head 330$", out, re.M)
    assert "data     digits: 200 of 1,294 train / 50 of 144 val / 359 test, 10 classes (--limit: a quick look" in out
    rows = re.findall(r"^ +(\d) +(\d\.\d{3}) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+) +(\d+:\d\d) +(\d+:\d\d)$", out, re.M)
    assert [list(row[:4]) for row in rows] == metrics(folder)[1:]
    best = max(rows, key=lambda row: (float(row[3]), row[0]))
    assert re.search(rf"^test     \d+\.\d\d %   \(epoch {best[0]}, chosen on val; test read once\)$", out, re.M)
    assert out.rstrip().endswith(f"next     python export.py {folder.relative_to(tmp_path)}")
    assert {path.name for path in folder.iterdir()} == {"adapters.safetensors", "metrics.csv", "config.json", "curves.svg",
                                                         "result.json"}
    assert (folder / "curves.svg").read_text().count("<polyline") == 3
    with safe_open(folder / "adapters.safetensors", "pt") as file:
        keys, meta = set(file.keys()), json.loads(file.metadata()["adaptertune"])
    assert keys == {"head.weight", "head.bias"} | {f"blocks.{block}.adapter.{part}.{kind}" for block in (0, 1)
                                                  for part in ("down", "up") for kind in ("weight", "bias")}
    expected = {"method": "adaptertune", "rank": 8, "placement": [0, 1], "backbone": "tiny", "image_size": 16,
                "mean": [0.5] * 3, "std": [0.5] * 3, "classes": [str(i) for i in range(10)], "dataset": "digits", "seed": 0}
    assert expected.items() <= meta.items()
    assert f"{meta['test_accuracy']:.2f} %   (epoch" in out
    assert meta["fingerprint"] == adaptertune.fingerprint(vit.load(tiny_weights)[0])


def test_the_embedded_default_learns(run, tmp_path):
    """No option but fewer epochs: digits on vit_micro, which is at most 2 million parameters and 4 MB."""
    out = run("--epochs", 2)
    assert float(re.search(r"^test +([\d.]+) %", out, re.M)[1]) > 85
    assert (tmp_path / "runs/digits-adaptertune-r8-s0/adapters.safetensors").stat().st_size < 300_000
    weights = ROOT / "assets" / "vit_micro.safetensors"
    assert weights.stat().st_size <= 4_000_000
    model, backbone = vit.load(weights, name="vit_micro")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert vit.load(weights)[1].config == backbone.config


def test_same_command_same_metrics(run, tiny_weights, tmp_path):
    for name in ("a", "b"):
        run(*quick(tiny_weights, "--dropout", 0.3, "--name", name))
    assert metrics(tmp_path / "runs/a") == metrics(tmp_path / "runs/b")
    first, second = ((tmp_path / "runs" / name / "adapters.safetensors").read_bytes() for name in "ab")
    assert first == second
    run(*quick(tiny_weights, "--dropout", 0.3, "--name", "c", "--seeds", 1))
    assert metrics(tmp_path / "runs/a") != metrics(tmp_path / "runs/c")


@pytest.mark.parametrize("method", ["adaptertune", "head", "full"])
def test_eval_reproduces_the_test_accuracy(run, tiny_weights, tmp_path, method):
    out = run(*quick(tiny_weights, "--method", method, "--name", "a"))
    stated = re.search(r"^test +([\d.]+) %", out, re.M)[1]
    assert f"test     {stated} %   (its file says {stated} %)" in run("--eval", "runs/a")


def test_another_backbone_is_refused_by_name(run, tiny_weights, tmp_path):
    other = write_tiny(tmp_path / "other.safetensors", seed=1)
    run(*quick(tiny_weights, "--name", "a"))
    error = run("--eval", "runs/a", "--weights", other, status=1)
    assert re.search(r"trained on tiny \([0-9a-f]{16}\), not on other \([0-9a-f]{16}\)", error)


def test_frozen_tensors_stay_and_have_no_gradient(tiny_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, = cli.parse([str(each) for each in quick(tiny_weights)])
    run_ = train.prepare(options, 0)
    before = {name: tensor.clone() for name, tensor in run_.model.state_dict().items()}
    train.fit(run_)
    for name, tensor in run_.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != adaptertune.is_adapter(name), name
    for name, parameter in run_.model.named_parameters():
        assert (parameter.grad is not None) == adaptertune.is_adapter(name), name
    published = load_file(tiny_weights)
    assert all(torch.equal(published[key], run_.model.state_dict()[key]) for key in published)


def test_ctrl_c_then_resume_gives_the_same_run(run, tiny_weights, tmp_path):
    """Stopped twice in the middle of an epoch, once more than it takes to resume."""
    arguments = quick(tiny_weights, "--dropout", 0.2, "--epochs", 8)
    run(*arguments, "--name", "whole")
    command = [sys.executable, "-u", str(ROOT / "train.py"), *map(str, arguments), "--name", "cut"]
    for attempt in range(2):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f"     {2 + 2 * attempt} "):  # this epoch is done, the next has begun
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                break
        rest, error = process.communicate(timeout=60)
        assert process.returncode == 130, rest + error
        assert "stopped; to go on: python" in error
        assert "--resume" in error
        assert (tmp_path / "runs/cut/state.pt").exists()
        if not attempt:
            assert "unfinished run; go on with --resume" in run(*arguments, "--name", "cut", status=1)
            different = run(*arguments, "--name", "cut", "--resume", "--rank", 4, status=1)
            assert "holds a run with other options" in different
            command.append("--resume")
    run(*arguments, "--name", "cut", "--resume")
    assert metrics(tmp_path / "runs/cut") == metrics(tmp_path / "runs/whole")
    whole, cut = (load_file(tmp_path / "runs" / name / "adapters.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert "finished before" in run(*arguments, "--name", "cut", "--resume")


def test_seeds(run, tiny_weights, tmp_path):
    out = run(*quick(tiny_weights, "--seeds", "0,1", "--method", "head"))
    tests = [float(value) for value in re.findall(r"^test +([\d.]+)", out, re.M)]
    mean, spread = map(float, re.search(r"^head +330 +([\d.]+) ± ([\d.]+) ", out, re.M).groups())
    assert mean == pytest.approx(sum(tests) / 2, abs=0.011)
    assert spread == pytest.approx(abs(tests[0] - tests[1]) / 2 ** 0.5, abs=0.02)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "digits-head-n200-s0", "digits-head-n200-s1", "digits-comparison.csv", "digits-comparison.svg"}


def test_scratch_leaves_a_backbone(run, tmp_path):
    run("--scratch", "--backbone", "vit_micro", "--epochs", 1, "--limit", 64, "--name", "base")
    weights = tmp_path / "runs/base/adapters.safetensors"
    model, backbone = vit.load(weights, head=True)
    assert backbone.config == vit.BACKBONES["vit_micro"].config
    assert model.head.weight.shape == (10, 128)
    out = run("--weights", weights, "--epochs", 1, "--limit", 64, "--name", "next")
    assert "backbone base 32px, 809,856 frozen" in out


def test_photos(run, photos, tiny_weights, tmp_path):
    out = run("--dataset", photos, *quick(tiny_weights, "--limit", 0, "--name", "a"))
    assert "data     photos: 43 train / 5 val / 12 test, 3 classes" in out
    split = json.loads((tmp_path / "runs/a/split.json").read_text())
    assert [len(split[part]) for part in ("train", "val", "test")] == [43, 5, 12]
    assert len({name for names in split.values() for name in names}) == 60


def test_a_run_is_not_overwritten_by_another(run, tiny_weights, tmp_path):
    run(*quick(tiny_weights))
    assert "holds a run with other options; give this one a --name" in run(*quick(tiny_weights, "--dropout", 0.2), status=1)
    run(*quick(tiny_weights, "--offline", "--data-dir", tmp_path, "--device", "cpu"))  # the same run, elsewhere


def test_diverging_training_says_so(run, tiny_weights, tmp_path):
    assert "lower --lr (1000)" in run(*quick(tiny_weights, "--method", "full", "--lr", 1000, "--weight-decay", 900), status=1)
    assert not (tmp_path / "runs").exists()


def foreign(path):
    save_file({"layer1.weight": torch.zeros(3)}, path / "foreign.safetensors")
    return "foreign.safetensors"


def truncated(path, tiny):
    (path / "cut.safetensors").write_bytes(tiny.read_bytes()[:5000])
    return "cut.safetensors"


def code(path):
    class Evil:
        def __reduce__(self):
            return (eval, ("__import__('pathlib').Path('evil').write_text('x')",))
    torch.save({"model": Evil()}, path / "code.pth")
    return "code.pth"


def lacking(path, tiny):
    tensors = load_file(tiny)
    del tensors["norm.bias"]
    save_file(tensors | {"blocks.0.more": torch.zeros(1)}, path / "lacking.safetensors")
    return "lacking.safetensors"


@pytest.mark.parametrize(("arguments", "status", "message"), [
    (["--dataset", "cifar99"], 1, "no data set or folder 'cifar99': choose digits, cifar10, cifar100 or give a folder"),
    (["--dataset", "no/such/folder"], 1, "no data set or folder 'no/such/folder'"),
    (["--dataset", "cifar100", "--offline"], 1, "--offline given; put the published archive"),
    (["--backbone", "vit_s17"], 2, "choose from .*vit_s16"),
    (["--method", "lora"], 2, "choose from .*adaptertune.*head.*full"),
    (["--init", "ones"], 2, "choose zero, small or a file"),
    (["--rank", "0"], 1, "rank 0: choose from 1 to the backbone's width, 32"),
    (["--rank", "33"], 1, "rank 33: choose from 1 to the backbone's width, 32"),
    (["--every", "3"], 1, "choose from 0 to 1, or every 1 to 2"),
    (["--blocks", "2"], 1, r"adapters in blocks \[2\]"),
    (["--batch", "-1"], 2, "--batch -1 is not between 0 and"),
    (["--epochs", "-1"], 2, "--epochs -1 is not between"),
    (["--dropout", "2"], 2, "--dropout 2.0 is not between 0 and 1"),
    (["--image-size", "18"], 1, "image size 18 is not a multiple of the patch size 4"),
    (["--scratch"], 2, "leave out --weights"),
    (["--device", "cuda:99"], 1, "device 'cuda:99' can't be used here"),
    (["--unknown"], 2, "unrecognized arguments: --unknown"),
    (["--eval", "runs/none"], 2, "no run in runs/none"),
    (["--weights", "none.pth"], 1, "no weights at none.pth"),
    (["--weights", foreign], 1, "foreign.safetensors: not a ViT in a known layout"),
    (["--weights", truncated], 1, "cut.safetensors is damaged or cut short"),
    (["--weights", code], 1, "code.pth holds more than tensors.*refused"),
    (["--weights", lacking, "--heads", "2"], 1, "1 missing: norm.bias; 1 left over: blocks.0.more"),
], ids=lambda value: "-".join(map(str, value))[:40] if isinstance(value, list) else None)
def test_bad_input(run, tiny_weights, tmp_path, arguments, status, message):
    """One line, the right status, and nothing left behind."""
    makers = {foreign: foreign, code: code, truncated: lambda path: truncated(path, tiny_weights),
              lacking: lambda path: lacking(path, tiny_weights)}
    arguments = [makers[each](tmp_path) if callable(each) else each for each in arguments]
    before = set(tmp_path.rglob("*"))
    given = [] if "--weights" in arguments or "--backbone" in arguments else ["--weights", tiny_weights]
    assert re.search(message, run(*given, *arguments, status=status))
    assert set(tmp_path.rglob("*")) == before


def test_bad_photos(run, photos, tiny_weights, tmp_path):
    (photos / "sky" / "03.png").write_bytes(b"no photo")
    assert re.search(r"can't read .*sky/03.png", run("--dataset", photos, "--weights", tiny_weights, status=1))
    (photos / "sky" / "03.png").unlink()
    (photos / "empty").mkdir()
    assert re.search("no images in .*empty", run("--dataset", photos, "--weights", tiny_weights, status=1))
    assert not (tmp_path / "runs").exists()


def test_without_pillow(photos, tiny_weights, tmp_path):
    """Digits and CIFAR train; a folder of photos says what to install."""
    (tmp_path / "hide" / "PIL").mkdir(parents=True)
    (tmp_path / "hide" / "PIL" / "__init__.py").write_text("raise ImportError('hidden')")
    hidden = {"PYTHONPATH": str(tmp_path / "hide")}
    write_cifar10(tmp_path / "data")
    for dataset in ("digits", "cifar10"):
        assert process("--dataset", dataset, *quick(tiny_weights), cwd=tmp_path, **hidden)[0] == 0
    status, _, error = process("--dataset", photos, "--weights", tiny_weights, cwd=tmp_path, **hidden)
    assert status == 1
    assert re.fullmatch("error: image folders need Pillow to decode photos: pip install pillow\n", error)


def test_help_names_every_option(run):
    text = run("--help")
    for option in ("--dataset", "--rank", "--weights", "--seeds", "--resume", "--limit", "--offline", "--amp"):
        assert option in text


def test_schedule():
    factors = [train.schedule(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_bf16_trains(run, tiny_weights, tmp_path):
    assert "· bf16 · seed 0" in run(*quick(tiny_weights, "--amp", "bf16"))
