"""The neighbours: CLIP-Adapter, zero-shot, prototypes, VPT, AdaptFormer's files; few shots, cached features, pictures."""
import csv
import json
import re
import signal
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import runner, write_tiny, write_tiny_clip
from safetensors.torch import load_file, save_file
from torch import nn

import adaptertune
import cli
import data
import export
import train
import vit

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs train.py's main in an empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(tmp_path / "cache"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield runner(train.main, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


# ------------------------------------------------------------------------------------------------------------ CLIP-Adapter


def clip_head(**options):
    """A ClipHead whose every tensor is random."""
    torch.manual_seed(0)
    head = adaptertune.ClipHead(torch.randn(24, 32), 7, rank=6, **options).double()
    head.classes = torch.randn(7, 24, dtype=torch.float64)
    return head


def by_the_paper(head, x, a, b):
    """Equations 4 to 7 of https://arxiv.org/abs/2110.04544, with CLIP's cosines."""
    f, W = x @ head.projection.T, head.classes
    if head.image is not None:
        f = a * (f @ head.image[0].weight.T).clamp(min=0).matmul(head.image[2].weight.T).clamp(min=0) + (1 - a) * f
    if head.text is not None:
        W = b * (W @ head.text[0].weight.T).clamp(min=0).matmul(head.text[2].weight.T).clamp(min=0) + (1 - b) * W
    return 100 * (f / f.norm(dim=1, keepdim=True)) @ (W / W.norm(dim=1, keepdim=True)).T


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("a", "b"), [(0.2, 0), (0, 0.6), (0.3, 0.5), (0, 0)])
def test_clip_adapter_is_the_papers(a, b, learn):
    """Logits, and the gradient of every trained number."""
    head, x = clip_head(ratio=a, text_ratio=b, learn_ratio=learn), torch.randn(5, 32, dtype=torch.float64)
    parameters = dict(head.named_parameters())
    assert set(parameters) == {f"{side}.{i}.weight" for side, r in (("image", a), ("text", b)) for i in (0, 2) if r} | {
        f"{side}_ratio" for side, r in (("image", a), ("text", b)) if r and learn}
    ours, expected = head(x), by_the_paper(head, x, head.image_ratio, head.text_ratio)
    assert torch.allclose(ours, expected, atol=1e-10)
    if parameters:
        for got, wanted in zip(*(torch.autograd.grad(y.square().sum(), list(parameters.values())) for y in (ours, expected)),
                               strict=True):
            assert torch.allclose(got, wanted, rtol=1e-8)
            assert got.abs().max() > 0


def test_ratio_0_is_zero_shot_bit_for_bit():
    head, plain, x = clip_head(ratio=0.2, text_ratio=0.3), clip_head(), torch.randn(5, 32, dtype=torch.float64)
    plain.classes = head.classes
    assert not torch.equal(head(x), plain(x))
    head.image_ratio = head.text_ratio = 0.0
    assert torch.equal(head(x), plain(x))


