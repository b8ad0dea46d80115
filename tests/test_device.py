"""assets/device/label.py, run without torch and onnx: it gives torch's labels and probabilities."""

import contextlib
import csv
import gc
import io
import json
import os
import re
import runpy
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, png_chunk, runner, write_tiny
from onnx import TensorProto, helper, numpy_helper

import data
import export
import train

Image = pytest.importorskip("PIL.Image")
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
LABEL = ROOT / "assets/device/label.py"
BACKBONE = ["--weights", str(ROOT / "assets/vit_micro.safetensors")]
PHOTOS = ["--dataset", "photos", "--epochs", "6", "--lr", "3e-3", "--head-lr", "3e-3"]
CLASSES = ("dark", "light above", "light below", "light in the middle")
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # from upright to stored pixels, by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

# ---------------------------------------------------------------------------------------- photos


def draw(kind, height, width, rng):
    """A noisy image of one of CLASSES, RGB, in a random colour."""
    down = np.linspace(0, 1, height)[:, None]
    right = np.linspace(0, 1, width)[None]
    if kind == "light above":
        light = 1 - down + 0 * right
    elif kind == "light below":
        light = down + 0 * right
    elif kind == "light in the middle":
        light = 1 - 2 * np.maximum(abs(down - 0.5), abs(right - 0.5))
    else:
        light = np.full((height, width), 0.1)
    colour = rng.uniform(120, 255, 3)
    noise = rng.normal(0, 12, (height, width, 3))
    pixels = light[..., None] * colour + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_class_folders(folder):
    """16 PNG photos of each class, of many sizes."""
    rng = np.random.default_rng(0)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for i in range(16):
            image = draw(kind, 24 + 3 * i, 70 - 2 * i, rng)
            image.save(folder / kind / f"{i:02}.png")


def save_odd_photos(folder):
    """Photos of each class, in every form and in odd sizes."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for kind in CLASSES:
        image = draw(kind, 61, 47, rng)
        grey = image.convert("L")
        grey.save(folder / f"{kind}, grey.png")
        grey.save(folder / f"{kind}, grey.jpg")
        deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        deep.save(folder / f"{kind}, 16 bits.png")
        clear = image.copy()
        clear.putalpha(grey)
        clear.save(folder / f"{kind}, half transparent.png")
        clear.convert("LA").save(folder / f"{kind}, grey and alpha.png")
        image.convert("1").save(folder / f"{kind}, 1 bit.png")
        image.convert("P").save(folder / f"{kind}, palette.png")
        image.convert("RGBA").save(folder / f"{kind}, alpha.png")
        image.convert("CMYK").save(folder / f"{kind}, CMYK.jpg")
        image.save(folder / f"{kind}.webp")
        image.save(folder / f"{kind}.bmp")
        if "HEIF" in Image.SAVE:
            image.save(folder / f"{kind}.heic")
        image.resize((640, 403)).save(folder / f"{kind}, large.jpg")  # draft() makes it smaller
        image.resize((9, 7)).save(folder / f"{kind}, small.png")
        image.resize((300, 5)).save(folder / f"{kind}, wide.png")
        save_turned(image, folder / f"{kind}, turned.jpg", 8)
        save_turned(image, folder / f"{kind}, turned.tif", 3)


def save_turned(image, path, orientation):
    """Save a photo whose pixels are turned, and whose EXIF data say how to turn them back."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = image.transpose(TURNS[orientation])
    options = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    turned.save(path, exif=exif, **options)


# ------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with photos/CLASS, odd photos in odd/, and a run on photos/ in runs/photos."""
    folder = tmp_path_factory.mktemp("work")
    save_class_folders(folder / "photos")
    save_odd_photos(folder / "odd")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*BACKBONE, *PHOTOS, "--name", "photos"]) == 0
    return folder


@pytest.fixture(scope="module")
def absent(tmp_path_factory):
    """A folder for PYTHONPATH whose packages can't be imported, as if they weren't installed."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ("torch", "onnx", "safetensors"):
        (folder / f"{name}.py").write_text(f"raise ImportError('there is no {name} here')")
    return folder


@pytest.fixture
def python(work, absent, monkeypatch):
    """Runs Python in the folder `work`, in a process without torch and onnx."""
    monkeypatch.chdir(work)

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(absent)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture
def label(python):
    """Runs label.py and returns its output; if it fails, its error, which must be one line."""

    def run(*arguments, status=0):
        done = python(LABEL, *arguments)
        assert done.returncode == status, done.stdout + done.stderr
        if status == 0:
            assert done.stderr == ""
            return done.stdout
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
        return done.stderr

    return run


@pytest.fixture
def run_export(work, monkeypatch, capsys):
    """Runs export.py's main in the folder `work`."""
    monkeypatch.chdir(work)
    return runner(export.main, capsys)


