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

Beside adapters: CLIP-Adapter (`ClipHead`, `Tokenizer`), prompts (`add_prompts`), how much rank a task needs (`spectrum`).

Shapes: B images, N tokens, D width, r rank, L blocks.
"""
import copy
import gzip
import hashlib
import html
import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

VERSION = 1  # of the adapter file's format


# Each method's own options and what they are unless told otherwise, as published. `reads` is z in the equation, by its place in
# the block: "block" its output, "raw" what enters LayerNorm and MLP, "ln" that LayerNorm's output, "mlp" the MLP's output.
# AdaptFormer's paper writes LN(x) in its equation, its code reads the raw x (adapter_layernorm_option="none"), and so do we.
# VPT searches 1 to 200 prompts; CLIP-Adapter's ratio is 0.2 for generic photos and 0.6 for fine-grained ones.
METHODS = {
    "adaptertune": {"rank": 8, "reads": "block", "act": "gelu", "init": "zero", "scale": 1.0, "learn_scale": False,
                    "dropout": 0.0},
    "adaptformer": {"rank": 64, "reads": "raw", "act": "relu", "init": "zero", "scale": 0.1, "learn_scale": False,
                    "dropout": 0.1},
    "vpt": {"prompts": 10, "deep": True},
    "clip-adapter": {"rank": 0, "ratio": 0.2, "text_ratio": 0.0, "learn_ratio": False, "classifier": "text"},
    "zero-shot": {"classifier": "text"},
    "head": {}, "full": {}, "scratch": {},
}
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


class ClipHead(nn.Module):
    """CLIP's classifier: cosines to the classes' embeddings, with CLIP-Adapter's bottlenecks on either side or both
    (https://arxiv.org/abs/2110.04544, section 3.2):

        f' = a · A(f) + (1 - a) · f      W' = b · A'(W) + (1 - b) · W      logits = scale · norm(f') · norm(W')ᵀ
        A(x) = ReLU(U · ReLU(V · x)), no biases

    f [B, E] is CLIP's image embedding (features [B, D] through its projection), W [K, E] one embedding for each class: of its
    name, or the mean of its images. With a = b = 0 this is zero-shot CLIP, bit for bit.

    Args:
        projection: CLIP's own, [E, D]; frozen.
        rank: width of the bottlenecks; E/4 is the published one.
        ratio, text_ratio: a and b; a side whose ratio is 0 gets no bottleneck. `learn_ratio` makes them trained numbers.
    """

    def __init__(self, projection: Tensor, classes: int, *, rank: int = 1, ratio: float = 0.0, text_ratio: float = 0.0,
                 learn_ratio: bool = False):
        super().__init__()
        E, self.out_features = len(projection), classes
        self.register_buffer("projection", projection.detach().clone(), persistent=False)  # the backbone's, not the task's
        self.register_buffer("classes", torch.zeros(classes, E))  # W, which the task brings
        self.register_buffer("scale", torch.tensor(100.0))  # CLIP's exp(t), where it stood when training ended
        for side, share in (("image", ratio), ("text", text_ratio)):
            bottleneck = nn.Sequential(nn.Linear(E, rank, bias=False), nn.ReLU(),
                                       nn.Linear(rank, E, bias=False), nn.ReLU()) if share else None
            setattr(self, side, bottleneck)
            setattr(self, f"{side}_ratio", nn.Parameter(torch.tensor(float(share))) if learn_ratio and share else float(share))

    def embed(self, features: Tensor) -> Tensor:
        """Features [B, D] to f' [B, E]."""
        f = features @ self.projection.T
        return f if self.image is None else self.image_ratio * self.image(f) + (1 - self.image_ratio) * f

    def weights(self) -> Tensor:
        """W' [K, E], normalised and scaled: what f' / |f'| is multiplied by."""
        W = self.classes
        W = W if self.text is None else self.text_ratio * self.text(W) + (1 - self.text_ratio) * W
        return self.scale * nn.functional.normalize(W, dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(self.embed(features), dim=-1) @ self.weights().T


def prototypes(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Class means [K, E] of normalised embeddings [n, E]: a class matrix where there is no text."""
    embeddings = nn.functional.normalize(embeddings, dim=-1)
    return torch.stack([embeddings[labels == label].mean(dim=0) for label in range(int(labels.max()) + 1)])


class Tokenizer:
    """CLIP's byte-level byte-pair encoding (https://arxiv.org/abs/2103.00020, section 2.4; OpenAI's simple_tokenizer.py, less
    ftfy's repairs; marks such as <|endoftext|> in a text are plain text). Each byte has an id, and another (+ 256) where it
    ends a word; each merge of two ids has the next, so that an id is also a rank: the lowest merge comes first. The start and
    the end mark are last. `size` counts all ids, the tower's vocabulary. `path` is the published bpe_simple_vocab_16e6.txt.gz
    or Hugging Face's merges.txt; a ValueError says if it is missing or damaged."""

    def __init__(self, path: str | Path):
        shown = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that the file writes as such characters;
        order = sorted(range(256), key=lambda byte: (byte not in shown, byte))  # the others come last, as characters from 256
        symbols = [chr(byte if byte in shown else 256 + i - len(shown)) for i, byte in enumerate(order)]
        self.bytes, self.merges = {byte: i for i, byte in enumerate(order)}, {}
        ids = {symbol: i for i, symbol in enumerate(symbols + [f"{symbol}</w>" for symbol in symbols])}
        try:
            raw = Path(path).read_bytes()
            head, *lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode().splitlines()
            head.index("#version")
            for left, right in map(str.split, lines[:48894]):  # as many as CLIP has; the published list goes on
                self.merges[ids[left], ids[right]] = ids[left + right] = len(ids)
        except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
            raise ValueError(f"{path} is missing, damaged or no vocabulary of CLIP's; give the published "
                             "bpe_simple_vocab_16e6.txt.gz or a merges.txt") from error
        self.size = len(ids) + 2

    def __call__(self, texts: list[str], length: int = 77) -> Tensor:
        """Ids int64 [n, length]: start, the text's, end, zeros. Of too long a text the end is cut off, but not the mark."""
        ids = [[self.size - 2, *self.encode(text)][:length - 1] + [self.size - 1] for text in texts]
        return torch.tensor([row + [0] * (length - len(row)) for row in ids], dtype=torch.int64).view(-1, length)

    def encode(self, text: str) -> list[int]:
        """A text's ids without marks. Words are contractions, runs of letters, single digits, and runs of anything else."""
        text = " ".join(html.unescape(html.unescape(unicodedata.normalize("NFC", text))).split()).lower()
        ids, plain = [], "".join(char if char.isascii() else {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")
                                 for char in text)  # the same in ASCII, since `re` knows no \p{L} and \p{N}
        for match in re.finditer(r"'(?:[stmd]|re|ve|ll)|[a-z]+|[0-9]|[^ a-z0-9]+", plain):
            word = [self.bytes[byte] for byte in text[match.start():match.end()].encode()]
            word[-1] += 256
            while found := [(self.merges[pair], i) for i, pair in enumerate(pairwise(word)) if pair in self.merges]:
                merged, i = min(found)
                word[i:i + 2] = [merged]
            ids += word
        return ids


def choose_blocks(depth: int, *, every: int = 1, blocks: list[int] | None = None) -> list[int]:
    """The blocks that get an adapter, counted from 0: `blocks` (-1 is the last), or every k-th, the last of each k.

    Raises:
        ValueError: a block that isn't there, or none at all.
    """
    if blocks:
        chosen = sorted({block + depth * (block < 0) for block in blocks})
    else:
        chosen = list(range(every - 1, depth, every)) if every > 0 else []
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


def add_prompts(model: nn.Module, *, prompts: int, deep: bool) -> None:
    """Visual Prompt Tuning (https://arxiv.org/abs/2203.12119): `prompts` trained tokens more in each block, or in the first
    alone, from where they go on (shallow). They stand after the image's own tokens, which attention can't tell.

    Uniform in ±√(6 / (3·patch² + D)), as in its code. So, unlike adapters, prompts change the function before the first step.
    """
    if prompts < 1:
        raise ValueError(f"{prompts} prompts: at least one is needed")
    bound = (6 / (3 * model.config.patch ** 2 + model.config.width)) ** 0.5
    for block in model.blocks if deep else model.blocks[:1]:
        block.prompts = nn.Parameter(torch.empty(prompts, model.config.width).uniform_(-bound, bound))


def start_from(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the adapters of a file into a model's, instead of zeros: ours, or AdaptFormer's own with its published names,
    `blocks.0.adaptmlp.down_proj.weight`. Raises ValueError for those that are missing or of another shape."""
    found = {re.sub(r"\.adaptmlp\.(?:(down|up)_proj\b)?", r".adapter.\1", name): value for name, value in tensors.items()}
    wanted = {name: value for name, value in model.named_parameters() if ".adapter." in name}
    if faults := [name for name in wanted if name not in found or found[name].numel() != wanted[name].numel()]:
        raise ValueError(f"the file has no {', '.join(faults[:3])} of the right shape; is it of another rank or placement?")
    model.load_state_dict({name: found[name].reshape(value.shape) for name, value in wanted.items()}, strict=False)


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


def observe(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The lowest and the highest value of every channel, [2, in], of what enters each matrix of a ViT's blocks when it sees
    `images` [n, 3, S, S]. Keys are the modules' names."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if re.search(r"\.(attn\.(qkv|proj)|mlp\.fc1)$", name):
            def note(_, inputs: tuple[Tensor], name: str = name) -> None:
                x = torch.cat([inputs[0].flatten(0, -2), seen.get(name, inputs[0][0])])
                seen[name] = torch.stack([x.amin(dim=0), x.amax(dim=0)])
            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in images.split(16):
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def equalise(model: nn.Module, images: Tensor, share: float = 0.7) -> None:
    """Rewrite a ViT into the same function with activations that 8 bits hold better: what LayerNorm and attention hand on is
    centred and scaled per channel, and the next matrix undoes it.

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
            low, high = seen[f"blocks.{i}.{name}"]
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
        factor = factors(seen[f"blocks.{i}.attn.proj"].abs().amax(dim=0), block.attn.proj.weight)
        block.attn.qkv.weight[2 * D:] /= factor[:, None]
        block.attn.proj.weight *= factor


def add_head(model: nn.Module, classes: int) -> None:
    """Give a vit.ViT a new linear classifier, weights from a normal distribution of 0.02, biases 0 (timm's choice)."""
    model.head = nn.Linear(model.config.width, classes)
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)


def is_adapter(name: str) -> bool:
    """Does a parameter of this name belong to the adapters, the prompts or the head? All that differs between adapting and
    not (freezing, counting, the optimiser, the file) is decided here."""
    return ".adapter." in name or name.endswith(".prompts") or name.startswith("head.")


def freeze(model: nn.Module, *, everything: bool = False) -> None:
    """Leave gradients on for the adapters and the head alone, or for `everything` (full fine-tuning)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or is_adapter(name))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def kept(model: nn.Module) -> dict[str, Tensor]:
    """What the file holds: all that is trained, and the class matrix of a ClipHead."""
    head = {f"head.{name}": value for name, value in model.head.state_dict().items() if name in ("classes", "scale")}
    return trained(model) | head


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


# ------------------------------------------------------------------------------------------- how much rank a task needs


class Shift(nn.Linear):
    """A map h -> M·h behind a block, M = 0, that adds up h·hᵀ as it goes."""
    reads = "block"

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)
        nn.init.zeros_(self.weight)
        self.register_buffer("moment", torch.zeros(width, width))

    def forward(self, h: Tensor) -> Tensor:
        x = h.detach().flatten(0, 1)  # [B·N, D]
        self.moment += x.T @ x
        return super().forward(h)


def shift_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Callable = nn.functional.cross_entropy,
                    ) -> tuple[Tensor, Tensor]:
    """What a linear map M_l behind each block of a frozen ViT without adapters would learn first.

    Returns:
        G [2, L, D, D]: dLoss/dM_l = Σ over tokens of (dLoss/dh)·hᵀ, mean over images, from the even and from the odd batches.
        C [L, D, D]: the tokens' second moment Σ h·hᵀ, mean over images.
    """
    D, seen = model.config.width, torch.zeros(2, 1, 1, 1)
    for block in model.blocks:
        block.adapter = Shift(D).to(model.pos_embed.device)
    maps = [block.adapter for block in model.blocks]
    G = torch.zeros(2, len(maps), D, D)
    for step, (images, labels) in enumerate(batches):
        (loss(model(images), labels) * len(labels)).backward()
        seen[step % 2] += len(labels)
        for i, each in enumerate(maps):
            G[step % 2, i] += each.weight.grad.cpu()
            each.weight.grad = None
    for block in model.blocks:
        block.adapter = None
    return G / seen.clamp(min=1), torch.stack([each.moment.cpu() for each in maps]) / seen.sum()


def whitener(moment: Tensor) -> Tensor:
    """C^(-½) of a second moment C [D, D], with a thousandth of its mean eigenvalue added to each."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * (values.clamp(min=0) + 1e-3 * values.mean()).rsqrt() @ vectors.T


def spectrum(G: Tensor, C: Tensor) -> Tensor:
    """How much of the loss a map of rank r behind block l takes away at first, [L, D], cumulative over r.

    With adapters at zero, the best step in M_l of a given size E|M·h|² = |M·C^½|² is along the whitened gradient
    W = G·C^(-½), and the best one of rank r along its r leading singular pairs (Eckart and Young): of |W|² it takes
    Σ_{i<=r} σ_i². That much is proved, to first order, for each block by itself. So the excess risk of rank r has an
    approximation part, Σ_{i>r} σ_i², and an estimation part: n images know W only up to noise, which adds to every σ_i what
    isn't there. Two halves of the images, W and W', take it out: the pair (u_i, v_i) of one is worth σ_i·u_iᵀ·W'·v_i in the
    other, whose expectation has no noise in it; both ways round, and the mean.
    Assumed, and not exactly so: what the first step wants is what the whole training wants, an adapter of rank r does what a
    map of rank r does, and blocks don't stand in for each other, which they seem to. README.md says what was observed.
    """
    found = []
    for pair, moment in zip(G.double().transpose(0, 1), C.double(), strict=True):
        halves, worth = pair @ whitener(moment), 0  # [2, D, D]
        for a, b in (halves, halves.flip(0)):
            u, s, v = torch.linalg.svd(a)  # v: rows
            worth = worth + s * ((u.T @ b) * v).sum(dim=1) / 2
        found.append(worth.cumsum(dim=0))
    return torch.stack(found)


def rank_for(energy: Tensor, share: float = 0.9) -> int:
    """The least rank that takes `share` of the most that any rank takes, from `energy` [D]; 0 if none takes anything."""
    most = float(energy.max())
    return int((energy >= share * most).nonzero()[0]) + 1 if most > 0 else 0


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
    """Write what `kept` gives, and `meta` as JSON in the safetensors header under "adaptertune".

    The file appears whole or not at all: it is written beside its place and moved there.
    """
    path = Path(path)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in kept(model).items()}
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
    wanted = kept(model)
    if faults := sorted(set(wanted) ^ set(tensors)) or [key for key in wanted if wanted[key].shape != tensors[key].shape]:
        raise ValueError(f"the adapter file doesn't fit its own description: {', '.join(faults[:3])}")
    model.load_state_dict(tensors, strict=False)
