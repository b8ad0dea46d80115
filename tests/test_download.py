"""The download code, tested with a real HTTP server on loopback."""

import errno
import gzip
import hashlib
import itertools
import os
import pickle
import random
import re
import ssl
import subprocess
import sys
import tarfile
import threading
import urllib.error
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, full_disk, publish_pickle, runner, serve, write_tiny
from safetensors.torch import save as to_safetensors

import data
import train

BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
RIGHT = ("sha256", SHA)
WEIGHTS = to_safetensors({"weight": torch.arange(50_000.0)})
WEIGHTS_SHA = hashlib.sha256(WEIGHTS).hexdigest()
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Don't wait between tries; use a cache of the test's own, no proxy and no token."""
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# --------------------------------------------------------------------------------------- one file


def test_whole_file(server, tmp_path):
    """A file arrives whole, in a new folder, and nothing else is left there."""
    server.files["/f"] = BODY
    path = tmp_path / "new" / "f"
    data.download(f"{server.url}/f", path, checksum=RIGHT)
    assert path.read_bytes() == BODY
    assert files_below(tmp_path / "new") == [path]


def test_cut_connection_is_resumed(server, tmp_path):
    """A download whose connection is cut twice resumes where it was cut."""
    server.files["/f"] = BODY
    server.cut = [100_000, 250_000]
    data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)
    assert (tmp_path / "f").read_bytes() == BODY
    ranges = [headers.get("Range") for _, headers in server.seen]
    assert ranges == [None, "bytes=100000-", "bytes=250000-"]


def test_next_call_resumes(server, tmp_path):
    """After a failure the file doesn't exist, and the next call resumes the partial download."""
    server.files["/f"] = BODY
    server.cut = [100_000]
    message = "cut at 100,000 of 300,000 bytes; run again to go on"
    with pytest.raises(ValueError, match=message):
        data.download(f"{server.url}/f", tmp_path / "f", tries=1)
    assert not (tmp_path / "f").exists()
    data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)
    assert (tmp_path / "f").read_bytes() == BODY
    _, headers = server.seen[-1]
    assert headers["Range"] == "bytes=100000-"


def test_server_without_ranges(server, tmp_path):
    """If the server ignores ranges, the whole file is sent again, and it arrives intact."""
    server.files["/f"] = BODY
    server.cut = [100_000]
    server.ranges = False
    data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize("left", [BODY, BODY + b"x"], ids=["whole", "too long"])
def test_part_of_full_length(server, tmp_path, left):
    """A partial download that is already whole, or too long, ends as the right file."""
    server.files["/f"] = BODY
    (tmp_path / "f.part").write_bytes(left)
    data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)
    assert (tmp_path / "f").read_bytes() == BODY


def test_wrong_checksum_is_refused_and_removed(server, tmp_path):
    """A file with a wrong checksum is removed, and the error says so."""
    server.files["/f"] = BODY[:-1] + b"?"
    message = "wrong sha256 and was removed; try again, or fetch .* by other means"
    with pytest.raises(ValueError, match=message):
        data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "name, hint",
    [("f.zip", "f.zip$"), ("model.safetensors", "safetensors or give it by --weights$")],
)
def test_404(server, tmp_path, name, hint):
    """A missing file is requested once; the error says how to supply it."""
    message = r"/f answered 404 Not Found; or fetch .* by other means and put it at .*" + hint
    with pytest.raises(ValueError, match=message):
        data.download(f"{server.url}/f", tmp_path / name)
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_private_file_needs_a_token(server, tmp_path, status):
    """The error for a private or gated file of the hub names HF_TOKEN; a data set's doesn't."""
    server.errors = [status]
    with pytest.raises(
        ValueError, match=f"answered {status} .*; set HF_TOKEN for a private file, .* page; or"
    ):
        data.download(f"{server.url}/f", tmp_path / "f")
    server.errors = [status]
    with pytest.raises(ValueError, match=f"answered {status} [A-Z]\\w+; or fetch"):  # of a data set
        data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)


def test_a_token_that_is_not_accepted(server, tmp_path):
    """The error for a token that the hub refuses doesn't advise to set one."""
    server.errors = [401]
    with pytest.raises(ValueError, match="401 Unauthorized; it doesn't accept HF_TOKEN: correct"):
        data.download(f"{server.url}/f", tmp_path / "f", token="hf_old")


