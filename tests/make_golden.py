"""Write tests/golden/*.safetensors: a tiny random network of each family, as its library stores it, with an input and the
library's own output for it. Run by hand when a family is added:

    pip install timm transformers open_clip_torch
    python tests/make_golden.py
"""
import json
from importlib.metadata import version
from pathlib import Path

import references
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # so that the files come out the same each time
    made_with = {name: version(name) for name in ("torch", "timm", "transformers", "open_clip_torch")}
    for name, build in references.FAMILIES.items():
        state, reference, options = build()
        with torch.no_grad():
            output = reference(references.images())
        tensors = {key: value.half().contiguous() if value.is_floating_point() else value.contiguous()
                   for key, value in state.items()}
        tensors |= {"golden.input": references.images(), "golden.output": output.contiguous()}
        save_file(tensors, GOLDEN / f"{name}.safetensors",
                  metadata={"golden": json.dumps({"options": options, "made_with": made_with})})
        print(f"{name:24} {tuple(output.shape)}  |output| {output.abs().mean():.2f}")
