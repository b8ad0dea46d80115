"""Label photos with an ONNX file of export.py. Needs no torch and no onnx: copy it to the device.

    pip install onnxruntime pillow
    python label.py model.onnx photo.jpg …
    python label.py backbone.onnx --adapter flowers.onnx_adapter photo.jpg …

Class names, image size, normalisation and the form of input and output are read from the file.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import onnxruntime
from PIL import Image


def upright_rgb(image):
    """An opened photo as 8-bit RGB: 16-bit grey scaled, transparency over white, turned as its
    EXIF orientation says."""
    orientation = image.getexif().get(0x0112)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("32 bits a pixel, whose white may be 1, 255 or more; save it in 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image, np.float32)
        grey[grey == image.info.get("transparency", -1)] = 65_535  # white
        image = Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM}
    turns |= {5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    if orientation in turns:
        image = image.transpose(turns[orientation])
    return image.convert("RGB")


def read_photo(path, meta):
    """A photo as the graph takes it, prepared as in training: a batch of 1."""
    size = json.loads(meta["image_size"])
    side = round(size / json.loads(meta["center"]))  # 256 for 224
    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))  # JPEG: decode no larger than needed
        image = upright_rgb(image)
    if meta["resize"] == "false":  # the graph doesn't: centre square to `side` pixels, its middle
        edge = min(image.size)
        left = (image.width - edge) // 2
        top = (image.height - edge) // 2
        square = (left, top, left + edge, top + edge)
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=square)
        start = (side - size) // 2
        image = image.crop((start, start, start + size, start + size))
    pixels = np.asarray(image)[None]  # uint8 [1, height, width, 3]
    if meta["input"] == "uint8":
        return pixels
    mean = np.array(json.loads(meta["mean"]), np.float32)
    std = np.array(json.loads(meta["std"]), np.float32)
    return ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)


def load_adapter(path, meta):
    """Run options with an adapter, and the metadata of its task. An adapter has a tensor named
    after the backbone that it belongs to, which holds them."""
    try:
        tensors = onnxruntime.AdapterFormat.read_adapter(path).get_parameters()
    except RuntimeError:
        sys.exit(f"error: {path} is missing or no adapter that onnxruntime can read")
    key = "for another program"
    for name in tensors:
        if name.startswith("for."):
            key = name
    if key != meta.get("swappable"):
        sys.exit(f"error: {path} is {key}; the model takes {meta.get('swappable', 'no adapters')}")
    task = json.loads(tensors[key].numpy().tobytes())
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(path)
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    meta |= {name: json.dumps(task[name]) for name in ("classes", "center")}
    return options, adapter  # the options don't keep the adapter alive


def open_graph(path, adapter_path):
    """The session of a graph, its metadata, and run options with the adapter, if there is one."""
    for each in filter(None, (path, adapter_path)):
        if not Path(each).is_file():
            sys.exit(f"error: {each} is {'a folder' if Path(each).is_dir() else 'missing'}")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # no warnings of inputs that have a default
    try:
        session = onnxruntime.InferenceSession(path, settings)
    except Exception as error:  # onnxruntime's own kinds derive from nothing else
        sys.exit(f"error: can't load {path}: {str(error).splitlines()[0]}")
    meta = dict(session.get_modelmeta().custom_metadata_map)
    options = adapter = None
    if adapter_path:
        options, adapter = load_adapter(adapter_path, meta)
    if "image_size" not in meta:
        sys.exit(f"error: {path} is no graph of export.py: it doesn't say what it takes")
    if "classes" not in meta:
        sys.exit(f"error: {path} has no class names; give the task's --adapter")
    if meta["output"] == "embedding":
        sys.exit(f"error: {path} gives embeddings, not labels")
    return session, meta, options, adapter


def main():
    parser = argparse.ArgumentParser(description="Label photos with an ONNX file of export.py.")
    parser.add_argument("model", help="model.onnx")
    parser.add_argument("photos", nargs="+", metavar="photo")
    parser.add_argument("--adapter", metavar="FILE", help="the task's .onnx_adapter (--swappable)")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # names that a terminal can't show

    # The options don't keep the adapter alive, so it stays in a variable.
    session, meta, options, _adapter = open_graph(arguments.model, arguments.adapter)
    try:
        classes = json.loads(meta["classes"])
        batch = json.loads(meta["batch"]) or 1  # a fixed batch is filled up
    except (ValueError, KeyError):
        sys.exit(f"error: the metadata of {arguments.model} are damaged; export it again")

    for photo in arguments.photos:
        try:
            image = np.repeat(read_photo(photo, meta), batch, axis=0)
        except Exception as error:  # Pillow's decoders raise many kinds
            sys.exit(f"error: can't read {photo} as an image ({error})")
        scores = session.run(None, {"image": image}, options)[0][0]
        if len(scores) != len(classes):
            sys.exit(
                f"error: {arguments.model} names {len(classes)} classes, but has {len(scores)}"
            )
        if meta["output"] == "logits":
            scores = np.exp(scores - scores.max())
            scores /= scores.sum()
        best = np.argsort(-scores)[:3]
        print(photo, *(f"{classes[i]} {scores[i]:.3f}" for i in best), sep="  ")


if __name__ == "__main__":
    main()
