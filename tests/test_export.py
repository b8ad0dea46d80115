"""The ONNX graph against torch, the metadata in its file, and export.py as a user runs it."""

import ast
import json
import re

import bench_export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import runner, write_backbone

import adaptertune
import data
import export
import train
import vit

NETWORKS = {
    "plain": {},
    "registers, LayerScale": {"registers": 3, "layer_scale": True},
    "CLIP": {"norm_pre": True, "quick_gelu": True, "patch_bias": False, "eps": 1e-5},
    "mean pool": {"pool": "mean"},
    "mean pool, registers": {"pool": "mean", "registers": 2},
    "no biases": {"qkv_bias": False, "patch_bias": False},
    "rotary": {"rope": True, "registers": 4, "layer_scale": True},
    "rotary, mean pool": {"rope": True, "qkv_bias": False, "pool": "mean"},
    "one block": {"depth": 1},
}
MERGEABLE = {"rank": 8, "reads": "ln", "act": "mlp", "scale": 0.5}
ADAPTERS = {
    "none": None,
    "rank 1": {"rank": 1},
    "rank 64": {"rank": 64},
    "every second": {"rank": 4, "placement": [1]},
    "learnt scale": {"rank": 4, "learn_scale": True},
    "adaptformer": {"rank": 8, "reads": "raw", "act": "relu", "scale": 0.1},
    "paper's adaptformer": {"rank": 8, "reads": "ln", "act": "relu", "scale": 0.1},
    "sequential": {"rank": 8, "reads": "mlp", "act": "gelu", "scale": 0.5},
    "mergeable": MERGEABLE,
}
META = {
    "method": "adaptertune",
    "backbone": "tiny",
    "center": 1.0,
    "interpolation": "bicubic",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "input": "float",
    "resize": False,
    "output": "logits",
    "batch": 0,
    "precision": "fp32",
    "dataset": "d",
    "classes": [f"class {i}" for i in range(7)],
}


def network(adapters=None, **changes):
    """A small adapted ViT of 3 blocks for images of 16 px, with no tensor near zero."""
    shape = {"width": 64, "depth": 3, "heads": 4, "patch": 4, "image_size": 16, "hidden": 96}
    torch.manual_seed(0)
    model = vit.ViT(vit.Config(**shape | changes))
    if adapters is not None:
        adaptertune.add_adapters(model, **adapters)
    adaptertune.add_head(model, 7)
    for name, parameter in model.named_parameters():
        if re.search(r"norm\w*\.weight|gamma|scale", name):
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif parameter.ndim < 2:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def to_session(model, opset=17, **meta):
    """The graph's session in onnxruntime and the ONNX model, which is also checked."""
    proto = export.to_model(export.Graph(opset), model, META | meta)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == {17: 8, 18: 8, 20: 9, 23: 11}[opset]
    assert proto.opset_import[0].version == opset
    assert not proto.graph.value_info
    data = proto.SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]), proto


def test_what_has_no_branch_is_refused():
    """A module of one's own that the graph's writers don't know is named."""
    model = network()
    model.blocks[1].adapter = torch.nn.Identity()
    with pytest.raises(ValueError, match="write_block in export.py has no branch for Identity"):
        to_session(model)
    model = network(adapters={"rank": 4})
    model.blocks[1].adapter.__class__ = type("Mine", (adaptertune.Adapter,), {})
    with pytest.raises(ValueError, match="write_block in export.py has no branch for Mine"):
        to_session(model)
    model = network()
    model.head = torch.nn.Sequential(model.head)
    with pytest.raises(ValueError, match="write_head in export.py has no branch for Sequential"):
        to_session(model)


def random_pixels(batch, height=16, width=16):
    """Pixels uint8 [B, 3, H, W]."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator).byte()


def normalised(pixels):
    """The images that torch gets for pixels uint8 [B, 3, S, S]."""
    mean = torch.tensor(META["mean"]).view(3, 1, 1)
    std = torch.tensor(META["std"]).view(3, 1, 1)
    return (pixels / 255 - mean) / std


def channels_last(pixels):
    """The array [B, H, W, 3] that a uint8 graph gets for pixels uint8 [B, 3, H, W]."""
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def difference(session, model, x):
    """The largest |difference| between the graph's and torch's logits for images x [B, 3, S, S]."""
    got = session.run(None, {"image": x.numpy()})[0]
    return np.abs(got - model(x).numpy()).max()


# ------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("kind", ["float", "unit", "uint8"])
@pytest.mark.parametrize("opset", [17, 20, 23])
@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_parity(changes, opset, kind):
    """Every kind of ViT, in every opset and batch size, gives torch's logits to 1e-4."""
    model = network({"rank": 8, "scale": 0.7}, **changes)
    session, _ = to_session(model, opset, input=kind)
    for batch in (1, 3, 32):
        pixels = random_pixels(batch)
        x = normalised(pixels)
        image = {
            "float": x.numpy(),
            "unit": (pixels / 255).numpy(),
            "uint8": channels_last(pixels),
        }[kind]
        got = session.run(None, {"image": image})[0]
        assert np.abs(got - model(x).numpy()).max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_scale": True, "pool": "mean", "quick_gelu": True}, NETWORKS["rotary"]],
    ids=["plain", "other", "rotary"],
)
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_parity_of_every_adapter(adapters, changes):
    """Adapters with every input, activation and scale give torch's logits."""
    model = network(adapters, **changes)
    session, _ = to_session(model)
    assert difference(session, model, normalised(random_pixels(3))) < 1e-4


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_parity_of_prompts(changes, deep):
    """Prompts give torch's logits in every kind of ViT, new in each block or in the first only."""
    model = network(None, **changes)
    adaptertune.add_prompts(model, prompts=5, deep=deep)
    model.requires_grad_(False)
    session, _ = to_session(model, method="vpt")
    assert difference(session, model, normalised(random_pixels(3))) < 1e-4


