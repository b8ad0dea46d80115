"""The published data sets that aren't embedded, read from small archives in exactly their layout.

Archives come from a server on loopback. The addresses and checksums, of torchvision's classes too,
are set to those of the small files; torchvision is otherwise unchanged.
"""

import gc
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, full_disk, runner

import data
import train

Image = pytest.importorskip("PIL.Image")

GREY = {"RGB": (200, 100, 50), "L": 120, "P": 3, "CMYK": (0, 50, 100, 20)}


def photo(mode="RGB", size=(40, 30), kind="JPEG"):
    """The bytes of a photo of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, GREY[mode]).save(file, kind)
    return file.getvalue()


def tar(files, mode="w"):
    """The bytes of a tar archive of {name: bytes}."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def zipped(files):
    """The bytes of a zip archive of {name: bytes}."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return content.getvalue()


def matlab(**arrays):
    """The bytes of a MATLAB 5 file."""
    scipy_io = pytest.importorskip("scipy.io")
    file = io.BytesIO()
    scipy_io.savemat(file, arrays, do_compression=True)
    return file.getvalue()


def md5(body):
    return hashlib.md5(body).hexdigest()


def lines(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


def names_by_class(dataset, part):
    """{class: names of its photos} for one part of a data set."""
    images = getattr(dataset, part)
    found = {name: [] for name in dataset.classes}
    for name, label in zip(images.names, images.labels.tolist(), strict=True):
        found[dataset.classes[label]].append(name)
    return found


# -------------------------------------------------------------------------- read by torchvision


@pytest.fixture
def torchvision():
    pytest.importorskip("scipy")
    return pytest.importorskip("torchvision.datasets")


@pytest.fixture
def pets(server, torchvision, monkeypatch):
    """Pets: three classes, one of them lower case in its files; a stray .mat among the photos; a
    palette image named .jpg."""
    photos = {"images/Abyssinian_1.mat": b"no photo"}
    listed = {"trainval": [], "test": []}
    for label, name in enumerate(("Abyssinian", "american_bulldog", "Siamese"), start=1):
        for i in range(6):
            part = "trainval" if i < 4 else "test"
            odd = name == "Siamese" and i == 0
            body = photo("P", kind="GIF") if odd else photo()
            photos[f"images/{name}_{i + 1}.jpg"] = body
            listed[part].append(f"{name}_{i + 1} {label} 1 1")
    lists = {
        "annotations/trainval.txt": lines(*listed["trainval"]),
        "annotations/test.txt": lines(*listed["test"]),
        "annotations/list.txt": lines("#Image CLASS-ID SPECIES BREED ID"),
    }
    archives = {"images.tar.gz": tar(photos, "w:gz"), "annotations.tar.gz": tar(lists, "w:gz")}
    resources = []
    for name, body in archives.items():
        server.files[f"/{name}"] = body
        resources.append((f"{server.url}/{name}", md5(body)))
    monkeypatch.setattr(torchvision.OxfordIIITPet, "_RESOURCES", tuple(resources))


def test_pets(pets, tmp_path):
    """Classes are numbered as in the lists; a photo of any kind is converted."""
    found = data.read("pets", str(tmp_path), image_size=16)
    assert found.name == "pets"
    assert found.classes == ["Abyssinian", "American Bulldog", "Siamese"]
    assert found.train.shape == (12, 3, 18, 18)
    assert found.val is None
    assert found.test.shape == (6, 3, 18, 18)
    bulldogs = [f"images/american_bulldog_{i}.jpg" for i in (5, 6)]
    assert names_by_class(found, "test")["American Bulldog"] == bulldogs
    palette = names_by_class(found, "train")["Siamese"].index("images/Siamese_1.jpg")
    assert palette == 0
    sentences = data.sentences(found.classes, data.template_of("pets"))
    assert sentences[2] == "a photo of a Siamese, a type of pet."


def test_a_downloaded_set_is_read_offline(pets, server, tmp_path):
    """A downloaded data set is read a second time without any request."""
    data.read("pets", str(tmp_path), image_size=16)
    del server.seen[:]
    found = data.read("pets", str(tmp_path), image_size=16, offline=True)
    assert len(found.train) == 12
    assert not server.seen
    assert data.is_there("pets", str(tmp_path))
    assert not data.is_there("pets", str(tmp_path / "elsewhere"))


def test_the_protocol(pets, tmp_path):
    """Validation is a tenth of the training pool; the published test set stays whole."""
    found = data.split(data.read("pets", str(tmp_path), image_size=16), seed=0)
    assert [len(part) for part in (found.train, found.val, found.test)] == [11, 1, 6]


def test_food101(server, torchvision, monkeypatch, tmp_path):
    """Classes are in alphabetical order, whatever the order of the list, and labels follow it."""
    classes = ["waffles", "apple_pie"]
    files = {"food-101/meta/classes.txt": lines(*classes)}
    for part, numbers in {"train": (5, 6, 7), "test": (8,)}.items():
        listed = {name: [f"{name}/{n}" for n in numbers] for name in classes}
        files[f"food-101/meta/{part}.json"] = json.dumps(listed).encode()
        for each in (*listed["waffles"], *listed["apple_pie"]):
            files[f"food-101/images/{each}.jpg"] = photo("CMYK" if part == "test" else "RGB")
    body = tar(files, "w:gz")
    server.files["/food-101.tar.gz"] = body
    monkeypatch.setattr(torchvision.Food101, "_URL", f"{server.url}/food-101.tar.gz")
    monkeypatch.setattr(torchvision.Food101, "_MD5", md5(body))
    found = data.read("food101", str(tmp_path), image_size=16)
    assert found.classes == ["apple_pie", "waffles"]
    assert len(found.train) == 6
    assert names_by_class(found, "test") == {
        "apple_pie": ["images/apple_pie/8.jpg"],
        "waffles": ["images/waffles/8.jpg"],
    }


def test_food101_with_another_class_to_test(server, torchvision, monkeypatch, tmp_path):
    """Food-101 is refused if the classes of its two lists differ."""
    files = {}
    for part, classes in {"train": ("apple_pie", "waffles"), "test": ("waffles", "zuppa")}.items():
        listed = {name: [f"{name}/{part}"] for name in classes}
        files[f"food-101/meta/{part}.json"] = json.dumps(listed).encode()
        files |= {f"food-101/images/{name}/{part}.jpg": photo() for name in classes}
    body = tar(files, "w:gz")
    server.files["/food-101.tar.gz"] = body
    monkeypatch.setattr(torchvision.Food101, "_URL", f"{server.url}/food-101.tar.gz")
    monkeypatch.setattr(torchvision.Food101, "_MD5", md5(body))
    with pytest.raises(ValueError, match="food101 isn't whole: its lists don't have the same"):
        data.read("food101", str(tmp_path), image_size=16)


def test_flowers102(server, torchvision, monkeypatch, tmp_path):
    """Labels, which begin at 1 in the file, begin at 0 here; the pool is train and validation."""
    photos = {f"jpg/image_{i:05d}.jpg": photo() for i in range(1, 10)}
    labels = np.array([[1, 1, 1, 2, 2, 2, 102, 102, 102]], np.uint8)
    split = {
        "trnid": np.array([[1, 4, 7]], np.uint16),
        "valid": np.array([[8, 2]], np.uint16),
        "tstid": np.array([[9, 3, 5, 6]], np.uint16),
    }
    bodies = {
        "image": ("102flowers.tgz", tar(photos, "w:gz")),
        "label": ("imagelabels.mat", matlab(labels=labels)),
        "setid": ("setid.mat", matlab(**split)),
    }
    server.files |= {f"/{name}": body for name, body in bodies.values()}
    known = {key: (name, md5(body)) for key, (name, body) in bodies.items()}
    monkeypatch.setattr(torchvision.Flowers102, "_file_dict", known)
    monkeypatch.setattr(torchvision.Flowers102, "_download_url_prefix", f"{server.url}/")
    found = data.read("flowers102", str(tmp_path), image_size=16)
    assert len(found.classes) == 102
    assert found.classes[0] == "pink primrose"
    assert found.classes[101] == "blackberry lily"
    assert found.train.names == [f"jpg/image_{i:05d}.jpg" for i in (1, 4, 7, 8, 2)]
    assert found.train.labels.tolist() == [0, 1, 101, 101, 0]
    assert found.test.names == [f"jpg/image_{i:05d}.jpg" for i in (9, 3, 5, 6)]
    assert found.test.labels.tolist() == [101, 0, 1, 1]


AIRCRAFT = ["707-320", "F/A-18", "Boeing 717 x"]


@pytest.fixture
def aircraft(server, torchvision, monkeypatch):
    """Aircraft: variant names that hold a slash or a space; 18 photos to train on, 6 to test on."""
    inside = "fgvc-aircraft-2013b/data"
    files = {f"{inside}/variants.txt": lines(*AIRCRAFT)}
    listed = {"trainval": [], "test": []}
    for i in range(24):
        name = f"{34309 + i:07d}"
        files[f"{inside}/images/{name}.jpg"] = photo()
        listed["trainval" if i < 18 else "test"].append(f"{name} {AIRCRAFT[i % 3]}")
    for part, texts in listed.items():
        files[f"{inside}/images_variant_{part}.txt"] = lines(*texts)
    body = tar(files, "w:gz")
    server.files["/fgvc-aircraft-2013b.tar.gz"] = body
    url = f"{server.url}/fgvc-aircraft-2013b.tar.gz"
    monkeypatch.setattr(torchvision.FGVCAircraft, "_URL", url)
    monkeypatch.setattr(data, "AIRCRAFT_MD5", md5(body))


def test_aircraft(aircraft, tmp_path):
    """Labels are the lines of variants.txt, even if a name holds a slash or a space."""
    found = data.read("aircraft", str(tmp_path), image_size=16)
    assert found.classes == AIRCRAFT
    assert [len(found.train), len(found.test)] == [18, 6]
    slash = names_by_class(found, "test")["F/A-18"]
    assert slash == ["data/images/0034328.jpg", "data/images/0034331.jpg"]


def test_a_run_with_a_slash_in_a_class_name(aircraft, tiny_weights, tmp_path, monkeypatch, capsys):
    """Training, evaluation and prediction work if a class name contains a slash."""
    monkeypatch.chdir(tmp_path)
    run = runner(train.main, capsys)
    options = ("--dataset", "aircraft", "--weights", tiny_weights, "--method", "head")
    out = run(*options, "--epochs", 1, "--device", "cpu")
    assert "aircraft: 16 train / 2 val / 6 test, 3 classes" in out
    out = run("--eval", "runs/aircraft-head-s0", "--device", "cpu")
    assert "test " in out
    shown = run(
        "--predict", "runs/aircraft-head-s0", "data/fgvc-aircraft-2013b/data/images/0034309.jpg"
    )
    assert any(name in shown for name in AIRCRAFT)


def test_svhn(server, torchvision, monkeypatch, tmp_path):
    """The label 10 becomes the digit 0; pixels are upright; no image is mirrored in training."""
    draw = np.random.default_rng(0)
    split_list = {}
    bodies = {}
    for part, count in {"train": 12, "test": 5}.items():
        pixels = draw.integers(0, 256, (32, 32, 3, count), np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        bodies[part] = (pixels, labels)
        name = f"{part}_32x32.mat"
        body = matlab(X=pixels, y=labels)
        server.files[f"/{name}"] = body
        split_list[part] = [f"{server.url}/{name}", name, md5(body)]
    monkeypatch.setattr(torchvision.SVHN, "split_list", split_list)
    found = data.read("svhn", str(tmp_path))
    assert found.classes == [str(digit) for digit in range(10)]
    assert found.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert found.test.labels.tolist() == [1, 2, 3, 4, 5]
    pixels, _ = bodies["test"]
    assert torch.equal(found.test.pixels[3], torch.from_numpy(pixels[..., 3]).permute(2, 0, 1))
    assert not found.flip


def test_without_torchvision(monkeypatch, tmp_path):
    """If torchvision is missing or doesn't fit torch, the error for a set that torchvision reads
    says what to install."""
    monkeypatch.setitem(data.sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match="pets needs torchvision .*: pip install torchvision sci"):
        data.read("pets", str(tmp_path))
    monkeypatch.delitem(data.sys.modules, "torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('no operator nms')")
    with pytest.raises(ValueError, match=r"pets needs torchvision \(no operator nms\): pip inst"):
        data.read("pets", str(tmp_path))


def test_sums_of_cifars_files(torchvision):
    """CIFAR_FILES holds the MD5 sums that torchvision checks."""
    published = {}
    for each in (torchvision.CIFAR10, torchvision.CIFAR100):
        published |= dict([*each.train_list, *each.test_list])
        published[each.meta["filename"]] = each.meta["md5"]
    assert published == data.CIFAR_FILES


def test_offline_without_the_files(torchvision, monkeypatch, tmp_path):
    """With --offline nothing is downloaded; the error says what to put where."""
    with pytest.raises(
        ValueError, match="no .*food-101 and --offline given; put the published archive food-101.ta"
    ):
        data.read("food101", str(tmp_path), offline=True)
    with pytest.raises(ValueError, match="no .*train_32x32.mat and --offline given; put the publi"):
        data.read("svhn", str(tmp_path), offline=True)
    first = ("http://x/train_32x32.mat", "train_32x32.mat", md5(b""))
    monkeypatch.setitem(torchvision.SVHN.split_list, "train", list(first))
    (tmp_path / "train_32x32.mat").touch()  # without the other file
    with pytest.raises(ValueError, match="no .*test_32x32.mat and --offline given"):
        data.read("svhn", str(tmp_path), offline=True)


def test_a_cut_download_of_torchvisions_sets(aircraft, server, monkeypatch, tmp_path):
    """A cut download goes on where it was, in this call or a later one, and no part of an archive
    has its name."""
    whole = len(server.files["/fgvc-aircraft-2013b.tar.gz"])
    server.cut += [whole // 2]
    assert len(data.read("aircraft", str(tmp_path), image_size=16).train) == 18
    assert [seen.get("Range") for _, seen in server.seen] == [None, f"bytes={whole // 2}-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fgvc-aircraft-2013b",
        "fgvc-aircraft-2013b.tar.gz",
    ]
    other = tmp_path / "other"
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    server.cut += [whole // 2] * 5  # as many as a call tries
    with pytest.raises(ValueError, match="fetch .* by other means"):
        data.read("aircraft", str(other), image_size=16)
    assert [path.name for path in other.iterdir()] == ["fgvc-aircraft-2013b.tar.gz.part"]
    del server.seen[:]
    data.read("aircraft", str(other), image_size=16)
    assert [seen.get("Range") for _, seen in server.seen] == [f"bytes={whole // 2}-"]


def test_a_foreign_archive_of_torchvisions_sets(aircraft, server, monkeypatch, tmp_path):
    """Aircraft's archive, for which torchvision has no checksum, is refused if it is another one;
    whatever it is, it writes nothing outside of its folder."""
    folder = tmp_path / "inside"
    evil = tar({"../outside.txt": b"x", "fgvc-aircraft-2013b/data/variants.txt": b""}, "w:gz")
    server.files["/fgvc-aircraft-2013b.tar.gz"] = evil
    with pytest.raises(ValueError, match="MD5|md5"):
        data.read("aircraft", str(folder), image_size=16)
    assert not list(folder.iterdir())
    monkeypatch.setattr(data, "AIRCRAFT_MD5", md5(evil))
    with pytest.raises(ValueError, match="holds '../outside.txt', outside of its folder"):
        data.read("aircraft", str(folder), image_size=16)
    assert [path.name for path in tmp_path.rglob("*.txt")] == []


@pytest.mark.parametrize(
    "damage, message",
    [
        (("test.txt", "Siamese_6 99 1 1"), "its lists don't have the same classes"),
        (("test.txt", "Siamese_6 0 1 1"), "its lists don't have the same classes"),
        (("trainval.txt", ""), "its lists don't have the same classes"),
        (("trainval.txt", "Siamese_9 3 1 1"), "images/Siamese_9.jpg is missing"),
        (("trainval.txt", "Siamese_6 3 1 1"), "Siamese_6.jpg is there twice in the lists of pets"),
    ],
)
def test_a_damaged_list(pets, tmp_path, damage, message):
    """A list with an unknown label, cut short, or with a missing or repeated photo is refused."""
    data.read("pets", str(tmp_path), image_size=16)
    name, line = damage
    path = tmp_path / "oxford-iiit-pet" / "annotations" / name
    path.write_text(path.read_text() + line + "\n" if line else "")
    with pytest.raises(ValueError, match=message):
        data.read("pets", str(tmp_path), image_size=16)


def test_without_a_network(torchvision, monkeypatch, tmp_path):
    """A failed download is reported as such, not as an unreadable data set."""
    monkeypatch.setattr(torchvision.Food101, "_URL", "http://127.0.0.1:9/food-101.tar.gz")
    with pytest.raises(
        ValueError, match="food-101.tar.gz .*by other means and put it at .*food-10"
    ):
        data.read("food101", str(tmp_path))


def test_a_wrong_archive_of_torchvision(pets, server, tmp_path):
    """An archive with another checksum than torchvision's is refused; the error says what to do."""
    server.files["/images.tar.gz"] = tar({"images/a.jpg": photo()}, "w:gz")
    with pytest.raises(ValueError, match="arrived with a wrong md5 and was removed; try again"):
        data.read("pets", str(tmp_path))


