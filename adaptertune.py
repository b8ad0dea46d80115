"""AdapterTune: adapt a frozen Vision Transformer with low-rank adapters initialised to zero.

A small bottleneck after a block adds a correction to the residual stream h:

    h <- h + s · (U · act(V · x + v) + u)        V [r, D]   v [r]   U [D, r]   u [D]

AdapterTune (https://arxiv.org/abs/2603.14706): the input x is h itself, the block's output; GELU;
s = 1. AdaptFormer (https://arxiv.org/abs/2205.13535): x is the residual stream before the MLP's
LayerNorm, as in its code; ReLU; s = 0.1. Both descend from Houlsby's adapter
(https://arxiv.org/abs/1902.00751), which sits in the residual branches, twice per block.

U and u are initialised to zero, so the correction is exactly zero before the first step: training
starts at the pretrained function, bit for bit. V is random. In the first step only U and u have
gradients other than zero, from the second on V and v too. (If V were zero as well, only u would
ever change.) AdamW's steps don't depend on the scale of the gradients, so s acts as a factor on the
learning rate of U and u.

Only the adapters (2Dr + r + D parameters for each adapted block) and the classifier ("head") are
trained. Everything else is frozen, norms included.

An adapter is nonlinear, so it can't be folded into the backbone's weights, with one exception:
an adapter that reads LayerNorm(x) and uses the MLP's activation is equivalent to r more hidden
units of that MLP (`merge_into_mlp`).

Besides adapters: CLIP-Adapter (`ClipHead`), prompts (`add_prompts`), and the baselines.

Shapes: B images, N tokens, D width, r rank, P prompts, E CLIP's embedding width, K classes.

How to add a method, once you have read this file, with LoRA on qkv as the example:
1. Here: add a row to METHODS with its settings, {"rank": 8, "scale": 1.0} (LoRA's α/r). Write a
   module of two nn.Linear without biases, down [r, D] and up [3D, r], with up initialised to zero;
   `check_rank` refuses a rank that is no rank. Write a function `add_lora` that puts one into each
   `block.attn.adapter`, with `.to(model.cls_token).train(model.training)` as in `add_adapters`, and
   a branch in `add_parts` that calls it and `add_head`. A parameter with ".adapter." in its name is
   trained, counted and saved (`is_added`); a buffer is saved. Add settings that tensors don't show,
   here the scale, to `unseen_settings`. LoRA is linear, so a function that `merge` calls can add
   s·up·down to qkv.weight and set `attn.adapter` to None.
2. vit.py, Attention: set `self.adapter = None`. In forward, unless it is None, add
   `self.adapter(x)` to qkv before qkv is split into heads.
3. train.py: add the method's learning rate to RATES (begin with 5e-3), which makes it a choice of
   --method. --rank and --scale exist; any other setting needs an option of its name in
   `add_method_options`, whose default is None. To support --every and --blocks, add the method to
   PLACED_METHODS (below): its settings then have "placement", the blocks that `add_lora` is to
   change. If its start isn't the backbone's function, add it to `check_no_epochs`.
4. export.py: nothing for a method that `merge` removes. Any other needs a branch in `write_block`,
   `write_attention` or `write_head`. An incomplete graph fails the check against PyTorch.
5. tests: in test_adaptertune.py add a row to TRAINED with the names of the trained parameters, in
   test_methods.py the method to the lists of `test_load_run` and `test_every_method_exports`.
   Some tests of help and errors list all methods, or those that have a setting: extend their texts.
6. If a line that begins with "error:" doesn't say where it comes from, run
   `python -X dev train.py …`, which prints the traceback.

Other kinds of methods need no change to vit.py. A module of your own in `block.adapter` needs an
attribute `reads` (READS) and a branch in export.py's `write_block`. BatchNorm in it sees a batch in
parts (train.py's `count_parts`), with torchrun those of its own process.

A module that changes a layer's output (SSF, https://arxiv.org/abs/2210.08823) becomes a child of
that layer named `adapter`, which a forward hook calls. The hook takes the layer from its argument,
since export copies the model; an `adapt` to another method sets `layer.adapter` to None.

    def call_adapter(layer, inputs, y):  # y [B, N, D]; of patch_embed.proj [B, D, g, g]
        return y if layer.adapter is None else layer.adapter(y).to(y.dtype)  # bf16 under autocast

    layer.adapter = ScaleAndShift(D).to(model.cls_token).train(model.training)
    if call_adapter not in layer._forward_hooks.values():
        layer.register_forward_hook(call_adapter)

`merge` must fold it into the layer's weight and bias; if the layer has no bias, give it one. A
method that trains backbone weights (BitFit) enables their gradients in `adapt`, after `freeze`;
they are saved too. Take `fingerprint(model)` before training, for `save`.
"""

import copy
import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

VERSION = 1  # of the adapter file's format

