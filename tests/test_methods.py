"""The other methods (CLIP-Adapter, zero-shot, VPT, AdaptFormer's files) and what all share.

Few shots, cached features, comparisons, pictures, loading a run, how often the test set is read.
"""

import contextlib
import copy
import csv
import io
import json
import math
import re
import shutil
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import runner, write_cifar10, write_tiny, write_tiny_clip
from safetensors.torch import load_file, save_file
from torch import nn

import adaptertune
import data
import export
import train
import vit

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs train.py's main in an empty folder, with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "cache"))
    return runner(train.main, capsys)


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Hide matplotlib, as if it weren't installed; where pictures don't matter, this saves time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def no_sklearn(monkeypatch):
    """Hide scikit-learn, so that principal components are drawn instead of t-SNE."""
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)


def open_run(folder):
    """The finished run in a folder, as --eval opens it."""
    options, *_ = train.parse(["--eval", str(folder)])
    return train.open_run(options)


def read_result(folder):
    """A run's result.json."""
    return json.loads((folder / "result.json").read_text())


def accuracies_on_test(out):
    """The accuracies in the lines "test" of the output."""
    return re.findall(r"^test +([\d.]+) %", out, re.M)


# ---------------------------------------------------------------------------------- CLIP-Adapter


def clip_head(**options):
    """A ClipHead for 7 classes with random values in every tensor."""
    torch.manual_seed(0)
    head = adaptertune.ClipHead(torch.randn(24, 32), 7, rank=6, **options).double()
    head.classes = torch.randn(7, 24, dtype=torch.float64)
    return head


def by_the_paper(head, x, a, b):
    """Equations 4 to 7 of https://arxiv.org/abs/2110.04544, with CLIP's cosines."""
    f = x @ head.projection.T
    W = head.classes
    if head.image is not None:
        hidden = (f @ head.image[0].weight.T).clamp(min=0)
        adapted = (hidden @ head.image[2].weight.T).clamp(min=0)
        f = a * adapted + (1 - a) * f
    if head.text is not None:
        hidden = (W @ head.text[0].weight.T).clamp(min=0)
        adapted = (hidden @ head.text[2].weight.T).clamp(min=0)
        W = b * adapted + (1 - b) * W
    f = f / f.norm(dim=1, keepdim=True)
    W = W / W.norm(dim=1, keepdim=True)
    return 100 * f @ W.T


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("a", "b"), [(0.2, 0), (0, 0.6), (0.3, 0.5), (0, 0)])
def test_clip_adapter_is_the_papers(a, b, learn):
    """Logits and all gradients are those of the paper; a side of ratio 0 has no parameters."""
    head = clip_head(ratio=a, text_ratio=b, learn_ratio=learn)
    x = torch.randn(5, 32, dtype=torch.float64)
    names = set()
    for side, ratio in (("image", a), ("text", b)):
        if ratio:
            names |= {f"{side}.0.weight", f"{side}.2.weight"}
        if ratio and learn:
            names.add(f"{side}_ratio")
    assert {name for name, _ in head.named_parameters()} == names

    found = head(x)
    expected = by_the_paper(head, x, head.image_ratio, head.text_ratio)
    assert torch.allclose(found, expected, atol=1e-10)
    if not names:
        return
    parameters = list(head.parameters())
    found = torch.autograd.grad(found.square().sum(), parameters)
    expected = torch.autograd.grad(expected.square().sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8)
        assert ours.abs().max() > 0


def test_ratio_0_is_zero_shot_bit_for_bit():
    """A head of ratios 0 is zero-shot bit for bit; so is any head inside `zero_shot`."""
    head = clip_head(ratio=0.2, text_ratio=0.3)
    plain = clip_head()
    plain.classes = head.classes
    x = torch.randn(5, 32, dtype=torch.float64)
    before = head(x)
    assert not torch.equal(before, plain(x))
    with head.zero_shot():
        assert torch.equal(head(x), plain(x))
    assert torch.equal(head(x), before)
    head.image_ratio = 0.0
    head.text_ratio = 0.0
    assert torch.equal(head(x), plain(x))


def test_prototypes_are_class_means():
    """A class's prototype is the mean of its normalised embeddings."""
    embeddings = torch.randn(8, 5)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    found = adaptertune.prototypes(embeddings, labels)
    first = embeddings[2] / embeddings[2].norm()
    second = embeddings[5] / embeddings[5].norm()
    assert torch.allclose(found[2], (first + second) / 2)
    assert found.shape == (3, 5)


@pytest.mark.parametrize(("a", "b"), [(0.2, 0), (0.3, 0.5)])
def test_a_training_image_is_left_out_of_its_own_prototype(a, b):
    """The logits of leave_one_out are those of prototypes that were made without the image; an
    image that is alone in its class keeps its own."""
    head = clip_head(ratio=a, text_ratio=b)
    x = torch.randn(9, 32, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 0])
    labels[1:3] = 5  # classes of one, three and three; 1 and 2 have none
    embeddings = x @ head.projection.T
    sizes = torch.bincount(labels, minlength=7)
    for label in (0, 5):
        members = F.normalize(embeddings[labels == label], dim=1)
        head.classes[label] = members.mean(dim=0)
    found = head.leave_one_out(x, labels, sizes)
    plain = head(x)
    for i, label in enumerate(labels.tolist()):
        others = labels == label
        others[i] = False
        twin = copy.deepcopy(head)
        if others.any():
            twin.classes[label] = F.normalize(embeddings[others], dim=1).mean(dim=0)
        expected = plain[i].clone()
        expected[label] = twin(x)[i, label]
        assert torch.allclose(found[i], expected, atol=1e-9)
        assert torch.allclose(found[i], plain[i]) == (label not in (0, 5))


def test_training_on_prototypes(run, tmp_path, monkeypatch):
    """clip-adapter leaves each training image out of its prototype, and refuses those of one."""
    weights = write_tiny_clip(tmp_path, text=False)
    common = ["--weights", weights, "--method", "clip-adapter", "--classifier", "prototypes"]
    common += ["--epochs", 5]
    error = run(*common, "--shots", 1, status=1)
    assert "can't be trained on prototypes of one image each; give more images" in error
    assert not (tmp_path / "runs").exists()
    sizes = []
    plain = adaptertune.ClipHead.leave_one_out

    def leave_one_out(head, features, labels, counts):
        sizes.append(counts.tolist())
        return plain(head, features, labels, counts)

    monkeypatch.setattr(adaptertune.ClipHead, "leave_one_out", leave_one_out)
    run(*common, "--shots", 2, "--name", "two")
    assert sizes == [[2] * 10] * 5  # in each epoch's only step