def test_a_list_that_torchvision_cannot_read(pets, tmp_path):
    """An error of torchvision says what to delete."""
    data.read("pets", str(tmp_path), image_size=16)
    listed = tmp_path / "oxford-iiit-pet/annotations/test.txt"
    listed.write_text("no list")
    with pytest.raises(
        ValueError, match="torchvision can't read pets .*; delete .*oxford-iiit-pet"
    ):
        data.read("pets", str(tmp_path))
    shutil.rmtree(listed.parent)
    data.read("pets", str(tmp_path), image_size=16)  # extracted again


def test_a_torchvision_that_has_changed(pets, torchvision, monkeypatch, tmp_path):
    """A torchvision whose addresses aren't where they were is one line."""
    with monkeypatch.context() as patch:
        patch.setattr(torchvision.OxfordIIITPet, "_RESOURCES", (("https://a/images.tar.gz",),))
        with pytest.raises(ValueError, match="torchvision has changed .*unpack.*; install 0.29.1"):
            data.read("pets", str(tmp_path))
    monkeypatch.delattr(torchvision.OxfordIIITPet, "_RESOURCES")
    with pytest.raises(ValueError, match="torchvision has changed .*_RESOURCES.*; install 0.29.1"):
        data.read("pets", str(tmp_path))


