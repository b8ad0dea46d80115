"""Loading: wrappers, strictness, inferring the shape, positions; `python vit.py`.

Parity with other libraries is in test_parity.py.
"""

import argparse
import datetime
import enum
import json
import pathlib
import pickle
import re
import shutil
import warnings
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import references
import torch
from conftest import ROOT, TINY, Evil, runner, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptertune
import vit

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DINOV3 = {"rope": True, "registers": 4, "layer_scale": True, "qkv_bias": False, "eps": 1e-5}


@pytest.fixture
def tensors(tiny_weights):
    """The tensors of the tiny backbone."""
    return load_file(tiny_weights)


def outputs(path, **options):
    """The output of a file's network for IMAGES."""
    model, _ = vit.load(path, **options)
    with torch.no_grad():
        return model(IMAGES)


def test_the_file_states_its_own_shape(tiny_weights):
    """A file with a configuration needs no option, and its network is in eval mode."""
    model, backbone = vit.load(tiny_weights)
    assert backbone.config.heads == 2
    assert backbone.config.hidden == 64
    assert backbone.norm == ((0.5,) * 3, (0.5,) * 3)
    assert model(IMAGES).shape == (2, 32)
    assert not model.training


# ------------------------------------------------------------------------------------ fast paths


@pytest.mark.parametrize("changes", [{}, DINOV3], ids=["plain", "dinov3"])
@pytest.mark.parametrize("reads", ["block", "raw", "ln", "mlp"])
def test_the_last_block_for_the_class_token_alone(tmp_path, reads, changes):
    """A last block that runs for the class token alone gives the same features and gradients."""
    model, _ = vit.load(write_tiny(tmp_path / "w.safetensors", seed=0, **changes))
    adaptertune.add_adapters(model, rank=2, reads=reads, init="small")
    x = model.embed(IMAGES)
    for block in model.blocks:
        x = block(x)
    plain = model.norm(x[:, 0])
    fast = model.features(IMAGES)
    assert torch.allclose(plain, fast, atol=1e-6)
    parameters = [each for name, each in model.named_parameters() if ".adapter." in name]
    weight = torch.linspace(-1, 1, plain.numel()).view_as(plain)
    expected = torch.autograd.grad((plain * weight).sum(), parameters)
    found = torch.autograd.grad((fast * weight).sum(), parameters)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"pool": "mean"}, {"registers": 2}], ids=str)
@pytest.mark.parametrize("method", ["adaptertune", "vpt"])
def test_all_tokens(tmp_path, method, changes):
    """tokens() gives class, registers and patches in this order, without prompts."""
    model, _ = vit.load(write_tiny(tmp_path / "w.safetensors", seed=0, **changes))
    adaptertune.adapt(model, method, 5)
    tokens = model.tokens(IMAGES)
    registers = changes.get("registers", 0)
    assert tokens.shape == (len(IMAGES), 1 + registers + 16, 32)
    assert torch.allclose(tokens, model.norm(model.run_blocks(IMAGES)))
    if "pool" in changes:
        patches = model.run_blocks(IMAGES)[:, 1:]
        assert torch.allclose(model.features(IMAGES), model.norm(patches.mean(dim=1)), atol=1e-6)
    else:
        assert torch.allclose(model.features(IMAGES), tokens[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 18, 18),  # the convolution would drop the remainder
        torch.zeros(2, 3, 8, 32),  # as many patches, but in other places
        torch.zeros(2, 16, 16, 3),
        torch.zeros(3, 16, 16),
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(2, 3, 16, 16, dtype=torch.int64),
    ],
    ids=lambda images: f"{list(images.shape)}-{images.dtype}",
)
def test_images_that_are_not_the_models(tiny_weights, images):
    """Images of a wrong shape or type are refused, even if torch would compute something."""
    model, _ = vit.load(tiny_weights)
    message = (
        f"images {list(images.shape)} of {images.dtype}: give normalised floats [B, 3, 16, 16]"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(images)


@pytest.mark.parametrize("queries", [None, 1])
def test_attention_in_bf16(queries):
    """Attention in bf16 and its gradient are fp32's, as closely as bf16 allows."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=draw) for _ in range(3))
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = vit.attend(inputs[0][:, :, :queries], *inputs[1:])
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        results[dtype] = [out.float(), *(x.float() for x in gradients)]
    for exact, rounded in zip(results[torch.float32], results[torch.bfloat16], strict=True):
        assert exact.shape == rounded.shape
        assert (exact - rounded).norm() < 0.02 * exact.norm()


# ------------------------------------------------------------------------------ rotary positions


def random_dinov3(**changes):
    """A random DINOv3 of 2 blocks for images of 16 px, with nothing near zero."""
    torch.manual_seed(0)
    model = vit.ViT(vit.Config(**TINY | DINOV3 | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return model.eval().requires_grad_(False)


def metas_layout(model):
    """A random_dinov3's tensors in Meta's layout, with biases and masks of zeros."""
    tensors = {}
    for key, value in model.state_dict().items():
        tensors[key.replace("reg_token", "storage_tokens")] = value
        if key.endswith("qkv.weight"):
            bias = key.replace("weight", "bias")
            tensors[bias] = torch.zeros(len(value))
            tensors[f"{bias}_mask"] = torch.zeros(len(value))
    tensors["mask_token"] = torch.zeros(1, 32)
    tensors["rope_embed.periods"] = torch.ones(4).bfloat16()
    return tensors


def test_rotary_positions():
    """Between patches of the same content, a score depends on their distance in rows and in columns
    only. Other tokens aren't rotated, even if they are behind the patches."""
    rope = vit.Rotary(vit.Config(**TINY | DINOV3))
    assert not rope.state_dict()
    tokens = 1 + 4 + 16 + 3
    x = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0)).expand(
        1, 2, tokens, 16
    )
    turned = rope(x)
    patches = turned[:, :, 5:21]
    assert torch.equal(turned[:, :, :5], x[:, :, :5])
    assert torch.equal(turned[:, :, 21:], x[:, :, 21:])
    assert torch.allclose(patches.norm(dim=3), x[:, :, 5:21].norm(dim=3))
    scores = (patches @ patches.transpose(2, 3)).view(2, 4, 4, 4, 4)  # rows, columns; twice
    assert torch.allclose(scores[:, 0, 1, 2, 3], scores[:, 1, 0, 3, 2], atol=1e-5)
    assert not torch.allclose(scores[:, 0, 1, 2, 3], scores[:, 0, 1, 3, 2], atol=1e-2)
    assert rope(x.bfloat16()).dtype == torch.bfloat16


def test_rotary_positions_leave_prompts_alone():
    """Prompts behind the patches act like registers, which aren't rotated either."""
    model = random_dinov3()
    adaptertune.add_prompts(model, prompts=5, deep=False)
    more = random_dinov3(registers=9)
    tensors = {key: value for key, value in model.state_dict().items() if "prompts" not in key}
    prompts = model.blocks[0].prompts[None]
    more.load_state_dict(tensors | {"reg_token": torch.cat([model.reg_token, prompts], dim=1)})
    expected = more(IMAGES)
    assert torch.allclose(model(IMAGES), expected, atol=1e-5)
    assert expected.abs().max() > 0.1


def test_rotary_positions_can_be_traced():
    """torch.export can trace rotary positions, with prompts and any batch size."""
    model = random_dinov3()
    adaptertune.add_prompts(model, prompts=5, deep=True)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=shapes).module()
    images = torch.cat([IMAGES, -IMAGES])
    assert torch.allclose(program(images), model(images), atol=1e-5)