def test_prototypes_are_class_means():
    embeddings, labels = torch.randn(8, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    found = adaptertune.prototypes(embeddings, labels)
    assert torch.allclose(found[2], (embeddings[2] / embeddings[2].norm() + embeddings[5] / embeddings[5].norm()) / 2)
    assert found.shape == (3, 5)


@pytest.mark.parametrize("weights", ["both", "two files"])
def test_clip_on_the_command_line(run, clip, tmp_path, monkeypatch, weights):
    """Class names become embeddings; zero-shot is printed first and is what zero-shot alone gives; the file is enough later."""
    options = ["--weights", clip]
    if weights == "two files":
        (tmp_path / "image").mkdir()
        options = ["--weights", write_tiny_clip(tmp_path / "image", text=False), "--text-weights", clip]
    common = [*options, "--shots", 2, "--epochs", 3]
    out = run(*common, "--method", "zero-shot", "clip-adapter", "--text-ratio", 0.3, "--learn-ratio", "--name", "c")
    stated = re.findall(r"^zeroshot ([\d.]+) %", out, re.M)
    tests = re.findall(r"^test +([\d.]+) %", out, re.M)
    assert stated[0] == stated[1] == tests[0]
    assert "20 of 1,438 train / 20 val / 359 test" in out
    assert re.search(r"^test .*\(nothing to choose\)$", out, re.M)
    tensors = load_file(tmp_path / "runs/c-clip-adapter/adapters.safetensors")
    assert set(tensors) == {"head.classes", "head.scale", "head.image_ratio", "head.text_ratio",
                            *(f"head.{side}.{i}.weight" for side in ("image", "text") for i in (0, 2))}
    assert tensors["head.image.0.weight"].shape == (6, 24)  # a quarter of the embedding
    tower, scale = vit.load_text(clip)
    sentences = [f'a photo of the number: "{i}".' for i in range(10)]
    tokenizer = adaptertune.Tokenizer(clip.with_name("merges.txt"))
    assert torch.allclose(tensors["head.classes"], tower(tokenizer(sentences)), atol=1e-6)
    assert tensors["head.scale"].item() == pytest.approx(scale) == pytest.approx(20.0855, abs=1e-3)
    monkeypatch.setattr(vit, "load_text", None)  # not needed any more
    stated = json.loads((tmp_path / "runs/c-clip-adapter/result.json").read_text())["test_accuracy"]
    assert f"test     {stated:.2f} %" in run("--eval", "runs/c-clip-adapter")
    assert run("--eval", "runs/c-zero-shot").rstrip().endswith(f"(its file says {tests[0]} %)")


def test_another_vocabulary_is_refused(run, clip, tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd i\n")
    error = run("--weights", clip, "--method", "zero-shot", "--vocab", tmp_path / "merges.txt", status=1)
    assert re.search(r"merges.txt has 515 ids, .*clip.safetensors 522; give its --vocab", error)


def test_template(run, clip, tmp_path):
    run("--weights", clip, "--method", "zero-shot", "--template", "digit {}, photo", "--name", "t")
    tower, tokens = vit.load_text(clip)[0], adaptertune.Tokenizer(clip.with_name("merges.txt"))
    found = load_file(tmp_path / "runs/t/adapters.safetensors")["head.classes"]
    assert torch.allclose(found, tower(tokens([f"digit {i}, photo" for i in range(10)])), atol=1e-6)
    assert "has no {}" in run("--weights", clip, "--method", "zero-shot", "--template", "digits", "--name", "u", status=1)
    assert data.sentences("oxford", ["sea_horse"]) == ["a photo of a sea horse."]
    assert data.sentences("flowers12", ["rose"]) == ["a photo of a rose, a type of flower."]


def test_prototypes_need_no_text(run, tmp_path):
    weights = write_tiny_clip(tmp_path, text=False)
    (tmp_path / "merges.txt").unlink()
    out = run("--weights", weights, "--method", "zero-shot", "--classifier", "prototypes", "--shots", 4)
    model, backbone = vit.load(weights, head=True)
    images = data.split(data.read("digits"), seed=0, shots=4)
    batches = data.Batches(16, backbone.norm, 50, torch.device("cpu"))
    with torch.no_grad():
        train_x, test_x = (torch.cat([model(x) for x, _ in batches.eval(part, 1.0)]) for part in (images.train, images.test))
        means = torch.stack([F.normalize(train_x[images.train.labels == i], dim=1).mean(0) for i in range(10)])
        right = (F.cosine_similarity(test_x[:, None], means, dim=2).argmax(1) == images.test.labels).float().mean()
    assert f"test     {100 * right:.2f} %" in out
    features = sorted((tmp_path / "cache").rglob("*"))
    error = run("--weights", weights, "--method", "zero-shot", "--name", "text", "--shots", 5, status=1)
    assert sorted((tmp_path / "cache").rglob("*")) == features  # an error before what takes long
    assert "no text tower" in error
    assert "--classifier prototypes" in error


def test_clip_methods_want_clip(run, tiny_weights):
    for method in ("zero-shot", "clip-adapter"):
        assert "choose a clip_* --backbone" in run("--weights", tiny_weights, "--method", method, status=1)


# ----------------------------------------------------------------------------------------------- few shots, cached features


def test_shots_are_drawn_by_class_and_seed():
    images = data.read("digits")
    first, again, other = (data.split(images, seed=seed, shots=3) for seed in (0, 0, 1))
    for part, count in ((first.train, 3), (first.val, 3)):
        assert torch.bincount(part.labels).tolist() == [count] * 10
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)
    assert torch.equal(first.test.pixels, other.test.pixels)
    everyone = {image.numpy().tobytes() for image in (*first.train.pixels, *first.val.pixels)}
    assert len(everyone) == 60
    assert torch.bincount(data.split(images, shots=9).val.labels).tolist() == [4] * 10
    with pytest.raises(ValueError, match="--shots 500: a class of digits has fewer"):
        data.split(images, shots=500)


def test_test_share_is_drawn_by_seed():
    images = data.read("digits")
    one, two = (data.split(images, seed=seed, test_share=0.5) for seed in (0, 1))
    assert len(one.test) == 898
    assert not torch.equal(one.test.labels, two.test.labels)


def test_no_image_left_for_val(run, photos, tiny_weights, tmp_path):
    """All pool images are shots: the last epoch is kept, and the report says so."""
    out = run("--dataset", photos, "--weights", tiny_weights, "--test-share", 0.5, "--shots", 10, "--epochs", 2, "--name", "a")
    assert "data     photos: 30 train / 0 val / 30 test, 3 classes" in out
    assert re.search(r"\(epoch 2, the last, no image being left for val; test read once\)", out)
    assert "<polyline" in (tmp_path / "runs/a/curves.svg").read_text()
    assert json.loads((tmp_path / "runs/a/result.json").read_text())["val_accuracy"] is None


def test_features_are_computed_once(run, tiny_weights, tmp_path, monkeypatch):
    """The second run reads them from disk; the accuracy is the one that the images give."""
    common = ["--weights", tiny_weights, "--method", "head", "--cached", "--shots", 5, "--epochs", 5]
    out = run(*common, "--name", "a")
    count = len(list((tmp_path / "cache/features").iterdir()))
    assert count == 3
    with monkeypatch.context() as patch:
        patch.setattr(vit.ViT, "features", None)
        again = run(*common, "--lr", 0.02, "--name", "b")
    assert re.search(r"^test", again, re.M)
    test = re.search(r"^test +([\d.]+)", out, re.M)[1]
    assert f"test     {test} %" in run("--eval", "runs/a")
    other = write_tiny(tmp_path / "other.safetensors", seed=1)
    run("--weights", other, *common[2:], "--name", "c")
    assert len(list((tmp_path / "cache/features").iterdir())) == 2 * count  # another backbone, other features


# ---------------------------------------------------------------------------------------------------- VPT, AdaptFormer's files


@pytest.mark.parametrize("changes", [{}, {"registers": 2, "pool": "mean"}, {"norm_pre": True, "quick_gelu": True}])
@pytest.mark.parametrize("deep", [True, False])
def test_vpt_is_the_papers(tmp_path, deep, changes):
    """Equations 4 to 8 of https://arxiv.org/abs/2203.12119: prompts between the class token and the patches, new ones in each
    block (deep) or carried on (shallow). Outputs and gradients."""
    model, _ = vit.load(write_tiny(tmp_path / "w.safetensors", seed=0, **changes))
    torch.manual_seed(0)
    adaptertune.add_prompts(model, prompts=5, deep=deep)
    model = model.double()
    x, P = model.embed(IMAGES.double()), 5
    for i, block in enumerate(model.blocks):
        if i == 0 or deep:
            x = torch.cat([x[:, :1], block.prompts.expand(3, -1, -1), x[:, 1 + (P if i else 0):]], dim=1)
        x = block(x)
    R = model.config.registers
    expected = model.norm(x[:, 0] if model.config.pool == "token" else x[:, 1 + P + R:].mean(dim=1))
    found = model.features(IMAGES.double())
    assert torch.allclose(found, expected, atol=1e-10)
    adaptertune.freeze(model)
    parameters = list(adaptertune.trained(model).values())
    assert [p.shape for p in parameters] == [(5, 32)] * (2 if deep else 1)
    for got, wanted in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)), strict=True):
        assert torch.allclose(got, wanted, atol=1e-9)
        assert got.abs().max() > 0


