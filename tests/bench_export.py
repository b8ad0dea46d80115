"""How fast the exported graph is, compared with torch and torch's own exporter.

    python tests/bench_export.py [--batch 1] [--rounds 60] [--processes 5] [--rank 8]
                                 [--only "no adapters,merged adaptformer"]

DeiT-tiny's shape, rank-8 adapters in every block, 100 classes, random weights (which don't change
the time). One thread, CPU time of the process. After a warm-up, each round calls all variants in
turn. Each process gives medians and ratios of medians; the table shows their median and range over
processes, which differ more than rounds do because their memory is laid out differently. torch's
own exporter is included if onnxscript is installed.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune
import export
import vit

META = {
    "method": "adaptertune",
    "backbone": "deit_ti16",
    "center": 7 / 8,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "input": "float",
    "resize": False,
    "output": "logits",
    "precision": "fp32",
    "dataset": "noise",
    "classes": [str(i) for i in range(100)],
    "batch": 0,
}
WARM_UP = 3  # rounds that aren't timed
VARIANTS = (
    "no adapters",
    "opset 17",
    "opset 20",
    "opset 23",
    "swappable",
    "merged adaptformer",
    "int8",
    "torch eager",
    "products",
    "torch.onnx.export",
)
# Another network than the adapted one, or another precision: the logits aren't compared.
DIFFERENT = ("no adapters", "merged adaptformer", "int8", "products")
# Variant, the variant that its time is divided by, and what to call the ratio.
RATIOS = (
    ("opset 17", "no adapters", "over the bare backbone"),
    ("merged adaptformer", "no adapters", "over the bare backbone"),
    ("opset 20", "opset 17", "over opset 17"),
    ("opset 23", "opset 17", "over opset 17"),
    ("swappable", "opset 17", "over baked in"),
    ("int8", "opset 17", "over fp32"),
    ("torch.onnx.export", "opset 17", "over ours"),
    ("torch eager", "opset 17", "over ours"),
    ("products", "opset 17", "over ours"),
    ("torch eager", "products", "over its matrix products alone"),
)

# ---------------------------------------------------------------------------------- the variants


def network(rank: int, **settings) -> vit.ViT:
    """The adapted network, with adapters that aren't zero; no adapters for rank 0."""
    torch.manual_seed(0)
    model = vit.ViT(vit.BACKBONES["deit_ti16"].config)
    model.init_weights()
    if rank:
        adaptertune.add_adapters(model, rank, **settings)
    adaptertune.add_head(model, 100)
    for name, parameter in model.named_parameters():
        if adaptertune.is_added(name):
            nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def to_proto(model: vit.ViT, opset: int = 17) -> onnx.ModelProto:
    """The network as an ONNX model."""
    return export.to_model(export.Graph(opset), model, META)


def in_onnxruntime(model: bytes | str, adapter: str = "") -> Callable:
    """A function that runs a model on an image, in onnxruntime on one thread.

    Args:
        model: a serialised ONNX model, or its path.
        adapter: path of an .onnx_adapter to activate.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    run_options = onnxruntime.RunOptions()
    lora = onnxruntime.LoraAdapter()
    if adapter:
        lora.Load(adapter)
        run_options.add_active_adapter(lora)

    def call(image: np.ndarray, keep=lora) -> list[np.ndarray]:  # the options don't keep it alive
        return session.run(None, {export.INPUT: image}, run_options)

    return call


def swappable(model: vit.ViT, folder: str) -> Callable:
    """The swappable graph with this model's adapter active."""
    empty = export.with_empty_adapters(model, reads="block", act="gelu")
    meta = META | {"swappable": "for.bench"}
    proto = export.to_model(export.Graph(17), empty, meta)
    graph = export.Graph(17)
    export.write_vit(graph, model, META)
    values = {name: graph.constants[name] for name in export.swapped_inputs(graph)}
    path = Path(folder, "bench.onnx_adapter")
    export.save_adapter(values, path)
    return in_onnxruntime(proto.SerializeToString(), str(path))


def int8(model: vit.ViT, folder: str) -> Callable:
    """The graph in int8, equalised on noise, which doesn't change the time."""
    model = copy.deepcopy(model)
    export.equalise(model, torch.randn(4, 3, 224, 224))
    proto = export.to_int8(to_proto(model), Path(folder, "int8.onnx"))
    return in_onnxruntime(proto.SerializeToString())


def merged_adaptformer(rank: int) -> Callable:
    """A network whose adapters are merged into its MLPs."""
    model = network(rank, reads="ln", act="mlp")
    adaptertune.merge(model)
    return in_onnxruntime(to_proto(model).SerializeToString())