@pytest.fixture(params=["both", "two files"])
def clip_options(request, clip, tmp_path):
    """--weights of a file with both towers, or --weights and --text-weights of two files."""
    if request.param == "both":
        return ["--weights", clip]
    (tmp_path / "image").mkdir()
    image_tower = write_tiny_clip(tmp_path / "image", text=False)
    return ["--weights", image_tower, "--text-weights", clip]


@pytest.mark.usefixtures("no_matplotlib")
def test_clip_on_the_command_line(run, clip, clip_options, tmp_path, monkeypatch):
    """Class names become embeddings; zero-shot is measured on val; --eval needs no text tower."""
    common = [*clip_options, "--shots", 2, "--epochs", 3, "--text-ratio", 0.3, "--learn-ratio"]
    out = run(*common, "--method", "zero-shot", "clip-adapter", "--name", "c")
    assert "20 of 1,438 train / 20 val / 359 test" in out
    assert re.search(r"^test .*\(nothing to choose\)$", out, re.M)

    # What the ratios became is reported.
    learnt = read_result(tmp_path / "runs/c-clip-adapter")["learnt"]
    assert list(learnt) == ["image_ratio", "text_ratio"]
    for name, (ratio,) in learnt.items():
        assert f"learnt   {name.replace('_', ' ')} {ratio:.3f}\n" in out
    assert learnt["image_ratio"] != [pytest.approx(0.2, abs=1e-9)]
    assert "learnt" not in read_result(tmp_path / "runs/c-zero-shot")

    # Zero-shot is measured on the validation images.
    adapter = tmp_path / "runs/c-clip-adapter"
    zero_shot = tmp_path / "runs/c-zero-shot"
    again = open_run(zero_shot)
    expected = train.predict(again, again.dataset.val, "val").accuracy
    stated = re.findall(r"^zeroshot (.*)$", out, re.M)
    assert stated == [f"{expected:.2f} %   (val, by text alone, before training)"] * 2
    # These towers are random.
    assert out.count("warning  that is hardly above chance, 10.00 %: are both towers and the") == 2
    text = "'a photo of the number: \"0\".', …; text tower of 1 head (guessed)"
    assert out.count(f"text     {text}\n") == 2
    assert "run      1 of 2: zero-shot, seed 0\n" in out  # trains nothing, so at no rate
    assert read_result(zero_shot)["template"] == 'a photo of the number: "{}".'
    for folder in (zero_shot, adapter):
        assert read_result(folder)["zero_shot_val_accuracy"] == expected
    assert read_result(zero_shot)["val_accuracy"] == expected

    # The adapter's file.
    tensors = load_file(adapter / "adapters.safetensors")
    names = {"head.classes", "head.scale", "head.image_ratio", "head.text_ratio"}
    names |= {"head.image.0.weight", "head.image.2.weight"}
    names |= {"head.text.0.weight", "head.text.2.weight"}
    assert set(tensors) == names
    assert tensors["head.image.0.weight"].shape == (6, 24)  # a quarter of the embedding
    tower, scale = vit.load_text(clip)
    tokenizer = vit.Tokenizer(clip.with_name("merges.txt"))
    sentences = [f'a photo of the number: "{digit}".' for digit in range(10)]
    assert torch.allclose(tensors["head.classes"], tower(tokenizer(sentences)), atol=1e-6)
    assert tensors["head.scale"].item() == pytest.approx(scale)
    assert scale == pytest.approx(20.0855, abs=1e-3)

    # The text tower isn't needed any more.
    monkeypatch.setattr(vit, "load_text", None)
    tests = accuracies_on_test(out)
    for folder, test in (("c-zero-shot", tests[0]), ("c-clip-adapter", tests[1])):
        again = run("--eval", f"runs/{folder}")
        assert f"test     {test} %   (its file says {test} %)\n" in again


@pytest.mark.usefixtures("no_matplotlib")
def test_no_zero_shot_line_without_validation_images(run, clip, tmp_path, monkeypatch):
    """If all images of the pool are shots, no line states zero-shot, since there is no val."""
    write_cifar10(tmp_path, monkeypatch)
    common = ["--dataset", "cifar10", "--data-dir", tmp_path, "--weights", clip]
    common += ["--shots", 5, "--epochs", 2, "--method", "zero-shot", "clip-adapter"]
    out = run(*common, "--name", "c")
    assert out.count("data     cifar10: 50 train / 0 val / 10 test, 10 classes") == 2
    assert "zeroshot" not in out
    assert "(epoch 2, the last, as no images are left for val; test read once)" in out
    for name in ("c-zero-shot", "c-clip-adapter"):
        result = read_result(tmp_path / "runs" / name)
        assert "zero_shot_val_accuracy" not in result
        assert result["val_accuracy"] is None


def test_another_vocabulary_is_refused(run, clip, tmp_path):
    """A vocabulary with another number of ids is refused; the error names both files."""
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd i\n")
    common = ["--weights", clip, "--method", "zero-shot"]
    error = run(*common, "--vocab", tmp_path / "merges.txt", status=1)
    assert re.search(r"merges.txt has 515 ids, .*clip.safetensors 522; give its --vocab", error)


def test_gpt2s_vocabulary_is_refused(run, clip, tmp_path):
    """GPT-2's merges.txt has as many merges, but marks the beginnings of words, not their ends."""
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\u0120 t\nh e\n")
    common = ["--weights", clip, "--method", "zero-shot", "--vocab", tmp_path / "merges.txt"]
    assert "merges.txt is missing, damaged or not a CLIP voc" in run(*common, status=1)


def test_text_towers_of_another_clip(run, clip, tmp_path):
    """A text tower whose embeddings have another width is refused before features are computed."""
    (tmp_path / "image").mkdir()
    image_tower = write_tiny_clip(tmp_path / "image", text=False, embed=16)
    common = ["--weights", image_tower, "--text-weights", clip, "--method", "zero-shot"]
    error = run(*common, status=1)
    assert "its text tower gives 24 numbers, the image tower 16: they aren't of one CLIP" in error


def test_a_classifier_is_no_projection(tmp_path):
    """A CLIP fine-tuned to classes (timm's …_ft_in1k) has a classifier with biases as its head."""
    model, _ = vit.load(write_tiny_clip(tmp_path), head=True)
    model.head.bias = nn.Parameter(torch.ones(len(model.head.weight)))
    with pytest.raises(ValueError, match="its projection as head, which these weights don't have"):
        adaptertune.adapt(model, "zero-shot", 5)
    model.head.bias = nn.Parameter(torch.zeros(len(model.head.weight)))  # as timm's projection
    adaptertune.adapt(model, "zero-shot", 5)


