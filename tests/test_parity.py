"""vit.py against the libraries that published the weights.

Stored outputs of tiny networks (golden files), the same networks built live, and the table of
backbones at full size.
"""

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
LIBRARIES = {
    "timm": "timm",
    "facebook": "timm",
    "google": "timm",
    "torchvision": "torchvision",
    "hf": "transformers",
    "open": "open_clip",
}
TIMM = [name for name, backbone in vit.BACKBONES.items() if backbone.repo.startswith("timm/")]


@torch.inference_mode()
def difference(path, expected, images, **options):
    """The largest |ours - expected|, which `pytest -sv` shows."""
    model, _ = vit.load(path, **options)
    found = model(images)
    assert found.shape == expected.shape
    largest = (found - expected).abs().max().item()
    print(f"{largest:.1e} of {expected.abs().max():.1f}", end=" ")
    return largest


def large_image():
    """A random image of 224 px."""
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------- tiny networks


def test_every_family_has_a_golden_file():
    """Each family has a golden file, and there is no other golden file."""
    assert {path.stem for path in GOLDEN} == set(references.FAMILIES)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, tmp_path):
    """Golden tensors give the library's own output, from .safetensors and from .pth."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        options = json.loads(file.metadata()["golden"])["options"]
    images = tensors.pop("golden.input")
    expected = tensors.pop("golden.output")
    assert expected.abs().mean() > 0.05
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert difference(tmp_path / name, expected, images, **options) < LIMIT


@pytest.mark.parametrize("name", references.FAMILIES)
def test_live(name, tmp_path):
    """The same networks, built and run by the installed library, give the same outputs."""
    prefix, _, _ = name.partition("_")
    pytest.importorskip(LIBRARIES[prefix])
    state, reference, options = references.FAMILIES[name]()
    tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, tmp_path / "w.safetensors")
    images = references.images()
    with torch.no_grad():
        expected = reference(images)
    assert difference(tmp_path / "w.safetensors", expected, images, **options) < LIMIT


@pytest.mark.parametrize("name", [name for name in references.FAMILIES if "dinov3" in name])
@pytest.mark.parametrize("size", [16, 28, 64])
def test_rotary_positions_in_any_size(name, size, tmp_path):
    """Outputs are the library's for any image size, though no file holds rotary positions."""
    prefix, _, _ = name.partition("_")
    pytest.importorskip(LIBRARIES[prefix])
    state, reference, options = references.FAMILIES[name]()
    save_file(state, tmp_path / "w.safetensors")
    images = references.images(size=size)
    with torch.no_grad():
        expected = reference(images)
    limit = 1e-5 * expected.abs().max()
    options["image_size"] = size
    assert difference(tmp_path / "w.safetensors", expected, images, **options) < limit


# ------------------------------------------------------------------------ the table of backbones


def shapes_but_positions(model):
    """Our names and the shapes of all tensors except positions, which follow the image size."""
    with torch.device("meta"):  # as the model's
        tensors = vit.to_timm(model.state_dict()).tensors
    return {key: value.shape for key, value in tensors.items() if key != "pos_embed"}


@pytest.mark.parametrize("name", TIMM)
def test_table_shapes(name):
    """Each row has its timm model's shape, normalisation and interpolation."""
    timm = pytest.importorskip("timm")
    row = vit.BACKBONES[name]
    with torch.device("meta"):
        theirs = timm.create_model(row.repo.removeprefix("timm/"), num_classes=0)
        image_size = theirs.pretrained_cfg["input_size"][-1]
        ours = vit.ViT(row.at(image_size).config)
    published = theirs.pretrained_cfg
    assert (tuple(published["mean"]), tuple(published["std"])) == row.norm
    assert published["interpolation"] == "bicubic"
    assert theirs.blocks[0].attn.num_heads == row.config.heads
    assert theirs.norm.eps == row.config.eps
    assert shapes_but_positions(ours) == shapes_but_positions(theirs)
    assert row.config.rope == (theirs.pos_embed is None)


@pytest.mark.parametrize("name", [name for name in TIMM if "_l" not in name])
def test_table_against_timm(name, tmp_path):
    """At full size, features are timm's."""
    timm = pytest.importorskip("timm")
    architecture = vit.BACKBONES[name].repo.removeprefix("timm/")
    options = {"num_classes": 0, "img_size": 224, "global_pool": "token"}
    model = references.randomise(timm.create_model(architecture, **options))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    image = large_image()
    with torch.no_grad():
        expected = model(image)
    assert difference(tmp_path / "w.safetensors", expected, image, name=name) < LIMIT


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("clip_b32", "ViT-B-32-quickgelu"),
        ("clip_b16", "ViT-B-16-quickgelu"),
        ("clip_l14", "ViT-L-14-quickgelu"),
        ("clip_b32_laion", "ViT-B-32"),
    ],
)
def test_table_against_open_clip(name, architecture, tmp_path):
    """At full size, CLIP's embeddings and normalisation are open_clip's."""
    open_clip = pytest.importorskip("open_clip")
    model = references.randomise(open_clip.create_model(architecture))
    norm = (tuple(model.visual.image_mean), tuple(model.visual.image_std))
    assert norm == vit.BACKBONES[name].norm
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    image = large_image()
    with torch.no_grad():
        expected = model.encode_image(image)
    assert difference(tmp_path / "w.safetensors", expected, image, name=name, head=True) < LIMIT


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("clip_b32_laion", "ViT-B-32"),
        ("clip_b16_laion", "ViT-B-16"),
        ("clip_l14_laion", "ViT-L-14"),
    ],
)
def test_laion_in_open_clips_registry(name, architecture):
    """LAION's rows have open_clip's repository and normalisation, and differ in GELU only."""
    open_clip = pytest.importorskip("open_clip")
    row = vit.BACKBONES[name]
    found = []
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        published = open_clip.get_pretrained_cfg(architecture, tag)
        if published.get("hf_hub", "").rstrip("/") == row.repo:
            found.append(published)
    assert len(found) == 1
    assert (tuple(found[0]["mean"]), tuple(found[0]["std"])) == row.norm
    assert not found[0].get("quick_gelu")
    openai = vit.BACKBONES[name.removesuffix("_laion")]
    assert replace(row.config, quick_gelu=True) == openai.config
