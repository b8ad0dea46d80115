"""Fixtures: a tiny backbone file, a small HTTP server, photos."""
import dataclasses
import http.server
import json
import os
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vit

ROOT = Path(__file__).parent.parent
REAL = os.environ.get("ADAPTERTUNE_REAL")  # a folder with the published weights and data that test_real.py names


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A ViT of 2 blocks and width 32 for 16 px images, random, in a file that states its own shape."""
    return write_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", seed=0)


def write_tiny(path, *, seed, **changes):
    config = vit.Config(**{"width": 32, "depth": 2, "heads": 2, "patch": 4, "image_size": 16, "hidden": 64, **changes})
    torch.manual_seed(seed)
    model = vit.ViT(config)
    model.init_weights()
    meta = {"config": dataclasses.asdict(config), "mean": [0.5] * 3, "std": [0.5] * 3}
    save_file(model.state_dict(), path, metadata={"adaptertune": json.dumps(meta)})
    return path


def write_cifar10(data_dir):
    """CIFAR-10's extracted folder in miniature: ten images in each of the published files, batch i all of value i."""
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {b"data": np.full((10, 3072), i, dtype=np.uint8), b"labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=3))
    names = [f"class {i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=3))


@pytest.fixture
def photos(tmp_path):
    """A folder of class folders with 20 PNG photos in each of three classes, told apart by their colour."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("apple", "leaf", "sky")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = torch.randint(0, 120, (30 + i, 40, 3), generator=generator, dtype=torch.uint8)
            pixels[..., channel] += 120
            image.fromarray(pixels.numpy()).save(tmp_path / "photos" / name / f"{i:02}.png")
    return tmp_path / "photos"


def runner(main, capsys):
    """A function that runs a command line's `main` with its arguments and gives the output; an error must be one line."""
    def run(*arguments, status=0):
        try:
            got = main(list(map(str, arguments)))
        except SystemExit as stop:
            got = stop.code
        out, error = capsys.readouterr()
        assert got == status, out + error
        if status:
            assert re.fullmatch(r"error: [^\n]+\n", error), error
        return error if status else out

    return run


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files {path: bytes}, with ranges; server.cut closes the connection after so many bytes, once for each
    entry; server.errors are answered first; server.headers {path: headers} are added; server.redirects {path: url}.
    Requests are noted in server.seen."""

    def do_GET(self):  # noqa: N802
        server = self.server
        server.seen.append((self.path, dict(self.headers)))
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            for key, value in server.headers.get(self.path, {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path not in server.files:
            self.send_error(404)
            return
        body, start = server.files[self.path], 0
        if (asked := self.headers.get("Range")) and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        for key, value in server.headers.get(self.path, {}).items():
            self.send_header(key, value)
        self.end_headers()
        end = server.cut.pop(0) if server.cut else len(body)
        self.wfile.write(body[start:end])
        if end < len(body):
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A server on 127.0.0.1; `url` is its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.headers, server.redirects, server.seen = {}, {}, {}, []
    server.cut, server.errors, server.ranges = [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def write_tiny_clip(folder, *, width=64, embed=24, text=True):
    """Random image and text towers in OpenAI's layout (one head of 64 channels each, 16 px, 77 tokens), with a small merges.txt
    beside them."""
    rng = torch.Generator().manual_seed(0)
    words = ["d i", "di g", "dig i", "digi t</w>", "p h", "ph o", "pho t", "phot o</w>"]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{word}\n" for word in words))
    shapes = {"visual.conv1.weight": (width, 3, 4, 4), "visual.class_embedding": (width,), "visual.proj": (width, embed),
              "visual.positional_embedding": (17, width)}
    towers = {"visual.transformer": ("visual.ln_pre", "visual.ln_post")}
    if text:
        shapes |= {"token_embedding.weight": (514 + len(words), width), "positional_embedding": (77, width),
                   "text_projection": (width, embed)}
        towers["transformer"] = ("ln_final",)
    for tower, norms in towers.items():
        for i in range(2):
            name = f"{tower}.resblocks.{i}"
            shapes |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,),
                       f"{name}.attn.out_proj.weight": (width, width), f"{name}.attn.out_proj.bias": (width,),
                       f"{name}.mlp.c_fc.weight": (128, width), f"{name}.mlp.c_fc.bias": (128,),
                       f"{name}.mlp.c_proj.weight": (width, 128), f"{name}.mlp.c_proj.bias": (width,)}
            norms = (*norms, f"{name}.ln_1", f"{name}.ln_2")
        shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    tensors = {name: torch.randn(shape, generator=rng) * (0.1 if len(shape) > 1 else 0.02) for name, shape in shapes.items()}
    tensors |= {name: 1 + value for name, value in tensors.items() if re.search(r"ln_\w+\.weight", name)}
    if text:
        tensors["logit_scale"] = torch.tensor(3.0)
    save_file(tensors, folder / "clip.safetensors")
    return folder / "clip.safetensors"
