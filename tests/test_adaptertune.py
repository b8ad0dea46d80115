"""The adapters: their equations, initialisation and placement, what is trained, and their files."""

import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import adaptertune
import export
import vit

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
D = 32  # width of the tiny backbone, which has two blocks

# -------------------------------------------------------------------------------------- networks


def adapted(path, rank=4, **options):
    """A backbone with adapters and a head for 5 classes."""
    model, _ = vit.load(path)
    adaptertune.add_adapters(model, rank, **options)
    adaptertune.add_head(model, 5)
    adaptertune.freeze(model)
    return model


@torch.no_grad()
def randomise(model):
    """Give adapters, prompts and head random values."""
    for name, parameter in model.named_parameters():
        if adaptertune.is_added(name):
            parameter.normal_(std=0.3)
    return model


def bottleneck(adapter, z, act):
    """s · (U · act(V · z + v) + u) with an adapter's own tensors, by einsum."""
    V, v = adapter.down.weight, adapter.down.bias
    U, u = adapter.up.weight, adapter.up.bias
    hidden = act(torch.einsum("rd,bnd->bnr", V, z) + v)
    return adapter.scale * (torch.einsum("dr,bnr->bnd", U, hidden) + u)


def by_the_equations(model, images, method):
    """Features of an adapted ViT, computed from the papers' equations."""
    x = model.embed(images)
    for block in model.blocks:
        adapter = block.adapter
        x = x + block.ls1(block.attn(block.norm1(x)))
        mlp = block.ls2(block.mlp(block.norm2(x)))
        if method == "adaptertune":  # arXiv 2603.14706: on the residual stream, after the block
            h = x + mlp
            x = h + bottleneck(adapter, h, F.gelu)
        elif method == "adaptformer":  # arXiv 2205.13535, its code: parallel to the MLP, raw input
            x = x + mlp + bottleneck(adapter, x, torch.relu)
        elif method == "ln":  # its equation
            x = x + mlp + bottleneck(adapter, block.norm2(x), torch.relu)
        else:  # its ablation: sequential
            x = x + mlp + bottleneck(adapter, mlp, torch.relu)
    return model.norm(x[:, 0])


METHODS = {
    "adaptertune": {"scale": 0.7},
    "adaptformer": {"reads": "raw", "act": "relu", "scale": 0.1},
    "ln": {"reads": "ln", "act": "relu", "scale": 0.1},
    "sequential": {"reads": "mlp", "act": "relu", "scale": 0.1},
}

# -------------------------------------------------------------------------- what adapters compute


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equation(tmp_path, method, layer_scale):
    """Outputs and the gradients of all adapters agree with the papers' equations."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, layer_scale=layer_scale)
    model = randomise(adapted(path, **METHODS[method])).double()
    found = model.features(IMAGES.double())
    expected = by_the_equations(model, IMAGES.double(), method)
    assert torch.allclose(found, expected, atol=1e-10)

    parameters = [each for name, each in model.named_parameters() if ".adapter." in name]
    found = torch.autograd.grad(found.square().sum(), parameters)
    expected = torch.autograd.grad(expected.square().sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)


@pytest.mark.parametrize("changes", [{}, {"layer_scale": True}, {"quick_gelu": True}])
def test_merge_is_exact(tmp_path, changes):
    """Merging an adapter into the MLP leaves the outputs unchanged."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, **changes)
    model = randomise(adapted(path, reads="ln", act="mlp", scale=0.3)).double()
    if changes.get("layer_scale"):
        for block in model.blocks:
            nn.init.uniform_(block.ls2.gamma, 0.1, 2)
    with torch.no_grad():
        before = model(IMAGES.double())
        assert adaptertune.merge(model) == 2
        after = model(IMAGES.double())
    assert torch.allclose(after, before, atol=1e-10)
    for block in model.blocks:
        assert block.adapter is None
        assert block.mlp.fc1.out_features == len(block.mlp.fc1.bias) == 64 + 4
        assert block.mlp.fc2.in_features == block.mlp.fc2.weight.shape[1] == 64 + 4


def test_a_channel_that_layer_scale_removes(tmp_path):
    """Where γ is 0, an adapter can't be divided by it: it isn't merged, and gives no NaN."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, layer_scale=True)
    model = randomise(adapted(path, reads="ln", act="mlp"))
    with torch.no_grad():
        model.blocks[0].ls2.gamma[3] = 0
        before = model(IMAGES)
        assert adaptertune.merge(model) == 1
        assert torch.allclose(model(IMAGES), before, atol=1e-4)
    assert model.blocks[0].adapter is not None


@pytest.mark.parametrize(
    "options", [{}, {"reads": "ln", "act": "relu"}, {"reads": "raw", "act": "gelu"}]
)
def test_what_cannot_be_merged_is_left(tiny_weights, options):
    """Adapters whose input or activation isn't the MLP's aren't merged."""
    model = adapted(tiny_weights, **options)
    assert adaptertune.merge(model) == 0
    assert all(block.adapter is not None for block in model.blocks)


def test_merge_compares_the_form_of_gelu(tiny_weights):
    """GELU's tanh form is another function, so it isn't merged into exact GELU; "mlp" takes it."""
    model = adapted(tiny_weights, reads="ln")
    for block in model.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")
    assert adaptertune.merge(model) == 0
    adaptertune.add_adapters(model, 4, reads="ln", act="mlp")
    assert adaptertune.merge(model) == 2


@pytest.mark.parametrize("method", METHODS)
def test_zero_init_is_the_backbone_bit_for_bit(tiny_weights, method):
    """Zero-initialised adapters leave outputs bit for bit the same; init "small" doesn't."""
    plain, _ = vit.load(tiny_weights)
    zero = adapted(tiny_weights, **METHODS[method])
    small = adapted(tiny_weights, init="small")
    with torch.no_grad():
        assert torch.equal(zero.features(IMAGES), plain(IMAGES))
        assert not torch.equal(small.features(IMAGES), plain(IMAGES))


def spread(model, images):
    """The largest channel range at the input of the first qkv, relative to the median range."""
    low, high = export.channel_ranges(model, images)["blocks.0.attn.qkv"]
    return (high - low).max() / (high - low).median()


@pytest.mark.parametrize("reads", adaptertune.READS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_scale": True, "registers": 2},
        {"qkv_bias": False, "pool": "mean"},
        {"rope": True, "registers": 2},
    ],
    ids=["plain", "registers", "no bias", "rotary"],
)
@torch.no_grad()
def test_equalise_is_exact(tmp_path, changes, reads):
    """Equalising keeps an adapted network's outputs and makes its channels' ranges more alike."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, **changes)
    model = randomise(adapted(path, reads=reads)).double()
    images = IMAGES.double()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter += 0.3 * noise.double()
    model.blocks[0].norm1.weight[3] = 50  # a channel as wide as those that spoil int8
    before = model(images)
    spread_before = spread(model, images)
    export.equalise(model, images)
    assert torch.allclose(model(images), before, atol=1e-9)
    assert spread_before > 10
    assert spread(model, images) < spread_before / 3


# ------------------------------------------------------------------------------- how they start


def test_initial_values():
    """V is Xavier-uniform, biases are 0; U and u are 0 or, with "small", from N(0, 1e-4²)."""
    torch.manual_seed(0)
    zero = adaptertune.Adapter(256, 64)
    small = adaptertune.Adapter(256, 64, init="small")
    assert zero.down.weight.abs().max() <= (6 / (256 + 64)) ** 0.5  # Xavier's bound
    assert zero.down.weight.std() > 0.9 * (2 / (256 + 64)) ** 0.5
    for tensor in (zero.down.bias, zero.up.weight, zero.up.bias, small.down.bias):
        assert not tensor.any()
    assert 0.9e-4 < small.up.weight.std() < 1.1e-4
    assert small.up.bias.any()


def test_adaptformer_starts_from_kaiming(tiny_weights):
    """AdaptFormer's V lies within the bound of Kaiming's uniform initialisation and fills it."""
    torch.manual_seed(0)
    model = adapted(tiny_weights, method="adaptformer", rank=32)
    bound = 1 / D**0.5  # sqrt(6 / ((1 + 5) D)); Xavier's would be sqrt(6 / (D + r))
    assert 0.95 * bound < model.blocks[0].adapter.down.weight.abs().max() <= bound


def test_a_rank_alone_is_enough(tiny_weights):
    """add_adapters(model, rank=8) gives every block the paper's adapter of that rank."""
    model, _ = vit.load(tiny_weights)
    adaptertune.add_adapters(model, rank=8)
    for block in model.blocks:
        assert block.adapter.down.weight.shape == (8, D)
        assert (block.adapter.reads, block.adapter.scale) == ("block", 1.0)
        assert isinstance(block.adapter.act, nn.GELU)
        assert not block.adapter.up.weight.any()


