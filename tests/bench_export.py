"""How fast the exported graph is: DeiT-tiny's shape, rank-8 adapters in every block, 100 classes, random weights (which don't
change the time). One thread, CPU time of the process; all variants are called in turn, round after round, after a warm-up;
the figures are medians and ratios of medians, and of several processes (which differ by more than a round does: memory lies
elsewhere) the median and the range. torch's own exporter takes part where onnxscript is installed.

    python tests/bench_export.py [--batch 1] [--rounds 60] [--processes 5] [--rank 8] [--only "no adapters,merged adaptformer"]
"""
import argparse
import copy
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import adaptertune  # noqa: E402
import export  # noqa: E402
import vit  # noqa: E402

META = {"input": "float", "resize": False, "output": "logits", "top_k": 0, "batch": 0, "backbone": "deit_ti16"}


def network(rank, **kind):
    """The adapted network, with adapters that do something; no adapters for rank 0."""
    torch.manual_seed(0)
    model = vit.ViT(vit.BACKBONES["deit_ti16"].config)
    model.init_weights()
    if rank:
        adaptertune.add_adapters(model, rank=rank, placement=range(12), **kind)
    adaptertune.add_head(model, 100)
    for name, parameter in model.named_parameters():
        if adaptertune.is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def runner(model, adapter=None):
    """A function of the image by onnxruntime on one thread; `model` is a proto or a path."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model if isinstance(model, str) else model.SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    run_options, lora = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if adapter:
        lora.Load(adapter)
        run_options.add_active_adapter(lora)
    return lambda image, keep=lora: session.run(None, {"image": image}, run_options)


def swappable(model, folder):
    """The swappable graph with this model's adapter active."""
    meta, g, own = META | {"swappable": "for.bench"}, export.Graph(17), export.Graph(17)
    proto = export.to_model(g, adaptertune.neutral(model, reads="block", act="gelu"), meta)
    export.write_vit(own, model, META)
    file = onnxruntime.AdapterFormat()
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(own.constants[name]) for name in export.swapped(own)})
    file.export_adapter(f"{folder}/a.onnx_adapter")
    return runner(proto, f"{folder}/a.onnx_adapter")


def by_torchs_exporter(model, folder):
    """torch.onnx.export, or None without onnxscript."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(2, 3, 224, 224),), f"{folder}/dynamo.onnx", dynamo=True, opset_version=18,
                          input_names=["image"], verbose=False, dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    return runner(f"{folder}/dynamo.onnx")


def products(model, image):
    """The matrix products of torch's network alone, by torch: what no runtime in fp32 saves, but for the last block's."""
    pairs = []
    hooks = [module.register_forward_hook(lambda layer, x, _: pairs.append((x[0].flatten(0, -2), layer.weight.T)))
             for module in model.modules() if isinstance(module, torch.nn.Linear)]
    model(image)
    for hook in hooks:
        hook.remove()
    B, N, H, d = len(image), 1 + model.config.grid ** 2, model.config.heads, model.config.width // model.config.heads
    q, scores = torch.randn(B, H, N, d), torch.randn(B, H, N, N)
    pairs += [(q, q.mT), (scores, q)] * model.config.depth
    return torch.inference_mode()(lambda _: [a @ b for a, b in pairs])


def int8(model, folder):
    """The graph in int8, equalised on noise, which doesn't change the time."""
    model = copy.deepcopy(model)
    adaptertune.equalise(model, torch.randn(4, 3, 224, 224))
    return export.to_int8(export.to_model(export.Graph(17), model, META), Path(folder, "int8.onnx"))


def variants(rank, folder, only, image):
    """Name: function of an image, of those that `only` names, or all."""
    def proto(model, opset=17):
        return export.to_model(export.Graph(opset), model, META)

    model, merged = network(rank), network(rank, reads="ln", act="mlp")
    adaptertune.merge(merged)

    @torch.inference_mode()
    def eager(image):
        return [model(torch.from_numpy(image)).numpy()]

    makers = {"no adapters": lambda: runner(proto(network(0))), "opset 17": lambda: runner(proto(model)),
              "opset 20": lambda: runner(proto(model, 20)), "opset 23": lambda: runner(proto(model, 23)),
              "swappable": lambda: swappable(model, folder), "merged adaptformer": lambda: runner(proto(merged)),
              "int8": lambda: runner(int8(model, folder)), "torch eager": lambda: eager,
              "products": lambda: products(model, torch.from_numpy(image)),
              "torch.onnx.export": lambda: by_torchs_exporter(copy.deepcopy(model), folder)}
    found = {name: make() for name, make in makers.items() if not only or name in only.split(",")}
    return {name: function for name, function in found.items() if function}


def measure(options):
    """Print a line for each variant, from this process."""
    torch.set_num_threads(1)
    image = np.random.default_rng(0).standard_normal((options.batch, 3, 224, 224), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        functions = variants(options.rank, folder, options.only, image)
        expected = network(options.rank)(torch.from_numpy(image)).numpy()
        for name in set(functions) - {"no adapters", "merged adaptformer", "int8", "products"}:
            assert np.abs(functions[name](image)[0] - expected).max() < 1e-4, name
        times, names = {name: [] for name in functions}, list(functions)
        for i in range(options.rounds + 3):
            for name in names[i % len(names):] + names[:i % len(names)]:  # nobody always runs after the same one
                started = time.process_time()
                functions[name](image)
                if i >= 3:
                    times[name].append(time.process_time() - started)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, base, what in [
            ("opset 17", "no adapters", "over the bare backbone"),
            ("merged adaptformer", "no adapters", "over the bare backbone"),
            ("opset 20", "opset 17", "over opset 17"), ("opset 23", "opset 17", "over opset 17"),
            ("swappable", "opset 17", "over baked in"), ("int8", "opset 17", "over fp32"),
            ("torch.onnx.export", "opset 17", "over ours"), ("torch eager", "opset 17", "over ours"),
            ("products", "opset 17", "over ours"), ("torch eager", "products", "over its matrix products alone")]:
        if name in medians and base in medians:
            print(f"{name}|{1000 * medians[name]:.2f}|{medians[name] / medians[base]:.4f}|{what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--processes", type=int, default=5, help="0: measure in this one")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--only", default="", help="variants by name, with commas between")
    options = parser.parse_args()
    if not options.processes:
        measure(options)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--processes", "0"]
    outs = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout for _ in range(options.processes)]
    rows = zip(*([line.split("|") for line in out.splitlines() if line.count("|") == 3] for out in outs), strict=True)
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}, 1 thread, "
          f"batch {options.batch}, rank {options.rank}, {options.rounds} rounds, {options.processes} processes, CPU time")
    for row in rows:
        (name, _, _, what), ratios = row[0], [float(ratio) for _, _, ratio, _ in row]
        milliseconds = statistics.median(float(ms) for _, ms, _, _ in row)
        print(f"{name:20}{milliseconds:8.2f} ms   {statistics.median(ratios):.3f} {what} "
              f"({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
