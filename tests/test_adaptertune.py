"""The adapter: what it computes, where it stands, what is trained, what is saved."""
import pytest
import torch
from conftest import write_tiny
from safetensors import safe_open

import adaptertune
import vit

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def adapted(path, **options):
    model, _ = vit.load(path)
    adaptertune.add_adapters(model, **{"rank": 4, "placement": [0, 1], **options})
    adaptertune.add_head(model, 5)
    adaptertune.freeze(model)
    return model


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adaptertune.is_adapter(name):
                parameter.normal_(std=0.3)
    return model


def by_the_equations(model, images, method):
    """Features of an adapted ViT, written from the papers' equations with LayerNorm, attention and MLP as given."""
    x, gelu, relu = model.embed(images), torch.nn.functional.gelu, torch.relu
    for block in model.blocks:
        adapter, scale1, scale2 = block.adapter, block.ls1, block.ls2
        V, v, U, u = adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias

        def bottleneck(z, act, V=V, v=v, U=U, u=u):
            return torch.einsum("dr,bnr->bnd", U, act(torch.einsum("rd,bnd->bnr", V, z) + v)) + u

        x = x + scale1(block.attn(block.norm1(x)))
        mlp = scale2(block.mlp(block.norm2(x)))
        if method == "adaptertune":  # arXiv 2603.14706: on the residual stream, after the block
            h = x + mlp
            x = h + adapter.scale * bottleneck(h, gelu)
        elif method == "adaptformer":  # arXiv 2205.13535, its code: parallel to the MLP, raw input
            x = x + mlp + adapter.scale * bottleneck(x, relu)
        elif method == "ln":  # its equation
            x = x + mlp + adapter.scale * bottleneck(block.norm2(x), relu)
        else:  # its ablation: sequential
            x = x + (mlp + adapter.scale * bottleneck(mlp, relu))
    return model.norm(x[:, 0])


