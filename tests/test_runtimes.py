"""One file in runtimes that share no code gives the same labels and nearly the same numbers.

They are onnxruntime, onnx's reference evaluator (numpy), OpenVINO, ncnn and onnxruntime-web in
headless Chromium, also by way of assets/device/index.html. transformers.js, optimum-onnx,
Ultralytics and OpenVINO's Model API also prepare the photos, as the file or --hub's folder says.
The images are the test set of digits and, if ADAPTERTUNE_REAL names the folder that test_real.py
describes, of twelve kinds of flowers.

A test is skipped, with the reason, if its runtime is missing: pip install openvino
openvino-model-api optimum-onnx[onnxruntime] ultralytics pnnx ncnn; Debian's chromium; npm's
onnxruntime-web, whose folder dist is in node_modules or named by ADAPTERTUNE_ORT_WEB; npm's
@huggingface/transformers in the node_modules that ADAPTERTUNE_TRANSFORMERS_JS names.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import REAL, ROOT

import export
import train

WEB = Path(os.environ.get("ADAPTERTUNE_ORT_WEB", ROOT / "node_modules/onnxruntime-web/dist"))
PAGE = ROOT / "assets/device/index.html"
ORIENTATION = 0x0112  # EXIF's tag
TASKS = {"digits": ["--epochs", "2", "--limit", "500"]}
if REAL:
    weights = f"{REAL}/weights/deit_tiny_patch16_224.safetensors"
    TASKS["flowers"] = ["--dataset", f"{REAL}/data/flowers12", "--weights", weights]
    TASKS["flowers"] += ["--limit", "200", "--epochs", "1", "--lr", "3e-3"]


@dataclass
class Task:
    """A trained and exported run, and torch's logits of its whole test set."""

    folder: Path  # holds model.onnx
    run: train.Run
    images: np.ndarray  # [n, 3, S, S], normalised
    logits: np.ndarray  # [n, K]


@pytest.fixture(scope="module", params=TASKS)
def task(request, tmp_path_factory):
    """Each of TASKS, trained and exported in its own folder."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*TASKS[request.param], "--name", "run"]) == 0
        assert export.main(["runs/run", "-o", "model.onnx", "--images", "0"]) == 0
        options, *_ = train.parse(["--eval", "runs/run"])
        run = train.open_run(options)
        run.model.eval()
        batches = run.batches.eval(run.dataset.test, run.dataset.center)
        with torch.inference_mode():
            images = torch.cat([x for x, _ in batches])
            logits = torch.cat([run.model(x) for x in images.split(32)])
        assert len(images) >= 200
        yield Task(folder, run, images.numpy(), logits.numpy())


def check_logits(got, task):
    """Check that each image has torch's label and logits close to torch's."""
    got = np.asarray(got, np.float32).reshape(task.logits.shape)
    assert (got.argmax(axis=1) == task.logits.argmax(axis=1)).all()
    assert np.abs(got - task.logits).max() < 1e-3


def test_onnxruntime(task):
    """onnxruntime gives torch's logits, image by image."""
    session = export.session(task.folder / "model.onnx")
    check_logits([session.run(None, {"image": image[None]})[0] for image in task.images], task)


def test_reference_evaluator(task):
    """onnx's own evaluator, in slow numpy, gives torch's logits for every sixth image."""
    if task.run.dataset.name != "digits":
        pytest.skip("the reference evaluator takes a second for an image of 224 px")
    from onnx.reference import ReferenceEvaluator

    graph = ReferenceEvaluator(onnx.load(task.folder / "model.onnx"))
    some = replace(task, images=task.images[::6], logits=task.logits[::6])
    logits = []
    for images in np.array_split(some.images, 3):
        logits.extend(graph.run(None, {"image": images})[0])
    check_logits(logits, some)


def test_openvino(task):
    """OpenVINO on the CPU in fp32 gives torch's logits, image by image."""
    openvino = pytest.importorskip("openvino")
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    path = task.folder / "model.onnx"
    model = openvino.Core().compile_model(path, "CPU", precision)
    check_logits([model([image[None]])[0] for image in task.images], task)


@pytest.mark.parametrize("size", [(33, 40), (480, 640), (1200, 500)], ids=str)
def test_resizing_in_openvino(task, size):
    """A graph that takes photos of any size resizes them in OpenVINO as in onnxruntime."""
    openvino = pytest.importorskip("openvino")
    path = task.folder / "any.onnx"
    if not path.exists():
        assert export.main([str(task.folder / "runs/run"), "--resize", "-o", str(path)]) == 0
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", precision)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 12, generator=generator)
    photo = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    photo = np.ascontiguousarray((255 * photo).byte().permute(0, 2, 3, 1).numpy())
    expected = export.session(path).run(None, {"image": photo})[0]
    assert np.abs(model([photo])[0] - expected).max() < 1e-3