# ------------------------------------------------------------------- archives of photos in folders

WNIDS = ["n02124075", "n01443537", "n03814639"]  # not sorted, as in wnids.txt
WORDS = {"n01443537": "goldfish, Carassius auratus", "n02124075": "Egyptian cat"}
WORDS |= {"n03814639": "neck brace", "n00001740": "entity"}


def tiny_imagenet():
    """The files of Tiny ImageNet in its published layout: three classes, one grey photo."""
    root = "tiny-imagenet-200"
    files = {
        f"{root}/wnids.txt": lines(*WNIDS),
        f"{root}/words.txt": lines(*(f"{wnid}\t{words}" for wnid, words in WORDS.items())),
        f"{root}/test/images/test_0.JPEG": photo(size=(64, 64)),
    }
    for wnid in WNIDS:
        files[f"{root}/train/{wnid}/{wnid}_boxes.txt"] = lines(f"{wnid}_0.JPEG\t0\t10\t63\t58")
        for i in range(4):
            mode = "L" if i == 3 else "RGB"
            files[f"{root}/train/{wnid}/images/{wnid}_{i}.JPEG"] = photo(mode, size=(64, 64))
    annotations = []
    for i, wnid in enumerate([*WNIDS, WNIDS[0]]):
        files[f"{root}/val/images/val_{i}.JPEG"] = photo(size=(64, 64))
        annotations.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62")
    files[f"{root}/val/val_annotations.txt"] = lines(*annotations)
    return files