def test_sentences_that_can_not_be(run, clip, tmp_path):
    """Sentences that CLIP can't tell apart or would cut are refused, and so are text options where
    no text is used."""
    common = ["--weights", clip, "--method", "zero-shot"]
    error = run(*common, "--template", f"{'9 ' * 80}{{}}", status=1)
    assert re.search(r"… has \d+ tokens, the text tower takes 75; shorten --template", error)
    tokenizer = vit.Tokenizer(clip.with_name("merges.txt"))
    train.check_sentences(["9" * 75], tokenizer, 77)
    with pytest.raises(ValueError, match="has 76 tokens, the text tower takes 75; shorten"):
        train.check_sentences(["9" * 76], tokenizer, 77)
    with pytest.raises(ValueError, match="'a  B' and 'A b' are the same for CLIP; rename one"):
        train.check_sentences(["c", "a  B", "A b"], tokenizer, 77)
    for option in ("--template", "--text-weights", "--vocab"):
        error = run(*common, "--classifier", "prototypes", option, "x{}", status=2)
        assert f"{option} is for --classifier text" in error


def test_a_missing_vocabulary(run, clip, tmp_path, monkeypatch):
    """Before images are read, the error names --vocab, not --weights."""
    weights = shutil.copy(clip, tmp_path / "alone.safetensors")
    monkeypatch.setattr(train, "read_dataset", None)
    error = run("--weights", weights, "--method", "zero-shot", "--offline", status=1)
    assert re.search("merges.txt is not there and --offline given; .*, or give --vocab FILE", error)


@pytest.mark.parametrize(
    ("accuracy", "images", "warns"),
    [(15.0, 40, True), (35.0, 40, False), (50.0, 2, True), (100.0, 2, False)],
)
def test_zero_shot_near_chance(accuracy, images, warns, monkeypatch, capsys):
    """Text towers of another CLIP, or other vocabularies, give accuracies near chance."""
    found = SimpleNamespace(accuracy=accuracy)
    monkeypatch.setattr(train, "predict", lambda *arguments: found)
    run = SimpleNamespace(
        model=SimpleNamespace(head=SimpleNamespace(zero_shot=contextlib.nullcontext)),
        dataset=SimpleNamespace(val=range(images), classes=range(10)),
        options=SimpleNamespace(classifier="text"),
        meta={},
    )
    train.validate_zero_shot(run)
    assert ("hardly above chance, 10.00 %" in capsys.readouterr().out) == warns


def test_zero_shot_needs_no_training_images(run, clip, monkeypatch):
    """Features of training images aren't computed for zero-shot CLIP by class names."""
    computed = []
    compute = train.compute_features

    def record(run, images, what):
        computed.append((what, len(images)))
        return compute(run, images, what)

    monkeypatch.setattr(train, "compute_features", record)
    run("--weights", clip, "--method", "zero-shot")
    assert computed == [("val", 144), ("test", 359)]


def test_template(run, clip, tmp_path):
    """--template is used and must contain {}; published templates go by the data set's name."""
    common = ["--weights", clip, "--method", "zero-shot"]
    run(*common, "--template", "digit {}, photo", "--name", "t")
    tower, _ = vit.load_text(clip)
    tokenizer = vit.Tokenizer(clip.with_name("merges.txt"))
    expected = tower(tokenizer([f"digit {digit}, photo" for digit in range(10)]))
    found = load_file(tmp_path / "runs/t/adapters.safetensors")["head.classes"]
    assert torch.allclose(found, expected, atol=1e-6)

    error = run(*common, "--template", "digits", "--name", "u", status=1)
    assert "has no {}" in error
    plain = data.template_of("oxford")
    assert data.sentences(["sea_horse"], plain) == ["a photo of a sea horse."]
    assert data.template_of("food_trucks") == plain
    flowers = data.template_of("flowers12")
    assert data.sentences(["rose"], flowers) == ["a photo of a rose, a type of flower."]


@torch.no_grad()
def test_prototypes_need_no_text(run, tmp_path):
    """With an image tower alone, the accuracy of class means is the one computed here."""
    weights = write_tiny_clip(tmp_path, text=False)
    (tmp_path / "merges.txt").unlink()
    common = ["--weights", weights, "--method", "zero-shot", "--classifier", "prototypes"]
    out = run(*common, "--shots", 4)
    assert re.search(r"^zeroshot [\d.]+ %   \(val, by prototypes alone", out, re.M)

    model, backbone = vit.load(weights, head=True)
    images = data.split(data.read("digits"), seed=0, shots=4)
    batches = data.Batches(16, backbone.norm, 50, torch.device("cpu"))
    train_x = torch.cat([model(x) for x, _ in batches.eval(images.train, 1.0)])
    test_x = torch.cat([model(x) for x, _ in batches.eval(images.test, 1.0)])
    train_x = F.normalize(train_x, dim=1)
    means = torch.stack([train_x[images.train.labels == i].mean(dim=0) for i in range(10)])
    predictions = F.cosine_similarity(test_x[:, None], means, dim=2).argmax(dim=1)
    accuracy = (predictions == images.test.labels).float().mean()
    assert accuracies_on_test(out) == [f"{100 * accuracy:.2f}"]


def test_a_missing_text_tower_is_found_first(run, tmp_path):
    """A missing text tower is found before the features are computed, which takes long."""
    weights = write_tiny_clip(tmp_path, text=False)
    error = run("--weights", weights, "--method", "zero-shot", status=1)
    assert "no text tower" in error
    assert "--classifier prototypes" in error
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()


def test_clip_adapter_needs_an_adapter(run, clip):
    """Two ratios of 0 are refused before anything is loaded."""
    error = run("--weights", clip, "--method", "clip-adapter", "--ratio", 0, status=2)
    assert "leave nothing to train; use --method zero-shot" in error


def test_cached_features_depend_on_the_normalisation(run, tmp_path):
    """The same weights, named or not, are normalised differently and don't share features."""
    weights = tmp_path / "weights.safetensors"
    config = replace(vit.BACKBONES["vit_micro"].config, image_size=16)
    torch.manual_seed(0)
    model = vit.ViT(config)
    model.init_weights()
    save_file(model.state_dict(), weights)
    common = ["--method", "head", "--cached", "--shots", 2, "--epochs", 1, "--image-size", 16]
    run(*common, "--weights", weights, "--backbone", "vit_micro", "--name", "named")
    features = tmp_path / "cache" / "features"
    before = {path.name for path in features.iterdir()}
    run(*common, "--weights", weights, "--heads", 4, "--name", "unnamed")
    after = {path.name for path in features.iterdir()}
    assert len(after) == 2 * len(before)


