"""The graph against torch, what travels with it, and the command line as a user runs it."""
import json
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, runner, write_tiny

import adaptertune
import cli
import data
import export
import train
import vit

TINY = {"width": 64, "depth": 3, "heads": 4, "patch": 4, "image_size": 16, "hidden": 96}
NETWORKS = {
    "plain": {},
    "registers, LayerScale": {"registers": 3, "layer_scale": True},
    "CLIP": {"norm_pre": True, "quick_gelu": True, "patch_bias": False, "eps": 1e-5},
    "mean pool": {"pool": "mean"},
    "mean pool, registers": {"pool": "mean", "registers": 2},
    "no biases": {"qkv_bias": False, "patch_bias": False},
    "one block": {"depth": 1},
}
ADAPTERS = {
    "none": None,
    "rank 1": {"rank": 1},
    "rank 64": {"rank": 64},
    "every second": {"rank": 4, "placement": [1]},
    "learnt scale": {"rank": 4, "learn_scale": True},
    "adaptformer": {"method": "adaptformer", "rank": 8, "reads": "raw", "act": "relu", "scale": 0.1},
    "paper's adaptformer": {"method": "adaptformer", "rank": 8, "reads": "ln", "act": "relu", "scale": 0.1},
    "sequential": {"method": "adaptformer", "rank": 8, "reads": "mlp", "act": "gelu", "scale": 0.5},
    "fusable": {"method": "adaptformer", "rank": 8, "reads": "ln", "act": "mlp", "scale": 0.5},
}
META = {"input": "float", "resize": False, "output": "logits", "top_k": 0, "batch": 0, "backbone": "tiny", "center": 1.0,
        "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def save_png(path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(path)


SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def network(adapters=None, **changes):
    """A small adapted ViT with nothing near zero."""
    torch.manual_seed(0)
    model = vit.ViT(vit.Config(**{**TINY, **changes}))
    if adapters is not None:
        adaptertune.add_adapters(model, **{"placement": range(len(model.blocks)), **adapters})
    adaptertune.add_head(model, 7)
    for name, parameter in model.named_parameters():
        near_one = re.search(r"norm\w*\.weight|gamma|scale", name)
        torch.nn.init.normal_(parameter, 1.0 if near_one else 0.0, 0.3 if near_one or parameter.ndim < 2 else
                              parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def graph(model, opset=17, **meta):
    """The exported graph as onnxruntime runs it; the model is checked in passing."""
    proto = export.to_model(export.Graph(opset), model, META | meta)
    onnx.checker.check_model(proto, full_check=True)
    assert (proto.ir_version, proto.opset_import[0].version) == ({17: 8, 18: 8, 20: 9, 23: 11}[opset], opset)
    assert not proto.graph.value_info
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]), proto


def pixels(batch, side=16, width=0):
    return torch.randint(0, 256, (batch, 3, side, width or side), generator=torch.Generator().manual_seed(batch)).byte()


def normalised(images):
    """What torch gets of pixels uint8 [B, 3, S, S]."""
    mean, std = (torch.tensor(META[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("opset", [17, 20, 23])
@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_parity(changes, opset, kind):
    model = network({"rank": 8, "scale": 0.7}, **changes)
    session, _ = graph(model, opset, input=kind)
    for batch in (1, 3, 32):
        images = pixels(batch)
        x = normalised(images)
        got = session.run(None, {"image": x.numpy() if kind == "float" else images.permute(0, 2, 3, 1).numpy()})
        assert np.abs(got[0] - model(x).numpy()).max() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"layer_scale": True, "pool": "mean", "quick_gelu": True}], ids=["plain", "other"])
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_parity_of_every_adapter(adapters, changes):
    model, x = network(adapters, **changes), normalised(pixels(3))
    session, _ = graph(model)
    assert np.abs(session.run(None, {"image": x.numpy()})[0] - model(x).numpy()).max() < 1e-4


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_parity_of_prompts(changes, deep):
    model, x = network(None, **changes), normalised(pixels(3))
    adaptertune.add_prompts(model, prompts=5, deep=deep)
    model.requires_grad_(False)
    session, _ = graph(model)
    assert np.abs(session.run(None, {"image": x.numpy()})[0] - model(x).numpy()).max() < 1e-4


def test_a_wrong_graph_shows():
    """The comparison above isn't blind: without its adapters the network gives other numbers."""
    model, x = network({"rank": 8}), normalised(pixels(3))
    session, _ = graph(network(None))
    assert np.abs(session.run(None, {"image": x.numpy()})[0] - model(x).numpy()).max() > 0.1