def test_dinov3s_image_size_is_guessed(tmp_path, run):
    """DINOv3's image size, which no tensor tells, is reported as a guess, with its option."""
    save_file(random_dinov3().state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    _, backbone = vit.load(tmp_path / "w.safetensors")
    assert backbone.guessed["--image-size"] == "image size 224"
    assert re.search(
        r"guessed  image size 224: .*--image-size$", run(tmp_path / "w.safetensors"), re.M
    )


def test_dinov3_states_its_shape(tmp_path, monkeypatch):
    """A DINOv3 is recognised with or without its name; biases of zeros aren't part of it or of
    its fingerprint. A file that we write states its whole shape."""
    model = random_dinov3()
    backbone = vit.BACKBONES["dinov3_s16"]
    monkeypatch.setitem(vit.BACKBONES, "dinov3_s16", replace(backbone, config=model.config))
    layouts = {"timm": model.state_dict(), "meta": metas_layout(model)}
    for layout, tensors in layouts.items():
        path = tmp_path / f"{layout}.safetensors"
        save_file(tensors, path)
        for options in ({"name": "dinov3_s16"}, {"heads": 2, "image_size": 16}):
            loaded, backbone = vit.load(path, **options)
            assert backbone.config == model.config
            assert "--image-size" not in backbone.guessed
            assert adaptertune.fingerprint(loaded) == adaptertune.fingerprint(model)
            assert torch.equal(loaded(IMAGES), model(IMAGES))
    _, backbone = vit.load(path, heads=2)
    assert backbone.config.image_size == 224
    assert backbone.norm == vit.IMAGENET
    saved = write_tiny(tmp_path / "ours.safetensors", seed=0, **DINOV3 | {"qkv_bias": True})
    assert vit.load(saved)[1].config == replace(model.config, qkv_bias=True)


@pytest.mark.parametrize("layout", ["timm", "meta"])
def test_dinov3_is_whole(layout, tmp_path, monkeypatch):
    """A missing tensor of a DINOv3 is named, and so is an unexpected one."""
    model = random_dinov3()
    backbone = vit.BACKBONES["dinov3_s16"]
    monkeypatch.setitem(vit.BACKBONES, "dinov3_s16", replace(backbone, config=model.config))
    whole = model.state_dict() if layout == "timm" else metas_layout(model)
    path = tmp_path / "w.safetensors"
    for key in model.state_dict():
        tensors = dict(whole)
        del tensors[key.replace("reg_token", "storage_tokens") if layout == "meta" else key]
        save_file(tensors, path)
        if key == "patch_embed.proj.weight":
            message = "not a ViT in a known layout"
        else:
            message = f"1 missing: {key}$"
        with pytest.raises(ValueError, match=message):
            vit.load(path, name="dinov3_s16")
    save_file(whole | {"pos_embed": torch.zeros(1, 17, 32)}, path)
    with pytest.raises(ValueError, match="1 left over: pos_embed$"):
        vit.load(path, name="dinov3_s16")
    bias = {"blocks.0.attn.qkv.bias": torch.ones(96), "blocks.0.attn.qkv.bias_mask": torch.ones(96)}
    save_file(whole | bias, path)
    with pytest.raises(ValueError, match="left over: blocks.0.attn.qkv.bias"):
        vit.load(path, name="dinov3_s16")


def test_a_network_without_its_positions_is_no_dinov3(tmp_path):
    """Networks that lost their positions aren't taken for a DINOv3: one without registers or
    LayerScale, or a DINOv2, whose keys have a bias."""
    reg = {"registers": 4, "layer_scale": True}
    for changes in ({"qkv_bias": False}, {"registers": 4, "qkv_bias": False}, reg):
        path = write_tiny(tmp_path / "w.safetensors", seed=0, **changes)
        tensors = load_file(path)
        del tensors["pos_embed"]
        if changes is reg:
            tensors["blocks.0.attn.qkv.bias"] += 0.1
        save_file(tensors, path)
        with pytest.raises(ValueError, match="not a whole ViT: missing pos_embed"):
            vit.load(path, heads=2)


def test_more_patches_than_any_image_has():
    """A size that would take hours and gigabytes is refused, however small the network is."""
    shape = {"width": 8, "depth": 1, "heads": 1, "patch": 4}
    vit.Config(**shape, image_size=1024)
    vit.Config(**shape | {"patch": 1}, image_size=300, causal=True)  # a text of 300 tokens
    with pytest.raises(ValueError, match="image size 1028 is over 256 patches of 4"):
        vit.Config(**shape, image_size=1028)


def test_rotary_positions_that_can_not_be(tmp_path):
    """Rotary positions are refused if a head's channels aren't a multiple of 4, for more patches
    than any image has, and if the file beside the weights states another base than DINOv3's."""
    path = tmp_path / "w.safetensors"
    save_file(random_dinov3().state_dict(), path)
    with pytest.raises(ValueError, match="heads of 2 channels can't have rotary positions"):
        vit.load(path, heads=16)
    with pytest.raises(ValueError, match="image size 1028 is over 256 patches of 4"):
        vit.load(path, heads=2, image_size=1028)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "rope_theta": 10.0}))
    with pytest.raises(
        ValueError, match="config.json, .* states the base 10.0 of rotary positions"
    ):
        vit.load(path, heads=2)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "rope_theta": 100.0}))
    vit.load(path, heads=2)


# --------------------------------------------------------------------------------------- wrappers


def in_model(tensors):
    """DeiT's and MAE's wrapper."""
    return {"model": tensors, "optimizer": {"lr": 1.0}}


def in_state_dict(tensors):
    return {"state_dict": tensors, "epoch": 3}


def in_teacher(tensors):
    """DINO's wrapper, with its projection head."""
    teacher = {f"backbone.{key}": value for key, value in tensors.items()}
    teacher["head.mlp.0.weight"] = torch.zeros(3, 3)
    teacher["head.last_layer.weight_g"] = torch.zeros(3, 1)
    return {"teacher": teacher}


def with_decoder(tensors):
    """MAE as pretrained, with its decoder."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
    }
    return {"model": tensors | decoder}


def distributed(tensors):
    """DistributedDataParallel's prefix."""
    return {f"module.{key}": value for key, value in tensors.items()}


def in_lightning(tensors):
    """Lightning's checkpoint: the network as a member, beside its loss and its metrics."""
    network = {f"model.{key}": value for key, value in tensors.items()}
    other = {"criterion.weight": torch.zeros(3), "train_acc.tp": torch.zeros((), dtype=torch.long)}
    return {"state_dict": network | other, "hyper_parameters": {"lr": 0.1}}


def in_three(tensors):
    """A dictionary in a dictionary in a dictionary, where `model` is the configuration."""
    compiled = {f"module._orig_mod.{key}": value for key, value in tensors.items()}
    return {"model": {"depth": 2}, "saved": {"params": {"encoder": compiled}}}


def with_a_head(tensors):
    """A user's own classifier beside a prefixed backbone."""
    network = {f"backbone.{key}": value for key, value in tensors.items() if "head" not in key}
    return {"net": network | {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}}


def in_chunks(tensors):
    """DINOv2's blocks in chunks: keys have the number of the chunk, and of the block among all."""
    return {
        key.replace("blocks.1.", "blocks.0.1.")
        .replace("blocks.0.n", "blocks.0.0.n")
        .replace("blocks.0.a", "blocks.0.0.a")
        .replace("blocks.0.m", "blocks.0.0.m"): value
        for key, value in tensors.items()
    }