def test_prompts_start_where_vpts_do(tiny_weights):
    model, _ = vit.load(tiny_weights)
    adaptertune.add_prompts(model, prompts=200, deep=True)
    bound = (6 / (3 * 4 * 4 + 32)) ** 0.5
    assert 0.95 * bound < model.blocks[1].prompts.abs().max() <= bound
    with pytest.raises(ValueError, match="at least one"):
        adaptertune.add_prompts(model, prompts=0, deep=True)


class PublishedAdapter(nn.Module):
    """An AdaptFormer block's `adaptmlp` as its code has it (names, order, scale), written from the paper's equation 2."""

    def __init__(self, width, rank):
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(width, rank), nn.Linear(rank, width)
        self.scale = nn.Parameter(torch.ones(1) * 0.3)

    def forward(self, x):
        return self.scale * self.up_proj(F.relu(self.down_proj(x)))


def test_adaptformers_published_files_load(run, tiny_weights, tmp_path):
    """As --init FILE, with the function that they had; our own files too; a wrong rank is an error."""
    torch.manual_seed(0)
    published = {f"blocks.{i}.adaptmlp.{name}": value.detach() for i in (0, 1)
                 for name, value in PublishedAdapter(32, 4).named_parameters()}
    torch.save({"model": published | {"head.weight": torch.zeros(5, 32)}}, tmp_path / "published.pth")
    model, _ = vit.load(tiny_weights)
    adaptertune.add_adapters(model, method="adaptformer", placement=[0, 1], rank=4, reads="raw", act="relu", learn_scale=True)
    adaptertune.start_from(model, published)
    theirs, x = PublishedAdapter(32, 4), torch.randn(2, 3, 32)
    theirs.load_state_dict({name.split("adaptmlp.")[1]: value for name, value in published.items() if "blocks.1" in name})
    assert torch.allclose(model.blocks[1].adapter(x), theirs(x), atol=1e-6)
    common = ["--weights", tiny_weights, "--method", "adaptformer", "--rank", 4, "--epochs", 1, "--limit", 64, "--learn-scale"]
    run(*common, "--init", tmp_path / "published.pth", "--lr", 1e-9, "--name", "a")
    tensors = load_file(tmp_path / "runs/a/adapters.safetensors")
    assert torch.allclose(tensors["blocks.0.adapter.up.weight"], published["blocks.0.adaptmlp.up_proj.weight"], atol=1e-6)
    run(*common, "--init", tmp_path / "runs/a/adapters.safetensors", "--lr", 1e-9, "--name", "b")
    again = load_file(tmp_path / "runs/b/adapters.safetensors")
    assert torch.allclose(again["blocks.1.adapter.up.weight"], tensors["blocks.1.adapter.up.weight"], atol=1e-6)
    error = run(*common, "--rank", 8, "--init", tmp_path / "published.pth", "--name", "c", status=1)
    assert "of the right shape" in error