def publish(monkeypatch, server, name, body):
    """Serve a data set's archive, and let data.py expect it."""
    reader = data.DATASETS[name]
    file = reader.keywords["url"].rpartition("/")[2]
    server.files[f"/{file}"] = body
    changed = data.partial(reader, url=f"{server.url}/{file}", md5=md5(body))
    monkeypatch.setitem(data.DATASETS, name, changed)


def check_tiny_imagenet(found):
    assert found.classes == ["goldfish", "Egyptian cat", "neck brace"]  # by sorted wnids
    assert found.train.shape == (12, 3, 64, 64)
    assert found.val is None
    assert names_by_class(found, "test") == {
        "goldfish": ["val/images/val_1.JPEG"],
        "Egyptian cat": ["val/images/val_0.JPEG", "val/images/val_3.JPEG"],
        "neck brace": ["val/images/val_2.JPEG"],
    }
    assert not found.skipped
    assert found.center == 1


def test_tiny_imagenet(server, monkeypatch, tmp_path):
    """The published validation set is the test set; photos keep 64 pixels; it is unpacked once."""
    publish(monkeypatch, server, "tinyimagenet", zipped(tiny_imagenet()))
    found = data.read("tinyimagenet", str(tmp_path))
    assert found.name == "tinyimagenet"
    check_tiny_imagenet(found)
    (tmp_path / "tiny-imagenet-200.zip").unlink()
    check_tiny_imagenet(data.read("tinyimagenet", str(tmp_path), offline=True))


