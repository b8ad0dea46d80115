"""Images in, batches out: data sets, their splits, augmentation on the device, and downloads.

A data set is three sets of images, the rows of one table uint8 [N, 3, H, W]. The table is in
memory, or for photos in a file, into which each photo is decoded once (`Photos`). Everything that
happens to a batch (crop, flip, resize, normalise) runs on the training device. Its randomness
depends only on (seed, epoch, step), so the same command makes the same crops, and so does a run
that was stopped and resumed.

Crop, flip and antialiased resize are linear and separable: two small matrices per image,

    out[S, S] = rows[S, H] · image[H, W] · cols[S, W]ᵀ

which hold the weights of Pillow's bicubic resize (Keys' cubic, a = -1/2). A flip reverses the order
of the rows of `cols`.

From the top: splits, the published data sets, folders of photos, the cache of decoded photos, one
photo, data sets by name, batches, files, downloads.

Shapes: n images of a set, B images of a batch, H x W stored pixels, S pixels along a side of the
network's input, K classes.
"""

import contextlib
import errno
import filecmp
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from types import ModuleType
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

ASSETS = Path(__file__).parent / "assets"
CENTER = 7 / 8  # share of a photo's sides that evaluation uses: 224 of 256 pixels
CIFAR = "https://www.cs.toronto.edu/~kriz/"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError from a full disk
# Formats that Pillow decodes without another program: suffixes of files, then Pillow's names. EPS
# and PDF are never decoded, whatever a file is called.
PHOTOS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PHOTOS |= {".apng", ".mpo", ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"}
PHOTOS |= {".dib", ".dds", ".ico", ".icns", ".pcx", ".qoi", ".sgi", ".tga"}
PHOTOS |= {".heic", ".heif", ".hif"}  # photos of phones; they need the package pillow-heif
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
FORMATS += ("DIB", "DDS", "ICO", "ICNS", "PCX", "QOI", "SGI", "TGA", "HEIF")
# First bytes of photos, for files without a suffix: JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF; HEIC.
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF|BM|II\*\0|MM\0\*|.{4}ftypavi[fs]", re.DOTALL
)
HEIC = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)
# Names of the folders that hold a part of the data, in upper or lower case.
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
PARTS |= {"dev": "val", "test": "test", "testing": "test"}


