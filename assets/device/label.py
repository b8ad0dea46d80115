"""Label photos with an ONNX file from export.py. Needs neither torch nor onnx: copy it to a device.

    pip install onnxruntime pillow (and pillow-heif for HEIC photos from phones; Python 3.10)
    python label.py model.onnx photo.jpg …
    python label.py backbone.onnx --adapter flowers.onnx_adapter photo.jpg …
    python label.py model.onnx folder --csv labels.csv

Class names, image size, normalisation and the form of input and output are read from the file. All
photos in a folder and its subfolders are labelled, without hidden ones. A photo that can't be read
is reported and skipped; the exit status is then 1.

In your own program, for photos as paths or binary files:

    session, task, options = label.open_graph("model.onnx")
    probabilities = label.predict("photo.jpg", session, task, options)  # of task["classes"]
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:  # a container's first process: the kernel ignores default handlers
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))

import argparse
import contextlib
import csv
import json
import re
import sys
import warnings
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime 1.32 reports to Microsoft

try:
    import numpy as np
    import onnxruntime
    from PIL import Image
except ImportError as error:
    missing = error  # `main` reports it, so that --help works without the packages
else:
    missing = None

with contextlib.suppress(ImportError):  # without it HEIC is reported and skipped
    import pillow_heif

    pillow_heif.register_heif_opener()

# What is read as a photo, as in data.py. Suffixes of the photos in a folder:
PHOTOS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PHOTOS |= {".apng", ".mpo", ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"}
PHOTOS |= {".dib", ".dds", ".ico", ".icns", ".pcx", ".qoi", ".sgi", ".tga"}
PHOTOS |= {".heic", ".heif", ".hif"}
# Formats that Pillow decodes by itself. PostScript, under any file name, would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
FORMATS += ("DIB", "DDS", "ICO", "ICNS", "PCX", "QOI", "SGI", "TGA", "HEIF")
# First bytes of photos, for files without a suffix: JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF; HEIC.
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF|BM|II\*\0|MM\0\*|.{4}ftypavi[fs]", re.DOTALL
)
HEIC = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)
ADAPTER = re.compile(rb".{4}TORT", re.DOTALL)  # first bytes of an .onnx_adapter
# Columns of the table of --csv. With at most EACH classes it also has the probability of each.
COLUMNS = ["file", "prediction", "probability", "runner-up"]
EACH = 20


def plain(text):
    """Text without control characters, which a terminal would interpret."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", text)


class UnusableError(Exception):
    """A graph, an adapter or a command that can't be used."""


def fail(text):
    """Raise UnusableError; the program ends with the text."""
    raise UnusableError(text)


def reason(error):
    """The first line of an exception's message, or its type if there is no message."""
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return first


def first_bytes(photo, count=12):
    """The first bytes of a path's file or of a binary file; 12 tell the format of a photo."""
    if hasattr(photo, "read"):
        photo.seek(0)
        return photo.read(count)
    with Path(photo).open("rb") as file:
        return file.read(count)