def test_nothing_is_reported(work, tmp_path, monkeypatch):
    """onnxruntime's telemetry is off: it would keep an identifier and events in the home folder."""
    monkeypatch.chdir(work)
    environment = dict(os.environ, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    del environment["ORT_DISABLE_TELEMETRY"]
    graph = tmp_path / "model.onnx"
    photo = next((work / "photos").rglob("*.png"))
    for command in ([ROOT / "export.py", "runs/photos", "-o", graph], [LABEL, graph, photo]):
        arguments = [sys.executable, *map(str, command)]
        subprocess.run(arguments, env=environment, capture_output=True, timeout=120, check=True)
    assert graph.exists()
    assert not [path for path in tmp_path.rglob("*") if "icrosoft" in path.name]


def test_use_in_a_program(work, run_export, tmp_path):
    """label.py as a module: files opened by the caller, probabilities, and errors that don't end
    the program."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx")
    module = runpy.run_path(str(LABEL))
    session, task, options = module["open_graph"](tmp_path / "model.onnx")
    photo = next((work / "photos").rglob("*.png"))
    expected = in_torch("runs/photos", [photo])[str(photo)]
    with photo.open("rb") as opened:
        probabilities = module["predict"](opened, session, task, options)
    found = dict(zip(task["classes"], probabilities.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(module["UnusableError"], match="there is no file gone.onnx"):
        module["open_graph"]("gone.onnx")
    run_export("runs/photos", "--swappable", "-o", tmp_path / "swap")
    graph, adapter = sorted((tmp_path / "swap").glob("*.onnx*"))
    session, task, options = module["open_graph"](graph, adapter)
    gc.collect()
    probabilities = module["predict"](photo, session, task, options)
    found = dict(zip(task["classes"], probabilities.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-4)


def in_torch(run, photos, rounded=True):
    """Torch's probabilities, {photo: {class: probability}}.

    Args:
        rounded: to whole pixel values after resizing, unlike a graph with --resize.
    """
    model = train.load_run(run)
    if rounded:
        _, probabilities = model.predict(photos)
    else:
        images = torch.cat([unrounded(model, photo) for photo in photos])
        probabilities = model.network(images).softmax(dim=-1)
    found = {}
    for photo, scores in zip(photos, probabilities.tolist(), strict=True):
        found[str(photo)] = dict(zip(model.classes, scores, strict=True))
    return found


def unrounded(model, photo):
    """A photo for the network, resized and cropped in one step."""
    side = model.square.side
    image = data.open_photo(photo, side)
    edge = min(image.size)
    scale = edge / side
    first = (side - model.image_size) // 2 * scale
    top = (image.height - edge) // 2 + first
    left = (image.width - edge) // 2 + first
    length = model.image_size * scale
    box = [top, left, length, length]
    if model.square.squash:
        box = [0, 0, image.height, image.width]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return model.batches.finish(pixels, torch.tensor([box]))


@pytest.fixture(scope="module")
def odd_photos(work):
    """The odd photos, and torch's probabilities for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        return in_torch("runs/photos", sorted(Path("odd").iterdir()))


def check_labels(out, expected, tolerance=0.001):
    """Check that each photo, in order, has a line with torch's three likeliest classes."""
    for line, (photo, probabilities) in zip(out.splitlines(), expected.items(), strict=True):
        path, *labels = line.split("  ")
        assert path == photo
        assert len(labels) == 3
        shown = []
        rest = dict(probabilities)
        for text in labels:
            name, percent, sign = text.rsplit(" ", 2)
            assert sign == "%"
            shown.append(float(percent) / 100)
            assert abs(shown[-1] - probabilities[name]) < tolerance, line
            assert probabilities[name] > max(rest.values()) - tolerance, line
            del rest[name]
        assert shown == sorted(shown, reverse=True)


# ---------------------------------------------------------------------------------------- labels


def test_packages_are_absent(python):
    """The processes of the other tests can't import torch, onnx or safetensors."""
    for name in ("torch", "onnx", "safetensors"):
        done = python("-c", f"import {name}")
        assert f"ImportError: there is no {name} here" in done.stderr


def test_heic_without_its_package(python, run_export, absent, tmp_path):
    """Without pillow-heif, HEIC photos are skipped, whatever their names, and a line says what to
    install. A JPEG is labelled, and a text is no photo, even if its name ends in .HEIC."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx")
    names = ("a.heic", "b.heif", "c.hif", "d.jpg", "e")
    for name in names:
        (tmp_path / name).write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1")
    (tmp_path / "f.HEIC").write_bytes(Path("odd/dark, large.jpg").read_bytes())
    (tmp_path / "g.HEIC").write_text("no photo")
    (absent / "pillow_heif.py").write_text("raise ImportError")
    done = python(LABEL, tmp_path / "model.onnx", tmp_path, "odd/dark.bmp")
    (absent / "pillow_heif.py").unlink()
    assert done.returncode == 1
    *heic, last = done.stderr.splitlines()
    advice = "HEIC needs a package to be decoded: pip install pillow-heif"
    assert heic == [f"skipped {tmp_path / name}: {advice}" for name in names]
    assert last.startswith(f"skipped {tmp_path / 'g.HEIC'}: cannot identify image file")
    labelled = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert labelled == [str(tmp_path / "f.HEIC"), "odd/dark.bmp"]


def test_photos_differ(odd_photos):
    """The comparisons below can fail: each class is torch's likeliest for some photo, and its
    probabilities vary from photo to photo."""
    likeliest = {max(each, key=each.get) for each in odd_photos.values()}
    assert likeliest == set(CLASSES)
    table = np.array([list(each.values()) for each in odd_photos.values()])
    assert (table.std(axis=0) > 0.1).all()


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--output probabilities",
        "--input uint8",
        "--input uint8 --output probabilities --opset 23",
        "--input unit",
        "--input unit --output probabilities --batch 2",
        "--batch 8",
        "--input uint8 --batch 2",
        "--resize",
        "--resize --output probabilities --batch 2",
    ],
)
def test_labels_are_those_of_torch(run_export, label, odd_photos, tmp_path, options):
    """label.py gives torch's labels for every kind of input and output, on photos of every form."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8, *options.split())
    expected = odd_photos
    if "--resize" in options:
        expected = in_torch("runs/photos", list(odd_photos), rounded=False)
    out = label(tmp_path / "model.onnx", *expected)
    check_labels(out, expected)


def test_a_table_of_labels(run_export, python, tmp_path):
    """label.py --csv writes the table that train.py --predict writes, over an earlier one, but over
    no other file. A photo that can't be read has an empty row."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx")
    (tmp_path / "no photo.png").touch()
    photos = [*sorted(Path("odd").glob("dark*.png")), tmp_path / "no photo.png", "odd/dark.bmp"]
    photos = list(map(str, photos))
    expected = tmp_path / "expected.csv"
    assert train.main(["--predict", "runs/photos", *photos, "--csv", str(expected)]) == 1
    table = tmp_path / "labels.csv"
    for _ in range(2):
        done = python(LABEL, tmp_path / "model.onnx", *photos, "--csv", table)
        assert done.returncode == 1
        assert done.stdout.count("\n") == len(photos) - 1
        header, *rows = list(csv.reader(table.open(encoding="utf-8")))
        expected_header, *expected_rows = list(csv.reader(expected.open(encoding="utf-8")))
        assert header == expected_header
        assert [row[0] for row in rows] == photos
        for row, other in zip(rows, expected_rows, strict=True):
            assert (row[0], row[1], row[3]) == (other[0], other[1], other[3])
            assert [bool(cell) for cell in row] == [bool(cell) for cell in other]
            for cell, same in zip(row, other, strict=True):
                if re.fullmatch(r"\d\.\d{4}", same):
                    assert float(cell) == pytest.approx(float(same), abs=2e-4)
    content = Path(photos[0]).read_bytes()
    done = python(LABEL, tmp_path / "model.onnx", photos[1], "--csv", photos[0])
    fault = "that file exists and is no table of labels; give another name"
    assert (done.returncode, done.stderr) == (1, f"error: --csv {photos[0]}: {fault}\n")
    assert Path(photos[0]).read_bytes() == content
    done = python(LABEL, tmp_path / "model.onnx", photos[1], "--csv", tmp_path / "nowhere/a.csv")
    assert done.returncode == 1
    assert done.stderr.endswith("a.csv: give a file in a folder that exists\n")
    content = table.read_text()
    assert python(LABEL, tmp_path / "model.onnx", "nowhere", "--csv", table).returncode == 1
    assert table.read_text() == content


def test_a_table_of_many_classes(tmp_path):
    """With more than 20 classes the table of label.py has the likeliest two alone."""
    module = runpy.run_path(str(LABEL))
    classes = [f"class {i}" for i in range(21)]
    probabilities = np.linspace(0, 0.1, 21)
    table = module["Table"](tmp_path / "a.csv", classes)
    table.add("unread.jpg", None)
    assert not (tmp_path / "a.csv").exists()  # an earlier table would still be there
    table.add("a\udce9.jpg", probabilities)  # "é" in Latin-1
    table.add("a\ud83d.jpg", None)  # half a character, as Windows may have
    lines = (tmp_path / "a.csv").read_text().splitlines()  # each row is there at once
    found = "a\ufffd.jpg,class 20,0.1000,class 19"
    assert lines == [train.LABELS_HEADER, "unread.jpg,,,", found, "a\ufffd.jpg,,,"]


def test_turned_photos_are_seen_upright(run_export, label, tmp_path):
    """For each EXIF orientation, the labels are those of the photo as displayed, not as stored.

    A comparison with torch wouldn't show a mistake that both make.
    """
    image = draw("light above", 64, 64, np.random.default_rng(2))
    upright = str(tmp_path / "upright.png")
    stored = str(tmp_path / "stored.png")
    image.save(upright)
    image.transpose(TURNS[3]).save(stored)
    probabilities = in_torch("runs/photos", [upright, stored])
    assert probabilities[upright]["light above"] > 0.3 + probabilities[stored]["light above"]

    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    expected = {}
    for orientation in TURNS:
        photo = tmp_path / f"{orientation}.jpg"
        save_turned(image, photo, orientation)
        expected[str(photo)] = probabilities[upright]
    check_labels(label(tmp_path / "model.onnx", *expected), expected, tolerance=0.05)


# ------------------------------------------------------------------------------- the whole photo


@pytest.fixture(scope="module")
def edges(work):
    """A folder `edges`, whose classes are told at the ends of wide photos, and a run on it."""
    rng = np.random.default_rng(3)
    for kind, first in (("left", 0), ("right", 88), ("neither", 96)):
        (work / "edges" / kind).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 60, (32, 96, 3))
            pixels[:, first : first + 8] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(work / "edges" / kind / f"{i:02}.png")
    command = [*PHOTOS, "--dataset", "edges", "--no-flip", "--min-scale", "0.8", "--epochs", "15"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for name, squash in (("whole", ["--squash"]), ("middle", [])):
            assert train.main([*BACKBONE, *command, *squash, "--name", name]) == 0
    return work / "edges"


def test_squash(edges, run_export, label, tmp_path):
    """With --squash the network sees what is outside a photo's middle, and so does label.py with
    every kind of graph. Without, nobody sees it."""
    results = [
        json.loads(Path(f"runs/{run}/result.json").read_text()) for run in ("whole", "middle")
    ]
    assert results[0]["test_accuracy"] > 95
    assert results[1]["test_accuracy"] < 70
    photos = sorted(map(str, edges.rglob("*.png")))[::5] + ["odd/dark, large.jpg"]
    expected = in_torch("runs/whole", photos)
    for options in ("", "--input uint8", "--input unit --output probabilities --batch 2"):
        graph = tmp_path / "model.onnx"
        run_export("runs/whole", "-o", graph, "--images", 8, *options.split())
        check_labels(label(graph, *photos), expected)
    run_export("runs/whole", "--resize", "-o", tmp_path / "r.onnx", "--check", "edges")
    check_labels(label(tmp_path / "r.onnx", *photos), in_torch("runs/whole", photos, rounded=False))
    run_export("runs/whole", "--swappable", "-o", tmp_path)
    graph, adapter = tmp_path / "backbone.onnx", tmp_path / "whole.onnx_adapter"
    check_labels(label(graph, "--adapter", adapter, *photos), expected)


def test_squash_is_said_to_others(edges, run_export, tmp_path):
    """The metadata and --hub's folder say that all of a photo is resized, and a graph doesn't ask
    Ultralytics to crop."""
    transformers = pytest.importorskip("transformers")
    texts = {}
    for run in ("whole", "middle"):
        graph = tmp_path / f"{run}.onnx"
        unit = ["--input", "unit", "--output", "probabilities", "--batch", "1"]
        run_export(f"runs/{run}", "-o", graph, *unit)
        texts[run] = export.session(graph).get_modelmeta().custom_metadata_map
    assert ", all of it resized to 32 x 32 (bicubic" in texts["whole"]["preprocessing"]
    assert ", its centre square resized to 37 x 37 (" in texts["middle"]["preprocessing"]
    assert texts["middle"]["task"] == "classify"
    assert "task" not in texts["whole"]
    assert "center" not in texts["whole"]  # readers from before the option stop without it
    assert "squash" not in texts["middle"]
    types = [texts[run]["model_info resize_type"] for run in ("whole", "middle")]
    assert types == ["standard", "crop"]

    run_export("runs/whole", "--hub", tmp_path / "hub", "--force")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub")
    model = train.load_run("runs/whole")
    for path in sorted(edges.rglob("*.png"))[::9]:
        with Image.open(path) as photo:
            pixels = processor(photo, return_tensors="pt")["pixel_values"]
        difference = (pixels - model.preprocess(path)).abs()
        assert difference.mean() < 0.02  # Lanczos instead of bicubic


# ---------------------------------------------------------------------------- swappable adapters


@pytest.fixture(scope="module")
def swappable(work):
    """The folder `swappable` below `work`, with backbone.onnx, the adapters of two tasks, and
    third.onnx_adapter, which belongs to another backbone."""
    folder = work / "swappable"
    third = write_tiny(work / "third.safetensors", seed=1)
    digits = ["--epochs", "1", "--limit", "100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert train.main([*BACKBONE, *digits, "--rank", "3", "--name", "digits"]) == 0
        assert train.main(["--weights", str(third), *digits, "--name", "third"]) == 0
        for run, place in (("photos", folder), ("digits", folder), ("third", work / "apart")):
            options = ["--swappable", "--images", "8", "-o", str(place)]
            assert export.main([f"runs/{run}", *options]) == 0
    (work / "apart/third.onnx_adapter").rename(folder / "third.onnx_adapter")
    return folder


def test_tasks_on_one_backbone(swappable, label, odd_photos):
    """Two tasks with different ranks, classes and crops both run on one backbone.onnx."""
    backbone = swappable / "backbone.onnx"
    out = label(backbone, "--adapter", swappable / "photos.onnx_adapter", *odd_photos)
    check_labels(out, odd_photos)

    expected = in_torch("runs/digits", list(odd_photos)[::5])
    out = label(backbone, "--adapter", swappable / "digits.onnx_adapter", *expected)
    check_labels(out, expected)


def test_adapters_that_do_not_fit(swappable, run_export, label, tmp_path):
    """Adapters of another backbone or program are refused, and any for a graph that takes none."""
    photo = "odd/dark.bmp"
    backbone = swappable / "backbone.onnx"
    error = label(backbone, "--adapter", swappable / "third.onnx_adapter", photo, status=1)
    message = (
        r"third.onnx_adapter is for\.[0-9a-f]{16}\.16px\.block\.gelu\.[0-9a-f]{8}; "
        r"\S+/backbone.onnx takes for\.[0-9a-f]{16}\.32px\.block\.gelu\.[0-9a-f]{8}; "
        r"give the backbone.onnx that was exported with this adapter$"
    )
    assert re.search(message, error)

    export.save_adapter({"weight": np.zeros(3, np.float32)}, tmp_path / "else.onnx_adapter")
    error = label(backbone, "--adapter", tmp_path / "else.onnx_adapter", photo, status=1)
    assert "else.onnx_adapter was made by another program; give an adapter from export.py" in error

    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    arguments = ["--adapter", swappable / "photos.onnx_adapter", photo]
    error = label(tmp_path / "model.onnx", *arguments, status=1)
    advice = "give the backbone.onnx that was exported with this adapter"
    assert f"{tmp_path / 'model.onnx'} takes no adapters; {advice}" in error


def test_an_onnxruntime_without_adapters(swappable, python):
    """With an onnxruntime older than 1.20, --adapter ends in a line that says what it needs."""
    program = "import onnxruntime, runpy, sys; del onnxruntime.AdapterFormat; "
    program += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = (swappable / "backbone.onnx", "--adapter", swappable / "photos.onnx_adapter")
    done = python("-c", program, LABEL, *arguments, "odd/dark.bmp")
    assert done.returncode == 1
    assert re.fullmatch(r"error: --adapter needs onnxruntime 1.20 or later, not .*\n", done.stderr)


def test_adapter_as_the_model(swappable, label, tmp_path):
    """An adapter given in place of the graph is recognised by its content, and a line says how to
    use it."""
    adapter = tmp_path / "renamed.onnx"
    adapter.write_bytes((swappable / "photos.onnx_adapter").read_bytes())
    usage = f"label.py backbone.onnx --adapter {adapter} photo.jpg"
    error = label(adapter, "odd/dark.bmp", status=1)
    assert error == f"error: {adapter} is an adapter; use it with {usage}\n"
    backbone = swappable / "backbone.onnx"
    assert label(adapter, "--adapter", backbone, "odd/dark.bmp", status=1) == error  # exchanged


def test_adapter_with_damaged_metadata(swappable, label, tmp_path):
    """An adapter whose metadata can't be read is refused as damaged."""
    whole = swappable / "photos.onnx_adapter"
    file = onnxruntime.AdapterFormat.read_adapter(str(whole))  # the tensors need it
    tensors = file.get_parameters()
    key = next(name for name in tensors if name.startswith("for."))
    for text in (b"{", b"{}", b"[]", 100_000 * b"["):
        path = tmp_path / "damaged.onnx_adapter"
        export.save_adapter({key: np.frombuffer(text, np.uint8)}, path)
        error = label(swappable / "backbone.onnx", "--adapter", path, "odd/dark.bmp", status=1)
        assert "damaged.onnx_adapter are damaged; export it again" in error


def test_backbone_without_adapter(swappable, label):
    """A swappable backbone without --adapter is refused, since it has no class names."""
    error = label(swappable / "backbone.onnx", "odd/dark.bmp", status=1)
    assert "backbone.onnx has no class names; give the task's adapter with" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.onnx_adapter", "there is no file gone.onnx_adapter"),
        ("odd/dark.bmp", "odd/dark.bmp isn't an adapter that onnxruntime can read; give an .onnx_"),
        ("swappable/backbone.onnx", "backbone.onnx isn't an adapter that onnxruntime can read"),
        ("odd", "odd is a folder without an .onnx_adapter; export.py writes one"),
        ("swappable", "swappable is a folder; give swappable/digits.onnx_adapter or swappable/p"),
    ],
)
def test_files_that_are_no_adapter(swappable, label, name, message):
    """An adapter that is missing, of another kind or a folder gives one line that says which, and
    what to give."""
    error = label(swappable / "backbone.onnx", "--adapter", name, "odd/dark.bmp", status=1)
    assert message in error


