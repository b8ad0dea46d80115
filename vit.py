"""The Vision Transformer: the network that stays frozen, and the loaders of pretrained weights.

An image is cut into square patches, and each patch becomes a token of width D. A class token (and
in some models R register tokens) is prepended, and L blocks of the same shape follow (ViT,
https://arxiv.org/abs/2010.11929, equations 1 to 4):

    h_0 = [class + position; registers; patches + positions]        in CLIP, LayerNorm of this
    h   <- h + Attention(LayerNorm(h))        every token attends to every token
    h   <- h + MLP(LayerNorm(h))              each token on its own
    logits = W · LayerNorm(h_L)[class]        or W · LayerNorm(mean of the patch tokens)

DINOv2 and DINOv3 multiply what attention and MLP add by a factor per channel (LayerScale). DINOv3
adds no positions to h_0: its attention rotates queries and keys by the positions of their patches
(Rotary).

Shapes: B images, S pixels along a side, g = S / patch, N = 1 + R + g² tokens, D width, H heads,
d = D / H, L blocks; T token ids of a text, K texts, E CLIP's embedding width.

Module names are timm's (https://github.com/huggingface/pytorch-image-models), because most
published files use them; other layouts are translated by LAYOUTS and RENAMES. Loading is strict:
every tensor must be present with the right shape, and none may be left over. Loading either gives
the pretrained network or raises a one-line ValueError that says what is wrong with which file.

    python vit.py           list the backbones
    python vit.py FILE …    describe files of weights
"""

import argparse
import gzip
import html
import io
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

# ----------------------------------------------------------------------------------- the network

ROPE_BASE = 100  # base of the periods of DINOv3's rotary positions


@dataclass(frozen=True)
class Config:
    """Everything that determines the shape and the function of a ViT, apart from its weights.

    It also describes a text tower: `patch` is then 1 and `image_size` the number of tokens.

    Raises:
        ValueError: a value is invalid, or doesn't fit another one.
    """

    width: int  # D, such as 384
    depth: int  # L, such as 12
    heads: int  # H, such as 6
    patch: int  # pixels along a side of a patch, such as 16
    image_size: int  # S, such as 224
    hidden: int = 0  # width of the MLP; 0 for the usual 4·D
    registers: int = 0  # R; 4 in DINOv2's "_reg" (https://arxiv.org/abs/2309.16588) and DINOv3
    layer_scale: bool = False  # True in DINOv2 and DINOv3
    norm_pre: bool = False  # a LayerNorm before the first block, as in CLIP
    quick_gelu: bool = False  # OpenAI's CLIP
    qkv_bias: bool = True
    patch_bias: bool = True  # False in CLIP
    pool: str = "token"  # the head reads norm(h)[class]; for "mean", norm(mean of patch tokens)
    eps: float = 1e-6  # of the LayerNorms
    causal: bool = False  # tokens attend only to themselves and earlier ones: CLIP's text tower
    rope: bool = False  # rotary positions instead of learnt ones: DINOv3

    def __post_init__(self):
        for name in ("width", "depth", "heads", "patch", "image_size"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= (1000 if name == "depth" else 100_000):
                raise ValueError(f"{name.replace('_', ' ')} {value!r} is not valid")
        if type(self.eps) not in (int, float) or not 0 <= self.eps < 1:
            raise ValueError(f"eps {self.eps!r} of the LayerNorms is not valid")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} can't be split into {self.heads} heads; "
                "give the number by --heads"
            )
        if self.image_size % self.patch:
            raise ValueError(
                f"image size {self.image_size} is not a multiple of the patch size {self.patch}"
            )
        if self.grid > 256 and not self.causal:  # a small file must not cause hours of work
            raise ValueError(f"image size {self.image_size} is over 256 patches of {self.patch}")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(
                f"heads of {self.width // self.heads} channels can't have rotary positions, which "
                "take a multiple of 4; give the number of heads by --heads"
            )

    @property
    def grid(self) -> int:
        """g, the number of patches along a side of the image."""
        return self.image_size // self.patch


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation of GELU that OpenAI trained CLIP with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Rotary(nn.Module):
    """Rotary positions in two dimensions for queries or keys [B, H, N, d] (RoFormer,
    https://arxiv.org/abs/2104.09864, equation 34, in one dimension and with neighbouring channels
    paired; DINOv3, https://arxiv.org/abs/2508.10104, as here).

    Channels i and i + d/2 are the coordinates of a point, which is rotated about the origin: the
    first d/4 points by the patch's row y, the others by its column x. Both run from -1 to 1 across
    the image, whatever its size:

        angle = 2π · y / ROPE_BASE^(4j/d)      j = 0 .. d/4 - 1

    So the dot product of a query and a key depends only on the difference between the positions of
    their patches. Tokens that aren't patches (class token, registers, and prompts, which follow the
    patches) have the angle 0.

    The tables of cosines and sines aren't in the state dict, so they are computed even where `load`
    makes meta tensors; in fp32, as in timm and transformers. In Meta's published files,
    ROPE_BASE^(4j/d) is rounded to bf16.
    """

    def __init__(self, config: Config):
        super().__init__()
        g = config.grid
        quarter = config.width // config.heads // 4
        periods = ROPE_BASE ** (torch.arange(quarter, device="cpu") / quarter)  # [d/4]
        centers = (torch.arange(g, device="cpu") + 0.5) / g * 2 - 1  # of the patches in a row, [g]
        angles = 2 * math.pi * centers[:, None] / periods  # [g, d/4]
        rows = angles[:, None].expand(g, g, quarter)
        columns = angles[None].expand(g, g, quarter)
        angles = torch.cat([rows, columns], dim=2).flatten(0, 1)  # [g², d/2]
        angles = F.pad(angles, (0, 0, 1 + config.registers, 0))  # [N, d/2]
        cos = torch.cat([angles.cos(), angles.cos()], dim=1)  # [N, d]
        sin = torch.cat([-angles.sin(), angles.sin()], dim=1)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def tables(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [tokens, d], for the ViT's N tokens and prompts after them."""
        prompts = tokens - len(self.cos)
        cos = F.pad(self.cos, (0, 0, 0, prompts), value=1.0)
        sin = F.pad(self.sin, (0, 0, 0, prompts))
        return cos, sin

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.tables(x.shape[2])
        exchanged = x.roll(x.shape[3] // 2, dims=3)  # channels i and i + d/2 swapped
        return (x * cos + exchanged * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] to [B, N or queries, D], with one fused projection for
    query, key and value.

    If `queries` is given, only the first `queries` tokens are output.
    """

    def __init__(self, config: Config, rope: Rotary | None = None):
        super().__init__()
        self.heads = config.heads
        self.causal = config.causal
        self.rope = rope or nn.Identity()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        q = self.rope(q)
        k = self.rope(k)
        x = attend(q[:, :, :queries], k, v, causal=self.causal)  # [B, H, N or queries, d]
        x = x.transpose(1, 2).flatten(2)
        return self.proj(x)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """softmax(q·kᵀ / √d) · v of q [B, H, M, d] and k, v [B, H, N, d], to [B, H, M, d].

    In bf16 on a CPU torch's fused kernel takes over twice the time of the three plain steps,
    forward and backward together (75 against 32 ms for 32 images of DeiT-tiny on one thread).
    Everywhere else it is as fast or faster.
    """
    if q.dtype is torch.bfloat16 and q.device.type == "cpu" and not causal:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, M, N]
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token [D] on its own."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = config.hidden or 4 * config.width
        self.fc1 = nn.Linear(config.width, hidden)
        self.act = QuickGELU() if config.quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, https://arxiv.org/abs/2103.17239)."""

    START = 1e-5  # of gamma

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), self.START))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm transformer block, [B, N, D] to [B, N, D].

    `adapter`, if set, maps the tensor that its `reads` names to a correction [B, N, D].
    `prompts` [P, D], if set, are extra tokens that ViT.run_blocks appends. If `queries` is given,
    only the first `queries` tokens are output: [B, queries, D]. All blocks share the Rotary.
    """

    def __init__(self, config: Config, rope: Rotary | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = Attention(config, rope)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.adapter: nn.Module | None = None
        self.prompts: nn.Parameter | None = None

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        x = x[:, :queries] + self.ls1(self.attn(self.norm1(x), queries))  # None: all tokens
        z = self.norm2(x)
        y = self.ls2(self.mlp(z))
        h = x + y
        if self.adapter is None:
            return h
        readable = {
            "block": h,  # AdapterTune: after the block, on the residual stream
            "raw": x,  # AdaptFormer's code: parallel to LayerNorm and MLP
            "ln": z,  # AdaptFormer's equation: parallel to the MLP
            "mlp": y,  # AdaptFormer's sequential form: after the MLP
        }
        return h + self.adapter(readable[self.adapter.reads])


class PatchEmbed(nn.Module):
    """Cut images [B, 3, S, S] into patches and project each to a token, [B, g², D]: a convolution
    whose stride equals its kernel size."""

    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Conv2d(
            3, config.width, config.patch, stride=config.patch, bias=config.patch_bias
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)  # [B, D, g, g]
        return x.flatten(2).transpose(1, 2)  # [B, g², D]


class ViT(nn.Module):
    """Normalised images [B, 3, S, S] to logits [B, classes], or to features [B, D] for 0 classes.

    Raises:
        ValueError: images of another shape, or not of floats.
    """

    def __init__(self, config: Config, classes: int = 0):
        super().__init__()
        D = config.width
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.reg_token = None
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, D))
        self.pos_embed = None
        if not config.rope:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, D))
        self.norm_pre = nn.LayerNorm(D, eps=config.eps) if config.norm_pre else nn.Identity()
        rope = Rotary(config) if config.rope else None
        self.blocks = nn.ModuleList(Block(config, rope) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=config.eps)
        self.head = nn.Linear(D, classes) if classes else nn.Identity()

    def init_weights(self) -> None:
        """Initialise all weights to train from scratch: matrices, tokens and positions from a
        truncated normal of std 0.02; biases 0. Linear layers and positions are as in timm, which
        leaves the patch embedding at torch's default and starts tokens at 1e-6."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, LayerScale.START)
        for tokens in (self.cls_token, self.reg_token, self.pos_embed):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Images to the tokens [B, N, D] that enter the first block. Registers have no position."""
        S = self.config.image_size
        if images.shape[1:] != (3, S, S) or not images.is_floating_point():
            raise ValueError(
                f"images {list(images.shape)} of {images.dtype}: give normalised floats "
                f"[B, 3, {S}, {S}], or load the model with another image_size"
            )
        B = images.shape[0]  # not len(), which torch.export would take for a constant
        class_token = self.cls_token
        patches = self.patch_embed(images)
        if self.pos_embed is not None:
            class_token = class_token + self.pos_embed[:, :1]
            patches = patches + self.pos_embed[:, 1:]
        tokens = [class_token.expand(B, -1, -1)]
        if self.reg_token is not None:
            tokens.append(self.reg_token.expand(B, -1, -1))
        tokens.append(patches)
        return self.norm_pre(torch.cat(tokens, dim=1))

    def run_blocks(self, images: Tensor, queries: int | None = None) -> Tensor:
        """Images to the tokens [B, N, D] that leave the last block; if `queries` is given, only to
        the first `queries` of them."""
        x = self.embed(images)
        B, N, _ = x.shape
        for block in self.blocks:
            if block.prompts is not None:  # after the N tokens, in place of earlier prompts
                x = torch.cat([x[:, :N], block.prompts.expand(B, -1, -1)], dim=1)
            x = block(x, queries=queries if block is self.blocks[-1] else None)
        return x[:, :N]

    def features(self, images: Tensor) -> Tensor:
        """Images to the features [B, D] that the head reads."""
        if self.config.pool == "token":
            # The head reads only the class token, so the last block computes only that token,
            # apart from its keys and values.
            return self.norm(self.run_blocks(images, queries=1)[:, 0])
        first_patch = 1 + self.config.registers
        return self.norm(self.run_blocks(images)[:, first_patch:].mean(dim=1))

    def tokens(self, images: Tensor) -> Tensor:
        """Images to all tokens after the final LayerNorm, [B, 1 + R + g², D]: class, registers,
        patches row by row. A forward hook on the last block may see only the class token, because
        `features` needs no other."""
        return self.norm(self.run_blocks(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


# ------------------------------------------------------------------------------ CLIP's text side


CLIP_VOCABULARY = 49_408  # token ids


class TextTower(nn.Module):
    """CLIP's text tower: token ids int64 [K, T] to embeddings [K, E].

    The head reads the end mark's token, which is found as the highest id, the last of CLIP's
    vocabulary; `load_text` refuses a larger one.
    """

    heads_are_guessed = False  # by `load_text`

    def __init__(self, config: Config, vocabulary: int, embedding: int):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(vocabulary, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(config.grid, config.width))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, embedding, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        x = self.blocks(self.token_embed(ids) + self.pos_embed[:T])  # [K, T, D]
        row = torch.arange(len(x), device=x.device)
        end = ids.argmax(dim=-1)
        return self.head(self.norm(x[row, end]))


class Tokenizer:
    """CLIP's byte-level byte-pair encoding (https://arxiv.org/abs/2103.00020, section 2.4).

    It gives the same ids as OpenAI's simple_tokenizer.py, without that file's clean-up by ftfy.
    Marks such as <|endoftext|> inside a text count as plain text. Ids are numbered in this order:

        0 to 255     each byte
        256 to 511   each byte at the end of a word
        512 and on   each merge of two ids into one, in the order of learning: an id is also the
                     rank of its merge, and the possible merge of lowest rank is done first
        the last two the start mark and the end mark

    Attributes:
        size: the number of ids, which is the size of the text tower's vocabulary.

    Raises:
        ValueError: the file is missing, damaged, or not a CLIP vocabulary.
    """

    MERGES = CLIP_VOCABULARY - 2 * 256 - 2  # what CLIP uses; the published list is longer
    LONGEST = 2**25  # bytes that are read at most; the published list has 3.2 million

    def __init__(self, path: str | Path):
        """Read the published bpe_simple_vocab_16e6.txt.gz or Hugging Face's merges.txt."""
        # The file writes printable bytes as themselves and the others as characters from 256 on.
        # Bytes are numbered in that order.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        symbols = [chr(byte) for byte in printable]
        symbols += [chr(256 + i) for i in range(len(others))]
        self.bytes = {byte: i for i, byte in enumerate(printable + others)}
        ids = {symbol: i for i, symbol in enumerate(symbols)}
        ids |= {f"{symbol}</w>": 256 + i for i, symbol in enumerate(symbols)}

        self.merges: dict[tuple[int, int], int] = {}
        try:
            if not Path(path).is_file():
                raise ValueError("no file")
            with Path(path).open("rb") as file:
                raw = file.read(self.LONGEST)
            if raw[:2] == b"\x1f\x8b":
                with gzip.open(io.BytesIO(raw)) as file:
                    raw = file.read(self.LONGEST)
            first, *lines = raw.decode().splitlines()
            if "#version" not in first:
                raise ValueError("no first line")
            for line in lines[: self.MERGES]:
                left, right = line.split()
                merged = len(ids)
                self.merges[ids[left], ids[right]] = merged
                ids[left + right] = merged
            # A space, with which words of GPT-2's vocabulary begin.
            if any("\u0120" in line for line in lines):
                raise ValueError("GPT-2's vocabulary")
        except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
            raise ValueError(
                f"{path} is missing, damaged or not a CLIP vocabulary; give the published "
                "bpe_simple_vocab_16e6.txt.gz or a merges.txt"
            ) from error
        self.size = len(ids) + 2
        self.start = len(ids)
        self.end = len(ids) + 1

    def __call__(self, texts: list[str], length: int = 77) -> Tensor:
        """Ids int64 [K, length]: the start mark, the text's ids, the end mark, then zeros. Long
        texts are truncated; the end mark is kept."""
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            encoded = [self.start, *self.encode(text)][: length - 1] + [self.end]
            row[: len(encoded)] = torch.tensor(encoded)
        return ids

    def encode(self, text: str) -> list[int]:
        """A text's ids, without marks."""
        text = unicodedata.normalize("NFC", text)
        text = html.unescape(html.unescape(text))  # twice, as OpenAI's code does
        text = " ".join(text.split()).lower()
        # `re` has no \p{L} and \p{N}, so words are searched for in a copy in which letters outside
        # ASCII are "a", numbers outside ASCII "0", and other characters outside ASCII "!".
        stand_ins = {"L": "a", "N": "0"}
        pattern_text = ""
        for char in text:
            kind = unicodedata.category(char)[0]
            pattern_text += char if char.isascii() else stand_ins.get(kind, "!")

        ids = []
        # Words: contractions, runs of letters, single digits, runs of anything else.
        for match in re.finditer(r"'(?:[stmd]|re|ve|ll)|[a-z]+|[0-9]|[^ a-z0-9]+", pattern_text):
            word = text[match.start() : match.end()]
            ids += self.merge_word([self.bytes[byte] for byte in word.encode()])
        return ids

    def merge_word(self, word: list[int]) -> list[int]:
        """Merge a word's byte ids pair by pair, until no pair is in `merges`."""
        word[-1] += 256  # the id of the same byte at the end of a word
        while True:
            possible = []
            for i, pair in enumerate(pairwise(word)):
                if pair in self.merges:
                    possible.append((self.merges[pair], i))
            if not possible:
                return word
            merged, i = min(possible)
            word[i : i + 2] = [merged]