# --------------------------------------------------------------------------------------------------- comparisons, pictures


def parsed(path):
    """An SVG's root; it must be well-formed XML and have no number that isn't one."""
    assert "nan" not in path.read_text()
    return ElementTree.fromstring(path.read_text())


def test_comparison(run, tiny_weights, tmp_path):
    """A run for each method and seed, one table, the same figures in CSV, a picture; finished runs aren't run again."""
    common = ["--weights", tiny_weights, "--epochs", 2, "--limit", 60, "--seeds", "0,1"]
    common += ["--method", "adaptertune", "vpt", "head"]
    out = run(*common)
    names = {f"digits-{method}-n60-s{seed}" for method in ("adaptertune-r8", "vpt-p10", "head") for seed in (0, 1)}
    assert {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()} == names
    rows = list(csv.DictReader((tmp_path / "runs/digits-comparison.csv").open()))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("adaptertune", "vpt", "head") for s in "01"]
    for name, trained in (("adaptertune", "1,434"), ("vpt", "970"), ("head", "330")):
        tests = [float(row["test_accuracy"]) for row in rows if row["method"] == name]
        mean, spread = sum(tests) / 2, abs(tests[0] - tests[1]) / 2 ** 0.5
        assert re.search(rf"^{name} +{trained} +{mean:.2f} ± {spread:.2f} ", out, re.M), (name, out)
    assert len(parsed(tmp_path / "runs/digits-comparison.svg").findall(".//{*}circle")) == 3
    again = run(*common, "--resume")
    assert again.count("finished before") == 6
    assert again.splitlines()[-6:] == out.splitlines()[-6:]


