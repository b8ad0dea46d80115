"""Export: a run becomes one ONNX graph, checked against PyTorch on test images before it is kept.

    python export.py runs/NAME                          runs/NAME/model.onnx, with its class names
    python export.py runs/NAME --input uint8 --resize   takes photos of any size as they are
    python export.py runs/NAME --precision int8         a third of the size, and faster on a CPU
    python export.py runs/NAME --swappable              runs/backbone.onnx, runs/NAME.onnx_adapter
    python export.py runs/NAME --hub FOLDER             files for transformers.js and optimum-onnx

assets/device/label.py labels photos with such a file in onnxruntime, without torch.

The graph reads like vit.py, top to bottom, and each value is named after the torch module that
computes it. Everything that doesn't depend on the image is computed at export time. These rewrites
are exact up to rounding:

    query            W_q' = W_q / √d, b_q' = b_q / √d
    key              no bias: it shifts all scores of a query equally, which softmax ignores
                     (kept with rotary positions, which rotate it differently for each token)
    value, proj      b' = b + W · b_v: the rows of softmax sum to 1;  W' = γW, b' = γb (LayerScale)
    fc2              b' = γb + su: the adapter's output bias moves to the layer before it
    adapter          U' = sU; v' = v - V·su if it reads "block" or "mlp", which now contain su
    last block       query, MLP and adapter of the class token alone, if the head reads only that
    pixels 0..255    W' = W / (255 std), b' = b - Σ W · mean / std in the patch embedding
    pixels 0..1      W' = W / std, the same b'
    positions        + b', the patch embedding's bias

Sections: the graph, metadata, int8, the check, files, swappable adapters, the hub's folder, the
command line.

Shapes: B images (batch), N tokens, D width, H heads, d = D/H, r rank, S pixels along a side,
g = S / patch, P prompts, K classes.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:  # a container's first process: the kernel ignores default handlers
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.32 reports to Microsoft

import onnxruntime
from onnxruntime.quantization import quantize_dynamic

import adaptertune
import data
import train
import vit

# The IR version released with each opset (onnx/docs/Versioning.md); old runtimes refuse newer ones.
IR = {17: 8, 18: 8, 20: 9, 23: 11}
INPUT = "image"
HUB_INPUT = "pixel_values"  # the name that transformers.js and optimum-onnx expect
CHOICES = ("input", "resize", "output", "batch", "opset", "precision")  # options in the metadata
# Largest |difference| from torch allowed in fp32. Ten times as large with --resize, where pixels
# differ by 1e-5, and for CLIP's logits, which are cosines multiplied by 100.
LIMIT = 1e-4
# An fp32 graph may also be this many times as far from torch in float64 as torch in fp32 is.
ROUNDING = 4
ONE_FILE = 2**31 - 2**24  # bytes of constants in one file: protobuf's limit, less room for the rest
# fp16 and int8 may lose MAX_LOSS points of accuracy plus one standard error. On images whose labels
# aren't known, AGREE percent must keep fp32's top-1.
MAX_LOSS = 1.0
AGREE = 98.0
ONE_SCALE = "one scale a batch: a photo's scores depend on the other photos in its batch"

# ------------------------------------------------------------------------------------- the graph


class Graph:
    """Collects a graph's nodes and constants.

    Each method adds what its name says and returns the name of the result.
    """

    def __init__(self, opset: int, dtype: str = "float32", image: str = INPUT):
        self.opset = opset
        self.dtype = dtype  # of activations and weights
        self.image = image  # the input's name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def __call__(self, op: str, *inputs: str, name: str, **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Tensor | np.ndarray | list | float, dtype="") -> str:
        """Add a constant. Without `dtype`, floats get the graph's type and integers int64."""
        value = np.asarray(value)
        if not dtype:
            dtype = np.int64 if value.dtype.kind == "i" else self.dtype
        self.constants[name] = value.astype(dtype, order="C")
        return name

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        """x [..., in] · weightᵀ [in, out] + bias [out]; MatMul and Add are faster than Gemm."""
        matrix = self.constant(f"{name}.weight", weight.T)
        if bias is None:
            return self("MatMul", x, matrix, name=name)
        y = self("MatMul", x, matrix, name=f"{name}.matmul")
        return self("Add", y, self.constant(f"{name}.bias", bias), name=name)

    def layer_norm(self, name: str, x: str, norm: nn.LayerNorm) -> str:
        weight = self.constant(f"{name}.weight", norm.weight)
        bias = self.constant(f"{name}.bias", norm.bias)
        return self("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=norm.eps)

    def activation(self, name: str, x: str, module: nn.Module) -> str:
        if isinstance(module, nn.ReLU):
            return self("Relu", x, name=name)
        if isinstance(module, vit.QuickGELU):
            y = self("Mul", x, self.constant("1.702", 1.702), name=f"{name}.mul")
            return self("Mul", x, self("Sigmoid", y, name=f"{name}.sigmoid"), name=name)
        if self.opset >= 20:
            return self("Gelu", x, name=name)
        # x/√2, Erf, +1, ·x, ·½: a form of GELU that onnxruntime recognises and fuses.
        y = self("Div", x, self.constant("sqrt2", 2**0.5), name=f"{name}.div")
        y = self("Erf", y, name=f"{name}.erf")
        y = self("Add", y, self.constant("one", 1.0), name=f"{name}.add")
        y = self("Mul", x, y, name=f"{name}.mul")
        return self("Mul", y, self.constant("half", 0.5), name=name)

    def first_tokens(self, name: str, x: str, count: int) -> str:
        """The first `count` tokens of x [B, N, D]: [B, count, D]."""
        zero = self.constant("axis0", [0])
        one = self.constant("axis1", [1])
        end = one if count == 1 else self.constant("tokens.own", [count])
        return self("Slice", x, zero, end, one, name=name)

    def for_each_image(self, name: str, x: str, tokens: str) -> str:
        """The same tokens, [P, D] or [1, P, D], for each image of x [B, N, D]: [B, P, D].

        This works for any batch size. It needs neither a shape that is computed at run time nor
        Pad, which onnxruntime can't pass on to CoreML.
        """
        first = self.first_tokens(f"{name}.first", x, 1)
        zero = self("Mul", first, self.constant("zero", 0.0), name=f"{name}.zero")  # [B, 1, D]
        return self("Add", zero, tokens, name=name)


def write_pixels(g: Graph, config: vit.Config, meta: dict) -> str:
    """The graph's input, uint8 [B, H, W, 3], as floats [B, 3, S, S] from 0 to 255.

    With --resize, the photo's square is resized to S / center pixels as data.read_photo does it,
    and cropped to the middle S.
    """
    x = g("Cast", g.image, name="image.float", to=TensorProto.FLOAT)
    x = g("Transpose", x, name="image.channels_first", perm=[0, 3, 1, 2])
    if not meta["resize"]:
        return x
    # Slice instead of Shape's attributes start and end (opset 15), which OpenCV 4 ignores.
    shape = g("Shape", x, name="image.shape")
    two, three, four = (g.constant(f"image.axis{i}", [i]) for i in (2, 3, 4))
    height = g("Slice", shape, two, three, name="image.height")
    width = g("Slice", shape, three, four, name="image.width")
    center = train.center_of(meta)
    if meta.get("squash"):  # all rows and all columns
        edges = (height, width)
    else:
        edge = g("Min", height, width, name="image.edge")
        edges = (edge, edge)
    rows = write_resample(g, "image.rows", height, edges[0], config.image_size, center)
    cols = write_resample(g, "image.cols", width, edges[1], config.image_size, center)
    cols = g("Transpose", cols, name="image.cols.transposed", perm=[1, 0])
    x = g("MatMul", rows, x, name="image.resize_rows")  # [B, 3, S, W]
    x = g("MatMul", x, cols, name="image.resize_cols")  # [B, 3, S, S]
    low = g.constant("image.low", 0.0, "float32")
    high = g.constant("image.high", 255.0, "float32")
    return g("Clip", x, low, high, name="image.pixels")  # a cubic overshoots at edges


def write_resample(g: Graph, name: str, length: str, edge: str, size: int, center: float) -> str:
    """data.resample_matrix [S, L] in the graph. It resizes a line of L pixels: the middle share
    `center` of a centred stretch of `edge` pixels.

    Runtimes implement ONNX's Resize differently, and few of them its `antialias`.
    """

    def op(kind: str, *inputs: str) -> str:
        step = len(g.nodes)
        return g(kind, *inputs, name=f"{name}.{kind.lower()}.{step}")

    def number(value: float) -> str:
        return g.constant(f"image.number.{value:g}", [value], "float32")

    def to_float(x: str) -> str:
        return g("Cast", x, name=f"{x}.float.{len(g.nodes)}", to=TensorProto.FLOAT)

    side = data.stored_side(size, center)
    first = (side - size) // 2
    centers = g.constant("image.centers", torch.arange(size)[:, None] + first + 0.5, "float32")
    two = g.constant("image.two", [2])
    start = to_float(op("Div", op("Sub", length, edge), two))  # rounded down, as in read_photo
    scale = op("Div", to_float(edge), number(side))
    centers = op("Add", op("Mul", centers, scale), start)  # [S, 1]
    zero = g.constant("image.zero", 0)
    one = g.constant("image.one", 1)
    count = op("Squeeze", length)  # L
    pixels = op("Add", to_float(op("Range", zero, count, one)), number(0.5))  # [L]
    distance = op("Abs", op("Sub", pixels, centers))
    x = op("Div", distance, op("Max", scale, number(1)))  # [S, L]

    # Keys' kernel without branches: (1 - x)/2 · relu(2 - x)² + (2x - 1) · relu(1 - x)²
    far = op("Relu", op("Sub", number(2), x))
    rest = op("Sub", number(1), x)
    near = op("Relu", rest)
    outer = op("Mul", op("Mul", rest, number(0.5)), op("Mul", far, far))
    slope = op("Sub", op("Add", x, x), number(1))
    weights = op("Add", outer, op("Mul", slope, op("Mul", near, near)))
    total = op("ReduceSum", weights, g.constant("image.axis", [1]))  # [S, 1]
    return op("Div", weights, total)


def write_embedding(g: Graph, model: vit.ViT, meta: dict) -> str:
    """The graph's input to tokens [B, N, D], as they enter the first block.

    Positions and biases are added to the patches; class token and registers are put in front.
    """
    config = model.config
    weight = model.patch_embed.proj.weight  # [D, 3, patch, patch]
    bias = model.patch_embed.proj.bias
    if bias is None:
        bias = weight.new_zeros(config.width)
    image = g.image
    if meta["input"] == "uint8":
        image = write_pixels(g, config, meta)
    if meta["input"] != "float":  # fold the normalisation into weight and bias
        white = 255 if meta["input"] == "uint8" else 1
        mean = weight.new_tensor(meta["mean"])[None, :, None, None]
        std = weight.new_tensor(meta["std"])[None, :, None, None]
        bias = bias - (weight * (mean / std)).sum(dim=(1, 2, 3))
        weight = weight / (white * std)
    patch = [config.patch, config.patch]
    kernel = g.constant("patch_embed.proj.weight", weight, "float32")
    x = g("Conv", image, kernel, name="patch_embed.proj", kernel_shape=patch, strides=patch)
    if g.dtype != "float32":
        x = g("Cast", x, name="patch_embed.cast", to=TensorProto.FLOAT16)
    shape = g.constant("patch_embed.shape", [0, config.width, config.grid**2])  # 0 keeps B
    x = g("Reshape", x, shape, name="patch_embed.flatten")  # [B, D, g²]
    x = g("Transpose", x, name="patch_embed", perm=[0, 2, 1])  # [B, g², D]
    positions = model.pos_embed
    if positions is None:  # rotary positions are applied in attention
        positions = torch.zeros(1, 1 + config.grid**2, config.width)
    x = g("Add", x, g.constant("patches.positions", positions[:, 1:] + bias), name="patches")
    prefix = model.cls_token + positions[:, :1]
    if model.reg_token is not None:
        prefix = torch.cat([prefix, model.reg_token], dim=1)  # [1, 1 + R, D]
    prefix = g.for_each_image("prefix", x, g.constant("prefix.tokens", prefix))
    x = g("Concat", prefix, x, name="tokens", axis=1)  # [B, N, D]
    if config.norm_pre:
        x = g.layer_norm("norm_pre", x, model.norm_pre)
    return x


def write_attention(g: Graph, name: str, block: vit.Block, query: str, x: str, tokens: int) -> str:
    """Multi-head attention of `query` (x, or its first token) over x [B, N, D]; `tokens` is N."""
    qkv = block.attn.qkv
    proj = block.attn.proj
    rope = block.attn.rope
    rotary = isinstance(rope, vit.Rotary)
    H = block.attn.heads
    D = proj.out_features
    scale = (D // H) ** -0.5
    q_weight, k_weight, v_weight = qkv.weight.split(D)
    q_bias = None
    k_bias = None
    bias = proj.bias
    if qkv.bias is not None:
        q_bias, k_bias, v_bias = qkv.bias.split(D)
        q_bias = q_bias * scale
        bias = bias + proj.weight @ v_bias
    q = g.linear(f"{name}.qkv.q", query, q_weight * scale, q_bias)
    k = g.linear(f"{name}.qkv.k", x, k_weight, k_bias if rotary else None)
    v = g.linear(f"{name}.qkv.v", x, v_weight)
    if rotary:
        if query == x:  # else it is the class token alone, which isn't rotated
            q = write_rotary(g, rope, q, H, D, tokens)
        k = write_rotary(g, rope, k, H, D, tokens)
    if g.opset >= 23:
        heads = {"q_num_heads": H, "kv_num_heads": H, "scale": 1.0}
        y = g("Attention", q, k, v, name=f"{name}.heads", **heads)
    else:
        q = split_heads(g, q, H, D, [0, 2, 1, 3])  # [B, H, M, d], M = 1 or N queries
        k = split_heads(g, k, H, D, [0, 2, 3, 1])  # [B, H, d, N]
        v = split_heads(g, v, H, D, [0, 2, 1, 3])  # [B, H, N, d]
        scores = g("MatMul", q, k, name=f"{name}.scores")  # [B, H, M, N]
        weights = g("Softmax", scores, name=f"{name}.softmax", axis=-1)
        y = g("MatMul", weights, v, name=f"{name}.mix")  # [B, H, M, d]
        y = g("Transpose", y, name=f"{name}.mix.transpose", perm=[0, 2, 1, 3])
        y = g("Reshape", y, g.constant("tokens.shape", [0, -1, D]), name=f"{name}.heads")
    gamma = layer_scale(block.ls1, D)
    return g.linear(f"{name}.proj", y, proj.weight * gamma[:, None], bias * gamma)


def write_rotary(g: Graph, rope: vit.Rotary, x: str, H: int, D: int, tokens: int) -> str:
    """Rotate queries or keys [B, N, D] as vit.Rotary does. (ONNX's own RotaryEmbedding needs opset
    23.)"""
    half = D // H // 2
    cos, sin = rope.tables(tokens)  # [N, d]
    zero = g.constant("axis0", [0])
    middle = g.constant("rope.half", [half])
    end = g.constant("rope.end", [2 * half])
    axis = g.constant("rope.axis", [3])
    y = g("Reshape", x, g.constant("heads", [0, -1, H, D // H]), name=f"{x}.points")
    first = g("Slice", y, zero, middle, axis, name=f"{x}.first")
    second = g("Slice", y, middle, end, axis, name=f"{x}.second")
    exchanged = g("Concat", second, first, name=f"{x}.exchanged", axis=3)
    cos = g.constant(f"rope.cos.{tokens}", cos[:, None])  # [N, 1, d]
    sin = g.constant(f"rope.sin.{tokens}", sin[:, None])
    y = g("Mul", y, cos, name=f"{x}.cos")
    exchanged = g("Mul", exchanged, sin, name=f"{x}.sin")
    y = g("Add", y, exchanged, name=f"{x}.turned")  # [B, N, H, d]
    return g("Reshape", y, g.constant("tokens.shape", [0, -1, D]), name=f"{x}.rope")


def split_heads(g: Graph, x: str, H: int, D: int, perm: list[int]) -> str:
    """Reshape x [B, N, D] to [B, N, H, d] and transpose it by `perm`."""
    y = g("Reshape", x, g.constant("heads", [0, -1, H, D // H]), name=f"{x}.split")
    return g("Transpose", y, name=f"{x}.heads", perm=perm)


def layer_scale(module: nn.Module, width: int) -> Tensor:
    """A LayerScale's factors [D], or ones if the block has none."""
    return module.gamma if isinstance(module, vit.LayerScale) else torch.ones(width)


def write_block(
    g: Graph, name: str, block: vit.Block, x: str, tokens: int, class_only: bool
) -> str:
    """One block with its adapter, on x [B, tokens, D]. With `class_only` it returns only the class
    token, [B, 1, D]."""
    z = g.layer_norm(f"{name}.norm1", x, block.norm1)
    query = z
    if class_only:
        query = g.first_tokens(f"{name}.norm1.class", z, 1)
        x = g.first_tokens(f"{name}.class", x, 1)
    y = write_attention(g, f"{name}.attn", block, query, z, tokens)
    x = g("Add", x, y, name=f"{name}.attn.add")
    z = g.layer_norm(f"{name}.norm2", x, block.norm2)

    fc1 = block.mlp.fc1
    fc2 = block.mlp.fc2
    adapter = block.adapter
    su = 0.0
    if type(adapter) is adaptertune.Adapter:  # a subclass may compute something else
        su = adapter.scale * adapter.up.bias
    elif adapter is not None:
        raise ValueError(f"write_block in export.py has no branch for {type(adapter).__name__}")
    gamma = layer_scale(block.ls2, fc2.out_features)
    y = g.linear(f"{name}.mlp.fc1", z, fc1.weight, fc1.bias)
    y = g.activation(f"{name}.mlp.act", y, block.mlp.act)
    # The adapter's constant su is folded into fc2's bias: y and h are vit.Block's, each plus su.
    y = g.linear(f"{name}.mlp.fc2", y, fc2.weight * gamma[:, None], fc2.bias * gamma + su)
    if adapter is None:
        return g("Add", x, y, name=name)
    h = g("Add", x, y, name=f"{name}.mlp.add")

    z = {"block": h, "raw": x, "ln": z, "mlp": y}[adapter.reads]
    v = adapter.down.bias
    if adapter.reads in ("block", "mlp"):
        # The adapter was trained on z without su: V·(z + su) + v' = V·z + v.
        v = v - adapter.down.weight @ su
    c = g.linear(f"{name}.adapter.down", z, adapter.down.weight, v)
    c = g.activation(f"{name}.adapter.act", c, adapter.act)
    c = g.linear(f"{name}.adapter.up", c, adapter.scale * adapter.up.weight)
    return g("Add", h, c, name=name)


def write_prompts(g: Graph, name: str, prompts: Tensor, x: str, N: int, first: bool) -> str:
    """Put a block's prompts [P, D] after the image's N tokens, replacing those of an earlier
    block."""
    if not first:
        x = g.first_tokens(f"{name}.own", x, N)
    prompts = g.for_each_image(f"{name}.prompts", x, g.constant(f"{name}.weight", prompts))
    return g("Concat", x, prompts, name=name, axis=1)


def write_pooling(g: Graph, model: vit.ViT, x: str, prompts: int) -> str:
    """Tokens to the head's input [B, D]: the class token, or the mean of the patch tokens."""
    config = model.config
    if config.pool == "mean":
        # A row times the tokens: 1/g² for each patch, 0 for the tokens before and after them.
        counts = [1 + config.registers, config.grid**2, prompts]
        row = np.repeat([[0.0, 1 / config.grid**2, 0.0]], counts, axis=1)
        x = g("MatMul", g.constant("pool.weights", row), x, name="pool")  # [B, 1, D]
    x = g.layer_norm("norm", x, model.norm)
    return g("Squeeze", x, g.constant("axis1", [1]), name="features")


def write_head(g: Graph, head: nn.Module, x: str) -> str:
    """Features [B, D] to logits [B, K]. CLIP's are scaled cosines with the class embeddings, to
    which a text adapter is applied at export time."""
    if isinstance(head, nn.Linear):
        return g.linear("head", x, head.weight, head.bias)
    if not isinstance(head, adaptertune.ClipHead):
        raise ValueError(f"write_head in export.py has no branch for {type(head).__name__}")
    f = g.linear("head.projection", x, head.projection)
    if head.image is not None:
        down, _, up, _ = head.image
        y = g("Relu", g.linear("head.image.down", f, down.weight), name="head.image.relu")
        y = g("Relu", g.linear("head.image.up", y, up.weight), name="head.image")
        y = g("Mul", y, g.constant("head.ratio", head.image_ratio), name="head.adapted")
        rest = g.constant("head.rest", 1 - head.image_ratio)
        f = g("Add", y, g("Mul", f, rest, name="head.kept"), name="head.mixed")
    square = g("Mul", f, f, name="head.square")
    total = g("ReduceSum", square, g.constant("axis1", [1]), name="head.sum")
    f = g("Div", f, g("Sqrt", total, name="head.length"), name="head.unit")
    return g.linear("head", f, head.weights())


def write_vit(g: Graph, model: vit.ViT, meta: dict) -> None:
    """The whole network, up to the output that `meta` names."""
    config = model.config
    N = 1 + config.registers + config.grid**2
    prompts = 0
    x = write_embedding(g, model, meta)
    for i, block in enumerate(model.blocks):
        if block.prompts is not None:
            x = write_prompts(g, f"blocks.{i}.prompts", block.prompts, x, N, first=not prompts)
            prompts = len(block.prompts)
        class_only = config.pool == "token" and i == config.depth - 1
        x = write_block(g, f"blocks.{i}", block, x, N + prompts, class_only)
    x = write_pooling(g, model, x, prompts)
    if meta["output"] != "embedding":
        x = write_head(g, model.head, x)
    if g.dtype != "float32":
        x = g("Cast", x, name="cast", to=TensorProto.FLOAT)
    if meta["output"] == "probabilities":
        x = g("Softmax", x, name="softmax", axis=-1)
    g.nodes[-1].output[0] = meta["output"]


# The constants that --swappable turns into inputs: how their names end, and which dimension depends
# on the task. (The graph's matrices are transposed; u is folded into fc2's bias.)
SWAPPED = {
    "adapter.down.weight": 1,  # [D, r]
    "adapter.down.bias": 0,  # [r]
    "adapter.up.weight": 0,  # [r, D]
    "mlp.fc2.bias": None,  # [D]
    "head.weight": 1,  # [D, K]
    "head.bias": 0,  # [K]
}


def swapped_inputs(g: Graph) -> dict[str, list[int | str]]:
    """The constants that --swappable turns into inputs, and their shapes. Ranks may differ from
    block to block."""
    found = {}
    for name, value in g.constants.items():
        for end, task_dimension in SWAPPED.items():
            if not name.endswith(end):
                continue
            shape: list[int | str] = list(value.shape)
            if task_dimension is not None:
                block, _, _ = name.partition(".adapter")
                size = "classes" if end.startswith("head") else f"{block}.rank"
                shape[task_dimension] = size
            found[name] = shape
    return found


def to_model(g: Graph, model: vit.ViT, meta: dict) -> onnx.ModelProto:
    """The network as an ONNX model with `meta` in its metadata_props.

    With --swappable, adapters and head become inputs with defaults, which an .onnx_adapter file
    overrides. An adapter must only load into its own backbone. So the graph has one more input,
    unused, whose name contains the backbone's fingerprint (meta["swappable"]), and every adapter
    file sets it; onnxruntime refuses a file that sets an unknown input.
    """
    write_vit(g, model, meta)
    S = model.config.image_size
    B = meta["batch"] or "batch"
    key = meta.get("swappable", "")

    typed = helper.make_tensor_value_info
    if meta["input"] == "uint8":
        size = ("height", "width") if meta["resize"] else (S, S)
        inputs = [typed(g.image, TensorProto.UINT8, [B, *size, 3])]
    else:
        inputs = [typed(g.image, TensorProto.FLOAT, [B, 3, S, S])]
    width = model.head.out_features
    if key:
        for name, shape in swapped_inputs(g).items():
            inputs.append(typed(name, TensorProto.FLOAT, shape))
        inputs.append(typed(key, TensorProto.UINT8, ["bytes"]))
        g.constants[key] = np.zeros(0, np.uint8)
        width = "classes"
    if meta["output"] == "embedding":
        width = model.config.width
    outputs = [typed(meta["output"], TensorProto.FLOAT, [B, width])]

    graph = helper.make_graph(g.nodes, meta["backbone"], inputs, outputs)
    proto = helper.make_model(
        graph,
        ir_version=IR[g.opset],
        opset_imports=[helper.make_opsetid("", g.opset)],
        producer_name="adaptertune",
        model_version=1,  # else onnxruntime shows 2⁶³-1
        doc_string=sentence(meta),
    )
    for name, value in g.constants.items():  # here, since `make_model` copies the graph
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    helper.set_model_props(proto, to_props(meta, model.config))
    return proto


# -------------------------------------------------------------------------------------- metadata


def to_props(meta: dict, config: vit.Config) -> dict[str, str]:
    """The metadata_props: a graph's `meta`, with strings unchanged and other values as JSON.

    If another program uses the same key, our value wins.
    """
    props = {}
    if "swappable" not in meta:  # else classes and crop come with the adapter
        props |= props_of_others(meta, config)
    for name, value in meta.items():
        props[name] = value if isinstance(value, str) else json.dumps(value)
    return props


def props_of_others(meta: dict, config: vit.Config) -> dict[str, str]:
    """The metadata that other programs read, under their keys, as far as it is true of this graph.

    Netron and Windows ML: Image.* (onnx/docs/MetadataProps.md). OpenVINO's Model API: model_info,
    mean and scale for RGB pixels from 0 to 255. Ultralytics: task, names, imgsz, stride, channels.
    Ultralytics feeds pixels from 0 to 1, treats the output as probabilities, and feeds 640 x 640
    pixels if the batch is dynamic, so only graphs that it runs correctly get a task.
    """
    # Windows ML's name for the input's range; the input is (x - mean) / std for x from 0 to 1.
    pixel_range, mean, std = {
        "float": ("Normalized_1_1", meta["mean"], meta["std"]),
        "unit": ("Normalized_0_1", [0, 0, 0], [1, 1, 1]),
        "uint8": ("NominalRange_0_255", [0, 0, 0], [1 / 255, 1 / 255, 1 / 255]),
    }[meta["input"]]
    props = {
        "description": sentence(meta),
        "preprocessing": preprocessing(meta, config),
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
    }
    if meta["input"] != "float" or {*mean, *std} == {0.5}:  # no name for other floats
        props["Image.NominalPixelRange"] = pixel_range
    if meta["output"] == "embedding":
        return props
    as_fed = meta["input"] == "unit" and meta["batch"] and not meta.get("squash")
    if as_fed and meta["output"] == "probabilities":
        props["task"] = "classify"
    labels = ["_".join(name.split()) for name in meta["classes"]]
    if len(set(labels)) < len(labels):  # "a b" and "a_b"
        labels = [f"{label}.{i}" for i, label in enumerate(labels)]
    props |= {
        "names": str(dict(enumerate(meta["classes"]))),  # a Python literal
        "stride": str(config.patch),
        "channels": "3",
        "model_info model_type": "Classification",
        "model_info labels": " ".join(labels),
        "model_info mean_values": " ".join(f"{255 * value:g}" for value in mean),
        "model_info scale_values": " ".join(f"{255 * value:g}" for value in std),
        "model_info reverse_input_channels": "False",
        "model_info output_raw_scores": "True",  # give the scores of all classes too
    }
    if not meta["resize"]:
        props |= {
            "imgsz": str([config.image_size] * 2),
            "model_info resize_type": "standard" if meta.get("squash") else "crop",
            "model_info interpolation_mode": "CUBIC",
        }
    return props


def preprocessing(meta: dict, config: vit.Config) -> str:
    """The steps from a photo to the graph's input, as text."""
    S = config.image_size
    side = data.stored_side(S, train.center_of(meta))
    text = f"JPEG decoded at 1/2, 1/4 or 1/8 size while both sides stay at least {2 * side}, "
    text += "photo turned upright (EXIF), transparency over white, 16-bit grey divided by 257, "
    if not meta["resize"]:
        text += "all of it" if meta.get("squash") else "its centre square"
        text += f" resized to {side} x {side} (bicubic as in Pillow: a = -1/2, "
        text += "antialiased, rounded to 0..255; failing that, by area), "
        if side != S:
            text += f"of that the middle {S} x {S}, "
    if meta["input"] == "uint8":
        return text + "RGB 0..255, channels last"
    if meta["input"] == "unit":
        return text + "RGB 0..1, channels first"
    return text + "RGB 0..1, minus mean, divided by std, channels first"


def sentence(meta: dict) -> str:
    """A description of the graph in one sentence, for viewers."""
    if "swappable" in meta:
        return f"{meta['backbone']}; adapters and head come from an .onnx_adapter"
    text = f"{meta['backbone']} with {meta['method']}, gives {meta['output']}"
    if meta["output"] != "embedding":
        text += f" for {len(meta['classes'])} classes of {meta['dataset']}"
    if meta["precision"] == "int8" and meta["batch"] != 1:
        text += f"; int8, {ONE_SCALE}"
    return text


# ------------------------------------------------------------------------------------------ int8

# The matrices quantised to 8 bits: attention and MLP of every block, except the first fc2, whose
# input has the widest range. Keeping it in fp32 costs 3 % of the run time.
INT8 = re.compile(r"(?!blocks\.0\.mlp\.fc2)blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc)")


def channel_ranges(model: vit.ViT, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The smallest and largest value of every input channel, each [in], of qkv, proj and fc1 in a
    ViT's blocks, on images [n, 3, S, S]. Keys are the modules' names."""
    ranges = {}

    def observe(name: str, _, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2)  # [B·N, in]
        low = x.amin(dim=0)
        high = x.amax(dim=0)
        if name in ranges:
            low = torch.minimum(low, ranges[name][0])
            high = torch.maximum(high, ranges[name][1])
        ranges[name] = low, high

    hooks = []
    for name, module in model.named_modules():
        if re.search(r"\.(attn\.(qkv|proj)|mlp\.fc1)$", name):
            hooks.append(module.register_forward_pre_hook(functools.partial(observe, name)))
    with torch.no_grad():
        for batch in images.split(16):
            model(batch)
    for hook in hooks:
        hook.remove()
    return ranges


def channel_factors(reach: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The factors [in] by which each channel's activations are divided and its weights multiplied
    (SmoothQuant, equation 4).

    Args:
        reach: each channel's largest |activation|, [in].
        weight: the matrix that reads the channels, [out, in].
    """
    largest = weight.abs().amax(dim=0)
    return reach.clamp(min=1e-5) ** alpha / largest.clamp(min=1e-5) ** (1 - alpha)


@torch.no_grad()
def equalise(model: vit.ViT, images: Tensor, alpha: float = 0.7) -> None:
    """Make a ViT's activations easier to quantise to 8 bits, without changing its function.

    The outputs of LayerNorm are centred and scaled per channel, those of attention are scaled, and
    the next matrix undoes it: SmoothQuant (https://arxiv.org/abs/2211.10438) with the shift of
    Outlier Suppression+ (https://arxiv.org/abs/2304.09145).

    Args:
        images: representative images [n, 3, S, S] for calibration.
        alpha: how much of a channel's range moves into the weights, 0 to 1; 0.7 gave the highest
            top-1 agreement on DeiT-tiny (tests/bench_int8.py).
    """
    D = model.config.width
    ranges = channel_ranges(model, images)
    for i, block in enumerate(model.blocks):
        qkv = block.attn.qkv
        proj = block.attn.proj
        equalise_norm(block.norm1, ranges[f"blocks.{i}.attn.qkv"], [qkv], alpha)
        readers = [block.mlp.fc1]
        if block.adapter is not None and block.adapter.reads == "ln":
            readers.append(block.adapter.down)
        equalise_norm(block.norm2, ranges[f"blocks.{i}.mlp.fc1"], readers, alpha)
        # v's bias moves into proj's bias (the rows of softmax sum to 1), so proj's input lacks it.
        low, high = ranges[f"blocks.{i}.attn.proj"]
        if qkv.bias is not None:
            v_bias = qkv.bias[2 * D :]
            low = low - v_bias
            high = high - v_bias
            proj.bias += proj.weight @ v_bias
            v_bias.zero_()
        factor = channel_factors(torch.maximum(-low, high), proj.weight, alpha)
        qkv.weight[2 * D :] /= factor[:, None]
        proj.weight *= factor


def equalise_norm(
    norm: nn.LayerNorm, span: tuple[Tensor, Tensor], readers: list[nn.Linear], alpha: float
) -> None:
    """Centre and scale a LayerNorm's output, and undo it in the matrices that read it."""
    low, high = span
    middle = (low + high) / 2
    if readers[0].bias is None:  # a shift couldn't be undone
        middle = torch.zeros_like(middle)
    reach = torch.maximum(high - middle, middle - low)
    weight = torch.cat([reader.weight for reader in readers])
    factor = channel_factors(reach, weight, alpha)
    for reader in readers:
        if reader.bias is not None:
            reader.bias += reader.weight @ middle
        reader.weight *= factor
    norm.bias.sub_(middle).div_(factor)
    norm.weight /= factor


def to_int8(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model with the matrices that INT8 matches quantised by onnxruntime: weights per channel,
    inputs dynamically."""
    names = []
    for node in proto.graph.node:
        if node.op_type == "MatMul" and INT8.match(node.name):
            names.append(node.name)
    logging.disable()  # it warns that the graph wasn't preprocessed, which this one needn't be
    try:
        quantize_dynamic(
            proto, path, op_types_to_quantize=["MatMul"], nodes_to_quantize=names, per_channel=True
        )
    finally:
        logging.disable(logging.NOTSET)
    rounded = onnx.load(path)
    del rounded.graph.value_info[:]  # its batch has a name even if it is fixed: tract refuses that
    rounded.producer_name = proto.producer_name
    rounded.producer_version = proto.producer_version
    return rounded


# ------------------------------------------------------------------------------------- the check


def session(model: str | Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU. Raises ValueError for a file that it can't load."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as torch, for the speed line
    options.log_severity_level = 3  # it warns of every input that has a default
    # No spinning: idle threads give up their cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no narrower base class
        reason = vit.first_line(error)
        raise ValueError(f"onnxruntime can't load {model}: {reason}") from error


@dataclass
class Checked:
    """Test images as the graph takes them, as torch takes them, and their labels."""

    image: np.ndarray  # [B, …], the graph's input
    x: Tensor  # [B, 3, S, S], normalised
    labels: np.ndarray  # [n]; n < B if a fixed batch was filled up with repeated images


class InOnnxruntime:
    """Computes a graph's output for Checked images, with an adapter active if one is given."""

    def __init__(self, opened: onnxruntime.InferenceSession, adapter: Path | None = None):
        self.opened = opened
        self.options = onnxruntime.RunOptions()
        self.adapter = onnxruntime.LoraAdapter()  # RunOptions doesn't keep it alive
        if adapter:
            self.adapter.Load(str(adapter))
            self.options.add_active_adapter(self.adapter)

    def __call__(self, images: Checked) -> np.ndarray:
        name = self.opened.get_inputs()[0].name
        return self.opened.run(None, {name: images.image}, self.options)[0]


@dataclass
class InTorch:
    """Computes the same output by torch, in the model's precision."""

    model: vit.ViT
    meta: dict  # of the graph

    @torch.inference_mode()
    def __call__(self, images: Checked) -> np.ndarray:
        x = images.x.to(self.model.cls_token.dtype)
        if self.meta["output"] == "embedding":
            return self.model.features(x).numpy()
        logits = self.model(x)
        if self.meta["output"] == "probabilities":
            return logits.softmax(dim=-1).numpy()
        return logits.numpy()


def choose_images(run: train.Run, options: argparse.Namespace) -> None:
    """Make run.dataset the images to check with: --check's photos, the run's own test images, or
    noise. Its name becomes the noun by which the check line calls them."""
    if options.check:
        calibrated = options.precision == "int8"
        count = images_wanted(options, options.precision != "fp32")
        run.dataset = read_photos(run, Path(options.check), 2 * count if calibrated else count)
        images = run.dataset.test
        if calibrated and len(images) > 1:  # one half calibrates int8, the other checks it
            run.dataset.train = images[torch.arange(0, len(images), 2)]
            run.dataset.test = images[torch.arange(1, len(images), 2)]
    elif run.dataset is None:
        run.dataset = noise(run)
        print("note     checked on noise, since the run's own images can't be read; --check FOLDER")
    else:
        run.dataset.name = "test image"


def images_wanted(options: argparse.Namespace, rounded: bool) -> int:
    """How many images to check with, 0 for all: --images or a default, higher for fp16 and int8."""
    if options.images is not None:
        return options.images
    return 1000 if rounded else 64


def read_photos(run: train.Run, folder: Path, count: int) -> data.Dataset:
    """`count` photos of a folder and its subfolders (0: all), evenly spaced over all of them.

    A photo's label is that of the nearest enclosing folder named after a class, from this folder
    itself on, else -1.
    """
    paths, _ = data.find_photos([folder])
    count = min(count or len(paths), len(paths))
    index = np.linspace(0, len(paths) - 1, count).astype(int)
    paths = [paths[i] for i in index]
    classes = run.meta["classes"]
    inside = Path(folder.resolve().name)
    labels = [label_of(inside / path.relative_to(folder), classes) for path in paths]
    square = train.square_of(run.meta)
    images, _ = data.decode(paths, labels, square, folder, keep=False)
    seen = {"center": train.center_of(run.meta), "squash": square.squash}
    return data.Dataset("photo", classes, images, None, images, **seen, folder=folder)


def label_of(path: Path, classes: list[str]) -> int:
    """The label of the nearest enclosing folder that is named after a class, or -1."""
    for parent in path.parents:
        name = data.as_utf8(parent.name)
        if name in classes:
            return classes.index(name)
    return -1


def noise(run: train.Run) -> data.Dataset:
    """64 images of coloured blobs; fewer if they are large."""
    side = train.square_of(run.meta).side
    count = max(2, min(64, 10**8 // (3 * side**2)))
    blots = torch.rand(count, 3, 8, 8, generator=data.generator("noise"))
    pixels = nn.functional.interpolate(blots, (side, side), mode="bicubic")
    pixels = (255 * pixels).clamp(0, 255).byte()
    images = data.Images(pixels, torch.full((count,), -1))
    none = images[torch.arange(0)]
    center = train.center_of(run.meta)
    return data.Dataset("noise image", run.meta["classes"], none, None, images, center=center)


def images_to_check(run: train.Run, count: int) -> Iterator[Checked]:
    """`count` test images, evenly spaced over the set, in the graph's batch size if it is fixed.

    Otherwise the first ones, at most 55, come one by one: 5 for warm-up and 50 for timing. The rest
    come in batches of 7, to try other batch sizes: of 64 images, a batch of 7 and one of 2. Photos
    for --resize come one by one, as decoded.
    """
    test = run.dataset.test
    index = torch.linspace(0, len(test) - 1, count).long()
    if run.meta["resize"] and run.dataset.folder:
        parts = index.split(1)
    elif run.meta["batch"]:
        parts = index.split(run.meta["batch"])
    else:
        single = min(55, 7 * count // 8)
        parts = [*index[:single].split(1), *index[single:].split(7)]
    as_taken = original_to_check if run.meta["resize"] else to_check
    for part in parts:
        if len(part):
            yield as_taken(run, test[part])


def to_check(run: train.Run, images: data.Images) -> Checked:
    """A batch as the graph and as torch take it."""
    labels = images.labels.numpy()
    pixels = fill_batch(run, images.pixels)
    x = run.batches.central(pixels, run.dataset.center)
    if run.meta["input"] == "float":
        return Checked(x.numpy(), x, labels)
    mean, std = run.batches.mean_std
    if run.meta["input"] == "unit":
        return Checked((x * std + mean).numpy(), x, labels)
    # The graph takes S x S pixels: resize here, round to bytes, and give torch the same bytes.
    pixels = ((x * std + mean) * 255).round().byte()
    x = (pixels / 255 - mean) / std
    return Checked(channels_last(pixels), x, labels)


def original_to_check(run: train.Run, images: data.Images) -> Checked:
    """Images for a graph that resizes; for torch resized as in evaluation, but not rounded to bytes
    on the way. Of a folder it is one photo, as decoded. Images that are stored at the size in use
    are enlarged, or nothing would be resized."""
    square = train.square_of(run.meta)
    pixels = images.pixels
    if run.dataset.folder:
        photo = data.open_photo(run.dataset.folder / images.names[0], square.side)
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    elif pixels.shape[-1] == square.side:
        larger = nn.functional.interpolate(pixels.float(), 2 * square.side + 1, mode="bilinear")
        pixels = larger.round().byte()
    left, top, right, bottom = square.box(*pixels.shape[-2:])
    first = (square.side - run.batches.size) // 2  # of the square's pixels; the middle is used
    rows = (bottom - top) / square.side  # the photo's pixels per pixel of the square
    cols = (right - left) / square.side
    start = [top + first * rows, left + first * cols]
    box = torch.tensor([[*start, run.batches.size * rows, run.batches.size * cols]])
    x = run.batches.finish(pixels, box.expand(len(pixels), 4))
    pixels = fill_batch(run, pixels)  # last: the photo may be large
    return Checked(channels_last(pixels), fill_batch(run, x), images.labels.numpy())


def fill_batch(run: train.Run, pixels: Tensor) -> Tensor:
    """Images [n, …] repeated to fill the graph's batch, if it is fixed."""
    batch = run.meta["batch"] or len(pixels)
    return pixels[torch.arange(batch) % len(pixels)]


def channels_last(pixels: Tensor) -> np.ndarray:
    """uint8 [B, 3, H, W] as [B, H, W, 3]."""
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1))


@dataclass
class Agreement:
    """How well two functions agree on the same n images."""

    worst: float  # largest |difference|
    before: np.ndarray  # top-1 of the first, [n]
    after: np.ndarray  # top-1 of the second, [n]
    labels: np.ndarray  # [n], -1 where they aren't known
    times: list[tuple[float, float]]  # seconds of both, for each batch that is timed

    @property
    def same(self) -> float:
        """The percentage of images for which both give the same top-1."""
        return 100 * float((self.before == self.after).mean())


def measure(reference: Callable, candidate: Callable, run: train.Run, count: int) -> Agreement:
    """Run two functions on the same test images and compare them. For embeddings, top-1 is that of
    the head's logits."""

    def top1(output: np.ndarray) -> np.ndarray:
        if run.meta["output"] == "embedding":
            output = run.model.head(torch.from_numpy(output).float()).numpy()
        return output.argmax(axis=1)

    worst = 0.0
    answers = []  # for each batch: top-1 of both and the labels, [3, n]
    times = []
    seen = 0
    started = time.perf_counter()
    for images in images_to_check(run, count):
        start = time.perf_counter()
        first = reference(images)
        middle = time.perf_counter()
        second = candidate(images)
        end = time.perf_counter()
        n = len(images.labels)
        if len(images.x) == (run.meta["batch"] or 1):  # if the batch is dynamic: single images
            times.append((middle - start, end - middle))
        worst = float(np.maximum(worst, np.abs(first - second).max()))  # keeps a NaN
        answers.append([top1(first)[:n], top1(second)[:n], images.labels])
        seen += n
        data.progress("checking, image", seen, count, started)
    before, after, labels = np.concatenate(answers, axis=1)
    return Agreement(worst, before, after, labels, times)


def judge_exact(found: Agreement, meta: dict) -> tuple[str, bool]:
    """Compare an fp32 graph with torch: the text for the check line, and whether it passes."""
    clip = meta["method"] in adaptertune.CLIP_METHODS and meta["output"] == "logits"
    limit = 10 * LIMIT if meta["resize"] or clip else LIMIT
    bound = f"{limit:.0e}".replace("-0", "-")
    text = f"max |diff| {found.worst:.1e} (limit {bound}), top-1 agreement {found.same:.4g} %"
    return text, found.same == 100 and found.worst <= limit


def judge_rounding(
    reference: InTorch, candidate: InOnnxruntime, run: train.Run, count: int
) -> tuple[str, bool]:
    """Whether an fp32 graph that differs from torch by more than the limit does so because both
    round: then it is about as far from torch in float64 as torch in fp32 is. CLIP's tower, for one,
    has activations so large that fp32 is exact to 1e-4 only. Returns more text for the check line,
    and whether the graph passes."""
    exact = InTorch(copy.deepcopy(reference.model).double(), run.meta)
    ours = measure(exact, candidate, run, count).worst
    theirs = measure(exact, reference, run, count).worst
    text = f"; from float64 the graph differs by {ours:.1e}, torch by {theirs:.1e}"
    return text, ours <= ROUNDING * theirs


def judge_rounded(found: Agreement) -> tuple[str, bool]:
    """Compare fp16 or int8 with fp32: the text for the check line, and whether it passes.

    The criterion is accuracy. If b of n images are right only before and c only after, accuracy
    changes by (c - b) / n, with the standard error √(b + c - (b - c)² / n) / n of paired answers. A
    loss of up to MAX_LOSS points plus one standard error passes. If labels aren't known, AGREE
    percent of the images must keep their top-1.
    """
    text = f"max |diff| {found.worst:.1e}, top-1 agreement {found.same:.4g} %"
    finite = np.isfinite(found.worst)
    if found.labels.min() < 0:
        text += f" (at least {AGREE:g} % is wanted, since labels aren't known)"
        return text, finite and found.same >= AGREE
    n = len(found.labels)
    before = found.before == found.labels
    after = found.after == found.labels
    lost = (before & ~after).sum()
    gained = (after & ~before).sum()
    change = 100 * (gained - lost) / n
    error = 100 * np.sqrt(lost + gained - (lost - gained) ** 2 / n) / n
    text += f", accuracy {100 * after.mean():.2f} %, before {100 * before.mean():.2f} %"
    least = -MAX_LOSS - error  # the fewer the images, the more may be lost: so it is printed
    text += f", change {change:+.2f} ± {error:.2f} points (at least {least:.2f} is wanted)"
    return text, finite and change >= least


def verify(
    reference: Callable,
    candidate: Callable,
    run: train.Run,
    options: argparse.Namespace,
    names: tuple[str, str],
    rounded: bool = False,
) -> str:
    """Print how well two functions agree on images, and how long each takes for one batch. Returns
    how well they agree.

    Args:
        options: `images`, how many; `force`, to keep fp16 and int8 whatever the result.
        names: what to call the two functions.
        rounded: the candidate is fp16 or int8, and may differ as judge_rounded allows.

    Raises:
        ValueError: they differ by more than is allowed.
    """
    available = len(run.dataset.test)
    count = min(images_wanted(options, rounded) or available, available)
    found = measure(reference, candidate, run, count)
    text, good = judge_rounded(found) if rounded else judge_exact(found, run.meta)
    if not good and not rounded and found.same == 100:
        more, good = judge_rounding(reference, candidate, run, count)
        text += more
    what = f"{names[1]} against {names[0]}, {train.counted(count, run.dataset.name)}"
    where = f" of {options.check}" if options.check else ""
    stated = f"{what}: {text}"  # in the graph, without the names of folders
    text = f"{what}{where}: {text}"
    if not good and not (rounded and options.force):
        if rounded:  # with --hub the fp32 file is still written
            raise ValueError(f"{text}: it isn't kept without --force")
        raise ValueError(f"{text}: no file was written")
    verdict = "ok" if good else "forced"
    print(f"check    {text} {verdict}", flush=True)
    times = found.times[5:] or found.times  # after a warm-up
    first, second = 1000 * np.median(times, axis=0)
    how = f"median of {len(times)}, CPU, {train.counted(torch.get_num_threads(), 'thread')}"
    if run.meta["resize"] and not rounded:
        how += "; with resizing in onnxruntime, without in torch"
    print(
        f"speed    batch {run.meta['batch'] or 1}: {second:.1f} ms {names[1]}, {first:.1f} ms "
        f"{names[0]}, ratio {second / first:.2f} ({how})"
    )
    return f"{stated} {verdict}"


# ----------------------------------------------------------------------------------------- files


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write the model. If it is too large for protobuf, its constants go into PATH.data beside
    it."""
    size = sum(len(constant.raw_data) for constant in proto.graph.initializer)
    beside = Path(f"{path}.data")
    beside.unlink(missing_ok=True)  # of the fp32 file that this one replaces
    if size < ONE_FILE:
        onnx.save(proto, path)
    else:
        onnx.save(proto, path, save_as_external_data=True, location=beside.name)
        beside.chmod(path.stat().st_mode)  # onnx makes it readable by its owner only


def state_check(path: Path, text: str) -> None:
    """Add to a graph's metadata how well it agreed, under "check"."""
    proto = onnx.load(path, load_external_data=False)
    proto.metadata_props.add(key="check", value=text)
    path.write_bytes(proto.SerializeToString())


def size_of(path: Path) -> int:
    """The size of a model in bytes, including constants in a file beside it."""
    files = [path, Path(f"{path}.data")]
    return sum(file.stat().st_size for file in files if file.exists())


def save_checked(proto: onnx.ModelProto, part: Path, more: str = "") -> Callable:
    """Save the model, run ONNX's checker on it, load it and print a description."""
    save(proto, part)
    onnx.checker.check_model(part, full_check=True)
    opened = session(part)
    ends = []
    for value in (opened.get_inputs()[0], opened.get_outputs()[0]):
        kind = value.type.removeprefix("tensor(").removesuffix(")").replace("float", "float32")
        ends.append(f"{value.name} {kind} [{', '.join(map(str, value.shape))}]")
    opset = proto.opset_import[0].version
    nodes = len(proto.graph.node)
    print(f"graph    opset {opset}, {nodes} nodes, {' -> '.join(ends)}{more}")
    print("check    onnx.checker ok", flush=True)
    return InOnnxruntime(opened)


@contextlib.contextmanager
def staged(folder: Path, option: str = "-o", together: bool = False) -> Iterator[Path]:
    """A folder to write to: its contents are moved into `folder` if all goes well, else deleted.

    Args:
        option: the one that names the folder.
        together: first remove earlier files of the same names, so that a kill leaves no mixture of
            old and new files.
    """
    train.check_writable(folder, instead=option)
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with data.empty_folder(folder / "export.part") as part:
            yield part
            move_files(part, folder, together)
    except OSError as error:
        if error.errno not in data.NO_ROOM:
            raise
        raise ValueError(f"can't write to {folder} ({error.strerror}); make room") from error
    finally:
        with contextlib.suppress(OSError):  # they aren't empty
            for each in new:
                each.rmdir()


def move_files(part: Path, folder: Path, together: bool) -> None:
    """Move the contents of `part` into `folder` (see `staged`); print where each file is now."""
    new = sorted(part.rglob("*"))
    for file in new:
        data.flush(file)
        path = folder / file.relative_to(part)
        # A link to a folder leads elsewhere.
        if path.is_symlink() or (together and path.is_file()):
            path.unlink()
    for file in new:
        path = folder / file.relative_to(part)
        if file.is_dir():
            path.mkdir(exist_ok=True)
            continue
        data.move(file, path)
        size = path.stat().st_size
        text = f"{size / 1e6:.3g} MB" if size > 1e4 else f"{size / 1e3:.3g} kB"
        print(f"saved    {path} ({text})")


def file_name(options: argparse.Namespace) -> str:
    """model.onnx; options that differ from their defaults are added to the name."""
    parts = ["model"]
    if options.precision != "fp32":
        parts.append(options.precision)
    if options.input != "float":
        parts.append(options.input)
    if options.resize:
        parts.append("resize")
    if options.output != "logits":
        parts.append(options.output)
    if options.batch:
        parts.append(f"b{options.batch}")
    if options.opset != 17:
        parts.append(f"opset{options.opset}")
    return "-".join(parts) + ".onnx"


def to_lines(classes: list[str]) -> str:
    """The contents of labels.txt: one class per line."""
    return "".join(f"{data.printable(name)}\n" for name in classes)


def export(run: train.Run, options: argparse.Namespace) -> None:
    """Write and check the graph, and only then move it and labels.txt into place."""
    path = Path(options.o or run.folder)
    if path.is_dir() or options.o.endswith("/"):
        path = path / file_name(options)
    labels = ""
    if options.output != "embedding":
        labels = to_lines(run.meta["classes"])
    names = path.parent / "labels.txt"
    if options.o and labels and names.is_file() and names.read_text("utf-8", "replace") != labels:
        raise ValueError(f"{names} has other classes; give this model another folder by -o")
    with staged(path.parent) as part:
        model = part / path.name
        fp32 = export_fp32(run, options, model)
        if options.precision != "fp32":
            export_rounded(run, options, model, fp32, size_of(model))
        if labels:
            data.write_file(part / names.name, labels)


def export_fp32(run: train.Run, options: argparse.Namespace, path: Path) -> Callable:
    """Write and check the fp32 graph, and return what computes its output."""
    model = copy.deepcopy(run.model)
    merged = adaptertune.merge(model)
    more = f", {merged} adapters merged into the backbone" if merged else ""
    g = Graph(options.opset, image=options.image)
    meta = run.meta | {"precision": "fp32"}
    proto = to_model(g, model, meta)
    fp32 = save_checked(proto, path, more)
    verify(InTorch(run.model, run.meta), fp32, run, options, ("torch", "onnxruntime"))
    return fp32


def export_rounded(
    run: train.Run, options: argparse.Namespace, path: Path, fp32: Callable, size: int
) -> None:
    """Write the fp16 or int8 graph and compare it with the fp32 graph, which has `size` bytes."""
    precision = options.precision
    meta = dict(run.meta)
    for name in run.meta:
        if name.endswith("_accuracy"):
            meta[f"fp32_{name}"] = meta.pop(name)  # measured in the run, not on this file
    model = copy.deepcopy(run.model)
    adaptertune.merge(model)
    dtype = "float16" if precision == "fp16" else "float32"
    g = Graph(options.opset, dtype, options.image)
    if precision == "int8":
        equalise(model, calibration_images(run))
        proto = to_int8(to_model(g, model, meta), path)
    else:
        proto = to_model(g, model, meta)
    small = save_checked(proto, path, f", {precision}")
    text = f"size     {size_of(path) / 1e6:.3g} MB, {size / 1e6:.3g} MB fp32"
    if precision == "int8" and meta["batch"] != 1:
        text += f"; {ONE_SCALE}, with --batch 1 they don't"
    print(text)
    found = verify(fp32, small, run, options, ("fp32", precision), rounded=True)
    state_check(path, found)


def calibration_images(run: train.Run) -> Tensor:
    """64 training images, or photos of --check, evenly spaced over the set, as the network sees
    them. (256 images change at most one label in 240 to 400; CHANGELOG, Tried.)"""
    images = run.dataset.train
    if not len(images):
        raise ValueError(
            "int8 is calibrated on training images, and none are there; give --check FOLDER"
        )
    index = torch.linspace(0, len(images) - 1, 64).long()
    batches = run.batches.eval(images[index], run.dataset.center)
    return torch.cat([x for x, _ in batches])


# ---------------------------------------------------------------------------- swappable adapters

# The metadata of a swappable backbone; the rest is stored in the adapter file.
SHARED = ("backbone", "fingerprint", "license", "image_size", "mean", "std", "interpolation")
SHARED += ("heads", "mlp_act", "version", *CHOICES)


def with_empty_adapters(model: vit.ViT, *, reads: str, act: str) -> vit.ViT:
    """A copy of an adapted ViT reset to its backbone, with placeholders for adapters of one kind:
    all-zero adapters of rank 1 in every block, and the identity as head, for features [B, D]."""
    empty = copy.deepcopy(model)
    adaptertune.add_adapters(empty, rank=1, reads=reads, act=act)
    adaptertune.add_head(empty, empty.config.width)
    for block in empty.blocks:  # else V is random, and the file differs each time
        nn.init.zeros_(block.adapter.down.weight)
    nn.init.eye_(empty.head.weight)
    return empty.requires_grad_(False)


def kind_of_adapters(meta: dict) -> dict[str, str]:
    """The `reads` and `act` of a run's adapters, which a swappable backbone has places for. Raises
    a ValueError for a run of another method."""
    if meta["method"] == "head":  # no adapters: AdapterTune's placeholders stay empty
        return {"reads": "block", "act": "gelu"}
    if meta["method"] in adaptertune.ADAPTER_METHODS:
        return {"reads": meta["reads"], "act": meta["act"]}
    swappable = ", ".join(("head", *adaptertune.ADAPTER_METHODS))
    raise ValueError(
        f"a {meta['method']} run can't be swapped (only {swappable}); export it without --swappable"
    )


def backbone_key(meta: dict, kind: dict[str, str]) -> str:
    """What an adapter must have in common with a backbone.onnx, as the name of an input: the
    fingerprint, the image size, the kind of adapter, and a digest of heads, activation and
    normalisation."""
    rest = [meta[name] for name in ("heads", "mlp_act", "mean", "std")]
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:8]
    parts = [meta["fingerprint"], f"{meta['image_size']}px", kind["reads"], kind["act"]]
    return ".".join(["for", *parts, digest])


def check_same_backbone(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise a ValueError if the metadata of a backbone.onnx that exists aren't those wanted."""
    for name in sorted({*found, *wanted}, key=lambda name: name == "swappable"):  # the key last
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} has {name} {found.get(name)}, this run {wanted.get(name)}: they can't "
                "share it; give another folder by -o"
            )


def changed_constants(g: Graph, bare: Graph) -> dict[str, np.ndarray]:
    """The adapter of a graph: the swapped constants that differ from its backbone's."""
    values = {}
    for name in swapped_inputs(g):
        if not np.array_equal(g.constants[name], bare.constants[name]):
            values[name] = g.constants[name]
    return values


def export_swappable(run: train.Run, options: argparse.Namespace) -> None:
    """Write, check and move into place NAME.onnx_adapter, and backbone.onnx unless it exists."""
    meta = run.meta
    kind = kind_of_adapters(meta)
    key = backbone_key(meta, kind)
    empty = with_empty_adapters(run.model, **kind)
    bare = Graph(options.opset)
    shared = {name: meta[name] for name in SHARED} | kind | {"swappable": key}
    proto = to_model(bare, empty, shared)

    adapted = Graph(options.opset)
    write_vit(adapted, run.model, meta)
    values = changed_constants(adapted, bare)
    task = meta | {"preprocessing": preprocessing(meta, run.model.config)}
    values[key] = np.frombuffer(json.dumps(task).encode(), np.uint8).copy()

    home = run.folder
    if home.name in ("", ".."):  # "." has no name
        home = home.resolve()
    folder = Path(options.o or home.parent)
    backbone = folder / "backbone.onnx"
    with staged(folder) as part:
        if not backbone.exists():
            backbone = part / backbone.name
            save_checked(proto, backbone, ", to swap adapters and head")
        opened = session(backbone)
        props = {prop.key: prop.value for prop in proto.metadata_props}
        check_same_backbone(backbone, opened.get_modelmeta().custom_metadata_map, props)
        adapter = part / f"{home.name}.onnx_adapter"
        save_adapter(values, adapter)
        names = ("torch's backbone", "without adapter")
        verify(InTorch(empty, meta), InOnnxruntime(opened), run, options, names)
        names = ("torch", "with adapter")
        with_adapter = InOnnxruntime(opened, adapter)
        verify(InTorch(run.model, meta), with_adapter, run, options, names)


def save_adapter(values: dict[str, np.ndarray], path: Path) -> None:
    """Write an .onnx_adapter file."""
    tensors = {}
    for name, value in values.items():
        tensors[name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
    file = onnxruntime.AdapterFormat()
    file.set_parameters(tensors)
    try:
        file.export_adapter(str(path))
    except RuntimeError as error:  # a full disk
        raise ValueError(f"can't write {path.name} ({vit.first_line(error)})") from error


# ------------------------------------------------------------------------------ the hub's folder


def export_hub(run: train.Run, options: argparse.Namespace) -> None:
    """Write and check a folder for transformers.js and optimum-onnx, and move it into place."""
    place = Path(options.hub)
    card = place / "README.md"
    if card.exists() and not (place / "preprocessor_config.json").exists():
        raise ValueError(f"{card} exists and wasn't written by --hub; give another folder")
    with staged(place, "--hub", together=True) as folder:
        inside = folder / "onnx"
        inside.mkdir()
        path = inside / "model.onnx"
        int8 = inside / "model_quantized.onnx"
        fp32 = export_fp32(run, options, path)
        config = hub_config(run.meta, run.model.config)
        try:
            export_rounded(run, options, int8, fp32, size_of(path))
        except ValueError as error:
            int8.unlink(missing_ok=True)
            (place / "onnx" / int8.name).unlink(missing_ok=True)  # from an earlier export
            config["transformers.js_config"] = {"dtype": "fp32"}  # else a browser asks for int8
            print(f"left out onnx/{int8.name}: {error}")
        files = {
            "config.json": json.dumps(config, indent=2) + "\n",
            "preprocessor_config.json": json.dumps(hub_processor(run.meta), indent=2) + "\n",
            "README.md": model_card(run, int8.exists()),
        }
        for name, text in files.items():
            data.write_file(folder / name, text)


def hub_config(meta: dict, config: vit.Config) -> dict:
    """config.json. To the libraries that load it, any graph from images to logits is a ViT."""
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "id2label": {str(i): name for i, name in enumerate(meta["classes"])},
        "label2id": {name: i for i, name in enumerate(meta["classes"])},
    }


def hub_processor(meta: dict) -> dict:
    """preprocessor_config.json. CLIP's processor resizes the shorter side and crops the centre;
    transformers' ViT processor can't."""
    S = meta["image_size"]
    crop = {"height": S, "width": S}
    square = train.square_of(meta)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": crop if square.squash else {"shortest_edge": square.side},
        # Lanczos, with which transformers.js antialiases; with bicubic (3) it doesn't. In Python, 2
        # of 480 labels differ between the two (assets/results, Exports).
        "resample": 1,
        "do_center_crop": not square.squash,
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": meta["mean"],
        "image_std": meta["std"],
    }


CARD = """
# {dataset}: {count} classes
{backbone} ({method}) on {dataset}. Accuracy on its test images: {accuracy}.

Classes: {classes}.

The backbone's licence: {license}. {int8}

Training resized photos bicubically (3). preprocessor_config.json asks for Lanczos (1), with which
transformers.js antialiases.

```js
import {{ pipeline }} from "@huggingface/transformers";
const classify = await pipeline("image-classification", "path/to/this-folder");
console.log(await classify("photo.jpg"));
```
```python
from optimum.onnxruntime import ORTModelForImageClassification
from transformers import AutoImageProcessor, pipeline

folder = "path/to/this-folder"
model = ORTModelForImageClassification.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
classify = pipeline("image-classification", model=model, image_processor=processor)
print(classify("photo.jpg"))
```
"""


def model_card(run: train.Run, int8: bool) -> str:
    """The hub's README.md."""
    meta = run.meta
    note = "`onnx/model_quantized.onnx` is int8: for CPUs and WASM; in WebGPU its output is wrong."
    accuracy = f"{meta['test_accuracy']:.2f} %"
    if "test_images" in meta:  # else the data set can't be read
        accuracy += f" of {meta['test_images']:,}"
    text = CARD.format(
        dataset=train.as_code(meta["dataset"]),
        count=len(meta["classes"]),
        backbone=train.as_code(meta["backbone"]),
        method=train.method_text(meta),
        accuracy=accuracy,
        classes=", ".join(map(train.as_code, meta["classes"])),
        license=train.as_code(meta["license"]),
        int8=note if int8 else "",
    )
    return train.front_matter(run, "transformers.js", ["onnx", "vit", "adaptertune"]) + text


# ------------------------------------------------------------------------------ the command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options. Wrong usage prints one line and exits with status 2."""
    parser = train.Parser(
        prog="export.py",
        description="Turn a run of train.py into one ONNX graph, checked against PyTorch.",
        epilog="Defaults are in parentheses.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="runs/NAME", help="the run's folder")
    parser.section("graph")
    add = parser.value
    place = "where to write: a folder, or FILE.onnx (the run's folder; "
    add("-o", "PATH", str, place + "with --swappable its parent)", "")
    opset = "ONNX opset: 17 runs nearly everywhere, in onnxruntime 1.12 or later; 20 needs 1.17, "
    opset += "23 needs 1.23 (17)"
    add("--opset", "N", int, opset, 17, choices=sorted(IR))
    add("--batch", "N", train.integer(0, 1024), "fixed number of images per call (0: any)", 0)
    image = "normalised floats, or floats from 0 to 1 (unit), both [batch, 3, S, S]; or pixels "
    image += "[batch, S, S, 3] (float; with --resize uint8)"
    parser.choice("--input", ("float", "unit", "uint8"), image, "")
    resized = "take pixels (uint8) of photos of any size; the graph resizes them as in evaluation"
    parser.switch("--resize", resized)
    outputs = ("logits", "probabilities", "embedding")
    returned = "the graph's output; embedding: the head's input, of CLIP before its projection "
    returned += "(logits)"
    parser.choice("--output", outputs, returned, "logits")
    precision = "precision of the weights; int8 is for CPUs (fp32)"
    parser.choice("--precision", ("fp32", "fp16", "int8"), precision, "fp32")
    tasks = "for several tasks: one backbone.onnx, and an .onnx_adapter for each task, which "
    parser.switch("--swappable", tasks + "onnxruntime swaps at run time")
    add("--hub", "FOLDER", str, "write a folder that transformers.js and optimum-onnx load", "")
    parser.section("check")
    photos = "photos to check with, in class folders or not (the run's test images); for int8, "
    photos += "every second one calibrates instead of the run's training images"
    add("--check", "FOLDER", str, photos, "")
    count = "images to check with, 0 for all (64; 1,000 for fp16 and int8)"
    add("--images", "N", train.integer(0), count, None)
    rule = f"keep fp16 or int8 even if accuracy falls by over {MAX_LOSS:g} point plus one standard "
    rule += f"error or, if labels aren't known, under {AGREE:g} %% of images keep their top-1"
    parser.switch("--force", rule)
    parser.section("new locations of files that were moved")
    add("--weights", "FILE", str, "the backbone's weights", "")
    add("--init-lora", "PATH", str, "the LoRA that was merged into them", "")
    add("--dataset", "FOLDER", str, "the photos, or other photos of the same classes", "")
    add("--data-dir", "DIR", str, "where downloaded data sets are", "")
    parser.switch("--offline", "never use the network")
    options = parser.parse_args(arguments)
    check_usage(options, parser)
    options.input = options.input or ("uint8" if options.resize else "float")
    options.image = INPUT
    if options.hub:
        options.image = HUB_INPUT
        options.precision = "int8"  # of the second graph, beside the fp32 one
    return options


def check_usage(options: argparse.Namespace, parser: train.Parser) -> None:
    """Refuse options that don't go together."""
    if options.resize and options.input not in ("", "uint8"):
        parser.error(f"--resize takes pixels; leave out --input {options.input}")
    if options.swappable and (options.resize or options.precision != "fp32"):
        parser.error("--swappable is fp32, without --resize")
    if options.hub:
        check_hub(options, parser)
    if options.check and not Path(options.check).is_dir():
        parser.error(f"--check {options.check}: no such folder")
    place = Path(options.o)
    if not options.o or place.is_dir() or options.o.endswith("/"):
        return
    if options.swappable and place.suffix.startswith(".onnx"):
        parser.error(f"-o {place}: --swappable writes two files; give a folder")
    if not options.swappable and place.suffix != ".onnx":
        parser.error(f"-o {place}: give a file that ends in .onnx, or a folder, a new one with /")


def check_hub(options: argparse.Namespace, parser: train.Parser) -> None:
    """Refuse options that --hub sets itself, or that the libraries it writes for couldn't use."""
    for name in ("o", "input", "resize", "output", "precision", "swappable"):
        if getattr(options, name) != parser.get_default(name):
            flag = "-o" if name == "o" else f"--{name}"
            parser.error(f"--hub settles what its folder holds; leave out {flag}")
    if options.batch > 1:
        parser.error(f"--hub takes one photo per call, not {options.batch}; leave out --batch")


def describe(run: train.Run) -> None:
    """Print which network is exported."""
    classes = len(run.meta["classes"])
    print(f"model    {run.meta['backbone']}, {train.method_text(run.meta)}, {classes} classes")
    if run.backbone.lora:
        print(f"lora     {run.backbone.lora}")


def export_as_asked(arguments: list[str] | None) -> int:
    """Open a run and export it as the options say."""
    options = parse(arguments)
    names = ("weights", "init_lora", "dataset", "data_dir", "offline")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    run_options = train.options_of(options.run, device="cpu", **given)
    run = train.open_run(run_options, need_data=bool(options.dataset or options.data_dir))
    run.model.eval().requires_grad_(False)
    if run.dataset is not None:  # the images behind test_accuracy, whatever --dataset is given
        split = train.read_split(run.folder / "split.json")
        run.meta["test_images"] = len(split["test"])
    choose_images(run, options)
    # From here on run.meta describes the graph, and is stored in it. In somebody else's run, keys
    # that we don't know might mean something to other programs.
    no_use = ("config", "learn_scale", "init", "dropout")
    known = adaptertune.META.keys() - set(no_use)
    run.meta = {name: value for name, value in run.meta.items() if name in known}
    for name in CHOICES:
        run.meta[name] = getattr(options, name)
    describe(run)
    if options.swappable:
        export_swappable(run, options)
    elif options.hub:
        export_hub(run, options)
    else:
        export(run, options)
    return 0


def main(arguments: Iterable | None = None) -> int:
    """The command line, see train.main. Returns the exit status: 0, 1 for an error, 130 or 143 when
    stopped."""
    arguments = train.as_texts(arguments)
    return train.run_program(
        lambda: export_as_asked(arguments), lambda: "stopped; nothing was written"
    )


if __name__ == "__main__":
    sys.exit(main())