def in_torch(model: vit.ViT) -> Callable:
    """torch's own forward pass."""

    @torch.inference_mode()
    def call(image: np.ndarray) -> list[np.ndarray]:
        return [model(torch.from_numpy(image)).numpy()]

    return call


def by_torchs_exporter(model: vit.ViT, folder: str) -> Callable | None:
    """torch.onnx.export's graph; None without onnxscript."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        return None
    path = f"{folder}/dynamo.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(model),
            (torch.zeros(2, 3, 224, 224),),
            path,
            dynamo=True,
            opset_version=18,
            input_names=[export.INPUT],
            verbose=False,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    return in_onnxruntime(path)


def products(model: vit.ViT, image: np.ndarray) -> Callable:
    """Only the matrix products of torch's network, in torch. No fp32 runtime can avoid them, except
    some of the last block's."""
    pairs = []

    def note(layer: nn.Linear, inputs: tuple[Tensor], _) -> None:
        pairs.append((inputs[0].flatten(0, -2), layer.weight.T))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(note))
    model(torch.from_numpy(image))
    for hook in hooks:
        hook.remove()

    B = len(image)
    N = 1 + model.config.grid**2
    H = model.config.heads
    d = model.config.width // H
    q = torch.randn(B, H, N, d)
    scores = torch.randn(B, H, N, N)
    for _ in range(model.config.depth):
        pairs.append((q, q.mT))
        pairs.append((scores, q))

    @torch.inference_mode()
    def multiply(_) -> list[Tensor]:
        return [a @ b for a, b in pairs]

    return multiply


def make(name: str, model: vit.ViT, rank: int, folder: str, image: np.ndarray) -> Callable | None:
    """A variant by name, as a function of the image; None if it isn't available here."""
    if name == "swappable":
        return swappable(model, folder)
    if name == "merged adaptformer":
        return merged_adaptformer(rank)
    if name == "int8":
        return int8(model, folder)
    if name == "torch eager":
        return in_torch(model)
    if name == "products":
        return products(model, image)
    if name == "torch.onnx.export":
        return by_torchs_exporter(model, folder)
    if name == "no adapters":
        proto = to_proto(network(0))
    else:
        proto = to_proto(model, opset=int(name.removeprefix("opset ")))
    return in_onnxruntime(proto.SerializeToString())


# --------------------------------------------------------------------------------------- timings


def time_in_turn(functions: dict[str, Callable], image: np.ndarray, rounds: int) -> dict:
    """The median of each function's CPU time, in seconds."""
    names = list(functions)
    times = {name: [] for name in names}
    for i in range(rounds + WARM_UP):
        first = i % len(names)  # so that no variant always follows the same other one
        for name in names[first:] + names[:first]:
            started = time.process_time()
            functions[name](image)
            if i >= WARM_UP:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(options: argparse.Namespace) -> None:
    """Print "name|milliseconds|ratio|what the ratio is" for each variant, from this process."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((options.batch, 3, 224, 224), np.float32)
    model = network(options.rank)
    expected = model(torch.from_numpy(image)).numpy()
    functions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(",") if options.only else VARIANTS:
            function = make(name, model, options.rank, folder, image)
            if function is not None:
                functions[name] = function
        for name, function in functions.items():
            if name not in DIFFERENT:
                assert np.abs(function(image)[0] - expected).max() < 1e-4, name
        medians = time_in_turn(functions, image, options.rounds)
    for name, base, what in RATIOS:
        if name in medians and base in medians:
            ratio = medians[name] / medians[base]
            print(f"{name}|{1000 * medians[name]:.2f}|{ratio:.4f}|{what}")


def in_own_process() -> list[list[str]]:
    """Run `measure` in a process of its own; the rows that it prints, split into columns."""
    command = [sys.executable, __file__, *sys.argv[1:], "--processes", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 4]  # torch's exporter prints lines of its own


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--processes", type=int, default=5, help="0: measure in this process")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--only", default="", help="names of variants, comma-separated")
    options = parser.parse_args()
    unknown = set(filter(None, options.only.split(","))) - set(VARIANTS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: choose {', '.join(VARIANTS)}")
    if not options.processes:
        measure(options)
        return
    by_process = [in_own_process() for _ in range(options.processes)]
    print(
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"Python {platform.python_version()}, 1 thread, batch {options.batch}, "
        f"rank {options.rank}, {options.rounds} rounds, {options.processes} processes, CPU time"
    )
    for same_row in zip(*by_process, strict=True):
        name, _, _, what = same_row[0]
        milliseconds = statistics.median(float(row[1]) for row in same_row)
        ratios = [float(row[2]) for row in same_row]
        spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name:20}{milliseconds:8.2f} ms   {statistics.median(ratios):.3f} {what} {spread}")


if __name__ == "__main__":
    main()