@pytest.mark.parametrize("errors", [[503, 500], [429, 408]])
def test_server_error_is_tried_again(server, tmp_path, errors, capsys):
    """Requests that end in a server error, or come too often, are tried again."""
    server.files["/f"] = BODY
    server.errors = list(errors)
    data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)
    assert len(server.seen) == 3
    assert (tmp_path / "f").read_bytes() == BODY
    first, *retries = capsys.readouterr().err.splitlines()
    assert first == f"fetch    {server.url}/f"
    assert [int(line.split()[1]) for line in retries] == errors


def test_a_server_that_asks_to_wait(server, tmp_path, monkeypatch):
    """Before the next request, the time of Retry-After passes, but at most a minute."""
    pauses = []
    monkeypatch.setattr(data.time, "sleep", pauses.append)
    server.answers["/f"] = answer(b"", 429, **{"Retry-After": "7"})
    with pytest.raises(ValueError, match="429 Too Many Requests; run again"):
        data.download(f"{server.url}/f", tmp_path / "f", tries=2)
    server.answers["/f"] = answer(b"", 429, **{"Retry-After": "86400"})

    def sleep(seconds):
        pauses.append(seconds)
        if seconds > 60:
            server.answers["/f"] = lambda handler: handler.connection.close()

    monkeypatch.setattr(data.time, "sleep", sleep)
    with pytest.raises(ValueError, match="could not fetch .*; run again"):
        data.download(f"{server.url}/f", tmp_path / "f", tries=3)
    assert pauses == [0, 7.5, 0, 60.5, 1.0]


def test_no_network(tmp_path):
    """Without a connection, the error says how to supply the file."""
    url = "http://127.0.0.1:9/f"
    message = f"could not fetch {url}: .*efused.* by other means and put it at"
    with pytest.raises(ValueError, match=message):
        data.download(url, tmp_path / "f")


def test_two_processes_at_once(server, tmp_path):
    """Of two processes that want the same file, one fetches it; the other waits and finds it."""
    server.files["/f"] = BODY
    server.cut = [100_000]
    code = f"""
import multiprocessing, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import data
path = pathlib.Path({str(tmp_path / "f")!r})
def work():
    data.download({server.url + "/f"!r}, path, checksum={RIGHT!r})
    assert data.file_hash(path, "sha256") == {SHA!r}
fork = multiprocessing.get_context("fork")  # torch is imported once
both = [fork.Process(target=work) for _ in range(2)]
for process in both:
    process.start()
for process in both:
    process.join()
print([process.exitcode for process in both])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr
    assert done.stderr.count("waiting for another process") == 1
    assert files_below(tmp_path) == [tmp_path / "f"]
    assert len(server.seen) == 2  # both by one process: it was cut once, and waited half a second


def test_without_locks(server, tmp_path, monkeypatch):
    """Without flock (on Windows), files are still downloaded and written."""
    monkeypatch.setattr(data, "fcntl", None)
    server.files["/f"] = BODY
    server.cut = [100_000]
    data.download(f"{server.url}/f", tmp_path / "f", checksum=RIGHT)
    data.write_file(tmp_path / "f", "new")
    with data.empty_folder(tmp_path / "part") as part:
        data.write_file(part / "x", "content")
    assert (tmp_path / "f").read_text() == "new"
    assert files_below(tmp_path) == [tmp_path / "f"]


def test_inode_numbers_that_change(tmp_path, monkeypatch):
    """Where a file never seems to be the same (some network file systems), it is written anyway."""
    numbers = itertools.count()
    monkeypatch.setattr(data.os.path, "samestat", lambda first, second: False)
    monkeypatch.setattr(data, "inode", lambda path: next(numbers))
    data.write_file(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new"
    with data.locked(tmp_path / "folder", folder=True):
        assert (tmp_path / "folder").is_dir()


@pytest.mark.skipif(data.fcntl is None, reason="nothing is locked")
def test_a_file_that_is_replaced_again_and_again(tmp_path, monkeypatch):
    """Whoever waits for a file that others replace locks the one that stays."""
    path = tmp_path / "f"
    plain = data.take_lock
    replaced = iter(range(300))

    def take_lock(handle, place, wait):
        plain(handle, place, wait)
        for number in replaced:
            (tmp_path / "new").write_text(str(number))
            os.replace(tmp_path / "new", place)
            return

    monkeypatch.setattr(data, "take_lock", take_lock)
    with data.locked(path) as handle:
        assert os.fstat(handle).st_ino == path.stat().st_ino
        assert path.read_text() == "299"


# ------------------------------------------------------------------------- what isn't the file


def answer(body, status=200, **headers):
    """A function that sends this answer."""

    def send(handler):
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    return send


PAGE = b"<!DOCTYPE html><title>Log in to the network</title>"
POISON = {
    "a page": answer(PAGE),
    "nothing": answer(b""),
    "204": answer(b"", status=204),
    "cut without a length": answer(WEIGHTS[:-1000]),
    "gzip": answer(gzip.compress(WEIGHTS), Content_Encoding="gzip"),
    "a header alone": answer(WEIGHTS[:80]),
    "a nested header": answer((100_000).to_bytes(8, "little") + b"[" * 100_001),
    "another JSON": answer(b"{\0\0\0\0\0\0\0" + b'["data_offsets", 1, 2]' * 10),
}


@pytest.mark.parametrize("poison", POISON)
def test_another_thing_is_not_kept(server, tmp_path, poison):
    """Without a checksum, too, an answer that isn't a whole safetensors file isn't kept."""
    path = tmp_path / "model.safetensors"
    server.answers["/w"] = POISON[poison]
    with pytest.raises(
        ValueError, match=r"and was removed; try again, or fetch http.* other means"
    ):
        data.download(f"{server.url}/w", path)
    assert files_below(tmp_path) == []
    del server.answers["/w"]
    server.files["/w"] = WEIGHTS
    data.download(f"{server.url}/w", path)
    assert path.read_bytes() == WEIGHTS


def test_a_page_is_no_vocabulary(server, tmp_path):
    """A web page received in place of a vocabulary isn't kept."""
    server.answers["/v"] = answer(PAGE)
    with pytest.raises(ValueError, match="isn't a vocabulary and was removed"):
        data.download(f"{server.url}/v", tmp_path / "merges.txt")
    assert files_below(tmp_path) == []