def test_without_a_rank_it_is_the_methods(tiny_weights):
    """Settings that aren't given, such as the rank, take the method's own defaults."""
    model, _ = vit.load(tiny_weights)
    adaptertune.add_adapters(model, placement=[-1])
    assert model.blocks[0].adapter is None
    assert len(model.blocks[1].adapter.down.weight) == 8

    with pytest.raises(ValueError, match="rank 64: choose from 1 to the backbone's width, 32"):
        adaptertune.add_adapters(model, method="adaptformer")
    adaptertune.add_adapters(model, 16, method="adaptformer")
    adapter = model.blocks[0].adapter
    assert (adapter.reads, adapter.scale, adapter.dropout.p) == ("raw", 0.1, 0.1)
    assert isinstance(adapter.act, nn.ReLU)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"every": 2}, [0, 2, 4]),
        ({"every": 4}, [0, 4]),
        ({"blocks": [5, 0, 5]}, [0, 5]),
        ({"blocks": [-1, -6]}, [0, 5]),
        ({"blocks": torch.tensor([2, 4])}, [2, 4]),
        ({"blocks": map(int, "31")}, [1, 3]),
    ],
)
def test_placement(options, chosen):
    """choose_blocks takes blocks 0, k, 2k …, or blocks by number, from either end."""
    assert adaptertune.choose_blocks(6, **options) == chosen


@pytest.mark.parametrize(
    "options", [{"every": 7}, {"every": 0}, {"blocks": [6]}, {"blocks": [-7]}, {"blocks": []}]
)
def test_blocks_that_are_not_there(options):
    """Block numbers or intervals out of range are refused; the error states the valid ones."""
    with pytest.raises(ValueError, match="choose from (0 to 5|1 to 6)"):
        adaptertune.choose_blocks(6, **options)


@pytest.mark.parametrize("blocks", [torch.tensor([False, True]), [True], torch.tensor(3), "12", 3])
def test_what_is_no_list_of_blocks(blocks):
    """A mask, a single number or a text is refused as a placement."""
    with pytest.raises(ValueError, match="placement.*: give a list of (blocks|ints)"):
        adaptertune.choose_blocks(6, blocks=blocks)


def test_placement_of_add_adapters_is_checked(tiny_weights):
    """add_adapters, too, refuses a block that the model doesn't have."""
    with pytest.raises(ValueError, match="choose from 0 to 1"):
        adapted(tiny_weights, placement=[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reads": "after"}, "reads 'after': choose block, raw, ln, mlp"),
        ({"act": "silu"}, "act 'silu': choose gelu, relu, mlp"),
        ({"init": "one"}, "init 'one': choose zero, small"),
        ({"method": "vpt"}, "method 'vpt': choose adaptertune, adaptformer"),
    ],
)
def test_choices(tiny_weights, options, message):
    """An unknown choice is refused; the error names the value and the valid choices."""
    with pytest.raises(ValueError, match=message):
        adapted(tiny_weights, **options)


def test_choices_of_an_adapter():
    """`Adapter` itself checks its choices: init "zeros" isn't taken for the ablation "small"."""
    with pytest.raises(ValueError, match="init 'zeros': choose zero, small"):
        adaptertune.Adapter(D, 4, init="zeros")
    with pytest.raises(ValueError, match="reads 'input': choose block, raw, ln, mlp"):
        adaptertune.Adapter(D, 4, reads="input")


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_rank_that_cannot_be(tiny_weights, rank):
    """A rank must be from 1 to the width; 0 isn't taken for the default."""
    with pytest.raises(ValueError, match=f"rank {rank}: choose from 1 to the backbone's width, 32"):
        adapted(tiny_weights, rank=rank)


# ------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("learn_scale", [False, True])
def test_counts(tiny_weights, learn_scale):
    """A block has 2Dr + r + D trainable parameters, and one more if its scale is learnt."""
    plain, _ = vit.load(tiny_weights)
    model = adapted(tiny_weights, learn_scale=learn_scale)
    r = 4
    assert adaptertune.count(model) == {
        "frozen": sum(parameter.numel() for parameter in plain.parameters()),
        "adapters": 2 * (2 * D * r + r + D + learn_scale),
        "head": D * 5 + 5,
        "backbone": 0,
    }


def test_the_predicate_says_what_is_trained(tiny_weights):
    """Exactly the parameters that is_added names are trainable and get gradients."""
    model = adapted(tiny_weights)
    model(IMAGES).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == adaptertune.is_added(name)
        assert (parameter.grad is not None) == adaptertune.is_added(name)


def test_freeze_refuses_a_stray_parameter(tiny_weights):
    """freeze refuses a module that would be frozen unnoticed, and says what to call it."""
    model, _ = vit.load(tiny_weights)
    model.blocks[1].lora = nn.Linear(D, 4, bias=False)
    message = r"^blocks\.1\.lora\.weight is neither the backbone's .* the name 'adapter'"
    with pytest.raises(ValueError, match=message):
        adaptertune.freeze(model)
    with pytest.raises(ValueError, match=message):
        adaptertune.freeze(model, everything=True)


def test_freeze_accepts_an_adapter_of_ones_own(tiny_weights):
    """freeze leaves a module called `adapter` trainable, wherever in a block it is."""
    model, _ = vit.load(tiny_weights)
    model.blocks[1].attn.adapter = nn.Linear(D, 4, bias=False)
    adaptertune.freeze(model)
    assert list(adaptertune.trained(model)) == ["blocks.1.attn.adapter.weight"]