def with_arguments(tensors):
    """Training arguments, numpy numbers and paths beside the tensors, as in DeiT, MAE and DINO."""
    arguments = argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("x").name)
    arguments.made = [torch.__version__, datetime.datetime(2024, 1, 1)]
    return {
        "model_state_dict": tensors,
        "args": arguments,
        "path": [pathlib.Path("runs"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")],
        "best": np.float64(0.5),
        "random": np.random.get_state(),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }


WRAPPERS = [in_model, in_state_dict, in_teacher, with_decoder, distributed]
WRAPPERS += [in_lightning, in_three, with_a_head, with_arguments, in_chunks]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers(tensors, tiny_weights, tmp_path, wrap):
    """The network is found inside the wrappers of published files."""
    torch.save(wrap(tensors), tmp_path / "w.pth")
    assert torch.equal(outputs(tmp_path / "w.pth", heads=2), outputs(tiny_weights))


def test_arrays_of_numpy_alone(tensors, tmp_path):
    """A state dict of numpy's arrays, which are skipped, is refused."""
    arrays = {key: value.numpy() for key, value in tensors.items()}
    torch.save({"model": arrays}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match="its tensors begin with nothing: it holds no torch.Tensor"
    ):
        vit.load(tmp_path / "w.pth")
    arrays["blocks.0.norm1.bias"] = np.array([object()])
    torch.save({"model": arrays}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="more than tensors .*: refused, since a pickle can run"):
        vit.load(tmp_path / "w.pth")


def test_keys_that_do_not_count(tensors, tiny_weights, tmp_path):
    """iBOT's token for masked patches and the layer before timm's older heads are left out."""
    tensors["masked_embed"] = torch.zeros(1, 32)
    tensors["pre_logits.fc.weight"] = torch.zeros(32, 32)
    tensors["pre_logits.fc.bias"] = torch.zeros(32)
    save_file(tensors, tmp_path / "w.safetensors")
    assert torch.equal(outputs(tmp_path / "w.safetensors", heads=2), outputs(tiny_weights))


def test_without_the_bias_of_patches(tensors, clip, tmp_path):
    """Of all families only CLIP's has no bias in its patch embedding; in others it is missing."""
    del tensors["patch_embed.proj.bias"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="not a whole ViT: missing patch_embed.proj.bias"):
        vit.load(tmp_path / "w.safetensors", heads=2)
    assert not vit.load(clip)[0].config.patch_bias


def test_what_is_left_out_is_named(tensors, tmp_path):
    """Tensors beside a prefixed backbone are left out, and named as in the file."""
    torch.save(in_lightning(tensors), tmp_path / "w.pth")
    _, backbone = vit.load(tmp_path / "w.pth", heads=2)
    assert backbone.note == "left out: criterion.weight, train_acc.tp"
    wrong = {f"module.{key}": value for key, value in tensors.items()}
    save_file(wrong | {"module.mystery": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="1 left over: module.mystery$"):
        vit.load(tmp_path / "w.safetensors", heads=2)
    tensors["pos_embed.pos_embedding"] = tensors.pop("pos_embed")
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="missing pos_embed; .* it has .*pos_embed.pos_embedding"):
        vit.load(tmp_path / "w.safetensors", heads=2)


def test_biases_and_scales_of_other_names(tensors, tmp_path):
    """BEiT's biases for queries and values only, and DeiT III's gammas, are read."""
    q, v, gamma = torch.randn(3, 32)
    for i in range(2):
        del tensors[f"blocks.{i}.attn.qkv.bias"]
        tensors[f"blocks.{i}.attn.q_bias"] = q.clone()
        tensors[f"blocks.{i}.attn.v_bias"] = v.clone()
        for j in (1, 2):  # the second block's as in open_clip
            name = f"blocks.1.ls_{j}.gamma" if i else f"blocks.0.gamma_{j}"
            tensors[name] = j * gamma
    save_file(tensors, tmp_path / "w.safetensors")
    model, _ = vit.load(tmp_path / "w.safetensors", heads=2)
    assert torch.equal(model.blocks[1].attn.qkv.bias, torch.cat([q, torch.zeros(32), v]))
    assert torch.equal(model.blocks[1].ls2.gamma, 2 * gamma)


def test_older_names_of_torchvision(tmp_path):
    """torchvision's names until 2022, linear_1 and linear_2, and a head of layers are accepted."""
    pytest.importorskip("torchvision")
    state, model, options = references.torchvision_vit()
    older = {}
    for name, value in state.items():
        name = name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        older[name.replace("heads.head.", "heads.1.")] = value
    older["heads.0.weight"] = torch.zeros(32, 32)
    save_file(older, tmp_path / "w.safetensors")
    model.heads = torch.nn.Identity()
    with torch.no_grad():
        expected = model(IMAGES)
    assert torch.allclose(outputs(tmp_path / "w.safetensors", heads=2), expected, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_relative_positions(shared, tmp_path):
    """BEiT's biases by relative position, in each block or shared, are refused by name."""
    beit = pytest.importorskip("timm").models.beit.Beit
    options = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
    model = beit(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, **options)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    message = "relative_position_bias_table: a ViT with relative positions .* can't be used"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.safetensors", heads=2)


@pytest.mark.parametrize(
    ("better", "other"),
    [("state_dict_ema", "state_dict"), ("teacher", "student"), ("model.ema", "model.online")],
)
def test_of_several_networks_the_averaged_one(better, other, tensors, tiny_weights, tmp_path):
    """The EMA or the teacher is loaded, though it comes last, and a note names both networks."""
    worse = {key: torch.zeros_like(value) for key, value in tensors.items()}
    content = {}
    for name, network in ((other, worse), (better, tensors)):
        *outer, last = name.split(".")
        place = content
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = network
    torch.save(content, tmp_path / "w.pth")
    model, backbone = vit.load(tmp_path / "w.pth", heads=2)
    assert torch.equal(model.eval()(IMAGES), outputs(tiny_weights))
    assert backbone.note == f"{better} of w.pth; it also holds {other}"


def test_safetensors_in_several_parts(tensors, tiny_weights, tmp_path):
    """The index of sharded safetensors leads to all its parts."""
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in (("w-1.safetensors", names[:9]), ("w-2.safetensors", names[9:])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / part)
        weight_map |= dict.fromkeys(chosen, part)
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(outputs(index, heads=2), outputs(tiny_weights))


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_a_grid_that_is_not_square(layout, tmp_path):
    """A class token and a grid of 2 x 4 have as many positions as a grid of 3 x 3 without a class
    token, as DeiT III has; only networks with LayerScale are taken for such."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, layer_scale=True)
    tensors = load_file(path)
    tensors["pos_embed"] = torch.zeros(1, 1 + 2 * 4, 32)
    save_file(tensors, path)
    assert vit.load(path, heads=2)[0].config.grid == 3
    plain = {key: value for key, value in tensors.items() if ".ls" not in key}
    if layout == "huggingface":
        transformers = pytest.importorskip("transformers")
        shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.ViTConfig(
            image_size=(8, 16), patch_size=4, num_hidden_layers=1, **shape
        )
        plain = transformers.ViTModel(config).state_dict()
    save_file(plain, path)
    beside = tmp_path / "config.json"
    for stated in (None, {"image_size": 16}, {"pretrained_cfg": {"input_size": None}}):
        if stated:
            beside.write_text(json.dumps(stated))
        with pytest.raises(ValueError, match="9 positions, which is no square grid of patches"):
            vit.load(path, heads=2)
    for stated in ({"pretrained_cfg": {"input_size": [3, 12, 12]}}, {"image_size": 12}):
        beside.write_text(json.dumps(stated))  # so the class token has no position (FlexiViT)
        assert vit.load(path, heads=2)[0].config.grid == 3


def test_flexivit(tmp_path):
    """timm's FlexiViT has neither LayerScale nor a position for its class token."""
    timm = pytest.importorskip("timm")
    shape = {"embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "depth": 1, "num_classes": 0}
    model = timm.create_model("flexivit_small", **shape, img_size=96).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="36 positions, .* FlexiViT, put timm's config.json"):
        vit.load(tmp_path / "w.safetensors", heads=2)
    stated = {"architecture": "flexivit_small", "pretrained_cfg": {"input_size": [3, 96, 96]}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    images = torch.randn(2, 3, 96, 96)
    loaded, _ = vit.load(tmp_path / "w.safetensors", heads=2)
    assert torch.allclose(loaded(images), model(images), atol=1e-5)


def test_a_loras_classifier_for_dinov3():
    """A classifier that a LoRA brings to a DINOv3 reads the mean of the patches, like its own."""
    brought = SimpleNamespace(names={}, tensors={"head.weight": torch.ones(5, 32)})
    rotary = vit.Config(**TINY | DINOV3)
    assert "mean of the normalised patches" in vit.unfit_classifier(brought, {}, rotary)
    assert not vit.unfit_classifier(brought, {}, vit.Config(**TINY))


def test_what_timms_classifier_reads(tensors, tmp_path):
    """The classifier of timm's `global_pool` "avg" without fc_norm doesn't read ViT.features."""
    path = tmp_path / "w.safetensors"
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps({"architecture": "vit_tiny", "global_pool": "avg"}))
    save_file(tensors, path)
    assert not vit.load(path, heads=2, head=True)[1].note  # it has no classifier
    save_file(tensors | {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}, path)
    for pool, outputs in (("token", 5), ("avg", 32)):
        beside.write_text(json.dumps({"architecture": "vit_tiny", "global_pool": pool}))
        model, backbone = vit.load(path, heads=2, head=True)
        assert model(IMAGES).shape[1] == outputs
        assert ("left out: its classifier, which reads" in backbone.note) == (pool == "avg")
    mean = load_file(write_tiny(tmp_path / "mean.safetensors", seed=0, pool="mean"))
    mean = {re.sub("^norm", "fc_norm", key): value for key, value in mean.items()}
    save_file(mean | {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}, path)
    assert vit.load(path, heads=2, head=True)[0](IMAGES).shape[1] == 5


def test_a_stated_eps_of_open_clip(tmp_path):
    """open_clip's norm_kwargs state the eps of the image tower."""
    path = save_bare(tmp_path / "w.safetensors", width=128, norm_pre=True)
    vision = {"width": 128, "norm_kwargs": {"eps": 1e-3}}
    beside = tmp_path / "open_clip_config.json"
    beside.write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    assert vit.load(path)[0].norm.eps == 1e-3


def test_other_networks_in_the_file(tensors, tiny_weights, tmp_path):
    """A conv1 beside the ViT (Depth Anything) doesn't make it an OpenAI CLIP, a head's batch norm
    (MAE's linear probe) no hybrid, and a counter no quantised network."""
    model, _ = vit.load(tiny_weights)
    beside = {f"pretrained.{key}": value for key, value in tensors.items()}
    beside["depth_head.scratch.refinenet1.resConfUnit1.conv1.weight"] = torch.zeros(4, 4, 3, 3)
    probe = dict(tensors, step=torch.tensor(7))
    probe["head.0.running_mean"] = torch.zeros(32)
    probe["head.0.num_batches_tracked"] = torch.tensor(7)
    probe["head.1.weight"] = torch.zeros(5, 32)
    for content in (beside, probe):
        torch.save(content, tmp_path / "w.pth")
        loaded, _ = vit.load(tmp_path / "w.pth", heads=2)
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_image_towers_that_are_no_vit(tmp_path):
    """A CLIP with a ResNet, or SigLIP, isn't said to be a text tower alone."""
    both = {"visual.conv1.weight": torch.zeros(4, 3, 3, 3), "visual.bn1.weight": torch.zeros(4)}
    save_file(both | {"token_embedding.weight": torch.zeros(9, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="its image tower is no ViT with a class token"):
        vit.load(tmp_path / "w.safetensors")


def test_norm_beside_fc_norm(tmp_path):
    """A file with two final norms is refused, since one of them would be lost."""
    path = write_tiny(tmp_path / "mean.safetensors", seed=0, pool="mean")
    both = load_file(path)
    both |= {f"fc_{key}": 2 * value for key, value in both.items() if key.startswith("norm.")}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="2 left over: fc_norm"):
        vit.load(tmp_path / "both.safetensors", heads=2)


def test_what_a_file_is_instead(tensors, tmp_path):
    """A folder, LoRA adapters and positions of a non-square image are refused as what they are."""
    with pytest.raises(ValueError, match="is a folder; give the .safetensors or .pth file in it"):
        vit.load(tmp_path)
    save_file({"x.lora_A.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="these are LoRA adapters, .* by --init-lora"):
        vit.load(tmp_path / "lora.safetensors")
    tensors["pos_embed"] = torch.zeros(1, 1 + 8 * 4, 32)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="33 positions, which is no square grid"):
        vit.load(tmp_path / "wide.safetensors", heads=2)


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}, 0.4, 0.2),
        ({"image_mean": [102] * 3, "image_std": [51] * 3, "do_rescale": False}, 0.4, 0.2),
        ({"image_mean": [0.8] * 3, "image_std": [0.4] * 3, "rescale_factor": 2 / 255}, 0.4, 0.2),
        ({"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "do_normalize": False}, 0.0, 1.0),
    ],
)
def test_a_stated_normalisation(stated, mean, std, tmp_path):
    """A stated mean and std become those of pixels from 0 to 1, whichever steps the description
    leaves out; it may begin with a byte order mark."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    text = json.dumps(stated)
    (tmp_path / "preprocessor_config.json").write_text(text, encoding="utf-8-sig")
    _, backbone = vit.load(path)
    assert backbone.norm == (pytest.approx((mean,) * 3), pytest.approx((std,) * 3))
    assert backbone.guessed == {"--heads": "heads 2"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "preprocessor_config.json",
            {"image_mean": [123.7, 116, 104]},
            r"mean \[123.7, 116, 104\]",
        ),
        ("preprocessor_config.json", {"image_std": [0, 0.2, 0.2]}, "from 0.001 to 1"),
        ("preprocessor_config.json", {"image_mean": [float("nan")] * 3}, "from 0 to 1"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "three numbers from 0 to 1"),
        ("preprocessor_config.json", {"image_std": 0.5}, "std 0.5: give three numbers"),
        ("open_clip_config.json", {"model_cfg": 5}, "'int' object has no attribute 'get'"),
        ("config.json", [1], "it is no dictionary"),
        ("config.json", {"hidden_size": "128"}, "it states the width '128'"),
        ("config.json", {"num_attention_heads": 7}, "it states 7 attention heads, for the width"),
        ("config.json", {"num_attention_heads": 0}, "it states 0 attention heads"),
        ("config.json", {"num_attention_heads": True}, "it states True attention heads"),
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"head_width": 0}}}, "by zero"),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5] * 3, "rescale_factor": 0},
            "division by zero",
        ),
    ],
)
def test_descriptions_that_can_not_be(name, content, message, tmp_path):
    """Invalid values in a description are refused, and the error names its file."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        vit.load(path)
    assert f"{name} can't be used (" in str(error.value)
    assert str(error.value).endswith("; correct it, or remove it from beside the weights")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"hidden_act": "relu"}, "the activation 'relu', not gelu or quick_gelu"),
        ({"rope_theta": 10.0}, "the base 10.0 of rotary positions, not 100"),
        (
            {"architecture": "vit_small_patch16_rope_ape_224"},
            "the architecture vit_small_patch16_rope_ape_224, whose rotary positions aren't",
        ),
        (
            {"architecture": "eva02_enormous_patch14_clip_224"},
            "the architecture eva02_enormous_patch14_clip_224, whose norms follow attention",
        ),
        ({"image_size": [16, 32]}, "images of 16 x 32 pixels, which aren't square"),
        (
            {"vision_config": {"image_size": [16, 32], "num_attention_heads": 2}},
            "images of 16 x 32",
        ),
        ({"model_cfg": {"vision_cfg": {"image_size": [16, 32]}}}, "images of 16 x 32 pixels"),
        ({"model_args": {"img_size": [16, 32]}}, "images of 16 x 32 pixels"),
        ({"model_args": {"act_layer": "relu"}}, "the activation 'relu'"),
        (
            {"model_cfg": {"vision_cfg": {"timm_model_name": "eva02_enormous_patch14_clip_224"}}},
            "the architecture eva02_enormous_patch14_clip_224",
        ),
        ({"global_pool": "max"}, "the pooling 'max' of patches"),
        ({"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}, "pool_type 'avg', not 'tok'"),
        (
            {"model_cfg": {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}},
            r"act_kwargs \{'approximate': 'tanh'\}, not ",
        ),
    ],
)
def test_networks_that_only_a_description_tells(content, message, tmp_path):
    """The error doesn't advise removing the description: the network would load as another one."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"config.json, .* states {message}") as error:
        vit.load(path)
    assert str(error.value).endswith(": it can't be used")


@pytest.mark.parametrize("width", [1152, 64])
def test_a_tower_of_timm_in_open_clip(width, tmp_path):
    """open_clip's description of a timm tower states no heads: TIPSv2's SO400M has 16, not 18 of 64
    channels. The error for a SigLIP says that it has no class token."""
    path = save_bare(tmp_path / "w.safetensors", width=width)
    vision = {"timm_model_name": "vit_so400m_patch14_reg1_tipsv2", "timm_pool": "token"}
    content = {"model_cfg": {"vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    _, backbone = vit.load(path)
    assert backbone.config.heads == {1152: 16, 64: 1}[width]
    assert "--heads" in backbone.guessed
    tensors = load_file(path)
    del tensors["cls_token"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="missing cls_token .*as SigLIP's, can't be used"):
        vit.load(path)


def test_what_timm_states(tmp_path):
    """Heads are read from timm's model_args, and only what is missing is called a guess."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    stated = {
        "model_args": {"num_heads": 8, "embed_dim": 128},
        "pretrained_cfg": {"mean": [0.5] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    _, backbone = vit.load(path)
    assert backbone.config.heads == 8
    assert backbone.guessed == {"--std": "ImageNet's std"}
    assert backbone.source == {"heads": "config.json", "mean": "config.json", "std": "guessed"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.25] * 3}))
    _, backbone = vit.load(path)
    assert backbone.source["heads"] == "config.json"
    assert backbone.source["std"] == "preprocessor_config.json"


