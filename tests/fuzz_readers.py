"""Damage every kind of input file and check that the answer is a result or a one-line error.

    python tests/fuzz_readers.py --count 10000
    python tests/fuzz_readers.py --count 500 --only state photo.jpg

Each input is a valid file with a few bytes changed, cut, doubled or zeroed; or, for JSON and files
of torch.save, with values replaced: by other types, huge numbers, deep nesting, tensors that are
views of one number, or dictionaries that contain themselves.

A problem is an exception that train.py, export.py or label.py wouldn't turn into one line, a crash
of the process, a file created outside the run's own folder, more than 2 s, or more than 500 MB of
memory beyond what was in use before and what a photo's pixels take. An input is determined by
(--seed, reader, number).
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "assets" / "device"))

import numpy as np
import references
import torch
from conftest import write_tiny, write_tiny_clip

import data
import export
import train
import vit

SECONDS = 2.0
MEMORY = 500e6  # bytes

# ------------------------------------------------------------------------------------- mutations


def damage(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, cut, doubled, zeroed or inserted."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        # Half of the places are among the first 200 bytes, where most headers are.
        size = len(content)
        place = rng.choice((rng.randrange(size + 1), min(size, rng.randrange(200))))
        kind = rng.choice(("flip", "byte", "cut", "double", "zero", "insert", "number"))
        if kind == "flip" and place < size:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == "byte" and place < size:
            content[place] = rng.randrange(256)
        elif kind == "cut":
            content = content[:place]
        elif kind == "double":
            content[place:place] = content[place : place + rng.randrange(1, 200)]
        elif kind == "zero":
            length = min(rng.randrange(1, 100), size - place)
            content[place : place + length] = bytes(length)
        elif kind == "insert":
            content[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif kind == "number" and place + 8 <= size:
            value = rng.choice((2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1, 10**9))
            content[place : place + 8] = struct.pack("<Q", value)
    return bytes(content)


ODD = (None, True, -1, 0, 1, 3, 7, 10**9, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"))
ODD += (float("inf"), "", "x", "../../x", "/dev/zero", "\x1b[2J\n", "\ud800", [], {}, [[]], ["x"])
ODD += ({"x": None}, [1, 2, 3], [0.5] * 3, "float", "a" * 5000)


def nested(rng: random.Random) -> object:
    """A value nested in many lists or dictionaries."""
    value = copy.deepcopy(rng.choice(ODD))
    for _ in range(rng.choice((3, 30, 300))):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return value


def places_in(value: object, found: list, depth: int = 0) -> list:
    """Every (container, key) pair in nested lists and dictionaries, down to ten levels."""
    pairs = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value[:50]))
    for key, inside in pairs:
        found.append((value, key))
        if depth < 10:
            places_in(inside, found, depth + 1)
    return found


def vary(value: object, rng: random.Random, odd: Callable) -> object:
    """A copy with one to three values replaced, removed or renamed; or an odd value instead."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = places_in(value, [])
        if not places:
            return odd(rng)
        container, key = rng.choice(places)
        kind = rng.choice(("replace", "replace", "replace", "remove", "rename", "whole"))
        if kind == "whole" and rng.random() < 0.2:
            return odd(rng)
        if kind == "remove" and isinstance(container, dict):
            container.pop(key, None)
        elif kind == "rename" and isinstance(container, dict):
            container[rng.choice(("x", "", "config", "blocks.300000000.x"))] = container.pop(key)
        elif isinstance(container, dict) or key < len(container):
            container[key] = odd(rng)
    return value


def odd_json(rng: random.Random) -> object:
    return nested(rng) if rng.random() < 0.1 else copy.deepcopy(rng.choice(ODD))


def odd_object(rng: random.Random) -> object:
    """A value that torch.save can write: JSON's, a tensor, or a dictionary that holds itself."""
    kind = rng.randrange(8)
    if kind == 0:
        itself = {}
        itself["x"] = itself
        return itself
    if kind == 1:
        return torch.zeros(1).expand(rng.choice((10**6, 10**9, 10**12)))
    if kind == 2:
        return torch.zeros([1] * rng.randrange(5), dtype=rng.choice((torch.int8, torch.complex64)))
    if kind == 3:
        return torch.full((rng.randrange(4), 8), float("nan"))
    if kind == 4:
        return torch.zeros(rng.randrange(100))
    return odd_json(rng)


