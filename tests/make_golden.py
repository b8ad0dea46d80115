"""Write tests/golden/*.safetensors, with which test_parity.py checks vit.py without the libraries.

Each file holds a tiny random network of one family in its library's format, an input, and the
library's output for that input. Run this by hand after adding a family:

    pip install timm transformers open_clip_torch torchvision
    python tests/make_golden.py FAMILY      # without FAMILY: all of them
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import references
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"


@torch.no_grad()
def write(name, made_with):
    """Write one family's file: its floating-point weights in fp16, input and output in fp32."""
    state, reference, options = references.FAMILIES[name]()
    tensors = {}
    for key, value in state.items():
        if value.is_floating_point():
            value = value.half()
        tensors[key] = value.contiguous()
    output = reference(references.images())
    tensors["golden.input"] = references.images()
    tensors["golden.output"] = output.contiguous()
    meta = {"golden": json.dumps({"options": options, "made_with": made_with})}
    save_file(tensors, GOLDEN / f"{name}.safetensors", metadata=meta)
    print(f"{name:24} {tuple(output.shape)}  |output| {output.abs().mean():.2f}")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # so that the files are the same each time
    packages = ("torch", "timm", "transformers", "open_clip_torch", "torchvision")
    versions = {package: version(package) for package in packages}
    for family in sys.argv[1:] or references.FAMILIES:
        write(family, versions)
