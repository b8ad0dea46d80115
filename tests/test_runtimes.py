"""The same file in runtimes that share no code: onnxruntime, the reference evaluator of onnx (numpy), OpenVINO, and
onnxruntime-web in headless Chromium, there by the page of README.md too.

The images are the test set of digits and, where ADAPTERTUNE_REAL names the folder that test_real.py describes, of twelve
kinds of flowers. Skipped, with the reason, where a runtime isn't there: pip install openvino; Debian's package chromium, and
npm's onnxruntime-web, whose folder dist is expected in node_modules or named by ADAPTERTUNE_ORT_WEB."""
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import REAL, ROOT

import cli
import export
import train

WEB = Path(os.environ.get("ADAPTERTUNE_ORT_WEB", ROOT / "node_modules/onnxruntime-web/dist"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLOWERS = {"--dataset": f"{REAL}/data/flowers12", "--weights": f"{REAL}/weights/deit_tiny_patch16_224.safetensors",
           "--limit": "200", "--epochs": "1", "--lr": "3e-3"}
TASKS = {"digits": {"--epochs": "2"}} | ({"flowers": FLOWERS} if REAL else {})


@pytest.fixture(scope="module", params=TASKS)
def task(request, tmp_path_factory):
    """A trained run, exported: (folder of model.onnx, run, images [n, 3, S, S] of its whole test set, torch's logits)."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = [word for pair in TASKS[request.param].items() for word in pair]
        assert train.main([*options, "--name", "run"]) == 0
        assert export.main(["runs/run", "-o", "model.onnx", "--images", "0"]) == 0
        run = train.open_run(cli.parse(["--eval", "runs/run"])[0])
        with torch.inference_mode():
            images = torch.cat([x for x, _ in run.batches.eval(run.data.test, run.data.center)])
            logits = torch.cat([run.model.eval()(x) for x in images.split(32)])
        assert len(images) >= 200
        yield folder, run, images.numpy(), logits.numpy()


def same(got, expected):
    """As many labels, all of them torch's; the numbers near torch's."""
    got = np.asarray(got, np.float32).reshape(expected.shape)
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert np.abs(got - expected).max() < 1e-3


def test_onnxruntime(task):
    folder, _, images, expected = task
    graph = export.in_onnxruntime(export.session(folder / "model.onnx"))
    same([graph(image[None])[0][0] for image in images], expected)


def test_reference_evaluator(task):
    folder, run, images, expected = task
    if run.data.name != "digits":
        pytest.skip("the reference evaluator takes a second for an image of 224 px")
    from onnx.reference import ReferenceEvaluator
    graph = ReferenceEvaluator(onnx.load(folder / "model.onnx"))
    same(np.concatenate([graph.run(None, {"image": part})[0] for part in np.array_split(images, 12)]), expected)


def test_openvino(task):
    openvino = pytest.importorskip("openvino")
    folder, _, images, expected = task
    model = openvino.Core().compile_model(folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    same([model([image[None]])[0][0] for image in images], expected)


def browse(folder, page, timeout=300):
    """Open `page` of `folder` in Chromium over HTTP, and return what it POSTs, as JSON; an error that it reports fails."""
    if not CHROMIUM:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    if not (WEB / "ort.wasm.min.js").is_file():
        pytest.skip(f"no onnxruntime-web at {WEB} (npm install onnxruntime-web, or set ADAPTERTUNE_ORT_WEB to its dist)")
    answer, arrived = [], threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            answer.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    web = folder / "node_modules/onnxruntime-web"
    web.mkdir(parents=True, exist_ok=True)
    shutil.copytree(WEB, web / "dist", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.map", "*webgpu*", "*jsep*"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    browser = subprocess.Popen([CHROMIUM, *flags, f"http://127.0.0.1:{server.server_port}/{page}"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert arrived.wait(timeout), f"{page} sent nothing within {timeout} s"
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
        server.server_close()
    assert "error" not in answer[0], answer[0]
    return answer[0]


REPORT = """const send = result => fetch("/", {method: "POST", body: JSON.stringify(result)});
addEventListener("unhandledrejection", event => send({error: String(event.reason)}));
addEventListener("error", event => send({error: String(event.message)}));
"""


def test_onnxruntime_web(task):
    folder, _, images, expected = task
    (folder / "images.bin").write_bytes(images.tobytes())
    (folder / "logits.html").write_text(f"""<script>{REPORT}</script>
<script src="node_modules/onnxruntime-web/dist/ort.wasm.min.js"></script><script type="module">
const images = new Float32Array(await (await fetch("images.bin")).arrayBuffer());
const session = await ort.InferenceSession.create("model.onnx");
const size = {images[0].size}, logits = [];
for (let i = 0; i < images.length; i += size) {{
  const image = new ort.Tensor("float32", images.subarray(i, i + size), {[1, *images.shape[1:]]});
  logits.push(...(await session.run({{image}})).logits.data);
}}
send({{logits}});
</script>""")
    same(browse(folder, "logits.html")["logits"], expected)


def test_the_page_of_the_readme(task, monkeypatch):
    """README's page, as it stands there, on photos of their full size as PNG: the labels of export.py --run, and nearly its
    probabilities."""
    image = pytest.importorskip("PIL.Image")
    folder, run, _, _ = task
    page = re.search(r"^```html\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    monkeypatch.chdir(folder)
    (folder / "page").mkdir()
    assert export.main(["runs/run", "--resize", "--output", "probabilities", "-o", "page/model.onnx"]) == 0
    graph = export.in_onnxruntime(export.session("page/model.onnx"))
    pixels, expected = run.data.test.pixels.permute(0, 2, 3, 1).numpy()[::3], []
    for i, each in enumerate(pixels):
        image.fromarray(each).save(folder / "page" / f"{i}.png")
        expected.append(graph(each[None])[0][0])
    (folder / "page/index.html").write_text(page + f"""<script>{REPORT}</script><script type="module">
const labels = [];
for (let i = 0; i < {len(pixels)}; i++) labels.push(await label(await (await fetch(i + ".png")).blob()));
send({{labels}});
</script>""")
    labels = browse(folder / "page", "index.html")["labels"]
    assert len(labels) == len(pixels)
    for text, wanted in zip(labels, expected, strict=True):
        name, percent = re.match(r"(.+?) ([\d.]+) %", text).groups()
        assert name == run.data.classes[wanted.argmax()]
        assert abs(float(percent) - 100 * wanted.max()) < 0.2
