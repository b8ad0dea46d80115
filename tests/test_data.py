"""Data sets, their splits, and the batches made from them."""

import math
import os
import pickle
import shutil
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Evil, publish_pickle, write_cifar10

import data

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------- crop and resize


@pytest.mark.parametrize("size", [16, 32, 48, 224])
def test_crop_and_resize_equal_pillows(size):
    """Crop and resize give Pillow's pixels for the same box, within its rounding to 8 bits."""
    image = pytest.importorskip("PIL.Image")
    # Grey values far from 0 and 255: Pillow clamps after each direction.
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(80, 176, (1, 3, 40, 60), dtype=torch.uint8, generator=rng)
    top, left, height, width = (3.25, 10.5, 30.5, 40.25)
    ours = data.crop_resize(pixels, torch.tensor([[top, left, height, width]]), size)[0]

    photo = image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    box = (left, top, left + width, top + height)
    resized = photo.resize((size, size), image.Resampling.BICUBIC, box=box)
    theirs = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255

    # Pillow's kernel doesn't look beyond the box, ours not beyond the image.
    edge = 1 + int(3 * size / 30)
    inner = (slice(None), slice(edge, -edge), slice(edge, -edge))
    assert (ours[inner] - theirs[inner]).abs().max() < 1.6 / 255


def test_whole_image_at_its_own_size_is_unchanged():
    """Cropping the whole image and resizing it to its own size changes nothing."""
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 32, 32]]).expand(4, 4)
    assert torch.allclose(data.crop_resize(pixels, boxes, 32), pixels / 255, atol=1e-6)


