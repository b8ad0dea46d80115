"""Published weights and photographs. They aren't part of the project: ADAPTERTUNE_REAL names a folder that holds
weights/deit_tiny_patch16_224.safetensors (timm/deit_tiny_patch16_224.fb_in1k), data/imagenet200/ (photos named
INDEX_wnid_name.jpg by ImageNet class) and data/flowers12/train,test/CLASS/; ADAPTERTUNE_RESTORED one with
clip_vitb16_visual.safetensors (the image tower of openai/clip-vit-base-patch16) and cifar-100-python/."""
import os
import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from conftest import REAL

import adaptertune
import cli
import data
import export
import train
import vit

pytestmark = pytest.mark.skipif(not REAL, reason="set ADAPTERTUNE_REAL to a folder with published weights and photos")
REAL = Path(REAL or ".")
RESTORED = Path(os.environ.get("ADAPTERTUNE_RESTORED", "."))
DEIT = REAL / "weights" / "deit_tiny_patch16_224.safetensors"
CLIP = RESTORED / "clip_vitb16_visual.safetensors"


@pytest.fixture(scope="module")
def photos():
    """The 200 photos as data.py decodes them, with ImageNet's class numbers."""
    pytest.importorskip("PIL")
    paths = sorted((REAL / "data" / "imagenet200").glob("*.jpg"))
    return data.decode(paths, [int(path.name.split("_")[0]) for path in paths], 256, paths[0].parent)


def prepared(photos, backbone):
    batches = data.Batches(backbone.config.image_size, backbone.norm, 50, torch.device("cpu"))
    return batches.eval(photos, 7 / 8)


@torch.inference_mode()
def test_deit_tiny_on_imagenet_photos(photos):
    """A reference implementation gets 163 of these 200 right."""
    model, backbone = vit.load(DEIT, head=True)
    right = sum(int((model(x).argmax(dim=1) == labels).sum()) for x, labels in prepared(photos, backbone))
    print(f"DeiT-tiny: {right} of {len(photos)} right")
    assert right >= 160


@torch.inference_mode()
def test_deit_tiny_as_timm_runs_it(photos):
    """timm's own network on the same pixels: the same logits and as many right."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("deit_tiny_patch16_224.fb_in1k").eval()
    theirs.load_state_dict(vit.read_tensors(DEIT)[0])
    model, backbone = vit.load(DEIT, head=True)
    right = torch.zeros(2, dtype=torch.long)
    for x, labels in prepared(photos, backbone):
        ours, expected = model(x), theirs(x)
        assert (ours - expected).abs().max() < 1e-4
        right += torch.stack([(logits.argmax(dim=1) == labels).sum() for logits in (ours, expected)])
    print(f"ours {right[0]}, timm {right[1]} right")
    assert right[0] == right[1]


@torch.inference_mode()
@pytest.mark.parametrize("path", [DEIT, CLIP], ids=["DeiT-tiny", "CLIP"])
def test_zero_init_is_bit_identical(photos, path):
    """Logits of DeiT-tiny and embeddings of CLIP's image tower, with untrained adapters and without."""
    model, backbone = vit.load(path, head=True)
    x = next(prepared(photos, backbone))[0][:8]
    plain = model(x)
    assert plain.shape == (8, 1000 if path == DEIT else 512)
    blocks = adaptertune.choose_blocks(backbone.config.depth)
    adaptertune.add_adapters(model, rank=8, placement=blocks)
    assert torch.equal(model(x), plain)
    adaptertune.add_adapters(model, rank=8, placement=blocks, init="small")
    assert not torch.equal(model(x), plain)


def test_clip_tower_needs_no_option():
    model, backbone = vit.load(CLIP)
    assert backbone.norm == vit.CLIP
    assert backbone.config == vit.BACKBONES["clip_b16"].config
    assert vit.load(CLIP, name="clip_b16")[1].config == backbone.config


def test_heads_of_a_narrow_net():
    path = REAL / "weights" / "vit_cifar10_p4_d128_l4_h4.safetensors"
    assert vit.load(path, heads=4)[1].config.grid == 8


def test_cifar100_as_published():
    images = data.read("cifar100", str(RESTORED), offline=True)
    assert images.train.pixels.shape == (50_000, 3, 32, 32)
    assert images.test.pixels.shape == (10_000, 3, 32, 32)
    assert torch.bincount(images.train.labels).tolist() == [500] * 100
    assert (images.classes[0], images.classes[99]) == ("apple", "worm")
    parts = data.split(images)
    assert (len(parts.train), len(parts.val)) == (45_000, 5_000)
    assert torch.bincount(parts.val.labels).tolist() == [50] * 100