def test_part_of_another_offset(server, tmp_path):
    """If the server sends another range than the requested one, the whole file is requested."""
    path = tmp_path / "model.safetensors"
    path.with_name(f"{path.name}.part").write_bytes(WEIGHTS[:1000])

    def other_part(handler):
        if not handler.headers.get("Range"):
            answer(WEIGHTS)(handler)
        else:
            answer(WEIGHTS[500:], 206, Content_Range=f"bytes 500-{len(WEIGHTS)}/9")(handler)

    server.answers["/w"] = other_part
    data.download(f"{server.url}/w", path)
    assert path.read_bytes() == WEIGHTS


def test_more_than_stated(server, tmp_path):
    """A transfer ends once more arrives than the hub stated, before the disk is full."""
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.send_header("X-Linked-Size", "1000")
        handler.end_headers()
        for _ in range(400):
            handler.wfile.write(bytes(1 << 20))
            sent.append(1)

    server.answers["/w"] = endless
    with pytest.raises(ValueError, match="arrived with more than the 1,000 bytes .* was removed"):
        data.download(f"{server.url}/w", tmp_path / "model.safetensors")
    assert len(sent) < 100
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n", "too slow, .* bytes in 0 seconds"),
        (b"HTTP/1.0 200 OK\r\nX: ", "no answer in 0 seconds"),
    ],
    ids=["body", "head"],
)
def test_drip(server, tmp_path, monkeypatch, beginning, message):
    """A transfer of a few bytes a second is given up, even if each byte arrives in time."""
    monkeypatch.setattr(data, "PATIENCE", 0.2)
    finished = threading.Event()

    def drip(handler):
        handler.wfile.write(beginning)
        while not finished.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    server.answers["/w"] = drip
    try:
        with pytest.raises(ValueError, match=f"{message}; run again to go on"):
            data.download(f"{server.url}/w", tmp_path / "w", tries=2)
    finally:
        finished.set()