def test_weight_decay_on_matrices_alone(tiny_weights):
    """Only weight matrices are decayed: not biases, norms, tokens, positions or scales."""
    model = adapted(tiny_weights, learn_scale=True)
    adaptertune.freeze(model, everything=True)
    groups = adaptertune.parameter_groups(model, 0.05, 1e-3)
    others, decayed = sorted(groups, key=lambda group: group["weight_decay"])
    assert (others["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))

    ids = {id(parameter) for parameter in decayed["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in ids}
    expected = {"head.weight", "patch_embed.proj.weight"}
    for block in ("blocks.0", "blocks.1"):
        expected |= {f"{block}.adapter.down.weight", f"{block}.adapter.up.weight"}
        expected |= {f"{block}.attn.qkv.weight", f"{block}.attn.proj.weight"}
        expected |= {f"{block}.mlp.fc1.weight", f"{block}.mlp.fc2.weight"}
    assert names == expected


def test_the_head_may_have_its_own_learning_rate(tiny_weights):
    """The head's parameters, and no others, get `head_lr`."""
    model = adapted(tiny_weights)
    rate_of = {}
    for group in adaptertune.parameter_groups(model, 0.05, 1e-3, head_lr=1e-2):
        assert group["initial_lr"] == group["lr"]
        for parameter in group["params"]:
            rate_of[id(parameter)] = group["lr"]
    for name, parameter in adaptertune.trained(model).items():
        expected = 1e-2 if name.startswith("head.") else 1e-3
        assert rate_of.pop(id(parameter)) == expected
    assert not rate_of


# ---------------------------------------------------------------------------- adapt: each method

HEAD = ["head.bias", "head.weight"]
ADAPTERS_AND_HEAD = [
    "blocks.0.adapter.down.bias",
    "blocks.0.adapter.down.weight",
    "blocks.0.adapter.up.bias",
    "blocks.0.adapter.up.weight",
    "blocks.1.adapter.down.bias",
    "blocks.1.adapter.down.weight",
    "blocks.1.adapter.up.bias",
    "blocks.1.adapter.up.weight",
    *HEAD,
]
TRAINED = {  # "full" and "scratch" train everything
    "adaptertune": ADAPTERS_AND_HEAD,
    "adaptformer": ADAPTERS_AND_HEAD,
    "vpt": ["blocks.0.prompts", "blocks.1.prompts", *HEAD],
    "clip-adapter": ["head.image.0.weight", "head.image.2.weight"],
    "zero-shot": [],
    "head": HEAD,
}


def adapt(clip, tiny_weights, method, **settings):
    """A backbone that the method accepts, turned by `adapt` into a classifier of 7 classes."""
    if method in adaptertune.CLIP_METHODS:
        model, _ = vit.load(clip, head=True)
    else:
        model, _ = vit.load(tiny_weights)
    return model, adaptertune.adapt(model, method, 7, **settings)


@pytest.mark.parametrize("method", adaptertune.METHODS)
def test_adapt_trains_what_the_method_trains(clip, tiny_weights, method):
    """Each method trains exactly the listed parameters and gives a logit for each class."""
    settings = {"rank": 4} if method == "adaptformer" else {}
    model, _ = adapt(clip, tiny_weights, method, **settings)
    everything = sorted(name for name, _ in model.named_parameters())
    assert sorted(adaptertune.trained(model)) == TRAINED.get(method, everything)
    assert model(IMAGES).shape == (3, 7)
    if method in adaptertune.CLIP_METHODS:
        assert model.head.classes.shape == (7, 24)
    else:
        assert model.head.weight.shape == (7, D)
        assert not model.head.bias.any()
        assert 0.01 < model.head.weight.std() < 0.03  # timm's 0.02


def test_other_modules_are_not_merged(tiny_weights):
    """A module of one's own in an adapter's place stays there, though it looks like one."""

    model, _ = vit.load(tiny_weights)
    adaptertune.adapt(model, "adaptertune", 5, reads="ln", act="mlp")
    own = nn.Module()
    vars(own).update(vars(model.blocks[0].adapter))  # the same parts, with another forward
    model.blocks[0].adapter = own
    assert adaptertune.merge(model) == 1
    assert model.blocks[0].adapter is own


def test_a_trained_backbone_needs_its_fingerprint(tiny_weights, tmp_path):
    """A file with a part of the backbone (BitFit) states the fingerprint from before training, for
    the backbone isn't the one to load it into any more."""
    model, _ = vit.load(tiny_weights)
    settings = adaptertune.adapt(model, "head", 5)
    before = adaptertune.fingerprint(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith("head."))
    with torch.no_grad():
        model.blocks[0].norm1.bias += 1
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="bias was trained: give meta the fingerprint that the"):
        adaptertune.save(path, model, settings)
    adaptertune.save(path, model, settings | {"fingerprint": before})
    again, _ = vit.load(tiny_weights)
    adaptertune.adapt(again, "head", 5)
    adaptertune.load(path, again)
    assert torch.equal(again(IMAGES), model(IMAGES))


@pytest.mark.parametrize("before", ["adaptertune", "vpt"])
def test_adapt_begins_from_the_backbone(tiny_weights, before):
    """adapt removes the adapters or prompts of an earlier call; they would be trained unnoticed."""
    model, _ = vit.load(tiny_weights)
    adaptertune.adapt(model, before, 5)
    model.blocks[1].attn.adapter = nn.Linear(D, 4)  # of a user's own method
    model.patch_embed.proj.adapter = nn.Linear(D, D)
    adaptertune.adapt(model, "head", 5)
    assert list(adaptertune.trained(model)) == ["head.weight", "head.bias"]
    adaptertune.adapt(model, before, 5)
    adaptertune.adapt(model, "adaptertune", 5, placement=[0])
    assert sorted(adaptertune.trained(model)) == [
        "blocks.0.adapter.down.bias",
        "blocks.0.adapter.down.weight",
        "blocks.0.adapter.up.bias",
        "blocks.0.adapter.up.weight",
        "head.bias",
        "head.weight",
    ]


def test_adapt_to_scratch_forgets_the_backbone(tiny_weights, tmp_path):
    """ "scratch" replaces every pretrained value; norms and LayerScale start anew too."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, layer_scale=True)
    model, _ = vit.load(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adaptertune.adapt(model, "scratch", 5)
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            assert not (tensor == before[name]).any(), name
    block = model.blocks[0]
    assert torch.equal(block.norm1.weight, torch.ones(D))
    assert torch.equal(block.ls1.gamma, torch.full((D,), 1e-5))


def test_adapt_keeps_clips_projection(clip):
    """CLIP's methods can follow each other on one model. After a classifier took the place of the
    projection they are refused: it isn't taken for one."""
    model, _ = vit.load(clip, head=True)
    projection = model.head.weight.detach().clone()
    model.head.bias = nn.Parameter(torch.zeros(24))  # as in timm's files
    for method in ("zero-shot", "clip-adapter", "clip-adapter", "zero-shot"):
        adaptertune.adapt(model, method, 7)
        assert torch.equal(model.head.projection, projection)
    adaptertune.adapt(model, "head", 7)
    for method in adaptertune.CLIP_METHODS:
        with pytest.raises(ValueError, match=r"with its projection as head, .* vit.load"):
            adaptertune.adapt(model, method, 7)


def test_float16_is_not_trained(tiny_weights):
    """Adam's epsilon is 0 in float16, so zero gradients would give NaN; prediction is allowed."""
    model, _ = vit.load(tiny_weights)
    model.half()
    adaptertune.adapt(model, "adaptertune", 5)
    with pytest.raises(ValueError, match=r"blocks.0.adapter.down.weight is float16.*autocast"):
        adaptertune.parameter_groups(model, 0.05, 1e-3)


@pytest.mark.parametrize("method", adaptertune.METHODS)
def test_what_adapt_adds_follows_the_backbone(clip, tiny_weights, method):
    """What adapt adds has the backbone's device and precision, else the first batch fails; and its
    mode, else dropout is active in eval mode."""
    settings = {"rank": 4} if method == "adaptformer" else {}
    model, _ = vit.load(clip if method in adaptertune.CLIP_METHODS else tiny_weights, head=True)
    for training in (True, False):
        model.train(training)
        twin = copy.deepcopy(model).to("meta", torch.bfloat16)
        adaptertune.adapt(twin, method, 7, **settings)
        for tensor in [*twin.parameters(), *twin.buffers()]:
            assert (tensor.device.type, tensor.dtype) == ("meta", torch.bfloat16)
        adapters = [block.adapter for block in twin.blocks if block.adapter is not None]
        for adapter in adapters:
            assert adapter.dropout.training == training


@pytest.mark.parametrize("method", adaptertune.METHODS)
def test_adapt_returns_the_settings_in_force(clip, tiny_weights, method):
    """adapt returns the method's defaults, updated by the given settings and by computed ones."""
    expected = {"method": method} | adaptertune.METHODS[method]
    given = {}
    if method in adaptertune.ADAPTER_METHODS:
        given = {"rank": 4, "learn_scale": True}
    elif method == "vpt":
        given = {"prompts": 3}
    elif method == "clip-adapter":
        given = {"text_ratio": 0.5}
        expected["rank"] = 6  # a quarter of the embedding
    if method in adaptertune.PLACED_METHODS:
        expected["placement"] = [0, 1]
    expected |= given
    _, settings = adapt(clip, tiny_weights, method, **given)
    assert settings == expected


def test_adapt_by_the_settings_given(clip, tiny_weights):
    """adapt applies the given placement, shallow prompts and learnt ratios."""
    model, settings = adapt(clip, tiny_weights, "adaptertune", placement=[-1], scale=0.5)
    assert model.blocks[0].adapter is None
    assert model.blocks[1].adapter.scale == 0.5
    assert settings["placement"] == [1]

    model, _ = adapt(clip, tiny_weights, "vpt", prompts=3, deep=False)
    assert model.blocks[0].prompts.shape == (3, D)
    assert model.blocks[1].prompts is None

    model, settings = adapt(clip, tiny_weights, "clip-adapter", rank=5, learn_ratio=True)
    assert model.head.image[0].weight.shape == (5, 24)
    assert settings["rank"] == 5
    assert "head.image_ratio" in adaptertune.trained(model)


def test_adapt_refuses_what_cannot_be(clip, tiny_weights):
    """adapt refuses unknown methods, CLIP methods on other backbones, and invalid arguments."""
    with pytest.raises(ValueError, match="method 'ours': choose adaptertune, adaptformer, .*vpt"):
        adapt(clip, tiny_weights, "ours")
    model, _ = vit.load(tiny_weights)
    with pytest.raises(ValueError, match=r"CLIP's image tower .* choose a clip_\* --backbone"):
        adaptertune.adapt(model, "zero-shot", 7)
    for classes in (0, -1, 2.0, "7", ["a", "b"]):
        with pytest.raises(ValueError, match=r"classes .*: give their number, an int"):
            adaptertune.adapt(model, "head", classes)
    with pytest.raises(ValueError, match="head has no placement; adaptertune, adaptformer have"):
        adaptertune.adapt(model, "head", 7, placement=[0])  # it would be ignored
    for ratio in (5.0, -0.1):
        with pytest.raises(ValueError, match=f"a ratio of {ratio}: choose from 0 to 1"):
            adapt(clip, tiny_weights, "clip-adapter", ratio=ratio)
    for placement in (1, "first2"):
        with pytest.raises(ValueError, match=r"placement .*: give a list of blocks"):
            adaptertune.adapt(model, "adaptertune", 7, placement=placement)


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("adaptertune", "rank", "4"),
        ("adaptertune", "rank", 4.0),
        ("adaptertune", "rank", None),  # the file would say so, with adapters of rank 8
        ("adaptertune", "scale", "0.1"),
        ("adaptertune", "scale", float("nan")),
        ("adaptertune", "learn_scale", 1),
        ("adaptertune", "dropout", "0.1"),
        ("vpt", "prompts", "3"),
    ],
)
def test_settings_that_can_not_be(tiny_weights, method, setting, value):
    """A setting of a wrong type or value is refused before training, not on saving."""
    model, _ = vit.load(tiny_weights)
    default = adaptertune.METHODS[method][setting]
    message = f"{setting} {value!r} ({type(value).__name__}) isn't allowed; the default of "
    with pytest.raises(ValueError, match=re.escape(f"{message}{method} is {default!r}")):
        adaptertune.adapt(model, method, 7, **{setting: value})
    adaptertune.adapt(model, "adaptertune", 7, scale=np.float64(0.5))  # a float


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("adaptertune", {"rank": 0}),
        ("adaptertune", {"act": "tanh"}),
        ("adaptformer", {"placement": [7]}),
        ("adaptformer", {"placement": [0.0]}),
        ("adaptformer", {"placement": [torch.tensor(1.5)]}),
        ("adaptformer", {"placement": np.int64(1)}),
        ("adaptertune", {"placement": [True]}),
        ("vpt", {"prompts": 0}),
        ("clip-adapter", {}),
    ],
)
def test_an_error_leaves_the_model_as_it_was(tiny_weights, method, wrong):
    """A refused method takes no trained adapter or head away, and a fresh model stays usable."""
    fresh, _ = vit.load(tiny_weights)
    features = fresh(IMAGES)
    with pytest.raises(ValueError):
        adaptertune.adapt(fresh, method, 7, **wrong)
    assert torch.equal(fresh(IMAGES), features)
    assert not adaptertune.count(fresh)["frozen"]
    model = randomise(adapted(tiny_weights))
    before = model(IMAGES)
    names = dict(model.named_parameters())
    with pytest.raises(ValueError):
        adaptertune.adapt(model, method, 7, **wrong)
    assert torch.equal(model(IMAGES), before)
    after = dict(model.named_parameters())
    assert list(after) == list(names)
    assert all(after[name] is names[name] for name in names)
    assert all(block.adapter is not None for block in model.blocks)