# ----------------------------------------------------------------------------------- other errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.onnx", "there is no file gone.onnx"),
        ("odd/dark.bmp", "odd/dark.bmp isn't an .onnx file that onnxruntime can load ("),
        ("runs/photos", "runs/photos is a folder without an .onnx; export.py writes one"),
    ],
)
def test_files_that_are_no_graph(label, name, message):
    """A graph that is missing, of another kind or a folder gives one line that says which."""
    assert message in label(name, "odd/dark.bmp", status=1)


def test_folder_as_the_model(label, tmp_path):
    """For a folder in place of the graph, the graphs in it are named, without hidden ones."""
    for name in ("model.onnx", "model-int8.onnx", "._model.onnx", "labels.txt"):
        (tmp_path / name).write_text("")
    error = label(tmp_path, "odd/dark.bmp", status=1)
    names = f"{tmp_path / 'model-int8.onnx'} or {tmp_path / 'model.onnx'}"
    assert error == f"error: {tmp_path} is a folder; give {names}\n"


def test_graphs_that_give_no_labels(run_export, label, tmp_path):
    """A graph of embeddings, or one that export.py didn't write, is refused."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--output", "embedding", "--images", 8)
    error = label(tmp_path / "model.onnx", "odd/dark.bmp", status=1)
    assert "model.onnx gives embeddings, not labels" in error

    x = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 32, 32])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, 32, 32])
    node = helper.make_node("Identity", ["image"], ["logits"])
    graph = helper.make_graph([node], "other", [x], [y])
    opset = helper.make_opsetid("", 17)
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=[opset]), tmp_path / "other.onnx"
    )
    assert "other.onnx isn't a graph from export.py" in label(
        tmp_path / "other.onnx", "x.png", status=1
    )


@pytest.fixture
def changed(run_export, tmp_path):
    """A function that exports a graph with changed metadata and returns its path; None removes a
    key."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    proto = onnx.load(tmp_path / "model.onnx")
    meta = {prop.key: prop.value for prop in proto.metadata_props}

    def change(**changes):
        new = {key: value for key, value in (meta | changes).items() if value is not None}
        del proto.metadata_props[:]
        helper.set_model_props(proto, new)
        onnx.save(proto, tmp_path / "changed.onnx")
        return tmp_path / "changed.onnx"

    return change