@pytest.mark.parametrize(
    ("architecture", "tag", "quick_gelu"),
    [
        ("vit_base_patch16_clip_224", "laion2b_ft_in12k_in1k", False),
        ("vit_base_patch16_clip_quickgelu_224", "openai", True),
        ("vit_base_patch16_clip_quickgelu_224", "dfn2b", True),
        ("vit_base_patch16_clip_224", "openai", None),
    ],
)
def test_activation_that_timms_name_states(architecture, tag, quick_gelu, tmp_path):
    """A timm CLIP with GELU isn't taken for OpenAI's, which timm has under both names."""
    path = save_bare(tmp_path / "w.safetensors", width=128, norm_pre=True)
    stated = {"architecture": architecture, "pretrained_cfg": {"tag": tag, **HALF_NORM}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    _, backbone = vit.load(path)
    assert backbone.config.quick_gelu == (quick_gelu is not False)
    assert ("--mlp-act" in backbone.guessed) == (quick_gelu is None)


def test_files_of_another_kind_than_their_name(tensors, tiny_weights, tmp_path):
    """safetensors are recognised by their content; a pointer of Git LFS, one part of several and
    quantised weights are refused as what they are."""
    expected = outputs(tiny_weights)
    for name in ("w.pth", "w", "w.bin"):
        shutil.copy(tiny_weights, tmp_path / name)
        assert torch.equal(outputs(tmp_path / name), expected)
    torch.save(tensors, tmp_path / "pickled.safetensors")
    model, _ = vit.load(tmp_path / "pickled.safetensors", heads=2)
    assert torch.equal(model.cls_token, tensors["cls_token"])

    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1")
    with pytest.raises(ValueError, match="a pointer of Git LFS, not the file: `git lfs pull`"):
        vit.load(tmp_path / "lfs.safetensors")
    part = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"cls_token": tensors["cls_token"]}, part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"cls_token": part.name, "x": "model-2.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"one part of several; give .*index\.json"):
        vit.load(part)
    with pytest.raises(
        ValueError, match="model-2.safetensors is missing, or no file; .*index.json lists"
    ):
        vit.load(index)
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "int8.safetensors")
    with pytest.raises(ValueError, match="fc1.weight holds torch.int8, not .*; quantised weights"):
        vit.load(tmp_path / "int8.safetensors", heads=2)


def test_a_hybrid_with_a_resnet(tensors, tmp_path):
    """A ViT on a ResNet is refused for its batch norms, not for quantised weights."""
    tensors["patch_embed.backbone.bn1.num_batches_tracked"] = torch.tensor(3)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="bn1.num_batches_tracked: a ViT with batch norms"):
        vit.load(tmp_path / "w.safetensors", heads=2)


def test_kinds_of_files_that_are_not_read(tmp_path):
    """Files of other kinds are called what they are, not damaged."""
    np.save(tmp_path / "array.npy", np.zeros(3))
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    (tmp_path / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "llama.gguf").write_bytes(b"GGUF\x03")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    kinds = {
        "pytorch_model.bin.index.json": "the index of pickles in several parts",
        "array.npy": "a single array of numpy",
        "program.pt2": "a program of torch.export",
        "graph.onnx": "an ONNX graph",
        "keras.h5": "an HDF5 file",
        "llama.gguf": "a GGUF file",
    }
    for name, kind in kinds.items():
        with pytest.raises(ValueError, match=f"{name} is {kind}.*; give a .safetensors or .pth"):
            vit.load(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        {"architecture": "vit", "model_args": {"act_layer": None, "img_size": None}},
        {"architecture": "vit", "model_args": {"act_layer": "GELU"}, "global_pool": None},
        {"pretrained_cfg": {"input_size": None, "mean": None}},
        {"model_cfg": {"vision_cfg": {"act_kwargs": {"approximate": "none"}, "pool_type": None}}},
        {"model_cfg": {"vision_cfg": {"act_kwargs": {}, "norm_kwargs": None}}},
        {"image_size": [16, 16], "hidden_act": "gelu"},
        {"vision_config": None, "hidden_act": None, "image_size": []},
        {"model_cfg": {"vision_cfg": {"head_width": None}}},
        {"pretrained_cfg": {"input_size": [3]}},
    ],
    ids=str,
)
def test_descriptions_that_state_defaults(content, tmp_path):
    """Nulls and default values in a description are no reason to refuse a network."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    expected = vit.load(path)[1].config
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert vit.load(path)[1].config == expected


def test_names_that_only_begin_like_an_average(tensors, tmp_path):
    """A "swag_model" isn't SWA's."""
    other = {key: value + 1 for key, value in tensors.items()}
    torch.save({"model": tensors, "swag_model": other}, tmp_path / "w.pth")
    model, _ = vit.load(tmp_path / "w.pth", heads=2)
    assert torch.equal(model.cls_token, tensors["cls_token"])


@pytest.mark.parametrize("names", [("student", "teacher"), ("module.model", "module.swa_model")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_two_networks_in_one_dictionary(tensors, names, suffix, tmp_path):
    """Of two networks in one dictionary, the averaged one is loaded, and a note says so."""
    both = {f"{names[0]}.{key}": value + 1 for key, value in tensors.items()}
    both |= {f"{names[1]}.{key}": value for key, value in tensors.items()}
    path = tmp_path / f"both{suffix}"
    (torch.save if suffix == ".pth" else save_file)(both, path)
    model, backbone = vit.load(path, heads=2)
    assert torch.equal(model.cls_token, tensors["cls_token"])
    first, second = (name.removeprefix("module.") for name in names)
    assert backbone.note == f"{second} of both{suffix}; it also holds {first}"


def test_two_encoders_of_moco(tensors, tmp_path):
    """The base encoder is loaded, as in MoCo v3's own evaluation; a note names the other one."""
    both = {f"module.base_encoder.{key}": value for key, value in tensors.items()}
    both |= {f"module.momentum_encoder.{key}": value + 1 for key, value in tensors.items()}
    torch.save({"state_dict": both}, tmp_path / "moco.pth")
    model, backbone = vit.load(tmp_path / "moco.pth", heads=2)
    assert torch.equal(model.cls_token, tensors["cls_token"])
    begin = "module.momentum_encoder."
    first, second, third, *rest = tensors
    named = f"{begin}{first}, {begin}{second}, {begin}{third} and {len(rest)} more"
    assert backbone.note == f"left out: {named}"