def test_cached_features_depend_on_the_positions(run, tmp_path, tiny_weights):
    """Weights that differ only in positions, which the fingerprint leaves out, share nothing."""
    tensors, meta = vit.read_tensors(tiny_weights)
    tensors["pos_embed"] = tensors["pos_embed"].flip(1)
    save_file(tensors, tmp_path / "other.safetensors", {"adaptertune": json.dumps(meta)})
    common = ["--method", "head", "--cached", "--shots", 2, "--epochs", 1, "--heads", 2]
    run(*common, "--weights", tiny_weights, "--name", "a")
    features = tmp_path / "cache" / "features"
    before = len(list(features.iterdir()))
    run(*common, "--weights", tmp_path / "other.safetensors", "--name", "b")
    assert len(list(features.iterdir())) == 2 * before


@pytest.mark.parametrize("method", adaptertune.CLIP_METHODS)
def test_clip_methods_want_clip(run, tiny_weights, method):
    """A CLIP method refuses another backbone and says what to choose."""
    error = run("--weights", tiny_weights, "--method", method, status=1)
    assert "choose a clip_* --backbone" in error


@pytest.mark.parametrize("name", ["clip_b16", "clip_b16_laion"])
def test_clip_from_the_hub(run, clip, server, monkeypatch, tmp_path, name):
    """A named CLIP's towers and vocabulary are fetched once. LAION's have GELU in both towers."""
    backbone = vit.BACKBONES[name]
    quick_gelu = backbone.config.quick_gelu
    config = replace(vit.load(clip)[1].config, quick_gelu=quick_gelu)
    monkeypatch.setitem(vit.BACKBONES, name, replace(backbone, config=config))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    repository = f"/{backbone.repo}/resolve/main"
    server.files = {
        f"{repository}/model.safetensors": clip.read_bytes(),
        f"{repository}/merges.txt": clip.with_name("merges.txt").read_bytes(),
    }
    common = ["--backbone", name, "--method", "zero-shot", "--shots", 2]
    out = run(*common, "--name", "hub")
    assert [path for path, _ in server.seen] == list(server.files)
    again = run(*common, "--offline", "--name", "offline")
    assert accuracies_on_test(again) == accuracies_on_test(out)
    assert len(server.seen) == 2

    by_file = run("--weights", clip, *common[2:], "--name", "file")
    if quick_gelu:  # as is assumed of a file of that layout
        assert accuracies_on_test(by_file) == accuracies_on_test(out)
    classes = {}
    for each in ("hub", "file"):
        tensors = load_file(tmp_path / "runs" / each / "adapters.safetensors")
        classes[each] = tensors["head.classes"]
    assert torch.equal(classes["hub"], classes["file"]) == quick_gelu


# -------------------------------------------------------------------- few shots, cached features


def test_no_image_left_for_val(run, photos, tiny_weights, tmp_path):
    """If all images of the pool are shots, the last epoch is kept, and the output says so."""
    common = ["--dataset", photos, "--weights", tiny_weights, "--test-share", 0.5, "--shots", 10]
    out = run(*common, "--epochs", 2, "--name", "a")
    assert "data     photos: 30 train / 0 val / 30 test, 3 classes" in out
    assert "(epoch 2, the last, as no images are left for val; test read once)" in out
    assert read_result(tmp_path / "runs/a")["val_accuracy"] is None
    check_picture(tmp_path / "runs/a/curves.svg")


@pytest.mark.usefixtures("no_matplotlib")
def test_features_are_computed_once(run, tiny_weights, tmp_path, monkeypatch):
    """A second run reads the features from disk; --eval, from images, gives the same accuracy."""
    common = ["--method", "head", "--cached", "--shots", 5, "--epochs", 5]
    features = tmp_path / "cache/features"
    out = run("--weights", tiny_weights, *common, "--name", "a")
    assert len(list(features.iterdir())) == 2  # of train and val, and of test
    with monkeypatch.context() as patch:
        patch.setattr(vit.ViT, "features", None)
        again = run("--weights", tiny_weights, *common, "--lr", 0.02, "--name", "b")
    assert len(accuracies_on_test(again)) == 1
    assert accuracies_on_test(run("--eval", "runs/a")) == accuracies_on_test(out)

    other = write_tiny(tmp_path / "other.safetensors", seed=1)
    run("--weights", other, *common, "--name", "c")
    assert len(list(features.iterdir())) == 4  # another backbone, other features


@pytest.mark.usefixtures("no_matplotlib")
def test_seeds_share_their_features(run, photos, tiny_weights, tmp_path, monkeypatch):
    """Another seed, whose train and val are drawn otherwise, finds the features on the disk; each
    image keeps its own."""
    common = ["--dataset", photos, "--weights", tiny_weights, "--method", "head", "--cached"]
    common += ["--epochs", 2, "--name", "a"]
    run(*common, "--seeds", 0)
    seen = []
    fit = train.fit
    with monkeypatch.context() as patch:
        patch.setattr(train, "compute_features", None)
        patch.setattr(train, "fit", lambda run: (seen.append(run), fit(run)))
        run(*common, "--seeds", 1, "--name", "b")
    (second,) = seen
    first = json.loads((tmp_path / "runs/a/split.json").read_text())
    assert second.dataset.val.names != first["val"]
    for part in ("train", "val", "test"):
        images = getattr(second.originals, part)
        expected = train.compute_features(second, images, part)
        assert torch.allclose(getattr(second.dataset, part).pixels, expected, atol=1e-5)


# ----------------------------------------------------------------------- VPT, AdaptFormer's files


def vpt_by_the_paper(model, images, prompts, deep):
    """Features by equations 4 to 8 of https://arxiv.org/abs/2203.12119.

    Prompts stand between the class token and the patches. Each block gets new ones in their place
    (deep), or those of the first block are carried on (shallow).
    """
    x = model.embed(images)
    for i, block in enumerate(model.blocks):
        if i == 0 or deep:
            rest = x[:, 1:] if i == 0 else x[:, 1 + prompts :]
            own = block.prompts.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], own, rest], dim=1)
        x = block(x)
    if model.config.pool == "token":
        return model.norm(x[:, 0])
    first_patch = 1 + prompts + model.config.registers
    return model.norm(x[:, first_patch:].mean(dim=1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"registers": 2, "pool": "mean"}, {"norm_pre": True, "quick_gelu": True}],
    ids=["plain", "registers", "clip"],
)
@pytest.mark.parametrize("deep", [True, False])
def test_vpt_is_the_papers(tmp_path, deep, changes):
    """Outputs and the gradients of all prompts are those of the paper's equations."""
    model, _ = vit.load(write_tiny(tmp_path / "w.safetensors", seed=0, **changes))
    torch.manual_seed(0)
    adaptertune.add_prompts(model, prompts=5, deep=deep)
    adaptertune.freeze(model)
    model = model.double()
    found = model.features(IMAGES.double())
    expected = vpt_by_the_paper(model, IMAGES.double(), 5, deep)
    assert torch.allclose(found, expected, atol=1e-10)

    parameters = list(adaptertune.trained(model).values())
    assert [each.shape for each in parameters] == [(5, 32)] * (2 if deep else 1)
    found = torch.autograd.grad(found.square().sum(), parameters)
    expected = torch.autograd.grad(expected.square().sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)
        assert ours.abs().max() > 0


