"""Robustness: kills, full disks, closed streams, hostile files, two processes at once.

tests/kill_runs.py and tests/fuzz_readers.py, which are run by hand, test more of it."""

import contextlib
import errno
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz_readers
import onnx
import pytest
import torch
from conftest import ROOT, full_disk, runner
from safetensors.torch import save_file

import adaptertune
import data
import export
import train
import vit

QUICK = ["--limit", "48", "--batch", "16", "--epochs", "1"]


@pytest.fixture
def place(tmp_path, monkeypatch, few_pictures):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys, place):
    """A function that runs train.py's main."""
    return runner(train.main, capsys)


@pytest.fixture
def finished(run, tiny_weights, place):
    """The folder of a finished run."""
    run("--weights", tiny_weights, *QUICK, "--name", "a")
    return place / "runs" / "a"


def program(*arguments, script="train.py", **more):
    """A process that runs one of the programs."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | more)


# ----------------------------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread: the processes that are forked can't use a pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def forked(text, place):
    """Run lines of Python in a process of their own and return the output."""
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]\n{text}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=place, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_any_write(tmp_path, tiny_weights):
    """A run killed before, amid and after some of its writes, and then resumed, leaves the same
    files as an undisturbed run."""
    out = forked(
        f"""
import pathlib, torch, kill_runs
torch.set_num_threads(1)
kill_runs.RUN += ["--weights", {str(tiny_weights)!r}]
count, wrong = kill_runs.kill_at_points(pathlib.Path({str(tmp_path)!r}), step=29, first=8)
print(count, wrong)
""",
        tmp_path,
    )
    count, _, wrong = out.splitlines()[-1].partition(" ")
    assert int(count) >= 3
    assert wrong == "[]"


def test_a_state_that_can_not_be_read(run, tiny_weights, place, monkeypatch):
    """A state too large for the memory isn't called damaged: its folder would be deleted."""
    run("--weights", tiny_weights, *QUICK, "--name", "a")
    (place / "runs/a/state.pt").write_bytes(b"whole")

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(vit, "check_archive", no_memory)
    error = run("--weights", tiny_weights, *QUICK, "--name", "a", "--resume", status=1)
    assert error == "error: not enough memory; give a smaller --batch or --image-size\n"


