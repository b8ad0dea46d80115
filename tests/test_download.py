"""The real download code against a real HTTP server on loopback."""
import hashlib
import os
import pickle
import random
import subprocess
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, Handler, write_tiny

import data

BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_whole_file(server, tmp_path):
    server.files["/f"] = BODY
    data.download(f"{server.url}/f", tmp_path / "new" / "f", checksum=("sha256", SHA))
    assert (tmp_path / "new" / "f").read_bytes() == BODY
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f"]


def test_cut_connection_is_resumed(server, tmp_path):
    server.files["/f"], server.cut = BODY, [100_000, 250_000]
    data.download(f"{server.url}/f", tmp_path / "f", checksum=("sha256", SHA))
    assert (tmp_path / "f").read_bytes() == BODY
    assert [headers.get("Range") for _, headers in server.seen] == [None, "bytes=100000-", "bytes=250000-"]


def test_next_call_resumes(server, tmp_path):
    server.files["/f"], server.cut = BODY, [100_000]
    with pytest.raises(ValueError, match="cut at 100,000 of 300,000 bytes; run again to go on"):
        data.download(f"{server.url}/f", tmp_path / "f", tries=1)
    assert not (tmp_path / "f").exists()
    data.download(f"{server.url}/f", tmp_path / "f", checksum=("sha256", SHA))
    assert (tmp_path / "f").read_bytes() == BODY
    assert server.seen[-1][1]["Range"] == "bytes=100000-"


def test_server_without_ranges(server, tmp_path):
    server.files["/f"], server.cut, server.ranges = BODY, [100_000], False
    data.download(f"{server.url}/f", tmp_path / "f", checksum=("sha256", SHA))
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize("left", [300_000, 300_001], ids=["whole", "too long"])
def test_part_of_full_length(server, tmp_path, left):
    server.files["/f"] = BODY
    (tmp_path / "f.part").write_bytes((BODY + b"x")[:left])
    data.download(f"{server.url}/f", tmp_path / "f", checksum=("sha256", SHA))
    assert (tmp_path / "f").read_bytes() == BODY


def test_wrong_checksum_is_refused_and_removed(server, tmp_path):
    server.files["/f"] = BODY[:-1] + b"?"
    with pytest.raises(ValueError, match="wrong sha256 and was removed; try again, or fetch .* by other means"):
        data.download(f"{server.url}/f", tmp_path / "f", checksum=("sha256", SHA))
    assert list(tmp_path.iterdir()) == []


def test_404(server, tmp_path):
    with pytest.raises(ValueError, match=r"/f answered 404 Not Found; fetch .* by other means and put it at .*f or give"):
        data.download(f"{server.url}/f", tmp_path / "f")
    assert len(server.seen) == 1


def test_server_error_is_tried_again(server, tmp_path):
    server.files["/f"], server.errors = BODY, [503, 500]
    data.download(f"{server.url}/f", tmp_path / "f", checksum=("sha256", SHA))
    assert len(server.seen) == 3


def test_no_network(tmp_path):
    with pytest.raises(ValueError, match="could not fetch http://127.0.0.1:9/f: .*efused.* by other means and put it at"):
        data.download("http://127.0.0.1:9/f", tmp_path / "f")


def hub(server, body, etag):
    """Serve a file as the hub does: the first answer redirects to a store and states size and SHA-256."""
    server.redirects["/timm/net/resolve/main/model.safetensors"] = f"{server.url}/store"
    server.headers["/timm/net/resolve/main/model.safetensors"] = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
    server.files["/store"] = body


def test_hub_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    hub(server, BODY, SHA)
    path = data.hub_file("timm/net", "model.safetensors")
    assert path == tmp_path / "cache" / "timm" / "net" / "model.safetensors"
    assert path.read_bytes() == BODY
    requests = len(server.seen)
    assert data.hub_file("timm/net", "model.safetensors", offline=True) == path
    assert len(server.seen) == requests


