"""README.md is correct: its commands and its Python run, and the files that it links exist."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_tiny
from safetensors.torch import save_file

import export
import train
import vit

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
# Commands in code, without their comments; those with "…" are incomplete.
FOUND = re.findall(r"(?:^|`|&& |\$ |next +)(python [\w/]+\.py[^`\n#]*)", README, re.M)
COMMANDS = sorted({command.strip() for command in FOUND if "…" not in command})
WEIGHTS = "deit_tiny_patch16_224.safetensors"
SMALL = ["--epochs", "1", "--limit", "40"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with everything that README's examples name: weights, runs/NAME, a run on digits."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "assets").symlink_to(ROOT / "assets")
    write_tiny(folder / WEIGHTS, seed=0, width=64, depth=6, heads=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("NAME", "digits-adaptertune-r8-s0"):
            arguments = ["--weights", WEIGHTS, *SMALL, "--name", name]
            assert train.main(arguments) == 0
    return folder


@pytest.fixture
def in_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(workplace / "cache"))
    return workplace


@pytest.fixture
def photos_there(in_workplace, photos):
    """Make path/to/photos and photo.jpg; skip without Pillow."""
    image = pytest.importorskip("PIL.Image")
    target = in_workplace / "path" / "to" / "photos"
    if not target.exists():
        shutil.copytree(photos, target)
        image.open(target / "apple" / "00.png").save(in_workplace / "photo.jpg")


def write_published(folder, name):
    """Write a random network in a backbone's shape to where its download would be."""
    path = folder / "cache" / vit.BACKBONES[name].repo / "model.safetensors"
    if path.exists():
        return
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    model = vit.ViT(vit.BACKBONES[name].config)
    model.init_weights()
    save_file(model.state_dict(), path)


def run_train(arguments, folder):
    """Run a command of train.py on few images for one epoch."""
    if "--eval" in arguments or "--predict" in arguments:
        assert train.main(arguments) == 0
        return
    options = train.parse(arguments)[0]
    if options.dataset.startswith("cifar"):  # a download of 170 MB
        return
    if options.dataset == "digits" and not options.weights:
        arguments = [*arguments, "--weights", WEIGHTS]
    elif not options.weights:
        write_published(folder, options.backbone)
        patch = str(2 * vit.BACKBONES[options.backbone].config.patch)
        arguments = [*arguments, "--image-size", patch]
    if "--seeds" in arguments:  # one is enough here
        arguments[arguments.index("--seeds") + 1] = "0"
    name = re.sub(r"\W+", "-", " ".join(arguments))[:60]
    assert train.main([*arguments, *SMALL, "--name", f"readme{name}"]) == 0


@pytest.mark.parametrize("command", [each for each in COMMANDS if " train.py" in each])
def test_train_commands_run(command, request, in_workplace, capsys):
    _, _, *arguments = shlex.split(command)
    if "path/to/photos" in arguments:
        request.getfixturevalue("photos_there")
    run_train(arguments, in_workplace)
    if "--predict" in arguments:
        assert len((in_workplace / "labels.csv").read_text().splitlines()) == 62
        return
    assert re.search(r"^test ", capsys.readouterr().out, re.M) or "cifar100" in command


@pytest.mark.parametrize("command", [each for each in COMMANDS if " export.py" in each])
def test_export_commands_run(command, in_workplace, capsys):
    _, _, *arguments = shlex.split(command)
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stopped:
            export.main(arguments)
        assert stopped.value.code == 0
        return
    if "int8" in arguments:  # a network trained on 40 images doesn't survive 8 bits
        arguments.append("--force")
    assert export.main(arguments) == 0
    assert re.search("^saved    (runs|hub)/", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("command", [each for each in COMMANDS if "label.py" in each])
def test_device_commands_run(command, photos_there, monkeypatch, capsys):
    assert export.main(["runs/NAME"]) == 0
    assert export.main(["runs/NAME", "--swappable"]) == 0
    _, *arguments = shlex.split(command)
    monkeypatch.setattr("sys.argv", arguments)
    capsys.readouterr()
    runpy.run_path(arguments[0], run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w/.]+\.(jpg|png)(  \d \d+\.\d %){3}", line)
    if "--csv" in arguments:
        rows = Path(arguments[-1]).read_text().splitlines()
        assert [row.partition(",")[0] for row in rows[1:]] == [line.split()[0] for line in lines]


def test_every_kind_of_command_is_tested():
    assert len([command for command in COMMANDS if " train.py" in command]) >= 7
    assert len([command for command in COMMANDS if " export.py" in command]) >= 5
    assert len([command for command in COMMANDS if "label.py" in command]) == 2


def test_python_runs(in_workplace, capsys):
    """README's snippet for the importable API runs, and its parameter counts are right."""
    scope = {}
    exec(SNIPPETS[0], scope)
    assert "'adapters': 13104, 'head': 1290" in capsys.readouterr().out
    assert scope["meta"]["rank"] == 8
    assert len(scope["meta"]["fingerprint"]) == 16
    assert sum(parameter.numel() for parameter in scope["parameters"]) == 13_104 + 1_290


def test_python_for_a_run_runs(photos_there):
    scope = {}
    exec(SNIPPETS[1], scope)
    assert re.fullmatch(r"\d", scope["labels"][0])
    assert scope["probabilities"].shape == (1, 10)


def test_every_snippet_is_tested():
    assert len(SNIPPETS) == 2


def test_set_up_commands_are_those_of_ci():
    block = next(text for _, text in BLOCKS if "pip install -r requirements.txt" in text)
    commands = block.split("\n")[:-1]
    assert commands == ["pip install -r requirements.txt && python train.py", "pytest"]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in commands:
        assert command in ci


@pytest.mark.parametrize("name", ["README.md", "assets/README.md", "assets/results/README.md"])
def test_linked_files_and_sections_exist(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    links = [link for link in links if not link.startswith("http")]
    assert links
    for link in links:
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if section:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert section in slugs, link


def test_length():
    assert len(README.split()) <= 1400


def test_five_requirements():
    lines = (ROOT / "requirements.txt").read_text().split("\n")[:-1]
    names = [re.match(r"[\w-]+", line)[0] for line in lines]
    assert names == ["torch", "safetensors", "onnx", "onnxruntime", "pytest"]