def test_lora_that_was_not_merged(tensors, tmp_path):
    """A network whose matrices are beside an unmerged LoRA is refused."""
    for name in [name for name in tensors if name.endswith("qkv.weight")]:
        base = name.removesuffix("weight")
        tensors[f"{base}base_layer.weight"] = tensors.pop(name)
        tensors[f"{base}lora_A.default.weight"] = torch.zeros(2, 32)
        tensors[f"{base}lora_B.default.weight"] = torch.zeros(96, 2)
    save_file(tensors, tmp_path / "peft.safetensors")
    with pytest.raises(ValueError, match="its LoRA adapters aren't merged .*: peft's merge_and"):
        vit.load(tmp_path / "peft.safetensors", heads=2)


def test_stated_images_that_are_not_square(tiny_weights, tmp_path):
    """16 patches may be 4 x 4 or 8 x 2: a file whose stated images aren't square is refused."""
    stated = {"pretrained_cfg": {"input_size": [3, 32, 8], "mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    tensors = load_file(tiny_weights)
    save_file(tensors, tmp_path / "w.safetensors")  # without its own configuration
    with pytest.raises(ValueError, match="states images of 32 x 8 pixels, which aren't square: it"):
        vit.load(tmp_path / "w.safetensors", heads=2)


class Kind(enum.Enum):
    CHANNELS_FIRST = "NCHW"  # as in timm


class Scripted(torch.nn.Module):
    """Given tensors in nested modules, beside values of the kinds that torch.jit.script tags."""

    kind: Kind
    sizes: list[int]
    scales: list[float]
    flags: list[bool]
    tensors: list[torch.Tensor]
    numbers: dict[str, int]

    def __init__(self, tensors):
        super().__init__()
        self.kind = Kind.CHANNELS_FIRST
        self.sizes = [1, 2]
        self.scales = [0.5]
        self.flags = [True]
        self.tensors = [torch.zeros(1)]
        self.numbers = {"a": 1}
        for name, value in tensors.items():
            *places, last = name.split(".")
            module = self
            for place in places:
                if place not in dict(module.named_children()):
                    module.add_module(place, torch.nn.Module())
                module = getattr(module, place)
            module.register_buffer(last, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sizes[0] * self.scales[0] + len(self.tensors) + self.numbers["a"]


def test_torchscript_archives(tiny_weights, tmp_path):
    """A TorchScript archive (as OpenAI publishes CLIP) gives the tensors under its modules' names;
    one whose pickle would call something is refused."""
    model, _ = vit.load(tiny_weights)
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, IMAGES).save(path)
        torch.jit.script(Scripted(model.state_dict())).save(tmp_path / "scripted.pt")
    for file in (path, tmp_path / "scripted.pt"):
        loaded, _ = vit.load(file, heads=2)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name

    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(evil, "w") as copy:
        for name in archive.namelist():
            body = archive.read(name)
            if name.endswith("/data.pkl"):
                body = pickle.dumps(pathlib.Path.home, protocol=2)
            copy.writestr(name, body)
    with pytest.raises(ValueError, match="holds more than tensors"):
        vit.load(evil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tensors, value, tmp_path):
    """A single value that isn't finite is refused, with the name of its tensor."""
    tensors["blocks.1.mlp.fc2.weight"][3, 5] = value
    save_file(tensors, tmp_path / "w.safetensors")
    message = "1 with values that aren't finite: blocks.1.mlp.fc2.weight"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.safetensors", heads=2)


def test_half_precision_files_are_read_as_fp32(tensors, tmp_path):
    """A file in fp16 becomes a network in fp32."""
    halves = {key: value.half() for key, value in tensors.items()}
    save_file(halves, tmp_path / "w.safetensors")
    model, _ = vit.load(tmp_path / "w.safetensors", heads=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_mean_pooling_reads_fc_norm(tmp_path):
    """timm's fc_norm shows that the head reads the mean of the patches, and is that head's norm."""
    path = write_tiny(tmp_path / "mean.safetensors", seed=0, pool="mean")
    renamed = {}
    for key, value in load_file(path).items():
        name = f"fc_{key}" if key.startswith("norm.") else key
        renamed[name] = value
    save_file(renamed, tmp_path / "fc.safetensors")
    _, backbone = vit.load(tmp_path / "fc.safetensors", heads=2)
    assert backbone.config.pool == "mean"
    assert torch.equal(outputs(tmp_path / "fc.safetensors", heads=2), outputs(path))


# ----------------------------------------------------------------------------------- Google's .npz


@pytest.fixture
def arrays(tensors):
    """The tiny backbone as in Google's .npz, with a classifier of five classes."""
    tensors["head.weight"] = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    tensors["head.bias"] = torch.zeros(5)
    published = references.as_google(tensors, attention=1, mlp=3, norm2=2)
    published["Transformer/posembed_input/pos_embedding"] = tensors["pos_embed"]
    return {name: value.numpy() for name, value in published.items()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_google_npz(arrays, save, tiny_weights, tmp_path):
    """The network is the same; its kernels state the heads; mean and std 0.5 are guessed."""
    save(tmp_path / "w.npz", **arrays)
    model, backbone = vit.load(tmp_path / "w.npz")
    assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))
    assert backbone.config.heads == 2
    assert backbone.source["heads"] == "its kernels' shape"
    assert backbone.norm == vit.HALF
    assert backbone.guessed == {"--mean": "Inception's mean", "--std": "Inception's std"}
    assert vit.load(tmp_path / "w.npz", head=True)[0].head.out_features == 5


@pytest.mark.parametrize("prefix", ["opt/target/", "params/", "params/img/"])
def test_prefixes_in_an_npz(arrays, prefix, tiny_weights, tmp_path):
    """Prefixes of training states and image towers are removed; another array is named."""
    arrays = {f"{prefix}{name}": value for name, value in arrays.items()}
    np.savez(tmp_path / "w.npz", **arrays, step=np.array(7))
    assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))
    assert vit.load(tmp_path / "w.npz")[1].note == "left out: step"


@pytest.mark.parametrize(
    "state",
    ["opt/0/mu/", "opt_state/1/0/nu/params/", "train/opt.0.mu.", "adam/mu/", "momentum_buffer/"]
    + ["opt/state/", "opt_0/m/", "grads/", "slots/m/", "state/0/trace/params/", "velocity/"]
    + ["opt_state/0/acc_grads/params/", "opt_state/0/v/params/", "grads/params/", "momentum/"]
    + ["optimizer/m/", "optimiser/m/", "optim/v/", "optim_sgd/m/", "opt_states/v/", "optState/v/"]
    + ["optax_state/0/m/", "adam_m/", "adamw/m/", "gradients/", "grad_acc/", "opt/params_m/"],
)
def test_an_optimisers_state_in_an_npz(arrays, state, tiny_weights, tmp_path):
    """Moments, which have the network's names and come before it, aren't taken for the network,
    even if there is no other."""
    moments = {f"{state}{name}": np.full_like(value, 7) for name, value in arrays.items()}
    network = {f"params/{name}": value for name, value in arrays.items()}
    np.savez(tmp_path / "w.npz", **moments, **network)
    assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))
    target = {f"opt/target/{name}": value for name, value in arrays.items()}
    np.savez(tmp_path / "w.npz", **moments, **target)
    assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))
    np.savez(tmp_path / "w.npz", **moments)
    with pytest.raises(ValueError, match=rf"an optimiser's state, as it seems, alone \({state}\)"):
        vit.load(tmp_path / "w.npz")
    others = {f"params/b/{name}": value for name, value in arrays.items()}
    np.savez(tmp_path / "w.npz", **moments, **network, **others)
    message = rf"several networks \({state}, params/, params/b/\); save one network alone"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.npz")


def test_networks_in_an_npz(arrays, tiny_weights, tmp_path):
    """A network is found by its prefix alone, in a state that has one, beside an average of it, and
    beside a part that has an embedding but no blocks."""
    averaged = {f"ema/{name}": value for name, value in arrays.items()}
    np.savez(
        tmp_path / "w.npz", **{f"params/{name}": 2 * arrays[name] for name in arrays}, **averaged
    )
    assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))
    assert vit.load(tmp_path / "w.npz")[1].note == "ema of w.npz; it also holds params"
    found = ["optimized/", "optical/", "momentum_encoder/", "optimizer/target/", "adamw/params/"]
    for prefix in (*found, "opt/model/", "opt/0/params/", "gradual/"):
        alone = {f"{prefix}{name}": value for name, value in arrays.items()}
        np.savez(tmp_path / "w.npz", **alone)
        assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))
    inside = {f"opt/0/params/{name}": np.full_like(each, 7) for name, each in arrays.items()}
    np.savez(tmp_path / "w.npz", **inside, **alone)  # the network is the one outside of a state
    assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))
    del alone["gradual/Transformer/encoder_norm/scale"]
    np.savez(tmp_path / "w.npz", **alone)
    with pytest.raises(ValueError, match="1 missing: norm.weight"):
        vit.load(tmp_path / "w.npz")
    decoder = {"params/decoder/embedding/kernel": np.zeros((3, 3), "f4")}
    encoder = {"params/encoder/embedding/kernel": np.zeros((3, 3), "f4")}
    np.savez(tmp_path / "w.npz", **decoder, **encoder)
    with pytest.raises(ValueError, match="several networks .params/decoder/, params/encoder/"):
        vit.load(tmp_path / "w.npz")
    for prefix in ("params/encoder/", "params/VisionTransformer/"):
        encoder = {f"{prefix}{name}": value for name, value in arrays.items()}
        np.savez(tmp_path / "w.npz", **decoder, **encoder)
        assert torch.equal(outputs(tmp_path / "w.npz"), outputs(tiny_weights))