@pytest.fixture(scope="module")
def unit(task):
    """The path of a graph that takes single images from 0 to 1 and gives probabilities."""
    path = task.folder / "unit.onnx"
    options = ["--input", "unit", "--output", "probabilities", "--batch", "1", "-o", str(path)]
    assert export.main([str(task.folder / "runs/run"), *options]) == 0
    return path


def test_ncnn(task, unit):
    """ncnn on the CPU, through pnnx, gives at least 99 % of torch's labels."""
    ncnn = pytest.importorskip("ncnn")
    pnnx = shutil.which("pnnx", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not pnnx:
        pytest.skip("no pnnx (pip install pnnx)")
    S = task.images.shape[-1]
    command = [pnnx, unit, f"inputshape=[1,3,{S},{S}]"]
    subprocess.run(command, cwd=task.folder, check=True, capture_output=True)
    net = ncnn.Net()
    net.load_param(str(task.folder / "unit.ncnn.param"))
    net.load_model(str(task.folder / "unit.ncnn.bin"))
    mean, std = task.run.batches.mean_std.numpy()
    labels = []
    for image in task.images:
        extractor = net.create_extractor()
        pixels = image * std + mean  # a Mat is only a view: this keeps the pixels
        extractor.input("in0", ncnn.Mat(pixels))
        _, probabilities = extractor.extract("out0")
        labels.append(np.array(probabilities).argmax())
    assert (np.array(labels) == task.logits.argmax(axis=1)).mean() >= 0.99


@pytest.fixture(scope="module")
def fp16(task):
    """The path of the task's graph in fp16."""
    path = task.folder / "fp16.onnx"
    options = ["--precision", "fp16", "-o", str(path)]
    assert export.main([str(task.folder / "runs/run"), *options]) == 0
    return path


def check_rounded(logits, task):
    """Check for at least 99 % of torch's labels, and for numbers within 0.05 of torch's."""
    got = np.asarray(logits, np.float32).reshape(task.logits.shape)
    assert (got.argmax(axis=1) == task.logits.argmax(axis=1)).mean() >= 0.99
    assert np.abs(got - task.logits).max() < 0.05


def test_fp16_in_onnxruntime(task, fp16):
    session = export.session(fp16)
    check_rounded([session.run(None, {"image": image[None]})[0] for image in task.images], task)


def test_fp16_in_openvino(task, fp16):
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(fp16, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check_rounded([model([image[None]])[0] for image in task.images], task)


# ------------------------------------------------------------------ programs that prepare photos


@pytest.fixture(scope="module")
def photos(task):
    """At most 120 test photos as files: {path: torch's label}. Photos on which torch is unsure are
    left out, since another resize changes their label. Digits are enlarged beforehand, since
    programs enlarge 8 pixels differently."""
    image = pytest.importorskip("PIL.Image")
    test = task.run.dataset.test
    mean, std = task.run.batches.mean_std
    labels = task.logits.argmax(axis=1)
    sure = torch.from_numpy(task.logits).softmax(dim=1).amax(dim=1) > 0.5
    found = {}
    for i in sure.nonzero().flatten().tolist()[:: max(1, int(sure.sum()) // 120)]:
        if task.run.dataset.folder:
            path = task.run.dataset.folder / test.names[i]
        else:
            path = task.folder / f"photo{i}.png"
            pixels = (255 * (torch.from_numpy(task.images[i]) * std + mean)).round().byte()
            image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        found[str(path.resolve())] = task.run.dataset.classes[labels[i]]
    assert len(found) >= 50
    return found


def check_labels(got, photos, least):
    """Check that at least this share of the labels are torch's; another resize changes some."""
    same = [label == photos[path] for path, label in got.items()]
    assert list(got) == list(photos)
    print(f"{sum(same)} of {len(same)} labels are torch's")
    assert np.mean(same) >= least


@pytest.fixture(scope="module")
def hub(task):
    """The folder that --hub writes."""
    folder = task.folder / "models/hub"
    assert export.main([str(task.folder / "runs/run"), "--hub", str(folder), "--force"]) == 0
    return folder


CLASSIFY = """
import { env, pipeline } from "@huggingface/transformers";
import { readFileSync } from "node:fs";
const [models, dtype, list] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = models;
const classify = await pipeline("image-classification", "hub", { dtype });
const labels = {};
for (const photo of JSON.parse(readFileSync(list))) {
  const [best] = await classify(photo, { top_k: 1 });
  labels[photo] = best.label;
}
console.log(JSON.stringify(labels));
"""


@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_transformers_js(task, hub, photos, dtype):
    """transformers.js in node gives torch's labels from --hub's folder, in fp32 and in int8."""
    modules = os.environ.get("ADAPTERTUNE_TRANSFORMERS_JS")
    if not modules or not shutil.which("node"):
        pytest.skip("no node, or ADAPTERTUNE_TRANSFORMERS_JS names no node_modules")
    script = task.folder / "classify.mjs"
    script.write_text(CLASSIFY)
    if not (task.folder / "node_modules").exists():
        (task.folder / "node_modules").symlink_to(modules)
    (task.folder / "list.json").write_text(json.dumps(list(photos)))
    command = ["node", script, f"{hub.parent}/", dtype, task.folder / "list.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    check_labels(json.loads(done.stdout.splitlines()[-1]), photos, 0.97)


@pytest.mark.parametrize("name", ["model.onnx", "model_quantized.onnx"])
def test_optimum(hub, photos, name):
    """optimum-onnx, with transformers' pipeline, gives torch's labels from --hub's folder."""
    optimum = pytest.importorskip("optimum.onnxruntime")
    transformers = pytest.importorskip("transformers")
    ort_model = optimum.ORTModelForImageClassification
    model = ort_model.from_pretrained(hub, subfolder="onnx", file_name=name)
    processor = transformers.AutoImageProcessor.from_pretrained(hub)
    parts = {"model": model, "image_processor": processor}
    classify = transformers.pipeline("image-classification", **parts)
    labels = {path: classify(path, top_k=1)[0]["label"] for path in photos}
    check_labels(labels, photos, 0.97)


def test_ultralytics(task, unit, photos):
    """Ultralytics gives 90 % of torch's labels; it takes the whole square, not its middle 7/8."""
    ultralytics = pytest.importorskip("ultralytics")
    model = ultralytics.YOLO(unit)
    labels = {}
    for path in photos:
        (result,) = model(path, verbose=False)
        labels[path] = result.names[result.probs.top1]
    assert model.task == "classify"
    assert list(result.names.values()) == task.run.dataset.classes
    check_labels(labels, photos, 0.9)


@pytest.mark.parametrize("kind", ["float", "unit"])
def test_model_api(task, unit, photos, kind):
    """OpenVINO's Model API gives 90 % of torch's labels; it too takes the whole square, as RGB."""
    models = pytest.importorskip("model_api.models")
    image = pytest.importorskip("PIL.Image")
    path = unit if kind == "unit" else task.folder / "model.onnx"
    model = models.Model.create_model(str(path), device="CPU")
    labels = {}
    for photo in photos:
        pixels = np.array(image.open(photo).convert("RGB"))
        labels[photo] = model(pixels).top_labels[0].name
    check_labels(labels, photos, 0.9)


# ----------------------------------------------------------------------------------- the browser

# With this, a page sends the test its result, or the error that it met.
REPORT = """<script>
const send = result => fetch("/", {method: "POST", body: JSON.stringify(result)});
addEventListener("unhandledrejection", event => send({error: String(event.reason)}));
addEventListener("error", event => send({error: String(event.message)}));
</script>
"""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]


def find_chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    return pytest.skip("no Chromium here (Debian: apt-get install chromium)")


def find_web():
    """onnxruntime-web's folder dist."""
    if (WEB / "ort.wasm.min.js").is_file():
        return WEB
    return pytest.skip(f"no onnxruntime-web at {WEB} (npm install, or set ADAPTERTUNE_ORT_WEB)")


class Page(http.server.SimpleHTTPRequestHandler):
    """Serves files; `server.answer` is the JSON that a page POSTs, `server.answered` its event."""

    def do_POST(self):  # noqa: N802
        length = int(self.headers["Content-Length"])
        self.server.answer = json.loads(self.rfile.read(length))
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()

    def log_message(self, *_):
        pass


def browse(folder, name, timeout=300):
    """Open a page of `folder` in Chromium over HTTP and return what it sends; an error fails."""
    chromium = find_chromium()
    web = folder / "node_modules/onnxruntime-web/dist"
    ignore = shutil.ignore_patterns("*.map", "*webgpu*", "*jsep*", "*asyncify*", "*jspi*")
    shutil.copytree(find_web(), web, dirs_exist_ok=True, ignore=ignore)

    handler = functools.partial(Page, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.answered = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", url]
    with (folder / "chromium.log").open("wb") as log:
        browser = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert server.answered.wait(timeout), f"{name} sent nothing within {timeout} s"
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
        server.server_close()
    assert "error" not in server.answer, server.answer
    return server.answer


LOGITS_PAGE = """<script src="node_modules/onnxruntime-web/dist/ort.wasm.min.js"></script>
<script type="module">
const images = new Float32Array(await (await fetch("images.bin")).arrayBuffer());
const session = await ort.InferenceSession.create("model.onnx");
const shape = [1, 3, SIDE, SIDE];
const size = 3 * SIDE * SIDE;
const all = [];
for (let i = 0; i < images.length; i += size) {
  const image = new ort.Tensor("float32", images.subarray(i, i + size), shape);
  const {logits} = await session.run({image});
  all.push(...logits.data);
}
send({logits: all});
</script>
"""


def test_onnxruntime_web(task):
    """onnxruntime-web gives torch's logits in the browser, for normalised images one by one."""
    (task.folder / "images.bin").write_bytes(task.images.tobytes())
    page = LOGITS_PAGE.replace("SIDE", str(task.images.shape[-1]))
    (task.folder / "logits.html").write_text(REPORT + page)
    check_logits(browse(task.folder, "logits.html")["logits"], task)


@pytest.fixture(scope="module")
def site(task):
    """A folder with index.html's model.onnx, and every third photo of the test set as PNG.

    Gives the folder and onnxruntime's probabilities of each photo, [n, K].
    """
    image = pytest.importorskip("PIL.Image")
    folder = task.folder / "site"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(task.folder)
        options = ["--resize", "--output", "probabilities", "-o", "site/model.onnx"]
        assert export.main(["runs/run", *options]) == 0
    session = export.session(folder / "model.onnx")
    photos = task.run.dataset.test.pixels.permute(0, 2, 3, 1).numpy()[::3]
    expected = []
    for i, photo in enumerate(photos):
        image.fromarray(photo).save(folder / f"{i}.png")
        expected.append(session.run(None, {"image": photo[None]})[0][0])
    return folder, np.stack(expected)


def check_text(text, classes, probabilities):
    """Check that index.html's first line shows the likeliest class and its probability."""
    first, _, _ = text.split("\n")
    name, percent = re.fullmatch(r"(.+) ([\d.]+) %", first).groups()
    assert name == classes[probabilities.argmax()]
    assert abs(float(percent) - 100 * probabilities.max()) < 0.2


CALL_LABEL = """<script type="module">
const labels = [];
for (let i = 0; i < COUNT; i++) {
  const photo = await fetch(`${i}.png`);
  labels.push(await label(await photo.blob()));
}
send({labels});
</script>
"""


def test_function_of_the_page(task, site):
    """index.html's `label` gives onnxruntime's labels and nearly its probabilities for photos in
    full size, with the file's class names."""
    folder, expected = site
    script = CALL_LABEL.replace("COUNT", str(len(expected)))
    (folder / "labels.html").write_text(REPORT + PAGE.read_text() + script)
    labels = browse(folder, "labels.html")["labels"]
    for text, probabilities in zip(labels, expected, strict=True):
        check_text(text, task.run.dataset.classes, probabilities)


# Files are put into the page's input as if a user chose them, and the page's text is read.
CHOOSE_FILES = """<script type="module">
const input = document.querySelector("input");
const output = document.querySelector("pre");

async function choose(file) {
  const files = new DataTransfer();
  files.items.add(file);
  input.files = files.files;
  await input.onchange({target: input});
  return output.textContent;
}

async function chooseServed(name) {
  const answer = await fetch(name);
  return choose(new File([await answer.blob()], name));
}

await ready;
const loaded = output.textContent;
const first = await chooseServed("0.png");
const refused = await choose(new File(["no photo"], "text.png"));
const turned = await chooseServed("turned.jpg");
send({loaded, first, refused, turned});
</script>
"""


def save_turned(pixels, path):
    """Save pixels uint8 [H, W, 3] as a JPEG photo that its EXIF data turn by 90°. Returns the
    pixels as displayed, [W, H, 3]."""
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(pixels).save(path, quality=95, exif=exif)
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image))


def test_elements_of_the_page(task, site):
    """index.html, as a user sees it, says when it is ready, labels the chosen photo, reports a file
    that is no photo, and then labels one that EXIF data turn."""
    folder, expected = site
    photos = task.run.dataset.test.pixels.permute(0, 2, 3, 1).numpy()
    turned = save_turned(photos[0], folder / "turned.jpg")
    session = export.session(folder / "model.onnx")
    expected_turned = session.run(None, {"image": turned[None]})[0][0]
    assert np.abs(expected_turned - expected[0]).max() > 0.05

    (folder / "choose.html").write_text(REPORT + PAGE.read_text() + CHOOSE_FILES)
    shown = browse(folder, "choose.html")
    assert shown["loaded"] == "ready"
    check_text(shown["first"], task.run.dataset.classes, expected[0])
    assert shown["refused"].startswith("can't label text.png: ")
    check_text(shown["turned"], task.run.dataset.classes, expected_turned)
