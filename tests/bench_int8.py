"""What int8 costs and brings on a trained run, part by part: top-1 agreement with fp32, accuracy, the error of the logits, and
the time on one thread (CPU time, all called in turn, ratio of medians to fp32).

    python tests/bench_int8.py runs/NAME [--images 2000] [--rounds 40] [options of train.py that say where things are]

All are made by onnxruntime's dynamic quantiser, per channel; "equalised" is adaptertune.equalise before it, "without" leaves
matrices in fp32.
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
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import adaptertune  # noqa: E402
import cli  # noqa: E402
import export  # noqa: E402
import train  # noqa: E402


def batches(run, images):
    """All of `images` as the network takes them."""
    return torch.cat([x for x, _ in run.batches.eval(images, run.data.center)])


def variants(run):
    """Name: model."""
    few = batches(run, run.data.train[torch.linspace(0, len(run.data.train) - 1, 64).long()])

    def proto(share=None, leave=r"blocks\.0\.mlp\.fc2"):
        """In int8, of inputs equalised by `share` or (None) as they are, all but the matrices that `leave` matches."""
        model = copy.deepcopy(run.model)
        if share is not None:
            adaptertune.equalise(model, few, share)
        export.INT8 = re.compile(rf"(?!{leave})blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc)")
        with tempfile.TemporaryDirectory() as folder:
            return export.to_int8(export.to_model(export.Graph(17), model, run.meta), Path(folder, "int8.onnx"))

    return {"fp32": export.to_model(export.Graph(17), copy.deepcopy(run.model), run.meta),
            "the quantiser alone": proto(None, "none"), "without fc2 of block 0": proto(None),
            "equalised": proto(0.7, "none"), "ours: both": proto(0.7), "share 0.5": proto(0.5), "share 0.9": proto(0.9),
            "without fc2 of blocks 0 and 8": proto(0.7, r"blocks\.[08]\.mlp\.fc2"), "without any fc2": proto(0.7, r".*fc2"),
            "without any fc1": proto(0.7, r".*fc1"), "without any qkv": proto(0.7, r".*qkv")}


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
    run = train.open_run(cli.parse(["--eval", options.run, "--device", "cpu", *more])[0])
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
