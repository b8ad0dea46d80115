"""vit.py against the libraries that published the weights: kept outputs of tiny networks (golden files), the same networks
built live, and every variant of the table at full size."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import references
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vit

LIMIT = 1e-4
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


@torch.inference_mode()
def difference(path, expected, images, **options):
    """Largest |ours - expected|."""
    model, _ = vit.load(path, **options)
    got = model(images)
    assert got.shape == expected.shape
    return (got - expected).abs().max().item()


def test_every_family_has_a_golden_file():
    assert {path.stem for path in GOLDEN} == set(references.FAMILIES)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, tmp_path):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        options = json.loads(file.metadata()["golden"])["options"]
    images, expected = tensors.pop("golden.input"), tensors.pop("golden.output")
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pth")
    assert expected.abs().mean() > 0.05
    for name in ("w.safetensors", "w.pth"):
        assert difference(tmp_path / name, expected, images, **options) < LIMIT


@pytest.mark.parametrize("name", references.FAMILIES)
def test_live(name, tmp_path):
    pytest.importorskip({"hf": "transformers", "open": "open_clip"}.get(name.split("_")[0], "timm"))
    state, reference, options = references.FAMILIES[name]()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    images = references.images()
    with torch.no_grad():
        expected = reference(images)
    assert difference(tmp_path / "w.safetensors", expected, images, **options) < LIMIT


TIMM = [name for name, backbone in vit.BACKBONES.items() if backbone.repo.startswith("timm/")]


@pytest.mark.parametrize("name", TIMM)
def test_table_shapes(name):
    """Each row's repository names a timm model of that very shape, normalisation and interpolation."""
    timm, row = pytest.importorskip("timm"), vit.BACKBONES[name]
    with torch.device("meta"):
        theirs = timm.create_model(row.repo.removeprefix("timm/"), num_classes=0)
        ours = vit.ViT(row.at(theirs.pretrained_cfg["input_size"][-1]).config)
    cfg = theirs.pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"]) == (*row.norm, "bicubic")
    assert (theirs.blocks[0].attn.num_heads, theirs.norm.eps) == (row.config.heads, row.config.eps)
    shapes = [{key: value.shape for key, value in model.state_dict().items() if key != "pos_embed"} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [name for name in TIMM if "_l" not in name])
def test_table_against_timm(name, tmp_path):
    timm, row = pytest.importorskip("timm"), vit.BACKBONES[name]
    model = references.randomise(timm.create_model(row.repo.removeprefix("timm/"), num_classes=0, img_size=224))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    assert difference(tmp_path / "w.safetensors", expected, images, name=name) < LIMIT


@pytest.mark.parametrize(("name", "architecture"), [("clip_b32", "ViT-B-32-quickgelu"), ("clip_b16", "ViT-B-16-quickgelu"),
                                                    ("clip_l14", "ViT-L-14-quickgelu"), ("clip_b32_laion", "ViT-B-32")])
def test_table_against_open_clip(name, architecture, tmp_path):
    open_clip, row = pytest.importorskip("open_clip"), vit.BACKBONES[name]
    model = references.randomise(open_clip.create_model(architecture))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.encode_image(images)
    assert (tuple(model.visual.image_mean), tuple(model.visual.image_std)) == row.norm
    assert difference(tmp_path / "w.safetensors", expected, images, name=name, head=True) < LIMIT


@pytest.mark.parametrize(("name", "architecture"), [("clip_b32_laion", "ViT-B-32"), ("clip_b16_laion", "ViT-B-16"),
                                                    ("clip_l14_laion", "ViT-L-14")])
def test_laion_in_open_clips_registry(name, architecture):
    """Repository and normalisation, and that it isn't QuickGELU; all else is as in OpenAI's of that size."""
    open_clip, row = pytest.importorskip("open_clip"), vit.BACKBONES[name]
    found = [open_clip.get_pretrained_cfg(architecture, tag) for tag in open_clip.list_pretrained_tags_by_model(architecture)]
    cfg, = (each for each in found if each.get("hf_hub", "").rstrip("/") == row.repo)
    assert ((*cfg["mean"],), (*cfg["std"],)) == row.norm
    assert not cfg.get("quick_gelu")
    assert replace(row.config, quick_gelu=True) == vit.BACKBONES[name.removesuffix("_laion")].config