def test_sweep(run, tiny_weights, tmp_path):
    """Ranks, placements and inits with each other; methods without them run once; the elbow by its rule."""
    common = ["--weights", tiny_weights, "--epochs", 1, "--limit", 60]
    out = run(*common, "--ranks", "1,2,8", "--seeds", "0,1")
    rows = list(csv.DictReader((tmp_path / "runs/digits-comparison.csv").open()))
    tests = {rank: [float(row["test_accuracy"]) for row in rows if row["rank"] == rank] for rank in ("1", "2", "8")}
    means = {int(rank): sum(values) / 2 for rank, values in tests.items()}
    best = max(means, key=means.get)
    error = abs(tests[str(best)][0] - tests[str(best)][1]) / 2  # of two: their spread / sqrt 2, that again / sqrt 2
    elbow = min(rank for rank, mean in means.items() if mean >= means[best] - error)
    assert f"elbow    rank {elbow}, the least within a standard error ({error:.2f}) of the best (rank {best})" in out
    picture = parsed(tmp_path / "runs/digits-comparison.svg")
    assert [each.text for each in picture.findall(".//{*}text")][-4:-1] == ["1", "2", "8"]
    out = run(*common, "--method", "adaptertune", "head", "--blocks", "first1", "last1", "--init", "zero,small", "--name", "g")
    folders = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir() and path.name.startswith("g-")}
    assert folders == {"g-adaptertune-blocks-0-zero", "g-adaptertune-blocks-0-small", "g-adaptertune-blocks--1-zero",
                       "g-adaptertune-blocks--1-small", "g-head"}
    assert out.count("test     ") == 5
    rows = list(csv.DictReader((tmp_path / "runs/g-comparison.csv").open()))
    assert [row["label"] for row in rows] == ["adaptertune blocks [0] zero", "adaptertune blocks [0] small",
                                              "adaptertune blocks [-1] zero", "adaptertune blocks [-1] small", "head"]
    tensors = load_file(tmp_path / "runs/g-adaptertune-blocks--1-small/adapters.safetensors")
    assert "blocks.1.adapter.up.weight" in tensors
    assert "blocks.0.adapter.up.weight" not in tensors
    assert f"test     {json.loads((tmp_path / 'runs/g-head/result.json').read_text())['test_accuracy']:.2f} %" in run(
        "--eval", "runs/g-head")


@pytest.mark.parametrize(("tests", "elbow"), [
    ({1: [80, 81], 2: [88.9, 89.1], 4: [89, 91]}, 2), ({1: [80, 81], 2: [88.8, 89], 4: [89, 91]}, 4),
    ({1: [90, 90], 2: [80, 81], 4: [89, 90]}, 1)])
def test_the_elbow_is_within_a_standard_error_of_the_best(capsys, tmp_path, tests, elbow):
    """Of two seeds that lie 2 apart the standard error is 1."""
    common = {"method": "adaptertune", "dataset": "d", "backbone": "b", "trained": 9, "val_accuracy": 1.0, "lr": 1e-3,
              "seconds": 1.0, "memory": 0.1, "epoch": 1}
    results = [(f"rank {rank}", common | {"rank": rank, "seed": seed, "test_accuracy": float(test)})
               for rank, both in tests.items() for seed, test in enumerate(both)]
    cli.compare(results, tmp_path / "c")
    assert f"elbow    rank {elbow}, the least within a standard error" in capsys.readouterr().out


@pytest.mark.parametrize("tsne", [True, False])
def test_pictures_of_features_and_confusion(run, tiny_weights, tmp_path, monkeypatch, tsne):
    if tsne:
        pytest.importorskip("sklearn")
    else:
        monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    out = run("--weights", tiny_weights, "--method", "adaptertune", "head", "--epochs", 1, "--limit", 60, "--plot", "features",
              "--name", "p")
    features, confusion = (parsed(tmp_path / f"runs/p-{what}.svg") for what in ("features", "confusion"))
    assert len(features.findall(".//{*}circle")) == 2 * 359
    assert len({each.get("fill") for each in features.findall(".//{*}circle")}) == 10
    run_ = train.open_run(cli.parse(["--eval", "runs/p-head"])[0])
    with torch.no_grad():
        answers = torch.cat([run_.model.eval()(x).argmax(1) for x, _ in run_.batches.eval(run_.data.test, 1.0)])
    counts = torch.zeros(10, 10).long().index_put_((run_.data.test.labels, answers), torch.tensor(1), accumulate=True)
    wrong = counts - counts.diag().diag()
    shown = re.findall(r"^mistaken head: (\d+) of (\d+) images of '(\d)' for '(\d)'$", out, re.M)
    assert len(shown) == 3
    assert all(wrong[int(i), int(k)] == int(n) and counts[int(i)].sum() == int(of) for n, of, i, k in shown)
    assert [int(n) for n, *_ in shown] == wrong.flatten().sort(descending=True)[0][:3].tolist()
    cells = [each for each in confusion.findall(".//{*}rect") if each.get("fill-opacity")]
    assert len(cells) > int((counts > 0).sum())  # and those of the other method
    assert run("--eval", "runs/p-head", "--plot", "features").count("saved") == 2
    assert (tmp_path / "runs/p-head/test-features.svg").exists()


