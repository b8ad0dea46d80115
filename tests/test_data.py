"""Data sets, splits and the batches that come of them."""
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import write_cifar10

import data


@pytest.mark.parametrize("size", [16, 32, 48, 224])
def test_resize_is_pillows(size):
    """Crop and resize against Pillow's resize with the same box, which rounds and clamps to 8 bits after each direction:
    hence the grey values far from both ends."""
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(80, 176, (1, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    top, left, height, width = 3.25, 10.5, 30.5, 40.25
    ours = data.crop_resize(pixels, torch.tensor([[top, left, height, width]]), size)[0]
    theirs = image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize(
        (size, size), image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255
    # Pillow's kernel doesn't look beyond the box, ours not beyond the image: compare away from the box's edges
    edge = 1 + int(3 * size / 30)
    inner = (slice(None), slice(edge, -edge), slice(edge, -edge))
    assert (ours[inner] - theirs[inner]).abs().max() < 1.6 / 255


def test_whole_image_at_its_own_size_is_untouched():
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    out = data.crop_resize(pixels, data.center_boxes(4, 32, 32, 1.0, torch.device("cpu")), 32)
    assert torch.allclose(out, pixels / 255, atol=1e-6)


def test_flip_mirrors():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0]]).expand(2, 4)
    plain, flipped = (data.crop_resize(pixels, boxes, 24, flip=torch.tensor([flip] * 2)) for flip in (False, True))
    assert torch.equal(plain.flip(-1), flipped)


def test_random_boxes_lie_inside():
    boxes = data.random_boxes(1000, 32, 48, 0.08, data.generator("boxes"))
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height <= 32.001).all()
    assert (left + width <= 48.001).all()
    area = height * width / (32 * 48)
    assert 0.05 < area.min() < 0.15
    assert area.max() > 0.8
    free = (height < 32) & (width < 48)
    assert (width / height)[free].min() >= 0.75 - 1e-4
    assert (width / height)[free].max() <= 4 / 3 + 1e-4


def digits(**options):
    return data.split(data.read("digits"), **options)


def test_digits():
    pixels = data.read("digits").train.pixels
    assert pixels.shape == (1797, 3, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    assert np.array_equal(pixels[:, 0].float().mul(16 / 255).round().numpy(), sklearn.images)


def test_split_is_stratified_disjoint_and_seeded():
    first, second = digits(seed=0), digits(seed=1)
    assert [len(part) for part in (first.train, first.val, first.test)] == [1294, 144, 359]
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert not torch.equal(first.val.pixels, second.val.pixels)
    assert torch.equal(first.val.pixels, digits(seed=0).val.pixels)
    for part, share in ((first.val, 144 / 1797), (first.test, 359 / 1797)):
        expected = torch.bincount(data.read("digits").train.labels) * share
        assert (torch.bincount(part.labels) - expected).abs().max() <= 1
    everything = torch.cat([part.pixels for part in (first.train, first.val, first.test)]).flatten(1)
    whole = data.read("digits").train.pixels.flatten(1)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, whole.tolist()))


def test_limit_keeps_proportions():
    some = digits(seed=0, limit=100)
    assert (len(some.train), len(some.val), len(some.test), some.whole) == (100, 25, 359, (1294, 144))
    assert torch.bincount(some.train.labels).min() >= 9