def test_bfloat16_in_an_npz(arrays, tmp_path):
    """bfloat16 arrays are read, though numpy has no bfloat16 and reads voids of two bytes."""
    kept = {}
    for name, value in arrays.items():
        halved = torch.tensor(value).bfloat16()
        arrays[name] = halved.float().numpy()
        kept[name] = halved.view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "float.npz", **arrays)
    np.savez(tmp_path / "void.npz", **kept)
    assert np.load(tmp_path / "void.npz")["cls"].dtype == "V2"
    assert torch.equal(outputs(tmp_path / "void.npz"), outputs(tmp_path / "float.npz"))


def test_heads_that_its_kernels_deny(arrays, tmp_path):
    """Kernels that differ from each other, or from the stated number of heads, are refused."""
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(ValueError, match="w.npz: its kernels have 2 heads, not 4"):
        vit.load(tmp_path / "w.npz", heads=4)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 1}))
    with pytest.raises(ValueError, match="its kernels have 2 heads, not 1"):
        vit.load(tmp_path / "w.npz")

    (tmp_path / "config.json").unlink()
    for each in ("query", "key", "value"):
        name = f"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/{each}"
        arrays[f"{name}/kernel"] = arrays[f"{name}/kernel"].reshape(32, 4, 8)
        arrays[f"{name}/bias"] = arrays[f"{name}/bias"].reshape(4, 8)
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(ValueError, match="its kernels have 2 heads, not 4"):
        vit.load(tmp_path / "w.npz")


def test_layers_of_an_npz_that_vit_has_not(arrays, tmp_path):
    """A pre-logits layer is part of the head; a repeated norm and a MAP head are refused."""
    layer = {"pre_logits/kernel": np.zeros((32, 32), "f4"), "pre_logits/bias": np.zeros(32, "f4")}
    np.savez(tmp_path / "w.npz", **arrays, **layer)
    for head in (False, True):
        model, backbone = vit.load(tmp_path / "w.npz", head=head)
        assert isinstance(model.head, torch.nn.Identity)
        assert ("classifier, which is more than a linear layer" in backbone.note) == head

    both = {"Transformer/encoderblock_0/LayerNorm_1/scale": np.ones(32, "f4")}
    np.savez(tmp_path / "w.npz", **arrays, **both)
    message = "block_0/LayerNorm_2/scale and .*block_0/LayerNorm_1/scale are both"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.npz")

    del arrays["cls"]
    np.savez(tmp_path / "w.npz", **arrays, **{"MAPHead_0/probe": np.zeros((1, 1, 32), "f4")})
    message = r"missing cls_token \(one whose head pools all patches, as SigLIP's, can't be used\)"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.npz")


def test_npz_files_that_are_refused(arrays, tmp_path):
    """Truncated, damaged or bomb-like .npz files, pickled objects and 2,000 blocks are refused."""
    path = tmp_path / "w.npz"
    np.savez(path, **arrays)
    content = path.read_bytes()
    for kept in (0.01, 0.5, 0.99):
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(ValueError, match="w.npz (is damaged or cut short|holds no tensors)"):
            vit.load(path)
    place = len(content) // 2
    path.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
    with pytest.raises(ValueError, match="w.npz is damaged or cut short.*CRC"):
        vit.load(path)
    np.savez_compressed(path, **arrays, bomb=np.zeros(2**26, "f4"))
    with pytest.raises(ValueError, match="it is compressed, and unpacks to 268,"):
        vit.load(path)
    np.savez(path, **arrays, evil=np.array([Evil()], dtype=object))
    with pytest.raises(
        ValueError, match=r"holds more than tensors \(evil\): refused, since a pickle"
    ):
        vit.load(path)
    np.savez(path, **{"params/Transformer/encoderblock/x": np.zeros((2000, 0), "f4")} | arrays)
    with pytest.raises(ValueError, match="encoderblock/x is of 2,000 blocks"):
        vit.load(path)


# ------------------------------------------------------------------------ files that are refused


def test_paths_of_every_python():
    """Paths that Python 3.13 pickled, in a module of its own, are skipped by other versions too."""
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        assert {f"pathlib.{name}", f"pathlib._local.{name}"} <= set(vit.HARMLESS)


def test_a_pth_that_calls_something_is_refused(tmp_path, monkeypatch):
    """A pickle that would run code is refused, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(ValueError, match=rf"{name} holds more than tensors \(eval\): refused"):
            vit.load(tmp_path / name)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_truncated(tiny_weights, tensors, tmp_path, name, kept):
    """A file that is cut anywhere is refused by name."""
    path = tmp_path / name
    if name == "w.pth":
        torch.save(tensors, path)
    else:
        path.write_bytes(tiny_weights.read_bytes())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    reasons = "is damaged or cut short|holds no tensors of PyTorch"
    with pytest.raises(ValueError, match=f"{name} ({reasons})"):
        vit.load(path)


def test_a_pth_without_tensors_is_refused(tmp_path):
    """A .pth file that holds no dictionary is refused by name."""
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth holds no dictionary of tensors"):
        vit.load(tmp_path / "w.pth")


def test_missing_left_over_and_misshapen_tensors_are_named(tensors, tmp_path):
    """The error names every kind of wrong tensor, with both shapes."""
    del tensors["blocks.1.norm2.bias"]
    tensors["blocks.0.extra"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(31)
    save_file(tensors, tmp_path / "w.safetensors")
    message = r"w.safetensors: 1 missing: blocks.1.norm2.bias; 1 left over: blocks.0.extra; "
    message += r"1 of another shape: norm.weight \(31,\), not \(32,\)"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.safetensors", heads=2)


@pytest.mark.parametrize("content", [{"layer1.0.weight": torch.zeros(2)}, {}])
def test_foreign_file(tmp_path, content):
    """A file of another network is refused; the error says how its tensors begin."""
    save_file(content, tmp_path / "w.safetensors")
    beginning = next(iter(content), "nothing")
    message = f"w.safetensors: not a ViT in a known layout .*begin with {beginning}"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.safetensors")


def test_missing_core(tensors, tmp_path):
    """The error names tensors that every ViT has."""
    del tensors["cls_token"], tensors["pos_embed"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="not a whole ViT: missing cls_token, pos_embed"):
        vit.load(tmp_path / "w.safetensors")


def test_no_file():
    """The error names a file that isn't there."""
    with pytest.raises(ValueError, match="no weights at nowhere.safetensors"):
        vit.load("nowhere.safetensors")


def test_arguments_that_can_not_be(tiny_weights):
    """An invalid argument is reported as such; the file isn't called damaged."""
    with pytest.raises(ValueError, match="^no backbone 'vit_x': choose .*vit_s16"):
        vit.load(tiny_weights, name="vit_x")
    with pytest.raises(ValueError, match=r'^deit_ti16 is the name .*BACKBONES\["deit_ti16"\].repo'):
        vit.load("deit_ti16")
    with pytest.raises(ValueError, match=r'load\(data.ASSETS / "vit_micro.safetensors", name='):
        vit.load("vit_micro")  # it is on no hub
    for mean in (0.5, [0.5], [124, 117, 104], [0.5, float("nan"), 0.5]):
        with pytest.raises(ValueError, match=r"^mean .*: give three numbers from 0 to 1$"):
            vit.load(tiny_weights, mean=mean)
    with pytest.raises(ValueError, match=r"^std .*: give three numbers from 0.001 to 1$"):
        vit.load(tiny_weights, std=(0, 0, 0))


def test_a_file_that_isnt_the_named_backbone(tiny_weights, tmp_path):
    """A file that doesn't have the named backbone's shape is refused."""
    message = r"120 missing: .* of another shape: cls_token \(1, 1, 32\), not \(1, 1, 192\)"
    with pytest.raises(ValueError, match=message):
        vit.load(tiny_weights, name="deit_ti16")
    save_file(vit.ViT(vit.BACKBONES["deit_ti16"].config).state_dict(), tmp_path / "ti.safetensors")
    with pytest.raises(
        ValueError, match="its shape is that of vit_ti16, deit_ti16, not of vit_s16$"
    ):
        vit.load(tmp_path / "ti.safetensors", name="vit_s16")


# --------------------------------------------------------------------------- heads and positions


def save_bare(path, width, **more):
    """A network of this width in a file that doesn't state its shape."""
    model = vit.ViT(vit.Config(width=width, depth=1, heads=2, patch=4, image_size=16, **more))
    save_file(model.state_dict(), path)
    return path