def test_hub_checksum(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    hub(server, BODY[:-1] + b"?", SHA)
    with pytest.raises(ValueError, match="wrong sha256 and was removed"):
        data.hub_file("timm/net", "model.safetensors")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_token_goes_to_the_hub_alone(server, monkeypatch):
    import http.server
    import threading
    store = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.files, store.headers, store.redirects, store.seen, store.cut, store.errors = {"/store": BODY}, {}, {}, [], [], []
    threading.Thread(target=store.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub(server, BODY, SHA)
    server.redirects["/timm/net/resolve/main/model.safetensors"] = f"http://127.0.0.1:{store.server_port}/store"
    data.hub_file("timm/net", "model.safetensors")
    store.shutdown()
    store.server_close()
    assert server.seen[0][1]["Authorization"] == "Bearer secret"
    assert "Authorization" not in store.seen[0][1]


def test_offline(tmp_path):
    with pytest.raises(ValueError, match="--offline given; fetch it once without, or give --weights FILE"):
        data.hub_file("timm/net", "model.safetensors", offline=True)


def test_train_downloads_a_backbone(server, tmp_path):
    """The command line fetches deit_ti16 by name, here a random one of its shape, and trains on it."""
    weights = write_tiny(tmp_path / "w.safetensors", seed=0, width=192, depth=12, heads=3, patch=16, image_size=224, hidden=0)
    hub(server, weights.read_bytes(), hashlib.sha256(weights.read_bytes()).hexdigest())
    server.redirects = {"/timm/deit_tiny_patch16_224.fb_in1k/resolve/main/model.safetensors": f"{server.url}/store"}
    command = [sys.executable, str(ROOT / "train.py"), "--backbone", "deit_ti16", "--limit", "20", "--epochs", "1",
               "--image-size", "32"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "HF_ENDPOINT": server.url}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backbone deit_ti16 32px, 5," in done.stdout
    failed = subprocess.run([*command, "--backbone", "deit_s16", "--name", "other"], cwd=tmp_path, capture_output=True,
                            env={**os.environ, "HF_ENDPOINT": server.url}, text=True)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: ")
    assert "404" in failed.stderr
    assert "--weights" in failed.stderr


@pytest.fixture
def cifar_archive(tmp_path):
    """A small archive in the published form of CIFAR-100's python version, made of real pickles."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "made" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 200), ("test", 50)):
        labels = [i % 5 for i in range(count)]
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {b"data": pixels, b"fine_labels": labels, b"coarse_labels": labels, b"filenames": [b"x.png"] * count}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=3))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple", b"bear", b"cup", b"dog", b"elm"]}, protocol=3))
    archive = tmp_path / "made" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")
    return archive


def test_cifar_from_the_network(server, cifar_archive, tmp_path, monkeypatch):
    body = cifar_archive.read_bytes()
    md5 = hashlib.md5(body).hexdigest()
    server.files["/kriz/cifar-100-python.tar.gz"], server.cut = body, [1000]
    monkeypatch.setattr(data, "CIFAR", f"{server.url}/kriz/")
    monkeypatch.setitem(data.DATASETS, "cifar100", partial(data.DATASETS["cifar100"], md5=md5))
    with pytest.raises(ValueError, match="--offline given; put the published archive cifar-100-python.tar.gz into"):
        data.read("cifar100", str(tmp_path / "data"), offline=True)
    got = data.read("cifar100", str(tmp_path / "data"))
    assert (len(got.train), len(got.test), got.classes[1]) == (200, 50, "bear")
    again = data.read("cifar100", str(tmp_path / "data"), offline=True)  # now from the folder
    assert (again.train.pixels == got.train.pixels).all()
    expected = pickle.loads((cifar_archive.parent / "cifar-100-python" / "test").read_bytes())[b"data"]
    assert (got.test.pixels.reshape(50, -1).numpy() == expected).all()


def test_cifar_with_a_wrong_md5(server, cifar_archive, tmp_path, monkeypatch):
    server.files["/kriz/cifar-100-python.tar.gz"] = cifar_archive.read_bytes()
    monkeypatch.setattr(data, "CIFAR", f"{server.url}/kriz/")
    with pytest.raises(ValueError, match="wrong md5 and was removed"):
        data.read("cifar100", str(tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []
    (tmp_path / "data" / "cifar-100-python.tar.gz").write_bytes(cifar_archive.read_bytes())
    with pytest.raises(ValueError, match="is not the published archive"):
        data.read("cifar100", str(tmp_path / "data"))
