"""Published weights and photos, which aren't part of the project.

ADAPTERTUNE_REAL names a folder that holds

    weights/deit_tiny_patch16_224.safetensors   timm/deit_tiny_patch16_224.fb_in1k
    data/imagenet200/                           photos INDEX_wnid_name.jpg, by ImageNet class
    data/flowers12/train,test/CLASS/            photos

and ADAPTERTUNE_RESTORED one with

    clip_vitb16_visual.safetensors              the image tower of openai/clip-vit-base-patch16
    cifar-100-python/                           CIFAR-100 as published
"""

import json
import os
import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from conftest import REAL, runner

import adaptertune
import data
import export
import train
import vit

pytestmark = pytest.mark.skipif(
    not REAL, reason="set ADAPTERTUNE_REAL to a folder with published weights and photos"
)
REAL = Path(REAL or ".")
RESTORED = Path(os.environ.get("ADAPTERTUNE_RESTORED", "."))
DEIT = REAL / "weights" / "deit_tiny_patch16_224.safetensors"
CLIP = RESTORED / "clip_vitb16_visual.safetensors"
FLOWERS = REAL / "data" / "flowers12"
TOWERS = pytest.mark.parametrize("path", [DEIT, CLIP], ids=["DeiT-tiny", "CLIP"])


@pytest.fixture(scope="module")
def photos():
    """The 200 photos as data.py decodes them, with ImageNet's class numbers."""
    pytest.importorskip("PIL")
    folder = REAL / "data" / "imagenet200"
    paths = sorted(folder.glob("*.jpg"))
    labels = [int(path.name.split("_")[0]) for path in paths]
    return data.decode(paths, labels, data.Square(256), folder)[0]


@pytest.fixture
def commands(capsys, monkeypatch, tmp_path):
    """Functions that run train.py and export.py in an empty folder and return the output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "cache"))
    return runner(train.main, capsys), runner(export.main, capsys)


def prepared(photos, backbone):
    """The photos in batches of 50, as a backbone expects them."""
    size = backbone.config.image_size
    batches = data.Batches(size, backbone.norm, 50, torch.device("cpu"))
    return batches.eval(photos, 7 / 8)


# -------------------------------------------------------------------------------------- backbones


@torch.inference_mode()
def test_deit_tiny_on_imagenet_photos(photos):
    """DeiT-tiny gets at least 160 of 200 photos right; a reference implementation gets 163."""
    model, backbone = vit.load(DEIT, head=True)
    right = 0
    for x, labels in prepared(photos, backbone):
        right += int((model(x).argmax(dim=1) == labels).sum())
    print(f"DeiT-tiny: {right} of {len(photos)} right")
    assert right >= 160


@torch.inference_mode()
def test_deit_tiny_as_timm_runs_it(photos):
    """timm's own network gives the same logits for the same pixels, and as many right labels."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("deit_tiny_patch16_224.fb_in1k").eval()
    theirs.load_state_dict(vit.read_tensors(DEIT)[0])
    ours, backbone = vit.load(DEIT, head=True)
    our_right = 0
    their_right = 0
    for x, labels in prepared(photos, backbone):
        logits = ours(x)
        expected = theirs(x)
        assert (logits - expected).abs().max() < 1e-4
        our_right += int((logits.argmax(dim=1) == labels).sum())
        their_right += int((expected.argmax(dim=1) == labels).sum())
    print(f"ours {our_right}, timm {their_right} right")
    assert our_right == their_right


@torch.inference_mode()
@TOWERS
def test_zero_init_is_bit_identical(photos, path):
    """Untrained adapters don't change a bit of a published network's output; small ones do."""
    model, backbone = vit.load(path, head=True)
    batch, _ = next(prepared(photos, backbone))
    x = batch[:8]
    plain = model(x)
    assert plain.shape == (8, 1000 if path == DEIT else 512)
    adaptertune.add_adapters(model, rank=8)
    assert torch.equal(model(x), plain)
    adaptertune.add_adapters(model, rank=8, init="small")
    assert not torch.equal(model(x), plain)


def test_clip_tower_needs_no_option():
    """CLIP's image tower is recognised by its tensors alone."""
    _, backbone = vit.load(CLIP)
    assert backbone.norm == vit.CLIP
    assert backbone.config == vit.BACKBONES["clip_b16"].config
    _, named = vit.load(CLIP, name="clip_b16")
    assert named.config == backbone.config