def upright_rgb(image):
    """An opened photo as 8-bit RGB: 16-bit grey scaled, transparency over white, turned as its
    EXIF orientation says."""
    image.load()  # of a TIFF, Pillow turns the pixels here, and says so in its EXIF data
    orientation = image.getexif().get(0x0112)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("32 bits a pixel, whose white may be 1, 255 or more; save it in 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image, np.float32)
        grey[grey == image.info.get("transparency", -1)] = 65_535  # white
        if 0 < grey.max() < 4096:  # as of a camera of 12 bits
            most = f"16-bit grey of at most {int(grey.max())}"
            raise ValueError(f"{most}, which is almost black; scale its values to 65535")
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


def is_stack(image):
    """Whether an opened photo is a TIFF of several pages. A second page that is smaller, or says so
    (tag NewSubfileType), is a thumbnail or a mask."""
    if image.format != "TIFF":
        return False
    size = image.size
    try:
        image.seek(1)
        return image.size == size and not image.tag_v2.get(254)
    except Exception:  # there is none, or what leads to it is damaged
        return False
    finally:
        image.seek(0)


def check_path(path):
    """Raise a ValueError for a path that isn't a file's."""
    if Path(path).is_dir():
        raise ValueError("a folder without photos")
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("a pipe or a device, not a file")


def open_photo(photo, side):
    """A photo, given as a path or a binary file, as 8-bit RGB, upright. A JPEG may be decoded
    smaller, but large enough for `side`."""
    if not hasattr(photo, "read"):
        check_path(photo)
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is new in Pillow 11.3
    try:
        with Image.open(photo, formats=formats) as image:
            if is_stack(image):
                raise ValueError("a TIFF of several pages, of which only one can be used")
            image.draft("RGB", (2 * side, 2 * side))  # JPEG: decode no larger than needed
            return upright_rgb(image)
    except Image.UnidentifiedImageError:
        if "HEIF" not in Image.OPEN and HEIC.match(first_bytes(photo)):
            message = "HEIC needs a package to be decoded: pip install pillow-heif"
            raise ValueError(message) from None
        raise


def read_photo(photo, task):
    """A photo, given as a path or a binary file, as the graph takes it, prepared as in evaluation:
    a batch of 1."""
    size = task["image_size"]
    side = round(size / task["center"])  # 256 for 224
    image = open_photo(photo, side)
    if not task["resize"]:  # resize here: the photo's square to `side` pixels; then take its middle
        edge = min(image.size)
        left = (image.width - edge) // 2
        top = (image.height - edge) // 2
        centre = (left, top, left + edge, top + edge)
        box = None if task["squash"] else centre  # None: all of the photo
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
        start = (side - size) // 2
        image = image.crop((start, start, start + size, start + size))
    pixels = np.asarray(image)[None]  # uint8 [1, height, width, 3]
    if task["input"] == "uint8":
        return pixels
    pixels = pixels / np.float32(255)
    if task["input"] == "float":  # else "unit": the graph normalises
        pixels = (pixels - task["mean"]) / task["std"]
    return pixels.transpose(0, 3, 1, 2)


def is_photo(file):
    """Whether a path is a photo: a file, by its suffix or, if it has none, by its first bytes."""
    if not file.is_file():
        return False
    if file.suffix:
        return file.suffix.lower() in PHOTOS
    beginning = first_bytes(file)
    return bool(BEGINNINGS.match(beginning) or HEIC.match(beginning))


def photos_in(folder):
    """The photos in a folder and its subfolders, sorted, without hidden ones."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():  # links to folders may form loops
            yield from photos_in(path)
        elif is_photo(path):
            yield path


def find_photos(paths):
    """Files as they are given; for a folder all photos inside."""
    for path in paths:
        if not Path(path).is_dir():
            yield path
            continue
        inside = list(photos_in(Path(path)))
        yield from inside or [path]  # a folder without photos is reported


def read_task(meta):
    """The metadata of a file that are needed to label photos.

    Raises:
        KeyError, TypeError, ValueError: the metadata are damaged, or another program's.
    """
    task = {
        "classes": json.loads(meta["classes"]),  # ["bluebell", "daisy"]
        "image_size": int(meta["image_size"]),  # 224
        "squash": json.loads(meta.get("squash", "false")),  # true: all of a photo is its square
        "center": 1.0,  # 0.875: share of the square's side that the network sees
        "resize": json.loads(meta["resize"]),  # true: the graph resizes
        "input": meta["input"],  # uint8 [B, H, W, 3]; unit, 0..1, or float, normalised [B, 3, S, S]
        "output": meta["output"],
    }
    if not isinstance(task["squash"], bool):
        raise ValueError(f"squash is {task['squash']}")
    if not task["squash"]:
        task["center"] = float(meta["center"])
    names = task["classes"]
    strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not strings or len(names) < 2:
        raise ValueError("classes aren't a list of two names or more")
    if not 1 <= task["image_size"] <= 2048 or not 0.5 <= task["center"] <= 1:
        raise ValueError("the image size or the center is out of range")
    if task["input"] not in ("float", "unit", "uint8"):
        raise ValueError(f"input {task['input']} is unknown")
    if task["output"] not in ("logits", "probabilities"):
        raise ValueError(f"output {task['output']} is unknown")
    if task["input"] == "float":
        for name in ("mean", "std"):
            task[name] = np.array(json.loads(meta[name]), np.float32).reshape(3)
        usable = np.isfinite(task["mean"]) & np.isfinite(task["std"]) & (task["std"] > 0)
        if not usable.all():
            raise ValueError("mean or std isn't finite, or std is 0")
    return task


def load_adapter(path, model, meta):
    """Run options with an adapter active, and the adapter. The metadata of its task go into `meta`,
    those of the model; the adapter file holds them in a tensor that is named after the backbone."""
    if not hasattr(onnxruntime, "AdapterFormat"):
        fail(f"--adapter needs onnxruntime 1.20 or later, not {onnxruntime.__version__}")
    try:
        file = onnxruntime.AdapterFormat.read_adapter(path)
        tensors = file.get_parameters()  # before onnxruntime 1.27 they don't keep the file alive
    except RuntimeError:
        fail(f"{path} isn't an adapter that onnxruntime can read; give an .onnx_adapter")
    key = ""
    for name in tensors:
        if name.startswith("for."):
            key = name
    if not key:
        fail(f"{path} was made by another program; give an adapter from export.py --swappable")
    if key != meta.get("swappable"):
        accepted = meta.get("swappable", "no adapters")
        advice = "give the backbone.onnx that was exported with this adapter"
        fail(f"{path} is {key}; {model} takes {accepted}; {advice}")
    try:
        task = json.loads(tensors[key].numpy().tobytes())
        meta["classes"] = json.dumps(task["classes"])
        for name in {"center", "squash"} & task.keys():
            meta[name] = json.dumps(task[name])
    except (KeyError, TypeError, ValueError, RecursionError):
        fail(f"the metadata of {path} are damaged; export it again")
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(path)
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    return options, adapter


def task_of(path, meta):
    """A graph's task as `read_task` returns it; UnusableError for unusable metadata."""
    if "image_size" not in meta:
        fail(f"{path} isn't a graph from export.py: it doesn't say what it takes")
    if "classes" not in meta:
        fail(f"{path} has no class names; give the task's adapter with --adapter")
    if meta.get("output") == "embedding":
        fail(f"{path} gives embeddings, not labels")
    try:
        return read_task(meta)
    except KeyError as error:
        fail(f"{path} isn't a graph from export.py: its metadata have no {error}")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        fail(f"the metadata of {path} are damaged ({reason(error)}); export it again")


def check_file(path, suffix):
    """Raise UnusableError if a path is no file. If it is a folder, name the files in it to give."""
    if Path(path).is_dir():
        inside = sorted([*Path(path).glob(f"[!.]*{suffix}"), *Path(path).glob(f"onnx/*{suffix}")])
        if inside:
            fail(f"{path} is a folder; give {' or '.join(map(str, inside))}")
        fail(f"{path} is a folder without an {suffix}; export.py writes one")
    if not Path(path).is_file():
        fail(f"there is no file {path}")


def open_graph(path, adapter_path=None):
    """The session of a graph, its task, and run options with the adapter, if one is given.

    Raises:
        UnusableError: one of the files can't be used, or a package is missing.
    """
    if missing:
        fail(f"{reason(missing)}; pip install onnxruntime pillow")
    check_file(path, ".onnx")
    if adapter_path:
        check_file(adapter_path, ".onnx_adapter")
    if ADAPTER.match(first_bytes(path)):
        fail(f"{path} is an adapter; use it with label.py backbone.onnx --adapter {path} photo.jpg")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # no warnings about inputs that have a default
    try:
        session = onnxruntime.InferenceSession(str(path), settings)
        meta = dict(session.get_modelmeta().custom_metadata_map)
    except Exception as error:  # onnxruntime's exceptions have no narrower base class
        advice = ""
        if "Unsupported model IR version" in str(error) or "is under development" in str(error):
            advice = "; install a newer onnxruntime, or export it with --opset 17"
        fail(
            f"{path} isn't an .onnx file that onnxruntime can load ({reason(error)[:200]}){advice}"
        )
    options = adapter = None
    if adapter_path:
        options, adapter = load_adapter(str(adapter_path), path, meta)
    task = task_of(path, meta)
    inputs = session.get_inputs()
    if not inputs or not inputs[0].shape:
        fail(f"{path} isn't a graph from export.py: it takes no images")
    batch = inputs[0].shape[0]
    task["batch"] = batch if isinstance(batch, int) else 1  # a name: any size will do
    if not 1 <= task["batch"] <= 1024:  # export.py's limit
        fail(f"{path} takes {batch} photos at once; export it with --batch 1")
    task["adapter"] = adapter  # the options don't keep it alive
    return session, task, options


def takes(wanted, images):
    """Whether a graph's input takes these images: compares the type and the fixed dimensions."""
    kind = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}[images.dtype.name]
    if wanted.type != kind or len(wanted.shape) != images.ndim:
        return False
    for fixed, size in zip(wanted.shape, images.shape, strict=True):
        if isinstance(fixed, int) and fixed != size:
            return False
    return True


