"""AdapterTune: adapt a frozen Vision Transformer by low-rank adapters that start as nothing.

A small bottleneck adds a correction to the residual stream h behind a block:

    h <- h + s · (U · act(V · z + v) + u)        V [r, D], v [r], U [D, r], u [D]

AdapterTune (https://arxiv.org/abs/2603.14706) reads z = h, the block's own output, through a GELU. AdaptFormer
(https://arxiv.org/abs/2205.13535) works beside the MLP: z is the MLP's input x, through a ReLU, with s = 0.1.
v, U and u start at zero. So the correction is exactly zero before the first step: training starts at the pretrained
function, bit for bit, and moves away only as far as the data ask. Only adapters and the classifier ("head") are trained,
2Dr + r + D numbers for each adapted block; all else stays frozen, norms included.

An adapter is nonlinear, so it can't be folded into the backbone's weights, with one exception: one that reads LayerNorm(x)
through the MLP's own activation is nothing but r more hidden units of that MLP (`merge`).

Shapes: B images, N tokens, D width, r rank, L blocks.
"""
import copy
import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

VERSION = 1  # of the adapter file's format


# What each method puts behind a block unless told otherwise, as published. `reads` is z in the equation, by its place in the
# block: "block" its output, "raw" what enters LayerNorm and MLP, "ln" that LayerNorm's output, "mlp" the MLP's output.
# AdaptFormer's paper writes LN(x) in its equation, its code reads the raw x (adapter_layernorm_option="none"), and so do we.
METHODS = {
    "adaptertune": {"rank": 8, "reads": "block", "act": "gelu", "scale": 1.0, "dropout": 0.0},
    "adaptformer": {"rank": 64, "reads": "raw", "act": "relu", "scale": 0.1, "dropout": 0.1},
}
OPTIONS = ("rank", "reads", "act", "init", "scale", "learn_scale", "dropout")  # of add_adapters
READS = ("block", "raw", "ln", "mlp")
ACTS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Adapter(nn.Module):
    """The bottleneck s · (U · act(V·z + v) + u), from z [B, N, D] to the correction [B, N, D] that the block adds.

    Args:
        reads: which z the block hands in (see METHODS).
        act: a new module, the nonlinearity.
        init: "zero" (U = 0, u = 0: no correction) or "small" (both from N(0, 1e-4²), AdapterTune's ablation).
        kaiming: V from Kaiming's uniform with a = √5 (AdaptFormer) instead of Xavier's (AdapterTune).
        scale: s. `learn_scale` makes it a trained number.
        dropout: probability of dropping a hidden unit in training; 0 for off.
    """

    def __init__(self, width: int, rank: int, *, reads: str = "block", act: nn.Module | None = None, init: str = "zero",
                 kaiming: bool = False, scale: float = 1.0, learn_scale: bool = False, dropout: float = 0.0):
        super().__init__()
        self.reads = reads
        self.down = nn.Linear(width, rank)
        self.act = act or nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, width)
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learn_scale else float(scale)
        nn.init.kaiming_uniform_(self.down.weight, a=5 ** 0.5) if kaiming else nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for up in (self.up.weight, self.up.bias):
            nn.init.zeros_(up) if init == "zero" else nn.init.normal_(up, std=1e-4)

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.up(self.dropout(self.act(self.down(z))))


def choose_blocks(depth: int, *, every: int = 1, blocks: list[int] | None = None) -> list[int]:
    """The blocks that get an adapter, counted from 0: `blocks`, or every k-th, the last of each k.

    Raises:
        ValueError: a block that isn't there, or none at all.
    """
    chosen = sorted(set(blocks)) if blocks else list(range(every - 1, depth, every)) if every > 0 else []
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"adapters in blocks {chosen}: choose from 0 to {depth - 1}, or every 1 to {depth}")
    return chosen


def add_adapters(model: nn.Module, *, method: str = "adaptertune", placement: list[int], rank: int, reads: str = "block",
                 act: str = "gelu", init: str = "zero", **more) -> None:
    """Put an adapter behind each block of a vit.ViT that `placement` names, counted from 0.

    Args:
        act: "gelu", "relu" or "mlp", the activation that the block's MLP has.
        more: `scale`, `learn_scale` and `dropout` of Adapter.

    Raises:
        ValueError: a rank below 1 or above the width; unknown reads, act or init.
    """
    width = model.config.width
    if not 1 <= rank <= width:
        raise ValueError(f"rank {rank}: choose from 1 to the backbone's width, {width}")
    for name, value, choices in (("init", init, ("zero", "small")), ("reads", reads, READS), ("act", act, (*ACTS, "mlp"))):
        if value not in choices:
            raise ValueError(f"{name} {value!r}: choose {', '.join(choices)}")
    for index in placement:
        block = model.blocks[index]
        module = ACTS[act]() if act in ACTS else type(block.mlp.act)()
        block.adapter = Adapter(width, rank, reads=reads, act=module, init=init, kaiming=method == "adaptformer", **more)