def test_tiny_imagenet_as_a_folder(tmp_path):
    """A Tiny ImageNet that was unpacked by hand is recognised by its annotations."""
    with zipfile.ZipFile(io.BytesIO(zipped(tiny_imagenet()))) as archive:
        archive.extractall(tmp_path)
    check_tiny_imagenet(data.read(str(tmp_path / "tiny-imagenet-200")))


def test_tiny_imagenet_sorted_into_classes(tmp_path):
    """A validation set sorted into class folders is read like any folder of photos."""
    with zipfile.ZipFile(io.BytesIO(zipped(tiny_imagenet()))) as archive:
        archive.extractall(tmp_path)
    root = tmp_path / "tiny-imagenet-200"
    for line in (root / "val/val_annotations.txt").read_text().splitlines():
        file, wnid, *_ = line.split("\t")
        (root / "val" / wnid).mkdir(exist_ok=True)
        (root / "val/images" / file).rename(root / "val" / wnid / file)
    (root / "val/images").rmdir()
    shutil.rmtree(root / "test", ignore_errors=True)
    found = data.read(str(root))
    assert len(found.val) == 4
    assert found.test is None


def test_tiny_imagenet_of_small_photos_only(tmp_path):
    """For a small network, Tiny ImageNet's photos are reduced like any other photos."""
    with zipfile.ZipFile(io.BytesIO(zipped(tiny_imagenet()))) as archive:
        archive.extractall(tmp_path)
    found = data.read(str(tmp_path / "tiny-imagenet-200"), image_size=28)
    assert found.test.shape == (4, 3, 32, 32)


def test_tiny_imagenet_that_is_not_whole(tmp_path):
    """Annotations that list a missing photo, a path elsewhere, or too few photos are refused."""
    with zipfile.ZipFile(io.BytesIO(zipped(tiny_imagenet()))) as archive:
        archive.extractall(tmp_path)
    root = tmp_path / "tiny-imagenet-200"
    listed = root / "val/val_annotations.txt"
    honest = listed.read_text()
    listed.write_text(honest.replace("val_1.JPEG", "../images/val_1.JPEG"))
    with pytest.raises(ValueError, match=r"lists ../images/val_1.JPEG of"):
        data.read(str(root))
    listed.write_text(honest)
    (root / "val/images/val_2.JPEG").unlink()
    with pytest.raises(
        ValueError, match="lists val_2.JPEG of n03814639, but there is no such photo"
    ):
        data.read(str(root))
    (root / "val/val_annotations.txt").write_text("")
    with pytest.raises(ValueError, match="val_annotations.txt lists 0 photos, beside it are 3"):
        data.read(str(root))