def test_flip_mirrors():
    """A flip mirrors the plain crop, and only for the images that request it."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0]]).expand(2, 4)
    plain = data.crop_resize(pixels, boxes, 24)
    flipped = data.crop_resize(pixels, boxes, 24, flip=torch.tensor([True, False]))
    assert torch.equal(plain[0].flip(-1), flipped[0])
    assert torch.equal(plain[1], flipped[1])


def test_random_boxes_lie_inside():
    """Random boxes lie anywhere inside the image; area and aspect ratio span their ranges."""
    boxes = data.random_boxes(1000, 32, 48, 0.08, data.generator("boxes"))
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height <= 32.001).all()
    assert (left + width <= 48.001).all()
    area = height * width / (32 * 48)
    assert 0.05 < area.min() < 0.15
    assert area.max() > 0.8
    uncut = (height < 32) & (width < 48)
    aspect = (width / height)[uncut]
    assert 0.75 - 1e-4 <= aspect.min() < 0.8
    assert 1.25 < aspect.max() <= 4 / 3 + 1e-4
    places = torch.stack([top / (32 - height), left / (48 - width)])[:, uncut]  # 0 to 1
    assert places.min() < 0.05
    assert places.max() > 0.95
    assert ((places.mean(dim=1) - 0.5).abs() < 0.05).all()
    assert torch.corrcoef(places)[0, 1].abs() < 0.1


@pytest.mark.parametrize(
    ("height", "width", "share", "top", "left", "side"),
    [
        (32, 32, 1.0, 0, 0, 32),
        (183, 183, 7 / 8, 11, 11, 160),
        (256, 256, 7 / 8, 16, 16, 224),
        (14, 9, 1.0, 2, 0, 9),
    ],
)
def test_the_centre_is_cut_at_whole_pixels(height, width, share, top, left, side):
    """The central square begins and ends at whole pixels; it is resized if its size isn't the
    network's."""
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    norm = ((0.5,) * 3, (0.25,) * 3)
    square = pixels[..., top : top + side, left : left + side]
    found = data.Batches(side, norm, 2, CPU).central(pixels, share)
    assert torch.equal(found, (square / 255 - 0.5) / 0.25)
    box = torch.tensor([[top, left, side, side]]).expand(2, 4)
    for size in (side, side // 2):
        resized = (data.crop_resize(pixels, box, size) - 0.5) / 0.25
        found = data.Batches(size, norm, 2, CPU).central(pixels, share)
        assert torch.allclose(found, resized, atol=1e-6)


# ------------------------------------------------------------------------------ digits and splits


def split_digits(**options):
    return data.split(data.read("digits"), **options)


def sizes(dataset):
    return [len(part) for part in (dataset.train, dataset.val, dataset.test)]


def as_rows(pixels):
    """Images as sorted tuples of their bytes, to compare sets of images."""
    return sorted(bytes(image) for image in pixels.flatten(1).numpy())


def test_digits():
    """The digits are 1,797 images of 8 x 8 with grey values from 0 to 255. In training they are
    never mirrored, and crops keep at least 85 % of an image."""
    digits = data.read("digits")
    assert (digits.flip, digits.min_scale) == (False, 0.85)
    pixels = digits.train.pixels
    assert pixels.shape == (1797, 3, 8, 8)
    assert pixels.min() == 0
    assert pixels.max() == 255


def test_digits_are_those_of_scikit_learn():
    """The embedded digits equal scikit-learn's."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels = data.read("digits").train.pixels
    dots = pixels[:, 0].float().mul(16 / 255).round()
    assert np.array_equal(dots.numpy(), datasets.load_digits().images)


def test_split_is_stratified_disjoint_and_seeded():
    """Parts are stratified by class and disjoint; the seed determines the validation set."""
    first = split_digits(seed=0)
    second = split_digits(seed=1)
    assert sizes(first) == [1294, 144, 359]
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert not torch.equal(first.val.pixels, second.val.pixels)
    assert torch.equal(first.val.pixels, split_digits(seed=0).val.pixels)

    whole = data.read("digits").train
    for part in (first.val, first.test):
        expected = torch.bincount(whole.labels) * len(part) / len(whole)
        assert (torch.bincount(part.labels) - expected).abs().max() <= 1
    together = torch.cat([first.train.pixels, first.val.pixels, first.test.pixels])
    assert as_rows(together) == as_rows(whole.pixels)


def test_limit_keeps_proportions():
    """A limit reduces training and validation, not the test set, and keeps every class."""
    some = split_digits(seed=0, limit=100)
    assert sizes(some) == [100, 25, 359]
    assert some.whole == (1294, 144)
    assert torch.bincount(some.train.labels).min() >= 9


def test_a_share_for_test_is_drawn_by_the_seed():
    """With a test share, the test set has that size and depends on the seed."""
    first = split_digits(seed=0, test_share=0.5)
    second = split_digits(seed=1, test_share=0.5)
    assert len(first.test) == 898
    assert not torch.equal(first.test.pixels, second.test.pixels)
    assert torch.equal(first.test.pixels, split_digits(seed=0, test_share=0.5).test.pixels)


def test_shots_are_drawn_by_class_and_seed():
    """`shots` draws that many images of each class for training, and at most four for validation.
    They depend on the seed and are all different."""
    first = split_digits(seed=0, shots=3)
    again = split_digits(seed=0, shots=3)
    other = split_digits(seed=1, shots=3)
    for part in (first.train, first.val):
        assert torch.bincount(part.labels).tolist() == [3] * 10
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)
    assert torch.equal(first.test.pixels, other.test.pixels)
    chosen = {image.numpy().tobytes() for image in (*first.train.pixels, *first.val.pixels)}
    assert len(chosen) == 60

    more = split_digits(shots=9)
    assert torch.bincount(more.val.labels).tolist() == [4] * 10
    with pytest.raises(ValueError, match="--shots 500: '8' of digits has only 139 images"):
        split_digits(shots=500)


def test_batches_depend_on_seed_epoch_and_step_alone():
    """A pass that starts at a later step gives the same batches; another epoch or seed doesn't."""
    digits = split_digits()
    batches = data.Batches(32, ((0.5,) * 3, (0.5,) * 3), 64, CPU)
    whole = list(batches.train(digits, seed=0, epoch=1))
    assert len(whole) == batches.count(digits.train) == 21
    assert whole[-1][0].shape == (1294 - 20 * 64, 3, 32, 32)

    rest = list(batches.train(digits, seed=0, epoch=1, first=5))
    for (images, labels), (same_images, same_labels) in zip(whole[5:], rest, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    for seed, epoch in ((0, 2), (1, 1)):
        images, labels = next(batches.train(digits, seed, epoch))
        assert not torch.equal(images, whole[0][0])
        assert not torch.equal(labels, whole[0][1])  # in another order, too

    labels = torch.cat([labels for _, labels in whole])
    assert sorted(labels.tolist()) == sorted(digits.train.labels.tolist())
    images = torch.cat([images for images, _ in whole])
    assert images.abs().max() <= 1.001


def test_evaluation_sees_the_normalised_centre():
    """Evaluation takes all images in order, crops the centre and normalises by mean and std."""
    pixels = torch.randint(0, 256, (5, 3, 16, 20), dtype=torch.uint8)
    mean = (0.1, 0.2, 0.3)
    std = (0.5, 1.0, 2.0)
    batches = data.Batches(8, (mean, std), 2, CPU)
    images, labels = zip(*batches.eval(data.Images(pixels, torch.arange(5)), 0.5), strict=True)
    middle = pixels[:, :, 4:12, 6:14] / 255
    expected = (middle - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(torch.cat(images), expected, atol=1e-5)
    assert torch.cat(labels).tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------ folders of photos


def test_folder(photos):
    """Class folders give labels and names; a folder without parts is split in three."""
    pool = data.read(str(photos), image_size=28)
    assert pool.classes == ["apple", "leaf", "sky"]
    assert pool.train.pixels.shape == (60, 3, 32, 32)
    assert pool.train.names[0] == "apple/00.png"
    brightest = pool.train.pixels.float().mean(dim=(2, 3)).argmax(dim=1)
    assert torch.equal(brightest, pool.train.labels)
    parts = data.split(pool)
    assert sizes(parts) == [43, 5, 12]
    names = parts.train.names + parts.val.names + parts.test.names
    assert sorted(names) == sorted(pool.train.names)


def test_one_photo_is_read_as_its_folder_is(photos):
    """read_photo gives the same pixels as a data set that contains the file."""
    images = data.read(str(photos), image_size=28).train
    pixels = data.read_photo(photos / images.names[7], data.Square(32))
    assert torch.equal(pixels, images.pixels[7])


def test_squash(tmp_path, capsys):
    """With `squash`, all of a photo is resized to the network's size, apart from what is cached
    without it. Images that are no photos are refused."""
    image = pytest.importorskip("PIL.Image")
    for i, name in enumerate(("apple", "leaf")):
        pixels = np.zeros((20, 60, 3), np.uint8)
        pixels[:, 40 * i : 40 * i + 20] = 255  # a third of the width: left or right
        (tmp_path / "wide" / name).mkdir(parents=True)
        for k in range(4):
            image.fromarray(pixels).save(tmp_path / "wide" / name / f"{k}.png")
    middle = data.read(str(tmp_path / "wide"), image_size=28)
    whole = data.read(str(tmp_path / "wide"), image_size=28, squash=True)
    assert (middle.center, middle.squash, middle.train.shape[-1]) == (0.875, False, 32)
    assert (whole.center, whole.squash, whole.train.shape[-1]) == (1.0, True, 28)
    assert (middle.train.pixels[..., 3:-3] < 5).all()  # the middle is black
    left, right = whole.train.pixels[[0, 4], 0, 14]
    assert (left[:8] > 200).all() and (left[12:] < 50).all()
    assert (right[-8:] > 200).all() and (right[:-12] < 50).all()
    assert whole.train.checksum() != middle.train.checksum()
    same_size = data.read(str(tmp_path / "wide"), image_size=32, squash=True)
    assert same_size.train.shape == middle.train.shape
    assert same_size.train.checksum() != middle.train.checksum()
    capsys.readouterr()
    data.read(str(tmp_path / "wide"), image_size=28)  # its photos are still there
    assert capsys.readouterr().out == ""
    photo = tmp_path / "wide/leaf/0.png"
    pixels = data.read_photo(photo, data.Square(28, squash=True))
    assert torch.equal(pixels, whole.train.pixels[4])
    with pytest.raises(ValueError, match="of digits are squares already; --squash is for photos"):
        data.read("digits", squash=True)


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    """The EXIF orientation is applied before the centre is cut."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # the upper half is white
    photo = image.fromarray(pixels)
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo.save(tmp_path / "turned.png", exif=exif)
    read = data.read_photo(tmp_path / "turned.png", data.Square(16))
    assert (read[:, :, 8:] == 255).all()
    assert (read[:, :, :8] == 0).all()


TURNS = {  # EXIF orientation: how the upright pixels [H, W] were turned before they were stored
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: np.swapaxes(upright, 0, 1),
    6: np.rot90,
    7: lambda upright: np.rot90(np.swapaxes(upright, 0, 1), 2),
    8: lambda upright: np.rot90(upright, 3),
}


def turned_photo(orientation):
    """A photo stored turned, its EXIF data, and its upright pixels [16, 16, 3]."""
    image = pytest.importorskip("PIL.Image")
    upright = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = image.Exif()
    exif[0x0112] = orientation
    return image.fromarray(np.ascontiguousarray(TURNS[orientation](upright))), exif, upright


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_beside_an_odd_tag(orientation, tmp_path):
    """All eight orientations are applied, even if Pillow can't write another of the EXIF tags."""
    photo, exif, upright = turned_photo(orientation)
    raw = bytearray(exif.tobytes())
    # A second entry: XResolution (0x011A) as text, which Pillow reads, but refuses to write.
    header = raw[:6] if raw.startswith(b"Exif") else b""
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00" + bytes([orientation]) + b"\x00\x00"
    odd = b"\x01\x1a\x00\x02\x00\x00\x00\x03ab\x00\x00"
    raw = header + b"MM\x00\x2a\x00\x00\x00\x08\x00\x02" + entry + odd + b"\x00" * 4
    photo.save(tmp_path / "a.png", exif=bytes(raw))
    read = data.read_photo(tmp_path / "a.png", data.Square(16))
    assert np.array_equal(read.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("orientation", TURNS)
def test_a_tiff_is_turned_once(orientation, tmp_path):
    """A TIFF, which Pillow turns while decoding it, isn't turned twice."""
    photo, exif, upright = turned_photo(orientation)
    photo.save(tmp_path / "a.tif", exif=exif)
    read = data.read_photo(tmp_path / "a.tif", data.Square(16))
    assert np.array_equal(read.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("orientation", TURNS)
def test_photos_of_a_phone(orientation, tmp_path):
    """With pillow-heif, HEIC photos are read upright, whatever the files are called."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("pillow_heif").register_heif_opener()
    upright = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    photo = image.fromarray(np.ascontiguousarray(TURNS[orientation](upright)))
    exif = image.Exif()
    exif[0x0112] = orientation
    options = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}  # without loss
    photo.save(tmp_path / "a.heic", exif=exif.tobytes(), **options)
    (tmp_path / "a.heic").rename(tmp_path / "a.jpg")
    shutil.copy(tmp_path / "a.jpg", tmp_path / "b")
    assert data.find_photos([str(tmp_path)])[0] == [tmp_path / "a.jpg", tmp_path / "b"]
    for name in ("a.jpg", "b"):
        read = data.read_photo(tmp_path / name, data.Square(16))
        assert np.array_equal(read.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("name", ("a.heic", "a.jpg"))
def test_photos_of_a_phone_without_pillow_heif(name, tmp_path, monkeypatch):
    """Without pillow-heif, the error for a HEIC photo says what to install."""
    pytest.importorskip("PIL")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(data, "add_heif", data.add_heif.__wrapped__)  # without its cache
    (tmp_path / name).write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1")
    message = f"^can't read {tmp_path / name} as an image without pillow-heif: pip install pillow-"
    with pytest.raises(ValueError, match=message):
        data.read_photo(tmp_path / name, data.Square(16))


@pytest.mark.parametrize("brand", ("heic", "heim", "hevc", "mif1", "msf1"))
def test_photos_of_a_phone_without_a_suffix(brand, tmp_path):
    """A HEIC photo of any readable brand is recognised without a suffix."""
    (tmp_path / "a").write_bytes(b"\0\0\0\x24ftyp" + brand.encode())
    assert data.is_photo(tmp_path / "a")
    assert data.is_heif(tmp_path / "a")


def test_a_link_in_a_circle_without_pillow_heif(tmp_path, monkeypatch):
    """A .heic file that can't be opened is reported as unreadable, not as needing pillow-heif."""
    pytest.importorskip("PIL")
    monkeypatch.setattr(data, "add_heif", lambda: False)
    (tmp_path / "a.heic").symlink_to("a.heic")
    with pytest.raises(ValueError, match="can't read .*a.heic as an image .*symbolic links"):
        data.read_photo(tmp_path / "a.heic", data.Square(16))


def test_pillow_heif_that_cannot_be_imported(photos, tmp_path, monkeypatch):
    """A pillow-heif that can't be imported counts as missing, also in threads that decode."""
    (tmp_path / "pillow_heif.py").write_text("import time; time.sleep(0.5); raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    data.add_heif.cache_clear()
    try:
        assert len(data.read(str(photos), image_size=28).train) == 60
        assert not data.add_heif()
    finally:
        data.add_heif.cache_clear()


def test_a_photo_of_a_phone_that_is_cut_short(tmp_path):
    """The error for a truncated HEIC photo is one line, though pillow-heif's has two."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("pillow_heif").register_heif_opener()
    image.new("RGB", (64, 64), "red").save(tmp_path / "a.heic")
    whole = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "a.heic").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"^can't read [^\n]+; repair or remove it$"):
        data.read_photo(tmp_path / "a.heic", data.Square(16))


def grey_twins(image, pixels):
    """Yield other forms of a grey photo [H, W] of 8 bits, with their names."""
    plain = image.fromarray(pixels)
    yield "palette", plain.convert("P")
    yield "16 bits", image.fromarray(pixels.astype(np.uint16) * 257)
    yield "RGB", plain.convert("RGB")
    yield "LA", plain.convert("LA")
    yield "RGBA", plain.convert("RGBA")


def test_forms_of_a_grey_photo(tmp_path):
    """16-bit photos are scaled to 8 bits; a palette or an opaque alpha channel changes nothing."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    for name, twin in grey_twins(image, pixels):
        twin.save(tmp_path / f"{name}.png")
        read = data.read_photo(tmp_path / f"{name}.png", data.Square(16))
        for channel in read:
            assert np.array_equal(channel.numpy(), pixels), name


def test_what_is_transparent_is_white(tmp_path):
    """A black icon whose shape is only in its alpha channel is read as black on white."""
    image = pytest.importorskip("PIL.Image")
    alpha = np.zeros((16, 16), dtype=np.uint8)
    alpha[4:12, 4:12] = 255
    icon = image.new("RGB", (16, 16), "black")
    icon.putalpha(image.fromarray(alpha))
    icon.save(tmp_path / "RGBA.png")
    icon.convert("LA").save(tmp_path / "LA.png")
    palette = image.fromarray((alpha == 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "P.png", transparency=1)  # its second colour is transparent
    key = image.fromarray(np.where(alpha == 0, 77, 0).astype(np.uint8))
    key.save(tmp_path / "L.png", transparency=77)
    deep = image.fromarray(np.where(alpha == 0, 4000, 0).astype(np.uint16))
    deep.save(tmp_path / "16 bits.png", transparency=4000)
    icon.save(tmp_path / "RGBA.webp", lossless=True)
    for path in tmp_path.iterdir():
        read = data.read_photo(path, data.Square(16))
        for channel in read:
            assert np.array_equal(channel.numpy(), 255 - alpha), path.name


def test_runs_beside_classes(photos, monkeypatch):
    """Training in the folder of photos makes runs/ there, which is no class; a class may have that
    name, too."""
    monkeypatch.chdir(photos)
    (photos / "runs/a").mkdir(parents=True)
    assert data.read(".").classes == ["apple", "leaf", "sky"]
    monkeypatch.chdir(photos.parent)
    (photos / "runs/a/split.json").touch()
    assert data.read(str(photos)).classes == ["apple", "leaf", "sky"]
    monkeypatch.chdir(photos)
    shutil.rmtree(photos / "runs")
    shutil.copytree(photos / "sky", photos / "runs")
    assert data.read(".").classes == ["apple", "leaf", "runs", "sky"]


def test_photos_that_would_mislead_are_refused(tmp_path, monkeypatch):
    """12 bits in 16-bit files would be almost black, and of a stack only the first page is read.
    A TIFF whose second page is a thumbnail is read. label.py does the same."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(data.ASSETS / "device")
    import label

    values = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    image.fromarray(values * 4).save(tmp_path / "12 bits.png")
    image.fromarray(values * 4).save(tmp_path / "12 bits.tiff")
    image.fromarray(values * 64).save(tmp_path / "16 bits.tiff")
    image.fromarray(values * 0).save(tmp_path / "black.png")
    page = image.fromarray((values // 4).astype(np.uint8))
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page])
    page.save(tmp_path / "thumbnail.tif", save_all=True, append_images=[page.resize((8, 8))])
    page.encoderinfo = {"tiffinfo": {254: 4}}
    page.save(tmp_path / "mask.tif", save_all=True, append_images=[page])
    content = bytearray((tmp_path / "stack.tif").read_bytes())
    first = int.from_bytes(content[4:8], "little")  # where the first page's tags begin
    after = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    content[after : after + 4] = b"\xff" * 4  # where the next page's tags would be
    (tmp_path / "damaged.tif").write_bytes(content)
    opened = image.open(tmp_path / "thumbnail.tif")
    opened.paste(9, (0, 0, 32, 32))  # a caller's image isn't read again
    assert (data.read_photo(opened, data.Square(16)) == 9).all()
    for read in (data.open_photo, label.open_photo):
        for name in ("12 bits.png", "12 bits.tiff"):
            with pytest.raises(ValueError, match="almost black; scale its values to 65535"):
                read(tmp_path / name, 16)
        with pytest.raises(ValueError, match="a TIFF of several pages, of which only one can be"):
            read(tmp_path / "stack.tif", 16)
        for name in ("16 bits.tiff", "black.png", "thumbnail.tif", "mask.tif", "damaged.tif"):
            assert np.asarray(read(tmp_path / name, 16)).shape[-1] in (3, 16)


def test_photos_without_pillow(tmp_path, monkeypatch):
    """Without Pillow, the error says what to install."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"never opened")
    message = "^photos need Pillow to be decoded: pip install pillow$"
    with pytest.raises(ValueError, match=message):
        data.read(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        data.read_photo(tmp_path / "a" / "0.png", data.Square(32))


def test_folder_with_published_parts(photos):
    """A test folder beside train is used as it is; validation images are taken from train."""
    for name in ("apple", "leaf", "sky"):
        (photos / "train").mkdir(exist_ok=True)
        (photos / "test" / name).mkdir(parents=True)
        for path in sorted((photos / name).iterdir())[:5]:
            path.rename(photos / "test" / name / path.name)
        (photos / name).rename(photos / "train" / name)
    parts = data.split(data.read(str(photos), image_size=28))
    assert sizes(parts) == [41, 4, 15]
    assert all(name.startswith("test/") for name in parts.test.names)


def test_damaged_photo_is_named(photos):
    """The error names a photo that can't be decoded."""
    path = photos / "leaf" / "07.png"
    path.write_bytes(path.read_bytes()[:200])
    message = r"can't read .*leaf/07.png as an image .*; repair or remove it"
    with pytest.raises(ValueError, match=message):
        data.read(str(photos))


def test_every_photo_is_found(photos):
    """Photos of any format, in sub-folders or without suffix, are found; other files are listed."""
    image = pytest.importorskip("PIL.Image")
    photo = image.new("RGB", (20, 20), "red")
    found = ["a.tif", "b.GIF", "c.jfif", "d.ppm", "deep/er/e.png", "f.jpe", "g.TIFF"]
    for name in found:
        path = photos / "apple" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, format={"c.jfif": "JPEG", "f.jpe": "JPEG"}.get(name))
    for name in ("h.tga", "i.pcx", "j.dds", "k.ico", "l.sgi", "m.j2k", "n.pnm", "p.dib"):
        photo.save(photos / "apple" / name)
        found.append(name)
    kinds = {"no suffix": "JPEG", "nor here": "PNG", "deep/webp": "WEBP", "nor": "TIFF"}
    for name, kind in kinds.items():
        photo.save(photos / "apple" / name, format=kind)
        found.append(name)
    skipped = ["notes.txt", "README", "deep/labels.csv"]
    for name in skipped:
        (photos / "apple" / name).write_text("no photo")
    (photos / "apple" / ".hidden.png").write_bytes(b"no photo")
    (photos / "apple" / ".cache").mkdir()
    (photos / "apple" / ".cache" / "a.png").write_bytes(b"no photo")
    (photos / ".cache").mkdir()
    dataset = data.read(str(photos), image_size=14)
    names = {name.removeprefix("apple/") for name in dataset.train.names if "apple/" in name}
    assert names == set(found) | {f"{i:02}.png" for i in range(20)}
    assert set(dataset.skipped) == {str(photos / "apple" / name) for name in skipped}


def test_what_is_left_out_is_named(photos):
    """Photos beside train/ and a link to a folder inside a class are listed as skipped."""
    root = photos.parent / "parts"
    shutil.copytree(photos, root / "train")
    shutil.copytree(photos / "sky", root / "more" / ".cache")
    shutil.copy(photos / "sky/00.png", root / "more")
    shutil.copy(photos / "sky/00.png", root / "loose.png")
    (root / "train/leaf/link").symlink_to(photos / "leaf")
    dataset = data.read(str(root), image_size=14)
    assert len(dataset.train) == 60
    left_out = {root / "loose.png", root / "more/00.png", root / "train/leaf/link"}
    assert set(dataset.skipped) == set(map(str, left_out))


def test_a_folder_that_can_not_be_read(photos, monkeypatch):
    """A class's sub-folder that can't be read is an error; its photos aren't silently left out."""
    hidden = photos / "leaf" / "more"
    hidden.mkdir()
    (photos / "leaf/00.png").rename(hidden / "00.png")
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(hidden):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied: .*leaf/more"):
        data.read(str(photos), image_size=14)


def test_a_folder_beside_train_that_can_not_be_read(photos, monkeypatch):
    """A folder beside train/ that can't be read, such as a disk's lost+found, is ignored."""
    root = photos.parent / "parts"
    shutil.copytree(photos, root / "train")
    (root / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(root / "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(data.read(str(root), image_size=14).train) == 60


def test_copies_in_the_test_set(photos):
    """Identical files are found, each with the first one; files whose checksums collide are not."""
    root = photos.parent / "parts"
    for part in ("train", "val", "test"):
        shutil.copytree(photos, root / part)
    for path in sorted(root.glob("test/*/*.png"))[1:]:
        path.write_bytes(path.read_bytes() + b"x")
    found = data.read(str(root), image_size=14)
    copies = data.find_copies(found)
    assert all(first.startswith("train/") for _, first in copies)
    assert [name for name, _ in copies if name.startswith("test/")] == ["test/apple/00.png"]
    assert len(copies) == 61  # 60 in val
    collided = replace(found, sums=dict.fromkeys(found.sums, "00000001"))
    assert data.find_copies(replace(collided, train=collided.train[:1], val=None)) == [
        ("test/apple/00.png", "train/apple/00.png")
    ]


def test_a_photo_that_would_start_another_program(tmp_path):
    """PostScript named .png isn't passed to Ghostscript, as no accepted format begins like it."""
    pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match="can't read .*a.png as an image .*its format is unknown"):
        data.read_photo(path, data.Square(8))


@pytest.mark.parametrize(
    ("named", "part"),
    [("valid", "val"), ("Validation", "val"), ("VAL", "val"), ("dev", "val"), ("Testing", "test")],
)
def test_names_of_the_parts(photos, named, part):
    """Other common names for the folders of training, validation and test images are accepted."""
    root = photos.parent / "parts"
    shutil.copytree(photos, root / ("Train" if part == "val" else "training"))
    shutil.copytree(photos, root / named)
    dataset = data.read(str(root), image_size=14)
    assert len(getattr(dataset, part)) == len(dataset.train) == 60


def test_a_class_of_trains(photos):
    """A folder train/ that holds photos, not folders, is a class like those beside it."""
    (photos / "sky").rename(photos / "train")
    assert data.read(str(photos), image_size=14).classes == ["apple", "leaf", "train"]


def test_two_folders_of_one_part(photos):
    """valid/ beside val/ is refused, since either could be the validation set."""
    root = photos.parent / "parts"
    for name in ("train", "val", "valid"):
        shutil.copytree(photos, root / name)
    with pytest.raises(ValueError, match="val and .*valid both hold val"):
        data.read(str(root))


def test_data_one_level_down(photos):
    """A folder that only contains the data set's folder is refused; the error names that folder."""
    root = photos.parent / "around"
    root.mkdir()
    shutil.copytree(photos, root / "Data")
    with pytest.raises(ValueError, match="are needed, .*around has 1; do you mean .*around/Data"):
        data.read(str(root))
    (root / "__MACOSX").mkdir()
    with pytest.raises(ValueError, match="no images in .*__MACOSX; do you mean .*around/Data"):
        data.read(str(root))


def test_images_of_ones_own():
    """Images accepts a list of labels, and refuses pixels that aren't uint8 [N, 3, H, W]: floats
    from 0 to 1 would be black. Indices, slices and masks select images with their names."""
    pixels = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4)
    images = data.Images(pixels, [2, 1, 0], ["a", "b", "c"])
    assert images.labels.dtype == torch.int64
    for index in (torch.tensor([0, 2]), [0, 2], slice(None, None, 2), images.labels != 1):
        some = images[index]
        assert (some.names, some.labels.tolist()) == (["a", "c"], [2, 0])
        assert some.pixels[:, 0, 0, 0].tolist() == [0, 2]
    grey = data.Images(pixels[:, :1], [2, 1, 0])
    assert torch.equal(grey.pixels, pixels)
    assert grey.table.stride(1) == 0  # it takes no more memory
    last = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # of arrays [N, H, W, 3]
    assert data.Images(last, [2, 1, 0]).checksum() == images.checksum()
    assert data.Images(pixels, [2, 1, 0], range(3)).names == ["0", "1", "2"]
    for wrong in (pixels / 255, pixels.permute(0, 2, 3, 1), pixels[0], pixels.numpy()):
        with pytest.raises(ValueError, match=r"pixels .*: give torch.uint8 \[N, 3, H, W\]"):
            data.Images(wrong, [2, 1, 0])
    for labels in ([2, 1], torch.eye(3)):
        with pytest.raises(ValueError, match=r"labels \[.*\] of 3 images: give one each"):
            data.Images(pixels, labels)
    with pytest.raises(ValueError, match="2 names of 3 images: give one each"):
        data.Images(pixels, [0, 0, 0], ["a", "b"])
    named = data.Images(pixels, [0, 1, 1], np.array(["a", "b", "c"]))
    plain = data.Images(pixels[:1], [0])
    data.split(data.Dataset("mine", ["a", "b"], named, None, plain))  # test has no names
    for wrong in (-1, 2):
        images = data.Images(pixels, [0, 1, wrong])
        with pytest.raises(ValueError, match=f"mine has label {wrong}; labels of its 2 classes"):
            data.split(data.Dataset("mine", ["a", "b"], images, None, None))


def test_a_reader_of_ones_own(monkeypatch):
    """A set of one's own is read by a row in DATASETS. Without a name for each image it is refused:
    a run's split.json couldn't tell them apart. So is one with a label of no class. Train and test
    may have tables of their own."""
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    def read_with(names, test=None, labels=(0, 1, 0, 1)):
        def read_mine(name, data_dir, offline, square):
            train = data.Images(pixels, list(labels), names)
            return data.Dataset(name, ["a", "b"], train, None, test)

        monkeypatch.setitem(data.DATASETS, "mine", read_mine)
        return data.read("mine")

    names = ["0", "1", "2", "3"]
    assert read_with(names).train.names == names
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=f"mine has label {wrong}; labels of its 2 classes"):
            read_with(names, labels=(0, 1, 0, wrong))
    with pytest.raises(ValueError, match="the train images of mine have no names; give each one"):
        read_with([])
    with pytest.raises(ValueError, match="the test images of mine have no names; .* as test/0"):
        read_with(names, test=data.Images(pixels[:1], [0]))
    with pytest.raises(ValueError, match="3 images of mine have the name 1; give each its own"):
        read_with(["1", "0", "1", "1"])
    with pytest.raises(ValueError, match="2 images of mine have the name 2"):
        read_with(names, test=data.Images(pixels[:1], [0], ["2"]))

    others = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    test = data.Images(others, [1, 1, 0], ["x", "y", "z"])
    dataset = read_with(names, test=test[torch.tensor([2, 0])])
    assert dataset.test.pixels[:, 0, 0, 0].tolist() == [2, 0]
    everything = dataset.everything
    assert everything.pixels[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 2, 0]
    assert everything.names == [*names, "z", "x"]
    assert everything.labels.tolist() == [0, 1, 0, 1, 0, 1]
    grey = data.Images(others[:, :1], [1, 1, 0], ["x", "y", "z"])
    assert torch.equal(read_with(names, test=grey).test.pixels, others)
    assert len(read_with(names, test=grey[:0]).test) == 0  # nothing to name
    with monkeypatch.context() as patch:
        patch.setitem(
            data.DATASETS, "mine", lambda name, *_: data.Dataset(name, "ab", grey[:0], None, None)
        )
        with pytest.raises(ValueError, match="mine has no images"):
            data.read("mine")
    small = data.Images(others[:, :, :4, :4], [1, 1, 0], ["x", "y", "z"])
    with pytest.raises(ValueError, match="the parts of mine can't be put into one table"):
        read_with(names, test=small)
    pixels = pixels[:, :1]
    table = read_with(names, test=grey).test.table
    assert table.shape[1] == 3
    assert table.stride(1) == 0  # grey still takes no more memory


def test_parts_of_ones_own(monkeypatch):
    """A table that parts share, of grey pixels too, is kept once. Names of classes may be numbers.
    Fewer than two classes, and no training images, are refused."""
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 8, 8)
    pixels = pixels.contiguous()  # grey
    other = pixels[:2] + 6

    def read_with(classes, train, val, test):
        mine = data.Dataset("mine", classes, train, val, test)
        monkeypatch.setitem(data.DATASETS, "mine", lambda *_: mine)
        return data.read("mine")

    train = data.Images(pixels, [0, 1, 0], "abc", rows=torch.tensor([5, 0, 1]))
    val = data.Images(pixels, [0, 1], "de", rows=torch.tensor([2, 3]))
    test = data.Images(other, [1, 0], "fg")
    dataset = read_with(range(2), train, val, test)
    assert dataset.classes == ["0", "1"]
    assert len(dataset.everything.table) == 8
    assert dataset.everything.pixels[:, 0, 0, 0].tolist() == [5, 0, 1, 2, 3, 6, 7]
    dataset = read_with("xy", train, None, test)
    assert dataset.everything.pixels[:, 0, 0, 0].tolist() == [5, 0, 1, 6, 7]
    odd = data.Images(pixels[1::2], [0, 1, 0], "abc")  # views that begin at the same image
    dataset = read_with("xy", odd, None, data.Images(pixels[1:4], [0, 1, 0], "def"))
    assert dataset.everything.pixels[:, 0, 0, 0].tolist() == [1, 3, 5, 1, 2, 3]
    with pytest.raises(ValueError, match=r"mine has classes \['x'\]: give two or more"):
        read_with("x", train, None, test)
    with pytest.raises(ValueError, match="mine has no training images"):
        read_with("xy", None, val, test)


def test_a_class_without_training_images_is_named():
    """Classes that the split or a limit leaves without training images are named in an error; a
    limit that leaves each class an image is accepted."""
    images = data.Images(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(10))
    single = data.Dataset("mine", [f"c{i}" for i in range(10)], images, None, None)
    split = data.split(single)
    gone = sorted({f"c{i}" for i in range(10)} - {f"c{i}" for i in split.train.labels.tolist()})
    message = f"no training image is left of {', '.join(gone)} in mine \\(3 of 10 classes\\)"
    with pytest.raises(ValueError, match=message):
        data.check_split(split)
    digits = data.read("digits")
    with pytest.raises(ValueError, match="no training image is left of .* give at least one"):
        data.check_split(data.split(digits, limit=9))
    data.check_split(data.split(digits, limit=10))


def test_the_first_few_names():
    """A long list of names is cut short and says how many are left out."""
    names = list("abcdefg")
    assert data.first_few(names) == "a, b, c, d, e and 2 more"
    assert data.first_few(names, 7) == "a, b, c, d, e, f, g"


def test_empty_class_is_named(photos):
    """The error names a class folder without photos."""
    (photos / "zebra").mkdir()
    with pytest.raises(ValueError, match="no images in .*zebra"):
        data.read(str(photos))


def test_two_folders_that_read_alike(photos):
    """Folder names that differ only in bytes that aren't UTF-8 are refused, so no photo is lost."""
    for name, other in (("leaf", b"caf\xe8"), ("sky", b"caf\xe9")):
        (photos / name).rename(photos / os.fsdecode(other))
    with pytest.raises(ValueError, match="two folders that read caf\ufffd; rename one"):
        data.read(str(photos))


def test_classes_must_be_the_same(photos):
    """The error names a class that train has and test lacks, or the other way round."""
    root = photos.parent / "parts"
    root.mkdir()
    photos.rename(root / "train")
    for name in ("apple", "leaf"):
        shutil.copytree(root / "train" / name, root / "test" / name)
    with pytest.raises(ValueError, match="classes of .*train: it lacks sky; give both"):
        data.read(str(root))
    (root / "train" / "sky").rename(root / "test" / "sky")
    with pytest.raises(ValueError, match="classes of .*train: it has sky beside them; give"):
        data.read(str(root))
    with pytest.raises(ValueError, match="sky has 0; give the folder that holds a folder"):
        data.read(str(root / "test" / "sky"))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("data", "at least 2 class folders are needed, .*data has 0; give the folder that holds"),
        ("data/test/a", "has test but no train folder"),
    ],
)
def test_folders_that_arent_data_sets(tmp_path, folder, message):
    """A folder without classes, or with a test part only, is refused."""
    pytest.importorskip("PIL.Image")
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        data.read(str(tmp_path / "data"))


def test_unknown_data_set():
    """An unknown data set is refused; the error lists the choices."""
    message = (
        "no data set or folder 'cifar99': choose digits, cifar10, .*, imagenet_r or give a folder"
    )
    with pytest.raises(ValueError, match=message):
        data.read("cifar99")


# ------------------------------------------------------------------------------------------ CIFAR


def test_cifar10_folder(tmp_path, monkeypatch):
    """CIFAR-10 is read by its published file names and keys."""
    write_cifar10(tmp_path, monkeypatch)
    images = data.read("cifar10", str(tmp_path), offline=True)
    assert images.train.pixels[:, 0, 0, 0].tolist() == sorted([*range(5)] * 10)
    assert images.test.pixels.unique().tolist() == [5]
    assert images.test.labels.tolist() == list(range(10))
    assert images.classes[:2] == ["class 0", "class 1"]


DAMAGES = {
    "damaged": lambda file: file.write_bytes(file.read_bytes()[:-9] + b"?" * 9),
    "truncated": lambda file: os.truncate(file, 100),
    "missing": lambda file: file.unlink(),
    "foreign": lambda file: file.write_bytes(pickle.dumps(Evil())),
    "another's": lambda file: shutil.copy(file.with_name("data_batch_1"), file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_published_pickles_are_read(tmp_path, monkeypatch, damage):
    """Any other file under a published name is refused before it is unpickled; the error says what
    to do."""
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path, monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    DAMAGES[damage](folder / "test_batch")
    message = f"test_batch is missing, or is not the published file .*; delete {folder} to extract"
    with pytest.raises(ValueError, match=message):
        data.read("cifar10", str(tmp_path))
    assert not (tmp_path / "evil").exists()


def test_no_code_in_a_pickle_is_run(tmp_path, monkeypatch):
    """Unpickling runs no code, even if the file's MD5 is in the table."""
    monkeypatch.chdir(tmp_path)
    publish_pickle(tmp_path / "test", {b"data": Evil()}, monkeypatch)
    with pytest.raises(pickle.UnpicklingError, match="it asks for builtins.eval"):
        data.unpickle(tmp_path / "test")
    assert not (tmp_path / "evil").exists()


# ----------------------------------------------------------------------------------- the progress


def test_progress(monkeypatch, capsys):
    """On a terminal, a line shows the progress and the time left."""
    monkeypatch.setattr(data.time, "perf_counter", lambda: 110.0)
    data.progress("fetching", 1, 4, started=100.0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    data.progress("fetching", 1, 4, started=100.0)
    assert capsys.readouterr().err == "fetching 1 of 4, 0:30 left"
    data.progress("fetching", 3, 4, started=100.0, first=1)
    assert capsys.readouterr().err == f"\r{26 * ' '}\rfetching 3 of 4, 0:05 left"
    data.progress("fetching", 4, 4, started=100.0)
    assert capsys.readouterr().err == f"\r{26 * ' '}\r"


def test_progress_in_a_log(monkeypatch, capsys):
    """In a log, torchrun's first process prints a line a minute."""
    monkeypatch.setattr(data, "last_report", 0.0)
    shown = []
    for now in range(1000, 1240, 10):
        monkeypatch.setattr(data.time, "perf_counter", lambda now=now: float(now))
        data.progress("fetching", now - 1000, 400, started=1000.0)
        if capsys.readouterr().err:
            shown.append(now - 1000)
    assert shown == [70, 140, 210]
    monkeypatch.setattr(data, "last_report", 0.0)
    data.progress("fetching", 100, 400, started=1000.0)
    assert capsys.readouterr().err == "fetching 100 of 400, 11:30 left\n"
    monkeypatch.setattr(data, "last_report", 0.0)
    monkeypatch.setenv("RANK", "1")
    data.progress("fetching", 100, 400, started=1000.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "files, limit",
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_containers_cpu_limit(tmp_path, files, limit):
    """The limit of a control group of either version; infinite without one."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert data.quota(tmp_path) == limit


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has both")
def test_cpus_of_a_batch_job(monkeypatch):
    """Of the machine's CPUs, those count that were assigned to the process, within its limit."""
    monkeypatch.setattr(data.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda process: {3, 4, 7})
    for limit, expected in ((math.inf, 3), (2.5, 2), (0.5, 1), (8, 3)):
        monkeypatch.setattr(data, "cpu_limit", lambda limit=limit: limit)
        assert data.usable_cpus() == expected


@pytest.mark.parametrize(
    "lines, limits, expected",
    [
        ("0::/a/b\n", {"": "max 1", "a": "300 100", "a/b": "max 100"}, 3),
        ("0::/a/b\n", {"a": "300 100", "a/b": "50 100"}, 0.5),
        ("3:cpuset:/\n4:cpu,cpuacct:/docker/x\n0::/\n", {"cpu": "200 100"}, 2),
        ("3:cpuset:/a\n", {"cpu/a": "200 100"}, math.inf),
        ("0::/a\n", {"a": "50 0"}, math.inf),
        ("nonsense\n", {"": "50 100"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_cpu_limit_of_nested_groups(tmp_path, lines, limits, expected):
    """The lowest limit of this process's group and the groups around it, of either version."""
    (tmp_path / "groups").write_text(lines)
    for place, content in limits.items():
        folder = tmp_path / "mounted" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(content)
    assert data.cpu_limit(tmp_path / "groups", tmp_path / "mounted") == expected


def test_a_file_that_is_held_open_on_windows(tmp_path, monkeypatch):
    """There a file isn't replaced while another program has it open: it is tried for a while."""
    tries = []

    def held(part, path):
        tries.append(path)
        if len(tries) < 3:
            raise PermissionError

    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(data, "os", SimpleNamespace(name="nt", replace=held))
    data.move(tmp_path / "a.part", tmp_path / "a")
    assert len(tries) == 3
    monkeypatch.setattr(data, "os", SimpleNamespace(name="posix", replace=held))
    tries.clear()
    with pytest.raises(PermissionError):
        data.move(tmp_path / "a.part", tmp_path / "a")
    assert len(tries) == 1


def test_photos_that_the_disk_can_not_hold(photos, monkeypatch):
    """Photos that don't fit on the disk are refused; the error has their size and what to set."""
    usage = shutil.disk_usage(photos)._replace(free=10**6)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage)
    message = "60 photos of 256 x 256 pixels take 12 MB, .* 1 MB free.*set ADAPTERTUNE_CACHE to"
    with pytest.raises(ValueError, match=message):
        data.read(str(photos))
    paths = data.find_photos([photos])[0]
    with pytest.raises(ValueError, match="60 photos .* 1 MB free.*set TMPDIR to another folder"):
        data.decode(paths, [0] * 60, data.Square(256), photos, keep=False)


def test_large_photos(photos, monkeypatch):
    """Pillow's warning about a large photo that it still decodes isn't shown."""
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert len(data.read(str(photos), image_size=14).train) == 60


def test_photos_in_floats_and_too_large(photos, monkeypatch):
    """A TIFF of 32 bits is refused, since its white may be 1 or 255. A photo that Pillow takes for
    a bomb, or that doesn't fit into memory, is called too large, not damaged."""
    from PIL import Image

    path = photos / "leaf/float.tif"
    Image.new("I", (8, 8), 200).save(path)
    with pytest.raises(ValueError, match="32 bits a pixel"):
        data.read_photo(path, data.Square(8))
    Image.new("F", (8, 8), 0.5).save(path)
    with pytest.raises(
        ValueError, match=r"float.tif .*32 bits a pixel, whose white may be 1, 255 or more"
    ):
        data.read_photo(path, data.Square(8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="00.png is too large to be decoded .*; shrink it"):
        data.read_photo(photos / "leaf/00.png", data.Square(8))

    def no_memory(image):
        raise MemoryError

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(data, "upright_rgb", no_memory)
    with pytest.raises(
        ValueError, match=r"00.png is too large .* \(not enough memory\); shrink it"
    ):
        data.read_photo(photos / "leaf/00.png", data.Square(8))