def test_token_that_a_server_repeats(server, tmp_path):
    """A token that a server repeats, in its reason phrase or in place of an HTTP answer, isn't
    printed."""

    def repeat(handler):
        handler.send_response(403, f"no {handler.headers['Authorization']}")
        handler.end_headers()

    server.answers["/f"] = repeat
    with pytest.raises(ValueError, match="403 Forbidden; set HF_TOKEN") as caught:
        data.download(f"{server.url}/f", tmp_path / "f", token="hf_xyzzy")
    assert "xyzzy" not in str(caught.value)

    def repeat_as_no_http(handler):
        handler.wfile.write(f"{handler.headers['Authorization']}\r\n\r\n".encode())
        handler.close_connection = True

    server.answers["/f"] = repeat_as_no_http
    with pytest.raises(ValueError, match="could not fetch .*: BadStatusLine; run") as caught:
        data.download(f"{server.url}/f", tmp_path / "f", token="hf_xyzzy")
    assert "xyzzy" not in str(caught.value)


def test_unknown_certificates(tmp_path, monkeypatch):
    """A server whose certificate can't be checked gives the two remedies."""

    def request_rest(*_):
        raise urllib.error.URLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

    monkeypatch.setattr(data, "request_rest", request_rest)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="SSL_CERT_FILE .* or on macOS .*Certificates.command"):
        data.download("https://localhost/f", tmp_path / "f")


def without_reason(error):
    """An error of ssl as Python makes it if OpenSSL states no reason."""
    error.reason = None
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), "TimeoutError"),
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.URLError(TimeoutError()), "TimeoutError"),
        (urllib.error.URLError(ConnectionRefusedError(111, "refused")), "[Errno 111] refused"),
        (without_reason(ssl.SSLEOFError(8, "EOF occurred")), "EOF occurred"),
    ],
)
def test_why_there_is_no_answer(error, reason):
    """An error without a text is named by its type. ssl's errors may have None as reason."""
    assert data.why_no_answer(error) == reason


def test_a_phrase_of_several_lines(server, tmp_path):
    """A status without a reason, and a redirect loop, whose reason has several lines, each give a
    one-line error."""
    server.answers["/f"] = answer(b"", status=499)
    with pytest.raises(ValueError, match="/f answered 499 without a reason; or fetch"):
        data.download(f"{server.url}/f", tmp_path / "f")
    server.redirects["/f"] = f"{server.url}/f"
    del server.answers["/f"]
    with pytest.raises(ValueError, match="/f answered 302 Found; or fetch"):
        data.download(f"{server.url}/f", tmp_path / "f")