def predict(photo, session, task, options):
    """The probabilities of a photo's classes: float32 [K], in the order of task["classes"].

    Args:
        photo: a path or a binary file.
        session, task, options: what `open_graph` returned. Threads may share them.

    Raises:
        UnusableError: the graph isn't what its metadata say.
        Exception: of any kind, if the photo can't be read: Pillow's decoders raise many.
    """
    wanted = session.get_inputs()[0]
    images = read_photo(photo, task)
    images = np.repeat(images, task["batch"], axis=0)  # fill up a fixed batch
    if not takes(wanted, images):
        what = f"{wanted.type} {wanted.shape}"
        fail(f"the graph takes {what}, not what its metadata say; export it again")
    scores = session.run(None, {wanted.name: images}, options)[0]
    classes = task["classes"]
    if scores.shape != (len(images), len(classes)):
        fail(f"the metadata name {len(classes)} classes, but the graph gives {scores.shape}")
    scores = scores[0]
    if task["output"] == "logits":
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    return scores


def as_text(probabilities, classes):
    """The three likeliest classes and their probabilities."""
    best = np.argsort(-probabilities)[:3]
    return "  ".join(f"{classes[i]} {100 * probabilities[i]:.1f} %" for i in best)


class Table:
    """A .csv file of labels, with the columns of train.py's --predict.

    It is begun with the first label, so that a mistyped folder replaces no earlier table. From then
    on each row is written at once, so that Ctrl-C loses none.

    Raises:
        UnusableError: the path can't be that of a table, or is another file, such as a photo.
    """

    def __init__(self, path, classes):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            fail(f"--csv {path}: give a file in a folder that exists")
        beginning = ",".join(COLUMNS).encode()
        if Path(path).is_file() and first_bytes(path, len(beginning)) not in (b"", beginning):
            fail(f"--csv {path}: that file exists and is no table of labels; give another name")
        self.path = Path(path)
        self.classes = classes
        self.waiting = []  # rows of photos that come before the first label
        self.writer = None

    def add(self, photo, probabilities):
        """Add the row of a photo; `probabilities` is None if it couldn't be read."""
        self.waiting.append(as_row(photo, probabilities, self.classes))
        if self.writer is None and probabilities is not None:
            self.begin()
        if self.writer:
            self.writer.writerows(self.waiting)
            self.waiting.clear()

    def begin(self):
        """Open the file and write the names of its columns."""
        lines = {"buffering": 1, "newline": "", "encoding": "utf-8", "errors": "replace"}
        self.writer = csv.writer(self.path.open("w", **lines), lineterminator="\n")
        many = len(self.classes) > EACH
        each = [] if many else [f"probability of {name}" for name in self.classes]
        self.writer.writerow(COLUMNS + each)