def test_a_wrong_graph_is_noticed():
    """The comparison above can fail: without its adapters the network gives other numbers."""
    session, _ = to_session(network(None))
    assert difference(session, network({"rank": 8}), normalised(random_pixels(3))) > 0.1


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("output", ["logits", "probabilities", "embedding"])
def test_outputs(output, batch):
    """Each output has its name, its shape and torch's numbers, for any or a fixed batch size."""
    model = network({"rank": 8})
    x = normalised(random_pixels(2))
    wanted = {
        "logits": model(x),
        "probabilities": model(x).softmax(dim=1),
        "embedding": model.features(x),
    }[output]
    session, _ = to_session(model, batch=batch, output=output)
    assert session.get_inputs()[0].shape == [batch or "batch", 3, 16, 16]
    (described,) = session.get_outputs()
    assert described.name == output
    assert described.shape == [batch or "batch", wanted.shape[1]]
    (got,) = session.run(None, {"image": x.numpy()})
    assert got.shape == wanted.shape
    assert np.abs(got - wanted.numpy()).max() < 1e-4


@pytest.mark.parametrize(
    "size", [(16, 16), (8, 8), (40, 40), (31, 50), (50, 31), (90, 64)], ids=lambda size: f"{size}"
)
@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize(("center", "squash"), [(1.0, False), (0.875, False), (1.0, True)])
def test_resize(opset, center, squash, size):
    """Photos of any size are treated as in data.py: the centre square, or all of it, is resized,
    then cropped."""
    model = network({"rank": 8})
    meta = {"input": "uint8", "resize": True, "center": center, "squash": squash}
    session, _ = to_session(model, opset, **meta)
    pixels = random_pixels(3, *size)
    edge = min(size)
    side = round(16 / center)
    top = (size[0] - edge) // 2
    left = (size[1] - edge) // 2
    box = [0, 0, *size] if squash else [top, left, edge, edge]
    boxes = torch.tensor([box]).expand(3, 4)
    resized = data.crop_resize(pixels, boxes, side)  # floats from 0 to 1
    start = (side - 16) // 2
    middle = resized[:, :, start : start + 16, start : start + 16]
    got = session.run(None, {"image": channels_last(pixels)})[0]
    assert np.abs(got - model(normalised(255 * middle)).numpy()).max() < 1e-3


def test_what_a_viewer_shows():
    """Nodes are named after torch's modules, only the class token is left after the last attention,
    and no shape is computed at run time."""
    _, proto = to_session(network({"rank": 8}))
    names = [node.name for node in proto.graph.node]
    assert len(names) == len(set(names))
    expected = [
        "patch_embed.proj",
        "blocks.1.norm1",
        "blocks.1.attn.qkv.q",
        "blocks.1.attn.proj",
        "blocks.1.mlp.fc1",
        "blocks.1.adapter.down",
        "blocks.1.adapter.up",
        "blocks.1",
        "norm",
        "head",
    ]
    assert [name for name in names if name in expected] == expected
    types = {node.op_type for node in proto.graph.node}
    assert not types & {"Shape", "Expand", "Gather", "Gemm", "ConstantOfShape"}

    tokens = {}  # the size of the second dimension
    for value in onnx.shape_inference.infer_shapes(proto).graph.value_info:
        dimensions = value.type.tensor_type.shape.dim
        if len(dimensions) == 3:
            tokens[value.name] = dimensions[1].dim_value
    assert tokens["blocks.1.mlp.fc1"] == 17
    assert tokens["blocks.2.attn.qkv.k"] == 17
    assert tokens["blocks.2.attn.qkv.q"] == 1
    assert tokens["blocks.2.mlp.fc1"] == 1
    assert tokens["blocks.2.adapter.down"] == 1


def test_operators():
    """A graph has no operator that onnxruntime can't pass on to CoreML (Pad, for one; its list is
    coreml_supported_mlprogram_ops.md), and none that computes a shape."""
    model = network({"rank": 4})
    adaptertune.add_prompts(model, prompts=5, deep=True)
    model.requires_grad_(False)
    _, proto = to_session(model, method="vpt")
    allowed = {"Add", "Concat", "Conv", "Div", "Erf", "LayerNormalization", "MatMul", "Mul"}
    allowed |= {"Reshape", "Slice", "Softmax", "Squeeze", "Transpose"}
    assert {node.op_type for node in proto.graph.node} <= allowed


def test_the_inputs_name():
    """The input can be given another name, in every kind of graph."""
    for kind in ("float", "unit", "uint8"):
        g = export.Graph(17, image="pixel_values")
        proto = export.to_model(g, network(None), META | {"input": kind})
        onnx.checker.check_model(proto, full_check=True)
        assert [each.name for each in proto.graph.input] == ["pixel_values"]


def test_merged_adapters_leave_no_node():
    """Merged adapters add no node to the backbone's graph, and its logits are the same."""
    model = network(MERGEABLE)
    merged = network(MERGEABLE)
    assert adaptertune.merge(merged) == 3
    session, proto = to_session(merged)
    _, plain = to_session(network(None))
    assert [node.op_type for node in proto.graph.node] == [
        node.op_type for node in plain.graph.node
    ]
    assert not [node.name for node in proto.graph.node if "adapter" in node.name]
    assert difference(session, model, normalised(random_pixels(3))) < 1e-4


def test_what_the_benchmark_times(tmp_path):
    """The graphs of bench_export.py, with adapters built in or swappable, give torch's logits."""
    model = bench_export.network(8)
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    baked = bench_export.in_onnxruntime(bench_export.to_proto(model).SerializeToString())
    for graph in (baked, bench_export.swappable(model, tmp_path)):
        (got,) = graph(x.numpy())
        assert np.abs(got - model(x).numpy()).max() < 1e-4


# -------------------------------------------------------------------------- from a run to a file