# ---------------------------------------------------------------------- the pretrained backbones

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
NORMS = {"ImageNet": IMAGENET, "CLIP": CLIP, "CIFAR-100": CIFAR100, "Inception": HALF}


@dataclass(frozen=True)
class Backbone:
    """A pretrained network and the input that it expects.

    The normalisation belongs to the backbone, not to the data set: with a wrong one the network
    still works, only worse. timm evaluates all backbones on images resized bicubically. (Google's
    ViTs were trained on images resized bilinearly.)
    """

    repo: str  # on the Hugging Face hub, with a model.safetensors; empty if it isn't there
    config: Config
    norm: tuple = IMAGENET  # mean and std per channel, for pixels in 0..1
    license: str = "Apache-2.0"
    # Origin of a setting, if not the name or the file: {"heads": "config.json", "std": "guessed"}
    source: dict[str, str] = field(default_factory=dict, hash=False)
    note: str = ""  # which of several networks in its file this is, and what was left out
    lora: str = ""  # describes the LoRA that was merged into it (`merge_lora`)

    def at(self, image_size: int) -> "Backbone":
        """A copy configured for another image size in pixels; 0 keeps its own."""
        if not image_size:
            return self
        config = replace(self.config, image_size=image_size)
        source = self.source | {"image_size": "given"}
        return replace(self, config=config, source=source)

    @property
    def guessed(self) -> dict[str, str]:
        """The settings that were guessed, by the option of train.py that sets them, such as
        {"--heads": "heads 6", "--std": "ImageNet's std"}."""
        mean, std = self.norm
        guesses = {
            "heads": ("--heads", f"heads {self.config.heads}"),
            "quick_gelu": ("--mlp-act", "QuickGELU"),
            "mean": ("--mean", f"{whose_norm(mean)}'s mean"),
            "std": ("--std", f"{whose_norm(std)}'s std"),
            "image_size": ("--image-size", f"image size {self.config.image_size}"),
        }
        return dict(guesses[name] for name in guesses if self.source.get(name) == "guessed")


def whose_norm(values: tuple) -> str:
    """The key of NORMS that has this mean or std; "" for none."""
    for name, norm in NORMS.items():
        if values in norm:
            return name
    return ""