def test_batches_depend_on_seed_epoch_and_step_alone():
    sample, batches = digits(), data.Batches(32, ((0.5,) * 3, (0.5,) * 3), 64, torch.device("cpu"))

    def draw(seed, epoch, first=0):
        return list(batches.train(sample, seed, epoch, first))
    one = draw(0, 1)
    assert len(one) == batches.count(sample.train) == 21
    assert one[-1][0].shape == (1294 - 20 * 64, 3, 32, 32)
    for (x, y), (x2, y2) in zip(one[5:], draw(0, 1, first=5), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(one[0][0], draw(0, 2)[0][0])
    assert not torch.equal(one[0][0], draw(1, 1)[0][0])
    assert sorted(torch.cat([y for _, y in one]).tolist()) == sorted(sample.train.labels.tolist())
    assert torch.cat([x for x, _ in one]).abs().max() <= 1.001


def test_folder(photos):
    pool = data.read(str(photos), image_size=28)
    assert pool.classes == ["apple", "leaf", "sky"]
    assert pool.train.pixels.shape == (60, 3, 32, 32)
    assert pool.train.names[0] == "apple/00.png"
    assert (pool.train.pixels.float().mean(dim=(2, 3)).argmax(dim=1) == pool.train.labels).all()
    parts = data.split(pool)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [43, 5, 12]
    names = [name for part in (parts.train, parts.val, parts.test) for name in part.names]
    assert sorted(names) == sorted(pool.train.names)


def test_hidden_files_are_no_photos(photos):
    (photos / ".cache").mkdir()
    (photos / "leaf" / "._00.png").write_bytes(b"resource fork")
    (photos / "leaf" / "notes.txt").write_text("x")
    assert len(data.read(str(photos), image_size=28).train) == 60


def test_folder_with_published_parts(photos):
    for part in ("train", "test"):
        (photos / part).mkdir()
    for name in ("apple", "leaf", "sky"):
        (photos / "test" / name).mkdir()
        for path in sorted((photos / name).iterdir())[:5]:
            path.rename(photos / "test" / name / path.name)
        (photos / name).rename(photos / "train" / name)
    parts = data.split(data.read(str(photos), image_size=28))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [41, 4, 15]
    assert all(name.startswith("test/") for name in parts.test.names)


def test_damaged_photo_is_named(photos):
    path = photos / "leaf" / "07.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"can't read .*leaf/07.png as an image .*; repair or remove it"):
        data.read(str(photos))


def test_empty_class_is_named(photos):
    (photos / "zebra").mkdir()
    with pytest.raises(ValueError, match="no images in .*zebra"):
        data.read(str(photos))


def test_classes_must_be_the_same(photos):
    (photos.parent / "parts").mkdir()
    photos.rename(photos.parent / "parts" / "train")
    for name in ("apple", "leaf"):
        shutil.copytree(photos.parent / "parts" / "train" / name, photos.parent / "parts" / "test" / name)
    with pytest.raises(ValueError, match="test and .*train don't have the same classes: sky"):
        data.read(str(photos.parent / "parts"))


@pytest.mark.parametrize(("make", "message"), [
    (lambda root: (root / "data").mkdir(), "0 class folders; at least 2"),
    (lambda root: (root / "data" / "test" / "a").mkdir(parents=True), "has test but no train folder"),
])
def test_folders_that_arent_data(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.read(str(tmp_path / "data"))


def test_unknown_data_set():
    with pytest.raises(ValueError, match="no data set or folder 'cifar99': choose digits, cifar10, cifar100 or give a folder"):
        data.read("cifar99")


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('evil').write_text('x')",))


@pytest.mark.parametrize("content", [pickle.dumps({b"data": Evil()}), b"", b"\x80\x04garbage", pickle.dumps([1])[:-1]])
def test_pickle_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(ValueError, match="batch was refused: .*; delete its folder"):
        data.unpickle(tmp_path / "batch")
    assert not (tmp_path / "evil").exists()


def test_cifar10_folder(tmp_path):
    """CIFAR-10's own file names and keys."""
    write_cifar10(tmp_path)
    images = data.read("cifar10", str(tmp_path), offline=True)
    assert images.train.pixels[:, 0, 0, 0].tolist() == sorted([*range(5)] * 10)
    assert (images.test.pixels.unique().item(), images.test.labels.tolist()) == (5, list(range(10)))
    assert images.classes[:2] == ["class 0", "class 1"]


def test_missing_batch_is_named(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(ValueError, match="meta was refused: .*No such file.*; delete its folder"):
        data.read("cifar100", str(tmp_path))


@pytest.mark.parametrize(("height", "width", "share", "box"), [
    (32, 32, 1.0, [0, 0, 32, 32]), (183, 183, 7 / 8, [11, 11, 160, 160]), (256, 256, 7 / 8, [16, 16, 224, 224]),
    (14, 9, 1.0, [2, 0, 9, 9])])
def test_the_centre_is_cut_at_whole_pixels(height, width, share, box):
    assert data.center_boxes(2, height, width, share, torch.device("cpu")).tolist() == [box, box]
