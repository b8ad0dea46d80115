"""assets/device/index.html in headless Chromium: what it shows for photos, files and faults.

The graphs are made here and tell a photo's colour, so that every answer is known in advance.
tests/test_runtimes.py tests the page with trained networks. Skipped without Chromium or
onnxruntime-web.
"""

import html
import json
import re
import shlex
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import test_runtimes
from conftest import ROOT, png_chunk
from onnx import TensorProto, helper, numpy_helper
from test_runtimes import FLAGS, PAGE, REPORT, browse, find_chromium, find_web

import export
import train

Image = pytest.importorskip("PIL.Image")
COMMAND = "python export.py runs/NAME --resize -o runs/NAME/page/model.onnx"
CLASSES = ["<b>red</b>", "green", "blue", "black"]
META = {
    "image_size": "32",
    "center": "0.875",
    "input": "uint8",
    "resize": "true",
    "batch": "0",
    "output": "probabilities",
    "classes": json.dumps(CLASSES),
}

# ---------------------------------------------------------------------------------------- graphs


def colour_graph(*, logits=False, name="image"):
    """A graph from photos uint8 [B, H, W, 3] to scores of CLASSES: 6/255 times each channel's mean,
    and 0. 3 MB of unused weights make it as large as a network."""
    ballast = np.random.default_rng(0).random((1, 750_000), np.float32)
    ballast[0, 0] = 0
    constants = []
    for key, value in (("ballast", ballast), ("scale", np.float32([6 / 255]))):
        constants.append(numpy_helper.from_array(value, key))
    for key, value in (("zero", [0]), ("one", [1])):
        constants.append(numpy_helper.from_array(np.array(value), key))
    nodes = [
        helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["colours"]),
        helper.make_node("Slice", ["ballast", "zero", "one", "one"], ["nothing"]),
        helper.make_node("Concat", ["colours", "nothing"], ["logits"], axis=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    output = "logits" if logits else "probabilities"
    shape = [1, "height", "width", 3]
    inputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, shape)]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 4])]
    graph = helper.make_graph(nodes, "colours", inputs, outputs, constants)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, ir_version=8, opset_imports=[opset])


def save_model(folder, *, proto=None, **changes):
    """Write model.onnx with META updated by `changes`; None removes a key."""
    proto = proto or colour_graph()
    meta = {key: text for key, text in (META | changes).items() if text is not None}
    helper.set_model_props(proto, meta)
    onnx.save(proto, folder / "model.onnx")


def check_colours(text, *colour):
    """Check that the text shows the three likeliest classes of a photo of this mean colour."""
    scores = np.exp(np.array([*colour, 0]) * 6 / 255)
    percents = 100 * scores / scores.sum()
    order = np.argsort(-percents, kind="stable")[:3]
    lines = text.split("\n")
    assert len(lines) == 3
    for line, i in zip(lines, order, strict=True):
        name, percent = re.fullmatch(r"(.+) (\d+\.\d) %", line).groups()
        assert abs(float(percent) - percents[i]) < 0.3, text
        if percents[i] > 1:  # smaller ones are nearly equal
            assert name == CLASSES[i], text


# --------------------------------------------------------------------------------------- visiting

# NOTE, before the page, records the texts that it shows; CHOOSE, after it, picks files like a user.
NOTE = """<script>
const shown = [];
new MutationObserver(() => {
  const text = document.querySelector("pre")?.textContent;
  if (text && text !== shown.at(-1)) shown.push(text);
}).observe(document, {subtree: true, childList: true});
</script>
"""
CHOOSE = """<script type="module">
const input = document.querySelector("input");
const output = document.querySelector("pre");
const preview = document.querySelector("canvas");

function pick(...files) {
  const transfer = new DataTransfer();
  for (const file of files) transfer.items.add(file);
  input.files = transfer.files;
  return input.onchange({target: input});
}

async function served(name) {
  const answer = await fetch(name);
  return new File([await answer.blob()], name);
}

await ready.catch(() => {});
await new Promise(done => setTimeout(done, 50));
"""


def visit(folder, script, page=None):
    """Run a script in the page and return what it sends."""
    page = page or PAGE.read_text()
    (folder / "index.html").write_text(f"{REPORT}{NOTE}{page}{CHOOSE}{script}</script>")
    return browse(folder, "index.html", timeout=60)