NEEDED = ("classes", "image_size", "center", "resize", "input", "output", "mean", "std")


def test_damaged_metadata(changed, label):
    """Invalid text in any metadata key gives one line of error, never a traceback."""
    for key in NEEDED:
        for text in ("two", "", "{"):
            message = label(changed(**{key: text}), "odd/dark.bmp", status=1)
            assert re.search(r"metadata of .*changed.onnx are damaged \(.+\); export it", message)
    kinds = [("classes", '{"0": "a"}'), ("classes", '["a"]'), ("mean", "[1, 2]")]
    for key, text in (*kinds, ("std", '{"a": 1}')):
        assert "are damaged" in label(changed(**{key: text}), "odd/dark.bmp", status=1)
    for text in ("two", "1", "null", '"false"'):
        assert "are damaged" in label(changed(squash=text), "odd/dark.bmp", status=1)
    error = label(changed(classes='["a", "b"]'), "odd/dark.bmp", status=1)
    assert "the metadata name 2 classes, but the graph gives (1, 4)" in error


def test_values_that_are_not_finite(changed, label):
    """A mean that isn't finite or a std of 0 is refused; it would make every probability NaN."""
    message = "mean or std isn't finite, or std is 0"
    assert message in label(changed(mean="[1e400, 0, 0]"), "odd/dark.bmp", status=1)
    assert message in label(changed(std="[0, 1, 1]"), "odd/dark.bmp", status=1)