def test_flowers_on_deit_tiny(tmp_path, monkeypatch, capsys):
    """Twelve kinds of flowers in two epochs over 200 photos, from train/ and test/ folders, and the same test accuracy again
    from the file."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", str(REAL / "data" / "flowers12"), "--weights", str(DEIT), "--epochs", "2", "--limit", "200",
                 "--lr", "3e-3", "--name", "flowers"]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    print(out)
    assert "240 test, 12 classes" in out
    _, meta = vit.read_tensors(tmp_path / "runs" / "flowers" / "adapters.safetensors")
    assert meta["test_accuracy"] > 60
    assert train.main(["--eval", "runs/flowers"]) == 0
    stated = f"{meta['test_accuracy']:.2f} %"
    assert capsys.readouterr().out.endswith(f"test     {stated}   (its file says {stated})\n")


def export_meta(backbone, **more):
    return {"input": "float", "resize": False, "output": "logits", "top_k": 0, "batch": 0, "backbone": "real", "center": 7 / 8,
            "interpolation": "bicubic", "mean": backbone.norm[0], "std": backbone.norm[1], **more}


@torch.inference_mode()
@pytest.mark.parametrize("opset", [17, 20, 23])
@pytest.mark.parametrize("path", [DEIT, CLIP], ids=["DeiT-tiny", "CLIP"])
def test_export_of_real_weights(photos, path, opset):
    """Adapters that do something on DeiT-tiny and on CLIP's image tower: the same logits and labels of photos."""
    model, backbone = vit.load(path, head=True)
    torch.manual_seed(0)
    adaptertune.add_adapters(model, rank=8, placement=range(12))
    for block in model.blocks:
        torch.nn.init.normal_(block.adapter.up.weight, std=0.05)
    model.requires_grad_(False)
    if model.head.bias is None:  # CLIP's projection
        model.head.bias = torch.nn.Parameter(torch.zeros(len(model.head.weight)), requires_grad=False)
    proto = export.to_model(export.Graph(opset), model, export_meta(backbone))
    graph = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = next(prepared(photos, backbone))[0][:20 if path == DEIT else 6]
    got, expected = graph.run(None, {"image": x.numpy()})[0], model(x).numpy()
    assert abs(got - expected).max() < 1e-4
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_two_tasks_on_one_deit_tiny(tmp_path, monkeypatch, capsys):
    """Flowers (rank 4, 12 classes) and digits (rank 16, 10 classes) from one session, swapped per call, each as its own torch
    model; the adapters' files are hardly larger than what is in them."""
    monkeypatch.chdir(tmp_path)
    common = ["--weights", str(DEIT), "--epochs", "1", "--lr", "3e-3"]
    for name, dataset, rank in (("flowers", str(REAL / "data/flowers12"), "4"), ("digits", "digits", "16")):
        assert train.main([*common, "--dataset", dataset, "--rank", rank, "--limit", "120", "--name", name]) == 0
        assert export.main([f"runs/{name}", "--swappable"]) == 0
    print(capsys.readouterr().out)
    session = export.session("runs/backbone.onnx")
    runs = {name: train.open_run(cli.parse(["--eval", f"runs/{name}"])[0]) for name in ("flowers", "digits")}
    graphs = {name: export.in_onnxruntime(session, f"runs/{name}.onnx_adapter") for name in runs}
    for start in (0, 8, 16):
        for name, run in runs.items():
            images = run.data.test[torch.arange(start, start + 8)]
            x = next(run.batches.eval(images, run.data.center))[0]
            with torch.inference_mode():
                expected = run.model.eval()(x).numpy()
            got = graphs[name](x.numpy())[0]
            assert got.shape == (8, {"flowers": 12, "digits": 10}[name])
            assert abs(got - expected).max() < 1e-4
    for name in runs:
        path = tmp_path / "runs" / f"{name}.onnx_adapter"
        parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        assert path.stat().st_size < 1.1 * sum(value.numpy().nbytes for value in parameters.values())


def test_few_shots_on_clip(tmp_path, monkeypatch, capsys):
    """Two photos of each of twelve flowers: class means name most of the others, CLIP-Adapter starts there, and both export."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "cache"))
    flowers = ["--dataset", str(REAL / "data/flowers12"), "--weights", str(CLIP), "--classifier", "prototypes", "--shots", "2"]
    assert train.main([*flowers, "--method", "zero-shot", "clip-adapter", "--name", "f"]) == 0
    out = capsys.readouterr().out
    print(out)
    zero_shot, adapted = (float(value) for value in re.findall(r"^test +([\d.]+) %", out, re.M))
    assert zero_shot > 80
    assert adapted > zero_shot - 5
    assert re.findall(r"^zeroshot ([\d.]+) %", out, re.M) == [f"{zero_shot:.2f}"] * 2
    for name in ("zero-shot", "clip-adapter"):
        assert export.main([f"runs/f-{name}", "--images", "24"]) == 0
        assert "24 test images" in capsys.readouterr().out