@pytest.mark.parametrize("method", ["adaptertune", "vpt", "scratch"])
def test_an_unknown_parameter_leaves_the_model_as_it_was(tiny_weights, method):
    """`freeze` refuses a parameter that it doesn't know, which it finds after parts were added."""
    model, _ = vit.load(tiny_weights)
    before = model(IMAGES)
    model.blocks[0].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="neither the backbone's nor an adapter's"):
        adaptertune.adapt(model, method, 7)
    assert torch.equal(model(IMAGES), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    del model.blocks[0].mlp.extra
    adaptertune.adapt(model, method, 7)


def test_adapt_by_what_adapt_returned(tiny_weights):
    """adapt(model, classes=…, **settings) adapts another model the same way."""
    first, _ = vit.load(tiny_weights)
    second, _ = vit.load(tiny_weights)
    settings = adaptertune.adapt(first, "adaptformer", 5, rank=3, placement=list(np.arange(1)))
    assert adaptertune.adapt(second, classes=5, **settings) == settings
    assert json.dumps(settings["placement"]) == "[0]"  # an int, whatever was given
    assert [*second.state_dict()] == [*first.state_dict()]


def test_a_whole_network_is_a_backbone(tmp_path):
    """What `save` writes after --method full is read by vit.load with its own heads, pool and eps,
    which tensors don't show."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, pool="mean", heads=4, eps=1e-3)
    model, _ = vit.load(path)
    settings = adaptertune.adapt(model, "full", 5)
    adaptertune.save(tmp_path / "full.safetensors", randomise(model), settings)
    again, backbone = vit.load(tmp_path / "full.safetensors", head=True)
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert list(backbone.guessed) == ["--mean", "--std"]  # these, nobody stated
    settings |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    adaptertune.save(tmp_path / "full.safetensors", model, settings)
    assert not vit.load(tmp_path / "full.safetensors")[1].guessed

    larger, _ = vit.load(tmp_path / "full.safetensors", image_size=32)  # twice as large
    stale = adaptertune.read(tmp_path / "full.safetensors")[1] | {"fingerprint": "0" * 16}
    adaptertune.adapt(larger, "full", 5)
    adaptertune.save(tmp_path / "larger.safetensors", larger, stale)
    again, _ = vit.load(tmp_path / "larger.safetensors", head=True)
    assert torch.equal(again.pos_embed, larger.pos_embed)


def test_adapters_and_a_trained_backbone(tiny_weights, tmp_path):
    """A file with adapters isn't said to be a backbone, even if it holds all tensors."""
    model = adapted(tiny_weights)
    fingerprint = adaptertune.fingerprint(model)
    model.requires_grad_(True)
    adaptertune.save(tmp_path / "a.safetensors", model, {"fingerprint": fingerprint})
    assert "config" not in adaptertune.read(tmp_path / "a.safetensors")[1]


@pytest.mark.parametrize(("setting", "value"), [("pool", "mean"), ("eps", 0.1), ("heads", 4)])
def test_adapters_of_another_configuration(tmp_path, setting, value):
    """Adapters aren't loaded into the same tensors under another configuration."""
    model = adapted(write_tiny(tmp_path / "w.safetensors", seed=0))
    adaptertune.save(tmp_path / "a.safetensors", model)
    other = adapted(write_tiny(tmp_path / "other.safetensors", seed=0, **{setting: value}))
    with pytest.raises(ValueError, match=f"was trained with {setting} .*, not {value}") as error:
        adaptertune.load(tmp_path / "a.safetensors", other)
    assert ("leave out the option" in str(error.value)) == (setting == "heads")


def test_the_same_backbone_in_half_precision(tiny_weights, tmp_path):
    """A backbone that was converted has another fingerprint; the message says why."""
    adaptertune.save(tmp_path / "a.safetensors", adapted(tiny_weights))
    with pytest.raises(ValueError, match="not on this backbone in torch.float16"):
        adaptertune.load(tmp_path / "a.safetensors", adapted(tiny_weights).half())


def test_metadata_that_json_can_not_hold(tiny_weights, tmp_path):
    """Values that aren't JSON's are refused as metadata."""
    model = adapted(tiny_weights)
    with pytest.raises(ValueError, match="metadata that JSON can't hold .*int64"):
        adaptertune.save(tmp_path / "a.safetensors", model, {"seed": np.int64(3)})


def test_an_activation_of_the_mlp_alone(tmp_path):
    """QuickGELU is no choice of `adapt` but "mlp" is, so a file states that."""
    path = write_tiny(tmp_path / "w.safetensors", seed=0, quick_gelu=True)
    model = adapted(path, act="mlp")
    adaptertune.save(tmp_path / "a.safetensors", model)
    meta = adaptertune.load(tmp_path / "a.safetensors", model)
    assert meta["act"] == "mlp"
    adaptertune.load(tmp_path / "a.safetensors", adapted(path, act=meta["act"]))


def test_only_a_vit_can_be_adapted(tiny_weights, tmp_path):
    """Only a bare vit.ViT is accepted. A wrapper renames parameters: its file couldn't be loaded,
    and its head would count as the backbone's. Blocks of other networks call no adapters."""
    model, _ = vit.load(tiny_weights)
    settings = adaptertune.adapt(model, "adaptertune", 7)
    path = tmp_path / "a.safetensors"
    compiled = torch.compile(model, backend="eager")
    adaptertune.save(path, compiled._orig_mod, settings)
    for wrapped, inner in ((compiled, "_orig_mod"), (nn.DataParallel(model), "module")):
        for call, *arguments in (
            (adaptertune.adapt, wrapped, "head", 7),
            (adaptertune.count, wrapped),
            (adaptertune.parameter_groups, wrapped, 0.05, 1e-3),
            (adaptertune.save, path, wrapped, settings),
            (adaptertune.load, path, wrapped),
        ):
            with pytest.raises(ValueError, match=rf"give the vit.ViT in it, \.{inner}"):
                call(*arguments)
    other = nn.Module()
    other.blocks = nn.ModuleList([nn.Linear(D, D)])
    calls = ((adaptertune.add_adapters, 4), (adaptertune.adapt, "head", 7), (adaptertune.merge,))
    for call, *arguments in calls:
        with pytest.raises(ValueError, match=r"a Module can't be adapted, only a vit\.ViT"):
            call(other, *arguments)
    text = vit.TextTower(model.config, vocabulary=9, embedding=4)
    with pytest.raises(ValueError, match=r"a TextTower can't be adapted, only a vit\.ViT"):
        adaptertune.adapt(text, "head", 7)


def test_a_method_half_added(clip, tiny_weights, monkeypatch):
    """A method with a row in METHODS but no branch is refused: it would train nothing."""
    monkeypatch.setitem(adaptertune.METHODS, "ours", {})
    with pytest.raises(ValueError, match="row for ours, but add_parts has no branch"):
        adapt(clip, tiny_weights, "ours")


def test_a_placement_that_is_forgotten(clip, tiny_weights, monkeypatch):
    """A method whose adapters aren't where its placement says is refused."""
    plain = adaptertune.add_adapters

    def misplaced(model, placement, **settings):
        plain(model, placement=[0], **settings)

    monkeypatch.setattr(adaptertune, "add_adapters", misplaced)
    with pytest.raises(ValueError, match=r"placement \[1\], but blocks \[0\] have adapters"):
        adapt(clip, tiny_weights, "adaptertune", placement=[1])
    adapt(clip, tiny_weights, "adaptertune", placement=[0])


def test_which_blocks_are_adapted(clip, tiny_weights, monkeypatch):
    """A block counts as adapted if it shares another one's adapter, or has prompts, or an adapter
    without parameters, even if it is only a function. The next `adapt` takes that one out too."""

    def shared(model, placement, **settings):
        model.blocks[0].adapter = adaptertune.Adapter(model.config.width, 4)
        model.blocks[1].adapter = model.blocks[0].adapter

    monkeypatch.setattr(adaptertune, "add_adapters", shared)
    model, settings = adapt(clip, tiny_weights, "adaptertune")
    assert settings["placement"] == [0, 1]
    assert model.blocks[1].adapter is model.blocks[0].adapter
    model, _ = adapt(clip, tiny_weights, "vpt", deep=False)
    adaptertune.check_placement(model, [0])
    model.blocks[1].mlp.adapter = nn.Identity()
    adaptertune.check_placement(model, [0, 1])
    model.blocks[1].attn.adapter = torch.neg
    adaptertune.check_placement(model, [0, 1])
    adaptertune.adapt(model, "head", classes=2)
    adaptertune.check_placement(model, [])


# ------------------------------------------------------------------- methods of one's own


class Doubled(nn.Module):
    """Twice a layer's output, by a factor that is trained."""

    def __init__(self):
        super().__init__()
        self.factors = nn.Parameter(torch.full((2, 1), 1.0))

    def forward(self, y):
        return y * self.factors.sum()


def call_adapter(layer, inputs, y):
    """The hook of the module docstring of adaptertune.py."""
    return y if layer.adapter is None else layer.adapter(y).to(y.dtype)


def double(model, method, classes, settings):
    """Stands for `add_parts` with a method that changes a layer's output by a hook."""
    layer = model.blocks[0].mlp.fc1
    layer.adapter = Doubled()
    if call_adapter not in layer._forward_hooks.values():
        layer.register_forward_hook(call_adapter)
    adaptertune.add_head(model, classes)
    return {}


def test_a_method_by_hooks(tiny_weights, monkeypatch):
    """A method that hooks into layers is trained, decayed as a matrix, and taken out by another
    method. An error of `adapt` takes its hooks out and leaves earlier ones in."""
    model, _ = vit.load(tiny_weights)
    calls = []
    layer = model.blocks[0].mlp.fc1
    earlier = layer.register_forward_hook(lambda *_: calls.append(1))
    before = model(IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(adaptertune, "add_parts", double)
        model.blocks[0].extra = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="neither the backbone's"):
            adaptertune.adapt(model, "head", 7)
        assert torch.equal(model(IMAGES), before)
        assert len(calls) == 2
        del model.blocks[0].extra
        adaptertune.adapt(model, "head", 7)
        doubled = model(IMAGES)
    decayed, rest = adaptertune.parameter_groups(model, 0.05, 1e-3)
    sizes = {each.shape for each in decayed["params"]}
    assert sizes == {(2, 1), (7, model.config.width)}
    assert [each.shape for each in rest["params"]] == [(7,)]
    assert torch.equal(copy.deepcopy(model)(IMAGES), doubled)  # a copy calls its own adapter
    calls.clear()
    adaptertune.adapt(model, "head", 7)
    plain, _ = vit.load(tiny_weights)
    assert torch.equal(model.features(IMAGES), plain.features(IMAGES))
    assert len(calls) == 1
    earlier.remove()
    model(IMAGES)
    assert len(calls) == 1


class Gated(adaptertune.Adapter):
    """An adapter with another function."""

    def forward(self, x):
        return super().forward(x).tanh()


def test_a_class_of_ones_own_is_not_merged(tiny_weights, monkeypatch):
    """`merge` leaves a subclass of Adapter alone, since it doesn't know what that computes."""
    monkeypatch.setattr(adaptertune, "Adapter", Gated)
    model, _ = vit.load(tiny_weights)
    adaptertune.adapt(model, "adaptformer", 7, rank=4, reads="ln", act="mlp")
    monkeypatch.undo()
    before = randomise(model)(IMAGES)
    assert adaptertune.merge(model) == 0
    assert torch.equal(model(IMAGES), before)


def test_blocks_that_share_an_adapter(tiny_weights, tmp_path):
    """An adapter that all blocks share is counted once, saved, and loaded into all."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = adapted(tiny_weights)
        for block in model.blocks:
            block.adapter = model.blocks[0].adapter
        models.append(model)
    first, second = models
    randomise(first)
    one = sum(each.numel() for each in first.blocks[0].adapter.parameters())
    assert adaptertune.count(first)["adapters"] == one
    adaptertune.save(tmp_path / "a.safetensors", first)
    adaptertune.load(tmp_path / "a.safetensors", second)
    assert torch.equal(second(IMAGES), first(IMAGES))


# ------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("method", adaptertune.METHODS)
def test_adapt_by_a_file(clip, tiny_weights, tmp_path, method):
    """`settings_of` a file's metadata adapt a new model like the one that was saved."""
    given = {"rank": 4, "placement": [1]} if method == "adaptformer" else {}
    model, settings = adapt(clip, tiny_weights, method, **given)
    path = tmp_path / "a.safetensors"
    adaptertune.save(path, randomise(model), settings | {"init": "adapters.pt", "note": 1})
    _, meta = adaptertune.read(path)
    weights, head = (clip, True) if method in adaptertune.CLIP_METHODS else (tiny_weights, False)
    again, _ = vit.load(weights, head=head)
    adaptertune.adapt(again, classes=7, **adaptertune.settings_of(meta))
    adaptertune.load(path, again)
    assert torch.equal(again(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match="method"):
        adaptertune.settings_of({"rank": 4})


def test_file_holds_adapters_and_head_alone(tiny_weights, tmp_path):
    """A file holds exactly the tensors of adapters and head; no other file is left beside it."""
    adaptertune.save(tmp_path / "a.safetensors", adapted(tiny_weights))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sorted(file.keys()) == ADAPTERS_AND_HEAD
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("method", adaptertune.METHODS)
def test_round_trip(clip, tiny_weights, tmp_path, method):
    """For every method, a saved model gives the same logits in a new model, and meta comes back."""
    settings = {"rank": 4} if method == "adaptformer" else {}
    torch.manual_seed(1)
    model, _ = adapt(clip, tiny_weights, method, **settings)
    original = adaptertune.fingerprint(model)
    randomise(model)
    if method in adaptertune.CLIP_METHODS:
        model.head.classes.normal_()
        model.head.scale.fill_(20)
    if method in adaptertune.WHOLE_METHODS:
        model.blocks[0].attn.qkv.weight.data.add_(0.1)
    meta = {"version": 1, "backbone": "tiny"}
    if method != "scratch":  # which has no backbone
        meta["fingerprint"] = original
    adaptertune.save(tmp_path / "a.safetensors", model, meta)

    torch.manual_seed(2)
    again, _ = adapt(clip, tiny_weights, method, **settings)
    model.eval()
    again.eval()
    with torch.no_grad():
        assert not torch.equal(again(IMAGES), model(IMAGES))
        assert adaptertune.load(tmp_path / "a.safetensors", again).items() >= meta.items()
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_save_without_meta(tiny_weights, tmp_path):
    """save records fingerprint and adapter settings by itself, so another backbone is refused."""
    model = randomise(adapted(tiny_weights))
    adaptertune.save(tmp_path / "a.safetensors", model)
    again = adapted(tiny_weights)
    meta = adaptertune.load(str(tmp_path / "a.safetensors"), again)
    known = {"version": 1, "fingerprint": adaptertune.fingerprint(model)}
    known |= {"reads": "block", "act": "gelu", "scale": 1.0}
    assert meta == known | {"heads": 2, "mlp_act": "gelu", "pool": "token", "eps": 1e-6}
    assert torch.equal(again(IMAGES), model(IMAGES))

    other = adapted(write_tiny(tmp_path / "other.safetensors", seed=1))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"on another backbone \(\w{16}\), not on this backbone"):
        adaptertune.load(tmp_path / "a.safetensors", other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])  # nothing was copied


