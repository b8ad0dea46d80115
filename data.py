"""Images in, batches out: data sets, their splits, augmentation on the device, and downloads.

A data set is three sets of images in memory, each one uint8 tensor [n, 3, H, W]. Everything that happens to a batch (crop,
flip, resize, normalise) runs on the training device, and all its randomness comes from (seed, epoch, step): the same
command draws the same crops, and a resumed run draws those that it would have drawn.

Crop, flip and antialiased resize are linear and separable, so they are two small matrices per image:

    out[S, S] = rows[S, H] · image[H, W] · cols[S, W]^T

with the weights of Pillow's bicubic resize in them (Keys' cubic, a = -1/2). A flip reverses the columns' matrix.

Shapes: n images of a set, B images of a batch, H x W stored pixels, S pixels that the network sees.
"""
import hashlib
import http.client
import os
import pickle
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
CIFAR = "https://www.cs.toronto.edu/~kriz/"


@dataclass
class Images:
    """n images with their labels; `names` are file names, where they were files."""
    pixels: Tensor  # uint8 [n, 3, H, W]
    labels: Tensor  # int64 [n]
    names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(self.pixels[index], self.labels[index], [self.names[i] for i in index.tolist()] if self.names else [])


@dataclass
class Dataset:
    """Train, validation and test images and how they may be augmented.

    `flip`: a mirror image keeps its label. `min_scale`: the smallest share of the area that a training crop may have.
    `center`: the share of each side that evaluation looks at (the usual 224 of 256 for photos, all of a small image).
    `val` and `test` are None as long as nobody has split them off. `whole`: sizes of train and val before any `limit`.
    """
    name: str
    classes: list[str]
    train: Images
    val: Images | None
    test: Images | None
    flip: bool = True
    min_scale: float = 0.08  # torchvision's default for RandomResizedCrop, which the paper uses
    center: float = 1.0
    whole: tuple[int, int] = (0, 0)


def read(name: str, data_dir: str = "data", image_size: int = 224, offline: bool = False) -> Dataset:
    """A data set by name or path, as published.

    Args:
        name: a key of DATASETS, or a folder of photos: class folders, or train/ and perhaps val/ and test/ with class
            folders in each.
        image_size: the network's; photos are stored at 8/7 of it (256 for 224), centre square.

    Raises:
        ValueError: unknown name, missing or empty folder, corrupt file; says what to do.
    """
    check_name(name)
    if name in DATASETS:
        return DATASETS[name](Path(data_dir), offline)
    return read_folder(Path(name), side=round(image_size * 8 / 7))


def check_name(name: str) -> None:
    """Raise a ValueError unless `name` is a data set or a folder."""
    if name not in DATASETS and not Path(name).is_dir():
        raise ValueError(f"no data set or folder {name!r}: choose {', '.join(DATASETS)} or give a folder of images")


