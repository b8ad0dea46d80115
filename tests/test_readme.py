"""README.md says what is there: its commands parse, its files exist, and .ci/run runs its set-up commands."""
import re
import shlex

import pytest
from conftest import ROOT

import cli
import export

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [command.strip() for command in re.findall(r"(?:^|`|&& |next +)(python (?:train|export)\.py[^`\n#]*)", README, re.M)
            if "…" not in command]


def test_there_are_commands():
    assert len([command for command in COMMANDS if "train.py" in command]) > 5
    assert len([command for command in COMMANDS if "export.py" in command]) > 3


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, monkeypatch, tmp_path):
    _, program, *arguments = shlex.split(command)
    if "--help" in arguments:
        return
    if program == "export.py":
        _, more = export.parse(arguments)
        assert not more
        return
    if "--eval" in arguments:
        folder = tmp_path / arguments[arguments.index("--eval") + 1]
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        monkeypatch.chdir(tmp_path)
    cli.parse(arguments)


def test_set_up_commands_are_those_of_ci():
    block = next(block for _, block in BLOCKS if "pip install -r requirements.txt" in block)
    commands = [line for line in block.splitlines() if line]
    assert commands == ["pip install -r requirements.txt && python train.py", "pytest"]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(command in ci for command in commands)


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_five_requirements():
    names = [re.match(r"[\w-]+", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    assert names == ["torch", "safetensors", "onnx", "onnxruntime", "pytest"]