def of_json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage(content, rng)
    text = json.dumps(vary(json.loads(content), rng, odd_json))
    return text.encode("utf-8", "surrogatepass")


def of_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header's JSON, or our metadata in it, or damage any bytes."""
    if rng.random() < 0.3:
        return damage(content, rng)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ours = header.get("__metadata__", {})
    if "adaptertune" in ours and rng.random() < 0.7:
        ours["adaptertune"] = json.dumps(vary(json.loads(ours["adaptertune"]), rng, odd_json))
    else:
        header = vary(header, rng, odd_json)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def of_pth(content: bytes, rng: random.Random) -> bytes:
    """Change the objects that torch.save wrote, or damage any bytes."""
    if rng.random() < 0.4:
        return damage(content, rng)
    objects = torch.load(io.BytesIO(content), weights_only=True)
    written = io.BytesIO()
    torch.save(
        vary(objects, rng, odd_object), written, _use_new_zipfile_serialization=rng.random() < 0.8
    )
    return written.getvalue()


def of_npz(content: bytes, rng: random.Random) -> bytes:
    """Replace arrays of an .npz, damage their headers, or damage any bytes."""
    if rng.random() < 0.3:
        return damage(content, rng)
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(written, "w") as copied:
        names = archive.namelist()
        chosen = rng.sample(names, rng.choice((1, 1, 3)))
        for name in names:
            array = archive.read(name)
            if name in chosen and rng.random() < 0.5:
                array = damage(array[:128], rng) + array[128:]  # the array's header
            elif name in chosen:
                array = odd_array(rng)
            copied.writestr(name, array, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return written.getvalue()


def odd_array(rng: random.Random) -> bytes:
    """The bytes that np.save writes for an array of another dtype or shape."""
    kinds = ("f4", "f8", "f2", "i4", "u1", "S3", "U2", "O", "V2", "V0", "c8", "M8[s]", ">f4", "?")
    shapes = ((), (0,), (32,), (3, 0), (2000, 0), (1, 1, 32), (4, 4, 3, 32), (1,) * 30)
    array = np.zeros(rng.choice(shapes), dtype=rng.choice(kinds))
    written = io.BytesIO()
    np.save(written, array)
    return written.getvalue()


def of_text(content: bytes, rng: random.Random) -> bytes:
    """Replace fields of a text, damage any bytes, or return gzip data that unpacks to far more."""
    kind = rng.random()
    if kind < 0.4:
        return damage(content, rng)
    if kind < 0.45:
        return gzip.compress(bytes(rng.choice((10**6, 10**9))), 1)
    lines = content.decode("utf-8", "replace").splitlines()
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(lines))
        fields = lines[place].split(",")
        fields[rng.randrange(len(fields))] = rng.choice(
            ("", "x", "nan", "1e999", "-1", '"', "9" * 99)
        )
        lines[place] = ",".join(fields)
    return "\n".join(lines).encode()


# --------------------------------------------------------------------------------------- readers


@dataclass
class Reader:
    """An input file, the function that damages it, and the function that reads it."""

    path: str  # relative to the working folder
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]


ALLOWED = (ValueError, OSError, MemoryError)  # `main` prints each as one line


def command(*arguments: str) -> Callable[[Path], int]:
    """A reader that runs train.py with these arguments and returns its status. An exception, or an
    error of several lines, is a problem."""

    def read(folder: Path) -> int:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = train.main(list(arguments))
            except SystemExit as error:
                status = error.code
        text = re.sub(r"^(waiting|skipped|note) .*\n", "", said.getvalue(), flags=re.MULTILINE)
        if status and not re.fullmatch(r"error: [^\n]+\n", text):
            raise AssertionError(f"status {status} and {text[:300]!r}")
        return status

    return read


def export_run(folder: Path) -> int:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return export.main(["runs/a", "--images", "2"])
        except SystemExit as error:
            return error.code


OPTIONS = ["--weights", "tiny.safetensors", "--limit", "48", "--batch", "16", "--epochs", "1"]