def test_full_disk(server, tmp_path):
    """A full disk ends a download at once, with a line that says so, and isn't tried again."""
    server.files["/f"] = BODY
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import data
data.download({server.url + "/f"!r}, pathlib.Path({str(tmp_path / "f")!r}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=full_disk(100_000), check=False
    )
    message = r"ValueError: can't write .*part \(File too large\); make room; or fetch"
    assert re.search(message, done.stderr)
    assert len(server.seen) == 1


# ---------------------------------------------------------------------------------------- the hub

NET = "/timm/net/resolve/main/model.safetensors"


def serve_as_hub(server, body, etag, path=NET, store=""):
    """Serve a file as the hub does: a redirect, which states size and SHA-256, to a store."""
    server.redirects[path] = f"{store or server.url}/store"
    server.headers[path] = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
    server.files["/store"] = body


def test_hub_file(server, tmp_path, monkeypatch):
    """A file of the hub is kept in the cache and not requested again."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    serve_as_hub(server, WEIGHTS, WEIGHTS_SHA)
    path = data.hub_file("timm/net", "model.safetensors")
    assert path == tmp_path / "cache" / "timm" / "net" / "model.safetensors"
    assert path.read_bytes() == WEIGHTS
    requests = len(server.seen)
    assert data.hub_file("timm/net", "model.safetensors", offline=True) == path
    assert len(server.seen) == requests


def test_hub_offline(server, monkeypatch):
    """With HF_HUB_OFFLINE, nothing is requested."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    serve_as_hub(server, WEIGHTS, WEIGHTS_SHA)
    with pytest.raises(ValueError, match="is not there and HF_HUB_OFFLINE given; fetch it once"):
        data.hub_file("timm/net", "model.safetensors")
    assert server.seen == []


def test_hub_checksum(server, tmp_path, monkeypatch):
    """A file that differs from the SHA-256 that the hub states is refused and removed."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    serve_as_hub(server, WEIGHTS[:-1] + b"?", WEIGHTS_SHA)
    with pytest.raises(ValueError, match="wrong sha256 and was removed"):
        data.hub_file("timm/net", "model.safetensors")
    assert files_below(tmp_path / "cache") == []


store = pytest.fixture(serve, name="store")  # a second server, in the role of the hub's store


def test_token_goes_to_the_hub_alone(server, store, monkeypatch):
    """HF_TOKEN is sent to the hub and not to the host that it redirects to."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    store.files["/store"] = WEIGHTS
    serve_as_hub(server, WEIGHTS, WEIGHTS_SHA, store=store.url)
    data.hub_file("timm/net", "model.safetensors")
    _, to_hub = server.seen[0]
    _, to_store = store.seen[0]
    assert to_hub["Authorization"] == "Bearer secret"
    assert "Authorization" not in to_store


def test_token_is_never_printed(server, monkeypatch):
    """The line break at the end of a token from a file is dropped; a token with any other one is
    refused, and no error shows it."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    serve_as_hub(server, WEIGHTS, WEIGHTS_SHA)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nhf_other")
    with pytest.raises(ValueError, match="HF_TOKEN holds a space or another character") as caught:
        data.hub_file("timm/net", "model.safetensors")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    data.hub_file("timm/net", "model.safetensors")
    _, headers = server.seen[0]
    assert headers["Authorization"] == "Bearer hf_secret"


@pytest.mark.parametrize("endpoint", ["file:///etc", "hub.example", "http://hub/\nX: y"])
def test_endpoint(monkeypatch, endpoint):
    """HF_ENDPOINT must be a web address."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ValueError, match="HF_ENDPOINT is no address like"):
        data.hub_file("timm/net", "model.safetensors")


def test_redirected_to_no_address(server, monkeypatch):
    """A redirect to an invalid address gives an error that doesn't repeat the address."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    server.redirects[NET] = "http://[secret]/"
    with pytest.raises(ValueError, match="could not fetch .*: ValueError; run again") as caught:
        data.hub_file("timm/net", "model.safetensors")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("user", ["me:secret", "me:se#cret", "me:se/cret", "secret"])
def test_password_is_never_printed(server, monkeypatch, user):
    """An endpoint with a user or password is refused at once, and the password isn't shown."""
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("//", f"//{user}@"))
    with pytest.raises(ValueError, match="HF_ENDPOINT is no address like") as caught:
        data.hub_file("timm/net", "model.safetensors")
    assert "cret" not in str(caught.value)
    assert server.seen == []


def test_no_home(monkeypatch):
    """Without a home folder, the error names ADAPTERTUNE_CACHE."""
    monkeypatch.delenv("ADAPTERTUNE_CACHE")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(data.Path, "home", no_home)
    with pytest.raises(ValueError, match="no home folder .* set ADAPTERTUNE_CACHE"):
        data.hub_file("timm/net", "model.safetensors")


def test_offline():
    """With --offline, a file that isn't in the cache is an error that says what to do."""
    message = "--offline given; fetch it once without (train.py has --download), or give --weights"
    with pytest.raises(ValueError, match=re.escape(message)):
        data.hub_file("timm/net", "model.safetensors", offline=True)


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    """A download to a folder that can't be made says which variable names another."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(ValueError, match=r"can't write to .*; set ADAPTERTUNE_CACHE to another"):
        data.hub_file("timm/net", "model.safetensors")


@pytest.mark.skipif(data.fcntl is None, reason="nothing is locked")
def test_file_systems_with_few_locks(tmp_path, monkeypatch, capsys):
    """Files are locked while open for writing, as NFS wants it, unless they can't be. Where nothing
    can be locked, one line says so."""
    path = tmp_path / "f"
    with data.locked(path) as handle:
        assert data.fcntl.fcntl(handle, data.fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    plain = os.open

    def read_only(place, flags, *more):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return plain(place, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(data.os, "open", read_only)
        with data.locked(path) as handle:
            assert data.fcntl.fcntl(handle, data.fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY

    def no_locks(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.fcntl, "flock", no_locks)
    data.note_no_locks.cache_clear()
    capsys.readouterr()
    for _ in range(2):
        data.write_file(path, "new")
    assert path.read_text() == "new"
    assert capsys.readouterr().err.startswith("note     files can't be locked here (No locks avail")
    data.write_file(path, "newer")
    assert not capsys.readouterr().err


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, server):
    """A function that runs train.py's main in an empty folder, with the server as hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return runner(train.main, capsys)


