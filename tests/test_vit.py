"""Loading: wrappers, strictness, inference of the shape, positions. Parity with other libraries is in test_parity.py."""
import pickle

import pytest
import torch
from conftest import write_tiny
from safetensors.torch import load_file, save_file

import vit

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tensors(tiny_weights):
    return load_file(tiny_weights)


def test_the_file_states_its_own_shape(tiny_weights):
    model, backbone = vit.load(tiny_weights)
    assert (backbone.config.heads, backbone.config.hidden, backbone.norm) == (2, 64, ([0.5] * 3, [0.5] * 3))
    assert model(IMAGES).shape == (2, 32)
    assert not model.training


@pytest.mark.parametrize("wrap", [
    lambda state: {"model": state, "optimizer": {"lr": 1.0}},  # DeiT, MAE
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"teacher": {f"backbone.{key}": value for key, value in state.items()}
                   | {"head.mlp.0.weight": torch.zeros(3, 3), "head.last_layer.weight_g": torch.zeros(3, 1)}},  # DINO
    lambda state: {"model": state | {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8),
                                     "decoder_blocks.0.norm1.weight": torch.zeros(8)}},  # MAE as pretrained
    lambda state: {f"module.{key}": value for key, value in state.items()},
])
def test_wrappers(tensors, tiny_weights, tmp_path, wrap):
    torch.save(wrap(tensors), tmp_path / "w.pth")
    with torch.no_grad():
        assert torch.equal(vit.load(tmp_path / "w.pth", heads=2)[0](IMAGES), vit.load(tiny_weights)[0](IMAGES))


def test_a_pth_that_calls_something_is_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (eval, ("__import__('pathlib').Path('evil').write_text('x')",))
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} holds more than tensors.*refused"):
            vit.load(tmp_path / name)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.9])
def test_truncated(tiny_weights, tensors, tmp_path, name, keep):
    if name == "w.pth":
        torch.save(tensors, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(tiny_weights.read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:int(keep * len(content))])
    with pytest.raises(ValueError, match=f"{name} (is damaged or cut short|holds more than tensors, or is no PyTorch file)"):
        vit.load(tmp_path / name)


def test_missing_left_over_and_misshapen_tensors_are_named(tensors, tmp_path):
    del tensors["blocks.1.norm2.bias"]
    tensors |= {"blocks.0.extra": torch.zeros(1), "norm.weight": torch.zeros(31)}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w.safetensors: 1 missing: blocks.1.norm2.bias; 1 left over: blocks.0.extra; "
                                         r"1 of another shape: norm.weight \(31,\), not \(32,\)"):
        vit.load(tmp_path / "w.safetensors", heads=2)


@pytest.mark.parametrize("content", [{"layer1.0.weight": torch.zeros(2)}, {}])
def test_foreign_file(tmp_path, content):
    save_file(content, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="w.safetensors: not a ViT in a known layout .*begin with (layer1.0.weight|nothing)"):
        vit.load(tmp_path / "w.safetensors")


def test_missing_core(tensors, tmp_path):
    del tensors["cls_token"], tensors["pos_embed"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="not a whole ViT: missing cls_token, pos_embed"):
        vit.load(tmp_path / "w.safetensors")


def test_no_file():
    with pytest.raises(ValueError, match="no weights at nowhere.safetensors"):
        vit.load("nowhere.safetensors")


def test_heads(tmp_path):
    path = tmp_path / "w.safetensors"
    model = vit.ViT(vit.Config(width=128, depth=1, heads=2, patch=4, image_size=16))
    save_file(model.state_dict(), path)
    assert vit.load(path)[1].config.heads == 2  # the usual width of 64
    assert vit.load(path, heads=4)[1].config.heads == 4
    with pytest.raises(ValueError, match="width 128 can't be split into 3 heads"):
        vit.load(path, heads=3)
    save_file(vit.ViT(vit.Config(width=32, depth=1, heads=2, patch=4, image_size=16)).state_dict(), path)
    with pytest.raises(ValueError, match="width 32 is no multiple of the usual head width 64; give the number of heads"):
        vit.load(path)


def test_a_file_that_isnt_the_named_backbone(tiny_weights):
    with pytest.raises(ValueError, match=r"120 missing: .* of another shape: cls_token \(1, 1, 32\), not \(1, 1, 192\)"):
        vit.load(tiny_weights, name="deit_ti16")


def test_positions_are_resized(tiny_weights, tensors):
    model, backbone = vit.load(tiny_weights, image_size=32)
    assert backbone.config.grid == 8
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert torch.equal(model.pos_embed[:, 0], tensors["pos_embed"][:, 0])
    flat = torch.cat([tensors["pos_embed"][:, :1], torch.full((1, 16, 32), 0.25)], dim=1)
    assert torch.allclose(vit.resize_positions(flat, 7)[:, 1:], torch.tensor(0.25), atol=1e-6)
    timm = pytest.importorskip("timm")
    expected = timm.layers.resample_abs_pos_embed(tensors["pos_embed"], [9, 9])
    assert torch.allclose(vit.resize_positions(tensors["pos_embed"], 9), expected, atol=1e-6)


@pytest.mark.parametrize("size", [15, 3])
def test_image_size_that_cant_be(tiny_weights, size):
    with pytest.raises(ValueError, match=f"image size {size} is not a multiple of the patch size 4"):
        vit.load(tiny_weights, image_size=size)


def test_half_precision_files_are_read_as_fp32(tensors, tmp_path):
    save_file({key: value.half() for key, value in tensors.items()}, tmp_path / "w.safetensors")
    assert {parameter.dtype for parameter in vit.load(tmp_path / "w.safetensors", heads=2)[0].parameters()} == {torch.float32}


def test_mean_pooling_reads_fc_norm(tmp_path):
    path = write_tiny(tmp_path / "mean.safetensors", seed=0, pool="mean")
    tensors = {key.replace("norm.", "fc_norm.") if key[:5] == "norm." else key: value for key, value in load_file(path).items()}
    save_file(tensors, tmp_path / "fc.safetensors")
    model, backbone = vit.load(tmp_path / "fc.safetensors", heads=2)
    assert backbone.config.pool == "mean"
    with torch.no_grad():
        assert torch.equal(model(IMAGES), vit.load(path)[0](IMAGES))