def imagenet_r(readme=True):
    """The files of ImageNet-R in its published layout."""
    files = {}
    for wnid in sorted(WNIDS):
        for i in range(5):
            files[f"imagenet-r/{wnid}/art_{i}.jpg"] = photo()
    if readme:
        listed = [f"{wnid} {WORDS[wnid]}" for wnid in WNIDS]
        files["imagenet-r/README.txt"] = lines("ImageNet-R", "", *listed)
    return files


@pytest.mark.parametrize("readme", [True, False])
def test_imagenet_r(server, monkeypatch, tmp_path, readme):
    """A fifth is used for testing; classes are named by README.txt, or by number without it."""
    publish(monkeypatch, server, "imagenet_r", tar(imagenet_r(readme)))
    found = data.read("imagenet_r", str(tmp_path), image_size=16)
    assert found.name == "imagenet_r"
    names = ["goldfish", "Egyptian cat", "neck brace"]
    assert found.classes == (names if readme else sorted(WNIDS))
    assert found.test is None
    split = data.split(found, seed=1)
    assert [len(part) for part in (split.train, split.val, split.test)] == [11, 1, 3]


def test_an_archive_is_unpacked_whole_or_not_at_all(server, monkeypatch, tmp_path):
    """If unpacking fails, no folder is left that could be taken for the data set."""
    files = imagenet_r()
    files["imagenet-r/../../outside.txt"] = b"x"
    publish(monkeypatch, server, "imagenet_r", tar(files))
    with pytest.raises(ValueError, match="outside of its folder"):
        data.read("imagenet_r", str(tmp_path))
    assert not (tmp_path / "imagenet-r").exists()
    assert not list(tmp_path.rglob("outside.txt"))
    assert not list(tmp_path.parent.glob("outside.txt"))


def test_an_archive_that_is_cut_short(server, monkeypatch, tmp_path):
    """A truncated archive with the right checksum gives a one-line error, and no folder is left."""
    publish(monkeypatch, server, "imagenet_r", tar(imagenet_r())[:1500])
    with pytest.raises(ValueError, match=r"imagenet-r.tar is damaged \(.*; delete it to fetch it"):
        data.read("imagenet_r", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["imagenet-r.tar"]


def test_an_archive_that_was_put_there(monkeypatch, server, tmp_path):
    """An archive put there by hand is used if it is the published one, and refused otherwise."""
    body = tar(imagenet_r())
    publish(monkeypatch, server, "imagenet_r", body)
    (tmp_path / "imagenet-r.tar").write_bytes(body)
    assert len(data.read("imagenet_r", str(tmp_path), image_size=16, offline=True).train) == 15
    assert not server.seen
    other = tmp_path / "other"
    other.mkdir()
    (other / "imagenet-r.tar").write_bytes(body[:-512])
    with pytest.raises(ValueError, match="is not the published file"):
        data.read("imagenet_r", str(other))


# ------------------------------------------------------------------------ decoded photos, kept


def cached_folder():
    """The only folder in the cache of decoded photos."""
    (found,) = (data.cache_folder() / "photos").iterdir()
    return found


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """The names of photos as they are decoded, with a cache of the test's own."""
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "cache"))
    seen = []
    plain = data.read_photo

    def count(path, side):
        seen.append(path.name)
        return plain(path, side)

    monkeypatch.setattr(data, "read_photo", count)
    return seen


def test_photos_are_decoded_once(photos, counted, capsys):
    """On a second read, the pixels come from the cache and are the same."""
    first = data.read(str(photos), image_size=16)
    assert len(counted) == 60
    assert f"photos   60 decoded to {cached_folder()}" in capsys.readouterr().out
    again = data.read(str(photos), image_size=16)
    assert len(counted) == 60
    assert not capsys.readouterr().out
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert first.sums == again.sums
    name = first.train.names[25]
    assert torch.equal(again.train.pixels[25], data.read_photo(photos / name, data.Square(18)))
    assert again.sums[name] == data.file_crc(photos / name)


def test_another_size_is_decoded_anew(photos, counted):
    data.read(str(photos), image_size=16)
    data.read(str(photos), image_size=32)
    assert len(counted) == 120


def test_a_changed_photo_is_decoded_anew(photos, counted, capsys):
    """Only a changed photo and a new one are decoded again; a removed one leaves the data set."""
    data.read(str(photos), image_size=16)
    del counted[:]
    Image.new("RGB", (50, 50), "red").save(photos / "leaf/03.png")
    Image.new("RGB", (50, 50), "blue").save(photos / "leaf/99.png")
    (photos / "sky/00.png").unlink()
    capsys.readouterr()
    found = data.read(str(photos), image_size=16)
    assert sorted(counted) == ["03.png", "99.png"]
    assert "photos   2 decoded to" in capsys.readouterr().out
    assert len(found.train) == 60
    red = found.train.names.index("leaf/03.png")
    assert found.train.pixels[red, :, 9, 9].tolist() == [255, 0, 0]
    last = found.train.names.index("sky/19.png")
    assert torch.equal(
        found.train.pixels[last], data.read_photo(photos / "sky/19.png", data.Square(18))
    )