@pytest.mark.parametrize("content", ["", "{"])
def test_emptied_config_is_named(run, tiny_weights, place, content):
    """An empty or half-written config.json, as left by an older version, is named in an error."""
    run("--weights", tiny_weights, *QUICK, "--name", "a")
    (place / "runs/a/config.json").write_text(content)
    for arguments in (["--eval", "runs/a"], ["--weights", tiny_weights, *QUICK, "--name", "a"]):
        error = run(*arguments, status=1)
        assert re.fullmatch(
            r"error: runs/a/config.json can't be used \(.*\); restore it.*\n", error
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_export_leaves_nothing(finished, capsys, number):
    """SIGTERM removes what export had begun; the next export removes what SIGKILL left."""
    before = sorted(path.name for path in finished.iterdir())
    process = program("runs/a", script="export.py")
    for line in process.stdout:
        if line.startswith("check"):
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    left = sorted(path.name for path in finished.iterdir())
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert left == before
    else:
        assert process.returncode == -signal.SIGKILL
        assert left == sorted([*before, "export.part"])
    runner(export.main, capsys)("runs/a")
    after = sorted(path.name for path in finished.iterdir())
    assert after == sorted([*before, "labels.txt", "model.onnx"])


# ------------------------------------------------------------------------- two processes at once


def test_one_process_in_a_folder(run, tiny_weights, place):
    """A second process that wants a run's folder gets an error; the folder can be used later."""
    with data.locked(place / "runs/a", folder=True):
        error = run("--weights", tiny_weights, *QUICK, "--name", "a", status=1)
        assert (
            error
            == "error: another process is at work in runs/a; wait for it, or give another --name\n"
        )
    assert "saved    runs/a" in run("--weights", tiny_weights, *QUICK, "--name", "a")


def test_two_runs_of_one_name(tiny_weights, place):
    """Of two processes that start the same run, one trains it, and the other says why it doesn't,
    or finds it finished."""
    arguments = ["--weights", tiny_weights, *QUICK, "--name", "a"]
    both = [program(*arguments) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    statuses = sorted(process.returncode for process in both)
    assert statuses in ([0, 0], [0, 1])
    for process, (_, error) in zip(both, ends, strict=True):
        lines = error.splitlines()
        assert len(lines) == (1 if process.returncode else 0), error
    result = json.loads((place / "runs/a/result.json").read_text())
    assert result["epochs"] == 1
    assert not list((place / "runs/a").glob("*.part"))


def test_other_epochs_go_to_a_folder_of_their_own(run, tiny_weights, place):
    """30 epochs given by hand and 30 by default are two runs: the first one's folder isn't written
    to again."""
    run("--weights", tiny_weights, "--limit", 40, "--epochs", 30)
    folder = place / "runs/digits-adaptertune-r8-n40-s0"
    before = (folder / "split.json").stat().st_mtime_ns
    out = run("--weights", tiny_weights, "--limit", 40)
    assert "30 epochs of" in out
    assert f"saved    {folder.relative_to(place)}-2/adapters.safetensors" in out
    assert (folder / "split.json").stat().st_mtime_ns == before


def test_folders_that_come_and_go(tmp_path):
    """Three processes that keep making and removing the same folder never find it missing."""
    code = f"""
import multiprocessing, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import data
def work():
    for i in range(300):
        with data.empty_folder(pathlib.Path({str(tmp_path / "x.part")!r})) as part:
            (part / "f").write_text("mine")
            assert [path.name for path in part.iterdir()] == ["f"]
fork = multiprocessing.get_context("fork")  # torch is imported once
three = [fork.Process(target=work) for _ in range(3)]
for process in three:
    process.start()
for process in three:
    process.join()
print([process.exitcode for process in three])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    error = re.sub("waiting for another process that writes .*\n", "", done.stderr)
    assert (done.stdout, error.strip()) == ("[0, 0, 0]\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_not_there(run, tiny_weights, place):
    """A missing folder, or a link to one, as on an absent disk, gives a one-line error."""
    with pytest.raises(ValueError, match=r"can't write .*x \(No such file or directory\); fix"):
        data.write_file(place / "gone" / "x", "content")
    (place / "runs").symlink_to(place / "gone")
    error = run("--weights", tiny_weights, *QUICK, status=1)
    assert error == "error: runs is a link to nothing; mend it or remove it\n"


def test_a_failed_start_leaves_no_folder(run, tiny_weights, place):
    """An error before the first epoch leaves nothing behind."""
    run("--weights", tiny_weights, "--dataset", "cifar10", "--offline", status=1)
    assert list(place.iterdir()) == []


# ------------------------------------------------------------------------------------- full disks


def test_full_disk_is_one_line(run, tiny_weights, place):
    """A full disk ends a run with a one-line error; --resume finishes it."""
    arguments = ["--weights", tiny_weights, *QUICK, "--name", "a"]
    # config.json, metrics.csv and split.json fit, state.pt doesn't.
    process = program(*arguments, preexec_fn=full_disk(10_000))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(
        r"error: can't write runs/a/\S+ \(File too large\); fix that first\n", error
    )
    assert (place / "runs/a/split.json").exists()
    assert not list((place / "runs/a").glob("*.part"))
    run(*arguments, "--resume")
    assert (place / "runs/a/adapters.safetensors").exists()


def test_full_disk_keeps_the_old_file(tmp_path):
    """A failed write leaves the earlier file as it was, and nothing beside it."""
    path = tmp_path / "state.pt"
    data.write_file(path, "old")
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import data
data.write_file(pathlib.Path({str(path)!r}), bytes(2000))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=full_disk(1000), check=False
    )
    assert re.search(r"ValueError: can't write .*state.pt \(File too large\)", done.stderr)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["runs", "runs/a"])
def test_a_file_in_the_way(run, tiny_weights, place, name):
    """A file where a folder should be is reported before the first epoch."""
    path = place / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    error = run("--weights", tiny_weights, *QUICK, "--name", "a", status=1)
    assert re.fullmatch(r"error: can't write to .* \(Not a directory\); change .*\n", error)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="another folder, or give another -o$"):
        export.staged(path / "folder").__enter__()


def test_a_full_disk_during_export(tmp_path):
    """The error names the folder, and nothing is left behind."""
    message = r"can't write to .*/new \(No space left on device\); make room"
    with pytest.raises(ValueError, match=message), export.staged(tmp_path / "new") as part:
        (part / "model.onnx").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- streams


def test_closed_streams(tiny_weights, place):
    """A run needs no terminal: with stderr closed, or all three streams, it trains, and its
    adapters can be read."""
    command = [sys.executable, str(ROOT / "train.py"), "--weights", str(tiny_weights), *QUICK]
    both = []
    for name, closed in (("a", "2>&-"), ("b", "0<&- 1>&- 2>&-")):
        text = " ".join(command) + f" --name {name} {closed}"
        both.append(subprocess.Popen(["bash", "-c", text], cwd=place))
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    for name in ("a", "b"):
        adaptertune.read(f"runs/{name}/adapters.safetensors")


@pytest.mark.parametrize("encoding", ["ascii", "cp932"])
def test_help_on_any_terminal(place, encoding):
    """--help is shown even if the terminal lacks some of its characters."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    process = program("--help", env=environment, encoding=encoding)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "--rank" in out


def test_names_do_not_steer_the_terminal(run, photos, tiny_weights, place):
    """Control characters in a class name are replaced by a mark, in the output and in README.md."""
    for file in sorted((photos / "leaf").iterdir())[5:]:
        file.unlink()  # so that the output names it as the smallest class
    (photos / "leaf").rename(photos / "le\x1b[31maf")
    out = run("--dataset", photos, "--weights", tiny_weights, "--epochs", 1, "--class-weights")
    assert " training images (le\ufffd[31maf) to " in out
    assert "\x1b" not in out
    card = next(place.glob("runs/*/README.md")).read_text()
    assert "le\ufffd[31maf" in card
    assert "\x1b" not in card


def test_a_name_that_is_not_utf8(run, tiny_weights, place):
    """A run whose name isn't UTF-8 finishes like any other."""
    name = os.fsdecode(b"caf\xe9")
    run("--weights", tiny_weights, *QUICK, "--name", name)
    assert "caf\ufffd" in (place / "runs" / name / "README.md").read_text(encoding="utf-8")


def test_half_a_character(run, finished, place):
    """In a stranger's class name, half of a surrogate pair is replaced by a mark."""
    split = json.loads((finished / "split.json").read_text())
    edit(finished / "split.json", classes=["\ud800", *split["classes"][1:]])
    assert "the run has \ufffd, 1" in run("--eval", "runs/a", status=1)
    assert data.as_utf8("a\ud800\udcc3\udca9\udfff") == "a\ufffdé\ufffd"


def test_names_of_several_lines(run, finished, place):
    """A line break in a photo's name can't forge a line of results, nor a second error."""
    image = pytest.importorskip("PIL.Image")
    forged = place / "a\nforged.png  cat 99 %"
    image.new("RGB", (20, 20)).save(forged, format="PNG")
    assert len(run("--predict", "runs/a", forged).splitlines()) == 1
    run("--predict", "ba\nerror: se", "p.png", status=2)


@pytest.mark.parametrize("arguments", [[], ["--eval", "runs/none"], ["--rank", "x"]], ids=" ".join)
def test_a_notebook_gets_its_process_back(arguments, place, capsys):
    """`main` leaves streams and signal handlers as they were before, however it ends."""

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return sys.stdout, sys.stderr, *handlers

    before = state()
    with contextlib.suppress(SystemExit):
        train.main([*arguments, *QUICK])
    assert state() == before


def test_a_line_after_the_progress(capsys, place, monkeypatch):
    """A line that is printed during progress replaces the progress line."""

    def work():
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        data.progress("photo", 1, 4, started=time.perf_counter())
        print("skipped", file=sys.stderr)
        print("next", file=sys.stderr)
        return 0

    assert train.run_program(work, str) == 0
    assert capsys.readouterr().err.endswith(" \rskipped\nnext\n")


# ------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize(
    "arguments",
    [["--eval", ""], ["--eval="], ["--weights", ""], ["--name", ""], ["--predict", "runs/a", ""]],
    ids=" ".join,
)
def test_empty_arguments(run, arguments):
    """An empty argument, as from an unset variable, isn't taken for a missing option."""
    error = run(*arguments, status=2)
    assert error.startswith("error: an argument is empty (")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--blocks", "first0"],
        ["--blocks", "last0"],
        ["--blocks", "first300000000"],
        ["--image-size", "100000"],
    ],
    ids=" ".join,
)
def test_numbers_without_measure(run, arguments):
    """Numbers that would take all memory, or mean something else, are refused when parsed."""
    assert re.match("error: argument --", run(*arguments, status=2))