def test_a_graph_without_inputs(changed, label):
    """A graph without inputs is refused in one line."""
    path = changed()
    proto = onnx.load(path)
    proto.graph.node.insert(0, helper.make_node("Identity", ["constant"], ["image"], name="i"))
    proto.graph.initializer.append(
        numpy_helper.from_array(np.zeros((1, 3, 32, 32), np.float32), "constant")
    )
    del proto.graph.input[:]
    onnx.save(proto, path)
    assert "isn't a graph from export.py" in label(path, "odd/dark.bmp", status=1)


def test_a_batch_that_was_fixed_later(changed, label):
    """The graph's input says how many photos it takes, as after onnxruntime's own
    make_dynamic_shape_fixed."""
    path = changed()
    expected = label(path, "odd/dark.bmp")
    proto = onnx.load(path)
    first = proto.graph.input[0].type.tensor_type.shape.dim[0]
    for batch in (1, 3):
        first.dim_value = batch
        onnx.save(proto, path)
        assert label(path, "odd/dark.bmp") == expected
    first.dim_value = 100_000
    onnx.save(proto, path)
    assert "takes 100000 photos at once" in label(path, "odd/dark.bmp", status=1)


def test_metadata_of_other_programs(changed, label):
    """A graph that lacks a key, or has only one that other programs use too, is refused."""
    for key in NEEDED:
        error = label(changed(**{key: None}), "odd/dark.bmp", status=1)
        assert "changed.onnx" in error
    nothing = dict.fromkeys(NEEDED)
    for key, text in (("classes", '{"0": "cat"}'), ("image_size", "[224, 224]")):
        error = label(changed(**nothing | {key: text}), "odd/dark.bmp", status=1)
        assert re.search(r"changed.onnx (isn't a graph from export.py|has no class names)", error)