READ = "send({text: output.textContent, html: output.innerHTML, shown});"


def test_ready(tmp_path):
    """The page shows how much is loaded, and then that it is ready; its input has a label."""
    save_model(tmp_path)
    script = "send({shown, labels: [...input.labels].map(each => each.textContent)});"
    answer = visit(tmp_path, script)
    *loading, last = answer["shown"]
    assert last == "ready"
    assert loading[-1] == "loading model.onnx: 3.0 of 3.0 MB"
    for text in loading:
        assert re.fullmatch(r"loading model\.onnx: \d\.\d of 3\.0 MB", text)
    assert answer["labels"] == ["Choose a photo, or drop one here"]


# ----------------------------------------------------------------------------------------- photos

LABEL_ALL = """
const labels = {};
for (const name of NAMES) {
  await pick(await served(name));
  const {data} = preview.getContext("2d").getImageData(0, 0, 1, 1);
  labels[name] = {
    text: output.textContent,
    elements: output.childElementCount,
    side: preview.width,
    hidden: preview.hidden,
    corner: [...data],
  };
}
send({labels, shown});
"""


def label_all(folder, *names):
    script = LABEL_ALL.replace("NAMES", json.dumps(names))
    return visit(folder, script)


def test_photos(tmp_path):
    """The page shows a preview and the three likeliest classes for photos of many forms. Class
    names aren't read as HTML, and the photo being labelled is named."""
    save_model(tmp_path)
    red = Image.new("RGB", (40, 40), (250, 20, 30))
    red.save(tmp_path / "red.png")
    wide = Image.new("RGB", (300, 100), (250, 0, 0))
    wide.paste((0, 0, 200), (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    wide.rotate(90, expand=True).save(tmp_path / "high.png")
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    turned = Image.new("RGB", (64, 32), (0, 0, 255))
    turned.paste((255, 0, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is left comes to the top
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)

    answer = label_all(tmp_path, "red.png", "wide.png", "high.png", "clear.png", "turned.jpg")
    labels = answer["labels"]
    check_colours(labels["red.png"]["text"], 250, 20, 30)
    assert labels["red.png"]["text"].startswith("<b>red</b> ")
    assert labels["red.png"]["elements"] == 0
    assert labels["red.png"]["corner"] == [250, 20, 30, 255]
    for name in ("wide.png", "high.png"):  # only their middle counts
        check_colours(labels[name]["text"], 0, 0, 200)
        assert labels[name]["side"] == 100
    check_colours(labels["clear.png"]["text"], 255, 255, 255)  # on white
    check_colours(labels["turned.jpg"]["text"], 127.5, 0, 127.5)
    red, _, blue, _ = labels["turned.jpg"]["corner"]
    assert red > 250
    assert blue < 5
    assert not any(each["hidden"] for each in labels.values())
    for name in labels:
        assert f"labelling {name} …" in answer["shown"]

    save_model(tmp_path, squash="true")
    labels = label_all(tmp_path, "wide.png", "high.png")["labels"]
    for name in ("wide.png", "high.png"):  # all of it counts
        check_colours(labels[name]["text"], 500 / 3, 0, 200 / 3)


def test_pixels_as_they_are_stored(tmp_path):
    """A file's gamma is ignored, as in training: pixels are used as they are stored."""
    save_model(tmp_path)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    rows = zlib.compress(8 * (b"\0" + 8 * b"\x80\x40\x20"))
    chunks = [(b"IHDR", header), (b"gAMA", struct.pack(">I", 100_000)), (b"IDAT", rows)]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in (*chunks, (b"IEND", b"")):
        content += png_chunk(kind, part)
    (tmp_path / "linear.png").write_bytes(content)
    labels = label_all(tmp_path, "linear.png")["labels"]
    assert labels["linear.png"]["corner"] == [128, 64, 32, 255]


def test_large_photo(tmp_path):
    """A photo of 12 million pixels is reduced before the graph sees it, and keeps its mean."""
    save_model(tmp_path)
    tiles = np.zeros((3000, 4000, 3), np.uint8)
    tiles[::2, ::2] = 240, 120, 40  # a quarter of the pixels
    Image.fromarray(tiles).save(tmp_path / "large.png")
    labels = label_all(tmp_path, "large.png")["labels"]["large.png"]
    assert labels["side"] == 1024
    check_colours(labels["text"], 60, 30, 10)
    assert np.abs(np.array(labels["corner"]) - [60, 30, 10, 255]).max() < 60  # no tile alone


def test_logits(tmp_path):
    """For a graph that gives logits, with another input name, probabilities are shown."""
    save_model(tmp_path, proto=colour_graph(logits=True, name="pixels"), output="logits")
    Image.new("RGB", (40, 40), (20, 30, 250)).save(tmp_path / "blue.png")
    labels = label_all(tmp_path, "blue.png")["labels"]
    check_colours(labels["blue.png"]["text"], 20, 30, 250)


def test_photos_that_are_none(tmp_path):
    """An unreadable photo is named, nothing of an earlier photo stays, and the next is labelled."""
    save_model(tmp_path)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"no photo")
    names = ("red.png", "half.jpg", "empty.png", "text.png", "red.png")
    labels = label_all(tmp_path, *names)["labels"]
    for name in names[1:4]:
        assert labels[name]["text"] == f"can't label {name}: this browser can't read it as a photo"
        assert labels[name]["hidden"]
    check_colours(labels["red.png"]["text"], 255, 0, 0)


CHOOSE_AT_ONCE = """
const large = await served("large.png");
const small = await served("small.png");
const last = await served("last.png");
pick(large);
await new Promise(done => setTimeout(done, 20));
pick(small);
await pick(last);
const {data} = preview.getContext("2d").getImageData(0, 0, 1, 1);
input.files = new DataTransfer().files;
await input.onchange({target: input});  // cancelled
send({shown, corner: [...data], text: output.textContent});
"""


def test_photos_chosen_one_after_another(tmp_path):
    """If others are chosen while a large photo is decoded, only the last one's labels and preview
    are shown. Cancelling the choice changes nothing."""
    save_model(tmp_path)
    Image.new("RGB", (4000, 3000), "red").save(tmp_path / "large.png")
    Image.new("RGB", (40, 40), "lime").save(tmp_path / "small.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "last.png")
    answer = visit(tmp_path, CHOOSE_AT_ONCE)
    check_colours(answer["text"], 0, 0, 255)
    assert answer["corner"] == [0, 0, 255, 255]
    after = answer["shown"][answer["shown"].index("ready") + 1 :]
    assert after == ["labelling large.png …", "labelling last.png …", answer["text"]]


# ----------------------------------------------------------------------------------------- faults


def test_other_metadata(tmp_path):
    """Keys of other programs, before and after the class names, don't affect them."""
    text = 'classes\x12\x12["wrong", "names"]'
    others = {"description": text, "names": "{0: 'a'}", "model_info labels": "a b"}
    many = {f"key {i}": "x" * 1000 for i in range(200)}
    proto = colour_graph()
    helper.set_model_props(proto, {"before": text} | META | others | many)
    onnx.save(proto, tmp_path / "model.onnx")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    check_colours(label_all(tmp_path, "red.png")["labels"]["red.png"]["text"], 255, 0, 0)


def test_no_model(tmp_path):
    """Without model.onnx the page says so and how to make it, also after a photo is chosen."""
    script = """const first = output.textContent;
await pick(new File([], "a.png"));
const second = output.textContent;
send({first, second});"""
    answer = visit(tmp_path, script)
    assert answer["first"].startswith("can't load model.onnx: it isn't beside this page (404). ")
    assert answer["first"].endswith(COMMAND)
    assert answer["second"].startswith("can't label a.png: ")
    assert COMMAND in answer["second"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, "it has no class names"),
        (dict.fromkeys(META), "it has no class names"),
        ({"input": "float", "resize": "false"}, "it takes something other"),
        ({"input": "unit", "resize": "false"}, "it takes something other"),
        ({"resize": "false"}, "it takes something other"),
        ({"resize": None}, "it takes something other"),
        ({"batch": "8"}, "it takes something other"),
        ({"output": "embedding"}, "it doesn't give probabilities"),
    ],
    ids=str,
)
def test_other_graphs(tmp_path, changes, message):
    """For a graph that isn't for this page, the command that makes one is shown."""
    save_model(tmp_path, **changes)
    text = visit(tmp_path, READ)["text"]
    assert text.startswith(f"can't load model.onnx: {message}")
    assert text.endswith(COMMAND)


def test_files_that_are_no_model(tmp_path):
    """A server's page, noise, or an empty or truncated file in place of the graph is reported."""
    save_model(tmp_path)
    whole = (tmp_path / "model.onnx").read_bytes()
    damaged = (b"<!doctype html><title>Not found</title>", whole[:-2000], b"\xff" * 99)
    for content in damaged:
        (tmp_path / "model.onnx").write_bytes(content)
        text = visit(tmp_path, READ)["text"]
        assert text == "can't load model.onnx: it is damaged, or no ONNX file"
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "it has no class names" in visit(tmp_path, READ)["text"]


def test_class_names_that_do_not_fit(tmp_path):
    """Class names that aren't JSON, or that are too few, are reported."""
    save_model(tmp_path, classes="two")
    assert visit(tmp_path, READ)["text"].startswith("can't load model.onnx: ")
    save_model(tmp_path, classes='["a", "b"]')
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    text = label_all(tmp_path, "red.png")["labels"]["red.png"]["text"]
    assert text == "can't label red.png: model.onnx has the wrong number of class names"


def test_no_onnxruntime(tmp_path):
    """Without onnxruntime-web, the page says what to install."""
    page = PAGE.read_text().replace("node_modules", "nowhere")
    text = visit(tmp_path, READ, page)["text"]
    assert text.startswith("can't load model.onnx: onnxruntime-web isn't beside this page")
    assert text.endswith("Run in its folder\nnpm install --prefix . onnxruntime-web")


def test_opened_as_a_file(tmp_path):
    """Opened as a file, the page says which command starts a server."""
    command = [find_chromium(), *FLAGS, f"--user-data-dir={tmp_path}", "--dump-dom", PAGE.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (text,) = re.findall(r"<pre[^>]*>(.*?)</pre>", done.stdout, re.DOTALL)
    text = html.unescape(text)
    assert text.startswith("can't load model.onnx: the page was opened as a file. Run in its f")
    assert "\npython -m http.server\n" in text


# ----------------------------------------------------------------------------------- instructions


def test_instructions(tmp_path, monkeypatch):
    """The commands in index.html's comment make a page that labels photos. It needs no other files
    than the comment says, and git ignores what the commands write."""
    comment, _, _ = PAGE.read_text().partition("-->")
    indented = [line.strip() for line in comment.splitlines() if line.startswith(7 * " ")]
    make, copy, install, serve, page, model, *runtime = indented
    assert make == COMMAND
    assert install == "npm install --prefix runs/NAME/page onnxruntime-web"
    assert serve == "python -m http.server --directory runs/NAME/page"
    web = tmp_path / "runs/web"
    web.mkdir(parents=True)
    for name in runtime:  # in place of npm
        path = Path(name)
        assert path.parent == Path("node_modules/onnxruntime-web/dist")
        shutil.copy(find_web() / path.name, web)
    monkeypatch.setattr(test_runtimes, "WEB", web)

    (tmp_path / "assets").symlink_to(ROOT / "assets")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--epochs", "1", "--limit", "100", "--name", "NAME"]) == 0
    assert export.main(shlex.split(make)[2:]) == 0
    subprocess.run(shlex.split(copy), check=True)
    folder = tmp_path / "runs/NAME/page"
    assert {path.name for path in folder.iterdir()} == {page, model, "labels.txt"}
    Image.new("RGB", (40, 40), "white").save(folder / "white.png")
    script = LABEL_ALL.replace("NAMES", '["white.png"]')
    answer = visit(folder, script, (folder / page).read_text())
    assert "ready" in answer["shown"]
    assert re.fullmatch(r"(\d \d+\.\d %\n?){3}", answer["labels"]["white.png"]["text"])
    assert untracked(tmp_path) == [".gitignore", "assets"]


def test_git_ignores_what_is_put_beside_the_page(tmp_path):
    """If export.py and npm write beside the checkout's index.html, git status doesn't show it."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    folder = tmp_path / "assets/device"
    (folder / "node_modules").mkdir(parents=True)
    names = ("model.onnx", "labels.txt", "package.json", "package-lock.json", "node_modules/a.js")
    for name in names:
        (folder / name).write_text("")
    assert untracked(tmp_path) == [".gitignore"]


def untracked(folder):
    """The files in a folder that git, if it were a repository, would show as untracked."""
    if not shutil.which("git"):
        pytest.skip("no git here")
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    command = ["git", "-C", folder, "ls-files", "--others", "--exclude-standard"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
