"""AdapterTune: adapt a frozen Vision Transformer by low-rank adapters that start as nothing.

After block l a small bottleneck adds a correction to the residual stream (https://arxiv.org/abs/2603.14706):

    h <- h + s · (U · GELU(V · h + v) + u)        V [r, D], v [r], U [D, r], u [D]

V starts as Xavier's uniform; v, U and u start at zero. So the correction is exactly zero before the first step: training
starts at the pretrained function, bit for bit, and moves away only as far as the data ask. Only adapters and the
classifier ("head") are trained, 2Dr + r + D numbers for each adapted block; all else stays frozen, norms included.
The adapter is nonlinear and sits on the residual stream, so it can't be folded into the backbone's own weights.

Shapes: B images, N tokens, D width, r rank, L blocks.
"""
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

VERSION = 1  # of the adapter file's format


class Adapter(nn.Module):
    """The residual bottleneck h + s · (U · GELU(V·h + v) + u), on [B, N, D].

    Args:
        init: "zero" (U = 0, u = 0: the identity) or "small" (both from N(0, 1e-4²), the paper's ablation).
        scale: s. `learn_scale` makes it a trained number.
        dropout: probability of dropping a hidden unit in training; 0 for off.
    """

    def __init__(self, width: int, rank: int, *, init: str = "zero", scale: float = 1.0, learn_scale: bool = False,
                 dropout: float = 0.0):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, width)
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learn_scale else float(scale)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for up in (self.up.weight, self.up.bias):
            nn.init.zeros_(up) if init == "zero" else nn.init.normal_(up, std=1e-4)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.scale * self.up(self.dropout(self.act(self.down(h))))


def choose_blocks(depth: int, *, every: int = 1, blocks: list[int] | None = None) -> list[int]:
    """The blocks that get an adapter, counted from 0: `blocks`, or every k-th, the last of each k.

    Raises:
        ValueError: a block that isn't there, or none at all.
    """
    chosen = sorted(set(blocks)) if blocks else list(range(every - 1, depth, every)) if every > 0 else []
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"adapters in blocks {chosen}: choose from 0 to {depth - 1}, or every 1 to {depth}")
    return chosen


def add_adapters(model: nn.Module, *, rank: int, placement: list[int], init: str = "zero", scale: float = 1.0,
                 learn_scale: bool = False, dropout: float = 0.0) -> None:
    """Put an adapter behind each block of a vit.ViT that `placement` names, counted from 0.

    Raises:
        ValueError: a rank below 1 or above the width, or an unknown init.
    """
    width = model.config.width
    if not 1 <= rank <= width:
        raise ValueError(f"rank {rank}: choose from 1 to the backbone's width, {width}")
    if init not in ("zero", "small"):
        raise ValueError(f"init {init!r}: choose zero or small")
    for index in placement:
        model.blocks[index].adapter = Adapter(width, rank, init=init, scale=scale, learn_scale=learn_scale, dropout=dropout)


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
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])