@pytest.mark.parametrize(
    "changes",
    [{"input": "uint8"}, {"image_size": "48"}, {"input": "uint8", "resize": "true"}],
    ids=str,
)
def test_input_that_metadata_do_not_describe(changed, label, changes):
    """A graph whose input isn't what its metadata say is refused."""
    error = label(changed(**changes), "odd/dark.bmp", status=1)
    message = "the graph takes tensor(float) ['batch', 3, 32, 32], not what its metadata say"
    assert message in error


def test_names_do_not_reach_the_terminal_raw(changed, label, tmp_path):
    """Control characters in names of classes and files don't reach the terminal."""
    names = '["\\u001b[31mred", "two\\nlines", "\\u009b2J", "é"]'
    photo = tmp_path / "new\nline.png"
    Image.new("RGB", (32, 32)).save(photo)
    path = changed(classes=names)
    out = label(path, photo)
    assert out.count("\n") == 1
    assert "new?line.png  " in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)
    assert "?[31mred" in out + label(path, *sorted(Path("odd").iterdir()))


def test_pixels_from_0_to_1_under_another_name(changed, label, odd_photos):
    """With input "unit" the graph normalises; label.py reads the input's name from the graph."""
    path = changed()
    meta = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    proto = onnx.load(changed(input="unit", mean=None, std=None))
    graph = proto.graph
    graph.input[0].name = "pixels"
    for name in ("mean", "std"):
        values = np.array(json.loads(meta[name]), np.float32).reshape(3, 1, 1)
        graph.initializer.append(numpy_helper.from_array(values, f"unit.{name}"))
    graph.node.insert(0, helper.make_node("Sub", ["pixels", "unit.mean"], ["unit.centred"]))
    graph.node.insert(1, helper.make_node("Div", ["unit.centred", "unit.std"], ["image"]))
    onnx.save(proto, path)
    check_labels(label(path, *odd_photos), odd_photos)


