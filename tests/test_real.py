"""Published weights and photographs. They aren't part of the project: ADAPTERTUNE_REAL names a folder that holds
weights/deit_tiny_patch16_224.safetensors (timm/deit_tiny_patch16_224.fb_in1k), data/imagenet200/ (photos named
INDEX_wnid_name.jpg by ImageNet class) and data/flowers12/train,test/CLASS/; ADAPTERTUNE_RESTORED one with
clip_vitb16_visual.safetensors (the image tower of openai/clip-vit-base-patch16) and cifar-100-python/."""
import os
from pathlib import Path

import pytest
import torch
from conftest import REAL

import adaptertune
import data
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
    batches = data.Batches(backbone.config.image_size, backbone.norm, backbone.interpolation, 50, torch.device("cpu"))
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