def _vit(width: int, patch: int, image_size: int = 224, **more) -> Config:
    """A Config of the usual shape: 12 blocks (24 for width 1024), heads of 64 channels."""
    shape = {"depth": 24 if width == 1024 else 12, "heads": width // 64}
    shape.update(more)
    return Config(width=width, patch=patch, image_size=image_size, **shape)


_DINOV2 = {"layer_scale": True}
_REG = _DINOV2 | {"registers": 4}
# In Meta's code, queries and values have biases. In its published files these are zero; timm's
# files leave them out.
_DINOV3 = _REG | {"rope": True, "qkv_bias": False, "eps": 1e-5}
_LAION = {"norm_pre": True, "patch_bias": False, "eps": 1e-5}
_CLIP = _LAION | {"quick_gelu": True}
_MICRO = {"depth": 6, "heads": 4, "hidden": 256, "pool": "mean"}

# A row of your own needs no other change: `python train.py --backbone NAME`, or, if its repo is
# empty, with `--weights FILE`. State the weights' licence. Tensors that don't fit the row are
# errors, but they don't show heads, quick_gelu, eps and the normalisation, so compare logits with
# the original network's.
#
# Repository, normalisation and licence as in timm's registry (default_cfgs, timm 1.0); CLIP's as in
# OpenAI's clip.py and, for LAION's, open_clip's registry. DINOv2 was published for 518 px; most use
# it at 224 (--image-size 518 for the original). DINOv3: 224 px in transformers, 256 in timm.
BACKBONES = {
    "vit_ti16": Backbone("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", _vit(192, 16), HALF),
    "vit_s16": Backbone("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", _vit(384, 16), HALF),
    "vit_b16": Backbone("timm/vit_base_patch16_224.augreg_in21k_ft_in1k", _vit(768, 16), HALF),
    "vit_l16": Backbone("timm/vit_large_patch16_224.augreg_in21k_ft_in1k", _vit(1024, 16), HALF),
    "deit_ti16": Backbone("timm/deit_tiny_patch16_224.fb_in1k", _vit(192, 16)),
    "deit_s16": Backbone("timm/deit_small_patch16_224.fb_in1k", _vit(384, 16)),
    "deit_b16": Backbone("timm/deit_base_patch16_224.fb_in1k", _vit(768, 16)),
    "dino_s16": Backbone("timm/vit_small_patch16_224.dino", _vit(384, 16)),
    "dino_b16": Backbone("timm/vit_base_patch16_224.dino", _vit(768, 16)),
    "dinov2_s14": Backbone("timm/vit_small_patch14_dinov2.lvd142m", _vit(384, 14, **_DINOV2)),
    "dinov2_b14": Backbone("timm/vit_base_patch14_dinov2.lvd142m", _vit(768, 14, **_DINOV2)),
    "dinov2_l14": Backbone("timm/vit_large_patch14_dinov2.lvd142m", _vit(1024, 14, **_DINOV2)),
    "dinov2_s14_reg": Backbone("timm/vit_small_patch14_reg4_dinov2.lvd142m", _vit(384, 14, **_REG)),
    "dinov2_b14_reg": Backbone("timm/vit_base_patch14_reg4_dinov2.lvd142m", _vit(768, 14, **_REG)),
    "dinov2_l14_reg": Backbone(
        "timm/vit_large_patch14_reg4_dinov2.lvd142m", _vit(1024, 14, **_REG)
    ),
    "dinov3_s16": Backbone(
        "timm/vit_small_patch16_dinov3.lvd1689m", _vit(384, 16, **_DINOV3), license="DINOv3 License"
    ),
    "dinov3_b16": Backbone(
        "timm/vit_base_patch16_dinov3.lvd1689m", _vit(768, 16, **_DINOV3), license="DINOv3 License"
    ),
    "mae_b16": Backbone("timm/vit_base_patch16_224.mae", _vit(768, 16), license="CC-BY-NC-4.0"),
    "clip_b32": Backbone("openai/clip-vit-base-patch32", _vit(768, 32, **_CLIP), CLIP, "MIT"),
    "clip_b16": Backbone("openai/clip-vit-base-patch16", _vit(768, 16, **_CLIP), CLIP, "MIT"),
    "clip_l14": Backbone("openai/clip-vit-large-patch14", _vit(1024, 14, **_CLIP), CLIP, "MIT"),
    "clip_b32_laion": Backbone(
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", _vit(768, 32, **_LAION), CLIP, "MIT"
    ),
    "clip_b16_laion": Backbone(
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", _vit(768, 16, **_LAION), CLIP, "MIT"
    ),
    "clip_l14_laion": Backbone(
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", _vit(1024, 14, **_LAION), HALF, "MIT"
    ),
    # Ours, in assets/: pretrained on CIFAR-100 by train.py --scratch; command and log beside it.
    "vit_micro": Backbone("", _vit(128, 4, 32, **_MICRO), CIFAR100, "MIT"),
}

# -------------------------------------------------------------------- layouts of published files

# Keys known not to belong to the backbone, which are left out; "../" is explained at `Layout`.
IGNORED = (
    r"(embeddings\.)?mask_token$",  # DINOv2, BEiT; HF embeddings.mask_token
    r"masked_embed$",  # iBOT
    r"embeddings\.position_ids$",  # HF CLIP
    r"rope_embed\.periods$",  # DINOv3's, which Rotary computes
    r"pooler\.dense\.",  # HF ViT
    r"(\.\./(.*\.)?decoder\.)?(decoder_|mask_token$)",  # MAE decoder_embed.weight
    r"head_dist\.|\.\./(.*\.)?(cls|distillation)_classifier\.",  # DeiT's second head
    r"(\.\./)?head\.(mlp|last_layer)",  # DINO's projection head
    # CLIP's text tower, and tensors outside both towers
    r"\.\./(.*\.)?(text(\.|_model\.|_projection)|transformer\.resblocks\.|token_embedding\.)",
    r"\.\./(.*\.)?(positional_embedding$|ln_final\.)",
    r"\.\./(.*\.)?(logit_|attn_mask$|input_resolution$|context_length$|vocab_size$)",
)
TEXT_IGNORED = (
    r"embeddings\.position_ids$",
    r"(\.\./(.*\.)?)?(visual|vision_model\.)",  # the image tower
    r"(\.\./(.*\.)?)?(logit_|attn_mask$|input_resolution$|context_length$|vocab_size$)",
)


@dataclass(frozen=True)
class Layout:
    """A family of published files. All patterns are regular expressions.

    The part of a key before the match of `signature` is the prefix of the backbone's keys; it is
    stripped. A key without the prefix isn't the backbone's; it gets "../" in front, so that
    patterns can tell the two apart. In Hugging Face's CLIP, `signature` matches
    "vision_model.embeddings.class_embedding": the prefix is "vision_model.", and "text_model.x"
    becomes "../text_model.x"; unless `ignored` matches it, a note names it. If the prefix is empty,
    all keys count as the backbone's, and an unknown key is an error.
    """

    name: str  # shown to users
    signature: str  # matches the end of a key that only this family has
    eps: float = 1e-6  # of the LayerNorms, which tensors don't show (1e-5 if it is CLIP or DINOv3)
    norm: str = "ImageNet"  # the normalisation assumed if nothing states it; a key of NORMS
    ignored: tuple[str, ...] = IGNORED


# Prefixes of an optimiser's state in JAX's checkpoints, which repeats the network's names, such as
# opt/0/mu/embedding/kernel: moments and gradients, or any part of a state (opt/, optState/ and so
# on). In a state, perhaps below a number, may be the network itself: opt/target/embedding/kernel.
MOMENTS = re.compile(
    r"(^|[/.])(mu|nu|trace|velocity|momentum(_buffer)?|slots|(acc_)?grad(s|ients?)?(_acc\w*)?)[/.]"
)
STATE = r"(^|[/.])(opt(im(i[sz]er)?|ax)?|adam\w?)([_A-Z\d]\w*)?[/.]"
NETWORK_IN_STATE = STATE + r"(\d+[/.])*(params|target|model)\b"

OPENAI = Layout("OpenAI CLIP, open_clip", r"\bclass_embedding$")
TIMM = Layout("timm, DeiT, DINO, DINOv2, DINOv3, MAE", r"\bpatch_embed\.proj\.weight$")
GOOGLE = Layout("Google's .npz", r"\bembedding/kernel$", norm="Inception")
LAYOUTS = (  # the first one that matches is taken
    Layout(
        "Hugging Face CLIP",
        r"\bembeddings\.class_embedding$",
        ignored=(*IGNORED, r"\.\./classifier\."),  # reads the mean of patches without the norm
    ),
    OPENAI,
    Layout(
        "Hugging Face Dinov2",
        r"\bencoder\.layer\.0\.layer_scale1\.lambda1$",
        ignored=(*IGNORED, r"\.\./classifier\."),  # reads the class token and that mean
    ),
    Layout("Hugging Face DINOv3", r"\bembeddings\.patch_embeddings\.weight$"),
    Layout(
        "Hugging Face ViT, DeiT",
        r"\b(encoder\.layer|layers)\.0\.layernorm_before\.weight$",
        eps=1e-12,
    ),
    TIMM,
    Layout("torchvision", r"\bconv_proj\.weight$"),
    GOOGLE,
)
TEXT_LAYOUTS = (
    Layout(
        "OpenAI, open_clip, Hugging Face CLIP",
        r"\b(embeddings\.)?token_embedding\.weight$",
        ignored=TEXT_IGNORED,
    ),
)

# Rules that map keys to timm's names: (regular expression, replacement), each with an example of
# what it matches. They are applied in this order to the keys of every family, without prefixes.
RENAMES = (
    # Google's .npz, https://github.com/google-research/vision_transformer. Modules are numbered
    # differently in big_vision (https://github.com/google-research/big_vision, models/vit.py).
    (r"/kernel$", "/weight.T"),  # embedding/kernel
    (r"/scale$", "/weight"),  # Transformer/encoder_norm/scale
    (r"^cls$", "cls_token"),
    (r"^(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^embedding/", "patch_embed.proj."),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"\.LayerNorm_0/", ".norm1."),  # Transformer/encoderblock_0/LayerNorm_0/scale
    (r"\.LayerNorm_[12]/", ".norm2."),  # 2; 1 in big_vision
    (r"\.MultiHeadDotProductAttention_[01]/out/", ".attn.proj."),  # 1; 0 in big_vision
    (r"\.MultiHeadDotProductAttention_[01]/([qkv])(uery|ey|alue)/", r".attn.\1."),
    (r"\.MlpBlock_[03]/Dense_0/", ".mlp.fc1."),  # 3; 0 in big_vision
    (r"\.MlpBlock_[03]/Dense_1/", ".mlp.fc2."),
    (r"^pre_logits[/.]", "head.pre_logits."),  # a layer of the head; in timm's older files too
    (r"^head/", "head."),
    # tokens and positions
    (r"^embeddings\.", ""),  # HF embeddings.cls_token
    (r"^class_(embedding|token)$", "cls_token"),  # OpenAI class_embedding, torchvision class_token
    (r"^(register|storage)_tokens$", "reg_token"),  # DINOv2 register_tokens, DINOv3 storage_tokens
    (r"^(distillation|dist)_token$", "reg_token"),  # HF DeiT, timm's DeiT dist_token
    (r"^positional_embedding$", "pos_embed"),  # OpenAI
    (r"^encoder\.pos_embedding$", "pos_embed"),  # torchvision
    (r"^position_embeddings$", "pos_embed"),  # HF ViT
    (r"^position_embedding\.weight$", "pos_embed"),  # HF CLIP
    (r"^token_embedding\.", "token_embed."),  # OpenAI token_embedding.weight
    # patches
    (r"^(conv1|conv_proj)\.", "patch_embed.proj."),  # OpenAI conv1.weight, torchvision
    (r"^patch_embedding\.", "patch_embed.proj."),  # HF CLIP
    (r"^patch_embeddings\.(projection\.)?", "patch_embed.proj."),  # HF ViT; HF DINOv3 without
    # norms outside the blocks
    (r"^(ln_pre|pre_layrnorm)\.", "norm_pre."),  # OpenAI ln_pre.weight; HF's spelling
    (r"^(ln_post|ln_final|encoder\.ln)\.", "norm."),  # OpenAI ln_post.weight, torchvision
    (r"^(post_layernorm|final_layer_norm|layernorm)\.", "norm."),  # HF layernorm.weight
    # blocks
    (r"^(encoder\.layers?|layers|(model\.)?layer)\.", "blocks."),  # HF encoder.layer.0.…
    (r"^blocks\.encoder_layer_", "blocks."),  # torchvision encoder.layers.encoder_layer_0.…
    (r"^transformer\.resblocks\.", "blocks."),  # OpenAI transformer.resblocks.0.…
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 in chunks: blocks.CHUNK.BLOCK.…
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),  # HF Dinov2 ….layer_scale1.lambda1
    (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III ….gamma_1
    (r"\.ls_([12])\.gamma$", r".ls\1.gamma"),  # open_clip ….ls_1.gamma
    (r"\.(ln_|layer_norm)([12])\.", r".norm\2."),  # OpenAI ….ln_1.weight, HF CLIP
    (r"\.layernorm_before\.", ".norm1."),  # HF ViT
    (r"\.layernorm_after\.", ".norm2."),  # HF ViT
    # attention
    (r"\.(self_attn|self_attention|attention)\.", ".attn."),  # HF CLIP, torchvision, HF ViT
    (r"\.attn\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),  # HF ViT ….query.weight
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),  # HF CLIP ….q_proj.weight
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),  # BEiT
    (r"\.attn\.in_proj_", ".attn.qkv."),  # OpenAI ….attn.in_proj_weight
    (r"\.attn\.(out_proj|o_proj|output\.dense)\.", ".attn.proj."),  # OpenAI ….attn.out_proj.weight
    # MLP
    (r"\.(mlp\.c_fc|intermediate\.dense)\.", ".mlp.fc1."),  # OpenAI ….mlp.c_fc.weight, HF ViT
    (r"\.(mlp\.c_proj|output\.dense)\.", ".mlp.fc2."),  # OpenAI ….mlp.c_proj.weight, HF ViT
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),  # HF DINOv3 ….mlp.up_proj.weight
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),  # HF DINOv3 ….mlp.down_proj.weight
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),  # torchvision ….mlp.0.weight; linear_1 until 2022
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),  # torchvision
    # heads; "head.weight.T" is transposed
    (r"^heads\.(head\.)?", "head."),  # torchvision heads.head.weight
    (r"^(\.\./(.*\.)?)?classifier\.", "head."),  # HF ViT classifier.weight
    (r"^(\.\./(.*\.)?)?text_projection\.", "head."),  # HF CLIP's text tower
    (r"^\.\./(.*\.)?(visual_projection|visual\.head\.proj)\.", "head."),  # HF CLIP, open_clip
    (r"^(proj|text_projection)$", "head.weight.T"),  # OpenAI proj [D, E]
)


# --------------------------------------------------------------------------------- opening files


class ScriptModule(dict):
    """Stands in for a module of a TorchScript archive: a dictionary of its attributes. (An enum is
    made with arguments, and has no state.)"""

    def __init__(self, *arguments):
        super().__init__()

    def __setstate__(self, state: object):
        if isinstance(state, dict):
            self.update(state)


class Placeholder:
    """Stands in for objects beside the tensors that aren't needed: training arguments, numbers."""

    def __init__(self, *arguments, **more):
        pass

    def __setstate__(self, state: object):
        pass


# Names that a pickle may hold beside those that torch.load allows. They become a Placeholder,
# whatever their arguments. All other names are refused.
HARMLESS = [
    "argparse.Namespace",
    "collections.defaultdict",
    "datetime.datetime",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Int64DType",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath",  # in Python 3.13
    "pathlib._local.WindowsPath",
    "pathlib._local.PurePosixPath",
    "pathlib._local.PureWindowsPath",
    "torch.torch_version.TorchVersion",
    "torchvision.transforms.functional.InterpolationMode",
    # Type tags of values in TorchScript archives of torch.jit.script.
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
]

# File formats that can't be read: how such a file begins, and what it is.
FOREIGN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file: `git lfs pull` fetches it",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a single array of numpy",
}


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a file, and the JSON that adaptertune.save leaves in its header (or {}).

    The file is a `.safetensors`, the `.safetensors.index.json` of one in several parts, a file for
    torch.load, a TorchScript archive or an `.npz` of numpy. torch.load is called with
    weights_only=True: a pickle that would run code is refused.
    If a file holds several networks, the averaged one (EMA, teacher) is taken, and "note" says so.

    Raises:
        ValueError: the file is missing, truncated, of another format, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir() and is_lora(path):
        raise ValueError(f"{path}: {IS_LORA}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .safetensors or .pth file in it")
    if not path.is_file():
        raise ValueError(f"no weights at {path}; give the file's path (train.py: by --weights)")
    index = re.sub(r"-\d+-of-\d+\.safetensors$", ".safetensors.index.json", str(path))
    if index != str(path) and Path(index).is_file():
        raise ValueError(f"{path} is one part of several; give {index}")
    if path.name.endswith(".safetensors.index.json"):
        return read_parts(path), {}
    with path.open("rb") as file:
        beginning = file.read(64)
    kind = foreign_kind(path, beginning)
    if kind:
        raise ValueError(f"{path} is {kind}; give a .safetensors or .pth file")
    try:
        content, meta = read_content(path, beginning)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|array) (\S+)", str(error))
        what = f"more than tensors ({refused[1]})" if refused else "no tensors of PyTorch"
        raise ValueError(
            f"{path} holds {what}: refused, since a pickle can run code; "
            "save its state_dict as safetensors"
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"{path} is damaged or cut short, or no file of weights ({first_line(error)}); "
            "fetch it again, or give another file"
        ) from error
    return choose_tensors(content, path, meta)