def float_tiff():
    """A TIFF of 32-bit floats, which doesn't say whether white is 1 or 255."""
    written = io.BytesIO()
    Image.new("F", (8, 8), 0.5).save(written, format="TIFF")
    return written.getvalue()


def huge_png():
    """The beginning of a PNG file that claims to have 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


def broken_png():
    """A PNG file whose second part has a wrong checksum."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(bytes(25 * 8)))
    end = png_chunk(b"IEND", b"")
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return start + png_chunk(b"gAMA", bytes(4))[:-1] + b"?" + data + end


@pytest.fixture
def wrong_photos(work):
    """Files below `work` that are named like photos, but aren't."""
    whole = (work / "odd/dark, large.jpg").read_bytes()
    contents = {
        "empty.png": b"",
        "text.png": b"no image",
        "truncated.jpg": whole[: len(whole) // 2],
        "broken.png": broken_png(),
        "huge.png": huge_png(),
        "float.tif": float_tiff(),
    }
    folder = work / "wrong"
    (folder / "folder.png").mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("gone.png", "folder.png", "empty.png", "text.png", "truncated.jpg", "broken.png"),
        *("huge.png", "float.tif"),
    ],
)
def test_photos_that_are_none(run_export, python, wrong_photos, tmp_path, name):
    """A missing, damaged or dangerous photo is skipped with one line; the photos before and after
    it are labelled."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    photos = ["odd/dark.bmp", f"wrong/{name}", "odd/dark.webp"]
    done = python(LABEL, tmp_path / "model.onnx", *photos)
    assert done.returncode == 1
    assert re.fullmatch(rf"skipped wrong/{name}: [^\n]+\n", done.stderr)
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [photos[0], photos[2]]


def test_warnings_of_pillow_are_not_shown(run_export, label, tmp_path):
    """A photo of 99 million pixels is labelled, without Pillow's warning of two lines."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 11000, 9000, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(9000 * (1 + 11000 // 8)))
    end = png_chunk(b"IEND", b"")
    content = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + end
    (tmp_path / "large.png").write_bytes(content)
    assert "large.png  " in label(tmp_path / "model.onnx", tmp_path / "large.png")