# The settings of each method and their defaults. These are the published ones, except for the rank
# of AdapterTune (16 in its code) and the prompts of VPT (5, shallow, in its code; its paper tries 1
# to 200). AdaptFormer reads LN(x) in the paper's equation, but x itself in its code
# (adapter_layernorm_option="none"); the default follows the code. AdaptFormer's code also has a
# BatchNorm before the head; here all methods but CLIP's have the same linear head. For
# CLIP-Adapter, rank 0 means a quarter of the embedding width; the paper's ratio is 0.2 for generic
# photos and 0.6 for fine-grained ones.
COMMON = {"init": "zero", "learn_scale": False}
METHODS = {
    "adaptertune": COMMON
    | {"rank": 8, "reads": "block", "act": "gelu", "scale": 1.0, "dropout": 0.0},
    "adaptformer": COMMON
    | {"rank": 64, "reads": "raw", "act": "relu", "scale": 0.1, "dropout": 0.1},
    "vpt": {"prompts": 10, "deep": True},
    "clip-adapter": {"rank": 0, "ratio": 0.2, "text_ratio": 0.0, "learn_ratio": False},
    "zero-shot": {},
    "head": {},
    "full": {},
    "scratch": {},  # train.py --scratch
}
ADAPTER_METHODS = ("adaptertune", "adaptformer")
PLACED_METHODS = ADAPTER_METHODS  # they go into the blocks that --every or --blocks chooses
CLIP_METHODS = ("clip-adapter", "zero-shot")
WHOLE_METHODS = ("full", "scratch")  # they train the backbone too

# What an adapter reads, by its place in the block (the four branches of vit.Block.forward):
# "block" the block's output; "raw" the residual stream after attention, which is the input of the
# MLP's LayerNorm; "ln" that LayerNorm's output; "mlp" the MLP's output.
READS = ("block", "raw", "ln", "mlp")
ACTS = {"gelu": nn.GELU, "relu": nn.ReLU}
INITS = ("zero", "small")

# -------------------------------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """The bottleneck s · (U · act(V·x + v) + u), from x [B, N, D] to a correction [B, N, D].

    `adapt` and `save` need a vit.ViT. In any other network a forward hook can add an adapter:
    block.register_forward_hook(lambda block, _, h: h + block.adapter(h)).

    Args:
        reads: the x that the block passes in; one of READS.
        act: the nonlinearity, as a new module; GELU if left out.
        init: "zero" (U = 0, u = 0: no correction) or "small" (both from N(0, 1e-4²), the ablation
            of AdapterTune's paper).
        kaiming: initialise V with Kaiming uniform, a = √5 (AdaptFormer). This is U(±1/√D), torch's
            default for a linear layer. Otherwise Xavier uniform, U(±√(6/(D + r))) (AdapterTune).
        scale: s; with `learn_scale` it is a trained parameter.
        dropout: probability of dropping a hidden unit in training; 0 for off.

    Raises:
        ValueError: a rank below 1 or above the width; an unknown `reads` or `init`.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        reads: str = "block",
        act: nn.Module | None = None,
        init: str = "zero",
        kaiming: bool = False,
        scale: float = 1.0,
        learn_scale: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_rank(rank, width)
        check_choice("reads", reads, READS)
        check_choice("init", init, INITS)
        self.reads = reads
        self.down = nn.Linear(width, rank)  # V, v
        self.act = act or nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, width)  # U, u
        if learn_scale:
            self.scale = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.scale = float(scale)

        if kaiming:
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        else:
            nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        if init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        else:
            nn.init.normal_(self.up.weight, std=1e-4)
            nn.init.normal_(self.up.bias, std=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.down(x))  # [B, N, r]
        return self.scale * self.up(self.dropout(hidden))  # [B, N, D]


def check_rank(rank: int, width: int) -> None:
    """Raise a ValueError unless a bottleneck of this rank makes sense in a backbone."""
    if not 1 <= rank <= width:
        raise ValueError(f"rank {rank}: choose from 1 to the backbone's width, {width}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that names the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose {', '.join(choices)}")


def check_settings(method: str, settings: dict) -> None:
    """Raise a ValueError for a setting that the method doesn't have, or for a value that doesn't
    fit the type of its default (KINDS). Choices and limits are checked where values are used."""
    for name, value in settings.items():
        if name not in METHODS[method]:
            known = ", ".join(METHODS[method]) or "none"
            raise ValueError(f"{method} has no setting {name!r}; its settings: {known}")
        default = METHODS[method][name]
        if type(default) in KINDS and not KINDS[type(default)](value):
            raise ValueError(
                f"{name} {value!r} ({type(value).__name__}) isn't allowed; the default of "
                f"{method} is {default!r} ({type(default).__name__})"
            )


def check_vit(model: nn.Module) -> None:
    """Raise a ValueError unless `model` is a vit.ViT, whose blocks call adapters, and not a module
    that wraps one."""
    kind = type(model).__name__
    for inner in ("_orig_mod", "module"):  # names in torch.compile and (Distributed)DataParallel
        if inner in dict(model.named_children()):
            raise ValueError(
                f"a {kind} gives the parameters other names; give the vit.ViT in it, .{inner}"
            )
    blocks = getattr(model, "blocks", ())
    is_vit = hasattr(model, "cls_token") and all(hasattr(block, "adapter") for block in blocks)
    if not blocks or not is_vit:  # also of a text tower
        raise ValueError(
            f"a {kind} can't be adapted, only a vit.ViT; vit.load reads the file of a "
            "state_dict from timm, torchvision or transformers"
        )