RUNS = {
    "a": "--rank 4",
    "b": "--rank 8 --every 2",
    "head": "--method head",
    "full": "--method full",
    "former": "--method adaptformer --rank 4",
    "merged": "--method adaptformer --rank 6 --adapter-input ln --adapter-act gelu",
    "rotary": "--weights rotary.safetensors --rank 4",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with short runs on digits in runs/NAME, trained by train.py."""
    folder = tmp_path_factory.mktemp("work")
    weights = write_backbone(folder / "tiny.safetensors", seed=0)
    write_backbone(folder / "rotary.safetensors", seed=0, rope=True, registers=4)
    common = ["--weights", str(weights), "--epochs", "4", "--limit", "300", "--lr", "1e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, options in RUNS.items():
            assert train.main([*common, "--name", name, *options.split()]) == 0
    return folder


@pytest.fixture
def run(runs, monkeypatch, capsys):
    """Runs export.py's main where the runs are; returns its output, or its one-line error."""
    monkeypatch.chdir(runs)
    return runner(export.main, capsys)


def opened(name):
    """A run with its data and its network."""
    options, *_ = train.parse(["--eval", f"runs/{name}"])
    run = train.open_run(options)
    run.model.eval().requires_grad_(False)
    return run


def metadata(path):
    return export.session(path).get_modelmeta().custom_metadata_map


def test_a_run_becomes_a_file(run, runs, tmp_path):
    """Export prints the expected lines, states the run in the metadata, and repeats bit for bit."""
    out = run("runs/a", "--images", 0)
    lines = [
        r"model    tiny, adaptertune rank 4, 10 classes",
        r"graph    opset 17, \d+ nodes, "
        r"image float32 \[batch, 3, 16, 16\] -> logits float32 \[batch, 10\]",
        r"check    onnx.checker ok",
        r"check    onnxruntime against torch, 359 test images: max \|diff\| \d\.\de-0\d "
        r"\(limit 1e-4\), top-1 agreement 100 % ok",
        r"speed    batch 1: [\d.]+ ms onnxruntime, [\d.]+ ms torch, ratio [\d.]+ "
        r"\(median of 50, CPU, \d+ threads?\)",
        r"saved    runs/a/labels.txt \(0.02 kB\)",
        r"saved    runs/a/model.onnx \([\d.]+ MB\)",
    ]
    assert re.fullmatch("\n".join(lines) + "\n", out)

    _, trained = adaptertune.read(runs / "runs/a/adapters.safetensors")
    expected = {
        "method": "adaptertune",
        "backbone": "tiny",
        "dataset": "digits",
        "interpolation": "bicubic",
        "license": "not stated",
        "input": "float",
        "output": "logits",
        "precision": "fp32",
        "classes": [str(digit) for digit in range(10)],
        "image_size": 16,
        "rank": 4,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "test_accuracy": trained["test_accuracy"],
        "version": 1,
    }
    assert expected["test_accuracy"] > 20  # twice as good as chance, so predictions vary
    props = metadata(runs / "runs/a/model.onnx")
    for key, value in expected.items():
        found = props[key] if isinstance(value, str) else json.loads(props[key])
        assert found == value, key

    first = (runs / "runs/a/model.onnx").read_bytes()
    run("runs/a", "-o", tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == first
    assert names_in(tmp_path) == ["labels.txt", "model.onnx"]
    assert (tmp_path / "labels.txt").read_text().split() == expected["classes"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--precision int8", "model-int8"),
        ("--precision fp16 --batch 1", "model-fp16-b1"),
        ("--input uint8", "model-uint8"),
        ("--resize --opset 23", "model-uint8-resize-opset23"),
        ("--precision fp16 --opset 18", "model-fp16-opset18"),
        ("--input unit --output probabilities", "model-unit-probabilities"),
        ("--output embedding", "model-embedding"),
    ],
)
def test_names(run, tmp_path, options, name):
    """Options other than the defaults are in the file's name; embeddings have no labels.txt."""
    run("runs/a", "-o", tmp_path, "--force", "--images", 8, *options.split())
    expected = {f"{name}.onnx", "labels.txt"}
    if "embedding" in options:
        expected.remove("labels.txt")
    assert set(names_in(tmp_path)) == expected


def test_labels_are_a_line_each():
    """labels.txt has one class per line; characters that would break the line are replaced."""
    assert export.to_lines(["a b", "c\nd\u2028e\r", "ö"]) == "a b\nc�d�e�\nö\n"


def test_labels_of_another_model_stay(run, tmp_path):
    """A model isn't written beside a labels.txt of other classes, unless it gives embeddings."""
    (tmp_path / "labels.txt").write_text("red\ngreen\n")
    error = run("runs/a", "-o", tmp_path / "digits.onnx", status=1)
    assert "labels.txt has other classes; give this model another folder by -o" in error
    assert (tmp_path / "labels.txt").read_text() == "red\ngreen\n"
    assert names_in(tmp_path) == ["labels.txt"]
    run("runs/a", "-o", tmp_path / "digits.onnx", "--output", "embedding")


@pytest.mark.parametrize("kind", ["float", "unit", "uint8"])
@pytest.mark.parametrize("output", ["logits", "probabilities", "embedding"])
def test_what_other_programs_read(kind, output):
    """Keys that other programs read are written only if true of the graph; `classes` is last."""
    meta = META | {"classes": ["it's", "two words"], "center": 0.875, "batch": 1}
    _, proto = to_session(network({"rank": 8}), **meta | {"input": kind, "output": output})
    props = {prop.key: prop.value for prop in proto.metadata_props}
    assert proto.doc_string == props["description"]
    assert json.loads(props["classes"]) == meta["classes"]
    assert list(props)[-1] == "classes"
    assert ("2 classes of d" in props["description"]) == (output != "embedding")
    assert props["Image.BitmapPixelFormat"] == "Rgb8"
    ranges = {"unit": "Normalized_0_1", "uint8": "NominalRange_0_255"}
    assert props.get("Image.NominalPixelRange") == ranges.get(kind)
    assert "resized to 18 x 18 (bicubic as in Pillow: a = -1/2, " in props["preprocessing"]
    assert ("minus mean, divided by std" in props["preprocessing"]) == (kind == "float")
    if output == "embedding":
        assert not {"task", "names", "model_info model_type"} & set(props)
        return
    assert ("task" in props) == (kind == "unit" and output == "probabilities")
    assert ast.literal_eval(props["names"]) == {0: "it's", 1: "two words"}
    assert ast.literal_eval(props["imgsz"]) == [16, 16]
    assert props["model_info labels"].split() == ["it's", "two_words"]
    x = 255 * np.array([0.1, 0.5, 0.9])
    mean = np.array(props["model_info mean_values"].split(), float)
    scale = np.array(props["model_info scale_values"].split(), float)
    expected = {"unit": x / 255, "uint8": x, "float": (x / 255 - META["mean"]) / META["std"]}[kind]
    assert np.abs((x - mean) / scale - expected).max() < 1e-4


def test_labels_that_look_alike_stay_apart():
    """OpenVINO's labels are separated by spaces, so names that differ only in one are numbered."""
    props = export.props_of_others(META | {"classes": ["a b", "a_b"]}, network(None).config)
    assert props["model_info labels"].split() == ["a_b.0", "a_b.1"]


def test_half_as_mean_and_deviation():
    """Mean and std of 0.5 are described as pixels from -1 to 1."""
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    props = export.props_of_others(META | half, network(None).config)
    assert props["Image.NominalPixelRange"] == "Normalized_1_1"


@pytest.mark.parametrize(("count", "singles"), [(1, 0), (2, 1), (30, 26), (64, 55), (359, 55)])
def test_what_is_checked(runs, monkeypatch, count, singles):
    """Test images are checked singly and in odd batches, each once, however few there are."""
    monkeypatch.chdir(runs)
    run = opened("a")
    run.meta.update(batch=0, input="float", resize=False)
    checked = list(export.images_to_check(run, count))
    sizes = [len(images.labels) for images in checked]
    assert [len(images.image) for images in checked] == sizes
    assert [len(images.x) for images in checked] == sizes
    assert sum(sizes) == count
    assert sizes[:singles] == [1] * singles
    assert all(1 <= size <= 7 for size in sizes[singles:])
    assert len(sizes) > singles
    assert max(sizes) > 1 or count < 30
    seen = torch.cat([images.x for images in checked]).flatten(1)
    assert len(seen.unique(dim=0)) == count


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_constants_beside_a_graph_that_is_too_large(run, tmp_path, monkeypatch, precision):
    """Past protobuf's limit, constants go into a second file, and all checks still run."""
    monkeypatch.setattr(export, "ONE_FILE", 60_000)  # more than int8's, less than fp32's
    out = run("runs/b", "--precision", precision, "-o", tmp_path / "m.onnx", "--force")
    data = ["m.onnx.data"] if precision == "fp32" else []
    assert names_in(tmp_path) == ["labels.txt", "m.onnx", *data]
    assert len({path.stat().st_mode for path in tmp_path.glob("m.onnx*")}) == 1  # permissions
    assert out.count("check    onnx.checker ok") == (1 if precision == "fp32" else 2)
    export.session(tmp_path / "m.onnx")
    if precision == "int8":
        small, plain = re.search(r"^size     ([\d.]+) MB, ([\d.]+) MB fp32", out, re.M).groups()
        assert float(small) < float(plain)


def test_resizing_is_checked_on_images_that_need_it(run):
    """Images that are stored at the network's size are enlarged, or the graph wouldn't resize."""
    task = opened("a")
    task.meta |= {"resize": True, "batch": 0, "input": "uint8"}
    task.dataset = export.noise(task)
    assert task.dataset.test.pixels.shape[-1] == 16
    shapes = {each.image.shape[1:] for each in export.images_to_check(task, 60)}
    assert shapes == {(33, 33, 3)}


def test_resizing_is_checked_on_original_photos(run, runs, photos, tmp_path, monkeypatch):
    """With --resize, photos are checked in their files' size, turned as EXIF says. Outputs are
    those of evaluation except for rounding to bytes; a graph that resizes otherwise is refused."""
    from PIL import Image

    Image.new("RGB", (90, 33), "olive").save(photos / "leaf/00.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (70, 50), "navy").save(photos / "sky/00.jpg", exif=exif)
    weights = runs / "tiny.safetensors"
    common = ["--dataset", str(photos), "--weights", str(weights), "--epochs", "1"]
    assert train.main([*common, "--test-share", "0.5", "--name", "photos"]) == 0

    shapes = []
    plain = export.original_to_check
    checked = []

    def original(trained, image):
        checked.append((plain(trained, image), image))
        return checked[-1][0]

    monkeypatch.setattr(export, "original_to_check", original)
    path = tmp_path / "m.onnx"
    run("runs/photos", "--resize", "--images", 0, "-o", path)
    session = export.session(path)
    trained = opened("photos")
    assert len(checked) == len(trained.dataset.test) >= 30
    for each, image in checked:
        with Image.open(photos / image.names[0]) as photo:
            turned = photo.getexif().get(0x0112) == 6
            width, height = photo.size[::-1] if turned else photo.size
        assert each.image.shape == (1, height, width, 3)
        shapes.append((height, width))
        pixels = data.read_photo(photos / image.names[0], data.Square(18))[None]
        evaluated = trained.model(trained.batches.central(pixels, 7 / 8)).numpy()
        assert np.abs(session.run(None, {"image": each.image})[0] - evaluated).max() < 0.05
    assert len(set(shapes)) > 10

    resample = export.write_resample
    monkeypatch.setattr(export, "write_resample", lambda *args: resample(*args[:-1], 1.0))
    assert "no file was written" in run("runs/photos", "--resize", "-o", path, status=1)


@pytest.mark.parametrize(
    "options",
    [
        ["--opset", 20, "--input", "uint8", "--batch", 5],
        ["--input", "unit"],
        ["--opset", 23, "--output", "probabilities"],
        ["--resize", "--output", "embedding"],
        ["--resize", "--opset", 23, "--batch", 1],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
@pytest.mark.parametrize("name", ["b", "head", "full", "former", "merged", "rotary"])
def test_every_method_and_option(run, tmp_path, name, options):
    """Every method in every form of input and output passes the check against torch."""
    out = run(f"runs/{name}", "-o", tmp_path / "m.onnx", "--images", 30, *options)
    assert out.count("top-1 agreement 100 % ok") == 1
    limit = "1e-3" if "--resize" in options else "1e-4"
    assert f"(limit {limit})" in out
    assert ("; with resizing in onnxruntime, without in torch)" in out) == ("--resize" in options)
    assert ("2 adapters merged into the backbone" in out) == (name == "merged")


@pytest.mark.parametrize("name", ["a", "rotary"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precision(run, tmp_path, precision, name):
    """fp16 and int8 files are smaller than fp32, and their agreement with fp32 is printed."""
    run(f"runs/{name}", "-o", tmp_path / "fp32.onnx")
    path = tmp_path / "m.onnx"
    out = run(f"runs/{name}", "-o", path, "--precision", precision, "--force")
    check = (
        rf"^check    {precision} against fp32, 359 test images: max \|diff\| [\d.e-]+, "
        r"top-1 agreement [\d.]+ %, accuracy [\d.]+ %, before [\d.]+ %, "
        r"change [+-][\d.]+ ± [\d.]+ points \(at least -[\d.]+ is wanted\) (ok|forced)$"
    )
    assert re.search(check, out, re.M)
    assert re.search(r"^speed .* ms fp32, ratio [\d.]+ ", out, re.M)
    assert ("one scale a batch" in out) == (precision == "int8")
    ratio = path.stat().st_size / (tmp_path / "fp32.onnx").stat().st_size
    assert 0.25 < ratio < 0.75  # half or a quarter, plus the nodes of a tiny network
    saved = metadata(path)
    assert saved["precision"] == precision
    assert ("one scale a batch" in saved["description"]) == (precision == "int8")
    stated = {key for key in saved if key.endswith("accuracy")}  # of the run, not of this graph
    assert stated == {"fp32_val_accuracy", "fp32_test_accuracy"}
    assert f"check    {saved['check']}\n" in out  # this graph's own


def test_int8_that_disagrees(run, tmp_path, monkeypatch):
    """If int8 mislabels too many images that fp32 had right, it is written only with --force."""

    def turn_labels_around(model, images):
        model.head.weight.neg_()

    monkeypatch.setattr(export, "equalise", turn_labels_around)
    arguments = ["runs/a", "-o", tmp_path / "m.onnx", "--precision", "int8"]
    error = run(*arguments, status=1)
    assert "is wanted): it isn't kept without --force" in error
    assert not list(tmp_path.iterdir())
    assert "is wanted) forced" in run(*arguments, "--force")
    assert metadata(tmp_path / "m.onnx")["check"].endswith("is wanted) forced")
    assert names_in(tmp_path) == ["labels.txt", "m.onnx"]
    out = run("runs/a", "--hub", tmp_path / "hub")
    assert re.search(
        "^left out onnx/model_quantized.onnx: .*it isn't kept without --force$", out, re.M
    )
    assert names_in(tmp_path / "hub/onnx") == ["model.onnx"]


def agreement(counts, labels=True):
    """Answers of which `counts` are right both times, only before, only after, and never."""
    before = np.repeat([1, 1, 0, 0], counts)
    after = np.repeat([1, 0, 1, 2], counts)
    truth = np.ones(len(before), int) if labels else np.full(len(before), -1)
    return export.Agreement(0.1, before, after, truth, [])


@pytest.mark.parametrize(
    ("counts", "good", "text"),
    [
        ((900, 0, 0, 100), True, "accuracy 90.00 %, before 90.00 %, change +0.00 ± 0.00 points"),
        ((900, 15, 0, 85), False, "accuracy 90.00 %, before 91.50 %, change -1.50 ± 0.38 points"),
        ((900, 13, 0, 87), True, "change -1.30 ± 0.36 points (at least -1.36 is wanted)"),
        ((9000, 150, 0, 850), False, "change -1.50 ± 0.12 points"),
        ((900, 40, 40, 20), True, "top-1 agreement 90 %, accuracy 94.00 %, before 94.00 %"),
        ((70, 2, 0, 2), True, "change -2.70 ± 1.89 points"),
        ((50, 20, 0, 4), False, "change -27.03 ± 5.16 points"),
        ((0, 8, 0, 0), False, "change -100.00 ± 0.00 points"),
    ],
)
def test_the_rule_of_rounding(counts, good, text):
    """A loss of at most a point plus one standard error of the paired difference is accepted."""
    said, judged = export.judge_rounded(agreement(counts))
    assert text in said
    assert judged == good


@pytest.mark.parametrize(("changed", "good"), [(2, True), (3, False)])
def test_rounding_without_labels(changed, good):
    """Without labels, at least 98 % of predictions must stay the same, and the line says why."""
    said, judged = export.judge_rounded(agreement((100 - changed, changed, 0, 0), False))
    assert "at least 98 % is wanted, since labels aren't known" in said
    assert judged == good


def test_rounding_to_nothing():
    """A difference of NaN is refused, whatever the answers."""
    found = agreement((10, 0, 0, 0))
    found.worst = float("nan")
    assert not export.judge_rounded(found)[1]


def test_int8_is_where_it_should_be(run, tmp_path):
    """Only the blocks' matrices are int8; q, k and v share one rounding of their input."""
    run("runs/a", "-o", tmp_path / "m.onnx", "--precision", "int8", "--force")
    proto = onnx.load(tmp_path / "m.onnx")
    expected = set()
    for block in ("blocks.0", "blocks.1"):
        for name in ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2"):
            expected.add(f"{block}.{name}.weight_quantized")
    expected.remove("blocks.0.mlp.fc2.weight_quantized")
    integers = set()
    for constant in proto.graph.initializer:
        if constant.data_type == onnx.TensorProto.INT8 and len(constant.dims) > 1:
            integers.add(constant.name)
    assert integers == expected

    rounded = []
    for node in proto.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            rounded.append(node.input[0])
    assert sorted(rounded) == [
        "blocks.0.attn.heads",
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.attn.heads",
        "blocks.1.mlp.act",
        "blocks.1.norm1",
        "blocks.1.norm1.class",
        "blocks.1.norm2",
    ]
    assert proto.ir_version == 8
    assert proto.opset_import[0].version == 17
    assert proto.producer_name == "adaptertune"
    assert proto.model_version == 1


def test_int8_of_a_fixed_batch(run, tmp_path):
    """An int8 graph of a fixed batch has no dimension `batch`, which tract would refuse."""
    run("runs/a", "-o", tmp_path / "m.onnx", "--precision", "int8", "--batch", 2, "--force")
    proto = onnx.load(tmp_path / "m.onnx")
    assert not proto.graph.value_info
    assert b"batch" not in proto.graph.SerializeToString()


def test_rounding_is_told_from_a_wrong_graph(run, tmp_path, monkeypatch):
    """A difference above the limit is accepted if torch in fp32 is as far from torch in float64,
    as with large activations; for embeddings too. A wrong graph isn't."""
    monkeypatch.setattr(export, "LIMIT", 1e-9)
    for name, options in (("a", []), ("b", ["--output", "embedding"]), ("rotary", ["--batch", 5])):
        out = run(f"runs/{name}", "-o", tmp_path / "m.onnx", *options)
        assert re.search(
            r"; from float64 the graph differs by [\d.e-]+, torch by [\d.e-]+ ok$", out, re.M
        )
    rounding = export.ROUNDING
    monkeypatch.setattr(export, "ROUNDING", 0.01)
    assert "no file was written" in run("runs/a", "-o", tmp_path / "m.onnx", status=1)
    monkeypatch.setattr(export, "ROUNDING", rounding)
    out = run("runs/a", "--swappable", "-o", tmp_path)
    assert out.count("from float64 the graph differs by") == 2


@pytest.mark.parametrize("damage", [0.01, float("nan")])
def test_a_missed_limit_leaves_no_file(run, tmp_path, monkeypatch, damage):
    """A graph that differs from the network, even by a hundredth in one logit, isn't kept."""

    def merge(model):
        model.head.bias[3] += damage
        return 0

    monkeypatch.setattr(adaptertune, "merge", merge)
    error = run("runs/a", "-o", tmp_path / "new/folder/m.onnx", status=1)
    assert "(limit 1e-4)" in error
    assert "no file was written" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 16, 16, 4), np.uint8),
        np.zeros((1, 16, 16, 3), np.float32),
        np.zeros((1, 0, 16, 3), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
    ],
    ids=["channels", "type", "size", "rank"],
)
def test_wrong_pixels_are_refused(run, tmp_path, array):
    """onnxruntime itself refuses pixels of wrong channels, type, size or rank."""
    run("runs/a", "-o", tmp_path / "m.onnx", "--input", "uint8")
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        export.session(tmp_path / "m.onnx").run(None, {"image": array})


def test_a_file_that_is_no_graph(tmp_path):
    """A missing file, or one of another kind, gives a ValueError with its name."""
    (tmp_path / "text.onnx").write_text("no graph")
    for name in ("gone.onnx", "text.onnx"):
        with pytest.raises(ValueError, match=f"onnxruntime can't load .*{name}: "):
            export.session(tmp_path / name)


# ---------------------------------------------------------------------------- swappable adapters


def test_one_session_serves_several_tasks(run, tmp_path):
    """One session runs, in turn, rank 4 in every block, rank 8 in every second, and a head alone:
    each gives its torch model's logits. Without an adapter, it gives the backbone's output."""
    backbone = tmp_path / "backbone.onnx"
    out = run("runs/a", "--swappable", "-o", tmp_path)
    assert f"saved    {backbone}" in out
    assert out.count("top-1 agreement 100 % ok") == 2
    before = backbone.stat().st_mtime_ns
    for name in ("b", "head"):
        assert "backbone.onnx (" not in run(f"runs/{name}", "--swappable", "-o", tmp_path)
    assert backbone.stat().st_mtime_ns == before

    session = export.session(backbone)
    tasks = {name: opened(name) for name in ("a", "b", "head")}
    x, labels = next(tasks["a"].batches.eval(tasks["a"].dataset.test, 1.0))
    images = export.Checked(x.numpy(), x, labels.numpy())
    for name in ("a", "b", "a", "head", "b"):
        task = export.InOnnxruntime(session, tmp_path / f"{name}.onnx_adapter")
        assert np.abs(task(images) - tasks[name].model(x).numpy()).max() < 1e-4
    model, _ = vit.load(tasks["a"].options.weights)
    with torch.inference_mode():
        features = model(x).numpy()
    assert np.abs(export.InOnnxruntime(session)(images) - features).max() < 1e-4


def test_rotary_positions_and_swappable_adapters(run, tmp_path):
    """A backbone with rotary positions can be exported as swappable and passes both checks."""
    out = run("runs/rotary", "--swappable", "-o", tmp_path)
    assert out.count("top-1 agreement 100 % ok") == 2


def test_swappable_from_inside_the_run(run, runs, monkeypatch):
    """If the run is ".", the adapter is named after the run's folder and written beside it."""
    monkeypatch.chdir(runs / "runs/b")
    before = names_in(runs / "runs/b")
    run(".", "--swappable", "--images", 8)
    assert names_in(runs / "runs/b") == before
    for name in ("backbone.onnx", "b.onnx_adapter"):
        (runs / "runs" / name).unlink()


def test_adapters_are_small(run, tmp_path):
    """An adapter's file holds little more than its own tensors, and no other file is left."""
    for name in ("a", "b", "head"):
        run(f"runs/{name}", "--swappable", "-o", tmp_path, "--images", 8)
        path = tmp_path / f"{name}.onnx_adapter"
        file = onnxruntime.AdapterFormat.read_adapter(str(path))  # the tensors need it
        tensors = file.get_parameters()
        size = sum(value.numpy().nbytes for value in tensors.values())
        assert path.stat().st_size < 1.1 * size + 3000
    assert {path.suffix for path in tmp_path.iterdir()} == {".onnx", ".onnx_adapter"}


def test_another_backbones_adapter_is_refused(run, tmp_path):
    """onnxruntime itself refuses another backbone's adapter, and export.py doesn't write one beside
    that backbone."""
    run("runs/a", "--swappable", "-o", tmp_path)
    weights = write_backbone(tmp_path / "other.safetensors", seed=1)
    options = ["--epochs", "1", "--limit", "40", "--name", "other"]
    assert train.main(["--weights", str(weights), *options]) == 0
    run("runs/other", "--swappable", "-o", tmp_path / "second")

    session = export.session(tmp_path / "backbone.onnx")
    other = export.InOnnxruntime(session, tmp_path / "second/other.onnx_adapter")
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(Exception, match="Invalid input name: for"):
        other(export.Checked(x.numpy(), x, np.zeros(1)))
    for arguments in (["runs/other"], ["runs/a", "--opset", 20]):
        error = run(*arguments, "--swappable", "-o", tmp_path, status=1)
        assert "backbone.onnx has " in error
        assert "they can't share it; give another folder by -o" in error
    assert not (tmp_path / "other.onnx_adapter").exists()


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ("--heads 1", "heads 2, this run 1"),
        ("--mean 0.4,0.4,0.4", r"mean \[0.5, 0.5, 0.5\], this run \[0.4, 0.4, 0.4\]"),
        ("--method adaptformer --adapter-act gelu", "reads block, this run raw"),
        ("--adapter-act relu", "act gelu, this run relu"),
    ],
)
def test_an_adapter_of_another_network_is_refused(run, tmp_path, options, difference):
    """An adapter that was trained on the same weights with other heads or another normalisation
    computes something else there: onnxruntime refuses it, and export.py names the difference."""
    weights = write_backbone(tmp_path / "w.safetensors", seed=3)
    common = ["--weights", str(weights), "--epochs", "1", "--limit", "40", "--name"]
    assert train.main([*common, tmp_path.name]) == 0
    assert train.main([*common, f"{tmp_path.name}-2", "--rank", "4", *options.split()]) == 0
    run(f"runs/{tmp_path.name}", "--swappable", "-o", tmp_path)
    second = f"runs/{tmp_path.name}-2"
    error = run(second, "--swappable", "-o", tmp_path, status=1)
    assert re.search(f"backbone.onnx has {difference}: they can't share it", error)
    run(second, "--swappable", "-o", tmp_path / "second/")
    session = export.session(tmp_path / "backbone.onnx")
    other = export.InOnnxruntime(session, tmp_path / f"second/{tmp_path.name}-2.onnx_adapter")
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(Exception, match="Invalid input name: for"):
        other(export.Checked(x.numpy(), x, np.zeros(1)))


# --------------------------------------------------------------------- other photos, the hub


def test_other_photos(run, runs, photos, tmp_path):
    """--check uses photos instead of the test images, and says so. Folders named like classes give
    labels; without them, only predictions are compared."""
    common = ["--dataset", str(photos), "--weights", str(runs / "tiny.safetensors")]
    assert train.main([*common, "--epochs", "1", "--name", "colours"]) == 0
    arguments = ["runs/colours", "-o", tmp_path, "--images", 30, "--check"]
    out = run(*arguments, photos)
    assert f"onnxruntime against torch, 30 photos of {photos}: " in out
    out = run(*arguments, photos, "--precision", "int8", "--force")
    assert f"int8 against fp32, 30 photos of {photos}: " in out
    assert "accuracy" in out
    out = run(*arguments, photos / "sky", "--precision", "fp16", "--force")
    assert f"20 photos of {photos / 'sky'}: " in out
    assert "accuracy" in out  # the folder itself is named after a class
    saved = metadata(tmp_path / "model-fp16.onnx")
    assert saved["check"].startswith("fp16 against fp32, 20 photos: ")  # without its path
    (tmp_path / "unsorted").mkdir()
    for photo in (photos / "sky").iterdir():
        (tmp_path / "unsorted" / photo.name).write_bytes(photo.read_bytes())
    out = run(*arguments, tmp_path / "unsorted", "--precision", "fp16", "--force")
    assert "since labels aren't known" in out
    assert "accuracy" not in out
    assert f"1 photo of {photos}: " in run(*arguments, photos, "--images", 1)
    run(*arguments, photos, "--resize")
    (tmp_path / "empty").mkdir()
    assert "no photos in" in run(*arguments, tmp_path / "empty", status=1)

    # --dataset gives images to check with; the accuracy stays that of the run's own test images.
    for name in ("apple", "leaf", "sky"):
        (tmp_path / "more" / name).mkdir(parents=True)
        for i in range(2):
            photo = photos / f"{name}/{i:02}.png"
            (tmp_path / "more" / name / f"other{i}.png").write_bytes(photo.read_bytes() + b"0")
    out = run("runs/colours", "--dataset", tmp_path / "more", "--hub", tmp_path / "hub")
    assert "6 test images" in out
    listed = json.loads((runs / "runs/colours/split.json").read_text())
    assert len(listed["test"]) == 12
    assert " % of 12." in (tmp_path / "hub/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "read"), [("", 64), ("--precision fp16", 90), ("--images 7", 7)]
)
def test_no_more_photos_are_read_than_checked(run, photos, tmp_path, monkeypatch, options, read):
    """No more photos of --check's folder are read than are checked."""
    for path in list(photos.rglob("*.png"))[:30]:
        path.with_name(f"again-{path.name}").write_bytes(path.read_bytes())
    counts = []
    decode = data.decode

    def counted(paths, *args, **more):
        counts.append(len(paths))
        return decode(paths, *args, **more)

    monkeypatch.setattr(data, "decode", counted)
    run("runs/a", "--check", photos, "--force", "-o", tmp_path / "m.onnx", *options.split())
    assert counts == [read]


def test_without_the_runs_photos(run, runs, photos, tmp_path):
    """A run whose photos are gone is checked on noise, which is printed; int8 is refused."""
    common = ["--dataset", str(photos), "--weights", str(runs / "tiny.safetensors")]
    assert train.main([*common, "--epochs", "1", "--name", "gone"]) == 0
    photos.rename(tmp_path / "elsewhere")
    train.read_dataset.cache_clear()
    noise = "note     checked on noise, since the run's own images can't be read; --check FOLDER\n"
    folder = tmp_path / "out"
    folder.mkdir()
    for options in ([], ["--resize"], ["--input", "unit", "--batch", "3"]):
        out = run("runs/gone", "-o", folder, *options)
        assert noise in out
        assert "onnxruntime against torch, 64 noise images: max" in out
    before = names_in(folder)
    error = run("runs/gone", "-o", folder, "--precision", "int8", status=1)
    assert "int8 is calibrated on training images, and none are there; give --check FOLDER" in error
    assert names_in(folder) == before
    out = run("runs/gone", "--hub", folder / "hub")
    assert "left out onnx/model_quantized.onnx: int8 is calibrated on training images" in out
    assert re.search(r"test images: [\d.]+ %\.", (folder / "hub/README.md").read_text())
    config = json.loads((folder / "hub/config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    run("runs/gone", "-o", folder, "--precision", "int8", "--force", "--check", tmp_path)


def test_with_classes_in_another_order(run, runs, photos, tmp_path):
    """Export doesn't use the run's photos if the classes in split.json were changed."""
    common = ["--dataset", str(photos), "--weights", str(runs / "tiny.safetensors")]
    assert train.main([*common, "--epochs", "1", "--name", "mixed"]) == 0
    split = runs / "runs/mixed/split.json"
    listed = json.loads(split.read_text())
    listed["classes"].reverse()
    split.write_text(json.dumps(listed))
    out = run("runs/mixed", "-o", tmp_path / "m.onnx")
    assert "note     the run's data set can't be used: " in out
    assert "note     checked on noise" in out


def test_without_leave_to_read_the_runs_photos(run, tmp_path, monkeypatch):
    """If the run's photos may not be read, export checks on noise, as if they were missing."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "photos")

    monkeypatch.setattr(train, "read_dataset", refuse)
    out = run("runs/a", "-o", tmp_path / "m.onnx")
    assert "the run's data set can't be used: [Errno 13] Permission denied: 'photos'\n" in out
    assert "noise images" in out


@pytest.mark.parametrize("trained", ["a", "rotary"])
def test_hub(run, tmp_path, trained):
    """--hub writes the files and the contents that transformers.js and optimum-onnx look for."""
    out = run(f"runs/{trained}", "--hub", tmp_path, "--force")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert files == [
        "README.md",
        "config.json",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
        "preprocessor_config.json",
    ]
    assert "int8 against fp32, 359 test images" in out
    for name in files[2:4]:
        session = export.session(tmp_path / name)
        assert [each.name for each in session.get_inputs()] == ["pixel_values"]
        assert [each.name for each in session.get_outputs()] == ["logits"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(i): str(i) for i in range(10)}
    assert config["label2id"] == {str(i): i for i in range(10)}
    assert "transformers.js_config" not in config
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 16}
    assert processor["resample"] == 1  # Lanczos, which transformers.js antialiases
    assert processor["crop_size"] == {"height": 16, "width": 16}
    assert processor["image_mean"] == processor["image_std"] == [0.5] * 3
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers.js"\n')
    assert re.search(r"Accuracy on its test images: [\d.]+ % of 359\.", card)
    run(f"runs/{trained}", "--hub", tmp_path, "--force")  # a second time


def test_hub_beside_another_readme(run, tmp_path):
    """A README.md that --hub didn't write isn't overwritten."""
    (tmp_path / "README.md").write_text("mine")
    error = run("runs/a", "--hub", tmp_path, status=1)
    assert "README.md exists and wasn't written by --hub; give another folder" in error
    assert names_in(tmp_path) == ["README.md"]


def test_a_card_names_what_the_hub_has():
    """The model card uses the hub's names for backbone, licence and data set."""
    meta = {"backbone": "mae_b16", "license": "CC-BY-NC-4.0", "dataset": "cifar100"}
    meta |= {"method": "head", "classes": ["a", "b"], "test_accuracy": 91.0, "test_images": 10_000}
    options = train.argparse.Namespace(weights="")
    device = torch.device("cpu")
    backbone = vit.BACKBONES["mae_b16"]
    run = train.Run(options, None, None, None, None, device, False, meta, backbone)
    card = export.model_card(run, int8=False)
    for line in (
        'base_model: "timm/vit_base_patch16_224.mae"',
        'license: "cc-by-nc-4.0"',
        'datasets: ["cifar100"]',
        'pipeline_tag: "image-classification"',
    ):
        assert f"\n{line}\n" in card
    assert "`mae_b16` (head) on `cifar100`. Accuracy on its test images: 91.00 % of 10,000." in card
    assert "int8" not in card
    run.meta["license"] = "DINOv3 License"  # it isn't in the hub's list
    assert '\nlicense: "other"\nlicense_name: "dinov3-license"\n' in export.model_card(run, False)
    options.weights = "mine.safetensors"  # not the published ones
    assert "base_model" not in export.model_card(run, int8=False)
    run.meta["dataset"] = "cifar-of-mine"
    assert "datasets" not in export.model_card(run, int8=False)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "the following arguments are required"),
        ("runs/none", 1, "no run in runs/none"),
        ("runs/a runs/b", 2, "unrecognized arguments: runs/b"),
        ("runs/a --opset 19", 2, "invalid choice: .?19"),
        ("runs/a --resize --input float", 2, "leave out --input float"),
        ("runs/a --resize --input unit", 2, "leave out --input unit"),
        ("runs/a --hub h --resize", 2, "--hub settles what its folder holds; leave out --resize"),
        ("runs/a --hub h --input unit", 2, "leave out --input"),
        ("runs/a --hub h --output embedding", 2, "leave out --output"),
        ("runs/a --hub h --precision int8", 2, "leave out --precision"),
        ("runs/a --hub h --swappable", 2, "leave out --swappable"),
        ("runs/a --hub h -o m.onnx", 2, "leave out -o"),
        ("runs/a --hub h --batch 4", 2, "leave out --batch"),
        ("runs/a --check gone", 2, "--check gone: no such folder"),
        ("runs/a --batch -1", 2, "argument --batch: -1 is not between 0 and 1,024"),
        ("runs/a --images many", 2, "argument --images: 'many' is not a valid int"),
        ("runs/a --swappable --precision int8", 2, "--swappable is fp32"),
        ("runs/a --swappable --resize", 2, "--swappable is fp32, without --resize"),
        ("runs/a --swappable -o m.onnx", 2, "--swappable writes two files; give a folder"),
        ("runs/full --swappable", 1, "a full run can't be swapped"),
        ("runs/a --bogus", 2, "unrecognized arguments: --bogus"),
        ("runs/a --name b", 2, "unrecognized arguments: --name b"),
        ("runs/a --device cuda", 2, "unrecognized arguments: --device cuda"),
        ("--weights gone.safetensors runs/a", 1, "no weights at gone.safetensors"),
        ("runs/a --weights gone.safetensors", 1, "no weights at gone.safetensors"),
        ("runs/a -o runs/a/adapters.safetensors", 2, "give a file that ends in .onnx"),
        ("runs/a -o /dev/full", 2, "give a file that ends in .onnx"),
        (
            "runs/a -o new",
            2,
            "-o new: give a file that ends in .onnx, or a folder, a new one with /",
        ),
        ("runs/a --batch 100000", 2, "--batch: 100000 is not between 0 and 1,024"),
        ("runs/a --dataset gone", 1, "no folder gone; if the run's photos are elsewhere now"),
        ("runs/a -o runs/a/split.json", 2, "give a file that ends in .onnx"),
        ("runs/a -o /proc/nowhere/model.onnx", 1, "can.t write to /proc"),
        ("runs/a -o runs/a/config.json/model.onnx", 1, "Not a directory|exists"),
    ],
)
def test_errors_are_one_line(run, runs, arguments, status, message):
    """Wrong usage and other errors give one line, and no file is added or removed."""
    before = sorted(runs.rglob("*"))
    assert re.search(message, run(*arguments.split(), status=status))
    assert sorted(runs.rglob("*")) == before


def test_a_run_without_its_adapters(run, runs):
    """Exporting an unfinished run is an error, and its folder stays as it is."""
    folder = runs / "runs/empty"
    folder.mkdir()
    (folder / "config.json").write_bytes((runs / "runs/a/config.json").read_bytes())
    assert "no adapters at runs/empty/adapters.safetensors" in run("runs/empty", status=1)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_ctrl_c_leaves_no_file(run, runs, tmp_path, monkeypatch, capsys):
    """Ctrl-C during the check gives status 130 and a line that says so, and leaves no file."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "measure", stop)
    assert export.main(["runs/a", "-o", str(tmp_path / "m.onnx")]) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