def read_content(path: Path, beginning: bytes) -> tuple[object, dict]:
    """A file's content, whatever its format, and the metadata if adaptertune.save wrote it."""
    if beginning[8:9] == b"{":  # safetensors, whatever the suffix: a length, then JSON
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("adaptertune", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, dict(meta)
    check_archive(path)
    names = archive_names(path)
    if any(name.endswith(".npy") for name in names):
        return read_npz(path), {}
    # TorchScript, as OpenAI publishes CLIP: it holds code too, so torch.load would refuse it.
    if any(name.endswith("/constants.pkl") for name in names):
        return script_tensors(read_torchscript(path)), {}
    harmless = torch.serialization.safe_globals([(Placeholder, name) for name in HARMLESS])
    # The file is opened here, because torch.load judges a path by its suffix.
    with path.open("rb") as file, warnings.catch_warnings(), harmless:
        warnings.simplefilter("ignore")  # about a pickle that is refused anyway
        return torch.load(file, map_location="cpu", weights_only=True), {}


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its type if it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def foreign_kind(path: Path, beginning: bytes) -> str:
    """The kind of a file that can't be read, by its beginning, its suffix or the names in a zip
    archive; "" if it may be readable."""
    for start, kind in FOREIGN.items():
        if beginning.startswith(start):
            return kind
    if path.suffix == ".onnx":
        return "an ONNX graph"
    if path.name.endswith(".bin.index.json"):
        return "the index of pickles in several parts"
    if any(name.endswith("archive_format") for name in archive_names(path)):
        return "a program of torch.export (.pt2)"
    return ""


def archive_names(path: Path) -> list[str]:
    """The names in a zip archive; none if it is damaged or another kind of file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return []


def check_archive(path: Path) -> None:
    """Raise a ValueError for a zip archive that unpacks to far more than its own size, and so may
    fill the memory. (torch.save compresses nothing, and torch.jit.save compresses only code.)"""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > 2 * path.stat().st_size + 2**27:
            raise ValueError(f"it is compressed, and unpacks to {unpacked:,} bytes")


def check_size(content: object, path: Path) -> None:
    """Raise a ValueError if the tensors in a file are much larger than the file, as views of a few
    numbers can be. The limit allows for tensors that are there under several names."""
    total = 0
    for _, value in walk(content, (dict, list, tuple)):
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    if total > 4 * path.stat().st_size + 2**20:
        raise ValueError(f"{path} holds tensors of {total:,} bytes, far more than the file has")


def walk(content: object, containers: tuple[type, ...]) -> Iterator[tuple[str, object]]:
    """The containers and tensors in nested containers, in order, each with its path ("model.ema");
    up to 20 levels deep, and into each container once, because one may contain itself."""
    stack = [("", 0, content)]
    seen = set()
    while stack:
        where, depth, value = stack.pop()
        yield where, value
        if not isinstance(value, containers) or depth == 20 or id(value) in seen:
            continue
        seen.add(id(value))
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        inside = []
        for key, each in pairs:
            if isinstance(each, (*containers, Tensor)):
                inside.append((f"{where}.{str(key)[:200]}".lstrip("."), depth + 1, each))
        stack += reversed(inside)


@contextmanager
def refusing(path: Path, advice: str) -> Iterator[None]:
    """Raise a ValueError that names the file for any error in reading it: one that is damaged may
    raise nearly anything.

    Args:
        advice: what to do about it.
    """
    if not path.is_file():  # a pipe or a device may have no end
        raise ValueError(f"{path} is missing, or no file; {advice}")
    try:
        yield
    except (PermissionError, MemoryError, torch.OutOfMemoryError):  # the file may be intact
        raise
    except Exception as error:
        raise ValueError(f"{path} can't be used ({first_line(error)}); {advice}") from error


def read_json(path: Path) -> dict:
    """The dictionary in a JSON file, which may begin with a byte order mark."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise ValueError("it is no dictionary")
    return content


def read_parts(index: Path) -> dict[str, Tensor]:
    """All tensors of the files that a .safetensors.index.json lists."""
    with refusing(index, "fetch that index of safetensors again"):
        names = set(read_json(index)["weight_map"].values())
        names = sorted(Path(name).name for name in names)
    tensors = {}
    for name in names:
        part = index.with_name(name)
        with refusing(part, f"fetch it again: {index.name} lists it"):
            tensors |= load_file(part)
    return tensors


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of numpy's .npz, the format of JAX's checkpoints. Among them are bfloat16 arrays
    of big_vision, which numpy reads as two bytes of unknown type (V2)."""
    tensors = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            try:
                array = arrays[name]
            except ValueError as error:
                if "allow_pickle" in str(error):
                    raise pickle.UnpicklingError(f"array {name}") from error
                raise
            if array.dtype.kind in "SU":  # text, which isn't needed
                continue
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            if array.dtype == "V2":
                tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            else:
                tensors[name] = torch.from_numpy(array)
    return tensors


def read_torchscript(path: Path) -> ScriptModule:
    """The modules of a TorchScript archive, without its code: the rest is what torch.save would
    write."""
    kept = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(kept, "w") as copy:
        for name in archive.namelist():
            if re.search(r"/(data\.pkl|data/\w+|version|byteorder)$", name):
                copy.writestr(name, archive.read(name))
    kept.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(kept)
    known = [(ScriptModule, name) for name in names if name.startswith("__torch__.")]
    known += [(Placeholder, name) for name in HARMLESS]
    kept.seek(0)
    with torch.serialization.safe_globals(known):
        return torch.load(kept, map_location="cpu", weights_only=True)


def script_tensors(module: ScriptModule) -> dict[str, Tensor]:
    """The tensors of a module and its submodules, by their names in a state dict."""
    inside = walk(module, (ScriptModule,))
    return {name: value for name, value in inside if isinstance(value, Tensor)}


# Keys that identify a network; names of networks whose weights were averaged over training. (Of
# MoCo's two encoders the base is the one that is used; it comes first.)
NETWORK_KEY = re.compile("|".join(layout.signature for layout in LAYOUTS + TEXT_LAYOUTS))
AVERAGED = re.compile(r"(^|[._])(ema|swa(?!g)|teacher)")


def find_tensors(content: object) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors in nested dictionaries, each with its path ("model.ema")."""
    for where, value in walk(content, (dict,)):
        if not isinstance(value, dict):
            continue
        tensors = {key: each for key, each in value.items() if isinstance(each, Tensor)}
        if tensors and all(isinstance(key, str) for key in tensors):
            yield where, tensors


def choose_tensors(content: object, path: Path, meta: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of the ViT in a file's content, at whatever depth, and the metadata, with a note
    if there are several networks."""
    candidates = {}
    check_size(content, path)
    for where, tensors in find_tensors(content):
        candidates |= by_network(where, tensors)
    if not candidates and not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of tensors")
    networks = [where for where, tensors in candidates.items() if is_network(tensors)]
    if not networks:  # return the largest dictionary, for an error that names its keys
        tensors = max(candidates.values(), key=len, default={})
        return tensors, meta
    # The weights that the field evaluates: averaged ones, or the teacher's.
    averaged = [where for where in networks if AVERAGED.search(where)]
    chosen = (averaged or networks)[0]
    if len(networks) > 1:
        others = ", ".join(where or "its top level" for where in networks if where != chosen)
        meta["note"] = f"{chosen or 'its top level'} of {path.name}; it also holds {others}"
    return candidates[chosen], meta


def is_network(keys: Iterable[str]) -> bool:
    """Whether tensors of these names are a network in one of the layouts."""
    return any(map(NETWORK_KEY.search, keys))


def by_network(where: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The dictionary as it is, or, if it holds an averaged network and others under different
    prefixes ("teacher.", "student."; "module.teacher.", "ema/", …), one for each of them."""
    shared = re.sub(r"[^./]*$", "", os.path.commonprefix(list(tensors)))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        begin = re.split(r"[./]", key.removeprefix(shared), maxsplit=1)[0]
        parts.setdefault(begin, {})[key] = value
    networks = [begin for begin, inside in parts.items() if is_network(inside)]
    if len(networks) < 2 or not any(map(AVERAGED.search, networks)):
        return {where: tensors}
    return {f"{where}.{begin}".lstrip("."): parts[begin] for begin in networks}


# ------------------------------------------------------------------- translation to timm's names


def find_layout(tensors: dict[str, Tensor], layouts: tuple[Layout, ...]) -> tuple[Layout, str]:
    """The layout that the keys belong to, and their prefix."""
    if any(".base_layer." in key for key in tensors):
        raise ValueError(
            "its LoRA adapters aren't merged into it: peft's merge_and_unload() does it"
        )
    if any("lora_" in key for key in tensors):
        raise ValueError(IS_LORA)
    for layout in layouts:
        found = [(key, re.search(layout.signature, key)) for key in tensors]
        prefixes = [key[: match.start()] for key, match in found if match]
        if prefixes and layout is GOOGLE:
            return layout, network_prefix(prefixes, tensors)
        if prefixes:
            return layout, prefixes[0]
    if any(re.search(r"(^|\.)(visual|vision_model|image_encoder)\.", key) for key in tensors):
        raise ValueError(
            "its image tower is no ViT with a class token, but perhaps a ResNet or SigLIP's"
        )
    if has_text_tower(tensors):
        raise ValueError("CLIP's text tower alone; give a file that has the image tower")
    known = "; ".join(layout.name for layout in layouts)
    beginning = ", ".join(list(tensors)[:3]) or "nothing: it holds no torch.Tensor"
    raise ValueError(f"not a ViT in a known layout ({known}): its tensors begin with {beginning}")


def network_prefix(prefixes: list[str], tensors: dict[str, Tensor]) -> str:
    """Which of the prefixes in a JAX checkpoint is the network's. Others may be an optimiser's, or
    of a module that has an embedding but no blocks."""
    others = [prefix for prefix in prefixes if not MOMENTS.search(prefix)]
    networks = [prefix for prefix in others if not re.search(STATE, prefix)]
    if not networks:
        networks = [prefix for prefix in others if re.search(NETWORK_IN_STATE, prefix)]
    if len(networks) > 1:
        with_blocks = [each for each in networks if has_prefix(tensors, f"{each}Transformer/")]
        networks = with_blocks or networks
    if len(networks) != 1:
        what = "several networks" if networks else "an optimiser's state, as it seems, alone"
        raise ValueError(f"it holds {what} ({', '.join(prefixes)}); save one network alone")
    return networks[0]


def has_prefix(keys: Iterable[str], prefix: str) -> bool:
    """Whether any of the keys begins with this."""
    return any(key.startswith(prefix) for key in keys)


def has_text_tower(keys: Iterable[str]) -> bool:
    """Whether CLIP's text tower is among these tensors."""
    return any(key.endswith("token_embedding.weight") for key in keys)


@dataclass
class Translated:
    """A published state dict in timm's names and this file's shapes."""

    layout: Layout
    tensors: dict[str, Tensor]
    names: dict[str, str]  # the file's keys, by timm's names
    ignored: list[str]  # the file's keys that `Layout.ignored` matches
    kernel_heads: set[int]  # numbers of heads in the kernels [D, H, d] of an .npz; else empty
    note: str  # which other keys were left out
    lora: str  # describes the LoRA that was merged (`merge_lora`)


def to_timm(
    tensors: dict[str, Tensor], layouts: tuple[Layout, ...] = LAYOUTS, lora: str | Path = ""
) -> Translated:
    """Translate a published state dict, and merge a LoRA into it if one is given."""
    layout, prefix = find_layout(tensors, layouts)
    found = {}
    names = {}
    ignored = []
    others = []
    kernel_heads = set()
    for key, value in unstack_blocks(tensors):
        name = key.removeprefix(prefix) if key.startswith(prefix) else f"../{key}"
        if any(re.match(pattern, name) for pattern in layout.ignored):
            ignored.append(key)
            continue
        name = rename(name)
        if name.startswith("../"):  # other heads, losses, metrics, another network
            others.append(key)
            continue
        check_usable(key, name, value)
        if not value.is_floating_point():  # a counter of steps
            others.append(key)
            continue
        value = value.float()
        if name.endswith(".attn.q.weight.T") and value.ndim == 3:
            kernel_heads.add(value.shape[1])
        if name.endswith(".T"):
            name = name.removesuffix(".T")
            value = transpose(value, name).contiguous()
        if name in found:
            raise ValueError(f"{names[name]} and {key} are both its {name}")
        found[name] = value
        names[name] = key
    lora_note = merge_lora(found, Path(lora)) if lora else ""
    stack_qkv(found)
    note = f"left out: {first_few(others)}" if others else ""
    return Translated(layout, found, names, ignored, kernel_heads, note, lora_note)


def check_usable(key: str, name: str, value: Tensor) -> None:
    """Raise a ValueError for a tensor that shows a network which this module doesn't support. (A
    head may have a batch norm, as in MAE's linear probes.)"""
    if "relative_position" in key:
        raise ValueError(f"{key}: a ViT with relative positions (BEiT) can't be used")
    if key.endswith("num_batches_tracked") and not name.startswith("head."):
        raise ValueError(f"{key}: a ViT with batch norms (a hybrid) can't be used")
    if value.ndim and not value.is_floating_point():
        raise ValueError(
            f"{key} holds {value.dtype}, not floating-point numbers; "
            "quantised weights can't be used"
        )


def unstack_blocks(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All tensors; those that stack the weights of all blocks, [L, …], as big_vision does for
    lax.scan, are split into L."""
    for key, value in tensors.items():
        if "/encoderblock/" not in key:
            yield key, value
            continue
        if len(value) > 1000:
            raise ValueError(f"{key} is of {len(value):,} blocks")
        for i, of_block in enumerate(value):
            yield key.replace("/encoderblock/", f"/encoderblock_{i}/"), of_block


def rename(name: str) -> str:
    """timm's name for a key without its prefix; the key itself if no rule matches."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def transpose(kernel: Tensor, name: str) -> Tensor:
    """A weight [in, out], or a JAX kernel with patches [p, p, 3, D] or heads, in torch's order:
    the outputs first."""
    if kernel.ndim == 4:
        return kernel.permute(3, 2, 0, 1)  # [D, 3, p, p]
    if kernel.ndim == 3 and ".attn.proj." in name:
        return kernel.flatten(0, 1).T  # from [H, d, D]
    return kernel.flatten(1).T  # from [in, out], or [D, H, d] of a query, key or value


def first_few(keys: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def stack_qkv(found: dict[str, Tensor]) -> None:
    """Join separate query, key and value, each [D, D], to qkv [3D, D]; likewise their biases, which
    are [D], or [H, d] in an .npz.

    If no key has a bias (BEiT, DINOv3), it is set to zeros: without rotary positions, a key's bias
    adds the same number to all scores of a query, which the softmax ignores.
    """
    key_bias = any(name.endswith(".attn.k.bias") for name in found)
    for q in [name for name in found if ".attn.q." in name]:
        k = q.replace(".q.", ".k.")
        v = q.replace(".q.", ".v.")
        if q.endswith("bias") and v in found and not key_bias:
            found[k] = torch.zeros_like(found[v])
        if k in found and v in found:
            joined = torch.cat([found.pop(q), found.pop(k), found.pop(v)])
            found[q.replace(".q.", ".qkv.")] = joined.flatten() if q.endswith("bias") else joined
    for mask in [name for name in found if name.endswith(".attn.qkv.bias_mask")]:  # Meta's DINOv3
        bias = mask.removesuffix("_mask")
        if bias in found:
            found[bias] = found[bias] * found.pop(mask)


def arrange_positions(found: dict[str, Tensor], may_lack: bool) -> None:
    """Bring the class token to [1, 1, D] and positions to [1, 1+g², D] (class token, patches).

    If the file has positions for registers, or for DeiT's distillation token, they are added to
    those tokens, which leaves the network's output unchanged.

    Args:
        may_lack: the class token may have no position (`may_lack_position`).
    """
    D = found["cls_token"].shape[-1]
    found["cls_token"] = found["cls_token"].reshape(1, 1, D)
    positions = found["pos_embed"].reshape(1, -1, D)
    rows = positions.shape[1]
    registers = found["reg_token"].shape[1] if "reg_token" in found else 0
    # The number of rows before the g² patches: the first candidate that leaves a square number. (9
    # rows with 4 registers are 5 and a grid of 2, although 0 and a grid of 3 would fit too.)
    extra = None
    for candidate in (1, 1 + registers, *([0] if may_lack else [])):
        patches = rows - candidate
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            extra = candidate
            break
    if extra is None:
        raise ValueError(
            f"{rows} positions, which is no square grid of patches and a class token; a ViT for "
            "images that aren't square can't be used (if it is one whose class token has no "
            "position, such as FlexiViT, put timm's config.json beside it)"
        )
    if extra == 0:  # timm's DINOv2 with registers: the class token includes its position already
        positions = torch.cat([torch.zeros(1, 1, D), positions], dim=1)
    elif extra > 1:
        found["reg_token"] = found["reg_token"] + positions[:, 1:extra]
        positions = torch.cat([positions[:, :1], positions[:, extra:]], dim=1)
    found["pos_embed"] = positions


def may_lack_position(translated: Translated, stated: dict) -> bool:
    """Whether the class token may be without a position (timm's `no_embed_class`).

    So it may be in big_vision's ViTs, in those of timm that have LayerScale (DeiT III, DINOv2 with
    registers), and where the stated image size has g² patches (FlexiViT). In all others g²
    positions are those of a class token and of a grid that isn't square, such as 14 x 16.
    """
    found = translated.tensors
    if translated.layout is GOOGLE:
        return True
    if translated.layout is TIMM and "blocks.0.ls1.gamma" in found:
        return True
    patch = found["patch_embed.proj.weight"].shape[-1]
    rows = found["pos_embed"].numel() // found["cls_token"].numel()
    return patch * math.isqrt(rows) == stated.get("stated_size")


# ----------------------------------------------------------------- the architecture, from shapes

# Number of heads by width, for image towers whose heads don't have 64 channels: SO400M; ViT-H, g
# and bigG in open_clip's registry.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}


def usual_heads(width: int, text: bool) -> int:
    """The number of heads in published towers of this width. In all text towers, even bigG's of
    width 1280, heads have 64 channels."""
    if width in HEADS and not text:
        return HEADS[width]
    if width % 64:
        advice = "give the number of heads by --heads"
        if text:
            advice = "put the config.json that states the number of its heads beside the weights"
        raise ValueError(
            f"{'its text tower: ' if text else ''}width {width} is no multiple of the usual head "
            f"width 64; {advice}"
        )
    return width // 64


def is_dinov3(found: dict[str, Tensor]) -> bool:
    """Whether this is a DINOv3: no positions, but registers, LayerScale and a norm over all tokens;
    and no bias on the keys, which distinguishes it from a DINOv2 that has lost its positions."""
    parts = ("reg_token", "blocks.0.ls1.gamma", "norm.weight")
    if "pos_embed" in found or not all(key in found for key in parts):
        return False
    bias = found.get("blocks.0.attn.qkv.bias")
    if bias is None:
        return True
    D = len(bias) // 3
    return not bias[D : 2 * D].any()


def has_nonzero_bias(found: dict[str, Tensor]) -> bool:
    """Whether any bias of query, key or value isn't 0. DINOv3's are all zero after training
    (timm's model cards); Meta's and transformers' files have them, timm's don't."""
    return any(value.any() for key, value in found.items() if key.endswith(".attn.qkv.bias"))


def infer_config(found: dict[str, Tensor], *, eps: float, heads: int = 0) -> Config:
    """The architecture of a translated state dict.

    Settings that shapes don't show are assumed: the usual number of heads for that width unless
    `heads` is given, OpenAI's QuickGELU if there is a `norm_pre` (CLIP) or the tower is CLIP's text
    tower, and 224 px for DINOv3, whose tensors are the same for all image sizes.

    Args:
        eps: the layout's; CLIP and DINOv3 have 1e-5 in every layout.
        heads: the number of heads; 0 to guess it.
    """
    text = "token_embed.weight" in found
    rope = is_dinov3(found)
    check_whole(found, text, rope)
    if text:
        patch = 1
        grid, width = found["pos_embed"].shape[-2:]
    else:
        width = len(found["patch_embed.proj.weight"])
        patch = found["patch_embed.proj.weight"].shape[-1]
        grid = 224 // patch
        if not rope:
            grid = math.isqrt(found["pos_embed"].shape[1] - 1)
    blocks = {key.split(".")[1] for key in found if key.startswith("blocks.")}
    hidden = len(found["blocks.0.mlp.fc1.weight"])
    norm_pre = "norm_pre.weight" in found
    qkv_bias = "blocks.0.attn.qkv.bias" in found
    if rope:
        qkv_bias = has_nonzero_bias(found)
    return Config(
        width=width,
        depth=len(blocks),
        heads=heads or usual_heads(width, text),
        patch=patch,
        image_size=patch * grid,
        hidden=0 if hidden == 4 * width else hidden,
        registers=found["reg_token"].shape[1] if "reg_token" in found else 0,
        layer_scale="blocks.0.ls1.gamma" in found,
        norm_pre=norm_pre,
        quick_gelu=norm_pre or text,
        qkv_bias=qkv_bias,
        patch_bias="patch_embed.proj.bias" in found,
        pool="mean" if "fc_norm.weight" in found else "token",
        eps=1e-5 if norm_pre or text or rope else eps,
        causal=text,
        rope=rope,
    )


def check_whole(found: dict[str, Tensor], text: bool, rope: bool) -> None:
    """Raise a ValueError if tensors that every ViT, or every text tower, has are missing, and name
    them."""
    needed = ["head.weight"] if text else ["cls_token", "patch_embed.proj.weight"]
    if not rope:
        needed.append("pos_embed")
    needed += ["blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight"]
    missing = [key for key in needed if key not in found]
    if not missing:
        return
    kind = "text tower" if text else "ViT"
    rest = [key for key in found if not key.startswith("blocks.")][:12]
    why = ""
    if "cls_token" in missing and "patch_embed.proj.weight" in found:
        why = " (one whose head pools all patches, as SigLIP's, can't be used)"
    raise ValueError(
        f"not a whole {kind}: missing {', '.join(missing)}{why}; "
        f"beside blocks it has {', '.join(rest) or 'nothing'}"
    )


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions [1, 1+g², D] for another grid: bicubic, antialiased, in fp32; the class token's
    is kept."""
    old = math.isqrt(positions.shape[1] - 1)
    if old == grid:
        return positions
    patches = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, g, g]
    patches = F.interpolate(
        patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    patches = patches.flatten(2).transpose(1, 2)  # [1, grid², D]
    return torch.cat([positions[:, :1], patches], dim=1)


# ----------------------------------------------------------- the architecture, from descriptions

# Files beside the weights that describe them; later files override earlier ones.
BESIDE = ("config.json", "open_clip_config.json", "preprocessor_config.json")


def read_beside(path: Path, width: int) -> tuple[dict, dict[str, str]]:
    """The settings that files beside the weights state: heads, eps, quick_gelu, mean, std,
    classifier_pool (how timm's classifier pools), stated_size (of images), or some of these; and
    the file that states each.

    The files are Hugging Face's config.json and preprocessor_config.json, timm's config.json and
    open_clip's open_clip_config.json. A file that states another width belongs to another network:
    it is left out, and "note" says so.
    """
    stated = {}
    source = {}
    for name in BESIDE:
        file = path.with_name(name)
        if not file.is_file():
            continue
        with refusing(file, "correct it, or remove it from beside the weights"):
            content = read_json(file)
            tower = image_tower(content, width)
            found = read_description(content, tower, width)
        unsupported = "" if "note" in found else unsupported_statement(content, tower)
        if unsupported:
            raise ValueError(f"{file}, beside the weights, states {unsupported}: it can't be used")
        stated |= found
        source |= dict.fromkeys(found, name)
    return stated, source


def read_description(content: dict, tower: dict, width: int) -> dict:
    """The settings that one such file states (see `read_beside`)."""
    other = tower.get("hidden_size")
    if other is not None and type(other) is not int:
        raise ValueError(f"it states the width {other!r}")
    if other not in (None, width):
        return {"note": f"the description beside it is of width {other}, and was left out"}
    stated = read_shape(tower, width)
    stated["classifier_pool"] = content.get("global_pool")
    size = tower.get("image_size")
    stated["stated_size"] = size[0] if isinstance(size, list) and size else size
    stated |= read_norm(content)
    return {key: value for key, value in stated.items() if value is not None}


def read_shape(tower: dict, width: int) -> dict:
    """The heads, eps and quick_gelu that a description states about a tower, or some of these."""
    stated = {}
    heads = tower.get("num_attention_heads")
    if heads is not None:
        if type(heads) is not int or heads < 1 or width % heads:
            raise ValueError(f"it states {heads!r} attention heads, for the width {width}")
        stated["heads"] = heads
    eps = tower.get("layer_norm_eps")
    if eps is not None:
        if type(eps) not in (int, float) or not 0 <= eps < 1:
            raise ValueError(f"its eps {eps!r} of the LayerNorms is not valid")
        stated["eps"] = eps
    if tower.get("hidden_act"):
        stated["quick_gelu"] = tower["hidden_act"] == "quick_gelu"
    return stated


def image_tower(content: dict, width: int) -> dict:
    """What a description states about the image tower, named as in transformers' config.json."""
    if content.get("vision_config"):  # transformers' CLIP, which leaves out default values
        defaults = {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        return defaults | content["vision_config"]
    open_clip = content.get("model_cfg")
    if open_clip:
        vision = open_clip.get("vision_cfg") or {}
        tower = {"hidden_size": vision.get("width"), "image_size": vision.get("image_size")}
        tower["hidden_act"] = "quick_gelu" if open_clip.get("quick_gelu") else "gelu"
        tower["layer_norm_eps"] = (vision.get("norm_kwargs") or {}).get("eps")
        tower["architecture"] = vision.get("timm_model_name")
        if "timm_model_name" not in vision:
            head_width = vision.get("head_width")
            tower["num_attention_heads"] = width // (64 if head_width is None else head_width)
        return tower
    timm = content.get("model_args") or {}
    pretrained = content.get("pretrained_cfg") or {}
    tower = {"hidden_size": timm.get("embed_dim"), "num_attention_heads": timm.get("num_heads")}
    shape = pretrained.get("input_size") or [3, None]  # [3, height, width]
    tower["image_size"] = timm.get("img_size") or shape[1:]
    # timm's names of CLIPs state the activation, but OpenAI's weights have the plain name too.
    architecture = str(content.get("architecture", ""))
    if "_clip_quickgelu_" in architecture:
        tower["hidden_act"] = "quick_gelu"
    elif "_clip_" in architecture and pretrained.get("tag") != "openai":
        tower["hidden_act"] = "gelu"
    if timm.get("act_layer"):
        tower["hidden_act"] = timm["act_layer"].lower()
    return tower | content


def unsupported_statement(content: dict, tower: dict) -> str:
    """What a description states that vit.py doesn't support and tensors don't show, or ""."""
    act = tower.get("hidden_act") or "gelu"
    if act not in ("gelu", "quick_gelu"):
        return f"the activation {act!r}, not gelu or quick_gelu"
    base = tower.get("rope_theta", ROPE_BASE)
    if base != ROPE_BASE:
        return f"the base {base!r} of rotary positions, not {ROPE_BASE}"
    size = tower.get("image_size")
    if isinstance(size, list) and size != size[:1] * len(size):
        return f"images of {' x '.join(map(str, size))} pixels, which aren't square"
    # timm's vit_small_patch16_rope_ape_224 has the tensors of a DeiT III.
    architecture = str(tower.get("architecture", ""))
    if "_rope_" in architecture:
        return f"the architecture {architecture}, whose rotary positions aren't DINOv3's"
    if architecture.startswith("eva02_enormous"):
        return f"the architecture {architecture}, whose norms follow attention and MLP"
    pool = content.get("global_pool")
    if pool in ("max", "avgmax"):
        return f"the pooling {pool!r} of patches"
    open_clip = (content.get("model_cfg") or {}).get("vision_cfg") or {}
    return unsupported_option(open_clip, {"pool_type": "tok", "act_kwargs": EXACT_GELU})


EXACT_GELU = {"approximate": "none"}  # torch's default


def unsupported_option(tower: dict, supported: dict) -> str:
    """What open_clip's description states about a tower that vit.py doesn't support, or "".

    Args:
        supported: the values that are supported, which are the defaults, by option.
    """
    for name, value in supported.items():
        if tower.get(name, value) not in (value, None, {}):
            return f"{name} {tower[name]!r}, not {value!r}"
    return ""


def read_norm(content: dict) -> dict:
    """The mean and std that a description states, for pixels from 0 to 1.

    Transformers' image processors multiply pixels by rescale_factor (1/255), subtract image_mean
    and divide by image_std; do_rescale and do_normalize can switch these steps off.
    """
    timm = content.get("pretrained_cfg") or content.get("preprocess_cfg") or {}  # or open_clip's
    found = {"mean": timm.get("mean"), "std": timm.get("std")}
    for name in found:
        found[name] = content.get(f"image_{name}", found[name])
    if content.get("do_normalize") is False:
        found = {"mean": [0.0] * 3, "std": [1.0] * 3}
    factor = content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1
    norm = {}
    for name, values in found.items():
        if values is None:
            continue
        low = 0.001 if name == "std" else 0
        scaled = []
        if np.shape(values) == (3,):
            scaled = [value / (255 * factor) for value in values]
        if not scaled or not all(low <= value <= 1 for value in scaled):
            raise ValueError(f"{name} {values}: give three numbers from {low} to 1")
        norm[name] = scaled
    return norm


# --------------------------------------------------------------------------------------- loading


def choose_backbone(
    name: str, translated: Translated, meta: dict, known: dict, source: dict[str, str]
) -> Backbone:
    """The named backbone, else the one that the file describes, else a guess from its shapes.

    Args:
        known, source: settings that override these, and where each is stated.
    """
    if name:
        backbone = BACKBONES[name]
    elif "config" in meta:  # a whole network that adaptertune.save wrote, as of --method full
        license = str(meta.get("license") or "not stated")
        backbone = Backbone("", Config(**meta["config"]), license=license)
        stated = read_norm({"image_mean": meta.get("mean"), "image_std": meta.get("std")})
        known = stated | known
        source = dict.fromkeys({"mean", "std"} - stated.keys(), "guessed") | source
    else:
        backbone = guess_backbone(translated, known.get("heads", 0))
    changes = {key: known[key] for key in ("heads", "quick_gelu", "eps") if key in known}
    mean, std = backbone.norm
    notes = (meta.get("note"), translated.note, known.get("note"))
    return replace(
        backbone,
        config=replace(backbone.config, **changes),
        norm=(tuple(known.get("mean", mean)), tuple(known.get("std", std))),
        source=backbone.source | source,
        note="; ".join(filter(None, notes)),
    )


def read_statements(path: Path, translated: Translated) -> tuple[dict, dict[str, str]]:
    """The settings in files beside a file (`read_beside`), and the heads that its kernels show."""
    stated = {}
    source = {}
    if "cls_token" in translated.tensors:  # else guess_backbone says what is missing
        stated, source = read_beside(path, translated.tensors["cls_token"].shape[-1])
    if translated.kernel_heads and "heads" not in stated:
        stated["heads"] = max(translated.kernel_heads)
        source["heads"] = "its kernels' shape"
    return stated, source


def guess_backbone(translated: Translated, heads: int) -> Backbone:
    """A backbone guessed from a file's shapes; `heads` is the number of heads, 0 to guess it."""
    config = infer_config(translated.tensors, eps=translated.layout.eps, heads=heads)
    if translated.layout is OPENAI and not config.norm_pre:
        raise ValueError("it has no ln_pre, as CLIPA, whose head pools all patches: can't be used")
    if not config.norm_pre and not config.patch_bias:  # only CLIPs lack it
        raise ValueError("not a whole ViT: missing patch_embed.proj.bias")
    whose = "CLIP" if config.norm_pre else translated.layout.norm
    source = dict.fromkeys(("heads", "mean", "std"), "guessed")
    if config.norm_pre:
        source["quick_gelu"] = "guessed"
    if config.rope:
        source["image_size"] = "guessed"
    return Backbone("", config, NORMS[whose], "not stated", source)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Raise any error about a file's content as a ValueError that begins with the file's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)})") from error


def load(
    path: str | Path,
    *,
    name: str = "",
    image_size: int = 0,
    head: bool = False,
    lora: str | Path = "",
    heads: int = 0,
    quick_gelu: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[ViT, Backbone]:
    """A pretrained ViT from a file, in eval mode, and the Backbone that says what input it expects.

    Args:
        name: a key of BACKBONES, whose shape the file must have. Without it the architecture is
            read from the file's shapes, and what these don't show from the files beside it
            (`read_beside`); the rest is guessed and listed by `Backbone.guessed`.
        image_size: pixels along a side, if not the backbone's own; positions are resized to it.
        head: keep the file's own classifier (or CLIP's projection) instead of giving features; one
            that reads anything other than these features, or has several layers, is left out. Of a
            distilled DeiT, which gives the mean of two, it is the class token's.
        lora: a LoRA that peft made for this network, to be merged (see `merge_lora`).
        heads, quick_gelu, mean, std: override the name, the file and the files beside it; mean and
            std are for pixels from 0 to 1, one value per channel.

    A published one: `load(data.hub_file(BACKBONES[name].repo, "model.safetensors"), name=name)`.

    Raises:
        ValueError: an unreadable file; missing, left-over or misshapen tensors, some of them named.
    """
    check_given(path, name, mean, std)
    options = {"heads": heads or None, "quick_gelu": quick_gelu, "mean": mean, "std": std}
    given = {name: value for name, value in options.items() if value is not None}
    tensors, meta = read_tensors(path)
    with naming(path):
        refuse_adapters(meta)
        translated = to_timm(tensors, lora=lora)
        stated = {}
        source = {}
        if not name and "config" not in meta:  # else one of these states everything
            stated, source = read_statements(Path(path), translated)
        if {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= translated.tensors.keys():
            arrange_positions(translated.tensors, may_lack_position(translated, stated))
        source |= dict.fromkeys(given, "given")
        backbone = choose_backbone(name, translated, meta, stated | given, source)
        backbone = replace(backbone.at(image_size), lora=translated.lora)
        config = backbone.config
        others = translated.kernel_heads - {config.heads}
        if others:
            raise ValueError(f"its kernels have {min(others)} heads, not {config.heads}")
        check_shape(translated.tensors, name)
        unfit = unfit_classifier(translated, stated, config) if head else ""
        if unfit:
            note = f"left out: its classifier, which {unfit}"
            backbone = replace(backbone, note="; ".join(filter(None, (backbone.note, note))))
        model = build(translated, config, head and not unfit)
    return model, backbone


def refuse_adapters(meta: dict) -> None:
    """Raise a ValueError for a file that adaptertune.save wrote without the backbone."""
    if "method" in meta and "config" not in meta:
        start = ", or start adapters from it by --init" if "reads" in meta else ""
        raise ValueError(
            f"what --method {meta['method']} trained, not a backbone; give its folder to "
            f"train.py --eval or export.py{start}"
        )


def build(translated: Translated, config: Config, head: bool) -> ViT:
    """The network of a translated state dict; with `head` it has the file's classifier."""
    found = take_tensors(translated.tensors, config, head)
    # Meta tensors need no memory or random numbers; one left unfilled can't be used by mistake.
    with torch.device("meta"):
        model = ViT(config)
        if "head.weight" in found:
            classes = len(found["head.weight"])
            model.head = nn.Linear(config.width, classes, bias="head.bias" in found)
    load_strictly(model, found, translated.names)
    return model


def check_given(
    path: str | Path, name: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Raise a ValueError for arguments of `load` that are invalid whatever the file holds."""
    if name and name not in BACKBONES:
        raise ValueError(f"no backbone {name!r}: choose {', '.join(BACKBONES)}")
    if str(path) in BACKBONES and not Path(path).exists():
        file = "FILE"
        if str(path) == "vit_micro":
            file = 'data.ASSETS / "vit_micro.safetensors"'
        elif BACKBONES[str(path)].repo:
            file = f'data.hub_file(vit.BACKBONES["{path}"].repo, "model.safetensors")'
        raise ValueError(
            f'{path} is the name of a backbone; give its file too: vit.load({file}, name="{path}")'
        )
    read_norm({"image_mean": mean, "image_std": std})


def shape_of(config: Config) -> Config:
    """A configuration without the settings that tensor shapes don't show, or that may vary."""
    return replace(config, heads=1, image_size=config.patch, quick_gelu=False, eps=0)


def backbones_like(config: Config) -> list[str]:
    """The names of the backbones whose tensors have the shapes of this configuration's."""
    shape = shape_of(config)
    return [name for name, each in BACKBONES.items() if shape_of(each.config) == shape]


def check_shape(found: dict[str, Tensor], name: str) -> None:
    """Raise a ValueError for tensors of another backbone's shape than the named one's."""
    if not name:
        return
    try:
        alike = backbones_like(infer_config(found, eps=0, heads=1))
    except (ValueError, LookupError, ArithmeticError):
        return  # `load_strictly` says what is wrong
    if alike and name not in alike:
        raise ValueError(f"its shape is that of {', '.join(alike)}, not of {name}")


def unfit_classifier(translated: Translated, stated: dict, config: Config) -> str:
    """Why a file's classifier can't be the head, or "": it has several layers, as MoCo's, or reads
    the mean of the patches after the norm, not ViT.features, as that of timm's DINOv3 and as timm's
    config.json may state."""
    # The file's own layers; those that a LoRA replaced are no longer among the tensors.
    known = translated.names.keys() & translated.tensors.keys()
    layers = {name for name in known if name.startswith("head.")}
    if layers - {"head.weight", "head.bias"}:
        return "is more than a linear layer"
    reads_mean = stated.get("classifier_pool") == "avg" and config.pool == "token"
    has_head = "head.weight" in translated.tensors  # the file's, or a LoRA's
    if has_head and (config.rope or reads_mean):
        return "reads the mean of the normalised patches"
    return ""


def take_tensors(found: dict[str, Tensor], config: Config, head: bool) -> dict[str, Tensor]:
    """Adapt a translated state dict to a configuration. The classifier is kept only with `head`."""
    if not head:
        found = {key: value for key, value in found.items() if not key.startswith("head.")}
    if config.pool == "mean" and "norm.weight" not in found:  # timm calls it fc_norm here
        found = {key.replace("fc_norm.", "norm."): value for key, value in found.items()}
    if config.rope and not config.qkv_bias and not has_nonzero_bias(found):
        found = {key: value for key, value in found.items() if not key.endswith(".qkv.bias")}
    if "pos_embed" in found:
        found["pos_embed"] = resize_positions(found["pos_embed"], config.grid)
    return found


def load_text(
    path: str | Path, *, heads: int = 0, quick_gelu: bool | None = None
) -> tuple[TextTower, float | None]:
    """CLIP's text tower, in eval mode, and exp(logit_scale), or None if the file doesn't state it.

    Args:
        heads, quick_gelu: what tensors don't show. If left out, they are read from config.json or
            open_clip_config.json beside the file; else the usual number of heads for that width
            and OpenAI's QuickGELU are assumed. (In a CLIP, both towers have QuickGELU or neither.)

    Raises:
        ValueError: an unreadable file or one without a text tower; missing, left-over or misshapen
            tensors, some of them named.
    """
    tensors, _ = read_tensors(path)
    if not has_text_tower(tensors):
        raise ValueError(
            f"{path} has no text tower of CLIP; give a file with both towers, "
            "or use --classifier prototypes"
        )
    with naming(path):
        translated = to_timm(tensors, TEXT_LAYOUTS)
        found = translated.tensors
        stated = {}
        if "pos_embed" in found:  # else infer_config says what is missing
            stated = read_text_beside(Path(path), found["pos_embed"].shape[-1])
        config = infer_config(found, eps=1e-5, heads=heads or stated.get("heads", 0))
        if quick_gelu is None:
            quick_gelu = stated.get("quick_gelu", True)
        config = replace(config, quick_gelu=quick_gelu, eps=stated.get("eps", config.eps))
        vocabulary = len(found["token_embed.weight"])
        if vocabulary > CLIP_VOCABULARY:
            raise ValueError(
                f"a text tower with {vocabulary:,} tokens, more than CLIP's {CLIP_VOCABULARY:,}: "
                "which of them ends a text isn't known; use --classifier prototypes"
            )
        with torch.device("meta"):
            model = TextTower(config, vocabulary, len(found["head.weight"]))
        model.heads_are_guessed = not heads and "heads" not in stated
        load_strictly(model, found, translated.names)
        scale = None
        for key, value in tensors.items():
            if key.rpartition(".")[2] == "logit_scale":
                scale = math.exp(value.item())
    return model, scale


def read_text_beside(path: Path, width: int) -> dict:
    """The settings of a text tower that files beside its weights state: heads, eps, quick_gelu, or
    some of these. A file that states another width is left out.

    Raises:
        ValueError: a file states what tensors don't show and TextTower doesn't do, such as that
            tokens attend to later ones too (MobileCLIP2).
    """
    stated = {}
    for name in ("config.json", "open_clip_config.json"):
        file = path.with_name(name)
        if not file.is_file():
            continue
        with refusing(file, "correct it, or remove it from beside the weights"):
            tower = text_tower(read_json(file))
            if tower.get("hidden_size") not in (None, width):
                continue
            supported = {"no_causal_mask": False, "pool_type": "argmax", "act_kwargs": EXACT_GELU}
            unsupported = unsupported_option(tower, supported)
            if tower.get("hidden_act") not in ("gelu", "quick_gelu", None):
                unsupported = f"the activation {tower['hidden_act']!r}"
            stated |= read_shape(tower, width)
        if unsupported:
            raise ValueError(
                f"{file}, beside the weights, states a text tower of {unsupported}: it can't be "
                "used; use --classifier prototypes"
            )
    return stated


def text_tower(content: dict) -> dict:
    """What a description states about the text tower, named as in transformers' config.json."""
    text = content.get("text_config")
    if content.get("model_type") == "clip_text_model":  # saved without the image tower
        text = content
    if text:  # transformers leaves out default values
        defaults = {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        return defaults | {"hidden_size": 512} | text
    open_clip = content.get("model_cfg")
    if not open_clip:
        return {}
    tower = dict(open_clip.get("text_cfg") or {})
    tower["hidden_size"] = tower.get("width")
    tower["num_attention_heads"] = tower.get("heads")
    tower["layer_norm_eps"] = (tower.get("norm_kwargs") or {}).get("eps")
    tower["hidden_act"] = "quick_gelu" if open_clip.get("quick_gelu") else "gelu"
    return tower


def load_strictly(model: nn.Module, found: dict[str, Tensor], names: dict[str, str]) -> None:
    """Load tensors into a network on the meta device, and put it in eval mode. Raise a ValueError
    that names tensors that are missing, left over, of another shape or not finite.

    Args:
        names: the file's keys, which its user knows, by our names.
    """
    wanted = model.state_dict()
    misshapen = []
    for key in wanted:
        if key in found and found[key].shape != wanted[key].shape:
            shapes = f"{tuple(found[key].shape)}, not {tuple(wanted[key].shape)}"
            misshapen.append(f"{key} {shapes}")
    faults = {
        "missing": [key for key in wanted if key not in found],
        "left over": [names.get(key, key) for key in found if key not in wanted],
        "of another shape": misshapen,
        "with values that aren't finite": [key for key in found if not found[key].isfinite().all()],
    }
    texts = []
    for fault, keys in faults.items():
        if keys:
            texts.append(f"{len(keys)} {fault}: {first_few(keys)}")
    if texts:
        raise ValueError("; ".join(texts))
    model.load_state_dict(found, assign=True)
    model.eval()


# -------------------------------------------------------------------------------- a LoRA of peft

IS_LORA = (
    "these are LoRA adapters, not a network: give the network by --weights or --backbone and, if "
    "peft made the adapters, these by --init-lora; else merge them with the program that made them"
)
MERGE_BY_PEFT = "merge it with peft's merge_and_unload() and give the result by --weights"
LORA_CONFIG = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
# A factor's key, in which the adapter's name may follow lora_A:
# base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight
LORA_KEY = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.(?:\w+\.)?weight)?")
# The settings of a LoraConfig (peft 0.21) that a merge depends on. Ranks are read off the factors.
LORA_SETTINGS = {
    "peft_type": "",
    "lora_alpha": 8,
    "alpha_pattern": {},  # other alphas, by the ends of modules' names
    "use_rslora": False,  # https://arxiv.org/abs/2312.03732
    "use_dora": False,  # https://arxiv.org/abs/2402.09353
    "init_lora_weights": True,
}
# Settings that say how a LoRA was trained and on what. `fan_in_fan_out` says how the network that
# peft adapted stores its matrices; in ViTs they are [out, in].
LORA_IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
)
# Initialisations that leave the base weights as they are; PiSSA, OLoRA, CorDA, LoftQ change them.
LORA_INITS = (True, False, "gaussian", "eva", "orthogonal")


def is_lora(path: str | Path) -> bool:
    """Whether a path is a LoRA's folder, or has the name of one of the two files in it."""
    path = Path(path)
    return path.name in (LORA_CONFIG, LORA_FILE) or (path / LORA_CONFIG).is_file()


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and LORA_SETTINGS of a LoRA."""
    if not path.exists():
        raise ValueError(f"no LoRA at {path}; say where it is by --init-lora")
    folder = path if path.is_dir() else path.parent
    stated = folder / LORA_CONFIG
    if path in (folder, stated):
        path = folder / LORA_FILE
    with refusing(stated, "give the folder that peft's save_pretrained wrote"):
        content = read_json(stated)
        given = {name: value for name, value in content.items() if value is not None}
        settings = LORA_SETTINGS | given
        check_settings(settings)
    unsupported = unsupported_setting(settings)
    if unsupported:
        raise ValueError(f"{stated} states {unsupported[:100]}; {MERGE_BY_PEFT}")
    if not path.is_file():
        raise ValueError(f"no LoRA at {path}; give the folder that peft's save_pretrained wrote")
    tensors, _ = read_tensors(path)
    return tensors, settings


def check_settings(settings: dict) -> None:
    """Raise a ValueError if a LoraConfig states an invalid value."""
    for alpha in (settings["lora_alpha"], *settings["alpha_pattern"].values()):
        if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
            raise ValueError(f"alpha {alpha!r}")
    for name in ("use_rslora", "use_dora"):
        if type(settings[name]) is not bool:
            raise ValueError(f"{name} {settings[name]!r}")


def unsupported_setting(settings: dict) -> str:
    """A setting of a LoraConfig that can't be merged here, as name and value; "" if none."""
    if settings["peft_type"] != "LORA":
        return f"the method {settings['peft_type']!r}, not LORA"
    if settings["init_lora_weights"] not in LORA_INITS:
        return f"init_lora_weights {settings['init_lora_weights']!r}"
    for pattern in settings["alpha_pattern"]:
        if not re.fullmatch(r"[\w.]+", pattern):  # a pattern with * can take years to match
            return f"alpha_pattern {pattern!r}"
    for name, value in settings.items():
        if value and name not in (*LORA_SETTINGS, *LORA_IGNORED):
            return f"{name} {value!r}"
    return ""


def find_place(name: str, found: dict[str, Tensor]) -> tuple[str, str]:
    """Our name for a tensor that a LoRA names, and its prefix there: "blocks.0.attn.q.weight" and
    "vit" for "vit.encoder.layer.0.attention.attention.query.weight"."""
    parts = name.split(".")
    for start in range(min(len(parts), 50)):
        ours = rename(".".join(parts[start:]))
        if ours in found or ours.startswith("head."):
            return ours, ".".join(parts[:start])
    raise ValueError(
        f"{name[:200]} isn't a tensor of these weights: give those that the LoRA was made for"
    )


def merge_lora(found: dict[str, Tensor], path: Path) -> str:
    """Merge a LoRA that peft (https://github.com/huggingface/peft) made for a network into that
    network's tensors. They have our names, but separate query, key and value aren't joined yet.

    W' = W + s·B·A with A [r, in], B [out, r], s = alpha / r, or alpha / √r with use_rslora. Tensors
    beside the factors (biases, modules_to_save) replace the network's.

    Args:
        path: the folder that save_pretrained wrote, or adapter_model.safetensors in it.

    Returns:
        A line for the terminal that says what was merged.
    """
    tensors, settings = read_lora(path)
    merged = {}
    used = {}
    left_out = []
    with naming(path):
        changes = sort_lora(tensors)
        places = {}  # our names, and prefixes
        for name in changes:
            if re.search(r"(^|\.)(pooler\.|mask_token)", name):  # features don't depend on these
                left_out.append(name)
            else:
                places[name] = find_place(name, found)
        towers = {prefix for place, prefix in places.values() if not place.startswith("head.")}
        check_tower(towers, changes, settings, clip="norm_pre.weight" in found)
        for name, (place, _) in places.items():
            if place in merged:
                raise ValueError(f"{name} is there twice")
            if place.startswith("head.") and not reads_features(name, found):
                left_out.append(name)
                continue
            alpha = alpha_of(name, settings)
            merged[place] = merge_parts(found.get(place), changes[name], alpha, settings)
            used[name] = changes[name]
    new_heads = [name for name, parts in used.items() if "whole" in parts]
    if "head.weight" in [places[name][0] for name in new_heads]:
        # A whole new head takes the place of all layers of the network's own.
        for name in [name for name in found if name.startswith("head.")]:
            del found[name]
    found |= merged
    text = describe_lora(used, settings)
    return text + (f"; left out: {first_few(left_out)}" if left_out else "")


def check_tower(towers: set[str], names: Iterable[str], settings: dict, clip: bool) -> None:
    """Raise a ValueError if a LoRA is, or may be, for a network other than the image tower.

    Args:
        towers: the prefixes that `find_place` found.
        names: of all the tensors that the LoRA changes.
        clip: the weights are a CLIP's, whose text tower has tensors with the same names.
    """
    if len(towers) > 1 or re.search(r"text|decoder|bert", "".join(towers)):
        known = " and ".join(map(repr, sorted(towers)))
        raise ValueError(f"it is for {known}, not the image tower alone; {MERGE_BY_PEFT}")
    mapping = settings.get("auto_mapping")
    made_of = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    timm = all(re.match(r"blocks\.|patch_embed\.|norm|head\.", name) for name in names)
    if clip and not timm and "vis" not in "".join(towers) and "Vision" not in made_of:
        raise ValueError(
            "nothing says whether it is of CLIP's image tower or of its text tower; "
            + MERGE_BY_PEFT
        )


def sort_lora(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A LoRA's tensors by the name of the tensor that they change: the factors "A" and "B", and
    with DoRA "magnitude_vector"; or "whole", a tensor that replaces it."""
    changes: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{key} has values that aren't finite numbers")
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
        if ".original_module." in name:
            continue
        part = "whole"
        match = LORA_KEY.fullmatch(name)
        if match:
            name = f"{match[1]}.weight"
            part = match[2]
        value = value.float()
        known = changes.setdefault(name, {}).setdefault(part, value)
        if not known.equal(value):  # with bias="all" peft saves a classifier's bias under two names
            raise ValueError(f"it has two adapters for {name}; give a file with one")
    if all(parts.keys() == {"whole"} for parts in changes.values()):
        raise ValueError("it holds no LoRA: no lora_A and lora_B")
    return changes


def alpha_of(name: str, settings: dict) -> float:
    """The alpha of a weight: that of the first alpha_pattern that matches the end of its module's
    name, else lora_alpha."""
    module = name.removesuffix(".weight")
    for pattern, alpha in settings["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as peft's get_pattern_key
            return alpha
    return settings["lora_alpha"]


def merge_parts(
    weight: Tensor | None, parts: dict[str, Tensor], alpha: float, settings: dict
) -> Tensor:
    """A weight [out, in] with its LoRA merged. For a convolution, the weight is [out, in, k, k],
    A [r, in, k, k] and B [out, r, 1, 1].

    DoRA's magnitudes m [out] become the lengths of the merged rows: m · W' / |W'|
    (https://arxiv.org/abs/2402.09353, equation 5).
    """
    if parts.keys() == {"whole"}:
        return parts["whole"]  # `load_strictly` checks its shape with all others
    if weight is None:
        raise ValueError("it has factors for a classifier, which the weights lack")
    names = {"A", "B", "magnitude_vector"} if settings["use_dora"] else {"A", "B"}
    if weight.ndim < 2 or parts.keys() != names:
        raise ValueError(f"it has {', '.join(parts)} for a weight of {tuple(weight.shape)}")
    matrix = weight.flatten(1)  # [out, in·k·k]
    down = parts["A"].flatten(1)  # [r, in·k·k]
    up = parts["B"].flatten(1)  # [out, r]
    rank = len(down)
    if up.shape != (len(matrix), rank) or parts["A"].shape[1:] != weight.shape[1:] or not rank:
        shapes = f"{tuple(parts['A'].shape)} and {tuple(parts['B'].shape)}"
        raise ValueError(f"factors of {shapes} are for no weight of {tuple(weight.shape)}")
    scale = alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)
    merged = matrix + scale * (up @ down)
    if settings["use_dora"]:
        lengths = parts["magnitude_vector"].flatten()  # [out]
        if lengths.shape != merged.shape[:1]:
            raise ValueError(
                f"{len(lengths)} magnitudes are for no weight of {tuple(weight.shape)}"
            )
        merged = merged * (lengths / merged.norm(dim=1))[:, None]
    return merged.view_as(weight)


def reads_features(name: str, found: dict[str, Tensor]) -> bool:
    """Whether a LoRA's classifier of this name reads the output of ViT.features. The classifier of
    transformers' Dinov2 reads the class token and the mean of the patch tokens; that of its CLIP
    reads the mean without the last norm, and that of timm's DINOv3 the mean after the norm."""
    if "pos_embed" not in found:
        return False
    clip_or_dinov2 = "norm_pre.weight" in found or "blocks.0.ls1.gamma" in found
    return not (clip_or_dinov2 and "classifier." in name)


def describe_lora(changes: dict[str, dict[str, Tensor]], settings: dict) -> str:
    """A line that says what a LoRA changed."""
    factors = {name: parts for name, parts in changes.items() if "A" in parts}
    ranks = sorted({len(parts["A"]) for parts in factors.values()})
    modules = sorted({name.split(".")[-2] for name in factors})
    kind = "DoRA, " if settings["use_dora"] else ""
    text = f"{kind}rank {', '.join(map(str, ranks))} on {', '.join(modules)} "
    text += f"({len(factors)} matrices), alpha {settings['lora_alpha']:g}, merged"
    others = len(changes) - len(factors)
    if others:
        text += f"; {others} tensors beside them replace the network's"
    base = settings.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        text += f"; made for {base[:200]}"
    return text + "; it states no normalisation: the backbone's is used"


# ------------------------------------------------------------------------------ the command line

ROW = "{:16} {:>11} {:>6} {:>5} {:>5} {:>5} {:>6}  {:13} {:14} {}"  # of the table of backbones


def printable(text: str) -> str:
    """A text without control characters, which names of files and tensors may contain."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def count_parameters(model: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def list_backbones() -> list[str]:
    """BACKBONES as the lines of a table; parameters are counted without a head."""
    header = "name parameters blocks width heads patch pixels normalisation licence repository"
    lines = [ROW.format(*header.split())]
    for name, backbone in BACKBONES.items():
        config = backbone.config
        with torch.device("meta"):
            parameters = count_parameters(ViT(config))
        shape = (config.depth, config.width, config.heads, config.patch, config.image_size)
        norm = whose_norm(backbone.norm[0])
        repo = backbone.repo or "-"
        if name == "vit_micro":
            repo = "assets/vit_micro.safetensors"
        lines.append(ROW.format(name, f"{parameters:,}", *shape, norm, backbone.license, repo))
    return lines


def describe_config(config: Config) -> str:
    """The architecture, by the names of Config's fields."""
    parts = []
    for name, value in asdict(config).items():
        words = name.replace("_", " ")
        if value:
            parts.append(words if value is True else f"{words} {value}")
    if not config.quick_gelu:
        parts.append("gelu")
    return ", ".join(parts)


def describe_norm(norm: tuple) -> str:
    """Mean and std per channel, for the terminal."""
    mean = " ".join(f"{value:.3g}" for value in norm[0])
    std = " ".join(f"{value:.3g}" for value in norm[1])
    return f"mean {mean}, std {std}"


def command_line(arguments: list[str]) -> str:
    """Arguments as one line for the shell; on Windows, for PowerShell."""
    if os.name != "nt":
        return shlex.join(arguments)
    plain = re.compile(r"[\w.:/\\=+-]+")
    return " ".join(
        each if plain.fullmatch(each) else "'" + each.replace("'", "''") + "'" for each in arguments
    )


def describe_file(path: str) -> list[str]:
    """Lines that describe a file of weights; the last one is a command that uses it."""
    model, backbone = load(path)
    translated = to_timm(read_tensors(path)[0])  # with the tensors that `load` leaves out
    stated = "stated in the file"
    heads_from = backbone.source.get("heads", stated)
    norm_from = dict.fromkeys(backbone.source.get(name, stated) for name in ("mean", "std"))
    weights = f"{count_parameters(model):,} parameters"
    if "head.weight" in translated.tensors:
        weights += f", and a head of {len(translated.tensors['head.weight']):,} outputs"
    lines = [
        f"file     {path}",
        f"layout   {translated.layout.name}",
        f"network  {describe_config(backbone.config)}",
        f"heads    {backbone.config.heads} ({heads_from})",
        f"weights  {weights}",
        f"pixels   {describe_norm(backbone.norm)} ({', '.join(norm_from)})",
    ]
    if has_text_tower(translated.ignored):
        lines.append("text     CLIP's other tower: --method zero-shot or clip-adapter can use it")
    elif translated.ignored:
        lines.append(f"unused   {first_few(translated.ignored)}")
    if backbone.note:
        lines.append(f"note     {backbone.note}")
    lines += describe_guesses(backbone)
    arguments = ["train.py", "--weights", path, "--dataset", "path/to/photos"]
    lines.append(f"next     python {command_line(arguments)}")
    return lines


def describe_guesses(backbone: Backbone) -> list[str]:
    """A line for each guess with its option of train.py, and one of the backbones of that shape."""
    lines = []
    for option, guess in backbone.guessed.items():
        why = "stated neither in the file nor beside it; if it is wrong"
        lines.append(f"guessed  {guess}: {why}: {option}")
    alike = backbones_like(backbone.config)
    if lines and alike:
        names = [f"{name} ({whose_norm(BACKBONES[name].norm[0])})" for name in alike]
        text = f"{', '.join(names)}; --backbone NAME states what is guessed"
        lines.append(f"shape    that of these, each with its normalisation: {text}")
    return lines


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (status 2)."""

    def error(self, message: str):
        self.exit(2, printable(f"error: {message}; python vit.py --help shows how") + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status, 1 if a file can't be loaded."""
    text = "List the backbones, or describe files of weights and check that they can be loaded."
    parser = Parser(prog="vit.py", description=text)
    where = "a .safetensors, .pth, .npz, … file; without it the backbones are listed"
    parser.add_argument("files", nargs="*", metavar="FILE", help=where)
    files = parser.parse_args(arguments).files
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # characters that the terminal can't show
    if not files:
        print("\n".join(list_backbones()))
    status = 0
    for number, path in enumerate(files):
        if number:
            print()
        try:
            for line in describe_file(path):
                print(printable(line), flush=True)
        except (ValueError, OSError, MemoryError) as error:
            print(printable(f"error: {error or 'not enough memory'}"), file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    if os.name == "posix":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" closes the pipe early
    sys.exit(main())