def test_another_backbone_is_refused_by_name(tiny_weights, tmp_path):
    """On another backbone, the error gives the names and fingerprints of both."""
    adaptertune.save(tmp_path / "a.safetensors", adapted(tiny_weights), {"backbone": "tiny"})
    other = adapted(write_tiny(tmp_path / "other.safetensors", seed=1))
    message = r"trained on tiny \([0-9a-f]{16}\), not on other \([0-9a-f]{16}\)"
    with pytest.raises(ValueError, match=message):
        adaptertune.load(tmp_path / "a.safetensors", other, name="other")


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"method": "adaptformer"}, "reads block, not raw"),
        ({"reads": "ln"}, "reads block, not ln"),
        ({"scale": 3.0}, "scale 1.0, not 3.0"),
        ({"act": "relu"}, "act gelu, not relu"),
    ],
)
def test_other_settings_of_the_same_shape_are_refused(tiny_weights, tmp_path, options, differs):
    """Adapters that compute something else are refused, even if their tensors' shapes agree."""
    model, _ = vit.load(tiny_weights)
    settings = adaptertune.adapt(model, "adaptertune", 5, rank=4)
    adaptertune.save(tmp_path / "a.safetensors", model, settings)
    options = {"method": "adaptertune", "rank": 4} | options
    other, _ = vit.load(tiny_weights)
    adaptertune.adapt(other, options.pop("method"), 5, **options)
    with pytest.raises(ValueError, match=f"a.safetensors was trained with {differs}; leave out"):
        adaptertune.load(tmp_path / "a.safetensors", other)
    alike, _ = vit.load(tiny_weights)
    adaptertune.adapt(alike, "adaptertune", 5, rank=4, act="mlp")  # GELU, too
    adaptertune.load(tmp_path / "a.safetensors", alike)