def test_heads(tmp_path):
    """Heads have 64 channels unless their number is given."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    assert vit.load(path)[1].config.heads == 2
    assert vit.load(path, heads=4)[1].config.heads == 4


@pytest.mark.parametrize(
    ("width", "heads"),
    [(192, 3), (384, 6), (768, 12), (1024, 16), (1152, 16), (1280, 16), (1408, 16), (1664, 16)],
)
def test_the_usual_heads_of_a_width(width, heads):
    """A width's usual heads are the published ones: timm's, and open_clip's H, g and bigG."""
    found = {"cls_token": torch.empty(1, 1, width), "pos_embed": torch.empty(1, 17, width)}
    found["patch_embed.proj.weight"] = torch.empty(width, 3, 4, 4)
    found["blocks.0.mlp.fc1.weight"] = torch.empty(4 * width, 0)
    found["blocks.0.attn.qkv.weight"] = torch.empty(3 * width, 0)
    assert vit.infer_config(found, eps=1e-6).heads == heads


HALF_NORM = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}
BESIDE = {
    "transformers": (
        {
            "config.json": {
                "hidden_size": 128,
                "num_attention_heads": 4,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
            },
            "preprocessor_config.json": {
                "image_mean": HALF_NORM["mean"],
                "image_std": HALF_NORM["std"],
            },
        },
        {"heads": 4, "quick_gelu": True, "eps": 1e-5},
        {},
    ),
    "timm": (
        {"config.json": {"architecture": "vit", "pretrained_cfg": HALF_NORM}},
        {"heads": 2, "quick_gelu": False, "eps": 1e-6},
        {"--heads": "heads 2"},
    ),
    "open_clip": (
        {
            "open_clip_config.json": {
                "model_cfg": {"vision_cfg": {"width": 128, "head_width": 16}, "quick_gelu": True},
                "preprocess_cfg": HALF_NORM,
            }
        },
        {"heads": 8, "quick_gelu": True},
        {},
    ),
}


@pytest.mark.parametrize("files, expected, guessed", BESIDE.values(), ids=BESIDE)
def test_what_stands_beside_a_file(files, expected, guessed, tmp_path):
    """Heads, activation, eps and normalisation come from the files beside the weights."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    _, backbone = vit.load(path)
    assert {key: getattr(backbone.config, key) for key in expected} == expected
    assert backbone.norm == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    assert backbone.guessed == guessed
    by_hand = {"heads": 1, "quick_gelu": False, "mean": [0.1] * 3, "std": [0.2] * 3}
    _, backbone = vit.load(path, **by_hand)
    assert (backbone.config.heads, backbone.config.quick_gelu) == (1, False)
    assert backbone.norm == ((0.1,) * 3, (0.2,) * 3)


def test_a_clip_of_transformers_leaves_its_defaults_out(tmp_path):
    """vision_config leaves out CLIPVisionConfig's defaults, such as 12 heads and QuickGELU."""
    config = {"model_type": "clip", "vision_config": {"hidden_size": 384}}
    path = save_bare(tmp_path / "w.safetensors", width=384)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = vit.load(path)[1].config
    assert (found.heads, found.quick_gelu, found.eps) == (12, True, 1e-5)
    config["vision_config"] |= {"num_attention_heads": 6, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = vit.load(path)[1].config
    assert (found.heads, found.quick_gelu) == (6, False)


def test_a_stated_eps_of_a_clip(tmp_path):
    """A stated eps takes precedence over CLIP's usual eps, and must be a number."""
    config = {"hidden_size": 128, "layer_norm_eps": 1e-6}
    path = save_bare(tmp_path / "w.safetensors", width=128, norm_pre=True)
    assert vit.load(path)[1].config.eps == 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vit.load(path)[1].config.eps == 1e-6
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": "1e-6"}))
    with pytest.raises(ValueError, match="eps '1e-6' of the LayerNorms is not valid"):
        vit.load(path)


def test_a_configuration_that_does_not_fit(tmp_path):
    """A configuration of another width is ignored; a damaged one, or one with ReLU, is refused."""
    path = save_bare(tmp_path / "w.safetensors", width=128)
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps({"hidden_size": 768, "num_attention_heads": 8}))
    _, backbone = vit.load(path)
    assert backbone.config.heads == 2
    assert list(backbone.guessed) == ["--heads", "--mean", "--std"]
    assert backbone.note == "the description beside it is of width 768, and was left out"
    beside.write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="states the activation 'relu', not gelu or quick_gelu"):
        vit.load(path)
    beside.write_text("{ cut")
    with pytest.raises(ValueError, match="config.json can't be used .Expecting"):
        vit.load(path)


def test_a_clip_without_ln_pre(tmp_path):
    """A CLIP without ln_pre, as CLIPA, is refused: no tensor tells that its head reads the mean."""
    tensors = load_file(ROOT / "tests" / "golden" / "open_clip_openai.safetensors")
    without = {}
    for key, value in tensors.items():
        if not re.search(r"ln_pre|^golden\.", key):
            without[key] = value
    save_file(without, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="has no ln_pre, as CLIPA, whose head pools all patches"):
        vit.load(tmp_path / "w.safetensors", heads=2)


def test_given_heads_are_honoured_beside_a_name(tmp_path):
    """`heads` and the activation override a named backbone's."""
    config = vit.BACKBONES["vit_micro"].config
    path = tmp_path / "w.safetensors"
    save_file(vit.ViT(config).state_dict(), path)
    _, backbone = vit.load(path, name="vit_micro", heads=8, quick_gelu=True, mean=[0.1] * 3)
    assert (backbone.config.heads, backbone.config.quick_gelu) == (8, True)
    assert backbone.norm == ((0.1,) * 3, tuple(vit.CIFAR100[1]))
    assert backbone.guessed == {}


def test_an_unknown_option(tiny_weights):
    """A misspelt option isn't ignored."""
    with pytest.raises(TypeError, match="quickgelu"):
        vit.load(tiny_weights, quickgelu=True)


def test_heads_that_cant_be(tmp_path):
    """Heads that don't divide the width are refused; so is a width that needs their number."""
    wide = save_bare(tmp_path / "wide.safetensors", width=128)
    with pytest.raises(ValueError, match="width 128 can't be split into 3 heads"):
        vit.load(wide, heads=3)
    narrow = save_bare(tmp_path / "narrow.safetensors", width=32)
    message = "width 32 is no multiple of the usual head width 64; give the number of heads"
    with pytest.raises(ValueError, match=message):
        vit.load(narrow)


def test_positions_are_resized(tiny_weights, tensors):
    """Positions are resized to a larger image, except the class token's; constant ones stay."""
    model, backbone = vit.load(tiny_weights, image_size=32)
    assert backbone.config.grid == 8
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert torch.equal(model.pos_embed[:, 0], tensors["pos_embed"][:, 0])
    constant = torch.full((1, 17, 32), 0.25)
    resized = vit.resize_positions(constant, 7)
    assert resized.shape == (1, 50, 32)
    assert torch.allclose(resized, torch.tensor(0.25), atol=1e-6)


def test_positions_are_resized_as_timm_does(tensors):
    """timm's resampling gives the same positions."""
    timm = pytest.importorskip("timm")
    expected = timm.layers.resample_abs_pos_embed(tensors["pos_embed"], [9, 9])
    assert torch.allclose(vit.resize_positions(tensors["pos_embed"], 9), expected, atol=1e-6)


@pytest.mark.parametrize("size", [15, 3])
def test_image_size_that_cant_be(tiny_weights, size):
    """An image size that isn't a multiple of the patch size is refused."""
    message = f"image size {size} is not a multiple of the patch size 4"
    with pytest.raises(ValueError, match=message):
        vit.load(tiny_weights, image_size=size)


# ------------------------------------------------------------------------------- the command line

LAYOUTS = {
    "timm": "timm, DeiT, DINO, DINOv2, DINOv3, MAE",
    "facebook": "timm, DeiT, DINO, DINOv2, DINOv3, MAE",
    "google": "Google's .npz",
    "torchvision": "torchvision",
    "hf_vit": "Hugging Face ViT, DeiT",
    "hf_deit": "Hugging Face ViT, DeiT",
    "hf_dinov2": "Hugging Face Dinov2",
    "hf_dinov3": "Hugging Face DINOv3",
    "hf_clip": "Hugging Face CLIP",
    "open_clip_openai": "OpenAI CLIP, open_clip",
    "open_clip_timm": "timm, DeiT, DINO, DINOv2, DINOv3, MAE",
}


@pytest.fixture
def run(capsys):
    """Runs `python vit.py` with these arguments; returns what it prints. See conftest.runner."""
    return runner(vit.main, capsys)


def lines_of(text):
    """The lines of a description by their first word."""
    lines = {}
    for line in text.splitlines():
        lines.setdefault(line[:9].strip(), []).append(line[9:])
    return lines


def test_backbones_can_be_keys():
    """All rows of the table are different and can be keys of sets and caches."""
    assert len(set(vit.BACKBONES.values())) == len(vit.BACKBONES)


def test_list_of_backbones(run):
    """Each backbone has a row in aligned columns, with the published number of parameters."""
    header, *rows = run().splitlines()
    assert [row.split()[0] for row in rows] == list(vit.BACKBONES)
    for title in ("normalisation", "licence", "repository"):
        place = header.index(title)
        assert {row[place - 1] for row in rows} == {" "}
        assert " " not in {row[place] for row in rows}
    for title in ("parameters", "blocks", "width", "heads", "patch", "pixels"):
        end = header.index(title) + len(title)
        assert all(row[end - 1].isdigit() and row[end] == " " for row in rows)
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert table["deit_ti16"][:6] == ["5,524,416", "12", "192", "3", "16", "224"]
    assert table["vit_b16"][0] == "85,798,656"  # timm's count of these two, without a head
    assert table["clip_l14"][6:] == ["CLIP", "MIT", "openai/clip-vit-large-patch14"]
    assert table["vit_s16"][6] == "Inception"
    assert table["vit_micro"][6:] == ["CIFAR-100", "MIT", "assets/vit_micro.safetensors"]