@dataclass
class Images:
    """n images with their labels: rows of a table, which several sets may share.

    For your own images: split(Dataset(name, classes, Images(pixels, labels), None, None)).

    Raises:
        ValueError: pixels or labels of the wrong type or shape.
    """

    table: "Tensor | Photos"  # uint8 [N, 3, H, W], RGB or [N, 1, H, W], grey; or features [N, D]
    labels: Tensor  # int64 [n], indices into Dataset.classes
    names: list[str] = field(default_factory=list)  # files in Dataset.folder, or numbers
    rows: Tensor | None = None  # int64 [n], each image's row in the table; in order if left out

    def __post_init__(self):
        self.labels = torch.as_tensor(self.labels, dtype=torch.int64)
        shape = tuple(self.table.shape)
        is_pixels = len(shape) == 4 and shape[1] in (1, 3) and self.table.dtype is torch.uint8
        if len(shape) != 2 and not is_pixels:
            raise ValueError(
                f"pixels {list(shape)} of {self.table.dtype}: give torch.uint8 [N, 3, H, W], or "
                "[N, 1, H, W] for grey, from 0 to 255"
            )
        if is_pixels and shape[1] == 1:
            self.table = self.table.expand(-1, 3, -1, -1)  # takes no memory
        if self.rows is None:
            if self.labels.shape != shape[:1]:
                raise ValueError(
                    f"labels {list(self.labels.shape)} of {shape[0]} images: give one each"
                )
            self.rows = torch.arange(len(self.labels), device=self.labels.device)
        self.names = [str(name) for name in self.names]
        if self.names and len(self.names) != len(self.labels):
            raise ValueError(f"{len(self.names)} names of {len(self.labels)} images: give one each")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        """Some of the images, by a slice, a tensor of indices or a boolean tensor."""
        places = torch.arange(len(self), device=self.rows.device)[index]
        names = [self.names[i] for i in places.tolist()] if self.names else []
        return Images(self.table, self.labels[index], names, self.rows[index])

    def take(self, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels and labels of a few images, on a device."""
        return self.table[self.rows[index]].to(device), self.labels[index].to(device)

    @property
    def pixels(self) -> Tensor:
        """The pixels of all images, in memory: uint8 [n, 3, H, W]."""
        return self.table[self.rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, 3, H, W), or (n, D) of features."""
        return len(self), *self.table.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes that all images take in memory."""
        return math.prod(self.shape) * self.table.dtype.itemsize

    def to(self, device: torch.device) -> "Images":
        """The same images in a table of their own on a device. It is filled in parts, so that
        photos needn't fit into this machine's memory."""
        table = torch.empty(self.shape, dtype=self.table.dtype, device=device)
        for first in range(0, len(self), 1024):
            part = slice(first, first + 1024)
            table[part] = self.table[self.rows[part]].to(device)
        return Images(table, self.labels.to(device), self.names)

    def checksum(self) -> str:
        """SHA-256 of the pixels; for photos, of their files' checksums instead."""
        if isinstance(self.table, Photos):
            return self.table.checksum(self.rows)
        return hashlib.sha256(self.pixels.cpu().contiguous().numpy()).hexdigest()


@dataclass
class Dataset:
    """Train, validation and test images, and how they may be augmented."""

    name: str
    classes: list[str]
    train: Images
    val: Images | None  # None until `split`
    test: Images | None
    flip: bool = True  # a mirror image keeps its label
    # Smallest share of an image's area in a training crop. 0.08 is the default of torchvision's
    # RandomResizedCrop, which the paper uses.
    min_scale: float = 0.08
    center: float = 1.0  # share of each side that evaluation uses; CENTER for photos
    squash: bool = False  # photos were squashed to squares, so that all of each is seen
    whole: tuple[int, int] = (0, 0)  # sizes of train and val before --limit or --shots
    skipped: list[str] = field(default_factory=list)  # files that aren't photos
    folder: Path | None = None  # where the photos are; None for a built-in set
    sums: dict[str, str] = field(default_factory=dict)  # checksum (CRC-32) of each photo, by name

    def __post_init__(self):
        self.classes = [str(each) for each in self.classes]

    @property
    def parts(self) -> dict[str, Images]:
        """The parts that there are, by name: "train", and perhaps "val" and "test"."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: images for name, images in parts.items() if images is not None}

    @property
    def everything(self) -> Images:
        """The images of all parts, which share a table (`share_table`)."""
        parts = self.parts.values()
        names = [name for images in parts for name in images.names]
        labels = torch.cat([images.labels for images in parts])
        rows = torch.cat([images.rows for images in parts])
        return Images(self.train.table, labels, names, rows)


def read(
    name: str,
    data_dir: str = "data",
    image_size: int = 224,
    offline: bool = False,
    squash: bool = False,
    some: bool = False,
) -> Dataset:
    """A data set by name or path, as published.

    Args:
        name: a key of DATASETS, or a folder of photos: class folders, or train/ and perhaps val/
            and test/ with class folders in each.
        data_dir: where published data sets are, or are downloaded to.
        image_size: the network's; photos' centre squares are kept at 1/CENTER of it (256 for 224).
        offline: never download.
        squash: keep photos as a whole instead, squashed to squares of the network's size.
        some: a folder may have photos of a single class, such as new ones to evaluate a run on.

    Raises:
        ValueError: unknown name, missing or empty folder, corrupt file, a package that isn't
            installed, squash where the images are no photos; of a set of one's own, a label of no
            class or a missing name. The message says what to do.
    """
    check_name(name)
    square = Square(stored_side(image_size, 1.0 if squash else CENTER), squash)
    if name not in DATASETS:
        return read_folder(Path(name), square, least=1 if some else 2)
    dataset = DATASETS[name](name, Path(data_dir), offline, square)
    if squash and not dataset.squash:
        raise ValueError(f"the images of {name} are squares already; --squash is for photos")
    check_task(dataset)
    check_labels(dataset)
    check_names(dataset)
    return share_table(dataset)


def check_task(data: Dataset) -> None:
    """Raise a ValueError for a data set without classes to tell apart, or without training
    images."""
    if len(data.classes) < 2:
        raise ValueError(f"{data.name} has classes {data.classes}: give two or more")
    if data.train is None:
        raise ValueError(f"{data.name} has no training images")


def check_labels(data: Dataset) -> None:
    """Raise a ValueError for a label that is no index of a class."""
    labels = torch.cat([images.labels for images in data.parts.values()])
    wrong = labels[(labels < 0) | (labels >= len(data.classes))]
    if len(wrong):
        raise ValueError(
            f"{data.name} has label {wrong[0]}; labels of its {len(data.classes)} classes are "
            f"0 to {len(data.classes) - 1}"
        )


def check_names(data: Dataset) -> None:
    """Raise a ValueError unless every image has a name of its own, by which a run's split.json
    finds it again."""
    names = []
    for part, images in data.parts.items():
        if len(images) and not images.names:
            raise ValueError(
                f"the {part} images of {data.name} have no names; give each one, such as {part}/0"
            )
        names += images.names
    if not names:
        raise ValueError(f"{data.name} has no images")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} images of {data.name} have the name {name}; give each its own")


def share_table(data: Dataset) -> Dataset:
    """The data set with the images of all its parts in one table.

    Raises:
        ValueError: the parts have tables of different sizes, or of photos.
    """
    tables = [images.table for images in data.parts.values()]
    if all(table is tables[0] for table in tables):
        return data
    if any(isinstance(table, Photos) or table.shape[1:] != tables[0].shape[1:] for table in tables):
        raise ValueError(
            f"the parts of {data.name} can't be put into one table: give them one size, or read "
            "photos by data.from_photos"
        )
    if all(table.stride(1) == 0 for table in tables):  # grey, expanded to three channels
        tables = [table[:, :1] for table in tables]
    first_row = {}  # of each table in the common one, by its memory: parts may share it
    distinct = []
    size = 0
    rows = []
    for images, table in zip(data.parts.values(), tables, strict=True):
        memory = (table.data_ptr(), table.stride(), len(table))
        if memory not in first_row:
            first_row[memory] = size
            distinct.append(table)
            size += len(table)
        rows.append(images.rows + first_row[memory])
    common = torch.cat(distinct)
    parts = {}
    for (part, images), own in zip(data.parts.items(), rows, strict=True):
        parts[part] = Images(common, images.labels, images.names, own)
    return replace(data, **parts)


@dataclass(frozen=True)
class Square:
    """How a photo becomes a square of pixels."""

    side: int  # in pixels
    squash: bool = False  # the whole photo, its longer side scaled more; else its centre square

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The part of a photo that is resized to the square: left, top, right and bottom in whole
        pixels, so that a photo that isn't resized isn't blurred."""
        if self.squash:
            return 0, 0, width, height
        top, left, edge = central_box(height, width, 1.0)
        return left, top, left + edge, top + edge


def central_box(height: int, width: int, share: float) -> tuple[int, int, int]:
    """Top, left and side of the central square whose side is `share` of the shorter one, in whole
    pixels. It is what a network sees of an image in evaluation."""
    side = round(share * min(height, width))
    return (height - side) // 2, (width - side) // 2, side


def stored_side(image_size: int, center: float) -> int:
    """Side in pixels of a stored square whose central part, `center` of each side, has `image_size`
    pixels along a side."""
    return round(image_size / center)


def check_name(name: str) -> None:
    """Raise a ValueError unless `name` is a data set or a folder, and the packages that it needs
    are installed."""
    if name not in DATASETS and not Path(name).is_dir():
        raise ValueError(
            f"no data set or folder {name!r}: choose {', '.join(DATASETS)} "
            "or give a folder of images"
        )
    reader = DATASETS.get(name, read_folder)
    kind = reader.func if isinstance(reader, partial) else reader
    if kind is read_torchvision:
        import_torchvision(name)
    if kind in (read_folder, read_archive):
        import_pillow()


def is_there(name: str, data_dir: str) -> bool:
    """Whether a data set seems to be in `data_dir`. Files of torchvision's sets may still be
    missing; reading the set then fetches them."""
    reader = DATASETS.get(name)
    return not isinstance(reader, partial) or (Path(data_dir) / reader.keywords["place"]).exists()


# ---------------------------------------------------------------------------------------- splits


def split(
    data: Dataset, *, seed: int = 0, limit: int = 0, shots: int = 0, test_share: float = 0.0
) -> Dataset:
    """Split off the parts that are missing, and reduce the training set.

    If there is no published test set (digits, plain class folders), it is a stratified 20 %, the
    same for every seed. A missing validation set is a stratified 10 % of the rest, drawn by `seed`
    (the paper's code has the same share, but doesn't stratify).

    Args:
        limit: keep this many training images, preserving class proportions, and a quarter as many
            for validation; 0 for all.
        shots: keep this many training images of each class, drawn by `seed`, and at most 4 others
            of each for validation, or none if none are left (the few-shot protocol of CoOp,
            https://arxiv.org/abs/2109.01134); 0 for all.
        test_share: the share of a missing test set, which is then drawn by `seed`.

    Raises:
        ValueError: a label that no class has; a class has fewer images than `shots`; `test_share`
            where there is a test set.
    """
    check_labels(data)
    train = data.train
    val = data.val
    test = data.test
    if test_share and test is not None:
        raise ValueError(f"--test-share: {data.name} has a test set of its own")
    if test is None:
        key = f"test/{seed}" if test_share else "test"
        test, train = split_off(train, test_share or 0.2, key)
    if val is None and not shots:
        val, train = split_off(train, 0.1, f"val/{seed}")
    whole = (len(train), 0 if val is None else len(val))

    if shots:
        train, rest = sample_shots(train, shots, f"shots/{seed}")
        sizes = torch.bincount(train.labels, minlength=len(data.classes))
        if sizes.min() < shots:
            smallest = data.classes[sizes.argmin()]
            raise ValueError(
                f"--shots {shots}: {smallest!r} of {data.name} has only {sizes.min()} images to "
                "train on; give a smaller number"
            )
        candidates = rest if val is None else val
        val, _ = sample_shots(candidates, min(shots, 4), f"shots/{seed}")
    elif limit:
        train = train[stratified_order(train.labels, f"limit/{seed}")[:limit]]
        few = max(1, limit // 4)
        val = val[stratified_order(val.labels, f"limit/{seed}")[:few]]
    return replace(data, train=train, val=val, test=test, whole=whole)


@dataclass
class Moved:
    """How a data set differs from what it was when a run split it."""

    missing: list[str]  # names of images that it no longer has
    changed: list[str]  # names of files whose content has changed
    new: int  # how many images belong to none of the parts


def split_by(data: Dataset, names: dict[str, list[str]], sums: dict) -> tuple[Dataset, Moved]:
    """Split a data set as a run did, even if files were added or removed since.

    Args:
        names: of the images in train, val and test.
        sums: their checksums, as far as known. A file with other content counts as another image.

    Raises:
        ValueError: an image is in two parts.
    """
    listed = Counter(itertools.chain(*names.values()))
    twice = [name for name, times in listed.items() if times > 1]
    if twice:
        raise ValueError(f"the run's split.json lists {twice[0]} twice; it was changed by hand")
    everything = data.everything
    places = {name: i for i, name in enumerate(everything.names)}
    changed = {name for name in places if name in sums and sums[name] != data.sums.get(name)}
    new = len(places.keys() - changed - listed.keys())
    moved = Moved(missing=[], changed=sorted(changed), new=new)
    parts = {}
    for part, wanted in names.items():
        found = [places[name] for name in wanted if name in places and name not in changed]
        parts[part] = everything[torch.tensor(found, dtype=torch.long)]
        moved.missing += [name for name in wanted if name not in places]
    sizes = (len(parts["train"]), len(parts["val"]))
    return replace(data, **parts, whole=sizes), moved


def all_as_test(data: Dataset) -> Dataset:
    """The data set with nothing to train on: its test set, or everything if it has none."""
    test = data.everything if data.test is None else data.test
    none = data.train[torch.zeros(0, dtype=torch.long)]
    return replace(data, train=none, val=none, test=test)


def match_classes(data: Dataset, classes: list[str], some: bool = False) -> Dataset:
    """The data set with its labels in the order of a run's `classes`.

    Args:
        some: the data set needn't have all of these classes.

    Raises:
        ValueError: a class is missing, or isn't one of these; the message names it.
    """
    missing = [] if some else sorted(set(classes) - set(data.classes))
    unknown = sorted(set(data.classes) - set(classes))
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"it lacks {first_few(missing)}")
        if unknown:
            parts.append(f"it has {first_few(unknown)}, which the run doesn't know")
            parts.append(f"the run has {first_few(classes, 10)}")
        hint = one_level_down(data.folder, data.classes) if data.folder else ""
        raise ValueError(
            f"{data.name} has other classes than the run: {'; '.join(parts)}"
            f"{hint or '; rename the folders, or train again'}"
        )
    label_of = torch.tensor([classes.index(name) for name in data.classes])

    parts = {}
    for part, images in data.parts.items():
        parts[part] = replace(images, labels=label_of[images.labels])
    return replace(data, classes=list(classes), **parts)


def find_copies(data: Dataset) -> list[tuple[str, str]]:
    """Photos that are copies of another one, byte for byte, each with the first of its copies in
    the order of train, val and test."""
    first = {}
    copies = []
    for name in data.everything.names:
        twin = first.setdefault(data.sums[name], name)
        # With 100,000 different files, some pair shares a CRC-32 by chance in 69 % of cases.
        if twin != name and filecmp.cmp(data.folder / name, data.folder / twin, shallow=False):
            copies.append((name, twin))
    return copies


def check_split(data: Dataset) -> None:
    """Raise a ValueError if a class has no training image, or nothing is left to test on."""
    counts = torch.bincount(data.train.labels, minlength=len(data.classes))
    empty = [name for name, count in zip(data.classes, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"no training image is left of {first_few(empty)} in {data.name} ({len(empty)} of "
            f"{len(data.classes)} classes): a class needs at least 3 images, or leave them to "
            "train/, val/ and test/; with --limit, give at least one for each class"
        )
    if not len(data.test):
        raise ValueError(f"{data.name} has no test images")


def split_off(images: Images, share: float, key: str) -> tuple[Images, Images]:
    """A stratified `share` of the images, drawn by `key`, and the rest."""
    order = stratified_order(images.labels, key)
    size = max(1, round(share * len(images)))
    return images[order[:size]], images[order[size:]]


def sample_shots(images: Images, shots: int, key: str) -> tuple[Images, Images]:
    """At most `shots` images of each class, drawn by `key`, and the rest."""
    order = stratified_order(images.labels, key)
    chosen = number_in_class(images.labels[order]) < shots
    return images[order[chosen]], images[order[~chosen]]


def stratified_order(labels: Tensor, key: str) -> Tensor:
    """A random order [n], fixed by `key`, every prefix of which is stratified."""
    shuffled = torch.randperm(len(labels), generator=generator(key))
    labels = labels[shuffled]
    sizes = torch.bincount(labels)[labels]  # of each image's class
    position = (number_in_class(labels) + 0.5) / sizes  # within its class, 0..1
    # Sorted by position, the classes alternate; ties keep the shuffled order.
    return shuffled[position.argsort(stable=True)]


def number_in_class(labels: Tensor) -> Tensor:
    """0 for the first of each class, 1 for the second and so on, [n]."""
    numbers = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        numbers[members] = torch.arange(int(members.sum()))
    return numbers


def generator(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator seeded by a readable key such as "0/3/17" (seed, epoch, step)."""
    return torch.Generator(device).manual_seed(seed_from(key))


def seed_from(key: str) -> int:
    """A 32-bit seed from a key; a CPU generator ignores the higher bits of its seed."""
    return zlib.crc32(key.encode())


# --------------------------------------------------------------------------- published data sets


def read_digits(name: str, data_dir: Path, offline: bool, square: Square) -> Dataset:
    """1,797 handwritten digits, 8 x 8, grey: UCI's optdigits test set as scikit-learn has it."""
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as file:
        grey = torch.from_numpy(file["images"])  # counts of 0..16 ink dots
        labels = torch.from_numpy(file["labels"]).long()
    pixels = (grey.float() * (255 / 16)).round().byte()
    pixels = pixels[:, None].expand(-1, 3, -1, -1).contiguous()
    classes = [str(digit) for digit in range(10)]
    images = Images(pixels, labels, [str(i) for i in range(len(labels))])
    return Dataset(name, classes, images, None, None, flip=False, min_scale=0.85)


def read_cifar(
    name: str,
    data_dir: Path,
    offline: bool,
    square: Square,
    *,
    place: str,
    archive: str,
    md5: str,
    train: list[str],
    test: str,
    meta: str,
    key: str,
) -> Dataset:
    """CIFAR's Python version (Krizhevsky 2009), from its extracted folder, archive or the network.

    Args:
        place: the extracted folder.
        archive, md5: as published.
        train, test, meta: names of the pickles.
        key: the prefix of "labels" and "label_names" in the pickles' keys.
    """
    root = data_dir / place
    fetch_archive(root, CIFAR + archive, md5, offline)
    names = unpickle(root / meta)[f"{key}label_names".encode()]
    classes = [each.decode() for each in names]

    pixels = []
    labels = []
    for file in [*train, test]:
        batch = unpickle(root / file)
        pixels.append(batch[b"data"])  # uint8 [n, 3072]
        labels += batch[f"{key}labels".encode()]
    trained = len(labels) - len(pixels[-1])
    table = torch.from_numpy(np.concatenate(pixels)).reshape(-1, 3, 32, 32)  # [N, 3, 32, 32]
    return Dataset(name, classes, *train_and_test(table, torch.tensor(labels), trained))


def train_and_test(table: Tensor, labels: Tensor, trained: int) -> tuple[Images, None, Images]:
    """Train, validation and test: a table's first `trained` images, None, and the other images. The
    images' names are numbers."""
    names = [f"train/{i}" for i in range(trained)]
    names += [f"test/{i}" for i in range(len(labels) - trained)]
    everything = Images(table, labels, names)
    places = torch.arange(len(labels))
    return everything[places[:trained]], None, everything[places[trained:]]


def fetch_archive(root: Path, url: str, md5: str, offline: bool) -> None:
    """Extract the folder `root`, if it is missing, from the archive beside it, which is downloaded
    if it is missing too. The archive holds one folder of that name.

    Raises:
        ValueError: the archive isn't the published one, is damaged, or can't be fetched.
    """
    archive = root.with_name(url.rpartition("/")[2])
    if root.is_dir():
        return
    if offline and not archive.exists():
        raise ValueError(
            f"no {root} and --offline given; put the published archive {archive.name} "
            f"into {archive.parent}"
        )
    fetch_file(archive, url, md5, offline)
    with empty_folder(root.with_name(f"{root.name}.part")) as part:
        if root.is_dir():  # another process has done it meanwhile
            return
        try:
            extract(archive, part)
            move(part / root.name, root)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, FileNotFoundError) as e:
            raise ValueError(f"{archive} is damaged ({e}); delete it to fetch it again") from e


def fetch_file(path: Path, url: str, md5: str, offline: bool) -> None:
    """Download a published file, unless it is there.

    Raises:
        ValueError: another file is there, or it can't be fetched.
    """
    if path.exists():
        if file_hash(path, "md5") != md5:
            raise ValueError(
                f"{path} is not the published file (md5 differs); delete it to fetch it again"
            )
    elif offline:
        raise ValueError(f"no {path} and --offline given; put the published file there")
    else:
        download(url, path, checksum=("md5", md5))


def extract(archive: Path, folder: Path) -> None:
    """Write the files of a .tar, .tar.gz or .zip into a folder, and nowhere else. (The filter of
    tarfile's extractall that ensures this is missing in Python 3.11.2, Debian 12's.)"""
    started = time.perf_counter()
    total = archive.stat().st_size
    done = 0
    for name, content in archived_files(archive):
        parts = Path(name).parts
        if Path(name).anchor or ".." in parts:
            raise ValueError(f"{archive} holds {name!r}, outside of its folder; delete it")
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            shutil.copyfileobj(content, file)
            done += file.tell()
        progress(f"extracting {archive.name}, MB", min(done, total - 1) >> 20, total >> 20, started)
    wipe_progress()
    if os.name == "posix":
        os.sync()  # once, instead of a flush of each of a hundred thousand files


def archived_files(archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Name and content of each file in an archive, without links and folders."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                if not member.is_dir():
                    yield member.filename, opened.open(member)
        return
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.isfile():
                yield member.name, opened.extractfile(member)


# The files of CIFAR's two archives with their MD5, as torchvision has them (datasets/cifar.py).
CIFAR_FILES = {
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "meta": "7973b15100ade9c7d40fb424638fde48",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


def unpickle(path: Path) -> dict:
    """A CIFAR pickle's dictionary (keys are bytes).

    Raises:
        ValueError: the file is missing, or isn't the published one: a pickle can run code.
    """
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.md5(content).hexdigest() != CIFAR_FILES.get(path.name):
        raise ValueError(
            f"{path} is missing, or is not the published file (md5 differs); delete {path.parent} "
            "to extract the archive again"
        )
    return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that builds arrays, lists, dictionaries, numbers and text, and calls nothing
    else. The published files need no more; this is a second safeguard, after their MD5."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),  # its name in the published files
        ("numpy._core.multiarray", "_reconstruct"),  # its name in numpy 2
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_torchvision(
    name: str,
    data_dir: Path,
    offline: bool,
    square: Square,
    *,
    kind: str,
    place: str,
    train: tuple[str, ...] = ("train",),
) -> Dataset:
    """A data set that a class of torchvision reads, once its files are there (`published_files`).

    Args:
        kind: the class in torchvision.datasets.
        place: its folder, or one of its files, in data_dir.
        train: the splits to train on; validation is split off from them too.
    """
    reader = getattr(import_torchvision(name), kind)
    try:
        files = published_files(name, reader, data_dir)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"torchvision has changed ({error}); install 0.29.1") from error
    for path, url, md5 in files:
        fetch = fetch_archive if url.endswith(("gz", ".zip")) else fetch_file
        fetch(path, url, md5, offline)
    try:
        sources = [reader(data_dir, split=part) for part in (*train, "test")]
    except ImportError as error:
        raise ValueError(
            f"{name} needs more packages ({error}): pip install torchvision scipy"
        ) from error
    except Exception as error:  # files may hold anything
        reason = str(error).partition(". ")[0]  # then it advises download=True
        raise ValueError(
            f"torchvision can't read {name} ({reason}); delete what is extracted at "
            f"{data_dir / place} to extract it again"
        ) from error

    trained = sum(len(source) for source in sources[:-1])
    if name == "svhn":
        pixels = torch.cat([torch.from_numpy(source.data) for source in sources])
        labels = torch.cat([torch.from_numpy(source.labels) for source in sources])
        parts = train_and_test(pixels, labels, trained)
        classes = [str(digit) for digit in range(10)]
        # A mirrored digit is no digit, and a small crop may show the digit beside it.
        return Dataset(name, classes, *parts, flip=False, min_scale=0.85)
    return from_lists(name, sources, trained, square, data_dir / place)


def import_torchvision(name: str) -> ModuleType:
    """The module torchvision.datasets, or a ValueError that says how to install it."""
    try:
        from torchvision import datasets
    except Exception as error:  # RuntimeError if it was built for another version of torch
        raise ValueError(
            f"{name} needs torchvision ({error}): pip install torchvision scipy"
        ) from error
    return datasets


# torchvision states no checksum of Aircraft's archive.
AIRCRAFT_MD5 = "d4acdd33327262359767eeaa97a4f732"


def published_files(name: str, reader: type, data_dir: Path) -> list[tuple[Path, str, str]]:
    """The files that a class of torchvision reads: where it looks for each (for an archive, the
    folder in it), and its address and MD5, which the class has. (Its own downloads aren't resumed,
    a cut one stays in its place, and Aircraft's archive could write files anywhere.)"""
    files = []
    if name == "svhn":
        for part in ("train", "test"):
            url, file, md5 = reader.split_list[part]
            files.append((data_dir / file, url, md5))
    elif name == "pets":
        for url, md5 in reader._RESOURCES:  # images.tar.gz, annotations.tar.gz
            folder = url.rpartition("/")[2].removesuffix(".tar.gz")
            files.append((data_dir / "oxford-iiit-pet" / folder, url, md5))
    elif name == "food101":
        files.append((data_dir / "food-101", reader._URL, reader._MD5))
    elif name == "flowers102":
        for file, md5 in reader._file_dict.values():  # 102flowers.tgz, imagelabels.mat, setid.mat
            place = "jpg" if file.endswith(".tgz") else file
            url = reader._download_url_prefix + file
            files.append((data_dir / "flowers-102" / place, url, md5))
    elif name == "aircraft":
        files.append((data_dir / "fgvc-aircraft-2013b", reader._URL, AIRCRAFT_MD5))
    return files


def from_lists(name: str, sources: list, trained: int, square: Square, root: Path) -> Dataset:
    """A data set of the photos that torchvision's data sets list.

    Args:
        sources: torchvision's data sets: those of training, then the one of test.
        trained: the number of photos in all sources but the last.
        root: the folder that all photos are in.

    Raises:
        ValueError: photos are missing, or the lists don't have the same classes.
    """
    photos = []
    for source in sources:
        files = source._images if name == "pets" else source._image_files
        photos += zip(map(Path, files), source._labels, strict=True)
    classes = sources[0].classes
    known = all(source.classes == classes for source in sources)
    known = known and all(0 <= label < len(classes) for _, label in photos)
    lost = [path for path, _ in photos if not path.is_file()]
    if lost or not known:
        fault = f"{lost[0]} is missing" if lost else "its lists don't have the same classes"
        raise ValueError(
            f"{name} isn't whole: {fault}; delete what is extracted at {root} to extract it again"
        )
    parts = {"train": photos[:trained], "test": photos[trained:]}
    return from_photos(name, classes, parts, square, root)


def read_archive(
    name: str, data_dir: Path, offline: bool, square: Square, *, place: str, url: str, md5: str
) -> Dataset:
    """A data set that was published as an archive of photos in folders."""
    root = data_dir / place
    fetch_archive(root, url, md5, offline)
    return replace(read_folder(root, square), name=name)


# ----------------------------------------------------------------------------- folders of photos


def read_folder(root: Path, square: Square, least: int = 2) -> Dataset:
    """Photos in class folders, at least `least`, each photo decoded once to a square."""
    val = root / "val"  # many sort it into class folders, and leave the list beside them
    if (val / "val_annotations.txt").is_file() and (val / "images").is_dir():
        return read_tiny_imagenet(root, square)
    classes, labelled, skipped = find_labelled(root, least)
    named = name_classes(root / "README.txt", classes)
    return replace(from_photos(root.resolve().name, named, labelled, square, root), skipped=skipped)


def list_photos(folder: str) -> list[str]:
    """The names of the photos that `read` would find in a folder; it raises the same errors."""
    _, labelled, _ = find_labelled(Path(folder))
    return [name_in(path, Path(folder)) for part in labelled.values() for path, _ in part]


def find_labelled(
    root: Path, least: int = 2
) -> tuple[list[str], dict[str, list[tuple[Path, int]]], list[str]]:
    """The classes in a folder; its photos with their labels, by part; and what is skipped.

    Raises:
        ValueError: fewer than `least` classes, or parts with different ones.
    """
    parts = find_parts(root)
    skipped = []
    if parts["train"] != root:  # photos beside train/ are skipped
        skipped += [str(file) for file in sorted(root.glob("[!.]*")) if is_photo(file)]
        for folder in find_folders(root):
            if folder not in parts.values():
                with contextlib.suppress(OSError):  # lost+found can't be read, and needn't be
                    skipped += map(str, photos_and_others(folder)[0])
    photos = {part: photos_by_class(folder, skipped) for part, folder in parts.items()}
    classes = list(photos["train"])
    if len(classes) < least:
        hint = one_level_down(parts["train"], classes)
        if not classes:
            hint = "; give the folder that holds a folder of photos for each class"
        raise ValueError(
            f"at least {least} class folders are needed, {parts['train']} has {len(classes)}{hint}"
        )
    labelled = {}
    for part, by_class in photos.items():
        check_classes(parts[part], list(by_class), parts["train"], classes)
        labelled[part] = with_labels(by_class, classes)
    return classes, labelled, skipped


def check_classes(part: Path, has: list[str], train: Path, classes: list[str]) -> None:
    """Raise a ValueError unless val or test has the same classes as train."""
    lacks = sorted(set(classes) - set(has))
    more = sorted(set(has) - set(classes))
    faults = []
    if lacks:
        faults.append(f"lacks {first_few(lacks)}")
    if more:
        faults.append(f"has {first_few(more)} beside them")
    if faults:
        raise ValueError(
            f"{part} doesn't have the classes of {train}: it {' and '.join(faults)}; give both the "
            f"same classes, or remove {part}: then photos of {train} take its place"
        )


def with_labels(by_class: dict[str, list[Path]], classes: list[str]) -> list[tuple[Path, int]]:
    """The photos of all classes, each with its class's number."""
    found = []
    for label, name in enumerate(classes):
        found += [(path, label) for path in by_class[name]]
    return found


def read_tiny_imagenet(root: Path, square: Square) -> Dataset:
    """Tiny ImageNet as unpacked: train/WNID/images/, and as the test set val/images/, with classes
    in val_annotations.txt (test/ has no labels). Photos keep their 64 pixels.

    Raises:
        ValueError: the annotations don't match the folders.
    """
    by_class = photos_by_class(root / "train", [])
    classes = list(by_class)
    found, _ = photos_and_others(root / "val" / "images")
    photos = {path.name: path for path in found}
    listed = root / "val" / "val_annotations.txt"
    test = []
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        if "\t" not in line:
            continue
        file, wnid, *_ = line.split("\t")
        if wnid not in by_class or file not in photos:
            raise ValueError(
                f"{listed} lists {file} of {wnid}, but there is no such photo or no folder "
                f"train/{wnid}; unpack the archive again"
            )
        test.append((photos[file], classes.index(wnid)))
    if not test or len(test) != len(photos):
        raise ValueError(
            f"{listed} lists {len(test):,} photos, beside it are {len(photos):,}; unpack the "
            "archive again"
        )
    if open_photo(test[0][0], square.side).size == (64, 64):
        square = replace(square, side=min(square.side, 64))
    parts = {"train": with_labels(by_class, classes), "test": test}
    named = name_classes(root / "words.txt", classes)
    return replace(from_photos(root.resolve().name, named, parts, square, root), center=1.0)


def name_classes(listed: Path, classes: list[str]) -> list[str]:
    """ImageNet's names for classes that are WordNet ids (n01443537 is "goldfish"), from a file with
    a line for each; the ids themselves, unless the file has a different name for each class."""
    if not listed.is_file() or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes
    names = {}
    for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"(n\d{8})\W+(\w[^,]*)", line)
        if match:
            names[match[1]] = match[2].strip()
    found = [names.get(name, "") for name in classes]
    return found if len(set(found) - {""}) == len(classes) else classes


def from_photos(
    name: str,
    classes: list[str],
    parts: dict[str, list[tuple[Path, int]]],
    square: Square,
    root: Path,
) -> Dataset:
    """A data set of photos.

    Args:
        parts: photos with their labels, for train and perhaps for val and test.
        root: the folder that all photos are in.
    """
    photos = [photo for part in parts.values() for photo in part]
    paths = [path for path, _ in photos]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice in the lists of {name}; correct them")
    everything, sums = decode(paths, [label for _, label in photos], square, root)
    places = torch.arange(len(photos)).split([len(part) for part in parts.values()])
    images = {"val": None, "test": None}
    for part, place in zip(parts, places, strict=True):
        images[part] = everything[place]
    seen = {"center": 1.0 if square.squash else CENTER, "squash": square.squash}
    return Dataset(name, classes, **images, **seen, folder=root, sums=sums)


def find_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and without runs/ of training."""
    folders = [each for each in sorted(folder.glob("[!.]*")) if each.is_dir()]
    return [each for each in folders if not holds_runs(each)]


def holds_runs(folder: Path) -> bool:
    """Whether a folder is runs/ of training, which may have just been made, and no class "runs"."""
    if folder.name != "runs" or any(is_photo(file) for file in folder.iterdir()):
        return False
    return any(folder.glob("*/split.json")) or folder.resolve() == Path("runs").resolve()


def find_parts(root: Path) -> dict[str, Path]:
    """The folders of train, val and test, by PARTS; if the root has none, it is that of train."""
    parts = {}
    for folder in find_folders(root):
        part = PARTS.get(folder.name.lower())
        if part in parts:
            raise ValueError(
                f"{parts[part]} and {folder} both hold {part}; put the photos of one into the other"
            )
        if part:
            parts[part] = folder
    if list(parts) == ["train"] and not find_folders(parts["train"]):
        return {"train": root}  # a class of photos of trains, beside other classes
    if parts and "train" not in parts:
        raise ValueError(f"{root} has {' and '.join(parts)} but no train folder")
    return parts or {"train": root}


def photos_by_class(folder: Path, skipped: list[str]) -> dict[str, list[Path]]:
    """The photos in each class folder and its sub-folders, sorted, without hidden ones. Other
    files, broken links, links to folders, and photos outside of class folders are added to
    `skipped`."""
    photos = {}
    empty = []
    skipped += [str(file) for file in sorted(folder.glob("[!.]*")) if is_photo(file)]
    for class_folder in find_folders(folder):
        found, others = photos_and_others(class_folder)
        skipped += map(str, others)
        name = as_utf8(class_folder.name)
        if name in photos:
            raise ValueError(f"{folder} has two folders that read {name}; rename one")
        if "\n" in name:
            raise ValueError(
                f"the name {name!r} in {folder} contains a line break; rename that folder"
            )
        if found:
            photos[name] = found
        else:
            empty.append(class_folder)
    if empty:
        advice = "put some there, or remove that folder"
        if any(empty[0].iterdir()):
            advice = f"{', '.join(sorted(PHOTOS))} are read"
        hint = one_level_down(folder, list(photos))
        raise ValueError(f"no images in {empty[0]}{hint}; {advice}")
    return photos


def one_level_down(folder: Path, classes: list[str]) -> str:
    """A hint for a folder that holds a single class: perhaps the folders in it are the classes."""
    if len(classes) == 1 and find_folders(folder / classes[0]):
        return f"; do you mean {folder / classes[0]}?"
    return ""


def photos_and_others(folder: Path) -> tuple[list[Path], list[Path]]:
    """The photos in a folder and its sub-folders, and other files; sorted, without hidden ones."""

    def refuse(error: OSError) -> None:  # by default, os.walk skips folders that it can't read
        raise error

    photos = []
    others = []
    for place, inside, names in os.walk(folder, onerror=refuse):
        inside[:] = [name for name in inside if not name.startswith(".")]
        # Links to folders may form loops, so os.walk doesn't follow them.
        names += [name for name in inside if Path(place, name).is_symlink()]
        if len(Path(place).parts) > 400:  # Python can't handle a thousand
            raise ValueError(f"the folders in {folder} are nested more than 400 deep")
        for name in names:
            file = Path(place, name)
            if not name.startswith("."):
                kind = photos if is_photo(file) else others
                kind.append(file)
    # The same order as of the paths themselves, in half the time.
    return sorted(photos, key=attrgetter("parts")), sorted(others)


def find_photos(paths: list[str]) -> tuple[list[Path], list[Path]]:
    """Files as they are given; for a folder all photos inside, sorted, without hidden ones. And the
    other files in those folders.

    Raises:
        ValueError: a folder without photos.
    """
    found = []
    others = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        photos, more = photos_and_others(path)
        if not photos:
            raise ValueError(f"no photos in {path}; {', '.join(sorted(PHOTOS))} are read")
        found += photos
        others += more
    return found, others


def as_utf8(name: str) -> str:
    """A file's name decoded as UTF-8, whatever the locale. Invalid bytes become "\ufffd", and so do
    lone surrogates, which JSON may hold."""
    name = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", name)  # the others stand for bytes
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_photo(file: Path) -> bool:
    """Whether a path is a photo: a file, by its suffix or, if it has none, by its first bytes."""
    if not file.is_file():
        return False
    if file.suffix:
        return file.suffix.lower() in PHOTOS
    with file.open("rb") as opened:
        beginning = opened.read(12)
    return bool(BEGINNINGS.match(beginning) or HEIC.match(beginning))


# -------------------------------------------------------------------------------- decoded photos


def decode(
    paths: list[Path], labels: list[int], square: Square, root: Path, *, keep: bool = True
) -> tuple[Images, dict[str, str]]:
    """Photos as squares, and the checksums of their files by name.

    They are decoded once: the cache has a folder for each folder of photos and kind of square. When
    photos come or go, the others stay decoded; photos that a killed process has decoded are kept.

    Args:
        root: the folder that all photos are in.
        keep: in the cache; else in an unlinked file, which vanishes when this process closes it (on
            Windows it stays in the folder for temporary files).

    Raises:
        ValueError: no Pillow; photos that can't be read (some are named); no room, or no place
            that can be written to.
    """
    path_of = {photo_key(path, root): path for path in paths}
    root = root.resolve()
    number = seed_from(as_utf8(str(root)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        cache = cache_folder() / "photos" if keep else Path(temporary)
        kind = f"{square.side}{'-squashed' if square.squash else ''}"
        place = cache / f"{as_utf8(root.name)[:50]}-{kind}-{number:08x}"
        try:
            remove_odd(place)
            with locked(place, folder=True):
                photos = open_photos(place, square, wanted=len(paths))
                missing = {key: path for key, path in path_of.items() if key not in photos.row_of}
                if missing:
                    check_room(place, len(missing), square.side)
                    fill_photos(place, photos, missing)
                    photos = Photos(place, square)
        except OSError as error:
            advice = f"set {'ADAPTERTUNE_CACHE' if keep else 'TMPDIR'} to another folder"
            if error.errno in NO_ROOM:
                advice = f"make room, {advice}, or give a smaller --image-size"
            raise ValueError(f"can't use {place} ({error.strerror}); {advice}") from error
        if missing and keep:
            size = f"{(place / 'pixels').stat().st_size / 1e6:,.0f} MB"
            print(f"photos   {len(missing):,} decoded to {place} ({size}), for later runs too")
    names = [name for name, _, _ in path_of]
    rows = [photos.row_of[key] for key in path_of]
    sums = {name: f"{photos.sums[row]:08x}" for name, row in zip(names, rows, strict=True)}
    return Images(photos, torch.tensor(labels), names, torch.tensor(rows)), sums


def photo_key(path: Path, root: Path) -> tuple[str, int, int]:
    """What identifies a photo in the cache: its name in `root`, its file's size, and the time of
    its last change in nanoseconds."""
    stat = path.stat()
    # The later time: a file that is moved here keeps its mtime, but gets a new ctime.
    return name_in(path, root), stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns)


def name_in(path: Path, root: Path) -> str:
    """A photo's name: its path in the folder that all photos are in."""
    return "/".join(path.parts[len(root.parts) :])  # relative_to takes three times as long


DECODER = 3  # change it when the result of `read_photo` changes: then all is decoded again
PHOTOS_AT_A_TIME = 256  # in memory while they are decoded; fewer if they take over 256 MiB


class Photos:
    """Decoded photos in a folder of the cache: a table uint8 [N, 3, side, side] on the disk.

    The file `pixels` has them one after the other. `index` has a line that names the decoder, then
    a line of JSON for each photo: its name, its file's size, time in nanoseconds and CRC-32. Both
    files only grow, so a process that has them open never sees its rows change; a photo that was
    removed or changed keeps its row.

    Raises:
        OSError, ValueError, TypeError, RecursionError: a file is missing, damaged, or of another
            decoder.
    """

    dtype = torch.uint8

    def __init__(self, folder: Path, square: Square):
        self.file = (folder / "pixels").open("rb", buffering=0)
        listed = (folder / "index").read_bytes()
        self.end = listed.rfind(b"\n") + 1  # any bytes after it are a line that was cut short
        self.made_by, *lines = listed[: self.end].decode("ascii").splitlines()
        self.row_of: dict[tuple[str, int, int], int] = {}
        self.sums = np.zeros(len(lines), np.uint32)
        for row, line in enumerate(lines):
            name, size, time_ns, crc = json.loads(line)
            self.row_of[name, size, time_ns] = row
            self.sums[row] = int(crc, 16)
        self.square = square
        self.shape = (len(lines), 3, square.side, square.side)
        enough = (folder / "pixels").stat().st_size >= math.prod(self.shape)
        if self.made_by != made_by(square) or not enough:
            raise ValueError(f"{folder} is damaged, or of another decoder")

    def __getitem__(self, rows: Tensor) -> Tensor:
        # Read and not memory-mapped: mapped pages count as this process's memory, and if a mapped
        # file is cut short, the process is killed.
        found = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for row, image in zip(rows.tolist(), found.numpy(), strict=True):
            self.file.seek(row * image.nbytes)
            if self.file.readinto(image) != image.nbytes:
                raise ValueError(f"{self.file.name} was cut short while in use; run this again")
        return found

    def checksum(self, rows: Tensor) -> str:
        """SHA-256 of everything that determines the pixels of some photos."""
        key = hashlib.sha256(repr((self.made_by, self.shape[1:])).encode())
        key.update(self.sums[rows.numpy()])
        return key.hexdigest()


def made_by(square: Square) -> str:
    """The decoder of photos, as the first line of an index names it."""
    squashed = ", squashed" if square.squash else ""
    return f"Pillow {import_pillow().__version__}, decoder {DECODER}{squashed}"


def open_photos(folder: Path, square: Square, wanted: int) -> Photos:
    """The photos in a folder of the cache. It starts empty if it is new, damaged, of another
    decoder, or if over half of its rows are of photos that were removed or changed, since only
    `wanted` are there. Then new files are made: other processes may have the old ones open."""
    for name in ("pixels", "index"):
        remove_odd(folder / name)
    with contextlib.suppress(OSError, ValueError, TypeError, OverflowError, RecursionError):
        photos = Photos(folder, square)
        if len(photos.sums) <= 2 * wanted:
            return photos
        photos.file.close()  # Windows can't delete an open file
    for name, content in {"pixels": "", "index": f"{made_by(square)}\n"}.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(content)
    return Photos(folder, square)


def check_room(folder: Path, count: int, side: int) -> None:
    """Raise an OSError if `count` decoded photos don't fit onto the disk."""
    needed = count * 3 * side**2
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{count:,} photos of {side} x {side} pixels take {needed / 1e6:,.0f} MB, "
            f"the disk has {free / 1e6:,.0f} MB free",
        )


def fill_photos(folder: Path, photos: Photos, missing: dict[tuple[str, int, int], Path]) -> None:
    """Decode photos into a folder of the cache, after those that it has, on all cores.

    Args:
        missing: their paths, by name, size and time.

    Raises:
        ValueError: photos that can't be read; raised after all others were decoded.
        OSError: the disk is full.
    """
    rows, _, _, side = photos.shape

    def read(path: Path) -> tuple[Tensor, str] | ValueError:
        """A photo's pixels and its file's CRC-32; or why there are none."""
        try:
            return read_photo(path, photos.square), file_crc(path)
        except ValueError as error:
            return error
        except OSError as error:  # removed meanwhile
            return ValueError(f"can't read {path} as an image ({error.strerror})")

    add_heif()  # not in threads: one could get the module while its import fails in another
    bad = []
    keys = list(missing)
    at_a_time = max(usable_cpus(), min(PHOTOS_AT_A_TIME, 2**28 // (3 * side**2)))
    started = time.perf_counter()
    with (
        (folder / "pixels").open("r+b") as pixels,
        (folder / "index").open("r+b") as index,
        ThreadPoolExecutor(usable_cpus()) as pool,
        warnings.catch_warnings(action="ignore"),  # Pillow calls 90 megapixels a "DOS attack"
    ):
        pixels.seek(rows * 3 * side**2)
        index.truncate(photos.end)
        index.seek(photos.end)
        for first in range(0, len(keys), at_a_time):
            part = keys[first : first + at_a_time]
            paths = [missing[key] for key in part]
            lines = ""
            for key, found in zip(part, pool.map(read, paths), strict=True):
                if isinstance(found, ValueError):
                    bad.append(found)
                    continue
                image, crc = found
                pixels.write(image.numpy().tobytes())
                lines += json.dumps([*key, crc]) + "\n"
            pixels.flush()
            os.fsync(pixels.fileno())  # pixels are on the disk before the index lists them
            index.write(lines.encode())
            index.flush()
            progress("decoding, photo", first + len(part), len(keys), started)
    if bad:
        raise ValueError(list_unread(bad)) from bad[0]


def file_crc(path: Path) -> str:
    """A photo's CRC-32 in hexadecimal."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def list_unread(bad: list[ValueError]) -> str:
    """Why the first photo can't be read, and the names of a few others."""
    text = str(bad[0])
    if len(bad) > 1:
        names = [str(error).partition(" as an image")[0] for error in bad[1:6]]
        text += f"; and {len(bad) - 1} more: {', '.join(names)}"
    return text


def sample_sizes(data: Dataset) -> list[tuple[int, int]]:
    """Width and height in pixels of some of a data set's photos, sorted by their ratio: the longest
    first. Empty for images that aren't in files."""
    names = data.everything.names if data.folder else []
    sizes = []
    for name in names[:: max(1, len(names) // 32)]:
        with contextlib.suppress(OSError):  # gone since it was decoded
            sizes.append(photo_size(data.folder / name))
    return sorted(sizes, key=lambda size: max(size) / min(size), reverse=True)


# ------------------------------------------------------------------------------------- one photo


# A path, a file's content, a binary file, or Pillow's image.
Photo: TypeAlias = "str | Path | bytes | BinaryIO | Image.Image"  # noqa: F821


def read_photo(photo: Photo, square: Square) -> Tensor:
    """A photo's centre square, or all of it, resized (bicubic): uint8 [3, side, side], RGB.

    Raises:
        ValueError: Pillow isn't installed, or can't read the photo; `photo` is of another type.
    """
    side = square.side
    image = open_photo(photo, side)
    box = square.box(image.height, image.width)
    resized = image.resize((side, side), box=box, resample=3)  # Image.Resampling.BICUBIC
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def for_pillow(photo: Photo) -> "str | Path | io.BytesIO | Image.Image":  # noqa: F821
    """A photo in a form that Pillow can open, or Pillow's image.

    Raises:
        ValueError: it has another type, or is the path of a pipe or a device.
    """
    if isinstance(photo, str | Path):
        if Path(photo).exists() and not Path(photo).is_file() and not Path(photo).is_dir():
            raise ValueError(f"can't read {photo} as an image (a pipe or a device); remove it")
        return photo
    if hasattr(photo, "read"):
        with contextlib.suppress(OSError):  # it can't, such as a connection
            photo.seek(0)
        photo = photo.read()
    if isinstance(photo, bytes):
        return io.BytesIO(photo)
    if not hasattr(photo, "getexif"):  # as Pillow's images have
        kind = type(photo).__name__
        raise ValueError(
            f"a photo is a path, bytes, a binary file or Pillow's image, not {kind}; try "
            "Image.fromarray"
        )
    if not min(photo.size):
        raise ValueError("the photo has no pixels")
    return photo


def open_photo(photo: Photo, side: int) -> "Image.Image":  # noqa: F821
    """A photo as 8-bit RGB, upright. A JPEG may be decoded smaller, but large enough for `side`."""
    Image = import_pillow().Image
    name = photo if isinstance(photo, str | Path) else "the photo"  # for messages
    photo = for_pillow(photo)
    has_heif = add_heif()
    try:
        if isinstance(photo, Image.Image):
            return upright_rgb(photo)
        with Image.open(photo, formats=readable_formats()) as image:
            if is_stack(image):
                raise ValueError("a TIFF of several pages, of which only one can be used")
            image.draft("RGB", (2 * side, 2 * side))  # JPEG: decode no larger than needed
            return upright_rgb(image)
    except FileNotFoundError as error:
        raise ValueError(f"no photo at {name}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder; give the photos in it") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        reason = str(error) or "not enough memory"
        raise ValueError(f"{name} is too large to be decoded ({reason}); shrink it") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        if isinstance(error, Image.UnidentifiedImageError) and not has_heif and is_heif(photo):
            raise ValueError(
                f"can't read {name} as an image without pillow-heif: pip install pillow-heif"
            ) from error
        reason = " ".join(str(error).split())  # pillow-heif's message has two lines
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its format is unknown"
        raise ValueError(
            f"can't read {name} as an image ({reason}); repair or remove it"
        ) from error


def photo_size(path: Path) -> tuple[int, int]:
    """Width and height of a photo as stored, in pixels, without decoding it.

    Raises:
        OSError: it can't be opened.
    """
    Image = import_pillow().Image
    add_heif()
    formats = readable_formats()
    with (
        warnings.catch_warnings(action="ignore"),  # of large photos
        Image.open(path, formats=formats) as image,
    ):
        return image.size


def readable_formats() -> list[str]:
    """Those of FORMATS that the installed Pillow has."""
    Image = import_pillow().Image
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is new in Pillow 11.3


def import_pillow() -> ModuleType:
    """Pillow's module PIL, or a ValueError that says how to install it."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ValueError("photos need Pillow to be decoded: pip install pillow") from error
    return PIL


@functools.cache
def add_heif() -> bool:
    """Let Pillow read HEIC, the format of phones' photos; False if pillow-heif is missing."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def is_heif(photo: str | Path | io.BytesIO) -> bool:
    """Whether a file begins as HEIC does, whatever its suffix."""
    if isinstance(photo, io.BytesIO):
        return bool(HEIC.match(photo.getvalue()))
    with Path(photo).open("rb") as file:
        return bool(HEIC.match(file.read(12)))


def is_stack(image: "Image.Image") -> bool:  # noqa: F821
    """Whether an opened photo is a TIFF of several pages. A second page that is smaller, or says so
    (tag NewSubfileType), is a thumbnail or a mask. label.py, which stands alone, does the same."""
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


def upright_rgb(image: "Image.Image") -> "Image.Image":  # noqa: F821
    """An opened photo as 8-bit RGB: 16-bit grey scaled, transparency over white, turned by its EXIF
    orientation, whatever its other tags hold. assets/device/label.py does the same.

    Raises:
        ValueError: nothing says which value is white: its pixels have 32 bits, or have 16 bits of
            which 12 are used, as by cameras and in medicine.
    """
    from PIL import Image

    image.load()  # of a TIFF, Pillow turns the pixels here, and drops the EXIF orientation
    orientation = image.getexif().get(0x0112)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("32 bits a pixel, whose white may be 1, 255 or more; save it in 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image, np.float32)
        grey[grey == image.info.get("transparency", -1)] = 65_535  # white
        if 0 < grey.max() < 4096:
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


# ----------------------------------------------------------------------------- data sets by name

# Templates of a sentence for each class, by the data set's name without digits at its end: those of
# CLIP-Adapter and CoOp (CUSTOM_TEMPLATES in CoOp's trainers/zsclip.py); for digits and SVHN those
# of CLIP's own prompts.
TEMPLATES = {
    "pets": "a photo of a {}, a type of pet.",
    "flowers": "a photo of a {}, a type of flower.",
    "aircraft": "a photo of a {}, a type of aircraft.",
    "food": "a photo of {}, a type of food.",
    "digits": 'a photo of the number: "{}".',
    "svhn": 'a photo of the number: "{}".',
}


def template_of(name: str) -> str:
    """The published template of a data set, or a general one."""
    return TEMPLATES.get(name.lower().rstrip("0123456789"), "a photo of a {}.")


def sentences(classes: list[str], template: str) -> list[str]:
    """A sentence for each class, for CLIP's text tower to read.

    Args:
        template: a sentence with {} for the class's name.

    Raises:
        ValueError: the template has no {}.
    """
    if "{}" not in template:
        raise ValueError(f"--template {template!r} has no {{}} where the class's name goes")
    return [template.replace("{}", each.replace("_", " ")) for each in classes]


# Readers by name, called with the name, the folder for published sets, whether downloads are
# forbidden, and the Square that photos are decoded to. To add a set of your own, write a function
# like `read_digits`, or for lists of photos one that calls `from_photos`. Each image needs a name
# of its own. For `partial`s, `place` is a file or folder of data_dir if the set is there.
DATASETS = {
    "digits": read_digits,
    "cifar10": partial(
        read_cifar,
        place="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=[f"data_batch_{i}" for i in range(1, 6)],
        test="test_batch",
        meta="batches.meta",
        key="",
    ),
    "cifar100": partial(
        read_cifar,
        place="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=["train"],
        test="test",
        meta="meta",
        key="fine_",
    ),
    "svhn": partial(read_torchvision, kind="SVHN", place="train_32x32.mat"),
    "pets": partial(
        read_torchvision, kind="OxfordIIITPet", place="oxford-iiit-pet", train=("trainval",)
    ),
    "food101": partial(read_torchvision, kind="Food101", place="food-101"),
    "flowers102": partial(
        read_torchvision, kind="Flowers102", place="flowers-102", train=("train", "val")
    ),
    "aircraft": partial(
        read_torchvision, kind="FGVCAircraft", place="fgvc-aircraft-2013b", train=("trainval",)
    ),
    "tinyimagenet": partial(
        read_archive,
        place="tiny-imagenet-200",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
    ),
    "imagenet_r": partial(
        read_archive,
        place="imagenet-r",
        url="https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        md5="a61312130a589d0ca1a8fca1f2bd3337",
    ),
}

# --------------------------------------------------------------------------------------- batches


def resample_matrix(start: Tensor, length: Tensor, old: int, new: int) -> Tensor:
    """Weights [B, new, old] that resize a stretch of a line of `old` pixels to `new` pixels.

    Pillow's antialiased bicubic: pixel centres at halves, Keys' kernel (1981, a = -1/2) widened
    when the line shrinks, weights that sum to 1.

    Args:
        start, length: where the stretch begins and how long it is, in pixels, each [B].
    """
    scale = (length / new)[:, None, None]  # [B, 1, 1]
    pixels = torch.arange(old, device=start.device) + 0.5  # [old]
    steps = torch.arange(new, device=start.device)[:, None] + 0.5  # [new, 1]
    centers = start[:, None, None] + steps * scale  # [B, new, 1]
    x = ((pixels - centers) / scale.clamp(min=1)).abs()  # [B, new, old]
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(dim=-1, keepdim=True)


def crop_resize(pixels: Tensor, boxes: Tensor, size: int, *, flip: Tensor | None = None) -> Tensor:
    """Cut boxes from images, resize them, and mirror some.

    Args:
        pixels: uint8 [B, 3, H, W].
        boxes: [B, 4], top, left, height and width in pixels.
        size: S.
        flip: bool [B], which ones to mirror; none if left out.

    Returns:
        Floats [B, 3, S, S] in 0..1.
    """
    H, W = pixels.shape[-2:]
    top, left, height, width = boxes.unbind(dim=1)
    rows = resample_matrix(top, height, H, size)  # [B, S, H]
    cols = resample_matrix(left, width, W, size)  # [B, S, W]
    if flip is not None:
        cols = torch.where(flip[:, None, None], cols.flip(1), cols)
    image = pixels.float() / 255
    out = rows[:, None] @ image @ cols.transpose(1, 2)[:, None]  # [B, 3, S, S]
    return out.clamp(0, 1)  # a cubic overshoots at edges


def random_boxes(n: int, H: int, W: int, min_scale: float, rng: torch.Generator) -> Tensor:
    """Boxes [n, 4] of RandomResizedCrop (Inception, https://arxiv.org/abs/1409.4842): an area of
    min_scale..1 of the image, an aspect of 3/4..4/3. A side longer than the image's is clamped to
    it, which makes the area smaller, at 0.85 down to 0.80; torchvision samples again."""
    u = torch.rand(4, n, generator=rng, device=rng.device)
    area = H * W * (min_scale + (1 - min_scale) * u[0])
    ratio = (4 / 3) ** (2 * u[1] - 1)
    height = (area / ratio).sqrt().clamp(max=H)
    width = (area * ratio).sqrt().clamp(max=W)
    return torch.stack([u[2] * (H - height), u[3] * (W - width), height, width], dim=1)


@dataclass(frozen=True)
class Batches:
    """Turns images into the network's input: normalised floats [B, 3, S, S] on a device.

    Only raw bytes are copied to the device, unless they are there already. Each of several
    processes takes a part of every batch: the images rank, rank + world, rank + 2·world and so on.
    """

    size: int  # S
    norm: tuple  # mean and std per channel
    batch: int  # B, of all processes together
    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def share(self) -> int:
        """The number of images of a full batch that this process takes."""
        return len(range(self.rank, self.batch, self.world))

    @cached_property
    def mean_std(self) -> Tensor:
        """[2, 3, 1, 1], made once, because a GPU waits while numbers are copied to it."""
        return torch.tensor(self.norm, device=self.device)[..., None, None]

    def finish(self, pixels: Tensor, boxes: Tensor, flip: Tensor | None = None) -> Tensor:
        """Crop, flip, resize and normalise a batch of pixels uint8 [B, 3, H, W]."""
        mean, std = self.mean_std
        return (crop_resize(pixels, boxes, self.size, flip=flip) - mean) / std

    def central(self, pixels: Tensor, share: float) -> Tensor:
        """The central square of a batch uint8 [B, 3, H, W], resized and normalised. Its side is
        `share` of the shorter side, in whole pixels, to avoid blur."""
        top, left, side = central_box(*pixels.shape[-2:], share)
        if side != self.size:
            box = torch.tensor([[top, left, side, side]], device=pixels.device)
            return self.finish(pixels, box.expand(len(pixels), 4))
        # Photos are stored so that nothing is left to resize. Evaluation of DeiT-tiny at 224 px
        # takes 0.86 of the time that it takes with a resize to the same size.
        square = pixels[..., top : top + side, left : left + side]
        mean, std = self.mean_std
        return (square / 255 - mean) / std

    def count(self, images: Images) -> int:
        """The number of batches in one pass; the last may be smaller."""
        return -(-len(images) // self.batch)

    def train(
        self, data: Dataset, seed: int, epoch: int, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training images in random order, cropped and flipped; all of it is
        determined by (seed, epoch, step). A run that is resumed begins at step `first`."""
        images = data.train
        order = torch.randperm(len(images), generator=generator(f"{seed}/{epoch}"))
        order = order.to(images.labels.device)  # once an epoch: each copy makes a GPU wait
        mine = slice(self.rank, None, self.world)  # this process's images of a batch
        for step, index in enumerate(order.split(self.batch)):
            if step < first:
                continue
            pixels, labels = images.take(index[mine], self.device)
            if pixels.ndim == 2:  # features [B, D] instead of images
                yield pixels, labels
                continue
            rng = generator(f"{seed}/{epoch}/{step}", self.device)
            boxes = random_boxes(len(index), *pixels.shape[-2:], data.min_scale, rng)
            flip = None
            if data.flip:
                flip = (torch.rand(len(index), generator=rng, device=self.device) < 0.5)[mine]
            yield self.finish(pixels, boxes[mine], flip), labels

    def eval(self, images: Images, center: float) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, each cropped to its central part; `center` is their Dataset's."""
        for first in range(0, max(1, len(images)), self.batch):  # without images one empty batch
            end = min(first + self.batch, len(images))
            mine = slice(first + self.rank, end, self.world)
            pixels, labels = images.take(mine, self.device)
            if pixels.ndim > 2:
                pixels = self.central(pixels, center)
            yield pixels, labels


# ----------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def locked(path: Path, *, folder: bool = False, wait: bool = True) -> Iterator[int]:
    """Lock a file or a folder, which is made if it is missing, for this process alone while the
    block runs. The operating system releases the lock however the process ends.

    Args:
        wait: until another process releases its lock; if False, such a lock is an error.

    Yields:
        Its file descriptor, or NO_LOCK on Windows, where nothing is locked.

    Raises:
        ValueError: another process holds the lock.
        FileNotFoundError, FileExistsError: it can't be made: the folder around a file is missing,
            or something else, such as a broken link, is in the way.
    """
    handle = None
    tries = 100
    while handle is None:
        try:
            handle = make_and_lock(path, folder, wait)
        except (FileNotFoundError, FileExistsError):  # perhaps removed meanwhile
            tries -= 1
            if not tries:
                raise
    try:
        yield handle
    finally:
        if handle != NO_LOCK:
            os.close(handle)


NO_LOCK = -1  # in place of a descriptor, on Windows


def make_and_lock(path: Path, folder: bool, wait: bool) -> int | None:
    """Make a file or folder if it is missing, and lock it. Returns its descriptor, or NO_LOCK; None
    if the previous holder of the lock has moved or removed what was locked here.

    Raises:
        ValueError: another process holds the lock.
        FileNotFoundError, FileExistsError: it was removed between two of these steps (for a folder
            that is gone, mkdir raises FileExistsError), or it can't be made at all.
    """
    if folder:
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.touch()
    if fcntl is None:
        return NO_LOCK
    handle = open_to_lock(path)
    try:
        take_lock(handle, path, wait)
        if is_same(handle, path):
            return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def open_to_lock(path: Path) -> int:
    """The descriptor of an opened file or folder. NFS locks only files that are open for writing,
    and no folders (man 2 flock)."""
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return os.open(path, os.O_RDONLY)


def take_lock(handle: int, path: Path, wait: bool) -> None:
    """Lock an opened file or folder; on a file system without locks print a note."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            raise ValueError(
                f"another process is at work in {path}; wait for it, or give another --name"
            ) from error
        print(f"waiting for another process that writes {path}", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        note_no_locks(error.strerror)


@functools.cache
def note_no_locks(reason: str) -> None:
    """Print once that this file system has no locks."""
    print(
        f"note     files can't be locked here ({reason}): run no two processes with one run's "
        "folder, or with one cache, at a time",
        file=sys.stderr,
    )


def is_same(handle: int, path: Path) -> bool:
    """Whether an opened file or folder is still the one at the path. It is taken for the same in
    network file systems that give a file another inode number each time."""
    try:
        if os.path.samestat(os.fstat(handle), path.stat()):
            return True
    except FileNotFoundError:
        return False
    return all(inode(path) != inode(path) for _ in range(10))  # a new one each time says nothing


def inode(path: Path) -> int:
    """A file's or folder's inode number; -1 if it is missing."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write the new content of `path` to.

    It is beside `path`, and if the block succeeds it is flushed to the disk and moved to `path`. So
    `path` is the old file or the new one, never a part of either, whenever the process or the
    machine stops. A file that a killed process left beside `path` is overwritten.

    Raises:
        ValueError: the disk is full, or the place can't be written to.
    """
    part = path.with_name(path.name + ".part")
    try:
        remove_odd(part)
        with locked(part):
            try:
                with part.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            move(part, path)  # from here on another process may have a new part
        flush(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError while it handles the system's error.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise ValueError(f"can't write {path} ({reason.strerror}); fix that first") from error


def move(part: Path, path: Path) -> None:
    """Move a file or folder to `path`, where it replaces a file. On Windows this fails while some
    program has the file open, as virus scanners do for a moment, so it is tried for two seconds."""
    tries = 20 if os.name == "nt" else 1
    for left in reversed(range(tries)):
        try:
            os.replace(part, path)
            return
        except PermissionError:
            if not left:
                raise
        time.sleep(0.1)


def remove_odd(path: Path) -> None:
    """Remove what is neither a folder nor a file that has only this name. In somebody else's folder
    a link, hard or symbolic, may lead anywhere, and opening a pipe may block forever."""
    with contextlib.suppress(FileNotFoundError):
        state = path.lstat()
        only_here = S_ISREG(state.st_mode) and state.st_nlink <= 1  # some file systems say 0
        if not only_here and not S_ISDIR(state.st_mode):
            path.unlink()


def flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    with contextlib.suppress(OSError):  # Windows can't open folders
        handle = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8, by `replacing`."""
    if isinstance(content, str):
        content = as_utf8(content).encode("utf-8")
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def empty_folder(path: Path) -> Iterator[Path]:
    """An empty folder for this process alone while the block runs; it is removed at the end. What a
    killed process left in it is removed first."""
    remove_odd(path)
    with locked(path, folder=True) as handle:
        for inside in path.iterdir():
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            else:
                inside.unlink()
        try:
            yield path
        finally:
            # If the block moved the folder, another process may have made a new one there: keep it.
            if handle < 0 or is_same(handle, path):
                shutil.rmtree(path, ignore_errors=True)


# Control characters, which a terminal obeys and XML doesn't allow.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def usable_cpus() -> int:
    """How many CPUs this process may keep busy: those that a batch system assigned to it, within
    `cpu_limit`."""
    cpus = os.cpu_count()
    if sys.platform == "linux":
        cpus = len(os.sched_getaffinity(0))
    return max(1, int(min(cpus, cpu_limit())))


@functools.cache
def cpu_limit(
    groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> float:
    """How many CPUs the kernel's control groups let this process use, as containers limit them;
    infinite without a limit. torch.get_num_threads() and os.cpu_count() don't tell."""
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError):  # not Linux, or only something like it
        for line in groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)  # "0::/a/b", or "4:cpu,cpuacct:/a/b"
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = mounted / "cpu" if controllers else mounted
            # A container may see the group by the host's path and itself at the root.
            for place in (Path(group), *Path(group).parents):
                limits.append(quota(root / str(place).lstrip("/")))
    return min(limits)


def quota(folder: Path) -> float:
    """The CPUs that a control group allows: of version 2 "50000 100000", microseconds in a period,
    or "max 100000"; of version 1 in two files, -1 for any."""
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(allowed) / int(period) if int(allowed) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def printable(text: str) -> str:
    """A text in one line, without control characters, which names of files and classes may hold."""
    text = as_utf8(text).replace("\n", "\ufffd").replace("\t", " ")
    return CONTROL.sub("\ufffd", text)


def first_few(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more it has."""
    text = ", ".join(names[:most])
    more = len(names) - most
    return f"{text} and {more:,} more" if more > 0 else text


# ------------------------------------------------------------------------------------- downloads


def progress(what: str, done: int, total: int, started: float, first: int = 0) -> None:
    """A line on a terminal that rewrites itself and vanishes at the end: how much is done, and how
    long the rest will take. In a log, one such line a minute. torchrun's first process prints it.

    Args:
        started: time.perf_counter() at the start, when `first` of `total` were already done.
    """
    global last_report
    if os.environ.get("RANK", "0") != "0":
        return
    wipe_progress()
    if done >= total:
        return
    now = time.perf_counter()
    left = (now - started) * (total - done) / max(1, done - first)
    text = printable(f"{what} {done:,} of {total:,}, {clock_text(left)} left")
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)
        progress_lines.append(text)
    elif now - max(started, last_report) > 60:
        print(text, file=sys.stderr, flush=True)
        last_report = now


progress_lines: list[str] = []  # the line that is on the terminal, if any
last_report = 0.0  # when the last line was printed to a log


def clock_text(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def wipe_progress() -> None:
    """Remove the progress line, before anything else is printed."""
    if progress_lines:
        blank = " " * len(progress_lines.pop())
        terminal = getattr(sys.stderr, "stream", sys.stderr)  # past train.Printable
        print(f"\r{blank}\r", end="", file=terminal, flush=True)


def file_hash(path: Path, kind: str) -> str:
    """A file's md5 or sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def cache_folder() -> Path:
    """ADAPTERTUNE_CACHE, or ~/.cache/adaptertune.

    Raises:
        ValueError: it isn't set, and there is no home folder.
    """
    given = os.environ.get("ADAPTERTUNE_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "adaptertune"
    except RuntimeError as error:
        raise ValueError(
            "there is no home folder to keep downloads and photos in; "
            "set ADAPTERTUNE_CACHE to a folder"
        ) from error


def hub_file(repo: str, name: str, *, offline: bool = False, option: str = "--weights") -> Path:
    """A file of a Hugging Face repository, from the cache or the network.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured; files are kept in `cache_folder()`.

    Args:
        option: of train.py, to give the file by; for the error message.

    Raises:
        ValueError: the file isn't cached and can't be fetched, or one of the variables is invalid.
    """
    path = cache_folder() / repo / name
    if path.exists():
        return path
    if offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "true", "yes"):
        given = "--offline" if offline else "HF_HUB_OFFLINE"
        raise ValueError(
            f"{path} is not there and {given} given; fetch it once without (train.py has "
            f"--download), or give {option} FILE"
        )
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError(
            "HF_TOKEN holds a space or another character that no token has; correct it"
        )
    if not re.match(r"https?://[!-~]+$", endpoint) or "@" in endpoint:
        raise ValueError(
            "HF_ENDPOINT is no address like https://huggingface.co, without user and password; "
            "correct it"
        )
    try:
        download(f"{endpoint}/{repo}/resolve/main/{name}", path, token=token)
    except OSError as error:
        raise ValueError(
            f"can't write to {path.parent} ({error.strerror}); set ADAPTERTUNE_CACHE to another "
            "folder"
        ) from error
    return path


# A transfer that is slower than this is aborted and tried again.
SLOWEST = 1000  # bytes a second
PATIENCE = 30.0  # seconds over which they are counted


def download(
    url: str,
    path: Path,
    *,
    checksum: tuple[str, str] | None = None,
    token: str = "",
    tries: int = 5,
) -> None:
    """Fetch `url` to `path`, which exists only once it is complete and its checksum is right.

    Received bytes are kept in `path`.part, which one process at a time writes while others wait. A
    dropped connection is resumed, with at most `tries` requests per call; a later call continues
    from there. Size and SHA-256 are checked against those that the hub states (X-Linked-Size and
    X-Linked-Etag of its redirect, or an ETag of 64 hexadecimal digits), and the beginning of the
    file against its name.

    Args:
        checksum: kind and hexadecimal digest, instead of the one that the server states.

    Raises:
        ValueError: not found, no network, a wrong checksum or another kind of file; says how to
            supply the file by hand.
        OSError: the folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    by_hand = f"fetch {url} by other means and put it at {path}"
    if path.suffix == ".safetensors":
        by_hand += " or give it by --weights"
    remove_odd(part)
    with locked(part):
        if path.exists():  # another process has fetched it meanwhile
            part.unlink(missing_ok=True)
            return
        try:
            fetch(url, part, checksum, token, tries)
            check_content(part, path.name)
        except DownloadError as error:
            part.unlink()
            reason = f"{url} {error} and was removed; try again"
            raise ValueError(f"{reason}, or {by_hand}") from error
        except ValueError as error:
            if not part.stat().st_size:
                part.unlink()
            raise ValueError(f"{error}; or {by_hand}") from error
        flush(part)
        move(part, path)
    flush(path.parent)


class DownloadError(Exception):
    """What arrived isn't what was asked for."""


def fetch(url: str, part: Path, checksum: tuple[str, str] | None, token: str, tries: int) -> None:
    """Send requests until `part` is complete (see `download`).

    Raises:
        DownloadError: what arrived isn't what was asked for.
        ValueError: it couldn't be fetched.
    """
    reason = ""
    pause = 0  # seconds that the server asked for
    print(f"fetch    {url}", file=sys.stderr)
    for attempt in range(tries):
        if attempt:
            print(f"retry    {reason}", file=sys.stderr)
        time.sleep(0.5 * attempt + pause)
        pause = 0
        try:
            stated = request_rest(url, part, token)
        except urllib.error.HTTPError as error:
            # In our own words: what the server says may repeat the token.
            reason = f"{error.code} {http.client.responses.get(error.code, 'without a reason')}"
            if error.code == 416:  # the part is as long as the file, or longer: start again
                os.truncate(part, 0)
            elif error.code in (408, 429) or error.code >= 500:  # 408: too slow, 429: too often
                pause = min(60, to_integer(error.headers.get("retry-after")))
            else:
                hint = "" if checksum else hub_advice(error.code, token)
                raise ValueError(f"{url} answered {reason}{hint}") from error
            continue
        except (http.client.HTTPException, ValueError) as error:  # ValueError: a bad redirect
            reason = type(error).__name__
            continue
        except OSError as error:
            if error.errno in NO_ROOM:
                raise ValueError(f"can't write {part} ({error.strerror}); make room") from error
            reason = why_no_answer(error)
            continue
        kind, digest = checksum or ("sha256", stated)
        if digest and file_hash(part, kind) != digest:
            raise DownloadError(f"arrived with a wrong {kind}")
        return
    raise ValueError(f"could not fetch {url}: {reason}; run again to go on")


def hub_advice(code: int, token: str) -> str:
    """What to do about an answer of the hub."""
    if code == 401 and token:
        return "; it doesn't accept HF_TOKEN: correct it, or unset it for a public file"
    if code in (401, 403):
        hint = "set HF_TOKEN for a private file, and accept the licence of a gated one on its page"
        return f"; {hint}"
    return ""


def why_no_answer(error: OSError) -> str:
    """Why a request failed, with advice if the server's certificate can't be verified."""
    cause = getattr(error, "reason", None) or error
    reason = str(cause) or type(cause).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        reason += "; set SSL_CERT_FILE to a file of certificates, or on macOS run Python's "
        reason += "Install Certificates.command"
    return reason


def check_content(path: Path, name: str) -> None:
    """Raise DownloadError unless a file is of the kind that its `name` says: not the page of a
    captive portal, not compressed, and not cut short if no size was stated."""
    if not path.stat().st_size:
        raise DownloadError("arrived empty")
    if name.endswith(".safetensors"):
        try:
            with safe_open(path, "pt"):  # its header says how long the file is
                return
        except SafetensorError as error:
            raise DownloadError("isn't a whole safetensors file") from error
    if name.endswith(".txt"):
        with path.open("rb") as file:
            if file.read(8) != b"#version":
                raise DownloadError("isn't a vocabulary")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the headers in which the hub describes the file."""

    def __init__(self):
        self.stated: dict[str, str] = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        for key, value in headers.items():
            if key.lower().startswith("x-linked-"):
                self.stated[key.lower()] = value
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def request_rest(url: str, part: Path, token: str) -> str:
    """Request the bytes that `part` lacks, once, and append them to it.

    Returns:
        The whole file's SHA-256 as the server states it; "" if it doesn't.

    Raises:
        OSError, http.client.HTTPException: anything that another try may fix.
        DownloadError: more bytes arrive than the server states.
    """
    have = part.stat().st_size
    request = urllib.request.Request(url, headers={"User-Agent": "adaptertune"})
    if token:  # not sent to the host that a redirect names
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if have:
        request.add_header("Range", f"bytes={have}-")
    redirects = _Redirects()
    with open_in_time(request, redirects) as answer:
        headers = {key.lower(): value for key, value in answer.headers.items()} | redirects.stated
        asked = f"bytes {have}-"
        if answer.status == 206 and not headers.get("content-range", asked).startswith(asked):
            os.truncate(part, 0)
            raise OSError(f"the server sent another part than the one from byte {have:,} on")
        if answer.status != 206:  # a server that ignores Range sends the whole file again
            os.truncate(part, 0)
            have = 0
        size = to_integer(headers.get("x-linked-size"))
        length = to_integer(headers.get("content-length"))
        if not size and length:
            size = have + length
        receive(answer, part, size)
    etag = headers.get("x-linked-etag") or headers.get("etag") or ""
    etag = etag.removeprefix("W/").strip('"').lower()
    return etag if re.fullmatch("[0-9a-f]{64}", etag) else ""


def receive(answer: http.client.HTTPResponse, part: Path, size: int) -> None:
    """Append an answer to `part`, which must then have `size` bytes; 0 if no size was stated.

    Raises:
        OSError: the transfer is slower than SLOWEST, or ends early.
        DownloadError: more bytes arrive.
    """
    have = part.stat().st_size
    what = f"fetching {part.name.removesuffix('.part')}, MB"
    first = have >> 20
    started = time.perf_counter()
    moment = started
    arrived = 0  # bytes since `moment`
    with part.open("ab") as file:
        while block := answer.read1(1 << 20):
            file.write(block)
            have += len(block)
            if size and have > size:
                raise DownloadError(
                    f"arrived with more than the {size:,} bytes that it should have"
                )
            arrived += len(block)
            now = time.perf_counter()
            if now - moment > PATIENCE:
                if arrived < SLOWEST * PATIENCE:
                    raise OSError(f"too slow, {arrived:,} bytes in {now - moment:.0f} seconds")
                moment = now
                arrived = 0
            progress(what, have >> 20, size >> 20, started, first)
    if size and have < size:
        raise OSError(f"the connection was cut at {have:,} of {size:,} bytes")


def open_in_time(
    request: urllib.request.Request, redirects: _Redirects
) -> http.client.HTTPResponse:
    """Send a request and read the head of its answer, with all redirects, within twice PATIENCE:
    the connection's own timeout applies to each read.

    Raises:
        TimeoutError: no answer came in time.
    """
    answer = Future()

    def work() -> None:
        opener = urllib.request.build_opener(redirects)
        try:
            answer.set_result(opener.open(request, timeout=30))
        except Exception as error:
            answer.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2 * PATIENCE)
    if not answer.done():
        raise TimeoutError(f"no answer in {2 * PATIENCE:.0f} seconds")
    return answer.result()


def to_integer(text: str | None) -> int:
    """A header's number; 0 if it has none."""
    return int(text) if text and text.isdecimal() and len(text) < 16 else 0
