"""What the tests share: tiny networks and data sets, a command-line runner, an HTTP server.

The tests run on the CPU, to check the same everywhere. Tests of whole runs also pass on a GPU:

    ADAPTERTUNE_GPU=1 pytest tests/test_train.py -k "same_command or resuming or compiled"
"""

import dataclasses
import http.server
import json
import os
import pickle
import re
import struct
import sys
import threading
import zlib
from pathlib import Path

if not os.environ.get("ADAPTERTUNE_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import vit

ROOT = Path(__file__).parent.parent
REAL = os.environ.get("ADAPTERTUNE_REAL")  # a folder of the published files in test_real.py
TINY = {"width": 32, "depth": 2, "heads": 2, "patch": 4, "image_size": 16, "hidden": 64}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Give the tests a cache folder of their own, also for the commands that they start."""
    os.environ["ADAPTERTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("HF_HUB_OFFLINE", None)


# -------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """The file of a random ViT that tells images apart: 2 blocks of width 32, images of 16 px."""
    return write_backbone(tmp_path_factory.mktemp("weights") / "tiny.safetensors", seed=0)


def write_tiny(path, *, seed, **changes):
    """Write a random ViT with TINY's shape, updated by `changes`; the file states its shape."""
    shape = TINY | changes
    config = vit.Config(**shape)
    torch.manual_seed(seed)
    model = vit.ViT(config)
    model.init_weights()
    meta = {"config": dataclasses.asdict(config), "mean": [0.5] * 3, "std": [0.5] * 3}
    save_file(model.state_dict(), path, metadata={"adaptertune": json.dumps(meta)})
    return path


def write_backbone(path, *, seed, **changes):
    """Write a random ViT whose outputs differ from image to image: matrices from N(0, 1/inputs).

    With `write_tiny`, whose matrices are from N(0, 0.02²), outputs hardly differ: a network trained
    on it predicts one class for all images, so any graph and any other head would agree.
    """
    write_tiny(path, seed=seed, **changes)
    tensors, meta = vit.read_tensors(path)
    for name, tensor in tensors.items():
        if name.startswith(("blocks", "patch_embed")) and tensor.ndim > 1:
            tensors[name] = tensor / 0.02 * tensor[0].numel() ** -0.5
    save_file(tensors, path, metadata={"adaptertune": json.dumps(meta)})
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The file of a random CLIP with both towers; its merges.txt lies beside it."""
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def write_tiny_clip(folder, *, width=64, embed=24, text=True):
    """Write random image and text towers in OpenAI's layout, and a small merges.txt beside them.

    Both have one head of 64 channels and 2 blocks; images of 16 px, texts of 77 tokens.
    """
    words = ["d i", "di g", "dig i", "digi t</w>", "p h", "ph o", "pho t", "phot o</w>"]
    lines = ["#version: 0.2", *words]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")

    shapes = {
        "visual.conv1.weight": (width, 3, 4, 4),
        "visual.class_embedding": (width,),
        "visual.proj": (width, embed),
        "visual.positional_embedding": (17, width),  # 4 x 4 patches and the class token
    }
    if text:
        shapes["token_embedding.weight"] = (514 + len(words), width)
        shapes["positional_embedding"] = (77, width)
        shapes["text_projection"] = (width, embed)
    shapes |= tower_shapes("visual.transformer", ("visual.ln_pre", "visual.ln_post"), width)
    if text:
        shapes |= tower_shapes("transformer", ("ln_final",), width)

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        std = 0.1 if len(shape) > 1 else 0.02
        tensors[name] = torch.randn(shape, generator=generator) * std
        if re.search(r"ln_\w+\.weight", name):
            tensors[name] += 1
    if text:
        tensors["logit_scale"] = torch.tensor(3.0)
    save_file(tensors, folder / "clip.safetensors")
    return folder / "clip.safetensors"


def tower_shapes(name, norms, width):
    """Names and shapes of OpenAI's two blocks, and of the norms outside them."""
    shapes = {}
    norms = list(norms)
    for i in range(2):
        block = f"{name}.resblocks.{i}"
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes[f"{block}.attn.out_proj.weight"] = (width, width)
        shapes[f"{block}.attn.out_proj.bias"] = (width,)
        shapes[f"{block}.mlp.c_fc.weight"] = (128, width)
        shapes[f"{block}.mlp.c_fc.bias"] = (128,)
        shapes[f"{block}.mlp.c_proj.weight"] = (width, 128)
        shapes[f"{block}.mlp.c_proj.bias"] = (width,)
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
    for norm in norms:
        shapes[f"{norm}.weight"] = (width,)
        shapes[f"{norm}.bias"] = (width,)
    return shapes


# ------------------------------------------------------------------------------------- data sets


def write_cifar10(data_dir, monkeypatch):
    """Write CIFAR-10 in miniature: ten images in each published file, all of value i in file i."""
    folder = data_dir / "cifar-10-batches-py"
    files = [f"data_batch_{i}" for i in range(1, 6)]
    for i, name in enumerate([*files, "test_batch"]):
        pixels = np.full((10, 3072), i, dtype=np.uint8)
        batch = {b"data": pixels, b"labels": list(range(10))}
        publish_pickle(folder / name, batch, monkeypatch)
    names = [f"class {i}".encode() for i in range(10)]
    publish_pickle(folder / "batches.meta", {b"label_names": names}, monkeypatch)


def publish_pickle(path, content, monkeypatch):
    """Write a pickle in place of one of CIFAR's files, and let data.py expect its MD5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=3))
    monkeypatch.setitem(data.CIFAR_FILES, path.name, data.file_hash(path, "md5"))


@pytest.fixture
def photos(tmp_path):
    """A folder with 20 PNG photos in each of three class folders, told apart by their colour."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("apple", "leaf", "sky")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(20):
            shape = (30 + i, 40, 3)
            pixels = torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8)
            pixels[..., channel] += 120
            image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return tmp_path / "photos"


