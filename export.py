"""Export: a run becomes one ONNX graph, proven equal to torch on real images (`cli.verify`) before the file exists.

    python export.py runs/NAME                          runs/NAME/model.onnx: backbone, adapters, head and class names
    python export.py runs/NAME --input uint8 --resize   takes photos of any size as they are
    python export.py runs/NAME --precision int8         a quarter of the size, half the time
    python export.py runs/NAME --swappable              runs/backbone.onnx, and runs/NAME.onnx_adapter for this task
    python export.py --run model.onnx photo.jpg         labels photos by onnxruntime alone, without torch

The graph reads like vit.py, top to bottom, and each value is named after the torch module that it comes out of. What is the
same for every image is worked out here and not on the device (exact but for rounding):

    attention's 1/√d goes into the query; the bias of k shifts all scores of a query alike, which softmax doesn't see;
    softmax's rows sum to 1, so the bias of v goes through proj into its bias; LayerScale goes into proj and fc2
    an adapter's s goes into U, su into fc2's bias, and v' = v - V·su where it reads what fc2 gave
    after the last attention the class token goes on alone, where the head reads nothing else
    1/(255 std) of pixels goes into the patch embedding, whose bias goes, with -mean/std in it, into the positions

Shapes: B images (batch), N tokens, D width, H heads, d = D/H, r rank, S pixels along a side.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime

if "--run" not in sys.argv:  # which does without torch and onnx, so that it runs on a device
    import onnx
    import torch
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import quantize_dynamic

    import adaptertune
    import cli
    import train
    import vit

# The IR version that came with each opset (onnx/docs/Versioning.md): a newer one is refused by older runtimes.
IR = {17: 8, 18: 8, 20: 9, 23: 11}
AGREE = 98.0  # least percentage of images on which fp16 or int8 must give fp32's top-1
# The matrices for --precision int8: the blocks', but the first fc2, whose input spans most (1 % of the time).
INT8 = re.compile(r"(?!blocks\.0\.mlp\.fc2)blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc)")
INPUT, CHOICES = "image", ("input", "resize", "output", "top_k", "batch", "opset", "precision")
# What a swappable backbone says of itself (the rest travels with the adapter); the ends of the names that become inputs, and
# which of their dimensions is the task's own, rank or classes. The biases u have gone into fc2's.
SHARED = ("backbone", "fingerprint", "license", "image_size", "mean", "std", "interpolation", "version", *CHOICES)
SWAPPED = {"adapter.down.weight": 1, "adapter.down.bias": 0, "adapter.up.weight": 0, "mlp.fc2.bias": None, "head.weight": 1,
           "head.bias": 0}

# ----------------------------------------------------------------------------------------------------------- the graph


class Graph:
    """Nodes and constants as they are collected. Each method adds what its name says and returns the name of the result."""

    def __init__(self, opset: int, dtype: str = "float32"):
        self.opset, self.dtype = opset, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def __call__(self, op: str, *inputs: str, name: str, outputs: tuple = (), **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs or [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: torch.Tensor | np.ndarray | list | float, dtype: str = "") -> str:
        """Floats become the graph's type, or `dtype`; integers int64."""
        value = np.asarray(value)
        self.constants[name] = value.astype(dtype or (np.int64 if value.dtype.kind == "i" else self.dtype), order="C")
        return name

    def linear(self, name: str, x: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str:
        """x [..., in] by weight [out, in] and bias [out]: MatMul and Add, which run faster than Gemm."""
        y = self("MatMul", x, self.constant(f"{name}.weight", weight.T), name=name if bias is None else f"{name}.matmul")
        return y if bias is None else self("Add", y, self.constant(f"{name}.bias", bias), name=name)

    def layer_norm(self, name: str, x: str, norm: torch.nn.LayerNorm) -> str:
        weight, bias = self.constant(f"{name}.weight", norm.weight), self.constant(f"{name}.bias", norm.bias)
        return self("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=norm.eps)

    def activation(self, name: str, x: str, kind: str) -> str:
        """GELU below opset 20 is spelt out, in the one form that runtimes recognise and fuse."""
        if kind == "ReLU":
            return self("Relu", x, name=name)
        if kind == "QuickGELU":
            y = self("Mul", x, self.constant("1.702", 1.702), name=f"{name}.mul")
            return self("Mul", x, self("Sigmoid", y, name=f"{name}.sigmoid"), name=name)
        if self.opset >= 20:
            return self("Gelu", x, name=name)
        y = self("Erf", self("Div", x, self.constant("sqrt2", 2 ** 0.5), name=f"{name}.div"), name=f"{name}.erf")
        y = self("Mul", x, self("Add", y, self.constant("one", 1.0), name=f"{name}.add"), name=f"{name}.mul")
        return self("Mul", y, self.constant("half", 0.5), name=name)


def write_pixels(g: Graph, config: vit.Config, meta: dict) -> str:
    """The graph's input, uint8 [B, H, W, 3], as floats [B, 3, S, S] from 0 to 255. With --resize as data.decode does it: the
    centre square, to S / center pixels, of which the middle S."""
    x = g("Transpose", g("Cast", INPUT, name="image.float", to=1), name="image.channels_first", perm=[0, 3, 1, 2])
    if not meta["resize"]:
        return x
    S, side = config.image_size, round(config.image_size / meta["center"])
    edge = g("ReduceMin", g("Shape", x, name="image.shape", start=2), name="image.edge")  # of height and width
    x = g("CenterCropPad", x, g("Concat", edge, edge, name="image.edges", axis=0), name="image.square", axes=[2, 3])
    x = g("Resize", x, "", "", g.constant("image.side", [side, side]), name="image.resize", axes=[2, 3], antialias=1,
          mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1)
    x = g("CenterCropPad", x, g.constant("image.size", [S, S]), name="image.middle", axes=[2, 3])
    low, high = g.constant("image.low", 0.0, "float32"), g.constant("image.high", 255.0, "float32")
    return g("Clip", x, low, high, name="image.pixels")  # a cubic overshoots at edges


def write_embedding(g: Graph, model: vit.ViT, meta: dict) -> str:
    """The input to the tokens [B, N, D] that enter the first block. Zeros are put before the patches, and one addition
    brings class token, registers, positions and biases: any batch, and no shape worked out at run time."""
    config, weight, bias = model.config, model.patch_embed.proj.weight, model.patch_embed.proj.bias
    image, bias = INPUT, weight.new_zeros(config.width) if bias is None else bias
    if meta["input"] == "uint8":
        image = write_pixels(g, config, meta)
        mean, std = (weight.new_tensor(meta[key])[None, :, None, None] for key in ("mean", "std"))  # [1, 3, 1, 1]
        weight, bias = weight / (255 * std), bias - (weight * (mean / std)).sum(dim=(1, 2, 3))
    patch, first, N = [config.patch] * 2, 1 + config.registers, config.grid ** 2
    x = g("Conv", image, g.constant("patch_embed.proj.weight", weight, "float32"), name="patch_embed.proj",
          kernel_shape=patch, strides=patch)  # [B, D, g, g]
    if g.dtype != "float32":
        x = g("Cast", x, name="patch_embed.cast", to=10)
    x = g("Reshape", x, g.constant("patch_embed.shape", [0, config.width, N]), name="patch_embed.flatten")
    x = g("Transpose", x, name="patch_embed", perm=[0, 2, 1])  # [B, g·g, D]
    x = g("Pad", x, g.constant("tokens.pads", [0, first, 0, 0, 0, 0]), name="tokens.pad")
    tokens = [model.cls_token + model.pos_embed[:, :1], model.pos_embed[:, 1:] + bias]
    if model.reg_token is not None:
        tokens.insert(1, model.reg_token)
    x = g("Add", x, g.constant("tokens.positions", np.concatenate(tokens, axis=1)), name="tokens")
    return g.layer_norm("norm_pre", x, model.norm_pre) if config.norm_pre else x


def write_attention(g: Graph, name: str, block: vit.Block, query: str, x: str) -> str:
    """Multi-head attention of `query` (x, or its first token) over x [B, N, D]."""
    qkv, proj, H, D = block.attn.qkv, block.attn.proj, block.attn.heads, block.attn.proj.out_features
    scale, gamma = (D // H) ** -0.5, getattr(block.ls1, "gamma", proj.bias.new_ones(D))
    q_weight, k_weight, v_weight = qkv.weight.split(D)
    q_bias, _, v_bias = (None,) * 3 if qkv.bias is None else qkv.bias.split(D)
    bias = proj.bias if v_bias is None else proj.bias + proj.weight @ v_bias
    q = g.linear(f"{name}.qkv.q", query, q_weight * scale, None if q_bias is None else q_bias * scale)
    k, v = g.linear(f"{name}.qkv.k", x, k_weight), g.linear(f"{name}.qkv.v", x, v_weight)
    if g.opset >= 23:
        y = g("Attention", q, k, v, name=f"{name}.heads", q_num_heads=H, kv_num_heads=H, scale=1.0)
    else:
        split, join = g.constant("heads", [0, -1, H, D // H]), g.constant("tokens.shape", [0, -1, D])  # 0: B, whatever it is
        q, k, v = (g("Transpose", g("Reshape", part, split, name=f"{part}.split"), name=f"{part}.heads", perm=perm)
                   for part, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3])))
        y = g("Softmax", g("MatMul", q, k, name=f"{name}.scores"), name=f"{name}.softmax", axis=-1)  # [B, H, N, N]
        y = g("Transpose", g("MatMul", y, v, name=f"{name}.mix"), name=f"{name}.mix.transpose", perm=[0, 2, 1, 3])
        y = g("Reshape", y, join, name=f"{name}.heads")  # [B, N, H, d] -> [B, N, D]
    return g.linear(f"{name}.proj", y, proj.weight * gamma[:, None], bias * gamma)


def write_block(g: Graph, name: str, block: vit.Block, x: str, last: bool) -> str:
    """One block with its adapter; the `last` gives the class token alone, [B, 1, D]."""
    fc1, fc2, adapter = block.mlp.fc1, block.mlp.fc2, block.adapter
    gamma = getattr(block.ls2, "gamma", fc2.bias.new_ones(fc2.out_features))
    z = query = g.layer_norm(f"{name}.norm1", x, block.norm1)
    if last:
        where = [g.constant(each, [int(each[-1])]) for each in ("axis0", "axis1", "axis1")]  # from 0 to 1 along axis 1
        query, x = g("Slice", z, *where, name=f"{name}.norm1.class"), g("Slice", x, *where, name=f"{name}.class")
    x = g("Add", x, write_attention(g, f"{name}.attn", block, query, z), name=f"{name}.attn.add")
    z = g.layer_norm(f"{name}.norm2", x, block.norm2)
    su = 0.0 if adapter is None else adapter.scale * adapter.up.bias
    y = g.activation(f"{name}.mlp.act", g.linear(f"{name}.mlp.fc1", z, fc1.weight, fc1.bias), type(block.mlp.act).__name__)
    y = g.linear(f"{name}.mlp.fc2", y, fc2.weight * gamma[:, None], fc2.bias * gamma + su)
    h = g("Add", x, y, name=f"{name}.mlp.add" if adapter else name)
    if adapter is None:
        return h
    z, V, v = {"block": h, "raw": x, "ln": z, "mlp": y}[adapter.reads], adapter.down.weight, adapter.down.bias
    c = g.linear(f"{name}.adapter.down", z, V, v - V @ su if adapter.reads in ("block", "mlp") else v)
    c = g.activation(f"{name}.adapter.act", c, type(adapter.act).__name__)
    return g("Add", h, g.linear(f"{name}.adapter.up", c, adapter.scale * adapter.up.weight), name=name)


def write_prompts(g: Graph, name: str, prompts: torch.Tensor, x: str, N: int, first: bool) -> str:
    """A block's prompts [P, D] behind the N own tokens, by zeros and an addition, in the place of earlier ones."""
    P, D = prompts.shape
    if not first:
        axis = g.constant("axis1", [1])
        x = g("Slice", x, g.constant("axis0", [0]), g.constant("tokens.own", [N]), axis, name=f"{name}.own")
    x = g("Pad", x, g.constant(f"tokens.prompts.{P}", [0, 0, 0, 0, P, 0]), name=f"{name}.pad")
    return g("Add", x, g.constant(f"{name}.weight", np.concatenate([np.zeros((N, D)), prompts])), name=name)


def write_clip_head(g: Graph, head: adaptertune.ClipHead, x: str) -> str:
    """Cosines to the classes' embeddings, which a text adapter has already changed."""
    f = g.linear("head.projection", x, head.projection)
    if head.image is not None:
        # The ratio, which isn't negative, goes through the second ReLU.
        y = g("Relu", g.linear("head.image.down", f, head.image[0].weight), name="head.image.relu")
        y = g("Relu", g.linear("head.image.up", y, head.image_ratio * head.image[2].weight), name="head.image")
        f = g("Add", y, g("Mul", f, g.constant("head.rest", 1 - head.image_ratio), name="head.kept"), name="head.mixed")
    square = g("ReduceSum", g("Mul", f, f, name="head.square"), g.constant("axis1", [1]), name="head.sum")
    f = g("Div", f, g("Sqrt", square, name="head.length"), name="head.unit")
    return g.linear("head", f, head.weights())


def write_vit(g: Graph, model: vit.ViT, meta: dict) -> list[str]:
    """The whole network; returns the names of its outputs."""
    config, blocks = model.config, list(model.blocks)
    x = write_embedding(g, model, meta)
    N, previous = 1 + config.registers + config.grid ** 2, None
    for i, block in enumerate(blocks):
        if block.prompts is not None:
            x = write_prompts(g, f"blocks.{i}.prompts", block.prompts, x, N, first=previous is None)
            previous = block.prompts
        x = write_block(g, f"blocks.{i}", block, x, last=config.pool == "token" and block is blocks[-1])
    if config.pool == "mean":  # of the patch tokens: a row of 1/N, zero for the tokens before them
        counts = [1 + config.registers, config.grid ** 2, 0 if previous is None else len(previous)]
        row = np.repeat([[0.0, 1 / config.grid ** 2, 0.0]], counts, axis=1)
        x = g("MatMul", g.constant("pool.weights", row), x, name="pool")
    x = g("Squeeze", g.layer_norm("norm", x, model.norm), g.constant("axis1", [1]), name="features")  # [B, 1, D] -> [B, D]
    if meta["output"] != "embedding":
        x = write_clip_head(g, model.head, x) if hasattr(model.head, "classes") else g.linear(
            "head", x, model.head.weight, model.head.bias)
    if g.dtype != "float32":
        x = g("Cast", x, name="cast", to=1)
    if meta["output"] == "probabilities":
        x = g("Softmax", x, name="softmax", axis=-1)
    if not meta["top_k"]:
        g.nodes[-1].output[0] = meta["output"]
        return [meta["output"]]
    g("TopK", x, g.constant("k", [meta["top_k"]]), name="top_k", outputs=("scores", "labels"), axis=-1)
    return ["scores", "labels"]


def swapped(g: Graph) -> dict[str, list[int | str]]:
    """The constants that --swappable makes inputs, and their dimensions. Ranks may differ from block to block."""
    return {name: [n if i != free else "classes" if end.startswith("head") else f"{name.split('.adapter')[0]}.rank"
                   for i, n in enumerate(value.shape)]
            for name, value in g.constants.items() for end, free in SWAPPED.items() if name.endswith(end)}


def to_model(g: Graph, model: vit.ViT, meta: dict) -> onnx.ModelProto:
    """The network as an ONNX model with `meta` in its metadata_props.

    If `meta` has a "swappable", a name that only adapters for this backbone know, adapters and head become inputs with
    defaults, for onnxruntime's adapters to set; one more input of that name, unused, makes the runtime refuse all others.
    """
    names, S, B = write_vit(g, model, meta), model.config.image_size, meta["batch"] or "batch"
    side, swap = ("height", "width") if meta["resize"] else (S, S), meta.get("swappable", "")
    image = (2, [B, *side, 3]) if meta["input"] == "uint8" else (1, [B, 3, S, S])
    inputs = {INPUT: image} | ({name: (1, dims) for name, dims in swapped(g).items()} | {swap: (2, ["bytes"])} if swap else {})
    if swap:
        g.constants[swap] = np.zeros(0, np.uint8)
    classes = "classes" if swap else model.head.out_features
    width = meta["top_k"] or (model.config.width if meta["output"] == "embedding" else classes)
    inputs = [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()]
    outputs = [helper.make_tensor_value_info(name, 7 if name == "labels" else 1, [B, width]) for name in names]
    constants = [numpy_helper.from_array(value, name) for name, value in g.constants.items()]
    proto = helper.make_model(helper.make_graph(g.nodes, meta["backbone"], inputs, outputs, constants), ir_version=IR[g.opset],
                              opset_imports=[helper.make_opsetid("", g.opset)], producer_name="adaptertune")
    helper.set_model_props(proto, {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()})
    return proto


# --------------------------------------------------------------------------------------------------- the graph at work


def session(model: str | Path) -> onnxruntime.InferenceSession:
    """onnxruntime's session on the CPU. Raises ValueError for a file that it can't load."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every input that has a default
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait leave the cores to others
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds derive from nothing else
        raise ValueError(f"onnxruntime can't load {model}: {str(error).splitlines()[0]}") from error


def in_onnxruntime(graph: onnxruntime.InferenceSession, adapter: str | Path = "") -> Callable:
    """A function from what the graph takes to its outputs, with an .onnx_adapter file active if one is given."""
    options, lora = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if adapter:
        lora.Load(str(adapter))
        options.add_active_adapter(lora)
    return lambda image, _=None, keep=lora: graph.run(None, {INPUT: image}, options)  # the options don't keep the adapter alive


def in_torch(model: vit.ViT, meta: dict) -> Callable:
    """The same outputs by torch, from normalised images [B, 3, S, S]."""
    @torch.inference_mode()
    def outputs(_, images: torch.Tensor) -> list[np.ndarray]:
        x = model.features(images) if meta["output"] == "embedding" else model(images)
        x = x.softmax(dim=-1) if meta["output"] == "probabilities" else x
        return [part.numpy() for part in (x.topk(meta["top_k"]) if meta["top_k"] else [x])]
    return outputs


# ------------------------------------------------------------------------------------------------------ from run to file


def checked(proto: onnx.ModelProto, part: Path, more: str = "") -> onnxruntime.InferenceSession:
    """Save the model, put it to ONNX's own checker, load and describe it."""
    onnx.save(proto, part)
    onnx.checker.check_model(part, full_check=True)
    graph = session(part)
    image, *outputs = (f"{each.name} {each.type[7:-1].replace('float', 'float32')} [{', '.join(map(str, each.shape))}]"
                       for each in (*graph.get_inputs(), *graph.get_outputs()))
    print(f"graph    opset {proto.opset_import[0].version}, {len(proto.graph.node)} nodes, {image} -> ", ", ".join(outputs),
          f"{more}\ncheck    onnx.checker ok", sep="", flush=True)
    return graph


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write to: what stands there is moved into `folder` if all goes well, and gone if not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        yield Path(part)
        for file in sorted(Path(part).iterdir()):
            path = file.replace(folder / file.name)
            print(f"saved    {path} ({path.stat().st_size / 1e6:.3g} MB)")


def to_int8(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The graph with the matrices of INT8 in 8 bits, weights by channel and inputs as they come, by onnxruntime's quantiser."""
    names = [node.name for node in proto.graph.node if node.op_type == "MatMul" and INT8.match(node.name)]
    logging.disable()  # it warns that the graph wasn't prepared, which this one needn't be
    quantize_dynamic(proto, path, op_types_to_quantize=["MatMul"], nodes_to_quantize=names, per_channel=True)
    logging.disable(logging.NOTSET)
    return onnx.load(path)


def export(run: train.Run, options: argparse.Namespace) -> None:
    """Write, check, and only then put in place runs/NAME/model.onnx."""
    path = Path(options.o or run.folder)
    path = path / "model.onnx" if path.is_dir() else path
    model, precision, in_pytorch = copy.deepcopy(run.model), options.precision, in_torch(run.model, run.meta)
    merged = adaptertune.merge(model)
    with staged(path.parent) as folder:
        part, more = folder / path.name, f", {merged} adapters merged into the MLPs" * bool(merged)
        exact = in_onnxruntime(checked(to_model(Graph(options.opset), model, run.meta), part, more))
        cli.verify(in_pytorch, exact, run, options.images, ("torch", "onnxruntime"))
        if precision == "fp32":
            return
        size = part.stat().st_size
        if precision == "int8":  # 64 training images show what enters the matrices
            few = run.data.train[torch.linspace(0, len(run.data.train) - 1, 64).long()]
            adaptertune.equalise(model, torch.cat([x for x, _ in run.batches.eval(few, run.data.center)]))
            proto = to_int8(to_model(Graph(options.opset), model, run.meta), part)
        else:
            proto = to_model(Graph(options.opset, "float16"), model, run.meta)
        small = in_onnxruntime(checked(proto, part, f", {precision}"))
        print(f"size     {part.stat().st_size / 1e6:.3g} MB, {size / 1e6:.3g} MB fp32")
        cli.verify(exact, small, run, options.images, ("fp32", precision), 0 if options.force else AGREE)


def export_swappable(run: train.Run, options: argparse.Namespace) -> None:
    """Write, check and put in place backbone.onnx, unless it is there, and NAME.onnx_adapter beside it."""
    meta, folder, count = run.meta, Path(options.o or run.folder.parent), options.images
    if meta["method"] not in ("adaptertune", "adaptformer", "head"):
        raise ValueError(f"a {meta['method']} run has more than adapters and a linear head; export it without --swappable")
    kind = {name: meta.get(name, adaptertune.METHODS["adaptertune"][name]) for name in ("reads", "act")}
    key = ".".join(["for", meta["fingerprint"], f"{meta['image_size']}px", *kind.values()])
    g, own, plain = Graph(options.opset), Graph(options.opset), adaptertune.neutral(run.model, **kind)
    proto = to_model(g, plain, {name: meta[name] for name in SHARED} | {"swappable": key})
    write_vit(own, run.model, meta)
    values = {name: own.constants[name] for name in swapped(own) if not np.array_equal(own.constants[name], g.constants[name])}
    values[key] = np.frombuffer(json.dumps(meta).encode(), np.uint8).copy()
    backbone = folder / "backbone.onnx"
    with staged(folder) as part:
        graph = session(backbone) if backbone.exists() else checked(proto, part / backbone.name, ", to swap adapters and head")
        if graph.get_modelmeta().custom_metadata_map != {prop.key: prop.value for prop in proto.metadata_props}:
            raise ValueError(f"{backbone} is of another backbone or has other options; give another folder by -o")
        file, adapter = onnxruntime.AdapterFormat(), part / f"{run.folder.name}.onnx_adapter"
        file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
        file.export_adapter(str(adapter))
        cli.verify(in_torch(plain, meta), in_onnxruntime(graph), run, count, ("torch's backbone", "without adapter"))
        cli.verify(in_torch(run.model, meta), in_onnxruntime(graph, adapter), run, count, ("torch", "with adapter"))


# ----------------------------------------------------------------------------------------------- on the device, no torch


def read_photo(path: str, meta: dict) -> np.ndarray:
    """A photo as the graph takes it, [1, …], by data.decode's steps, so that nothing differs from training."""
    from PIL import Image, ImageOps
    S, side = json.loads(meta["image_size"]), round(json.loads(meta["image_size"]) / json.loads(meta["center"]))
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"can't read {path} as an image ({error})") from error
    if meta["resize"] == "false":  # the centre square to `side` pixels, and the middle of that
        edge, cut = min(image.size), (side - S) // 2
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.resize((side, side), Image.Resampling.BICUBIC,
                             box=(left, top, left + edge, top + edge)).crop((cut, cut, cut + S, cut + S))
    pixels = np.asarray(image)[None]  # uint8 [1, H, W, 3]
    if meta["input"] == "uint8":
        return pixels
    mean, std = (np.array(json.loads(meta[key]), np.float32) for key in ("mean", "std"))
    return ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)


def label(model: str, photos: list[str], adapter: str) -> None:
    """Print the three likeliest labels of each photo, or the graph's own top k."""
    graph = session(model)
    meta = graph.get_modelmeta().custom_metadata_map
    if adapter:
        try:
            tensors = onnxruntime.AdapterFormat.read_adapter(adapter).get_parameters()
        except Exception as error:
            raise ValueError(f"{adapter} is no adapter that onnxruntime can read") from error
        key = next((name for name in tensors if name.startswith("for.")), "of another program")
        if key != meta.get("swappable"):
            raise ValueError(f"{adapter} is {key}; {model} takes adapters {meta.get('swappable', 'of no kind')}")
        task = json.loads(tensors[key].numpy().tobytes())
        meta |= {name: json.dumps(task[name]) for name in ("classes", "center")}
    if "classes" not in meta or meta["output"] == "embedding":
        raise ValueError(f"{model} gives no labels" + "; give the task's --adapter" * ("swappable" in meta))
    classes, run, batch = json.loads(meta["classes"]), in_onnxruntime(graph, adapter), json.loads(meta["batch"]) or 1
    for photo in photos:
        scores, *labels = (each[0] for each in run(np.repeat(read_photo(photo, meta), batch, axis=0)))
        if meta["output"] == "logits" and not labels:
            scores = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best = zip(labels[0], scores, strict=True) if labels else [(i, scores[i]) for i in (-scores).argsort()[:3]]
        print(photo, *(f"{classes[i]} {score:.3f}" for i, score in best), sep="  ")


# ---------------------------------------------------------------------------------------------------------------- main


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those that are train.py's; wrong usage prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(
        description="Turn a run of train.py into one verified ONNX graph.", allow_abbrev=False,
        usage="export.py runs/NAME [options]  or  export.py --run model.onnx photo.jpg …",
        epilog="Options of train.py that say where things are now (--weights, --dataset, --data-dir, --offline) may follow.")
    parser.error = lambda message: parser.exit(2, f"error: {message}; python export.py --help lists all options\n")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="the run's folder; with --run, photos")
    add("-o", metavar="PATH", help="where to: a file or, with --swappable, a folder (default: in or beside the run's folder)")
    add("--opset", type=int, choices=sorted(IR), help="17 runs nearly everywhere (default; 18 with --resize); 23 is newest")
    add("--batch", type=int, default=0, metavar="N", help="images in every call (default 0: as many as come)")
    add("--input", choices=("float", "uint8"), help="normalised [batch, 3, S, S] (float, default) or pixels [batch, S, S, 3]")
    add("--resize", action="store_true", help="take uint8 pixels of any size, and bring them to S as in training")
    add("--output", choices=("logits", "probabilities", "embedding"), default="logits", help="default logits")
    add("--top-k", type=int, default=0, metavar="K", help="give the K best alone, as scores and labels (default 0: all)")
    add("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="of the weights (default fp32); int8 for CPUs")
    add("--swappable", action="store_true", help="one backbone.onnx for all tasks, and one .onnx_adapter for each")
    add("--images", type=int, metavar="N", help="test images to check with, 0 for all (default 64; 1,000 for fp16 and int8)")
    add("--force", action="store_true", help=f"keep fp16 or int8 even if less than {AGREE:g} %% of the labels stay the same")
    add("--run", metavar="MODEL", help="label photos with this graph by onnxruntime alone")
    add("--adapter", default="", metavar="FILE", help="with --run and a swappable graph: the task's .onnx_adapter")
    options, more = parser.parse_known_args(arguments)
    options.input = options.input or ("uint8" if options.resize else "float")
    options.opset = options.opset or (18 if options.resize else 17)
    for wrong, message in {
            "--resize needs --opset 18 or later": options.resize and options.opset < 18,
            "--resize takes pixels; leave out --input float": options.resize and options.input == "float",
            "--top-k picks labels, and an embedding has none": options.top_k and options.output == "embedding",
            "--swappable is fp32, without --resize": options.swappable and (options.resize or options.precision != "fp32"),
            "--batch, --top-k and --images count from 0": min(options.batch, options.top_k, options.images or 0) < 0,
            f"one run at a time, not {', '.join(options.paths)}": not options.run and len(options.paths) > 1}.items():
        if message:
            parser.error(wrong)
    return options, more


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 for an error, 130 when stopped."""
    options, more = parse(arguments)
    try:
        if options.run:
            label(options.run, options.paths, options.adapter)
            return 0
        run = train.open_run(cli.parse(["--eval", options.paths[0], "--device", "cpu", *more])[0])
        run.model.eval().requires_grad_(False)
        if options.top_k > len(run.meta["classes"]):
            raise ValueError(f"--top-k {options.top_k}: there are {len(run.meta['classes'])} classes")
        run.meta = {name: value for name, value in run.meta.items() if name not in ("config", "learn_scale", "init", "dropout")}
        run.meta |= {name: getattr(options, name) for name in CHOICES}
        rank = f" rank {run.meta.get('rank')}" * ("rank" in run.meta)
        print(f"model    {run.meta['backbone']}, {run.meta['method']}{rank}, {len(run.meta['classes'])} classes")
        (export_swappable if options.swappable else export)(run, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}" + "; pip install pillow" * ("PIL" in str(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
