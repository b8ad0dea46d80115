"""What int8 costs and gains on a trained run: an ablation of its parts.

    python tests/bench_int8.py runs/NAME [--images 2000] [--rounds 40] [options of train.py]

For each variant it prints top-1 agreement with fp32, accuracy, the error of the logits, and the
time on one thread (CPU time, variants called in turn, ratio of medians to fp32). The options of
train.py give the new locations of files that were moved.

All variants use onnxruntime's dynamic quantiser, per channel. "equalised" runs export.equalise
first; "share" is its alpha, the share of a channel's range that moves into the weights; "without"
leaves matrices in fp32.
"""

import argparse
import copy
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import bench_export
import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import export
import train

FIRST_FC2 = r"blocks\.0\.mlp\.fc2"
# Name: the share for equalise (None: not equalised), and a pattern of the matrices left in fp32.
VARIANTS = {
    "the quantiser alone": (None, "none"),
    "without fc2 of block 0": (None, FIRST_FC2),
    "equalised": (0.7, "none"),
    "ours: both": (0.7, FIRST_FC2),
    "share 0.5": (0.5, FIRST_FC2),
    "share 0.9": (0.9, FIRST_FC2),
    "without fc2 of blocks 0 and 8": (0.7, r"blocks\.[08]\.mlp\.fc2"),
    "without any fc2": (0.7, r".*fc2"),
    "without any fc1": (0.7, r".*fc1"),
    "without any qkv": (0.7, r".*qkv"),
}

# ---------------------------------------------------------------------------------- the variants


def as_input(run: train.Run, images: data.Images) -> Tensor:
    """All of the images as the network sees them, [n, 3, S, S]."""
    batches = run.batches.eval(images, run.dataset.center)
    return torch.cat([x for x, _ in batches])


def to_int8(
    run: train.Run, images: Tensor, share: float | None, left_in_fp32: str
) -> onnx.ModelProto:
    """The run's graph in int8.

    Args:
        images: [n, 3, S, S], on which equalise is calibrated.
        share: the alpha of equalise; None to leave it out.
        left_in_fp32: pattern of the matrices that are not quantised.
    """
    model = copy.deepcopy(run.model)
    if share is not None:
        export.equalise(model, images, alpha=share)
    proto = export.to_model(export.Graph(17), model, run.meta)
    quantised = re.compile(rf"(?!{left_in_fp32})blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc)")
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(export, "INT8", quantised),
    ):
        return export.to_int8(proto, Path(folder, "int8.onnx"))


def make_variants(run: train.Run) -> dict[str, onnx.ModelProto]:
    """The graphs of fp32 and of every variant."""
    images = export.calibration_images(run)
    protos = {"fp32": export.to_model(export.Graph(17), run.model, run.meta)}
    for name, (share, left_in_fp32) in VARIANTS.items():
        protos[name] = to_int8(run, images, share, left_in_fp32)
    return protos


# ----------------------------------------------------------------------------------- the figures


def logits_of(run_graph: Callable, images: np.ndarray) -> np.ndarray:
    """Logits [n, K] of images [n, 3, S, S], one by one."""
    return np.concatenate([run_graph(image[None])[0] for image in images])


def open_run(folder: str, more: list[str]) -> train.Run:
    """A finished run, ready for export."""
    options, *_ = train.parse(["--eval", folder, "--device", "cpu", *more])
    run = train.open_run(options)
    run.model.eval().requires_grad_(False)
    run.meta |= {"input": "float", "resize": False, "output": "logits", "batch": 0}
    run.meta["precision"] = "fp32"
    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=40)
    options, more = parser.parse_known_args()
    run = open_run(options.run, more)
    count = min(options.images, len(run.dataset.test))
    index = torch.linspace(0, len(run.dataset.test) - 1, count).long()
    test = run.dataset.test[index]
    images = as_input(run, test).numpy()
    labels = test.labels.numpy()
    protos = make_variants(run)
    graphs = {}  # as functions of the image, on one thread
    for name, proto in protos.items():
        graphs[name] = bench_export.in_onnxruntime(proto.SerializeToString())
    medians = bench_export.time_in_turn(graphs, images[:1], options.rounds)

    print(
        f"{options.run}, {len(images):,} test images, onnxruntime {onnxruntime.__version__}, "
        "time of batch 1 on one thread"
    )
    print(f"{'variant':32}{'agreement %':>12}{'accuracy %':>12}{'error':>8}{'time':>7}{'MB':>7}")
    exact = logits_of(graphs["fp32"], images)
    for name, proto in protos.items():
        logits = logits_of(graphs[name], images)
        top1 = logits.argmax(axis=1)
        agreement = 100 * (top1 == exact.argmax(axis=1)).mean()
        accuracy = 100 * (top1 == labels).mean()
        error = np.sqrt(np.square(logits - exact).mean())
        ratio = medians[name] / medians["fp32"]
        megabytes = proto.ByteSize() / 1e6
        row = f"{name:32}{agreement:12.2f}{accuracy:12.2f}{error:8.3f}"
        print(f"{row}{ratio:7.2f}{megabytes:7.1f}", flush=True)


if __name__ == "__main__":
    main()
