"""What int8 costs and brings on a trained run, part by part: top-1 agreement with fp32, accuracy, the error of the logits, and
the time on one thread (CPU time, all called in turn, ratio of medians to fp32).

    python tests/bench_int8.py runs/NAME [--images 2000] [--rounds 40] [options of train.py that say where things are]

onnxruntime's own quantiser is there as the reference; "equalised" and "rounded" are adaptertune.equalise and to_int8.
"""
import argparse
import copy
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic

sys.path.insert(0, str(Path(__file__).parent.parent))
import adaptertune  # noqa: E402
import export  # noqa: E402
import train  # noqa: E402


def batches(run, images):
    """All of `images` as the network takes them."""
    return torch.cat([x for x, _ in run.batches.eval(images, run.data.center)])


def by_onnxruntime(proto):
    """onnxruntime's dynamic quantisation of the same matrices, per channel."""
    names = [node.name for node in proto.graph.node if re.search(r"\.attn\.(qkv|proj)|\.mlp\.fc", node.name)]
    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(proto, f"{folder}/q.onnx", op_types_to_quantize=["MatMul"], nodes_to_quantize=names, per_channel=True)
        return onnx.load(f"{folder}/q.onnx")


def variants(run):
    """Name: model."""
    few = batches(run, run.data.train[torch.linspace(0, len(run.data.train) - 1, 64).long()])
    plain, equal = copy.deepcopy(run.model), copy.deepcopy(run.model)
    grams = {"plain": {name: gram for name, (_, _, gram) in adaptertune.observe(plain, few).items()},
             "equal": adaptertune.equalise(equal, few)}

    def proto(model, grams=None, leave=""):
        kept = {name: gram for name, gram in (grams or {}).items() if not (leave and re.search(leave, name))}
        return export.to_model(export.Graph(17, grams=kept), model, run.meta)

    return {"fp32": proto(plain), "onnxruntime's quantiser": by_onnxruntime(proto(plain)),
            "rounded only": proto(plain, grams["plain"]), "equalised only": by_onnxruntime(proto(equal)),
            "equalised and rounded": proto(equal, grams["equal"]),
            "ours: without fc2 of block 0": proto(equal, grams["equal"], r"blocks\.0\.mlp\.fc2"),
            "without fc2 of blocks 0 and 8": proto(equal, grams["equal"], r"blocks\.[08]\.mlp\.fc2"),
            "without any fc2": proto(equal, grams["equal"], "fc2"), "without any fc1": proto(equal, grams["equal"], "fc1"),
            "without any qkv": proto(equal, grams["equal"], "qkv")}


def session(proto, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=40)
    options, more = parser.parse_known_args()
    run = train.open_run(train.parse(["--eval", options.run, "--device", "cpu", *more]))
    run.model.eval().requires_grad_(False)
    run.meta.update(input="float", resize=False, output="logits", top_k=0, batch=0)
    test = run.data.test[torch.linspace(0, len(run.data.test) - 1, min(options.images, len(run.data.test))).long()]
    images, labels, protos = batches(run, test).numpy(), test.labels.numpy(), variants(run)

    singles = {name: session(proto, 1) for name, proto in protos.items()}
    times = {name: [] for name in protos}
    for i in range(options.rounds + 3):
        for name in list(protos)[i % len(protos):] + list(protos)[:i % len(protos)]:
            started = time.process_time()
            singles[name].run(None, {"image": images[:1]})
            times[name] += [time.process_time() - started] * (i >= 3)
    medians, logits = {name: statistics.median(each) for name, each in times.items()}, {}
    print(f"{options.run}, {len(images):,} test images, onnxruntime {onnxruntime.__version__}, time of batch 1 on one thread")
    print(f"{'variant':32}{'agreement %':>12}{'accuracy %':>12}{'error':>8}{'time':>7}{'MB':>7}")
    for name, proto in protos.items():
        graph = session(proto, 0)
        logits[name] = np.concatenate([graph.run(None, {"image": image[None]})[0] for image in images])
        same = (logits[name].argmax(axis=1) == logits["fp32"].argmax(axis=1)).mean()
        right = (logits[name].argmax(axis=1) == labels).mean()
        error = np.sqrt(np.square(logits[name] - logits["fp32"]).mean())
        print(f"{name:32}{100 * same:12.2f}{100 * right:12.2f}{error:8.3f}{medians[name] / medians['fp32']:7.2f}"
              f"{proto.ByteSize() / 1e6:7.1f}", flush=True)


if __name__ == "__main__":
    main()