@pytest.mark.parametrize("ratio", ["ratio", "text_ratio"])
def test_another_ratio_is_refused(clip, tiny_weights, tmp_path, ratio):
    """A different CLIP-Adapter ratio is refused; a learnt ratio is a tensor and is loaded."""
    settings = {"ratio": 0.2, "text_ratio": 0.2}
    model, _ = adapt(clip, tiny_weights, "clip-adapter", **settings)
    adaptertune.save(tmp_path / "a.safetensors", model)
    other, _ = adapt(clip, tiny_weights, "clip-adapter", **settings | {ratio: 0.6})
    with pytest.raises(ValueError, match=f"with {ratio.replace('_', ' ')} 0.2, not 0.6"):
        adaptertune.load(tmp_path / "a.safetensors", other)

    learnt, meta = adapt(clip, tiny_weights, "clip-adapter", **settings, learn_ratio=True)
    adaptertune.save(tmp_path / "a.safetensors", learnt, meta)
    other, _ = adapt(
        clip, tiny_weights, "clip-adapter", **settings | {ratio: 0.6}, learn_ratio=True
    )
    adaptertune.load(tmp_path / "a.safetensors", other)
    assert other.head.image_ratio == other.head.text_ratio == torch.tensor(0.2)


@pytest.mark.parametrize(
    ("options", "differs"),
    [({"heads": 4}, "heads 2, not 4"), ({"quick_gelu": True}, "mlp act gelu, not quick_gelu")],
)
def test_a_backbone_that_is_used_otherwise_is_refused(tiny_weights, tmp_path, options, differs):
    """Another number of heads or MLP activation is refused: the fingerprint covers tensors only."""
    adaptertune.save(tmp_path / "a.safetensors", adapted(tiny_weights))
    other, _ = vit.load(tiny_weights, **options)
    adaptertune.adapt(other, "adaptertune", 5, rank=4)
    with pytest.raises(ValueError, match=f"trained with {differs}"):
        adaptertune.load(tmp_path / "a.safetensors", other)