def test_photos_that_change_places(photos, counted):
    """Two photos of the same size and modification time that swap names aren't confused."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 20), colour).save(photos / f"leaf/{name}.bmp")
        os.utime(photos / f"leaf/{name}.bmp", (1, 1))
    data.read(str(photos), image_size=16)
    (photos / "leaf/a.bmp").rename(photos / "leaf/c.bmp")
    (photos / "leaf/b.bmp").rename(photos / "leaf/a.bmp")
    (photos / "leaf/c.bmp").rename(photos / "leaf/b.bmp")
    found = data.read(str(photos), image_size=16).train
    for name in ("leaf/a.bmp", "leaf/b.bmp"):
        pixels = found.pixels[found.names.index(name)]
        assert torch.equal(pixels, data.read_photo(photos / name, data.Square(18)))


READ = """
import sys
import torch
import data
reads = 0
while reads < 5:
    try:
        images = data.read(sys.argv[1], image_size=16).train
        pixels = images.pixels
    except (ValueError, FileNotFoundError):
        continue  # a photo vanished between the listing and its opening
    reads += 1
    for name, image in zip(images.names, pixels):
        assert int(image[0, 0, 0]) == int(name[-7:-4]), name
"""


def test_processes_at_once_while_photos_come_and_go(tmp_path, own_cache):
    """Each process gets the pixels of the photos that it lists, whatever the others write."""
    folder = tmp_path / "grey"
    for number in range(60):
        path = folder / ("ab"[number % 2]) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, folder]
    readers = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    place = 0
    while any(reader.poll() is None for reader in readers):
        old = folder / "ab"[place % 2] / f"{place % 60:03d}.png"
        new = old.with_name(f"x{old.name}")
        if old.exists():
            old.rename(new)
        else:
            new.rename(old)
        place += 1
        time.sleep(0.02)
    for reader in readers:
        _, error = reader.communicate()
        assert reader.returncode == 0, error.decode()


def test_one_process_decodes_a_folder(photos, counted):
    """A process that wants a folder that another one is decoding waits, and says so."""
    data.read(str(photos), image_size=16)
    command = [
        sys.executable,
        "-c",
        "import sys, data; data.read(sys.argv[1], image_size=16)",
        photos,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with data.locked(cached_folder(), folder=True):
        reader = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert reader.stderr.readline().startswith("waiting for another process that writes")
    assert reader.wait() == 0


def test_pixels_behind_the_last_that_is_listed(photos, counted):
    """Pixels that a killed process wrote but didn't list in the index are overwritten."""
    data.read(str(photos), image_size=16)
    with (cached_folder() / "pixels").open("ab") as file:
        file.write(bytes(5000))
    Image.new("RGB", (50, 50), "red").save(photos / "leaf/99.png")
    found = data.read(str(photos), image_size=16).train
    assert found.pixels[found.names.index("leaf/99.png"), :, 9, 9].tolist() == [255, 0, 0]


def test_a_cache_that_is_cut_while_in_use(photos, counted):
    """A cache truncated while in use gives an error; a mapped file would kill the process."""
    found = data.read(str(photos), image_size=16).train
    os.truncate(found.table.file.name, 5000)
    with pytest.raises(ValueError, match="pixels was cut short while in use; run this again"):
        _ = found.pixels


def test_a_full_disk_while_photos_are_decoded(photos, tmp_path):
    """A full disk gives a one-line error that says where; photos decoded until then are kept."""
    code = "import sys, data; data.PHOTOS_AT_A_TIME = 8; data.read(sys.argv[1], image_size=64)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ADAPTERTUNE_CACHE": str(tmp_path / "c")}
    command = [sys.executable, "-c", code, photos]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=full_disk(500_000)
    )
    last = done.stderr.splitlines()[-1]
    assert re.match(r"ValueError: can't use .*photos-73-\w+ \(File too large\); make room", last)
    (index,) = (tmp_path / "c/photos").glob("*/index")
    kept = len(index.read_text().splitlines()) - 1
    assert 0 < kept < 60


def test_another_pillow_decodes_anew(photos, counted, monkeypatch):
    import PIL

    data.read(str(photos), image_size=16)
    monkeypatch.setattr(PIL, "__version__", "0.1")
    data.read(str(photos), image_size=16)
    assert len(counted) == 120