@pytest.mark.parametrize("batch", [0, 2])
def test_outputs(batch):
    model, x = network({"rank": 8}), normalised(pixels(2))
    logits = model(x)
    for meta, wanted in [({"output": "probabilities"}, [logits.softmax(dim=1)]), ({"output": "embedding"}, [model.features(x)]),
                         ({"top_k": 3}, logits.topk(3)), ({"top_k": 2, "output": "probabilities"}, logits.softmax(1).topk(2))]:
        session, _ = graph(model, batch=batch, **meta)
        assert session.get_inputs()[0].shape == [batch or "batch", 3, 16, 16]
        got = session.run(None, {"image": x.numpy()})
        assert len(got) == len(wanted)
        assert [list(one.shape) for one in got] == [[batch or 2, *each.shape[1:]] for each in wanted]
        assert all(np.abs(one - two.numpy()).max() < 1e-4 for one, two in zip(got, wanted, strict=True))
        names = [output.name for output in session.get_outputs()]
        assert names == (["scores", "labels"] if "top_k" in meta else [meta["output"]])


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("center", [1.0, 0.875])
def test_resize(opset, center):
    """Photos of any size, as data.py treats them: the centre square, resized, and the middle of it."""
    model = network({"rank": 8})
    session, _ = graph(model, opset, input="uint8", resize=True, center=center)
    side = round(16 / center)
    cut = (side - 16) // 2
    for height, width in ((16, 16), (8, 8), (40, 40), (31, 50), (50, 31), (90, 64)):
        images, edge = pixels(3, height, width), min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        square = images[:, :, top:top + edge, left:left + edge]
        resized = data.crop_resize(square, data.center_boxes(3, edge, edge, 1.0, square.device), side)
        resized = resized[:, :, cut:cut + 16, cut:cut + 16]
        got = session.run(None, {"image": images.permute(0, 2, 3, 1).contiguous().numpy()})[0]
        assert np.abs(got - model(normalised(resized * 255)).numpy()).max() < 1e-3, (height, width)


def test_what_a_viewer_shows():
    """Names of the torch modules, the class token alone after the last attention, no shape worked out at run time."""
    _, proto = graph(network({"rank": 8}))
    names = [node.name for node in proto.graph.node]
    assert len(names) == len(set(names))
    expected = ["patch_embed.proj", "blocks.1.norm1", "blocks.1.attn.qkv.q", "blocks.1.attn.proj", "blocks.1.mlp.fc1",
                "blocks.1.adapter.down", "blocks.1.adapter.up", "blocks.1", "norm", "head"]
    assert [name for name in names if name in expected] == expected
    assert not {node.op_type for node in proto.graph.node} & {"Shape", "Expand", "Gather", "Gemm", "ConstantOfShape"}
    shapes = {each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
              for each in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    assert shapes["blocks.1.mlp.fc1"][1] == 17
    assert shapes["blocks.2.attn.qkv.k"][1] == 17
    assert shapes["blocks.2.attn.qkv.q"][1] == shapes["blocks.2.mlp.fc1"][1] == shapes["blocks.2.adapter.down"][1] == 1


def test_merged_adapters_leave_no_node():
    """The fusable AdaptFormer: as many nodes as the backbone alone, and the same function."""
    model, x = network(ADAPTERS["fusable"]), normalised(pixels(3))
    merged = network(ADAPTERS["fusable"])
    assert adaptertune.merge(merged) == 3
    session, proto = graph(merged)
    _, plain = graph(network(None))
    assert [node.op_type for node in proto.graph.node] == [node.op_type for node in plain.graph.node]
    assert not [node.name for node in proto.graph.node if "adapter" in node.name]
    assert np.abs(session.run(None, {"image": x.numpy()})[0] - model(x).numpy()).max() < 1e-4


# -------------------------------------------------------------------------------------------------- from a run to a file


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_weights):
    """Short real runs on digits, made by train.py: runs/NAME below the folder."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, options in {"a": ["--rank", "4"], "b": ["--rank", "8", "--every", "2"], "head": ["--method", "head"],
                              "full": ["--method", "full", "--lr", "1e-3"],
                              "fused": ["--method", "adaptformer", "--adapter-input", "ln", "--adapter-act", "gelu"],
                              "former": ["--method", "adaptformer", "--rank", "4"]}.items():
            rank = ["--rank", "6"] if name == "fused" else []
            assert train.main(["--weights", str(tiny_weights), "--epochs", "4", "--limit", "300", "--name", name, *options,
                               *rank]) == 0
    return folder


@pytest.fixture
def run(runs, monkeypatch, capsys):
    """Runs export.py's main where the runs are and gives its output; an error must be one line."""
    monkeypatch.chdir(runs)
    return runner(export.main, capsys)