@torch.no_grad()
def merge_into_mlp(block: nn.Module) -> bool:
    """Turn a block's adapter into r more hidden units of its MLP, if that is exact.

    It is exact for an adapter that reads "ln" and has the MLP's activation:

        fc1' = [W1; V]      fc2' = [W2, sU/γ]      b1' = [b1; v]      b2' = b2 + su/γ

    with γ [D] the block's LayerScale, if it has one.

    Returns:
        True if the adapter was merged.
    """
    adapter = block.adapter
    if type(adapter) is not Adapter or adapter.reads != "ln":  # a subclass may compute otherwise
        return False
    if repr(adapter.act) != repr(block.mlp.act):
        return False
    U = adapter.scale * adapter.up.weight
    u = adapter.scale * adapter.up.bias
    if not isinstance(block.ls2, nn.Identity):  # LayerScale will multiply them by γ
        U = U / block.ls2.gamma[:, None]
        u = u / block.ls2.gamma
        if not (U.isfinite().all() and u.isfinite().all()):  # γ is 0 somewhere
            return False
    fc1 = block.mlp.fc1
    fc2 = block.mlp.fc2
    fc1.weight = frozen(torch.cat([fc1.weight, adapter.down.weight]))
    fc1.bias = frozen(torch.cat([fc1.bias, adapter.down.bias]))
    fc2.weight = frozen(torch.cat([fc2.weight, U], dim=1))
    fc2.bias = frozen(fc2.bias + u)
    fc1.out_features = len(fc1.bias)
    fc2.in_features = len(fc1.bias)
    block.adapter = None
    return True


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def merge(model: nn.Module) -> int:
    """Merge every adapter that can be merged exactly; return their number. Call `save` first: a
    merged adapter is part of the backbone and no longer saved."""
    check_vit(model)
    return sum(merge_into_mlp(block) for block in model.blocks)


def choose_blocks(depth: int, *, every: int = 1, blocks: Sequence[int] | None = None) -> list[int]:
    """The blocks that get an adapter, counted from 0.

    Args:
        blocks: their indices; -1 is the last block.
        every: without `blocks`, choose blocks 0, k, 2k and so on, as the paper's code does
            (https://github.com/salimkhazem/adaptertune, src/models/vit_adapter.py).

    Raises:
        ValueError: an index out of range, or no block selected.
    """
    if blocks is not None:
        scalar = getattr(blocks, "ndim", 1) == 0  # a tensor's or an array's
        if isinstance(blocks, str) or not hasattr(blocks, "__iter__") or scalar:
            raise ValueError(f"placement {blocks!r}: give a list of blocks, such as [0, 1]")
        blocks = [index_of(block) for block in blocks]
        outside = [block for block in blocks if not -depth <= block < depth]
        if outside or not blocks:
            which = f"block {outside[0]}" if outside else "no block"
            raise ValueError(
                f"an adapter in {which}: choose from 0 to {depth - 1}, or -1 to -{depth}"
            )
        return sorted({block % depth for block in blocks})
    if not 1 <= every <= depth:
        raise ValueError(f"an adapter in every {every} blocks: choose from 1 to {depth}")
    return list(range(0, depth, every))


def index_of(block: object) -> int:
    """An int, or one of numpy's or torch's. ValueError for other types."""
    try:
        if not isinstance(block, bool) and getattr(block, "dtype", None) is not torch.bool:
            return operator.index(block)
    except TypeError:
        pass
    raise ValueError(f"placement: give a list of ints, not {block!r}")


def add_adapters(
    model: nn.Module,
    rank: int | None = None,
    *,
    method: str = "adaptertune",
    placement: Sequence[int] | None = None,
    **settings,
) -> None:
    """Put an adapter into blocks of a vit.ViT.

    Args:
        method: "adaptertune" or "adaptformer"; its defaults (METHODS) apply to omitted settings.
        placement: the blocks, counted from 0; every block if left out.
        settings: `act` ("gelu", "relu", or "mlp" for the activation of the block's MLP), and
            Adapter's `reads`, `init`, `scale`, `learn_scale` and `dropout`.

    Raises:
        ValueError: a rank below 1 or above the width; an unknown method, setting, reads, act or
            init; an index out of range.
    """
    check_vit(model)
    check_choice("method", method, ADAPTER_METHODS)
    if rank is not None:
        settings["rank"] = rank
    check_settings(method, settings)
    settings = METHODS[method] | settings
    act = settings.pop("act")
    check_choice("act", act, (*ACTS, "mlp"))
    for index in choose_blocks(len(model.blocks), blocks=placement):
        block = model.blocks[index]
        module = copy.deepcopy(block.mlp.act) if act == "mlp" else ACTS[act]()
        kaiming = method == "adaptformer"
        adapter = Adapter(model.config.width, act=module, kaiming=kaiming, **settings)
        block.adapter = adapter.to(model.cls_token).train(model.training)