@pytest.mark.parametrize(
    ("method", "fingerprint", "missing"),
    [("adaptertune", False, "blocks.0.attn.proj.bias"), ("full", True, "blocks.1.norm2.bias")],
)
def test_a_backbone_that_the_file_lacks(clip, tiny_weights, tmp_path, method, fingerprint, missing):
    """A file that claims to hold the whole backbone is refused if it lacks any tensor of it."""
    model, _ = adapt(clip, tiny_weights, method)
    tensors = adaptertune.saved_tensors(model)
    tensors.pop(missing, None)
    known = adaptertune.fingerprint(model) if fingerprint else ""
    header = json.dumps({"version": 1, "method": method, "fingerprint": known})
    save_file(tensors, tmp_path / "a.safetensors", {"adaptertune": header})
    with pytest.raises(ValueError, match=f"from the file's: {missing} is missing in the file"):
        adaptertune.load(tmp_path / "a.safetensors", model)


def test_a_whole_network_comes_back(clip, tiny_weights, tmp_path):
    """A whole network, saved after training without a fingerprint, is loaded onto its backbone."""
    model, settings = adapt(clip, tiny_weights, "full")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(0.1)
    adaptertune.save(tmp_path / "a.safetensors", model, settings)
    again, _ = adapt(clip, tiny_weights, "full")
    adaptertune.load(tmp_path / "a.safetensors", again)
    assert torch.equal(again(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_values_that_are_no_floats_are_refused(tiny_weights, tmp_path, kind):
    """Tensors of integers, booleans or complex numbers, such as quantised weights, are refused."""
    model = adapted(tiny_weights)
    tensors = {name: each.to(kind) for name, each in adaptertune.saved_tensors(model).items()}
    header = json.dumps({"version": 1, "fingerprint": adaptertune.fingerprint(model)})
    save_file(tensors, tmp_path / "a.safetensors", {"adaptertune": header})
    with pytest.raises(ValueError, match=f"is of {kind}; save it as floats"):
        adaptertune.load(tmp_path / "a.safetensors", model)


def test_integers_of_a_module_of_ones_own(tiny_weights, tmp_path):
    """Integers of a user's own module, such as a batch norm's counter, are saved and loaded."""
    models = []
    for _ in range(2):
        model = adapted(tiny_weights)
        model.blocks[1].attn.adapter = nn.BatchNorm1d(D)
        models.append(model)
    model, again = models
    model.blocks[1].attn.adapter(torch.randn(4, D))
    adaptertune.save(tmp_path / "a.safetensors", model)
    adaptertune.load(tmp_path / "a.safetensors", again)
    assert again.blocks[1].attn.adapter.num_batches_tracked == 1


def test_float8_and_float64(tiny_weights, tmp_path):
    """float8 tensors are loaded as they are; float64 values that overflow float32 are refused."""
    model = adapted(tiny_weights)
    tensors = adaptertune.saved_tensors(randomise(model))
    header = json.dumps({"version": 1, "fingerprint": adaptertune.fingerprint(model)})
    eight = {name: each.to(torch.float8_e4m3fn) for name, each in tensors.items()}
    save_file(eight, tmp_path / "a.safetensors", {"adaptertune": header})
    adaptertune.load(tmp_path / "a.safetensors", model)
    assert torch.equal(model.head.weight, eight["head.weight"].float())

    large = {name: each.double() * 1e300 for name, each in tensors.items()}
    save_file(large, tmp_path / "a.safetensors", {"adaptertune": header})
    with pytest.raises(ValueError, match="has values that aren't finite"):
        adaptertune.load(tmp_path / "a.safetensors", model)


@pytest.mark.parametrize("meta", [{"lr": float("nan")}, {"rank": None}, {"deep": 1}], ids=str)
def test_what_could_not_be_read_is_not_saved(tiny_weights, tmp_path, meta):
    """save refuses metadata that `read` would refuse, and writes no file."""
    (name,) = meta
    with pytest.raises(ValueError, match=f"^{name} is {meta[name]}$"):
        adaptertune.save(tmp_path / "a.safetensors", adapted(tiny_weights), meta)
    assert not any(tmp_path.glob("a.*"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 8}, "blocks.0.adapter.down.bias is [4] in the file, [8] in the model"),
        ({"placement": [0]}, "blocks.1.adapter.down.bias is [4] in the file, missing in the model"),
        (
            {"learn_scale": True},
            "blocks.0.adapter.scale is missing in the file, [] in the model; blocks.1.adapter",
        ),
    ],
)
def test_other_adapters_are_refused(tiny_weights, tmp_path, options, named):
    """Adapters of another shape, placement or kind are refused; the error names the tensors."""
    adaptertune.save(tmp_path / "a.safetensors", adapted(tiny_weights))
    model = adapted(tiny_weights, **options)
    message = re.escape(f"the model's tensors differ from the file's: {named}")
    with pytest.raises(ValueError, match=message):
        adaptertune.load(tmp_path / "a.safetensors", model)