@pytest.mark.parametrize("family", references.FAMILIES)
def test_description_of_each_layout(family, run, tmp_path):
    """The description has the layout, shape, parameters and head that `load` finds."""
    with safe_open(ROOT / "tests" / "golden" / f"{family}.safetensors", "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        options = json.loads(file.metadata()["golden"])["options"]
    del golden["golden.input"], golden["golden.output"]
    path = tmp_path / "w.safetensors"
    save_file(golden, path)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    model, backbone = vit.load(path)
    described = lines_of(run(path))
    layout = max((begin for begin in LAYOUTS if family.startswith(begin)), key=len)
    assert described["file"] == [str(path)]
    assert described["layout"] == [LAYOUTS[layout]]
    assert described["heads"] == ["2 (config.json)"]
    [network] = described["network"]
    config = backbone.config
    side = 224 if config.rope else 16  # DINOv3's tensors don't tell it
    begin = f"width 32, depth 2, heads 2, patch 4, image size {side}"
    if config.hidden:
        begin += ", hidden 64"
    assert network.startswith(begin)
    assert (f"registers {config.registers}" in network) == (config.registers > 0)
    assert ("layer scale" in network) == config.layer_scale
    assert ("norm pre" in network) == config.norm_pre
    assert ("quick gelu" in network) == config.quick_gelu
    assert network.endswith(", gelu") == (not config.quick_gelu)
    assert f"pool {config.pool}" in network
    [weights] = described["weights"]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert weights.startswith(f"{count:,} parameters")
    assert weights.endswith(", and a head of 5 outputs") == options.get("head", False)
    assert ("text" in described) == (
        family in ("hf_clip_both", "open_clip_openai", "open_clip_timm")
    )
    assert described["pixels"][0].endswith("(guessed)")
    assert described["next"] == [f"python train.py --weights {path} --dataset path/to/photos"]


def test_description_of_guesses(run, tmp_path):
    """Guesses are listed with their options and backbones of that shape; stated values are not."""
    config = vit.BACKBONES["deit_ti16"].config
    path = tmp_path / "a file.safetensors"
    save_file(vit.ViT(config, classes=10).state_dict(), path)
    described = lines_of(run(path))
    why = "stated neither in the file nor beside it; if it is wrong"
    expected = {"heads 3": "--heads", "ImageNet's mean": "--mean", "ImageNet's std": "--std"}
    lines = [f"{guess}: {why}: {option}" for guess, option in expected.items()]
    assert described["guessed"] == lines
    assert described["shape"] == [
        "that of these, each with its normalisation: vit_ti16 (Inception), deit_ti16 (ImageNet); "
        "--backbone NAME states what is guessed"
    ]
    assert described["heads"] == ["3 (guessed)"]
    assert described["pixels"] == ["mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (guessed)"]
    assert described["weights"] == ["5,524,416 parameters, and a head of 10 outputs"]
    assert described["next"] == [f"python train.py --weights '{path}' --dataset path/to/photos"]

    stated = {"num_attention_heads": 6, "layer_norm_eps": 1e-12, "image_mean": [0.4] * 3}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    described = lines_of(run(path))
    assert described["heads"] == ["6 (config.json)"]
    assert described["pixels"][0].endswith(" (config.json, guessed)")
    assert described["guessed"] == [f"ImageNet's std: {why}: --std"]
    assert described["shape"][0].startswith("that of these, ")

    stated["image_std"] = [0.5] * 3
    (tmp_path / "config.json").write_text(json.dumps(stated))
    described = lines_of(run(path))
    assert "guessed" not in described
    assert "shape" not in described
    assert described["pixels"] == ["mean 0.4 0.4 0.4, std 0.5 0.5 0.5 (config.json)"]

    described = lines_of(run(ROOT / "assets" / "vit_micro.safetensors"))
    assert described["heads"] == ["4 (stated in the file)"]
    assert described["pixels"][0].endswith("(stated in the file)")
    assert "hidden 256" in described["network"][0]
    assert not {"guessed", "shape", "note", "text", "unused"} & set(described)


def test_description_of_what_is_left_out(clip, tensors, arrays, run, tmp_path):
    """The description names CLIP's other tower, a guessed activation, an EMA beside others, a
    pretraining's decoder, and kernels that state the heads."""
    described = lines_of(run(clip))
    assert described["text"] == [
        "CLIP's other tower: --method zero-shot or clip-adapter can use it"
    ]
    assert described["guessed"][1].startswith("QuickGELU: ")
    assert described["guessed"][1].endswith(": --mlp-act")
    assert described["weights"][0].endswith("a head of 24 outputs")

    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    both = {"state_dict": tensors, "state_dict_ema": tensors}
    torch.save(both, tmp_path / "both.pth")
    note = "state_dict_ema of both.pth; it also holds state_dict"
    assert lines_of(run(tmp_path / "both.pth"))["note"] == [note]
    torch.save(with_decoder(tensors), tmp_path / "mae.pth")
    described = lines_of(run(tmp_path / "mae.pth"))
    assert described["unused"] == ["mask_token, decoder_pos_embed, decoder_blocks.0.norm1.weight"]

    (tmp_path / "config.json").unlink()
    np.savez(tmp_path / "w.npz", **arrays)
    described = lines_of(run(tmp_path / "w.npz"))
    assert described["heads"] == ["2 (its kernels' shape)"]
    assert described["pixels"] == ["mean 0.5 0.5 0.5, std 0.5 0.5 0.5 (guessed)"]
    assert len(described["guessed"]) == 2


def write_refused(folder, tensors, clip):
    """Write files that can't be loaded; return {name: how the error names it}."""
    model = vit.ViT(vit.Config(**TINY))
    adaptertune.add_adapters(model, rank=2)
    adaptertune.freeze(model)
    made = {"method": "adaptertune", "reads": "block"}
    adaptertune.save(folder / "adapters.safetensors", model, made)
    plain = vit.ViT(vit.Config(**TINY))
    adaptertune.save(folder / "head.safetensors", plain, adaptertune.adapt(plain, "head", 7))
    both = load_file(clip)
    text = {name: value for name, value in both.items() if not name.startswith("visual.")}
    save_file(text, folder / "text.safetensors")
    lora = {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 32)}
    save_file(lora, folder / "lora.safetensors")
    (folder / "graph.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    (folder / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    torch.save({"model": Evil()}, folder / "code.pth")
    (folder / "cut.safetensors").write_bytes(clip.read_bytes()[:1000])
    (folder / "folder").mkdir()
    save_file({"layer1.0.weight": torch.zeros(2)}, folder / "resnet.safetensors")
    narrow = tensors | {"blocks.0.\x1b[31mred": torch.zeros(1)}
    save_file(narrow, folder / "narrow.safetensors")
    wide = {"num_attention_heads": 2, "hidden_size": 32}
    (folder / "named").mkdir()
    (folder / "named" / "config.json").write_text(json.dumps(wide))
    del narrow["norm.weight"]
    save_file(narrow, folder / "named" / "odd.safetensors")
    return {
        "adapters.safetensors": "what --method adaptertune trained, not a backbone.* by --init\n",
        "head.safetensors": r"give its folder to train.py --eval or export.py\n",
        "text.safetensors": "CLIP's text tower alone; give a file that has the image tower",
        "lora.safetensors": "LoRA adapters.*merge",
        "graph.onnx": "is an ONNX graph; give a .safetensors",
        "keras.h5": "is an HDF5 file",
        "code.pth": r"holds more than tensors \(eval\): refused",
        "cut.safetensors": "damaged or cut short",
        "folder": "is a folder; give the .safetensors or .pth file in it",
        "nowhere.pth": "no weights at .*nowhere.pth",
        "resnet.safetensors": "not a ViT in a known layout",
        "narrow.safetensors": "width 32 .* give the number of heads by --heads",
        "named/odd.safetensors": "1 missing: norm.weight; 1 left over: blocks.0.\ufffd\\[31mred",
    }


def test_files_that_are_not_described(tensors, clip, run, tmp_path):
    """A file that can't be loaded gives one line that says what it is, and status 1."""
    for name, message in write_refused(tmp_path, tensors, clip).items():
        error = run(tmp_path / name, status=1)
        assert re.search(message, error), (name, error)
        assert name in error


def test_several_files(tiny_weights, capsys, tmp_path):
    """Each file is described; an unreadable one gives status 1; names can't steer the terminal."""
    named = tmp_path / "tiny\x1b[2J.safetensors"
    shutil.copy(tiny_weights, named)
    status = vit.main([str(named), str(tmp_path / "nowhere\n"), str(tiny_weights)])
    out, error = capsys.readouterr()
    assert status == 1
    assert len(error.splitlines()) == 1
    assert out.count("\nnetwork ") == 2
    assert f"file     {tmp_path}/tiny\ufffd[2J.safetensors" in out
    assert out.replace("\n", "").isprintable()


def test_a_command_for_the_shell(monkeypatch):
    """Names are quoted for the system's shell; that of Windows is PowerShell."""
    arguments = ["export.py", r"runs\name", "my run", "it's", "x&calc", "$x"]
    quoted = r"""export.py 'runs\name' 'my run' 'it'"'"'s' 'x&calc' '$x'"""
    assert vit.command_line(arguments) == quoted
    monkeypatch.setattr(vit, "os", SimpleNamespace(name="nt"))
    quoted = r"""export.py runs\name 'my run' 'it''s' 'x&calc' '$x'"""
    assert vit.command_line(arguments) == quoted


def test_usage(run):
    """--help works; an unknown option gives one line and status 2."""
    assert "FILE" in run("--help")
    assert "unrecognized arguments: --heads" in run("--heads", "3", status=2)