def test_out_of_memory_is_one_line(run, tiny_weights, monkeypatch):
    """torch's error for a CPU that is out of memory becomes one line."""

    def no_memory(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes")

    monkeypatch.setattr(train, "take_step", no_memory)
    error = run("--weights", tiny_weights, *QUICK, status=1)
    assert error == "error: not enough memory; give a smaller --batch or --image-size\n"


# -------------------------------------------------------------------------------- hostile files


def test_modules_without_end():
    """A TorchScript module that contains itself twice is read once."""
    module = vit.ScriptModule()
    module["x"] = torch.zeros(1)
    module["one"] = module
    module["two"] = module
    assert list(vit.script_tensors(module)) == ["x"]


@pytest.mark.parametrize("content", ['{"weight_map": {"a": 5}}', "[" * 200_000, "{}"])
def test_a_damaged_index(tmp_path, content):
    """A damaged index of weights in several parts is refused, whatever it contains."""
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="index.json can't be used .*; fetch that index"):
        vit.load(path)


def test_a_file_that_holds_itself(tmp_path):
    """A dictionary in a .pth file that contains itself is read once."""
    content = {"x": torch.zeros(2)}
    content["again"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not a ViT in a known layout .* begin with x"):
        vit.load(tmp_path / "w.pth")


def test_blocks_without_number(tiny_weights, tmp_path):
    """A tensor of block 300,000,000 doesn't make a network of as many blocks."""
    tensors, _ = vit.read_tensors(tiny_weights)
    tensors["blocks.300000000.norm1.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "w.safetensors")
    message = r"12 missing: blocks\.2\..*; 1 left over: blocks\.300000000\.norm1\.weight$"
    with pytest.raises(ValueError, match=message):
        vit.load(tmp_path / "w.safetensors", heads=2)


def test_views_of_one_number(tmp_path):
    """A small file whose tensors would fill the memory is refused by its size."""
    torch.save({"cls_token": torch.zeros(1).expand(10**12)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds tensors of 4,000,000,000,000 bytes, far more than"):
        vit.load(tmp_path / "w.pth")


def test_a_compressed_archive(tmp_path):
    """A zip archive that unpacks to a hundred times its size isn't unpacked."""
    import zipfile

    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    with pytest.raises(ValueError, match="it is compressed, and unpacks to 200,000,000 bytes"):
        vit.load(path)


def test_a_compressed_vocabulary(tmp_path):
    """A gzip file of zeros isn't taken for a vocabulary, nor unpacked to its end."""
    path = tmp_path / "v.txt.gz"
    path.write_bytes(gzip.compress(bytes(10**9), 1))
    started = time.process_time()
    with pytest.raises(ValueError, match="not a CLIP vocabulary"):
        vit.Tokenizer(path)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", ["x.png", "w.pth", "v.txt"])
def test_pipes_are_not_waited_for(tmp_path, name):
    """A pipe in place of a photo, weights or a vocabulary is refused at once."""
    if name == "x.png":
        pytest.importorskip("PIL")
    path = tmp_path / name
    os.mkfifo(path)
    readers = {"x.png": lambda: data.open_photo(path, 32), "w.pth": lambda: vit.load(path)}
    with pytest.raises(ValueError, match="pipe|no weights|not a CLIP vocabulary"):
        readers.get(name, lambda: vit.Tokenizer(path))()


# --------------------------------------------------------------------------- a stranger's run


def edit(path, **changes):
    """Change values of a file of JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"batch": "many"}),
        ("config.json", {"rank": -1}),
        ("config.json", {"seeds": [None]}),
        ("config.json", {"blocks": [[1]]}),
        ("config.json", {"dataset": 5}),
        ("split.json", {"train": "abc"}),
        ("split.json", {"checksums": [1]}),
        ("split.json", {"classes": [["a"]]}),
    ],
    ids=str,
)
def test_wrong_types(run, finished, file, changes):
    """A value of a wrong type in a run's files gives one line that names file and value."""
    edit(finished / file, **changes)
    error = run("--eval", "runs/a", status=1)
    key = next(iter(changes))
    assert re.fullmatch(rf"error: runs/a/{file} can't be used \({key} is .*\n", error)


@pytest.mark.parametrize(("file", "key"), [("config.json", "amp"), ("result.json", "epoch")])
def test_what_more_epochs_need(run, finished, tiny_weights, file, key):
    """A run's file that lacks a value that more epochs need gives a one-line error."""
    values = json.loads((finished / file).read_text())
    del values[key]
    (finished / file).write_text(json.dumps(values))
    more = ["--weights", tiny_weights, *QUICK[:-1], 2, "--name", "a", "--resume"]
    assert f"runs/a/{file} can't be used (it lacks {key})" in run(*more, status=1)


@pytest.mark.parametrize("name", ["config.json", "split.json", "result.json", "metrics.csv"])
def test_a_pipe_in_a_run(run, finished, tiny_weights, name):
    """A pipe in place of a run's file isn't waited for."""
    (finished / name).unlink()
    os.mkfifo(finished / name)
    arguments = ["--eval", "runs/a"]
    if name in ("result.json", "metrics.csv"):
        arguments = ["--weights", tiny_weights, *QUICK[:-1], 2, "--name", "a", "--resume"]
    assert f"runs/a/{name} is" in run(*arguments, status=1)


def test_a_pipe_where_a_file_is_written(run, finished):
    """A pipe under a file's temporary name doesn't block the writing of that file."""
    os.mkfifo(finished / "predictions.csv.part")
    run("--eval", "runs/a")
    assert not (finished / "predictions.csv.part").exists()


def test_adapters_that_are_not_finite(run, finished):
    """Adapters with NaN are refused, since their predictions would look like a result."""
    path = finished / "adapters.safetensors"
    tensors, meta = adaptertune.read(path)
    tensors["head.bias"][0] = float("nan")
    save_file(tensors, path, {"adaptertune": json.dumps(meta)})
    assert "head.bias has values that aren't finite" in run("--eval", "runs/a", status=1)


@pytest.mark.parametrize("classes", [[1, 2], ["a"], ["a\nb", "c"]], ids=str)
def test_wrong_types_in_adapters(run, finished, classes):
    """Class names of a wrong type or of two lines, or just one class, in the adapters' metadata are
    refused."""
    path = finished / "adapters.safetensors"
    tensors, meta = adaptertune.read(path)
    save_file(tensors, path, {"adaptertune": json.dumps(meta | {"classes": classes})})
    error = run("--predict", "runs/a", "x.png", status=1)
    assert re.fullmatch(r"error: runs/a/adapters.safetensors is damaged .*classes is .*\n", error)


def test_nothing_is_written_elsewhere(run, finished, place, server, monkeypatch):
    """A stranger's run doesn't decide where a data set is downloaded to."""
    elsewhere = place / "elsewhere" / "data"
    edit(finished / "config.json", dataset="cifar10", data_dir=str(elsewhere))
    monkeypatch.setattr(data, "CIFAR", f"{server.url}/")
    run("--eval", "runs/a", status=1)
    assert not elsewhere.parent.exists()


def test_no_action_of_its_own(run, finished, place):
    """Actions in a stranger's config.json, such as a --csv of its own, are ignored."""
    image = pytest.importorskip("PIL.Image")
    photo = place / "photo.png"
    image.new("RGB", (20, 20)).save(photo)
    letter = place / "letter"
    letter.write_text("dear")
    edit(finished / "config.json", csv=str(letter), predict=["runs/a", "x.png"], resume=True)
    run("--eval", "runs/a")
    run("--predict", "runs/a", photo)
    assert letter.read_text() == "dear"


@pytest.mark.usefixtures("pictures")
def test_links_are_not_followed(run, finished, place, capsys):
    """Links in a stranger's folder, under the names of files that are written there, don't let
    anything outside it be overwritten or emptied."""
    mine = place / "mine"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    for name in ("predictions.csv", "predictions.csv.part", "mistakes.png.part"):
        (finished / name).unlink(missing_ok=True)
        (finished / name).symlink_to(mine / "letter")
    (finished / "export.part").symlink_to(mine)
    run("--eval", "runs/a")
    assert (finished / "predictions.csv").read_text().startswith("file,split,label")
    runner(export.main, capsys)("runs/a")
    assert (mine / "letter").read_text() == "dear"


def test_hard_links_are_not_written_to(run, finished, place):
    """A file of a stranger's folder that has another name outside, as tar can make it, is not
    written to."""
    (place / "letter").write_text("dear")
    (finished / "predictions.csv").unlink()
    for name in ("predictions.csv", "predictions.csv.part", "mistakes.png.part"):
        os.link(place / "letter", finished / name)
    run("--eval", "runs/a")
    assert (finished / "predictions.csv").read_text().startswith("file,split,label")
    assert (place / "letter").read_text() == "dear"


@pytest.mark.parametrize("kind", ["symbolic", "hard", "folder"])
def test_links_in_a_shared_cache(photos, place, monkeypatch, kind):
    """Links that another user put into the cache of photos lead to nothing that is overwritten."""
    pytest.importorskip("PIL")
    monkeypatch.setenv("ADAPTERTUNE_CACHE", str(place / "cache"))
    data.read(str(photos), image_size=16)
    (cached,) = (place / "cache/photos").iterdir()
    mine = place / "mine"
    mine.mkdir()
    (mine / "pixels").write_text("dear")
    if kind == "folder":
        cached.rename(place / "other")
        cached.symlink_to(mine)
    else:
        (cached / "index").write_text(f"{data.made_by(data.Square(18))}\n")
        (cached / "pixels").unlink()
        link = os.link if kind == "hard" else os.symlink
        link(mine / "pixels", cached / "pixels")
    assert len(data.read(str(photos), image_size=16).train) == 60
    assert (mine / "pixels").read_text() == "dear"
    assert [path.name for path in mine.iterdir()] == ["pixels"]


ROW = ("1", "1.0", "50.00", "50.00", "5", "0:01", "0:01", "1.0", "0.1", "1.0")  # of metrics.csv


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_time": math.inf}, "impossible epochs, steps, times"),
        ({"eval_time": math.nan}, "impossible epochs, steps, times"),
        ({"best_val": 1e300}, "impossible epochs, steps, times or accuracies"),
        ({"loss": torch.zeros((), dtype=torch.float64, device="meta")}, "loss isn't a scalar"),
        ({"hits": torch.zeros((), dtype=torch.int32)}, "hits isn't a scalar of torch.int64"),
        ({"rows": [[*ROW[:5], None, *ROW[6:]]]}, "no row for epoch 1"),
        ({"rows": [[*ROW[:7], "1e308", *ROW[8:]]]}, "seconds 1e308 in epoch 1"),
        ({"rows": [[*ROW[:3], "inf", *ROW[4:]]]}, "val% inf in epoch 1"),
        ({"rows": [list(ROW)], "best_val": math.nan}, ""),  # as without validation images
    ],
    ids=str,
)
def test_impossible_states(run, tiny_weights, place, monkeypatch, capsys, changes, message):
    """A state.pt with values that no run has gives one line when its run is resumed."""
    two = [*QUICK[:-1], "2", "--name", "a"]
    plain = train.train_epoch

    def train_epoch(running, optimizer):
        if running.state.epoch == 2:
            raise KeyboardInterrupt
        plain(running, optimizer)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    assert train.main(["--weights", str(tiny_weights), *two]) == 130
    capsys.readouterr()
    path = place / "runs/a/state.pt"
    saved = torch.load(path, weights_only=True)
    assert len(saved["rows"][0]) == 10
    torch.save(saved | changes, path)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    out = run("--weights", tiny_weights, *two, "--resume", status=1 if message else 0)
    assert (f"error: runs/a/state.pt can't be used ({message}" in out) == bool(message)


def test_folders_without_end(run, finished, place):
    """Folders that are nested more deeply than Python can follow give one line."""
    pytest.importorskip("PIL")
    (place / "deep").joinpath(*420 * "d").mkdir(parents=True)
    error = run("--predict", "runs/a", "deep", status=1)
    assert error == "error: the folders in deep are nested more than 400 deep\n"


def test_metadata_that_a_stranger_adds(finished, capsys):
    """Further keys in a run's metadata can't change what the graph tells other programs; its names
    can't act as Markdown."""
    path = finished / "adapters.safetensors"
    tensors, meta = adaptertune.read(path)
    meta["dataset"] = "x` [click](http://localhost)"
    strange = {"names": "__import__('os')", "kpt_shape": "[1, 2]", "swappable": "x"}
    save_file(tensors, path, {"adaptertune": json.dumps(meta | strange)})
    run_export = runner(export.main, capsys)
    for output in ("logits", "embedding"):
        run_export("runs/a", "--images", 8, "--output", output, "-o", "a.onnx")
        props = {each.key: each.value for each in onnx.load("a.onnx").metadata_props}
        assert props.get("names", "{0: ").startswith("{0: ")
        assert not {"kpt_shape", "swappable"} & set(props)
    run_export("runs/a", "--hub", "hub", "--images", 8, "--force")
    assert "on `x' [click](http://localhost)`. Accuracy" in Path("hub/README.md").read_text()


def test_a_killed_export_leaves_no_mixture(finished, capsys, monkeypatch):
    """If an export of several files stops while they are moved, no old file is beside a new one."""
    run_export = runner(export.main, capsys)
    run_export("runs/a", "--hub", "hub", "--images", 8, "--force")
    moved = []

    def move(part, path):
        if "export.part" not in path.parts:  # else it is being written
            if moved:
                raise OSError("no more")
            moved.append(path)
        os.replace(part, path)

    monkeypatch.setattr(data, "move", move)
    run_export("runs/a", "--hub", "hub", "--images", 8, "--force", status=1)
    left = [path for path in Path("hub").rglob("*") if path.is_file()]
    assert left == moved


def test_a_name_stays_below_runs(run, tiny_weights, place):
    """A data set's name in a stranger's result.json isn't used as a path."""
    for seed in (0, 1):
        name = f"digits-adaptertune-r8-n48-s{seed}"
        run("--weights", tiny_weights, *QUICK, "--seed", seed)
        edit(place / "runs" / name / "result.json", dataset="../../x")
    run("--weights", tiny_weights, *QUICK, "--seeds", "0,1")
    assert [path.name for path in place.iterdir()] == ["runs"]
    assert list(place.glob("runs/*comparison.csv"))


# ------------------------------------------------------------------------------------- every file


@pytest.mark.parametrize("name", fuzz_readers.READERS)
def test_damaged_files(name, damaged_folder, monkeypatch):
    """Each of ten damaged files of a kind gives a result or a one-line error."""
    if name in ("predict", "graph", "annotations", "names") or name.startswith("photo"):
        pytest.importorskip("PIL")
    monkeypatch.chdir(damaged_folder)
    monkeypatch.setattr(fuzz_readers, "SECONDS", 10)  # on a busy machine
    assert fuzz_readers.fuzz(name, damaged_folder, 10) == []


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory, one_thread):
    """A folder with the valid files, which are damaged one at a time."""
    folder = tmp_path_factory.mktemp("fuzz") / "work"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    fuzz_readers.make_files(folder)
    os.chdir(before)
    return folder