METHODS = {"adaptertune": {"scale": 0.7}, "adaptformer": {"reads": "raw", "act": "relu", "scale": 0.1},
           "ln": {"reads": "ln", "act": "relu", "scale": 0.1}, "sequential": {"reads": "mlp", "act": "relu", "scale": 0.1}}


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equation(tmp_path, method, layer_scale):
    """Outputs and all gradients."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, layer_scale=layer_scale)
    model = randomise(adapted(path, **METHODS[method])).double()
    ours, expected = model.features(IMAGES.double()), by_the_equations(model, IMAGES.double(), method)
    assert torch.allclose(ours, expected, atol=1e-10)
    parameters = [parameter for name, parameter in model.named_parameters() if ".adapter." in name]
    for got, wanted in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (ours, expected)), strict=True):
        assert torch.allclose(got, wanted, atol=1e-8)


@pytest.mark.parametrize("changes", [{}, {"layer_scale": True}, {"quick_gelu": True}])
def test_merge_is_exact(tmp_path, changes):
    path = write_tiny(tmp_path / "w.safetensors", seed=0, **changes)
    model = randomise(adapted(path, reads="ln", act="mlp", scale=0.3)).double()
    for block in model.blocks:
        if changes.get("layer_scale"):
            torch.nn.init.uniform_(block.ls2.gamma, 0.1, 2)
    with torch.no_grad():
        before = model(IMAGES.double())
        assert adaptertune.merge(model) == 2
        assert all(block.adapter is None and block.mlp.fc1.out_features == 64 + 4 == len(block.mlp.fc1.bias)
                   for block in model.blocks)
        assert torch.allclose(model(IMAGES.double()), before, atol=1e-10)


@pytest.mark.parametrize("reads", adaptertune.READS)
@pytest.mark.parametrize("changes", [{}, {"layer_scale": True, "registers": 2}, {"qkv_bias": False, "pool": "mean"}])
def test_equalise_is_exact(tmp_path, changes, reads):
    """The same function, and per channel ranges that differ less."""
    model = randomise(adapted(write_tiny(tmp_path / "w.safetensors", seed=0, **changes), reads=reads)).double()
    model.requires_grad_(False)
    for parameter in (parameter for name, parameter in model.named_parameters() if "norm" in name or "bias" in name):
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double() * 0.3
    model.blocks[0].norm1.weight[3] = 50  # a channel as loud as those that spoil int8
    before, images = model(IMAGES.double()), IMAGES.double()
    low, high = adaptertune.observe(model, images)["blocks.0.attn.qkv"]
    adaptertune.equalise(model, images)
    assert torch.allclose(model(images), before, atol=1e-9)
    new_low, new_high = adaptertune.observe(model, images)["blocks.0.attn.qkv"]
    spread, new_spread = ((h - l).max() / (h - l).median() for l, h in ((low, high), (new_low, new_high)))  # noqa: E741
    assert spread > 10
    assert new_spread < spread / 3


@pytest.mark.parametrize("options", [{}, {"reads": "ln", "act": "relu"}, {"reads": "raw", "act": "gelu"}])
def test_what_cant_be_merged_is_left(tiny_weights, options):
    model = adapted(tiny_weights, **options)
    assert adaptertune.merge(model) == 0
    assert all(block.adapter is not None for block in model.blocks)


@pytest.mark.parametrize("method", METHODS)
def test_zero_init_is_the_backbone_bit_for_bit(tiny_weights, method):
    plain, _ = vit.load(tiny_weights)
    with torch.no_grad():
        assert torch.equal(adapted(tiny_weights, **METHODS[method]).features(IMAGES), plain(IMAGES))
        assert not torch.equal(adapted(tiny_weights, init="small").features(IMAGES), plain(IMAGES))


def test_start_values():
    torch.manual_seed(0)
    zero, small = adaptertune.Adapter(256, 64), adaptertune.Adapter(256, 64, init="small")
    assert zero.down.weight.abs().max() <= (6 / (256 + 64)) ** 0.5  # Xavier's bound
    assert zero.down.weight.std() > 0.9 * (2 / (256 + 64)) ** 0.5
    assert not any(tensor.any() for tensor in (zero.down.bias, zero.up.weight, zero.up.bias, small.down.bias))
    assert 0.9e-4 < small.up.weight.std() < 1.1e-4
    assert small.up.bias.any()


@pytest.mark.parametrize("learn_scale", [False, True])
def test_counts(tiny_weights, learn_scale):
    model = adapted(tiny_weights, learn_scale=learn_scale)
    D, r = 32, 4
    assert adaptertune.count(model) == {
        "frozen": sum(p.numel() for p in vit.load(tiny_weights)[0].parameters()),
        "adapters": 2 * (2 * D * r + r + D + learn_scale), "head": D * 5 + 5, "backbone": 0}


def test_the_predicate_is_all_that_is_trained(tiny_weights):
    model = adapted(tiny_weights)
    model.head(model.features(IMAGES)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == adaptertune.is_adapter(name)
        assert (parameter.grad is not None) == adaptertune.is_adapter(name)


def test_decay_on_matrices_alone(tiny_weights):
    model = adapted(tiny_weights, learn_scale=True)
    adaptertune.freeze(model, everything=True)
    decayed = {id(parameter) for parameter in adaptertune.groups(model, 0.05)[0]["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert {"head.weight", "patch_embed.proj.weight", "blocks.1.adapter.up.weight", "blocks.0.attn.qkv.weight"} <= names
    assert not [name for name in names if any(part in name for part in ("norm", "token", "pos", "bias", "scale"))]
    assert adaptertune.groups(model, 0.05)[1]["weight_decay"] == 0


@pytest.mark.parametrize(("options", "chosen"), [({}, [0, 1, 2, 3, 4, 5]), ({"every": 2}, [1, 3, 5]), ({"every": 4}, [3]),
                                                 ({"blocks": [5, 0, 5]}, [0, 5])])
def test_placement(options, chosen):
    assert adaptertune.choose_blocks(6, **options) == chosen


@pytest.mark.parametrize("options", [{"every": 7}, {"every": 0}, {"blocks": [6]}, {"blocks": [-7]}])
def test_placement_that_cant_be(options):
    with pytest.raises(ValueError, match="choose from 0 to 5"):
        adaptertune.choose_blocks(6, **options)


def test_adaptformer_starts_from_kaiming(tiny_weights):
    torch.manual_seed(0)
    model = adapted(tiny_weights, method="adaptformer", rank=32)
    bound = 1 / 32 ** 0.5  # sqrt(6 / ((1 + 5) D)); Xavier's would be sqrt(6 / (D + r))
    assert 0.95 * bound < model.blocks[0].adapter.down.weight.abs().max() <= bound


@pytest.mark.parametrize("options", [{"reads": "after"}, {"act": "silu"}, {"init": "one"}])
def test_choices(tiny_weights, options):
    with pytest.raises(ValueError, match="'(after|silu|one)': choose (block, raw, ln, mlp|gelu, relu, mlp|zero, small)"):
        adapted(tiny_weights, **options)


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_rank_that_cant_be(tiny_weights, rank):
    with pytest.raises(ValueError, match=f"rank {rank}: choose from 1 to the backbone's width, 32"):
        adapted(tiny_weights, rank=rank)


def test_file_holds_adapters_and_head_alone(tiny_weights, tmp_path):
    model = adapted(tiny_weights)
    with torch.no_grad():
        for parameter in adaptertune.trained(model).values():
            parameter.normal_()
    fingerprint = adaptertune.fingerprint(model)
    adaptertune.save(tmp_path / "a.safetensors", model, {"fingerprint": fingerprint, "backbone": "tiny"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys == {"head.weight", "head.bias"} | {f"blocks.{block}.adapter.{part}.{kind}" for block in (0, 1)
                                                  for part in ("down", "up") for kind in ("weight", "bias")}
    again = adapted(tiny_weights)
    tensors, meta = vit.read_tensors(tmp_path / "a.safetensors")
    adaptertune.load(again, tensors, meta, backbone=adaptertune.fingerprint(again), name="tiny")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_another_backbone_is_refused_by_name(tiny_weights, tmp_path):
    model, other = adapted(tiny_weights), adapted(write_tiny(tmp_path / "other.safetensors", seed=1))
    adaptertune.save(tmp_path / "a.safetensors", model, {"fingerprint": adaptertune.fingerprint(model), "backbone": "tiny"})
    before = adaptertune.fingerprint(other)
    with pytest.raises(ValueError, match=r"trained on tiny \([0-9a-f]{16}\), not on other \([0-9a-f]{16}\)"):
        adaptertune.load(other, *vit.read_tensors(tmp_path / "a.safetensors"), backbone=before, name="other")


@pytest.mark.parametrize("meta", [{}, {"version": 2, "fingerprint": "", "backbone": "tiny"}])
def test_a_file_of_another_kind_is_refused(tiny_weights, meta):
    with pytest.raises(ValueError, match="no adapter file that train.py wrote"):
        adaptertune.load(adapted(tiny_weights), {}, meta, backbone="", name="tiny")


def test_fingerprint(tiny_weights):
    model = adapted(tiny_weights)
    first = adaptertune.fingerprint(model)
    with torch.no_grad():
        model.head.weight.add_(1)
        model.blocks[0].adapter.up.weight.add_(1)
    assert adaptertune.fingerprint(model) == first == adaptertune.fingerprint(vit.load(tiny_weights, image_size=32)[0])
    with torch.no_grad():
        model.blocks[1].norm2.bias[3] += 1e-6
    assert adaptertune.fingerprint(model) != first