def test_heads_of_a_narrow_net():
    """A network with heads of 32 channels is read if their number is given."""
    path = REAL / "weights" / "vit_cifar10_p4_d128_l4_h4.safetensors"
    _, backbone = vit.load(path, heads=4)
    assert backbone.config.grid == 8


# -------------------------------------------------------------------------------------- data sets


def test_cifar100_as_published():
    """CIFAR-100 has its published sizes and class names, and equally many images per class."""
    images = data.read("cifar100", str(RESTORED), offline=True)
    assert images.train.pixels.shape == (50_000, 3, 32, 32)
    assert images.test.pixels.shape == (10_000, 3, 32, 32)
    assert torch.bincount(images.train.labels).tolist() == [500] * 100
    assert images.classes[0] == "apple"
    assert images.classes[99] == "worm"
    parts = data.split(images)
    assert len(parts.train) == 45_000
    assert len(parts.val) == 5_000
    assert torch.bincount(parts.val.labels).tolist() == [50] * 100


def test_flowers_on_deit_tiny(commands):
    """Two epochs on 200 flower photos give over 60 %, and --eval gives the same from the file."""
    pytest.importorskip("PIL")
    run, _ = commands
    arguments = ["--dataset", FLOWERS, "--weights", DEIT, "--epochs", 2, "--limit", 200]
    out = run(*arguments, "--lr", 3e-3, "--name", "flowers")
    assert "240 test, 12 classes" in out
    _, meta = adaptertune.read("runs/flowers/adapters.safetensors")
    assert meta["test_accuracy"] > 60
    stated = f"{meta['test_accuracy']:.2f} %"
    out = run("--eval", "runs/flowers")
    assert f"test     {stated}   (its file says {stated})\n" in out


# ----------------------------------------------------------------------------------------- export


@torch.inference_mode()
@pytest.mark.parametrize("opset", [17, 20, 23])
@TOWERS
def test_export_of_real_weights(photos, path, opset):
    """The graph of a published network with adapters gives torch's logits and labels for photos."""
    model, backbone = vit.load(path, head=True)
    torch.manual_seed(0)
    adaptertune.add_adapters(model, rank=8)
    for block in model.blocks:
        torch.nn.init.normal_(block.adapter.up.weight, std=0.05)
    if model.head.bias is None:  # CLIP's projection
        model.head.bias = torch.nn.Parameter(torch.zeros(len(model.head.weight)))
    model.requires_grad_(False)

    meta = {
        "method": "adaptertune",
        "input": "float",
        "resize": False,
        "output": "logits",
        "batch": 0,
        "precision": "fp32",
        "dataset": "photos",
        "classes": [str(i) for i in range(len(model.head.weight))],
        "backbone": "real",
        "center": 7 / 8,
        "interpolation": "bicubic",
        "mean": backbone.norm[0],
        "std": backbone.norm[1],
    }
    proto = export.to_model(export.Graph(opset), model, meta)
    providers = ["CPUExecutionProvider"]
    graph = onnxruntime.InferenceSession(proto.SerializeToString(), providers=providers)
    batch, _ = next(prepared(photos, backbone))
    x = batch[: 20 if path == DEIT else 6]
    (logits,) = graph.run(None, {"image": x.numpy()})
    expected = model(x).numpy()
    assert abs(logits - expected).max() < 1e-4
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_two_tasks_on_one_deit_tiny(commands):
    """Flowers and digits, swapped per call in one session, each give the logits of its torch model.

    Their ranks and numbers of classes differ. An adapter's file is hardly larger than its tensors.
    """
    pytest.importorskip("PIL")
    run, run_export = commands
    tasks = {"flowers": (FLOWERS, 4, 12), "digits": ("digits", 16, 10)}
    for name, (dataset, rank, _) in tasks.items():
        common = ["--weights", DEIT, "--epochs", 1, "--lr", 3e-3, "--limit", 120]
        common += ["--test-share", 0.1] if name == "digits" else []
        run(*common, "--dataset", dataset, "--rank", rank, "--name", name)
        run_export(f"runs/{name}", "--swappable")

    session = export.session("runs/backbone.onnx")
    runs = {name: train.open_run(train.options_of(f"runs/{name}")) for name in tasks}
    graphs = {}
    for name in tasks:
        graphs[name] = export.InOnnxruntime(session, Path("runs", f"{name}.onnx_adapter"))
    for start in (0, 8, 16):
        for name, opened in runs.items():
            images = opened.dataset.test[torch.arange(start, start + 8)]
            x, labels = next(opened.batches.eval(images, opened.dataset.center))
            with torch.inference_mode():
                expected = opened.model.eval()(x).numpy()
            logits = graphs[name](export.Checked(x.numpy(), x, labels.numpy()))
            _, _, classes = tasks[name]
            assert logits.shape == (8, classes)
            assert abs(logits - expected).max() < 1e-4

    for name in tasks:
        path = Path("runs", f"{name}.onnx_adapter")
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        tensors = [value.numpy() for value in adapter.get_parameters().values()]
        assert path.stat().st_size < 1.1 * sum(tensor.nbytes for tensor in tensors)