def split(data: Dataset, *, seed: int = 0, limit: int = 0, shots: int = 0, test_share: float = 0.0) -> Dataset:
    """Split off what is missing. Where there is no published test set (digits, plain class folders) it is a stratified
    20 %, the same for every seed; validation is a stratified 10 % of the rest, drawn by `seed` (the paper's protocol).

    Args:
        limit: train on so many images only, classes in proportion, and choose by a quarter as many; 0 for all.
        shots: train on so many images of each class, drawn by `seed`, and choose by as many others, 4 at most (the few-shot
            protocol of CoOp, https://arxiv.org/abs/2109.01134) or as there are, perhaps none; 0 for all.
        test_share: the share of a missing test set; then it is drawn by `seed`.

    Raises:
        ValueError: a class has fewer images than `shots`.
    """
    train, val, test = data.train, data.val, data.test
    if test is None:
        test, train = cut(train, test_share or 0.2, f"test/{seed}" if test_share else "test")
    if val is None and not shots:
        val, train = cut(train, 0.1, f"val/{seed}")
    whole = (len(train), len(val or ()))
    if shots:
        train, rest = draw(train, shots, f"shots/{seed}")
        if int(torch.bincount(train.labels, minlength=len(data.classes)).min()) < shots:
            raise ValueError(f"--shots {shots}: a class of {data.name} has fewer images to train on; give a smaller number")
        val = draw(val or rest, min(shots, 4), f"shots/{seed}")[0]
    elif limit:
        train = train[stratified_order(train.labels, f"limit/{seed}")[:limit]]
        val = val[stratified_order(val.labels, f"limit/{seed}")[:max(1, limit // 4)]]
    return replace(data, train=train, val=val, test=test, whole=whole)


def cut(images: Images, share: float, key: str) -> tuple[Images, Images]:
    """A stratified `share` of the images, drawn by `key`, and the rest."""
    order, size = stratified_order(images.labels, key), max(1, round(share * len(images)))
    return images[order[:size]], images[order[size:]]


def draw(images: Images, shots: int, key: str) -> tuple[Images, Images]:
    """At most `shots` images of each class, drawn by `key`, and the rest."""
    order = stratified_order(images.labels, key)
    place = (images.labels[order] == images.labels.unique()[:, None]).cumsum(dim=1)  # [classes, n]: how many up to here
    first = place.gather(0, images.labels.unique(return_inverse=True)[1][order][None])[0] <= shots
    return images[order[first]], images[order[~first]]


def stratified_order(labels: Tensor, key: str) -> Tensor:
    """A random order [n], fixed by `key`, whose every beginning holds the classes in proportion: cut it to split."""
    shuffled = torch.randperm(len(labels), generator=generator(key))
    place = torch.empty(len(labels))  # where an image stands in its own class, 0..1
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        place[members] = (torch.arange(len(members)) + 0.5) / len(members)
    return shuffled[place[shuffled].argsort(stable=True)]


def generator(key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator seeded by a readable key such as "0/3/17" (seed, epoch, step). A generator on the CPU keeps only 32
    bits of its seed, hence the checksum."""
    return torch.Generator(device).manual_seed(checksum(key))


def checksum(key: str) -> int:
    """32 bits to seed a generator with."""
    return zlib.crc32(key.encode())


# --------------------------------------------------------------------------------------------------- reading data sets


def read_digits(data_dir: Path, offline: bool) -> Dataset:
    """The 1,797 handwritten digits of UCI's optdigits test set that scikit-learn carries, 8 x 8, grey (assets/README.md)."""
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as file:
        grey, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    pixels = (grey.float() * (255 / 16)).round().byte()  # counts of 0..16 ink dots
    images = Images(pixels[:, None].expand(-1, 3, -1, -1).contiguous(), labels)
    return Dataset("digits", [str(i) for i in range(10)], images, None, None, flip=False, min_scale=0.85)


def read_cifar(data_dir: Path, offline: bool, *, name: str, md5: str, train: list[str], test: str, meta: str,
               key: str) -> Dataset:
    """CIFAR's python version (Krizhevsky 2009), from the extracted folder, else the archive, else the network."""
    folder = "cifar-10-batches-py" if name == "cifar10" else "cifar-100-python"
    root = data_dir / folder
    if not root.is_dir():
        archive = data_dir / f"{folder.replace('-batches-py', '-python')}.tar.gz"
        if not archive.exists() and offline:
            raise ValueError(f"no {root} and --offline given; put the published archive {archive.name} into {data_dir}")
        if not archive.exists():
            download(CIFAR + archive.name, archive, checksum=("md5", md5))
        elif file_hash(archive, "md5") != md5:
            raise ValueError(f"{archive} is not the published archive (md5 differs); delete it to fetch it again")
        with tempfile.TemporaryDirectory(dir=data_dir) as part, tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
            os.replace(Path(part) / folder, root)
    labels_key = f"{key}labels".encode()

    def images(files: list[str]) -> Images:
        batches = [unpickle(root / file) for file in files]
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        return Images(torch.from_numpy(pixels), torch.tensor([label for batch in batches for label in batch[labels_key]]))

    names = unpickle(root / meta)[f"{key}label_names".encode()]
    return Dataset(name, [each.decode() for each in names], images(train), None, images([test]))


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can build numpy arrays and nothing else, so that a data file can't run code."""
    ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
               ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
               ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def unpickle(path: Path) -> dict:
    """A CIFAR pickle's dictionary (keys are bytes). Raises ValueError if it is damaged or wants more than arrays."""
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="bytes").load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise ValueError(f"{path} was refused: {error}; delete its folder to extract the archive again") from error


def read_folder(root: Path, *, side: int) -> Dataset:
    """Photos in class folders, each decoded once to a centre square of `side` pixels. Needs Pillow."""
    parts = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    if parts and "train" not in parts:
        raise ValueError(f"{root} has {' and '.join(parts)} but no train folder")
    found = {part: list_photos(folder) for part, folder in (parts or {"train": root}).items()}
    classes, images = list(found["train"]), {}
    if len(classes) < 2:
        raise ValueError(f"{parts.get('train', root)} has {len(classes)} class folders; at least 2 are needed, one a class")
    for part, photos in found.items():
        if odd := sorted(set(photos) ^ set(classes)):
            raise ValueError(f"{parts[part]} and {parts['train']} don't have the same classes: {', '.join(odd[:3])}")
        labels = [label for label, name in enumerate(classes) for _ in photos[name]]
        images[part] = decode([path for name in classes for path in photos[name]], labels, side, root)
    return Dataset(root.resolve().name, classes, images["train"], images.get("val"), images.get("test"), center=7 / 8)


def list_photos(folder: Path) -> dict[str, list[Path]]:
    """The photos of each class folder inside, sorted, without hidden ones. A folder without photos is an error."""
    found = {}
    for each in sorted(path for path in folder.glob("[!.]*") if path.is_dir()):
        found[each.name] = sorted(path for path in each.glob("[!.]*") if path.suffix.lower() in PHOTOS)
        if not found[each.name]:
            raise ValueError(f"no images in {each}; {', '.join(sorted(PHOTOS))} are read")
    return found


def decode(paths: list[Path], labels: list[int], side: int, root: Path) -> Images:
    """Decode photos with Pillow on all cores: short side to `side` pixels (bicubic), centre square, RGB."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("image folders need Pillow to decode photos: pip install pillow") from error

    def one(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                image.draft("RGB", (2 * side, 2 * side))  # JPEG: decode no larger than needed
                image = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"can't read {path} as an image ({error}); repair or remove it") from error
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2  # whole pixels: no blur where nothing is resized
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge)))

    pixels, started = torch.empty(len(paths), 3, side, side, dtype=torch.uint8), time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, image in enumerate(pool.map(one, paths)):
            pixels[i] = torch.from_numpy(image.copy()).permute(2, 0, 1)
            progress(f"decoding {root.name}", i + 1, len(paths), started)
    return Images(pixels, torch.tensor(labels), [str(path.relative_to(root)) for path in paths])


# One sentence for each class, by how a data set's name begins: CLIP-Adapter's and CoOp's (CUSTOM_TEMPLATES in CoOp's
# trainers/zsclip.py); for digits that of CLIP's prompts for MNIST.
TEMPLATES = {"pets": "a photo of a {}, a type of pet.", "flowers": "a photo of a {}, a type of flower.",
             "aircraft": "a photo of a {}, a type of aircraft.", "food": "a photo of {}, a type of food.",
             "digits": 'a photo of the number: "{}".', "": "a photo of a {}."}


def sentences(name: str, classes: list[str], template: str = "") -> list[str]:
    """What CLIP's text tower reads of a data set's classes: the `template`, or the published one, with each name in it."""
    template = template or next(text for start, text in TEMPLATES.items() if name.lower().startswith(start))
    if "{}" not in template:
        raise ValueError(f"--template {template!r} has no {{}} where the class's name goes")
    return [template.replace("{}", each.replace("_", " ")) for each in classes]


PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
DATASETS = {
    "digits": read_digits,
    "cifar10": partial(read_cifar, name="cifar10", md5="c58f30108f718f92721af3b95e74349a", key="", meta="batches.meta",
                       train=[f"data_batch_{i}" for i in range(1, 6)], test="test_batch"),
    "cifar100": partial(read_cifar, name="cifar100", md5="eb9058c3a382ffc7106e4002c42a8d85", key="fine_", meta="meta",
                        train=["train"], test="test"),
}

# ------------------------------------------------------------------------------------------------------------- batches


def resample_matrix(start: Tensor, length: Tensor, old: int, new: int) -> Tensor:
    """Weights [B, new, old] that resize the stretch from `start` [B], `length` [B] long, of a line of `old` pixels.

    Pillow's antialiased bicubic: pixel centres at halves, Keys' kernel (1981, a = -1/2) widened when the line shrinks, weights
    sum to 1.
    """
    scale = (length / new)[:, None, None]  # [B, 1, 1]
    pixels = torch.arange(old, device=start.device) + 0.5
    centers = start[:, None, None] + (torch.arange(new, device=start.device)[:, None] + 0.5) * scale  # [B, new, 1]
    x = ((pixels - centers) / scale.clamp(min=1)).abs()  # [B, new, old]
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(dim=-1, keepdim=True)


def crop_resize(pixels: Tensor, boxes: Tensor, size: int, *, flip: Tensor | None = None) -> Tensor:
    """Cut `boxes` [B, 4] (top, left, height, width in pixels) from uint8 [B, 3, H, W], resize them to floats [B, 3, S, S]
    in 0..1, and mirror those that `flip` [B] marks."""
    H, W = pixels.shape[-2:]
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], H, size)
    cols = resample_matrix(boxes[:, 1], boxes[:, 3], W, size)
    if flip is not None:
        cols = torch.where(flip[:, None, None], cols.flip(1), cols)
    out = rows[:, None] @ (pixels.float() / 255) @ cols.transpose(1, 2)[:, None]  # [B, 1, S, H] [B, 3, H, W] [B, 1, W, S]
    return out.clamp(0, 1)  # a cubic overshoots at edges


def random_boxes(n: int, H: int, W: int, min_scale: float, rng: torch.Generator) -> Tensor:
    """Boxes [n, 4] of RandomResizedCrop (Inception, https://arxiv.org/abs/1409.4842): area min_scale..1 of the image, aspect
    3/4..4/3. A side longer than the image is cut to it, where torchvision draws again."""
    u = torch.rand(4, n, generator=rng, device=rng.device)
    area, ratio = H * W * (min_scale + (1 - min_scale) * u[0]), (4 / 3) ** (2 * u[1] - 1)
    height, width = (area / ratio).sqrt().clamp(max=H), (area * ratio).sqrt().clamp(max=W)
    return torch.stack([u[2] * (H - height), u[3] * (W - width), height, width], dim=1)


def center_boxes(n: int, H: int, W: int, share: float, device: torch.device) -> Tensor:
    """Boxes [n, 4] of the central square whose side is `share` of the shorter side, in whole pixels: no blur."""
    side = round(share * min(H, W))
    return torch.tensor([[(H - side) // 2, (W - side) // 2, side, side]], device=device).expand(n, 4)


@dataclass(frozen=True)
class Batches:
    """Turns images into what the network sees: [B, 3, S, S], normalised, on `device`; only raw bytes travel there."""
    size: int
    norm: tuple
    batch: int
    device: torch.device

    def finish(self, pixels: Tensor, boxes: Tensor, flip: Tensor | None = None) -> Tensor:
        """Crop, flip, resize and normalise a batch of pixels uint8 [B, 3, H, W]."""
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in self.norm)
        return (crop_resize(pixels, boxes, self.size, flip=flip) - mean) / std

    def count(self, images: Images) -> int:
        """Batches in one pass; the last may be smaller."""
        return -(-len(images) // self.batch)

    def train(self, data: Dataset, seed: int, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training images in random order, cropped and flipped, fixed by (seed, epoch, step); from step
        `first` on, to go on after an interruption."""
        order = torch.randperm(len(data.train), generator=generator(f"{seed}/{epoch}"))
        for step, index in list(enumerate(order.split(self.batch)))[first:]:
            rng, pixels = generator(f"{seed}/{epoch}/{step}", self.device), data.train.pixels[index].to(self.device)
            if pixels.ndim == 2:  # features [B, D] in the place of images
                yield pixels, data.train.labels[index].to(self.device)
                continue
            boxes = random_boxes(len(index), *pixels.shape[-2:], data.min_scale, rng)
            flip = torch.rand(len(index), generator=rng, device=self.device) < 0.5 if data.flip else None
            yield self.finish(pixels, boxes, flip), data.train.labels[index].to(self.device)

    def eval(self, images: Images, center: float) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, the central part of each."""
        for pixels, labels in zip(images.pixels.split(self.batch), images.labels.split(self.batch), strict=True):
            pixels = pixels.to(self.device)
            if pixels.ndim > 2:
                pixels = self.finish(pixels, center_boxes(len(pixels), *pixels.shape[-2:], center, self.device))
            yield pixels, labels.to(self.device)


# ----------------------------------------------------------------------------------------------------------- downloads


def progress(what: str, done: int, total: int, started: float, first: int = 0) -> None:
    """A line on a terminal that rewrites itself and vanishes at the end: how much is done, of it `first` before `started`
    (time.perf_counter), and how long the rest will take."""
    if sys.stderr.isatty():
        left = (time.perf_counter() - started) * (total - done) / max(1, done - first)
        text = f"{what} {done:,} of {total:,}, {left:.0f} s left" if done < total else ""
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def file_hash(path: Path, kind: str) -> str:
    """A file's md5 or sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps what the hub says of the file on the way."""

    def __init__(self):
        self.stated: dict[str, str] = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.stated.update({key.lower(): value for key, value in headers.items() if key.lower().startswith("x-linked-")})
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def cache_folder() -> Path:
    """ADAPTERTUNE_CACHE, or ~/.cache/adaptertune."""
    return Path(os.environ.get("ADAPTERTUNE_CACHE") or Path.home() / ".cache" / "adaptertune")


def hub_file(repo: str, name: str, *, offline: bool = False) -> Path:
    """A file of a Hugging Face repository, from the cache or the network.

    HF_ENDPOINT and HF_TOKEN are honoured; files are kept in `cache_folder()`.
    """
    path = cache_folder() / repo / name
    if not path.exists():
        if offline:
            raise ValueError(f"{path} is not there and --offline given; fetch it once without, or give --weights FILE")
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        download(f"{endpoint.rstrip('/')}/{repo}/resolve/main/{name}", path, token=os.environ.get("HF_TOKEN", ""))
    return path


def download(url: str, path: Path, *, checksum: tuple[str, str] | None = None, token: str = "", tries: int = 5) -> None:
    """Fetch `url` to `path`, which exists only once it is whole and its checksum right.

    What has arrived stays in `path`.part: a cut connection is resumed at once, `tries` times, and by the next call after
    that. Size and SHA-256 are checked against what the hub states (the headers X-Linked-Size and X-Linked-Etag of its
    redirect, or an ETag of 64 hexadecimal digits), else against `checksum` (kind, hexadecimal digest).

    Raises:
        ValueError: not found, no network or a wrong checksum; says how to supply the file by hand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, reason = path.with_name(path.name + ".part"), ""
    by_hand = f"fetch {url} by other means and put it at {path}" + (" or give it by --weights" if path.suffix != ".gz" else "")
    for attempt in range(tries):
        time.sleep(0.2 * 2 ** attempt if attempt else 0)
        try:
            size, stated = _fetch(url, part, token)
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            elif error.code < 500:
                hint = "; a private file needs HF_TOKEN" if error.code in (401, 403) else ""
                raise ValueError(f"{url} answered {reason}{hint}; {by_hand}") from error
            continue
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error) or type(error).__name__)
            continue
        have, (kind, digest) = part.stat().st_size, checksum or ("sha256", stated)
        if size and have < size:
            reason = f"the connection was cut at {have:,} of {size:,} bytes"
        elif digest and file_hash(part, kind) != digest:
            part.unlink()
            raise ValueError(f"{url} arrived with a wrong {kind} and was removed; try again, or {by_hand}")
        else:
            os.replace(part, path)
            return
    raise ValueError(f"could not fetch {url}: {reason}; run again to go on, or {by_hand}")


def _fetch(url: str, part: Path, token: str) -> tuple[int, str]:
    """One request that appends to `part`. Returns the file's whole size and SHA-256 as stated (0 and "" if they aren't)."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "adaptertune"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # not for the host that a redirect names
    if have:
        request.add_header("Range", f"bytes={have}-")
    redirects = _Redirects()
    with urllib.request.build_opener(redirects).open(request, timeout=30) as answer:
        have = have if answer.status == 206 else 0  # a server that ignores Range sends the whole file again
        headers = {key.lower(): value for key, value in answer.headers.items()} | redirects.stated
        size = int(headers.get("x-linked-size") or have + int(headers.get("content-length") or 0))
        etag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')
        started = time.perf_counter()
        with part.open("ab" if have else "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                have += len(block)
                progress(f"fetching {part.name.removesuffix('.part')}, MB", have >> 20, max(size, have + 1) >> 20, started)
    return size, etag.lower() if len(etag) == 64 else ""