def test_axes_are_round():
    assert cli.Axis([0.0, 100.0], 0, 300).ticks() == [0, 20, 40, 60, 80, 100]
    assert cli.Axis([93.1, 98.9], 0, 300).ticks() == [94, 96, 98]
    assert cli.Axis([1300, 800000], 0, 300, log=True).ticks() == [1000, 10000, 100000, 1000000]
    axis = cli.Axis([0.0, 10.0], 50, 100)
    assert 50 < axis(0) < axis(5) == 100 < axis(10) < 150
    assert cli.Axis([5.0], 0, 100)(5.0) == 50


# -------------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("options", [
    ["--method", "clip-adapter"], ["--method", "clip-adapter", "--ratio", 0, "--text-ratio", 0.5],
    ["--method", "clip-adapter", "--text-ratio", 0.5, "--learn-ratio"], ["--method", "zero-shot"],
    ["--method", "vpt", "--prompts", 3], ["--method", "vpt", "--shallow"]], ids=lambda options: "".join(map(str, options)))
def test_every_method_exports(run, clip, tmp_path, options, capsys):
    """With the same check against torch; the text adapter folds into the class matrix, so its graph is that of zero-shot."""
    run("--weights", clip, "--shots", 4, "--epochs", 2, "--name", "m", *options)
    to_file = runner(export.main, capsys)
    for more in (["--opset", 17], ["--opset", 23, "--input", "uint8", "--output", "probabilities"], ["--output", "embedding"]):
        assert "top-1 agreement 100 % ok" in to_file("runs/m", "--images", 0, *more)
    to_file("runs/m")
    import onnx
    names = [node.name for node in onnx.load(tmp_path / "runs/m/model.onnx").graph.node]
    assert not [name for name in names if "text" in name]
    assert ("head.image" in names) == ("clip-adapter" in options and "--ratio" not in options)
    assert "export it without --swappable" in to_file("runs/m", "--swappable", status=1)


def test_start_from_names_what_is_missing(tiny_weights, tmp_path):
    model, _ = vit.load(tiny_weights)
    adaptertune.add_adapters(model, placement=[0, 1], rank=4)
    save_file({"blocks.0.adapter.up.bias": torch.zeros(32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no blocks.0.adapter.down.weight"):
        adaptertune.start_from(model, load_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["clip_b16", "clip_b16_laion"])
def test_clip_from_the_hub(run, clip, server, monkeypatch, tmp_path, name):
    """A backbone by name: both towers and the vocabulary are fetched once from its repository. LAION's have GELU in both."""
    row, config = vit.BACKBONES[name], vit.load(clip)[1].config
    monkeypatch.setitem(vit.BACKBONES, name, replace(row, config=replace(config, quick_gelu=row.config.quick_gelu)))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    repository = f"/{row.repo}/resolve/main/"
    server.files = {f"{repository}model.safetensors": clip.read_bytes(),
                    f"{repository}merges.txt": clip.with_name("merges.txt").read_bytes()}
    common = ["--backbone", name, "--method", "zero-shot"]
    out = run(*common, "--name", "a")
    assert [path for path, _ in server.seen] == list(server.files)
    assert re.search(r"^test", run(*common, "--offline", "--name", "b"), re.M)
    assert len(server.seen) == 2
    test = re.search(r"^test +[\d.]+ %", out, re.M)[0]
    assert test in run("--weights", clip, "--method", "zero-shot", "--name", "c") or name != "clip_b16"
    by_name, by_file = (load_file(tmp_path / f"runs/{each}/adapters.safetensors")["head.classes"] for each in "ac")
    assert torch.equal(by_name, by_file) == (name == "clip_b16")