@pytest.mark.parametrize(
    "meta", [None, {"adaptertune": '{"version": 2, "fingerprint": "", "backbone": "tiny"}'}]
)
def test_a_file_of_another_kind_is_refused(tiny_weights, tmp_path, meta):
    """A safetensors file without our metadata, or of a later version, is refused."""
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=meta)
    with pytest.raises(ValueError, match=r"not an adapter file of train.py \(version .*expected 1"):
        adaptertune.load(tmp_path / "a.safetensors", adapted(tiny_weights))


def test_a_missing_or_damaged_file_is_refused(tiny_weights, tmp_path):
    """A missing or truncated file gives a ValueError that names it, not safetensors' error."""
    model = adapted(tiny_weights)
    with pytest.raises(ValueError, match="no adapters at .*a.safetensors; give the folder"):
        adaptertune.load(tmp_path / "a.safetensors", model)
    adaptertune.save(tmp_path / "a.safetensors", model)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="a.safetensors is damaged or not a safetensors file"):
        adaptertune.load(tmp_path / "a.safetensors", model)


def test_start_from_names_what_is_missing(tiny_weights):
    """start_from names the first tensor that the file lacks."""
    missing = "blocks.0.adapter.down.bias is missing in the file, .* another --rank, --blocks"
    with pytest.raises(ValueError, match=missing):
        adaptertune.start_from(adapted(tiny_weights), {"blocks.0.adapter.up.bias": torch.zeros(D)})
    model = adapted(tiny_weights)
    elsewhere = {"blocks.9.adapter.up.bias": torch.zeros(D)}
    with pytest.raises(ValueError, match="was it made with another --rank, --blocks"):
        adaptertune.start_from(model, elsewhere)
    with pytest.raises(ValueError, match="was it made with another --method"):
        adaptertune.start_from(adapted(tiny_weights), {"norm.adapter.shift": torch.zeros(D)})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("blocks.1.adapter.scale", torch.ones(()), r"scale is \[\] in the file, missing in the"),
        ("blocks.2.adapter.up.bias", torch.ones(D), "blocks.2.adapter.up.bias is .* missing in"),
        ("blocks.0.adaptmlp.adapter_layer_norm_before.bias", torch.ones(D), "missing in the model"),
        ("blocks.0.adapter.up.bias", torch.full((D,), torch.nan), "values that aren't finite"),
        ("blocks.0.adapter.up.bias", torch.ones(D, dtype=torch.int8), "is of torch.int8; save"),
    ],
)
def test_start_from_takes_all_or_nothing(tiny_weights, name, value, reason):
    """start_from refuses a file with extra or invalid tensors, and leaves the model unchanged."""
    tensors = randomise(adapted(tiny_weights)).state_dict()
    model = adapted(tiny_weights)
    with pytest.raises(ValueError, match=reason):
        adaptertune.start_from(model, tensors | {name: value})
    assert not model.blocks[0].adapter.up.weight.any()


def test_start_from_with_buffers_and_shared_modules(tiny_weights):
    """A file that `save` wrote of adapters with buffers, or of one module in several blocks, can be
    started from."""
    model = adapted(tiny_weights)
    model.blocks[0].adapter.register_buffer("calls", torch.tensor(7))
    model.blocks[1].adapter = model.blocks[0].adapter
    tensors = adaptertune.saved_tensors(randomise(model))
    again = copy.deepcopy(model)
    randomise(again)
    again.blocks[0].adapter.calls.zero_()
    adaptertune.start_from(again, tensors)
    assert again.blocks[1].adapter.calls == 7
    assert torch.equal(again.blocks[1].adapter.up.weight, model.blocks[0].adapter.up.weight)


def test_fingerprint(tiny_weights):
    """The fingerprint covers the backbone alone, at any image size; any weight affects it."""
    model = adapted(tiny_weights)
    larger, _ = vit.load(tiny_weights, image_size=32)
    first = adaptertune.fingerprint(model)
    assert adaptertune.fingerprint(larger) == first
    with torch.no_grad():
        model.head.weight.add_(1)
        model.blocks[0].adapter.up.weight.add_(1)
        assert adaptertune.fingerprint(model) == first
        model.blocks[1].norm2.bias[3] += 1e-6
        assert adaptertune.fingerprint(model) != first


def test_a_file_says_what_its_adapters_compute(tiny_weights, tmp_path):
    """A file records what its adapters compute, even if no settings are given, since other
    functions have the same shapes. For an unadapted model, the error says how to adapt it."""
    path = tmp_path / "a.safetensors"
    model, _ = vit.load(tiny_weights)
    settings = adaptertune.adapt(model, "adaptertune", 5, rank=4)
    adaptertune.save(path, model)
    other, _ = vit.load(tiny_weights)
    adaptertune.adapt(other, "adaptformer", 5, rank=4)
    with pytest.raises(ValueError, match="was trained with reads block, not raw"):
        adaptertune.load(path, other)
    adaptertune.load(path, model)

    adaptertune.save(path, model, settings)
    message = r"; adapt the model first, with method adaptertune, rank 4, placement \[0, 1\]$"
    with pytest.raises(ValueError, match=message):
        adaptertune.load(path, vit.load(tiny_weights)[0])

    adaptertune.add_adapters(model, 4, act="relu", placement=[1])  # of two kinds
    adaptertune.save(path, model)
    meta = adaptertune.load(path, model)
    assert "act" not in meta
    assert (meta["reads"], meta["scale"]) == ("block", 1.0)


def test_a_file_says_what_its_adapters_compute_now(tiny_weights, tmp_path):
    """What was changed in the model after `adapt` is written, not what `adapt` returned."""
    path = tmp_path / "a.safetensors"
    model, _ = vit.load(tiny_weights)
    settings = adaptertune.adapt(model, "adaptertune", 5, rank=4, act="mlp")
    randomise(model)
    for block in model.blocks:
        block.adapter.scale = 0.5
    adaptertune.save(path, model, settings)
    other, _ = vit.load(tiny_weights)
    adaptertune.adapt(other, "adaptertune", 5, rank=4)
    with pytest.raises(ValueError, match="was trained with scale 0.5, not 1.0"):
        adaptertune.load(path, other)
    adaptertune.adapt(other, "adaptertune", 5, rank=4, scale=0.5)
    assert adaptertune.load(path, other)["act"] == "mlp"
    assert torch.equal(other(IMAGES), model(IMAGES))
    for block in model.blocks:
        block.adapter.act = nn.ReLU()
    adaptertune.save(path, model, settings)
    assert adaptertune.read(path)[1]["act"] == "relu"
    model.blocks[0].adapter.scale = 3.0
    with pytest.raises(ValueError, match=r"differ in scale \(0.5, 3.0\), and a file states one"):
        adaptertune.save(path, model, settings)


def test_the_activation_of_the_mlp(tiny_weights, tmp_path):
    """A file may state the activation "mlp": it is that of the model's own MLP."""
    path = tmp_path / "a.safetensors"
    model = adapted(tiny_weights, act="mlp")
    adaptertune.save(path, model, {"act": "mlp"})
    adaptertune.load(path, model)
    adaptertune.load(path, adapted(tiny_weights, act="gelu"))
    with pytest.raises(ValueError, match="was trained with act gelu, not relu"):
        adaptertune.load(path, adapted(tiny_weights, act="relu"))


def test_a_file_without_fingerprint(tmp_path):
    """Adapters whose file lacks a fingerprint aren't loaded onto any backbone."""
    path = tmp_path / "a.safetensors"
    save_file({"head.weight": torch.zeros(1)}, path, {"adaptertune": json.dumps({"version": 1})})
    with pytest.raises(ValueError, match="its metadata lack fingerprint"):
        adaptertune.load(path, torch.nn.Linear(1, 1))