def resume(folder: Path) -> None:
    """Load a state, train on and finish."""
    with contextlib.redirect_stdout(io.StringIO()):
        options, *_ = train.parse([*OPTIONS, "--name", "b", "--resume"])
        train.fit(train.prepare(options))


def label_photo(folder: Path) -> int:
    """Label a photo with assets/device/label.py, whose errors have one line."""
    import label

    try:
        session, task, options = label.open_graph(str(folder / "model.onnx"), "")
        try:
            label.predict(str(folder / "honest.png"), session, task, options)
        except Exception:  # its `main` prints that the photo is skipped
            return 1
    except label.UnusableError as error:
        assert "\n" not in label.plain(str(error)), error
        return 1
    return 0


def of_graph(content: bytes, rng: random.Random) -> bytes:
    """Damage the metadata of a graph. (onnxruntime reads its other bytes.)"""
    import onnx

    proto = onnx.load_from_string(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        prop = rng.choice(proto.metadata_props)
        kind = rng.randrange(3)
        if kind == 0:
            prop.value = damage(prop.value.encode(), rng).decode("utf-8", "replace")
        elif kind == 1:
            prop.value = json.dumps(odd_json(rng)).encode("utf-8", "replace").decode()
        else:
            proto.metadata_props.remove(prop)
    return proto.SerializeToString()


def load_lora(folder: Path) -> None:
    vit.load(folder / "tiny.safetensors", lora=folder / "lora")


def read_tiny_imagenet(folder: Path) -> None:
    data.read(str(folder / "imagenet"), image_size=16)


def check_download(folder: Path) -> None:
    with contextlib.suppress(data.DownloadError):  # `download` turns it into a ValueError
        data.check_content(folder / "tiny.safetensors", "model.safetensors")


READERS = {
    "config": Reader("runs/a/config.json", of_json, command("--eval", "runs/a")),
    "split": Reader("runs/a/split.json", of_json, command("--eval", "runs/a")),
    "adapters": Reader("runs/a/adapters.safetensors", of_safetensors, command("--eval", "runs/a")),
    "predict": Reader(
        "runs/a/adapters.safetensors",
        of_safetensors,
        command("--predict", "runs/a", "honest.png"),
    ),
    "result": Reader(
        "runs/a/result.json", of_json, command(*OPTIONS[:-1], "2", "--name", "a", "--resume")
    ),
    "metrics": Reader(
        "runs/a/metrics.csv", of_text, command(*OPTIONS[:-1], "2", "--name", "a", "--resume")
    ),
    "kept": Reader("runs/a/result.json", of_json, command(*OPTIONS, "--name", "a")),
    "export": Reader("runs/a/adapters.safetensors", of_safetensors, export_run),
    "state": Reader("runs/b/state.pt", of_pth, resume),
    "weights": Reader(
        "tiny.safetensors", of_safetensors, lambda at: vit.load(at / "tiny.safetensors")
    ),
    "rotary": Reader(
        "rotary.safetensors", of_safetensors, lambda at: vit.load(at / "rotary.safetensors")
    ),
    "download": Reader("tiny.safetensors", of_safetensors, check_download),
    "pth": Reader("tiny.pth", of_pth, lambda at: vit.load(at / "tiny.pth", heads=2)),
    "npz": Reader("tiny.npz", of_npz, lambda at: vit.load(at / "tiny.npz")),
    "torchscript": Reader("vit.pt", damage, lambda at: vit.load(at / "vit.pt", heads=2)),
    "init": Reader(
        "init.safetensors",
        of_safetensors,
        command(*OPTIONS, "--name", "c", "--init", "init.safetensors"),
    ),
    "beside": Reader("hub/config.json", of_json, lambda at: vit.load(at / "hub/model.safetensors")),
    "text": Reader(
        "clip/clip.safetensors",
        of_safetensors,
        lambda at: vit.load_text(at / "clip/clip.safetensors"),
    ),
    "vocabulary": Reader(
        "clip/merges.txt", of_text, lambda at: vit.Tokenizer(at / "clip/merges.txt")
    ),
    "graph": Reader("model.onnx", of_graph, label_photo),
    "lora": Reader("lora/adapter_config.json", of_json, load_lora),
    "factors": Reader("lora/adapter_model.safetensors", of_safetensors, load_lora),
    "annotations": Reader("imagenet/val/val_annotations.txt", of_text, read_tiny_imagenet),
    "names": Reader("imagenet/words.txt", of_text, read_tiny_imagenet),
}
PHOTOS = ("jpg", "png", "gif", "bmp", "tiff", "webp", "ppm", "tga", "ico")
for suffix in PHOTOS:
    READERS[f"photo.{suffix}"] = Reader(
        f"photo.{suffix}",
        damage,
        lambda at, suffix=suffix: data.read_photo(at / f"photo.{suffix}", data.Square(32)),
    )


def make_files(folder: Path) -> None:
    """Write the valid files into the working folder."""
    write_tiny(folder / "tiny.safetensors", seed=0)
    write_tiny(folder / "rotary.safetensors", seed=0, rope=True, registers=4)
    tensors, _ = vit.read_tensors(folder / "tiny.safetensors")
    torch.save({"model": tensors, "epoch": 3, "args": {"lr": 0.1}}, folder / "tiny.pth")
    google = references.as_google(
        {**tensors, "head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)},
        attention=1,
        mlp=3,
        norm2=2,
    )
    google["pos_embedding"] = tensors["pos_embed"]
    np.savez(folder / "tiny.npz", **{name: value.numpy() for name, value in google.items()})
    for name in ("a", "b"):
        assert train.main([*OPTIONS, "--name", name]) == 0
    shutil.copy(folder / "runs/a/adapters.safetensors", folder / "init.safetensors")

    # A run that was stopped after its first step.
    (folder / "runs/b/adapters.safetensors").unlink()
    options, *_ = train.parse([*OPTIONS, "--name", "b", "--resume"])
    run = train.prepare(options)
    rates = (options.weight_decay, run.options.lr, run.options.head_lr)
    groups = train.adaptertune.parameter_groups(run.model, *rates)
    optimizer = torch.optim.AdamW(groups)
    images, labels = next(run.batches.train(run.dataset, 0, 1))
    run.model.train()
    train.take_step(run, optimizer, images, labels, len(labels))
    run.state.step = 1
    run.state.seen = len(labels)
    train.save_state(run, optimizer)

    (folder / "hub").mkdir()
    stated = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    stated |= {
        "model_args": {"embed_dim": 32},
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3},
    }
    (folder / "hub/config.json").write_text(json.dumps(stated))
    # Without the metadata that state the shape.
    data.write_file(folder / "hub/model.safetensors", train.to_safetensors(tensors))

    (folder / "lora").mkdir()
    factors = {
        "base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 32),
        "base_model.model.blocks.0.attn.qkv.lora_B.weight": torch.ones(96, 2),
        "base_model.model.head.weight": torch.ones(3, 32),
    }
    data.write_file(folder / "lora/adapter_model.safetensors", train.to_safetensors(factors))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"qkv": 3}}
    (folder / "lora/adapter_config.json").write_text(json.dumps(settings))

    (folder / "clip").mkdir()
    write_tiny_clip(folder / "clip")
    model, _ = vit.load(folder / "tiny.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but OpenAI's files use it
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 16, 16)), folder / "vit.pt")

    assert export.main(["runs/a", "--images", "2"]) == 0
    shutil.copy(folder / "runs/a/model.onnx", folder / "model.onnx")
    try:
        from PIL import Image
    except ImportError:
        return  # without Pillow, no photos
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save(folder / "honest.png")
    wnids = ("n01443537", "n02124075")
    (folder / "imagenet/val/images").mkdir(parents=True)
    for i, wnid in enumerate(wnids):
        (folder / "imagenet/train" / wnid / "images").mkdir(parents=True)
        image.save(folder / "imagenet/train" / wnid / "images/0.JPEG")
        image.save(folder / f"imagenet/val/images/val_{i}.JPEG")
    listed = [f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n" for i, wnid in enumerate(wnids)]
    (folder / "imagenet/val/val_annotations.txt").write_text("".join(listed))
    words = [f"{wnid}\ta {wnid}, b\n" for wnid in wnids]
    (folder / "imagenet/words.txt").write_text("".join(words))
    for suffix in PHOTOS:
        image.save(folder / f"photo.{suffix}")


# --------------------------------------------------------------------------------------- running


def memory(name: str) -> int:
    """The value of a line of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def snapshot(folder: Path) -> set[str]:
    """Names of all files in and beside the folder, except those of runs/a, runs/b and runs/c."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    names |= {f"../{path.name}" for path in folder.parent.iterdir()}
    return {name for name in names if not re.match(r"runs/[abc](/|$)", name)}


def pixels_of(path: Path) -> int:
    """The bytes of a photo's pixels, by the size in its header; 0 for any other file."""
    if not path.name.startswith("photo."):
        return 0
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return 4 * image.width * image.height
    except Exception:
        return 0


def try_one(reader: Reader, folder: Path, content: bytes) -> str:
    """Read one input and return what is wrong with the answer; "" if nothing is."""
    (folder / reader.path).write_bytes(content)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    started = time.process_time()  # CPU time: the machine may be busy
    problem = ""
    try:
        reader.read(folder)
    except ALLOWED:
        pass
    except BaseException:
        problem = traceback.format_exc()[-900:]
    seconds = time.process_time() - started
    used = memory("VmHWM") - before - pixels_of(folder / reader.path)
    if seconds > SECONDS:
        problem += f" {seconds:.1f} s"
    if used > MEMORY:
        problem += f" {used / 1e6:.0f} MB"
    return problem


def fuzz(name: str, folder: Path, count: int, seed: int = 0) -> list[str]:
    """Try one reader on `count` inputs in child processes. Returns what went wrong."""
    reader = READERS[name]
    honest = (folder / reader.path).read_bytes()
    backup = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copytree(folder / "runs", backup / "runs")
    files = snapshot(folder)
    wrong = []
    number = 0
    while number < count:
        end, other_end = os.pipe()
        child = os.fork()
        if not child:
            status = 70
            try:
                os.close(end)
                signal.alarm(60)
                answer = reader.read(folder)  # the valid file
                assert not isinstance(answer, int) or answer == 0
                for i in range(number, count):
                    content = reader.mutate(honest, random.Random(f"{seed}/{name}/{i}"))
                    signal.alarm(30)  # ends a process that hangs
                    problem = try_one(reader, folder, content)
                    signal.alarm(0)
                    os.write(other_end, (json.dumps([i, problem]) + "\n").encode())
                    shutil.rmtree(folder / "runs")
                    shutil.copytree(backup / "runs", folder / "runs")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(other_end)
        with os.fdopen(end) as answers:
            for line in answers:
                i, problem = json.loads(line)
                number = i + 1
                if problem:
                    wrong.append(f"{name} {i}: {problem}")
        _, status = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(status)
        if status:
            wrong.append(f"{name} {number}: the process ended by {status}")
            number += 1
    (folder / reader.path).write_bytes(honest)
    shutil.rmtree(folder / "runs")
    shutil.copytree(backup / "runs", folder / "runs")
    shutil.rmtree(backup)
    for made in sorted(snapshot(folder) - files):
        wrong.append(f"{name}: made {made}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs, over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(READERS), choices=list(READERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    folder = Path(tempfile.mkdtemp()) / "work"
    folder.mkdir()
    os.chdir(folder)
    cache = tempfile.mkdtemp()
    os.environ["ADAPTERTUNE_CACHE"] = cache
    with contextlib.redirect_stdout(io.StringIO()):
        make_files(folder)
    each = -(-options.count // len(options.only))
    wrong = []
    for name in options.only:
        started = time.perf_counter()
        found = fuzz(name, folder, each, options.seed)
        seconds = time.perf_counter() - started
        print(f"{name:<14}{each:>6} inputs{len(found):>5} wrong{seconds:>8.0f} s", flush=True)
        for text in found[:3]:
            print(text, flush=True)
        wrong += found
    shutil.rmtree(folder.parent)
    shutil.rmtree(cache)
    print(f"all           {each * len(options.only):>6} inputs{len(wrong):>5} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