def test_few_shots_on_clip(commands):
    """Class means of two photos get most flowers right; CLIP-Adapter starts there, and both export.

    The zero-shot accuracy that both runs print is that of the validation photos.
    """
    pytest.importorskip("PIL")
    run, run_export = commands
    flowers = ["--dataset", FLOWERS, "--weights", CLIP, "--classifier", "prototypes"]
    out = run(*flowers, "--shots", 2, "--method", "zero-shot", "clip-adapter", "--name", "f")
    zero_shot, adapted = map(float, re.findall(r"^test +([\d.]+) %", out, re.M))
    assert zero_shot > 80
    assert adapted > zero_shot - 5

    line = r"^zeroshot ([\d.]+) %   \(val, by prototypes alone, before training\)$"
    before, before_training = re.findall(line, out, re.M)
    assert before == before_training
    result = json.loads(Path("runs/f-zero-shot/result.json").read_text())
    assert f"{result['zero_shot_val_accuracy']:.2f}" == before
    assert result["val_accuracy"] == result["zero_shot_val_accuracy"]
    for name in ("zero-shot", "clip-adapter"):
        assert "24 test images" in run_export(f"runs/f-{name}", "--images", 24)


# --------------------------------------------------------------------------------- a LoRA of peft


def test_lora_on_photos(commands, tmp_path):
    """A LoRA that peft trains for five steps on three classes of flowers gives peft's logits and
    accuracy; the exported graph gives the same logits."""
    peft = pytest.importorskip("peft")
    timm = pytest.importorskip("timm")
    run, exporter = commands
    torch.manual_seed(0)
    network = timm.create_model("deit_tiny_patch16_224", num_classes=3)
    tensors, _ = vit.read_tensors(DEIT)
    backbone = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    network.load_state_dict(backbone, strict=False)
    settings = {"r": 16, "lora_alpha": 32, "target_modules": ["qkv"], "modules_to_save": ["head"]}
    tuned = peft.get_peft_model(network, peft.LoraConfig(**settings))
    few = tmp_path / "few"
    for folder in sorted(FLOWERS.glob("*/*"))[:12:4] + sorted(FLOWERS.glob("*/*"))[12::4]:
        (few / folder.parent.name).mkdir(parents=True, exist_ok=True)
        (few / folder.parent.name / folder.name).symlink_to(folder)
    dataset = data.split(data.read(str(few), image_size=224))
    batches = data.Batches(224, vit.IMAGENET, 32, torch.device("cpu"))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=2e-3)
    for _, (x, labels) in zip(range(5), batches.train(dataset, 0, 1), strict=False):
        loss = torch.nn.functional.cross_entropy(tuned(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned.eval().save_pretrained(tmp_path / "lora")

    expected = []
    with torch.inference_mode():
        for x, _ in batches.eval(dataset.test, dataset.center):
            expected.append(tuned(x))
    expected = torch.cat(expected)
    right = (expected.argmax(dim=1) == dataset.test.labels).double().mean().item()
    assert 0.5 < right < 1
    lora = ("--init-lora", tmp_path / "lora", "--epochs", 0, "--method", "head", "--name", "lora")
    out = run("--dataset", few, "--weights", DEIT, *lora)
    assert f"test     {100 * right:.2f} %" in out
    exporter("runs/lora", "--images", 8)
    session = onnxruntime.InferenceSession("runs/lora/model.onnx")
    first = next(batches.eval(dataset.test, dataset.center))[0]
    ours = train.load_run("runs/lora").network
    with torch.inference_mode():
        in_torch = (ours(first) - expected[:32]).abs().max().item()
    found = torch.from_numpy(session.run(None, {"image": first.numpy()})[0])
    in_graph = (found - expected[:32]).abs().max().item()
    spread = expected.std().item()
    print(f"peft {100 * right:.2f} %; logits of std {spread:.1f}: {in_torch:.1e}, {in_graph:.1e}")
    assert max(in_torch, in_graph) < 1e-4