def test_prompts_start_where_vpts_do(tiny_weights):
    """Prompts are uniform within VPT's bound and fill it; zero prompts are refused."""
    model, _ = vit.load(tiny_weights)
    adaptertune.add_prompts(model, prompts=200, deep=True)
    bound = (6 / (3 * 4 * 4 + 32)) ** 0.5
    assert 0.95 * bound < model.blocks[1].prompts.abs().max() <= bound
    with pytest.raises(ValueError, match="0 prompts: at least one is needed"):
        adaptertune.add_prompts(model, prompts=0, deep=True)


class PublishedAdapter(nn.Module):
    """AdaptFormer's `adaptmlp` with its code's names, computing the paper's equation 2."""

    def __init__(self, width, rank):
        super().__init__()
        self.down_proj = nn.Linear(width, rank)
        self.up_proj = nn.Linear(rank, width)
        self.scale = nn.Parameter(torch.ones(1) * 0.3)

    def forward(self, x):
        return self.scale * self.up_proj(F.relu(self.down_proj(x)))


@pytest.fixture
def published():
    """AdaptFormer's adapters of rank 4 for the tiny backbone: the modules, and their tensors."""
    torch.manual_seed(0)
    modules = [PublishedAdapter(32, 4), PublishedAdapter(32, 4)]
    tensors = {}
    for i, module in enumerate(modules):
        for name, value in module.named_parameters():
            tensors[f"blocks.{i}.adaptmlp.{name}"] = value.detach()
    return modules, tensors


def test_adaptformers_published_adapters(tiny_weights, published):
    """AdaptFormer's published tensors give the same function in our adapters."""
    modules, tensors = published
    model, _ = vit.load(tiny_weights)
    adaptertune.add_adapters(model, 4, method="adaptformer", learn_scale=True, dropout=0.0)
    adaptertune.start_from(model, tensors)
    x = torch.randn(2, 3, 32)
    for block, module in zip(model.blocks, modules, strict=True):
        assert torch.allclose(block.adapter(x), module(x), atol=1e-6)


@pytest.mark.usefixtures("no_matplotlib")
def test_init_from_a_file(run, tiny_weights, published, tmp_path):
    """--init FILE reads AdaptFormer's adapters and ours; other settings are an error."""
    _, tensors = published
    content = tensors | {"head.weight": torch.zeros(5, 32)}
    torch.save({"model": content}, tmp_path / "published.pth")
    common = ["--weights", tiny_weights, "--method", "adaptformer", "--learn-scale"]
    common += ["--epochs", 1, "--limit", 64, "--lr", 1e-9]  # too small to move an adapter
    run(*common, "--rank", 4, "--init", tmp_path / "published.pth", "--name", "a")
    first = load_file(tmp_path / "runs/a/adapters.safetensors")
    expected = tensors["blocks.0.adaptmlp.up_proj.weight"]
    assert torch.allclose(first["blocks.0.adapter.up.weight"], expected, atol=1e-6)

    run(*common, "--rank", 4, "--init", tmp_path / "runs/a/adapters.safetensors", "--name", "b")
    second = load_file(tmp_path / "runs/b/adapters.safetensors")
    expected = first["blocks.1.adapter.up.weight"]
    assert torch.allclose(second["blocks.1.adapter.up.weight"], expected, atol=1e-6)

    wrong = ["--rank", 8, "--init", tmp_path / "published.pth", "--name", "c"]
    error = run(*common, *wrong, status=1)
    assert "blocks.0.adapter.down.bias is [4] in the file, [8] in the model" in error

    ours = ["--rank", 4, "--init", tmp_path / "runs/a/adapters.safetensors", "--name", "d"]
    assert "with scale 0.1, not 0.5" in run(*common, *ours, "--scale", 0.5, status=1)
    assert "with act relu, not gelu" in run(*common, *ours, "--adapter-act", "gelu", status=1)
    assert "with heads 2, not 4" in run(*common, *ours, "--heads", 4, status=1)
    quick = ["--mlp-act", "quick_gelu"]
    assert "with mlp act gelu, not quick_gelu" in run(*common, *ours, *quick, status=1)
    assert "with placement [0, 1], not [1]" in run(*common, *ours, "--blocks", 1, status=1)
    assert "with reads raw, not block" in run(*common, *ours, "--method", "adaptertune", status=1)
    other = write_tiny(tmp_path / "other.safetensors", seed=1)
    assert "with fingerprint" in run(*common, *ours, "--weights", other, status=1)


# ------------------------------------------------------------------------------ the test set, once


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("method", [*adaptertune.METHODS, "head --cached"])
def test_the_test_set_is_read_once(run, clip, tiny_weights, monkeypatch, method):
    """Each method evaluates test once and last; its images pass through the network once."""
    arguments = ["--epochs", 2, "--shots", 2]
    if method == "scratch":
        arguments += ["--scratch"]
    elif method in adaptertune.CLIP_METHODS:
        arguments += ["--weights", clip, "--method", method]
    else:
        arguments += ["--weights", tiny_weights, "--method", *method.split()]
    if method == "adaptformer":
        arguments += ["--rank", 4]

    evaluated = []
    predict = train.predict

    def recorded_predict(run, images, what):
        evaluated.append("test" if images is run.dataset.test else what)
        assert (what == "test") == (images is run.dataset.test)
        return predict(run, images, what)

    seen = []
    eval_batches = data.Batches.eval

    def recorded_batches(self, images, center):
        if images.pixels.ndim > 2:  # not features
            seen.append(len(images))
        return eval_batches(self, images, center)

    monkeypatch.setattr(train, "predict", recorded_predict)
    monkeypatch.setattr(data.Batches, "eval", recorded_batches)
    out = run(*arguments)
    assert evaluated.count("test") == 1
    assert evaluated[-1] == "test"
    assert len([count for count in seen if count >= 359]) == 1  # with others, for features
    assert len(accuracies_on_test(out)) == 1


@pytest.mark.usefixtures("no_matplotlib")
def test_an_adapter_that_nothing_calls(run, tiny_weights, monkeypatch):
    """A module that no forward calls is an error, instead of a run that trains the head alone."""

    def add_uncalled(model, **settings):
        model.blocks[1].attn.adapter = nn.Linear(32, 4, bias=False)

    monkeypatch.setattr(adaptertune, "add_prompts", add_uncalled)
    out = run("--weights", tiny_weights, "--method", "vpt", "--epochs", 1, "--limit", 40, status=1)
    assert "error: blocks.1.attn.adapter.weight can't be trained: the loss doesn't" in out