# --------------------------------------------------------------------------------- command lines


@pytest.fixture
def pictures():
    """Requested by a test that looks at the pictures of its runs."""


@pytest.fixture
def few_pictures(request, monkeypatch):
    """Hide matplotlib, except from tests with the fixture `pictures`: drawing takes longer than
    training for a few steps."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


def runner(main, capsys):
    """A function that calls a command line's `main` with its arguments and returns what it prints.

    The exit status must be `status`. An error must be one line, which is returned instead.
    """

    def run(*arguments, status=0):
        try:
            got = main([str(each) for each in arguments])
        except SystemExit as stop:
            got = stop.code
        out, error = capsys.readouterr()
        assert got == status, out + error
        if status == 0:
            return out
        error = re.sub(r"^(fetch|retry)    .*\n", "", error, flags=re.M)  # what a download says
        assert re.fullmatch(r"error: [^\n]+\n", error), error
        return error

    return run


# --------------------------------------------------------------------------------------- network


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves files from memory, with ranges and with the faults that a test asks for.

    Attributes of the server:
        files: {path: bytes}.
        headers: {path: headers}, to add to an answer.
        redirects: {path: url}.
        ranges: False to ignore the header Range.
        cut: positions in the file at which the connection is closed, one for each download.
        errors: status codes to answer the first requests with.
        answers: {path: function of this handler}, for any other answer.
        seen: path and headers of each request.
    """

    def do_GET(self):  # noqa: N802
        server = self.server
        server.seen.append((self.path, dict(self.headers)))
        if server.errors:
            self.send_error(server.errors.pop(0))
        elif self.path in server.answers:
            server.answers[self.path](self)
        elif self.path in server.redirects:
            self.redirect(server.redirects[self.path])
        elif self.path in server.files:
            self.send_file(server.files[self.path])
        else:
            self.send_error(404)

    def redirect(self, url):
        self.send_response(302)
        self.send_header("Location", url)
        self.send_header("Content-Length", "0")
        self.end_with_own_headers()

    def send_file(self, body):
        server = self.server
        start = 0
        asked = self.headers.get("Range")
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_with_own_headers()
        end = server.cut.pop(0) if server.cut else len(body)
        self.wfile.write(body[start:end])
        if end < len(body):
            self.wfile.flush()
            self.connection.close()

    def end_with_own_headers(self):
        for key, value in self.server.headers.get(self.path, {}).items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_):
        pass


def full_disk(size):
    """For subprocess's preexec_fn: files longer than `size` bytes fail, as on a full disk. (In a
    subprocess, because the limit would also apply to the file that pytest prints to.)"""
    import resource  # Windows has none

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def serve():
    """A server on 127.0.0.1 with the attributes of Handler; `url` is its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {}
    server.headers = {}
    server.redirects = {}
    server.seen = []
    server.cut = []
    server.errors = []
    server.answers = {}
    server.ranges = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


server = pytest.fixture(serve, name="server")


class Evil:
    """An object whose pickle writes a file when it is read."""

    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('evil').write_text('x')",))


def png_chunk(kind, content):
    """A part of a PNG file, with its length and its checksum."""
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