def metadata(path):
    return onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map


def test_a_run_becomes_a_file(run, runs, tmp_path):
    out = run("runs/a", "--images", 0)
    assert re.search(r"^model    tiny, adaptertune rank 4, 10 classes$", out, re.M)
    assert re.search(r"^graph    opset 17, \d+ nodes, image float32 \[batch, 3, 16, 16\] -> logits float32 \[batch, 10\]$", out,
                     re.M)
    assert "check    onnx.checker ok\n" in out
    assert re.search(r"^check    onnxruntime against torch, 359 test images: max \|diff\| \d\.\de-0\d \(limit 1e-4\), top-1 "
                     r"agreement 100 % ok$", out, re.M)
    assert re.search(r"^speed    batch 1: [\d.]+ ms onnxruntime, [\d.]+ ms torch, ratio [\d.]+ \(median of 50, CPU", out, re.M)
    assert re.search(r"^saved    runs/a/model.onnx \([\d.]+ MB\)$", out, re.M)
    _, meta = vit.read_tensors(runs / "runs/a/adapters.safetensors")
    props = metadata(runs / "runs/a/model.onnx")
    assert json.loads(props["classes"]) == [str(i) for i in range(10)]
    assert {key: json.loads(props[key]) for key in ("image_size", "rank", "mean", "std", "test_accuracy", "version")} == \
        {"image_size": 16, "rank": 4, "mean": [0.5] * 3, "std": [0.5] * 3, "test_accuracy": meta["test_accuracy"], "version": 1}
    assert {key: props[key] for key in ("method", "backbone", "dataset", "interpolation", "license", "input", "output",
                                        "precision")} == \
        {"method": "adaptertune", "backbone": "tiny", "dataset": "digits", "interpolation": "bicubic", "license": "not stated",
         "input": "float", "output": "logits", "precision": "fp32"}
    first = (runs / "runs/a/model.onnx").read_bytes()
    run("runs/a", "-o", tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(("count", "singles"), [(1, 0), (2, 1), (30, 26), (64, 55), (359, 55)])
def test_what_is_checked(runs, monkeypatch, count, singles):
    """One by one and in odd batches, each image once, however few there are."""
    monkeypatch.chdir(runs)
    opened = train.open_run(cli.parse(["--eval", "runs/a"])[0])
    opened.meta |= {"batch": 0, "input": "float", "resize": False}
    sizes = [len(labels) for _, _, labels in cli.pictures(opened, count)]
    assert sum(sizes) == count
    assert sizes[:singles] == [1] * singles
    assert all(1 <= size <= 7 for size in sizes[singles:])
    assert len(sizes) > singles
    assert max(sizes) > 1 or count < 30


@pytest.mark.parametrize("options", [
    ["--opset", 20, "--input", "uint8", "--batch", 5], ["--opset", 23, "--output", "probabilities", "--top-k", 3],
    ["--resize", "--output", "embedding"], ["--resize", "--opset", 23, "--batch", 1]])
@pytest.mark.parametrize("name", ["b", "head", "full", "former", "fused"])
def test_every_method_and_option(run, tmp_path, name, options):
    out = run(f"runs/{name}", "-o", tmp_path / "m.onnx", "--images", 30, *options)
    assert out.count("top-1 agreement 100 % ok") == 1
    assert ("(limit 1e-3)" if "--resize" in options else "(limit 1e-4)") in out
    assert ("2 adapters merged into the MLPs" in out) == (name == "fused")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precision(run, runs, tmp_path, precision, monkeypatch):
    run("runs/a", "-o", tmp_path / "fp32.onnx")
    out = run("runs/a", "-o", tmp_path / "m.onnx", "--precision", precision, "--force")
    assert re.search(rf"^check    {precision} against fp32, 359 test images: max \|diff\| [\d.e-]+, top-1 agreement [\d.]+ %, "
                     r"accuracy [\d.]+ %, before [\d.]+ % ok$", out, re.M)
    assert re.search(r"^speed .* ms fp32, ratio [\d.]+ ", out, re.M)
    size = (tmp_path / "m.onnx").stat().st_size / (tmp_path / "fp32.onnx").stat().st_size
    assert 0.25 < size < 0.75  # a tiny network: half and a quarter, and the nodes
    assert metadata(tmp_path / "m.onnx")["precision"] == precision
    monkeypatch.setattr(export, "AGREE", 100.1)
    (tmp_path / "m.onnx").unlink()
    assert "no file was written" in run("runs/a", "-o", tmp_path / "m.onnx", "--precision", precision, status=1)
    assert not list(tmp_path.glob("m.onnx*"))


def test_int8_stands_where_it_should(run, runs, tmp_path):
    """The blocks' matrices alone are int8; q, k and v share one rounding of their input."""
    run("runs/a", "-o", tmp_path / "m.onnx", "--precision", "int8", "--force")
    proto = onnx.load(tmp_path / "m.onnx")
    integers = {each.name for each in proto.graph.initializer if each.data_type == onnx.TensorProto.INT8 and len(each.dims) > 1}
    assert integers == {f"blocks.{i}.{name}.weight_quantized" for i in (0, 1)
                        for name in ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
                        if (i, name) != (0, "mlp.fc2")}
    rounded = [node.input[0] for node in proto.graph.node if node.op_type == "DynamicQuantizeLinear"]
    assert sorted(rounded) == ["blocks.0.attn.heads", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.attn.heads",
                               "blocks.1.mlp.act", "blocks.1.norm1", "blocks.1.norm1.class", "blocks.1.norm2"]
    assert (proto.ir_version, proto.opset_import[0].version) == (8, 17)


@pytest.mark.parametrize("damage", [0.01, float("nan")])
def test_a_missed_limit_leaves_no_file(run, runs, tmp_path, monkeypatch, damage):
    """A graph that isn't the network, even by a hundredth in one logit."""
    def merge(model):
        model.head.bias[3] += damage
        return 0

    monkeypatch.setattr(adaptertune, "merge", merge)
    assert "no file was written" in run("runs/a", "-o", tmp_path / "m.onnx", status=1)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ swappable adapters


def test_one_session_serves_two_tasks(run, runs, tmp_path, monkeypatch):
    """Rank 4 in every block, rank 8 in every second and a head alone, on one session: each as its own torch model."""
    out = run("runs/a", "--swappable", "-o", tmp_path)
    assert f"saved    {tmp_path}/backbone.onnx" in out
    assert out.count("top-1 agreement 100 % ok") == 2
    before = (tmp_path / "backbone.onnx").stat().st_mtime_ns
    for name in ("b", "head"):
        assert "backbone.onnx (" not in run(f"runs/{name}", "--swappable", "-o", tmp_path)
    assert (tmp_path / "backbone.onnx").stat().st_mtime_ns == before
    session = export.session(tmp_path / "backbone.onnx")
    models = {name: train.open_run(cli.parse(["--eval", f"runs/{name}"])[0]) for name in ("a", "b", "head")}
    x = next(models["a"].batches.eval(models["a"].data.test, 1.0))[0]
    with torch.inference_mode():
        for name in ("a", "b", "a", "head", "b"):
            got = export.in_onnxruntime(session, tmp_path / f"{name}.onnx_adapter")(x.numpy())[0]
            assert np.abs(got - models[name].model.eval()(x).numpy()).max() < 1e-4
        bare = export.in_onnxruntime(session)(x.numpy())[0]
        assert np.abs(bare - vit.load(models["a"].options.weights)[0](x).numpy()).max() < 1e-4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.onnx_adapter").rename("flowers.onnx_adapter")
    scope = {"onnxruntime": onnxruntime, "image": x.numpy()}
    exec(SNIPPETS[1], scope)  # README's lines
    assert np.abs(scope["logits"] - models["b"].model(x).detach().numpy()).max() < 1e-4
    (tmp_path / "flowers.onnx_adapter").rename("b.onnx_adapter")
    for name in ("a", "b", "head"):
        path = tmp_path / f"{name}.onnx_adapter"
        parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        assert path.stat().st_size < 1.1 * sum(value.numpy().nbytes for value in parameters.values()) + 3000  # tiny ones
    assert {path.suffix for path in tmp_path.iterdir()} == {".onnx", ".onnx_adapter"}


def test_another_backbones_adapter_is_refused(run, runs, tmp_path, monkeypatch):
    """By export.py with a reason, and by onnxruntime itself in any language, before it gives a label."""
    run("runs/a", "--swappable", "-o", tmp_path)
    other = write_tiny(tmp_path / "other.safetensors", seed=1)
    assert train.main(["--weights", str(other), "--epochs", "1", "--limit", "40", "--name", "other"]) == 0
    (tmp_path / "second").mkdir()
    run("runs/other", "--swappable", "-o", tmp_path / "second")
    save_png(tmp_path / "x.png")
    error = run("--run", tmp_path / "backbone.onnx", "--adapter", tmp_path / "second/other.onnx_adapter", tmp_path / "x.png",
                status=1)
    assert re.search(r"other.onnx_adapter is for\.[0-9a-f]{16}\.16px\.block\.gelu; .*backbone.onnx takes adapters for\.", error)
    with pytest.raises(Exception, match="Invalid input name: for"):
        export.in_onnxruntime(export.session(tmp_path / "backbone.onnx"), tmp_path / "second/other.onnx_adapter")(
            np.zeros((1, 3, 16, 16), np.float32))
    for arguments in (["runs/other"], ["runs/a", "--opset", 20]):
        assert "of another backbone or has other options" in run(*arguments, "--swappable", "-o", tmp_path, status=1)
    assert "has more than adapters and a linear head" in run("runs/full", "--swappable", "-o", tmp_path, status=1)


# ------------------------------------------------------------------------------------------------- without torch, by errors


def without_torch(*arguments, cwd):
    """export.py in a process where torch, onnx and safetensors can't be imported: (status, output, errors)."""
    script = "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'safetensors'])); import export; " \
             "sys.exit(export.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT)}, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory, tiny_weights):
    """A run on a folder of PNG photos of many sizes."""
    image = pytest.importorskip("PIL.Image")
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for channel, name in enumerate(("apple", "leaf", "sky")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(20):
            values = generator.integers(0, 200, (20 + i, 60 - i, 3), dtype=np.uint8)
            values[..., channel] += 50
            image.fromarray(values).save(folder / "photos" / name / f"{i:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--dataset", "photos", "--weights", str(tiny_weights), "--epochs", "3", "--name", "p"]) == 0
    return folder


@pytest.mark.parametrize("options", [[], ["--input", "uint8", "--output", "probabilities"], ["--batch", 3], ["--resize"],
                                     ["--swappable", "-o", "."]])
def test_labels_without_torch_are_torchs(photo_run, monkeypatch, capsys, options):
    monkeypatch.chdir(photo_run)
    assert export.main(["runs/p", *map(str, options)]) == 0
    task = train.open_run(cli.parse(["--eval", "runs/p"])[0])
    names = task.data.test.names
    graph = ["backbone.onnx", "--adapter", "p.onnx_adapter"] if "--swappable" in options else ["runs/p/model.onnx"]
    status, out, error = without_torch("--run", *graph, *(f"photos/{name}" for name in names), cwd=photo_run)
    assert (status, error) == (0, ""), error
    with torch.inference_mode():
        x = torch.cat([x for x, _ in task.batches.eval(task.data.test, task.data.center)])
        expected = task.model.eval()(x).softmax(dim=1)
    for line, name, wanted in zip(out.splitlines(), names, expected, strict=True):
        path, *labels = line.split("  ")
        assert path == f"photos/{name}"
        assert len(labels) == 3
        shown = {part.split()[0]: float(part.split()[1]) for part in labels}
        tolerance = 0.01 if "--resize" in options else 0.001  # with --resize there is no rounding to whole pixel values
        assert all(abs(shown[label] - p) < tolerance for label, p in zip(task.data.classes, wanted.tolist(), strict=True))


def test_the_ten_lines_of_the_readme(photo_run, monkeypatch, capsys, tmp_path):
    """README's Python, as it stands there and without torch, says what export.py --run says."""
    code = SNIPPETS[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(photo_run)
    assert export.main(["runs/p", "--resize", "--output", "probabilities", "-o", str(tmp_path)]) == 0
    photos = [str(path) for path in sorted((photo_run / "photos").rglob("*.png"))[::7]]
    script = "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx'])); exec(sys.argv.pop(1))"
    done = subprocess.run([sys.executable, "-c", script, code, *photos], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, out, _ = without_torch("--run", tmp_path / "model.onnx", *photos, cwd=tmp_path)
    assert [line.split() for line in done.stdout.splitlines()] == [line.split()[:3] for line in out.splitlines()]


def test_top_k_labels(run, runs, tmp_path):
    save_png(tmp_path / "x.png")
    for options, form in (["--output", "probabilities"], r"0\.\d{3}"), ([], r"-?\d+\.\d{3}"):
        run("runs/a", "-o", tmp_path / "m.onnx", "--top-k", 2, *options)
        assert re.fullmatch(rf"\S+x.png  \d {form}  \d {form}\n", run("--run", tmp_path / "m.onnx", tmp_path / "x.png"))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_photos_that_arent(run, tmp_path, content):
    pytest.importorskip("PIL")
    run("runs/a", "-o", tmp_path / "m.onnx", "--input", "uint8")
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    assert "can't read" in run("--run", tmp_path / "m.onnx", path, status=1)


@pytest.mark.parametrize("array", [np.zeros((1, 16, 16, 4), np.uint8), np.zeros((1, 16, 16, 3), np.float32),
                                   np.zeros((1, 0, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)])
def test_pixels_that_arent(run, tmp_path, array):
    """Wrong channels, type, size or rank: the runtime refuses them by itself, in any language."""
    run("runs/a", "-o", tmp_path / "m.onnx", "--input", "uint8")
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        export.session(tmp_path / "m.onnx").run(None, {"image": array})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_photos_of_other_modes(run, tmp_path, mode):
    image = pytest.importorskip("PIL.Image")
    run("runs/a", "-o", tmp_path / "m.onnx")
    image.new(mode, (40, 30)).save(tmp_path / "x.png")
    assert run("--run", tmp_path / "m.onnx", tmp_path / "x.png").count(" 0.") >= 1


@pytest.mark.parametrize(("arguments", "status", "message"), [
    ([], 2, "the following arguments are required"),
    (["runs/none"], 2, "no run in runs/none"),
    (["runs/a", "runs/b"], 2, "one run at a time, not runs/a, runs/b"),
    (["runs/a", "--opset", "19"], 2, "invalid choice: .?19"),
    (["runs/a", "--resize", "--opset", "17"], 2, "--resize needs --opset 18"),
    (["runs/a", "--resize", "--input", "float"], 2, "leave out --input float"),
    (["runs/a", "--top-k", "2", "--output", "embedding"], 2, "an embedding has none"),
    (["runs/a", "--batch", "-1"], 2, "count from 0"),
    (["runs/a", "--top-k", "11"], 1, "--top-k 11: there are 10 classes"),
    (["runs/a", "--swappable", "--precision", "int8"], 2, "--swappable is fp32"),
    (["runs/a", "--bogus"], 2, "unrecognized arguments: --bogus"),
    (["runs/a", "--weights", "gone.safetensors"], 1, "no weights at gone.safetensors"),
    (["runs/a", "-o", "/proc/nowhere/model.onnx"], 1, "/proc/nowhere"),
    (["runs/a", "-o", "runs/a/config.json/model.onnx"], 1, "Not a directory|exists"),
    (["--run", "gone.onnx", "x.png"], 1, "can't load gone.onnx"),
    (["--run", "runs/a/config.json", "x.png"], 1, "can't load runs/a/config.json"),
])
def test_errors_are_one_line(run, runs, arguments, status, message):
    before = sorted(runs.rglob("*"))
    assert re.search(message, run(*arguments, status=status))
    assert sorted(runs.rglob("*")) == before


def test_a_run_without_its_adapters(run, runs, tmp_path):
    (runs / "runs/empty").mkdir()
    (runs / "runs/empty/config.json").write_text((runs / "runs/a/config.json").read_text())
    assert "no weights at runs/empty/adapters.safetensors" in run("runs/empty", status=1)
    assert [path.name for path in (runs / "runs/empty").iterdir()] == ["config.json"]


def test_a_graph_without_labels(run, tmp_path):
    run("runs/a", "-o", tmp_path / "m.onnx", "--output", "embedding")
    run("runs/a", "--swappable", "-o", tmp_path)
    save_png(tmp_path / "x.png")
    assert "gives no labels" in run("--run", tmp_path / "m.onnx", tmp_path / "x.png", status=1)
    assert "give the task's --adapter" in run("--run", tmp_path / "backbone.onnx", tmp_path / "x.png", status=1)
    graph(network())
    onnx.save(graph(network())[1], tmp_path / "other.onnx")
    assert "gives no labels" in run("--run", tmp_path / "other.onnx", tmp_path / "x.png", status=1)
    error = run("--run", tmp_path / "m.onnx", "--adapter", tmp_path / "x.png", tmp_path / "x.png", status=1)
    assert "x.png is no adapter" in error