def test_folders_of_photos(run_export, label, tmp_path):
    """The photos below a folder are labelled in order of their names; other files are ignored, and
    hidden ones, such as macOS's ._d.jpg."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    image = Image.new("RGB", (32, 32))
    forms = {"a.PNG": "PNG", "b/b.webp": "WEBP", "c": "JPEG", "d.jpg": "JPEG", "save.jfif": "JPEG"}
    for name in reversed(forms):
        image.save(folder / name, forms[name])
    (folder / "notes.txt").write_text("no photo")
    (folder / "._d.jpg").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    out = label(tmp_path / "model.onnx", "odd/dark.bmp", folder)
    shown = [line.split("  ")[0] for line in out.splitlines()]
    assert shown == ["odd/dark.bmp", *(str(folder / name) for name in forms)]


def test_folder_without_photos(run_export, python, tmp_path):
    """A folder without photos is skipped with one line that says so."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    done = python(LABEL, tmp_path / "model.onnx", tmp_path, "odd/dark.bmp")
    assert done.returncode == 1
    assert done.stderr == f"skipped {tmp_path}: a folder without photos\n"
    assert done.stdout.startswith("odd/dark.bmp  ")


def test_what_is_a_photo():
    """label.py's copies of data.py's constants are up to date."""
    label = runpy.run_path(str(LABEL))
    for name in ("PHOTOS", "FORMATS", "BEGINNINGS", "HEIC"):
        assert label[name] == getattr(data, name)


def test_photos_in_folders_are_those_of_data(tmp_path):
    """In a folder label.py finds the same photos as data.py, in the same order."""
    contents = {f"a{suffix}": b"" for suffix in data.PHOTOS}
    contents |= {f"B{suffix.upper()}": b"" for suffix in data.PHOTOS}
    contents |= dict.fromkeys(("notes.txt", "a.jpg.part", "empty", ".a.jpg", "._a.jpg"), b"")
    contents |= {"jpeg": b"\xff\xd8\xff\xe0", "heic": b"\0\0\0\x24ftypheic", "text": b"no photo"}
    for place in ("", "sub", "sub/sub", "sub b", ".hidden", "sub/.hidden", "folder.jpg"):
        (tmp_path / place).mkdir(exist_ok=True)
        for name, content in contents.items():
            (tmp_path / place / name).write_bytes(content)
    (tmp_path / "empty.png").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "linked.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")

    expected = data.find_photos([tmp_path])[0]
    assert len(expected) == 5 * (2 * len(data.PHOTOS) + 2) + 1
    label = runpy.run_path(str(LABEL))
    assert list(label["find_photos"]([str(tmp_path)])) == expected


def test_nobody_reads_on(run_export, work, tmp_path):
    """A pipe closed early, as by "| head -1", ends label.py without a traceback."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    command = [sys.executable, str(LABEL), str(tmp_path / "model.onnx"), "photos"]
    with subprocess.Popen(
        command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("photos/dark/00.png  ")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_wrong_usage(python):
    """Without a photo, the status is 2 and the error names what is missing."""
    done = python(LABEL, "model.onnx")
    assert done.returncode == 2
    assert "error: the following arguments are required: photo" in done.stderr


@pytest.mark.parametrize("package", ["PIL", "onnxruntime", "numpy"])
def test_without_packages(python, absent, package):
    """Without a package that it needs, label.py prints its help, and else what to install."""
    message = f"there is no {package} here"
    (absent / f"{package}.py").write_text(f"raise ImportError({message!r})")
    shown = python(LABEL, "--help")
    done = python(LABEL, "model.onnx", "odd/dark.bmp")
    (absent / f"{package}.py").unlink()
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: label.py ")
    assert done.returncode == 1
    assert done.stderr == f"error: {message}; pip install onnxruntime pillow\n"


def test_postscript_by_another_name(run_export, python, tmp_path):
    """PostScript named .png isn't passed to Ghostscript, and a named pipe isn't waited for."""
    run_export("runs/photos", "-o", tmp_path / "model.onnx", "--images", 8)
    evil = tmp_path / "evil.png"
    evil.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.png")
    done = python(LABEL, tmp_path / "model.onnx", evil, tmp_path / "pipe.png")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert "evil.png: cannot identify image file" in first
    assert "pipe.png: a pipe or a device, not a file" in second