def test_decoding_goes_on_where_it_was_stopped(photos, counted, monkeypatch):
    """Photos that were decoded before an interruption aren't decoded again."""
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)
    plain = data.progress

    def stop(what, done, total, *rest):
        if done > 10:
            raise KeyboardInterrupt
        plain(what, done, total, *rest)

    monkeypatch.setattr(data, "PHOTOS_AT_A_TIME", 8)
    monkeypatch.setattr(data, "progress", stop)
    with pytest.raises(KeyboardInterrupt):
        data.read(str(photos), image_size=16)
    assert len(counted) == 16
    monkeypatch.setattr(data, "progress", plain)
    found = data.read(str(photos), image_size=16)
    assert len(counted) == 60
    pixels = [data.read_photo(photos / name, data.Square(18)) for name in found.train.names]
    assert torch.equal(found.train.pixels, torch.stack(pixels))


def test_a_damaged_photo_costs_no_other(photos, counted):
    """After a damaged photo is repaired, only that photo is decoded."""
    whole = (photos / "leaf/07.png").read_bytes()
    (photos / "leaf/07.png").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"can't read .*07.png as an image"):
        data.read(str(photos), image_size=16)
    del counted[:]
    with pytest.raises(ValueError, match=r"can't read .*07.png as an image"):
        data.read(str(photos), image_size=16)
    (photos / "leaf/07.png").write_bytes(whole)
    assert len(data.read(str(photos), image_size=16).train) == 60
    assert counted == ["07.png", "07.png"]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 20, b"\n[]\n", None])
@pytest.mark.parametrize("name", ["pixels", "index"])
def test_a_damaged_cache_is_made_again(photos, counted, name, damage):
    """A truncated or foreign cache is rebuilt; a truncated line of the index costs one photo."""
    first = data.read(str(photos), image_size=16).train.pixels
    file = cached_folder() / name
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    again = data.read(str(photos), image_size=16)
    assert len(counted) == (61 if name == "index" and damage is None else 120)
    assert torch.equal(first, again.train.pixels)


def test_photos_that_went_leave_the_cache(photos, counted, monkeypatch):
    """Once most of the cache belongs to removed photos, it is rebuilt from the others."""
    data.read(str(photos), image_size=16)
    for i in range(11):
        for folder in photos.iterdir():
            (folder / f"{i:02}.png").unlink()
    del counted[:]
    plain = Path.unlink

    def unlink(path, missing_ok=False):
        """As on Windows, which removes no file that this process has open."""
        if path.name == "pixels":
            opened = Path("/proc/self/fd").iterdir()
            assert not any(each.exists() and each.samefile(path) for each in opened)
        plain(path, missing_ok)

    gc.collect()  # the first table is gone
    monkeypatch.setattr(Path, "unlink", unlink)
    found = data.read(str(photos), image_size=16)
    assert len(counted) == len(found.train)
    assert (cached_folder() / "pixels").stat().st_size == found.train.nbytes


def test_a_class_of_two_lines(photos):
    """A folder whose name has a line break is refused: it would forge lines of output."""
    (photos / "leaf").rename(photos / "le\naf")
    with pytest.raises(ValueError, match="the name 'le.*naf' in .* contains a line break; rename"):
        data.read(str(photos), image_size=16)


def test_without_a_place_for_the_cache(photos, counted, monkeypatch, tmp_path):
    """An unusable cache folder is an error before decoding that names the variable to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "file"))
    message = r"can't use .*file/photos/photos-18-.* \(Not a directory\); set ADAPTERTUNE_CACHE"
    with pytest.raises(ValueError, match=message):
        data.read(str(photos), image_size=16)
    assert not counted
    paths = data.find_photos([photos])[0]
    images, _ = data.decode(paths, [0] * 60, data.Square(18), photos, keep=False)
    assert len(images.pixels) == 60


def test_a_cache_that_is_only_read(photos, counted, monkeypatch):
    """Photos already decoded are read from a read-only cache; decoding new ones is an error."""
    data.read(str(photos), image_size=16)

    def read_only(*_, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.Path, "write_text", read_only)
    monkeypatch.setattr(data, "fill_photos", read_only)
    assert len(data.read(str(photos), image_size=16).train) == 60
    Image.new("RGB", (50, 50), "red").save(photos / "leaf/99.png")
    with pytest.raises(ValueError, match=r"\(Permission denied\); .*set ADAPTERTUNE_CACHE to"):
        data.read(str(photos), image_size=16)
    assert len(counted) == 60


def test_memory_is_that_of_a_batch(photos, counted):
    """The parts of a split share one file of photos; images are read into memory on request."""
    found = data.split(data.read(str(photos), image_size=16))
    tables = {id(part.table) for part in (found.train, found.val, found.test)}
    assert len(tables) == 1
    assert isinstance(found.train.table, data.Photos)
    pixels, labels = found.train.take(torch.tensor([3, 1]), torch.device("cpu"))
    assert pixels.shape == (2, 3, 18, 18)
    assert labels.tolist() == found.train.labels[[3, 1]].tolist()
    moved = found.train.to(torch.device("cpu"))
    assert isinstance(moved.table, torch.Tensor)
    assert torch.equal(moved.pixels, found.train.pixels)
    assert moved.shape == found.train.shape
    assert moved.nbytes == len(found.train) * 3 * 18 * 18