# ----------------------------------------------------------------- a run, loaded in your own code


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("method", ["adaptertune", "vpt", "clip-adapter", "full"])
def test_load_run(run, photos, clip, tiny_weights, tmp_path, method):
    """load_run gives evaluation's pixels and logits for each photo without the data set."""
    weights = clip if method == "clip-adapter" else tiny_weights
    common = ["--dataset", photos, "--weights", weights, "--epochs", 2, "--amp", "off"]
    run(*common, "--method", method, "--name", "a")
    finished = open_run("runs/a")
    finished.model.eval()
    test = finished.dataset.test
    ((x, _),) = finished.batches.eval(test, finished.dataset.center)
    images = dict(zip(test.names, x.split(1), strict=True))  # each [1, 3, 16, 16]
    with torch.no_grad():
        expected = finished.logits(x)
    assert expected.shape == (12, 3)

    elsewhere = shutil.move(photos, tmp_path / "elsewhere")
    model = train.load_run(tmp_path / "runs/a")
    assert model.classes == ["apple", "leaf", "sky"]
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    for name, row in zip(test.names, expected, strict=True):
        x = model.preprocess(elsewhere / name)
        assert torch.equal(x, images[name])
        assert torch.allclose(model.network(x), row[None], atol=1e-5)

    from PIL import Image

    files = [elsewhere / name for name in test.names]
    labels, probabilities = model.predict(files)
    assert labels == [model.classes[best] for best in expected.argmax(dim=1)]
    assert torch.allclose(probabilities, expected.softmax(dim=1), atol=1e-5)
    opened = [Image.open(file) for file in files]
    assert torch.equal(model.predict(opened)[1], probabilities)
    assert model.predict(str(files[0]))[0] == labels[:1]
    assert torch.allclose(model.predict(opened[0])[1], probabilities[:1], atol=1e-5)
    assert torch.equal(model.predict(each for each in opened)[1], probabilities)
    with pytest.raises(ValueError, match="no photo at"):
        model.predict(["gone.png"])
    content = files[0].read_bytes()
    read = io.BytesIO(content)
    read.seek(99)
    for photo in (content, read, files[0].open("rb")):
        assert torch.allclose(model.predict(photo)[1], probabilities[:1], atol=1e-5)
    model.predict(content)[1].mul_(2)  # an ordinary tensor
    for lazy in (Image.open(files[0]), files[0].open("rb")):  # one object, several times
        same = model.predict([lazy] * 6)[1]
        assert torch.allclose(same, probabilities[:1].expand(6, -1), atol=1e-5)
    for array in (np.zeros((20, 20, 3), np.uint8), torch.zeros(3, 16, 16)):
        message = r"a photo is a path, .* or Pillow's image, not (ndarray|Tensor); try"
        with pytest.raises(ValueError, match=message):
            model.predict([array])
    cut = Image.open(io.BytesIO(content[: len(content) // 2]))
    for photo in (content[:30], io.BytesIO(content[:30]), cut, Image.new("RGB", (0, 0))):
        with pytest.raises(ValueError, match=r"can't read the photo as|the photo has no pixels"):
            model.predict([photo])
    with pytest.raises(ValueError, match="device 'none' can't be used here"):
        train.load_run(tmp_path / "runs/a", device="none")


@pytest.mark.usefixtures("no_matplotlib")
def test_load_run_refuses_what_is_no_run(run, tiny_weights, tmp_path):
    """load_run refuses a run on another backbone, a missing folder and an unfinished run."""
    weights = shutil.copy(tiny_weights, tmp_path / "w.safetensors")
    run("--weights", weights, "--epochs", 1, "--limit", 40, "--name", "a")
    write_tiny(weights, seed=1)
    with pytest.raises(ValueError, match=r"trained on w \(\w{16}\), not on w \(\w{16}\)"):
        train.load_run("runs/a")
    with pytest.raises(ValueError, match="no run in runs/none"):
        train.load_run("runs/none")
    (tmp_path / "runs/a/adapters.safetensors").unlink()
    with pytest.raises(ValueError, match="no adapters at runs/a/adapters.safetensors"):
        train.load_run("runs/a")


# --------------------------------------------------------------------------------- comparisons


def check_picture(path):
    """Check for a well-formed SVG, or for none without matplotlib. Returns its texts."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not path.exists()
        return None
    return texts_of(path)


def texts_of(path):
    """The texts in one of matplotlib's SVGs, which are in comments beside their outlines."""
    content = path.read_text()
    root = ElementTree.fromstring(content)
    assert root.tag.endswith("}svg")
    for each in root.iter():
        assert "nan" not in each.get("d", "")
    return re.findall(r"<!-- (.*?) -->", content)


def read_csv(path):
    """The rows of a CSV file, as dictionaries."""
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_comparison_of_runs_that_lack_something(capsys, tmp_path):
    """Where one run has no mean over classes, as its split is even, there is none of all."""
    result = {"method": "head", "trained": 5, "test_accuracy": 50.0, "val_accuracy": None}
    result |= {"lr": 0.1, "seconds": 1.0, "memory": 0.5, "dataset": "x", "backbone": "y"}
    results = [("", result | {"test_class_accuracy": 40.0}), ("", result)]
    train.compare(results, tmp_path / "c")
    row = capsys.readouterr().out.splitlines()[2]
    assert row.split()[:7] == ["head", "5", "50.00", "±", "0.00", "-", "-"]


def test_comparison(run, tiny_weights, tmp_path):
    """A comparison writes a run per method and seed, a table, a CSV and a picture, and resumes."""
    methods = ("adaptertune", "vpt", "head")
    common = ["--weights", tiny_weights, "--epochs", 2, "--limit", 60, "--seeds", "0,1"]
    common += ["--method", *methods]
    out = run(*common)
    folders = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    names = set()
    for name in ("adaptertune-r8", "vpt-p10", "head"):
        names |= {f"digits-{name}-n60-s0", f"digits-{name}-n60-s1"}
    assert folders == names

    rows = read_csv(tmp_path / "runs/digits-comparison.csv")
    assert [row["method"] for row in rows] == [*("adaptertune",) * 2, *("vpt",) * 2, *("head",) * 2]
    assert [row["seed"] for row in rows] == ["0", "1"] * 3
    for method, trained in zip(methods, ("1,434", "970", "330"), strict=True):
        first, second = (float(row["test_accuracy"]) for row in rows if row["method"] == method)
        mean = (first + second) / 2
        spread = abs(first - second) / 2**0.5
        assert re.search(rf"^{method} +{trained} +{mean:.2f} ± {spread:.2f} ", out, re.M)
    texts = check_picture(tmp_path / "runs/digits-comparison.svg")
    if texts is not None:  # with matplotlib
        assert {"adaptertune (1,434)", "vpt (970)", "head (330)"} <= set(texts)
        assert "1,000" in texts  # of the axis

    again = run(*common, "--resume")  # finished runs aren't run again
    assert again.count("finished before") == 6
    table = out[out.rindex("trained") :]
    assert again[again.rindex("trained") :] == table

    first = (tmp_path / "runs/digits-comparison.csv").read_text()
    assert "saved    runs/digits-comparison-2.csv" in run(*common[:-1])  # of fewer methods
    assert (tmp_path / "runs/digits-comparison.csv").read_text() == first
    assert len(read_csv(tmp_path / "runs/digits-comparison-2.csv")) == 4


def test_sweep_over_ranks(run, tiny_weights, tmp_path):
    """The elbow is the lowest rank within a standard error of the best."""
    common = ["--weights", tiny_weights, "--epochs", 1, "--limit", 60]
    out = run(*common, "--ranks", "1,2,8", "--seeds", "0,1")
    rows = read_csv(tmp_path / "runs/digits-comparison.csv")
    means = {}
    errors = {}
    for rank in (1, 2, 8):
        found = [float(row["val_accuracy"]) for row in rows if row["rank"] == str(rank)]
        means[rank] = statistics.mean(found)
        errors[rank] = statistics.stdev(found) / 2**0.5  # of two seeds
    best = max(means, key=means.get)
    within = [rank for rank in means if means[rank] >= means[best] - errors[best]]
    assert (
        f"elbow    rank {min(within)}, the least within a standard error "
        f"({errors[best]:.2f}) of the best (rank {best}), by val accuracy" in out
    )
    texts = check_picture(tmp_path / "runs/digits-comparison.svg")
    if texts is not None:  # with matplotlib
        assert {"1", "2", "8", f"elbow by validation: rank {min(within)}"} <= set(texts)


@pytest.mark.usefixtures("no_matplotlib")
def test_grid(run, tiny_weights, tmp_path):
    """Placements and inits are combined with each other; a method without them runs once."""
    common = ["--weights", tiny_weights, "--epochs", 1, "--limit", 60, "--name", "g"]
    grid = ["--blocks", "first1", "last1", "--init", "zero", "small"]
    out = run(*common, "--method", "adaptertune,head", *grid)
    assert len(accuracies_on_test(out)) == 5
    folders = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert folders == {
        "g-adaptertune-blocks-0-zero",
        "g-adaptertune-blocks-0-small",
        "g-adaptertune-blocks--1-zero",
        "g-adaptertune-blocks--1-small",
        "g-head",
    }
    assert [row["label"] for row in read_csv(tmp_path / "runs/g-comparison.csv")] == [
        "adaptertune blocks 0 zero",
        "adaptertune blocks 0 small",
        "adaptertune blocks -1 zero",
        "adaptertune blocks -1 small",
        "head",
    ]
    tensors = load_file(tmp_path / "runs/g-adaptertune-blocks--1-small/adapters.safetensors")
    assert "blocks.1.adapter.up.weight" in tensors
    assert "blocks.0.adapter.up.weight" not in tensors
    stated = read_result(tmp_path / "runs/g-head")["test_accuracy"]
    assert accuracies_on_test(run("--eval", "runs/g-head")) == [f"{stated:.2f}"]


@pytest.mark.parametrize("chosen_on", ["val", "test"])
@pytest.mark.parametrize(
    ("accuracies_of", "elbow"),
    [
        ({1: [80, 81], 2: [88.9, 89.1], 4: [89, 91]}, 2),
        ({1: [80, 81], 2: [88.8, 89], 4: [89, 91]}, 4),
        ({1: [90, 90], 2: [80, 81], 4: [89, 90]}, 1),
    ],
)
def test_the_elbow_is_within_a_standard_error_of_the_best(
    capsys, tmp_path, accuracies_of, elbow, chosen_on
):
    """The elbow allows one standard error, which is 1 for two seeds that lie 2 apart. It is chosen
    on validation, and on test only without validation images."""
    common = {"method": "adaptertune", "dataset": "d", "backbone": "b", "trained": 9}
    common |= {"lr": 2.5e-4, "seconds": 1.0, "memory": 0.1, "epoch": 1}
    results = []
    for rank, accuracies in accuracies_of.items():
        for seed, accuracy in enumerate(accuracies):
            own = {"rank": rank, "seed": seed, f"{chosen_on}_accuracy": float(accuracy)}
            if chosen_on == "val":
                own["test_accuracy"] = float(seed)  # the same for every rank
            else:
                own["val_accuracy"] = None
            results.append((f"rank {rank}", common | own))
    train.compare(results, tmp_path / "c")
    out = capsys.readouterr().out
    assert f"elbow    rank {elbow}, the least within a standard error" in out
    assert f", by {chosen_on} accuracy\n" in out
    assert " 0.00025 " in out  # the rate, in full


def test_rates_that_follow_each_runs_features(capsys, tmp_path):
    """Where the seeds have other learning rates, the table shows the lowest and the highest."""
    results = []
    for method, rates in (("head", (0.0031, 0.0029, 0.003)), ("full", (1e-4,) * 3)):
        for rate in rates:
            row = {"method": method, "dataset": "d", "backbone": "b", "trained": 9, "lr": rate}
            row |= {"seconds": 1.0, "memory": 0.1, "test_accuracy": 80.0, "val_accuracy": 80.0}
            results.append((method, row))
    train.compare(results, tmp_path / "c")
    header, head, full = capsys.readouterr().out.splitlines()[1:4]
    assert " 0.0029 to 0.0031 " in head
    assert re.search(r" 0\.0001  +0:01 ", full)
    assert len(header) == len(head) == len(full)


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.usefixtures("no_matplotlib", "no_sklearn")
def test_without_matplotlib_pictures_are_left_out(run, tiny_weights, tmp_path):
    """A line names each picture that is left out, and what to install; all else is unchanged."""
    common = ["--weights", tiny_weights, "--limit", 60, "--epochs", 1, "--seeds", "0,1"]
    out = run(*common, "--plot", "features", "--name", "p")
    lines = [line for line in out.splitlines() if line.startswith("pictures")]
    left_out = [
        "runs/p-s0/curves.svg, runs/p-s0/mistakes.png",
        "runs/p-s1/curves.svg, runs/p-s1/mistakes.png",
        "runs/p-comparison.svg",
        "runs/p-s0/test-features.svg, runs/p-s0/test-confusion.svg",
    ]
    expected = [
        f"pictures {each} left out; to have them in later runs: pip install matplotlib"
        for each in left_out
    ]
    assert lines == expected
    assert not list(tmp_path.rglob("*.svg"))
    assert (tmp_path / "runs/p-s0/test-features.csv").exists()
    assert (tmp_path / "runs/p-comparison.csv").exists()


def confusion_of(run):
    """Counts [10, 10] of a run's test images by label and prediction, computed here."""
    counts = np.zeros((10, 10), dtype=int)
    run.model.eval()
    with torch.no_grad():
        for x, labels in run.batches.eval(run.dataset.test, run.dataset.center):
            predictions = run.logits(x).argmax(dim=1)
            np.add.at(counts, (labels.numpy(), predictions.numpy()), 1)
    return counts


@pytest.mark.usefixtures("no_matplotlib", "no_sklearn")
def test_predictions_and_mistakes(run, tiny_weights, tmp_path):
    """--plot features writes all test images of all runs to a CSV and prints the worst mistakes."""
    common = ["--weights", tiny_weights, "--epochs", 1, "--limit", 60, "--plot", "features"]
    out = run(*common, "--method", "adaptertune", "head", "--name", "p")
    rows = read_csv(tmp_path / "runs/p-features.csv")
    assert list(rows[0]) == ["run", "image", "label", "prediction", "x", "y"]
    for method, name in (("adaptertune", "adaptertune rank 8"), ("head", "head")):
        counts = confusion_of(open_run(tmp_path / f"runs/p-{method}"))
        of_run = [row for row in rows if row["run"].startswith(f"{name}, ")]
        listed = json.loads((tmp_path / f"runs/p-{method}/split.json").read_text())
        assert [row["image"] for row in of_run] == listed["test"]
        found = np.zeros((10, 10), dtype=int)
        for row in of_run:
            found[int(row["label"]), int(row["prediction"])] += 1
            assert math.isfinite(float(row["x"]) + float(row["y"]))
        assert np.array_equal(found, counts)

        pattern = rf"^mistaken {name}, seed 0: (\d+) of (\d+) images of '(\d)' for '(\d)'$"
        shown = np.array(re.findall(pattern, out, re.M), dtype=int)
        wrong = counts - np.diag(counts.diagonal())
        assert shown[:, 0].tolist() == sorted(wrong.flatten(), reverse=True)[:3]
        for number, total, label, prediction in shown:
            assert wrong[label, prediction] == number
            assert counts[label].sum() == total


@pytest.mark.parametrize("how", ["t-SNE", "two principal components"])
def test_pictures_of_features_and_confusion(run, tiny_weights, tmp_path, request, how):
    """Pictures have a panel per run, with its classes or its confusion matrix in percent."""
    pytest.importorskip("matplotlib")
    if how == "t-SNE":
        pytest.importorskip("sklearn")
    else:
        request.getfixturevalue("no_sklearn")
    common = ["--weights", tiny_weights, "--epochs", 1, "--limit", 60, "--plot", "features"]
    common += ["--test-share", 0.05]  # a small test set, which t-SNE is quick with
    out = run(*common, "--method", "adaptertune", "head", "--name", "p")
    assert "saved    runs/p-features.svg" in out
    assert "saved    runs/p-confusion.svg" in out
    digits = [str(digit) for digit in range(10)]
    features = texts_of(tmp_path / "runs/p-features.svg")
    confusion = texts_of(tmp_path / "runs/p-confusion.svg")
    assert set(digits) <= set(features)
    numbers = []
    for method, name in (("adaptertune", "adaptertune rank 8"), ("head", "head")):
        accuracy = read_result(tmp_path / f"runs/p-{method}")["test_accuracy"]
        title = f"{name}, seed 0, {accuracy:.2f} %"
        assert f"{title} ({how})" in features
        assert title in confusion
        counts = confusion_of(open_run(tmp_path / f"runs/p-{method}"))
        shares = (100 * counts / counts.sum(axis=1, keepdims=True)).round().astype(int)
        rows = [f"{digit} ({n})" for digit, n in zip(digits, counts.sum(axis=1), strict=True)]
        assert set(rows) <= set(confusion)
        numbers += [*digits, *map(str, shares[shares > 0])]
    assert sorted(text for text in confusion if text.isdigit()) == sorted(numbers)

    again = run("--eval", "runs/p-head", "--plot", "features")
    assert again.count("saved") == 5  # predictions and mistakes, and these
    for name in ("features.svg", "confusion.svg", "features.csv"):
        assert (tmp_path / f"runs/p-head/test-{name}").exists()


@pytest.mark.usefixtures("no_sklearn")
def test_principal_components():
    """Features in a plane keep their distances; the widest direction is x."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    points[:, 1] *= 5
    plane = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    plane, _ = torch.linalg.qr(plane)  # [8, 2], orthonormal columns
    found, how = train.to_two_dimensions(points @ plane.T + 3)
    assert how == "two principal components"
    assert torch.allclose(torch.cdist(found, found), torch.cdist(points, points), atol=1e-6)
    assert found[:, 0].std() > found[:, 1].std()
    one, how = train.to_two_dimensions(torch.randn(1, 8))
    assert (one.shape, how) == ((1, 2), "one image")


# ------------------------------------------------------------------------------------ the graph


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "clip-adapter"],
        ["--method", "clip-adapter", "--ratio", 0, "--text-ratio", 0.5],
        ["--method", "clip-adapter", "--text-ratio", 0.5, "--learn-ratio"],
        ["--method", "zero-shot"],
        ["--method", "vpt", "--prompts", 3],
        ["--method", "vpt", "--shallow"],
    ],
    ids=lambda options: " ".join(map(str, options[1:])),
)
@pytest.mark.usefixtures("no_matplotlib")
def test_every_method_exports(run, clip, tmp_path, options, capsys):
    """The graph agrees with torch; the text adapter is folded into the class matrix."""
    run("--weights", clip, "--shots", 4, "--epochs", 2, "--name", "m", *options)
    to_file = runner(export.main, capsys)
    pixels = ["--opset", 23, "--input", "uint8", "--output", "probabilities"]
    for more in (["--opset", 17], pixels, ["--output", "embedding"]):
        out = to_file("runs/m", "--images", 0, *more)
        assert "top-1 agreement 100 % ok" in out
    to_file("runs/m")
    import onnx

    to_file("runs/m", "--precision", "fp16", "--force", "-o", "fp16.onnx")
    props = onnx.load("fp16.onnx").metadata_props
    stated = [prop.key for prop in props if prop.key.endswith("accuracy")]
    assert stated
    assert all(key.startswith("fp32_") for key in stated)
    graph = onnx.load(tmp_path / "runs/m/model.onnx").graph
    names = [node.name for node in graph.node]
    assert not [name for name in names if "text" in name]
    has_image_adapter = "clip-adapter" in options and "--ratio" not in options
    assert ("head.image" in names) == has_image_adapter
    assert "export it without --swappable" in to_file("runs/m", "--swappable", status=1)