def as_row(photo, probabilities, classes):
    """A photo's row in the table. That of a photo which couldn't be read, without `probabilities`,
    has nothing after its name."""
    each = [""] * len(classes)
    label = ["", "", ""]
    if probabilities is not None:
        best, second = np.argsort(-probabilities)[:2]
        each = [f"{each:.4f}" for each in probabilities]
        label = [classes[best], each[best], classes[second]]
    name = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", str(photo))  # as data.as_utf8
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return [name, *label, *(each if len(classes) <= EACH else [])]


def main():
    parser = argparse.ArgumentParser(description="Label photos with an ONNX file from export.py.")
    parser.add_argument("model", help="model.onnx; with --adapter backbone.onnx")
    parser.add_argument("photos", nargs="+", metavar="photo", help="a photo, or a folder of photos")
    parser.add_argument("--adapter", metavar="FILE", help="the task's .onnx_adapter (--swappable)")
    table = "write the labels to this file, too; replaces an earlier table"
    parser.add_argument("--csv", metavar="FILE", help=table)
    arguments = parser.parse_args()
    if "" in sys.argv:
        fail("an argument is empty; give it a value")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - kept open
        getattr(sys, name).reconfigure(errors="replace")  # names that a terminal can't show
    warnings.simplefilter("ignore")  # Pillow's, about photos that it can still read

    session, task, options = open_graph(arguments.model, arguments.adapter)
    table = Table(arguments.csv, task["classes"]) if arguments.csv else None
    failed = False
    for photo in find_photos(arguments.photos):
        probabilities = None
        try:
            probabilities = predict(photo, session, task, options)
        except UnusableError:
            raise
        except Exception as error:
            print(plain(f"skipped {photo}: {reason(error)}"), file=sys.stderr)
            failed = True
        else:
            text = as_text(probabilities, task["classes"])
            print(plain(f"{photo}  {text}"), flush=True)
        if table:
            table.add(photo, probabilities)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UnusableError as error:
        sys.exit(plain(f"error: {error}"))
    except (OSError, RecursionError) as error:
        # The pipe's reader has gone ("| head"), the disk is full, or folders are nested too deep.
        if not isinstance(error, BrokenPipeError):
            print(plain(f"error: {reason(error)}"), file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