def start_from(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Initialise a model's adapters from the tensors of a file.

    Args:
        tensors: from an adapter file of ours, or from AdaptFormer's code with its published names
            ("blocks.0.adaptmlp.down_proj.weight", "blocks.0.adaptmlp.scale").

    Raises:
        ValueError: an adapter is missing, has another shape or isn't in the model; values aren't
            finite numbers.
    """
    found = {}
    for name, value in tensors.items():
        name = re.sub(r"\.adaptmlp\.(down|up)_proj\.", r".adapter.\1.", name)
        name = name.replace(".adaptmlp.", ".adapter.")
        if name.endswith(".adapter.scale") and value.shape == (1,):
            value = value[0]  # AdaptFormer's has shape [1], ours []
        if ".adapter." in name:
            found[name] = value
    if not found:
        raise ValueError("the file holds no adapters")
    wanted = {name: each for name, each in model.state_dict().items() if ".adapter." in name}
    wrong = differences(found, wanted)
    if wrong:
        cause = "--method"
        if without_numbers(found) & without_numbers(wanted):
            cause = "--rank, --blocks or --learn-scale"
        raise ValueError(
            f"the model's adapters differ from the file's: {'; '.join(wrong[:3])}; "
            f"was it made with another {cause}?"
        )
    check_values(found, wanted)
    model.load_state_dict(found, strict=False)


def without_numbers(names: Iterable[str]) -> set[str]:
    """Names of tensors without the numbers of their blocks and layers."""
    return {re.sub(r"\d+", "", name) for name in names}


# --------------------------------------------------------------------------------------- prompts


def add_prompts(model: nn.Module, *, prompts: int = 10, deep: bool = True) -> None:
    """Visual Prompt Tuning (https://arxiv.org/abs/2203.12119): add P trained tokens to the image's.

    Each block has its own prompts (deep), or prompts enter at the first block and pass through the
    rest (shallow). They come after the image's tokens; attention doesn't depend on the order.

    Prompts are initialised uniformly in ±√(6 / (3·patch² + D)), as in VPT's code. Unlike adapters,
    they change the network's function before the first step.

    Raises:
        ValueError: fewer than one prompt.
    """
    if prompts < 1:
        raise ValueError(f"{prompts} prompts: at least one is needed")
    width = model.config.width
    bound = (6 / (3 * model.config.patch**2 + width)) ** 0.5
    for block in model.blocks if deep else model.blocks[:1]:
        values = torch.empty(prompts, width).uniform_(-bound, bound)
        block.prompts = nn.Parameter(values.to(model.cls_token))


# ------------------------------------------------------------------------------------------ CLIP


class ClipHead(nn.Module):
    """CLIP's classifier, with CLIP-Adapter's bottlenecks (https://arxiv.org/abs/2110.04544, 3.2).
    Set `classes` to W, and `scale` to CLIP's, before use:

        f' = a · A(f) + (1 - a) · f        W' = b · A'(W) + (1 - b) · W
        logits = scale · norm(f') · norm(W')ᵀ        A(x) = ReLU(U · ReLU(V · x)), no biases

    A' is a second such bottleneck. The outer ReLU is in the published code. f [B, E] is CLIP's
    image embedding (the projected features [B, D]). W [K, E] has a row per class: the embedding of
    its name, or the mean embedding of its training images. With a = b = 0 and embeddings of names,
    this is zero-shot CLIP, up to rounding.

    Args:
        projection: CLIP's image projection [E, D]; frozen.
        rank: width of the bottlenecks; E/4 in the paper.
        ratio, text_ratio: a and b; a ratio of 0 means no bottleneck on that side. `learn_ratio`
            makes the other ratios trained parameters.

    Raises:
        ValueError: a ratio below 0 or above 1.
    """

    def __init__(
        self,
        projection: Tensor,
        classes: int,
        *,
        rank: int = 1,
        ratio: float = 0.0,
        text_ratio: float = 0.0,
        learn_ratio: bool = False,
    ):
        super().__init__()
        E = len(projection)
        self.out_features = classes
        # The projection is the backbone's, not the task's: it isn't saved.
        self.register_buffer("projection", projection.detach().clone(), persistent=False)
        self.register_buffer("classes", torch.zeros(classes, E))  # W, set for each task
        self.register_buffer("scale", torch.tensor(100.0))  # CLIP's exp(t) at the end of training
        self.image = clip_bottleneck(E, rank) if ratio else None
        self.text = clip_bottleneck(E, rank) if text_ratio else None
        self.image_ratio = clip_ratio(ratio, learn_ratio)
        self.text_ratio = clip_ratio(text_ratio, learn_ratio)

    def embed(self, features: Tensor) -> Tensor:
        """Features [B, D] to f' [B, E]."""
        f = features @ self.projection.T
        if self.image is None:
            return f
        return self.image_ratio * self.image(f) + (1 - self.image_ratio) * f

    def weights(self, W: Tensor | None = None) -> Tensor:
        """scale · norm(W') [K, E]: the weights of a linear classifier on norm(f'). W can be given,
        instead of the head's own."""
        W = self.classes if W is None else W
        if self.text is not None:
            W = self.text_ratio * self.text(W) + (1 - self.text_ratio) * W
        return self.scale * F.normalize(W, dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.embed(features), dim=-1) @ self.weights().T

    def leave_one_out(self, features: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        """Logits [B, K] for images of which the `prototypes` W were made. An image is compared with
        the prototype of its own class without itself: the prototype contains it, so training would
        find that class already right.

        Args:
            features, labels: of these images, [B, D] and [B].
            sizes: how many images each prototype is the mean of, [K]; a prototype of a single
                image is used as it is.
        """
        logits = self(features)  # [B, K]
        own = self.classes[labels]  # [B, E]
        n = sizes[labels, None]  # [B, 1]
        image = F.normalize(features @ self.projection.T, dim=-1)  # [B, E]
        others = torch.where(n > 1, (n * own - image) / (n - 1).clamp(min=1), own)
        f = F.normalize(self.embed(features), dim=-1)
        own_logits = (f * self.weights(others)).sum(dim=-1, keepdim=True)  # [B, 1]
        return logits.scatter(1, labels[:, None], own_logits)

    @contextmanager
    def zero_shot(self):
        """Inside this context the head is zero-shot CLIP: both bottlenecks are taken out."""
        image, text = self.image, self.text
        self.image = self.text = None
        try:
            yield
        finally:
            self.image, self.text = image, text


def clip_bottleneck(width: int, rank: int) -> nn.Sequential:
    """A(x) = ReLU(U · ReLU(V · x))."""
    down = nn.Linear(width, rank, bias=False)
    up = nn.Linear(rank, width, bias=False)
    return nn.Sequential(down, nn.ReLU(), up, nn.ReLU())


def clip_ratio(value: float, learn: bool) -> float | nn.Parameter:
    """A ratio as ClipHead stores it: a trained parameter if `learn` is set and it isn't 0."""
    if not 0 <= value <= 1:
        raise ValueError(f"a ratio of {value}: choose from 0 to 1")
    if learn and value:
        return nn.Parameter(torch.tensor(float(value)))
    return float(value)


def prototypes(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Class means [K, E] of normalised embeddings [n, E]: a class matrix that needs no text."""
    embeddings = F.normalize(embeddings, dim=-1)
    means = [embeddings[labels == label].mean(dim=0) for label in range(int(labels.max()) + 1)]
    return torch.stack(means)


# ------------------------------------------------------------- methods: from backbone to model


class NewHead(nn.Linear):
    """The linear classifier of a task. Its class tells it from a head that came with the weights,
    such as CLIP's projection."""


def add_head(model: nn.Module, classes: int) -> None:
    """Give a vit.ViT a new linear classifier: weights from N(0, 0.02²), biases 0 (timm's)."""
    model.head = NewHead(model.config.width, classes)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
    model.head.to(model.cls_token)


def add_clip_head(model: nn.Module, classes: int, *, rank: int = 0, **settings) -> int:
    """Replace CLIP's projection by a ClipHead; return its rank (E/4 if `rank` is 0).

    Raises:
        ValueError: the model isn't CLIP's image tower, loaded with its projection as head.
    """
    projection = None  # [E, D]
    if isinstance(model.head, ClipHead):  # of an earlier `adapt`
        projection = model.head.projection
    elif isinstance(model.head, nn.Linear) and not isinstance(model.head, NewHead):
        bias = model.head.bias
        if bias is None or not bias.any():  # timm's is of zeros; else it is a classifier
            projection = model.head.weight
    if not model.config.norm_pre or projection is None:
        raise ValueError(
            "clip-adapter and zero-shot need CLIP's image tower with its projection as head, which "
            "these weights don't have; choose a clip_* --backbone, or in your own code "
            "vit.load(…, head=True)"
        )
    rank = rank or len(projection) // 4
    head = ClipHead(projection, classes, rank=rank, **settings)
    model.head = head.to(model.cls_token)
    return rank


def remove_added(model: nn.Module) -> None:
    """Take all adapters and prompts out of a model, wherever `is_added` would find them."""
    for block in model.blocks:
        block.prompts = None
    for module in model.modules():
        if getattr(module, "adapter", None) is not None:
            module.adapter = None


def adapt(
    model: nn.Module,
    method: str,
    classes: int,
    *,
    placement: Sequence[int] | None = None,
    **settings,
) -> dict:
    """Prepare a pretrained vit.ViT for a method: add its parts and a new head, freeze the rest.
    Adapters, prompts and head that the model already has are replaced. "scratch" gives the whole
    model random weights.

    Added parts take the backbone's device, precision and training mode. Call it on fp32, and train
    in bf16 by torch.autocast: a float16 model is for prediction.

    Args:
        placement: the adapted blocks; every block if left out.
        settings: the method's settings (METHODS); its defaults apply to omitted ones.

    Returns:
        The method and its settings in effect, for the adapter file's metadata; with them, another
        model is adapted the same way: adapt(model, classes=10, **settings).

    Raises:
        ValueError: an unknown method, or a setting that the method or the model doesn't support;
            the model is then as it was.
    """
    check_vit(model)
    check_choice("method", method, METHODS)
    check_settings(method, settings)
    if type(classes) is not int or classes < 1:
        raise ValueError(f"classes {classes!r}: give their number, an int of at least 1")
    settings = METHODS[method] | settings
    if method in PLACED_METHODS:
        settings["placement"] = choose_blocks(len(model.blocks), blocks=placement)
    elif placement is not None:
        raise ValueError(f"{method} has no placement; {', '.join(PLACED_METHODS)} have")
    with unchanged_by_errors(model):
        remove_added(model)
        settings |= add_parts(model, method, classes, settings)
        if method in PLACED_METHODS:
            check_placement(model, settings["placement"])
        freeze(model, everything=method in WHOLE_METHODS)
    return {"method": method} | settings


def add_parts(model: nn.Module, method: str, classes: int, settings: dict) -> dict:
    """Put a method's parts and its head into a plain model; return the settings that depend on the
    model."""
    if method in ADAPTER_METHODS:
        add_adapters(model, method=method, **settings)
        add_head(model, classes)
    elif method == "vpt":
        add_prompts(model, **settings)
        add_head(model, classes)
    elif method == "clip-adapter":
        return {"rank": add_clip_head(model, classes, **settings)}
    elif method == "zero-shot":
        add_clip_head(model, classes)
    elif method in ("head", "full"):
        add_head(model, classes)
    elif method == "scratch":
        freeze(model, everything=True)  # refuses what it doesn't know before values are lost
        model.init_weights()
        add_head(model, classes)
    else:
        raise ValueError(f"METHODS has a row for {method}, but add_parts has no branch for it")
    return {}


def check_placement(model: nn.Module, wanted: list[int]) -> None:
    """Raise a ValueError unless the blocks with adapters are those wanted."""
    found = []
    for index, block in enumerate(model.blocks):
        adapters = [getattr(module, "adapter", None) for module in block.modules()]
        if any(each is not None for each in (block.prompts, *adapters)):
            found.append(index)
    if found != wanted:
        raise ValueError(f"placement {wanted}, but blocks {found} have adapters")


@contextmanager
def unchanged_by_errors(model: nn.Module):
    """Inside this context, an error puts back the modules, parameters, hooks and attributes that a
    model had. A module has them in its attributes: _modules, _parameters and so on are
    dictionaries."""
    before = []
    for module in model.modules():
        attributes = dict(vars(module))
        tables = [each for each in attributes.values() if isinstance(each, dict)]
        before.append((module, attributes, [(table, dict(table)) for table in tables]))
    try:
        yield
    except Exception:
        for module, attributes, tables in before:
            vars(module).update(attributes)
            for table, content in tables:  # restored in place, since handles of hooks refer to them
                table.clear()
                table.update(content)
        raise


# ------------------------------------------------------------------------------- what is trained


def is_added(name: str) -> bool:
    """Whether a parameter of this name was added to the backbone (adapter, prompt or head).

    Freezing, counting, saving and the fingerprint use this one predicate. The optimiser gets all
    parameters that aren't frozen.
    """
    return ".adapter." in name or name.endswith(".prompts") or name.startswith("head.")


def freeze(model: nn.Module, *, everything: bool = False) -> None:
    """Enable gradients only for added parameters (adapters, prompts, head), or for `everything`. An
    added tensor that stays as it is must be a buffer.

    Raises:
        ValueError: a parameter is neither the backbone's nor, by its name, an added one: it would
            be frozen although it was added to be trained.
    """
    with torch.device("meta"):  # a plain backbone that takes no memory
        own = dict(type(model)(model.config).named_parameters())
    parameters = dict(model.named_parameters())
    for name in parameters:
        if name not in own and not is_added(name):
            raise ValueError(
                f"{name} is neither the backbone's nor an adapter's and would be frozen; "
                "give its module the name 'adapter' (adaptertune.is_added)"
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(everything or is_added(name))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float, head_lr: float = 0.0
) -> list[dict]:
    """Parameter groups for an optimiser: trained matrices with `weight_decay`, the rest without.

    Matrices have two or more dimensions, and are named "weight" or are in an adapter. Biases,
    norms, scales, the backbone's tokens and prompts aren't decayed, as is usual for ViTs; the
    paper's code decays them too (src/train/optim.py).

    Args:
        lr: the learning rate; each group also has it as "initial_lr", for a schedule to multiply.
        head_lr: the head's learning rate; 0 for `lr`.

    Raises:
        ValueError: a trained parameter is float16, where Adam's epsilon of 1e-8 is 0: the adapters,
            whose first gradients are exactly 0, would become NaN.
    """
    check_vit(model)
    groups = {(weight_decay, lr): []}  # by weight decay and rate; stays empty if nothing is trained
    for name, parameter in trained(model).items():
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} is float16, which can't be trained; adapt the model in float32 and train "
                "it under torch.autocast"
            )
        is_matrix = parameter.ndim > 1 and (name.endswith("weight") or ".adapter." in name)
        decay = weight_decay if is_matrix else 0.0
        in_head = name.startswith("head.")
        rate = head_lr if in_head and head_lr else lr
        groups.setdefault((decay, rate), []).append(parameter)
    found = []
    for (decay, rate), parameters in groups.items():
        group = {"params": parameters, "weight_decay": decay, "lr": rate, "initial_lr": rate}
        found.append(group)
    return found


def count(model: nn.Module) -> dict[str, int]:
    """Count frozen parameters, and trained ones in adapters (and prompts), head and backbone."""
    check_vit(model)
    counts = {"frozen": 0, "adapters": 0, "head": 0, "backbone": 0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            part = "frozen"
        elif name.startswith("head."):
            part = "head"
        elif is_added(name):
            part = "adapters"
        else:
            part = "backbone"
        counts[part] += parameter.numel()
    return counts


# -------------------------------------------------------------------------------------- the file


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits (of a SHA-256) that identify a backbone, adapted or not.

    They cover the names, shapes and values of all its tensors, without what was added and without
    the position embedding, which is resized to the image size in use.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if is_added(name) or name == "pos_embed":
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that `save` writes: adapters, prompts and head (with a ClipHead's classes and
    scale), and any other trained parameters."""
    names = trained(model)
    tensors = model.state_dict()
    return {name: value for name, value in tensors.items() if is_added(name) or name in names}


def to_write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors writes them: on the CPU, contiguous, and each in memory of its own,
    unlike those of a module that blocks share."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return found


def save(path: str | Path | BinaryIO, model: nn.Module, meta: dict | None = None) -> None:
    """Write what was trained, and `meta` as JSON under "adaptertune" in the safetensors header.

    Args:
        path: the path of a file, or a binary file that is open for writing.
        meta: what `adapt` returned, optionally with "classes", "mean", "std", other keys of META
            or keys of your own. Settings that were changed in the model since, such as an adapter's
            scale, are written as they are now. "fingerprint" is that of the backbone before
            training. If omitted, it is computed from the model, which is right only if the backbone
            has the precision in which it will be loaded; it is empty if the file holds the whole
            backbone.

    Raises:
        ValueError: metadata that `read` would refuse, or that state a setting in which the adapters
            differ; no fingerprint, where a part of the backbone was trained.
    """
    check_vit(model)
    tensors = to_write(saved_tensors(model))
    meta = {"version": VERSION, **(meta or {})}
    meta |= common_settings(model, meta)
    is_whole = len(tensors) == len(model.state_dict())
    parts = [name for name in tensors if is_added(name) and not name.startswith("head.")]
    if is_whole and not parts:  # with its shape, vit.load reads the file as a backbone
        meta["config"] = asdict(model.config)
    if "fingerprint" not in meta:
        changed = [name for name in tensors if not is_added(name)]
        if changed and not is_whole:
            raise ValueError(
                f"the backbone's {changed[0]} was trained: give meta the fingerprint that the "
                "backbone had before"
            )
        meta["fingerprint"] = "" if is_whole else fingerprint(model)
    try:
        header = json.dumps(meta)
    except TypeError as error:
        raise ValueError(f"metadata that JSON can't hold ({error})") from error
    check_types(json.loads(header), META)  # a file that `read` would refuse isn't written
    content = to_bytes(tensors, {"adaptertune": header})
    if isinstance(path, str | Path):
        Path(path).write_bytes(content)
    else:
        path.write(content)


def read(path: str | Path, required: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of a file that `save` wrote.

    Args:
        required: keys that the metadata must have.

    Raises:
        ValueError: the file is missing, damaged or not an adapter file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no adapters at {path}; give the folder of a finished run")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("adaptertune", "{}"))
            check_types(meta, META)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an error type of its own
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from error
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{path} is not an adapter file of train.py "
            f"(version {meta.get('version')}, expected {VERSION})"
        )
    missing = [key for key in required if key not in meta]
    if missing:
        raise ValueError(f"{path} is damaged: its metadata lack {', '.join(missing)}")
    return tensors, meta


def check_same(path: str | Path, saved: dict, present: dict) -> None:
    """Compare a file's metadata with those of the model that it is loaded into.

    Args:
        present: the model's metadata; a key that isn't in `saved` isn't compared.

    Raises:
        ValueError: a value differs; the message names the first.
    """
    for key, value in json.loads(json.dumps(present)).items():
        if key in saved and saved[key] != value:
            advice = "leave out the option that changes it"
            if key in ("pool", "eps"):  # of the backbone, for which there is no option
                advice = "give the weights that it was trained on, and the files beside them"
            raise ValueError(
                f"{path} was trained with {key.replace('_', ' ')} {saved[key]}, not {value}; "
                f"{advice}"
            )


def differences(saved: dict[str, Tensor], present: dict[str, Tensor]) -> list[str]:
    """How a file's tensors differ from a model's in name or shape, one string per difference."""
    found = []
    for name in sorted(set(saved) | set(present)):
        there = list(saved[name].shape) if name in saved else "missing"
        here = list(present[name].shape) if name in present else "missing"
        if there != here:
            found.append(f"{name} is {there} in the file, {here} in the model")
    return found


def check_values(saved: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """Raise a ValueError for values that aren't finite, and for integers (quantised weights) where
    the model has floats. A module of your own may have integers too, such as a counter."""
    for name, tensor in saved.items():
        if not tensor.is_floating_point() and tensor.dtype != present[name].dtype:
            raise ValueError(f"{name} is of {tensor.dtype}; save it as floats")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{name} has values that aren't finite")


def unseen_settings(model: nn.Module) -> list[tuple[str, object]]:
    """Settings that a model's tensors don't show, named as in a file's metadata: the backbone's, a
    ClipHead's and each Adapter's. Learnt settings are left out, since they are tensors."""
    config = model.config
    found = [("heads", config.heads), ("mlp_act", "quick_gelu" if config.quick_gelu else "gelu")]
    found += [("pool", config.pool), ("eps", config.eps)]
    if isinstance(model.head, ClipHead):
        found += [("ratio", model.head.image_ratio), ("text_ratio", model.head.text_ratio)]
    for block in model.blocks:
        adapter = block.adapter
        if isinstance(adapter, Adapter):
            act = name_of_act(adapter.act)
            found += [("reads", adapter.reads), ("act", act), ("scale", adapter.scale)]
    return [(name, value) for name, value in found if not isinstance(value, nn.Parameter)]


def common_settings(model: nn.Module, meta: dict) -> dict:
    """The unseen settings of a model as it is now, where all its adapters agree in them. Their act
    is "mlp", which asks for the MLP's, if it is the MLP's and `meta` says so or it has no name in
    ACTS.

    Raises:
        ValueError: the adapters differ in a setting that `meta` states.
    """
    found: dict[str, set] = {}
    for name, value in unseen_settings(model):
        found.setdefault(name, set()).add(value)
    for name, values in found.items():
        if len(values) > 1 and name in meta:
            raise ValueError(
                f"the adapters differ in {name} ({', '.join(map(str, sorted(values)))}), and a "
                f"file states one for all; leave {name} out of the metadata, and set it after "
                "loading"
            )
    common = {name: values.pop() for name, values in found.items() if len(values) == 1}
    mlp_act = name_of_act(model.blocks[0].mlp.act)
    if common.get("act") == mlp_act and (meta.get("act") == "mlp" or mlp_act not in ACTS):
        common["act"] = "mlp"
    return common


def name_of_act(act: nn.Module) -> str:
    """An activation's name in ACTS, or that of its class."""
    names = {kind: name for name, kind in ACTS.items()}
    return names.get(type(act), type(act).__name__)


def check_fingerprint(meta: dict, present: str, name: str, file: str = "") -> None:
    """Raise a ValueError if a file was trained on another backbone than the present one.

    Args:
        meta: the file's metadata; the fingerprint is empty if the file has the whole backbone.
        present: the fingerprint of the present backbone.
        name: its name in the error message.
        file: its file, which tells it from another one of this name.
    """
    trained_on = meta["fingerprint"]
    if trained_on and trained_on != present:
        origin = f" of {file}" if file else ""
        raise ValueError(
            f"the adapters were trained on {meta.get('backbone', 'another backbone')} "
            f"({trained_on}), not on {name} ({present}){origin}; "
            "give that backbone with --backbone or --weights"
        )


def settings_of(meta: dict) -> dict:
    """The method and its settings in a file's metadata, as arguments of `adapt`; without `init`,
    since loading sets the values."""
    check_choice("method", meta.get("method"), METHODS)
    settings = {"method": meta["method"]}
    for name in ("placement", *METHODS[meta["method"]]):
        if name in meta and name != "init":
            settings[name] = meta[name]
    return settings


def load(path: str | Path, model: nn.Module, *, name: str = "this backbone") -> dict:
    """Copy a file's tensors into a model that has the same adapters and head; return its metadata.

    Adapt a plain backbone first: adapt(model, classes=10, **settings_of(meta)), with `meta` of
    `read(path)`. Names and shapes of tensors are compared. So are the settings that tensors don't
    show, but only if the metadata have them: pass what `adapt` returned to `save`.

    Args:
        name: the name of the model's backbone in error messages.

    Raises:
        ValueError: the file isn't an adapter file, was trained on another backbone (fingerprints
            differ) or with other settings, or its tensors don't match the model's.
    """
    tensors, meta = read(path, ("fingerprint",))
    check_vit(model)
    if model.cls_token.dtype is not torch.float32:  # after .half() it has another fingerprint
        name += f" in {model.cls_token.dtype}"
    check_fingerprint(meta, fingerprint(model), name)
    trained_on = meta["fingerprint"]
    wanted = model.state_dict()
    if trained_on and meta.get("method") not in WHOLE_METHODS:  # else the file has the backbone
        wanted = {key: each for key, each in wanted.items() if is_added(key) or key in tensors}
    wrong = differences(tensors, wanted)
    if wrong:
        shape = ("method", "rank", "prompts", "placement")
        settings = ", ".join(f"{key} {meta[key]}" for key in shape if key in meta)
        advice = f"; adapt the model first, with {settings}" if settings else ""
        raise ValueError(
            f"the model's tensors differ from the file's: {'; '.join(wrong[:3])}{advice}"
        )
    try:
        check_values(tensors, wanted)
    except (ValueError, NotImplementedError) as error:  # 4-bit floats raise NotImplementedError
        raise ValueError(f"{path}: {error}") from error
    saved = dict(meta)
    if saved.get("act") == "mlp":
        saved["act"] = name_of_act(model.blocks[0].mlp.act)
    for setting, value in unseen_settings(model):
        check_same(path, saved, {setting: value})
    model.load_state_dict(tensors, strict=False)
    return meta


# --------------------------------------------------------------------------- what metadata may hold

# Checks of JSON values, since a file that somebody else made may hold anything.


def text(value: object) -> bool:
    return isinstance(value, str)


def flag(value: object) -> bool:
    return isinstance(value, bool)


def line(value: object) -> bool:
    return isinstance(value, str) and "\n" not in value


def whole(low: int, high: int = 10**9) -> Callable:
    """Allow an integer within limits."""
    return lambda value: type(value) is int and low <= value <= high


def real(low: float = -1e9, high: float = 1e9) -> Callable:
    """Allow a number within limits, which excludes NaN."""
    return lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    )


def choice(values: Sequence[str]) -> Callable:
    """Allow one of these strings."""
    return lambda value: isinstance(value, str) and value in values


def maybe(kind: Callable) -> Callable:
    """Allow null, and what `kind` allows."""
    return lambda value: value is None or kind(value)


def several(kind: Callable, least: int = 0, most: int = 10**9) -> Callable:
    """Allow a list of `least` to `most` values, each allowed by `kind`."""

    def allows(value: object) -> bool:
        return isinstance(value, list) and least <= len(value) <= most and all(map(kind, value))

    return allows


def by_name(kind: Callable) -> Callable:
    """Allow a dictionary whose values `kind` allows."""
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def check_types(content: object, table: dict[str, Callable], required: Sequence[str] = ()) -> None:
    """Raise a ValueError unless `content` is a dictionary with all `required` keys, whose values
    the `table` allows. Keys that aren't in the table may have any value."""
    if not isinstance(content, dict):
        raise ValueError("not a dictionary")
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for key, allows in table.items():
        if key in content and not allows(content[key]):
            raise ValueError(f"{key} is {repr(content[key])[:60]}")


# Metadata of the files that train.py writes, and what their values may be.
META = {
    "version": whole(1),
    "method": choice(tuple(METHODS)),
    "backbone": text,
    "license": text,
    "fingerprint": text,
    "config": by_name(lambda value: isinstance(value, bool | int | float | str)),  # of vit.Config
    "image_size": whole(1, 2048),
    "mean": several(real(0, 1), 3, 3),
    "std": several(real(0.001, 1), 3, 3),
    "heads": whole(1, 10_000),
    "mlp_act": choice(("gelu", "quick_gelu")),
    "pool": choice(("token", "mean")),
    "eps": real(0, 1),
    "interpolation": text,
    "center": real(0.5, 1),
    "squash": flag,
    "dataset": text,
    "classes": several(line, least=2),
    "classifier": text,
    "template": text,
    "seed": whole(0),
    "limit": whole(0),
    "shots": whole(0),
    "epochs": whole(0),
    "epoch": whole(0),
    "lr": real(0),
    "head_lr": real(0),
    "val_accuracy": maybe(real(0, 100)),
    "test_accuracy": real(0, 100),
    "test_images": whole(0),
    "test_class_accuracy": real(0, 100),
    "zero_shot_val_accuracy": real(0, 100),
    "placement": several(whole(0)),
}
# A method's setting has the type of its default. Its limits are checked where it is used.
KINDS = {int: whole(-(10**9)), float: real(), bool: flag, str: text}


def types_of_settings() -> dict[str, Callable]:
    """Rows of META for the settings of all methods."""
    found = {}
    for settings in METHODS.values():
        for name, default in settings.items():
            if type(default) in KINDS:
                found[name] = KINDS[type(default)]
    return found


META |= types_of_settings()