def merge(model: nn.Module) -> int:
    """Turn every adapter that can be into r more hidden units of its block's MLP, and return how many could.

    That is exact for an adapter that reads "ln" through the MLP's own activation: fc1' = [W1; V], fc2' = [W2, sU/γ],
    b2' = b2 + su/γ, with γ the block's LayerScale, if it has one.
    """
    merged = 0
    for block in model.blocks:
        adapter, fc1, fc2 = block.adapter, block.mlp.fc1, block.mlp.fc2
        if adapter is None or adapter.reads != "ln" or type(adapter.act) is not type(block.mlp.act):
            continue
        scale = (adapter.scale / getattr(block.ls2, "gamma", torch.ones(1)))[:, None]  # [D, 1] or [1, 1]
        down, up = adapter.down, adapter.up
        for layer, tensors in ((fc1, (torch.cat([fc1.weight, down.weight]), torch.cat([fc1.bias, down.bias]))),
                               (fc2, (torch.cat([fc2.weight, scale * up.weight], dim=1), fc2.bias + scale[:, 0] * up.bias))):
            layer.weight, layer.bias = (nn.Parameter(tensor.detach(), requires_grad=False) for tensor in tensors)
        fc1.out_features = fc2.in_features = len(fc1.bias)
        block.adapter, merged = None, merged + 1
    return merged


def neutral(model: nn.Module, *, reads: str, act: str) -> nn.Module:
    """A copy of an adapted ViT that is its backbone again, but has a place for any adapter of a kind: all-zero ones of rank 1
    in every block, and for a head the identity, which gives the features [B, D]."""
    plain = copy.deepcopy(model)
    add_adapters(plain, placement=range(len(plain.blocks)), rank=1, reads=reads, act=act)
    add_head(plain, plain.config.width)
    for block in plain.blocks:
        nn.init.zeros_(block.adapter.down.weight)
    nn.init.eye_(plain.head.weight)
    return plain.requires_grad_(False)