def test_train_downloads_a_backbone(server, run, tmp_path):
    """train.py fetches deit_ti16 by name, here with random weights, and trains on it."""
    shape = {"width": 192, "depth": 12, "heads": 3, "patch": 16, "image_size": 224, "hidden": 0}
    body = write_tiny(tmp_path / "w.safetensors", seed=0, **shape).read_bytes()
    path = "/timm/deit_tiny_patch16_224.fb_in1k/resolve/main/model.safetensors"
    serve_as_hub(server, body, hashlib.sha256(body).hexdigest(), path)
    command = ["--backbone", "deit_ti16", "--limit", 20, "--epochs", 1, "--image-size", 32]
    ready = "ready    deit_ti16 and digits at 32 px; give --offline\n"
    assert run(*command, "--download", "--seeds", "0,1") == ready
    assert not (tmp_path / "runs").exists()
    seen = len(server.seen)
    assert "backbone deit_ti16 32px, 5," in run(*command, "--offline")
    assert len(server.seen) == seen


def test_train_without_the_backbone_on_the_hub(run, tmp_path):
    """A backbone that the hub doesn't have gives a one-line error that names --weights."""
    error = run("--backbone", "deit_s16", status=1)
    assert "404" in error
    assert "--weights" in error
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------ CIFAR


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
    """A small archive in the published form of CIFAR-100's Python version, with real pickles."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "made" / "cifar-100-python"
    for name, count in (("train", 200), ("test", 50)):
        labels = [i % 5 for i in range(count)]
        batch = {
            b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            b"fine_labels": labels,
            b"coarse_labels": labels,
            b"filenames": [b"x.png"] * count,
        }
        publish_pickle(folder / name, batch, monkeypatch)
    meta = {b"fine_label_names": [b"apple", b"bear", b"cup", b"dog", b"elm"]}
    publish_pickle(folder / "meta", meta, monkeypatch)
    archive = tmp_path / "made" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")
    return archive


def test_cifar_from_the_network(server, cifar_archive, tmp_path, monkeypatch):
    """The archive is fetched over a connection that is cut, extracted, and read from its folder."""
    body = cifar_archive.read_bytes()
    md5 = hashlib.md5(body).hexdigest()
    server.files["/kriz/cifar-100-python.tar.gz"] = body
    server.cut = [1000]
    monkeypatch.setattr(data, "CIFAR", f"{server.url}/kriz/")
    small = partial(data.DATASETS["cifar100"], md5=md5)
    monkeypatch.setitem(data.DATASETS, "cifar100", small)

    folder = str(tmp_path / "data")
    message = "--offline given; put the published archive cifar-100-python.tar.gz into"
    with pytest.raises(ValueError, match=message):
        data.read("cifar100", folder, offline=True)
    fetched = data.read("cifar100", folder)
    assert len(fetched.train) == 200
    assert len(fetched.test) == 50
    assert fetched.classes[1] == "bear"
    again = data.read("cifar100", folder, offline=True)
    assert (again.train.pixels == fetched.train.pixels).all()
    published = (cifar_archive.parent / "cifar-100-python" / "test").read_bytes()
    expected = pickle.loads(published)[b"data"]
    assert (fetched.test.pixels.reshape(50, -1).numpy() == expected).all()


def test_cifar_with_a_wrong_md5(server, cifar_archive, tmp_path, monkeypatch):
    """An archive that isn't the published one is refused, whether downloaded or found."""
    folder = tmp_path / "data"
    server.files["/kriz/cifar-100-python.tar.gz"] = cifar_archive.read_bytes()
    monkeypatch.setattr(data, "CIFAR", f"{server.url}/kriz/")
    with pytest.raises(ValueError, match="wrong md5 and was removed"):
        data.read("cifar100", str(folder))
    assert list(folder.iterdir()) == []
    (folder / cifar_archive.name).write_bytes(cifar_archive.read_bytes())
    with pytest.raises(ValueError, match="is not the published file"):
        data.read("cifar100", str(folder))