def observe(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What enters each matrix of a ViT's blocks when it sees `images` [n, 3, S, S]: the lowest and the highest value of every
    channel [in], and XᵀX [in, in] over all tokens. Keys are the modules' names."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if re.search(r"\.(attn\.(qkv|proj)|mlp\.fc[12])$", name):
            def note(_, inputs: tuple[Tensor], name: str = name) -> None:
                x = inputs[0].flatten(0, -2)
                low, high, gram = seen.get(name, (x[0], x[0], 0))
                seen[name] = torch.minimum(low, x.amin(dim=0)), torch.maximum(high, x.amax(dim=0)), gram + x.T @ x
            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in images.split(16):
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def equalise(model: nn.Module, images: Tensor, share: float = 0.7) -> dict[str, Tensor]:
    """Rewrite a ViT into the same function with activations that 8 bits hold better: what LayerNorm and attention hand on is
    centred and scaled per channel, and the next matrix undoes it. Returns what enters the matrices then, as XᵀX by name.

    SmoothQuant (https://arxiv.org/abs/2211.10438) with the shift of Outlier Suppression+ (https://arxiv.org/abs/2304.09145).
    `share` of a channel's range, as seen on `images`, moves into the weights; 0.7 gave the least error on DeiT-tiny.
    """
    D = model.config.width

    def factors(reach: Tensor, weight: Tensor) -> Tensor:
        return reach.clamp(min=1e-5) ** share / weight.abs().amax(dim=0).clamp(min=1e-5) ** (1 - share)

    seen = observe(model, images)
    for i, block in enumerate(model.blocks):
        qkv, proj, fc1, adapter = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.adapter
        by_adapter = [adapter.down] if adapter is not None and adapter.reads == "ln" else []
        for norm, name, readers in ((block.norm1, "attn.qkv", [qkv]), (block.norm2, "mlp.fc1", [fc1, *by_adapter])):
            low, high, _ = seen[f"blocks.{i}.{name}"]
            middle = (low + high) / 2 if readers[0].bias is not None else torch.zeros(D)
            factor = factors(torch.maximum(high - middle, middle - low), torch.cat([each.weight for each in readers]))
            for each in readers:
                if each.bias is not None:
                    each.bias += each.weight @ middle
                each.weight *= factor
            norm.bias.sub_(middle).div_(factor)
            norm.weight /= factor
        if qkv.bias is not None:  # v's passes through attention as it is
            proj.bias += proj.weight @ qkv.bias[2 * D:]
            qkv.bias[2 * D:] = 0
    seen = observe(model, images)
    for i, block in enumerate(model.blocks):
        low, high, _ = seen[f"blocks.{i}.attn.proj"]
        factor = factors(torch.maximum(high, -low), block.attn.proj.weight)
        block.attn.qkv.weight[2 * D:] /= factor[:, None]
        block.attn.proj.weight *= factor
    return {name: gram for name, (_, _, gram) in observe(model, images).items()}


@torch.no_grad()
def to_int8(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Integers -127..127 [out, in] and a scale for each row [out] whose product replaces `weight` with little change in what it
    gives for inputs with XᵀX = `gram` [in, in].

    GPTQ (https://arxiv.org/abs/2210.17323, algorithm 1 without its blocks): the columns that are yet to be rounded make up for
    the error of each one that is.
    """
    scale, order = weight.double().abs().amax(dim=1) / 127, gram.diagonal().argsort(descending=True)  # the loudest first
    left, integers, gram = weight.double()[:, order], torch.zeros_like(weight, dtype=torch.int8), gram.double()[order][:, order]
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    inverse = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    for i, column in enumerate(order):
        integers[:, column] = (left[:, i] / scale).round().clamp(-127, 127).to(torch.int8)
        error = (left[:, i] - integers[:, column] * scale) / inverse[i, i]
        left[:, i:] -= error[:, None] * inverse[i, i:]
    return integers, scale


def add_head(model: nn.Module, classes: int) -> None:
    """Give a vit.ViT a new linear classifier, weights from a normal distribution of 0.02, biases 0 (timm's choice)."""
    model.head = nn.Linear(model.config.width, classes)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)


def is_adapter(name: str) -> bool:
    """Does a parameter of this name belong to the adapters or to the head? All that differs between adapting and not
    (freezing, counting, the optimiser, the file) is decided here."""
    return ".adapter." in name or name.startswith("head.")


def freeze(model: nn.Module, *, everything: bool = False) -> None:
    """Leave gradients on for the adapters and the head alone, or for `everything` (full fine-tuning)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or is_adapter(name))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What an optimiser gets: the trained matrices with `weight_decay`, and biases, norms, scales and tokens without."""
    parts = {True: [], False: []}
    for name, parameter in trained(model).items():
        parts[name.endswith("weight") and parameter.ndim > 1].append(parameter)
    return [{"params": parts[True], "weight_decay": weight_decay}, {"params": parts[False], "weight_decay": 0.0}]


def count(model: nn.Module) -> dict[str, int]:
    """How many numbers are frozen, and how many trained in the adapters, the head and the backbone."""
    counts = {"frozen": 0, "adapters": 0, "head": 0, "backbone": 0}
    for name, parameter in model.named_parameters():
        part = "head" if name.startswith("head.") else "adapters" if is_adapter(name) else "backbone"
        counts[part if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


# ------------------------------------------------------------------------------------------------------------ the file


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits (SHA-256) that identify a backbone: names, shapes and values of all its tensors but the positions,
    which are resized to the image size in use."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not is_adapter(name) and name != "pos_embed":
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(path: str | Path, model: nn.Module, meta: dict) -> None:
    """Write the trained tensors, and `meta` as JSON in the safetensors header under "adaptertune".

    The file appears whole or not at all: it is written beside its place and moved there.
    """
    path = Path(path)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained(model).items()}
    part = path.with_name(path.name + ".part")
    part.write_bytes(serialise(tensors, {"adaptertune": json.dumps({"version": VERSION, **meta})}))
    part.replace(path)


def load(model: nn.Module, tensors: dict[str, Tensor], meta: dict, *, backbone: str, name: str) -> None:
    """Copy a file's tensors into a model whose adapters and head stand ready (`freeze` done).

    Args:
        backbone, name: fingerprint and name of the backbone as it was loaded, before anything was trained.

    Raises:
        ValueError: the file isn't train.py's or was made on another backbone, or its tensors aren't the model's.
    """
    if meta.get("version") != VERSION:
        raise ValueError(f"no adapter file that train.py wrote (version {meta.get('version')}, expected {VERSION})")
    if meta["fingerprint"] != backbone:
        raise ValueError(f"the adapters were trained on {meta['backbone']} ({meta['fingerprint']}), "
                         f"not on {name} ({backbone}); give that backbone by --backbone or --weights")
    wanted = trained(model)
    if faults := sorted(set(wanted) ^ set(tensors)) or [key for key in wanted if wanted[key].shape != tensors[key].shape]:
        raise ValueError(f"the adapter file doesn't fit its own description: {', '.join(faults[:3])}")
    model.load_state_dict(tensors, strict=False)
