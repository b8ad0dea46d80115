"""Kill training at any point, continue it with --resume, and compare with an undisturbed run.

    python tests/kill_runs.py --random 200     SIGKILL at random moments, up to three times a run
    python tests/kill_runs.py --points         a kill before each file is opened for writing, moved,
                                               removed or created, and in the middle of each write
    python tests/kill_runs.py --downloads 35   the same for downloads, over a real connection

The names and bytes of all files are compared; in result.json, metrics.csv and config.json, all
values except times, memory and --resume.

Each run is a process forked from this one, which has already imported torch.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # optimisers import it: do so once, here

import data
import train

with contextlib.suppress(ImportError):  # for pictures: import these once, too
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import matplotlib.image  # noqa: F401

RUN = ["--limit", "48", "--batch", "8", "--epochs", "3", "--method", "adaptformer", "--rank", "8"]
RUN += ["--name", "x"]
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
TIMES = {"img/s", "elapsed", "left", "seconds"}


def fork(work: Callable[[], int], folder: Path) -> int:
    """Fork a process that does `work` in a folder and logs to its file `log`; return its id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - until the process ends
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        status = work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """A process's exit status; -9 if it was killed."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run(*more: str) -> int:
    """Run the command line; called in a forked process."""
    return train.main([*RUN, *more])


class Points:
    """Counts a run's operations on its files, and kills the process with SIGKILL at one of them."""

    def __init__(self, folder: Path, target: int = 0):
        self.folder = str(folder)
        self.target = target
        self.names: list[str] = []

    def passes(self, name: str) -> bool:
        """Count a point; return whether the process is to be killed there."""
        self.names.append(name)
        return len(self.names) == self.target

    def watch(self, event: str, arguments: tuple) -> None:
        """An audit hook (https://peps.python.org/pep-0578/)."""
        if event != "open" and event not in EVENTS:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        if event == "open":
            flags = arguments[2] or 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        path = os.path.abspath(path)  # noqa: PTH100 - raises no audit event itself
        if path.startswith(self.folder) and self.passes(f"{event} {path[len(self.folder) :]}"):
            os.kill(os.getpid(), signal.SIGKILL)

    def start(self) -> None:
        """Watch every event from now on, and the middle of each write."""
        replacing = data.replacing

        @contextlib.contextmanager
        def half(path: Path):
            with replacing(path) as file:
                yield Half(file, self, path.name)

        data.replacing = half
        sys.addaudithook(self.watch)


class Half:
    """A file whose process is killed in the middle of a write."""

    def __init__(self, file, points: Points, name: str):
        self.file = file
        self.points = points
        self.name = name
        self.writes = 0

    def write(self, content: bytes) -> int:
        self.writes += 1
        # torch.save makes some hundred writes: the 1st, 2nd, 4th, 8th, … are enough.
        chosen = self.writes.bit_count() == 1
        if chosen and self.points.passes(f"amid write {self.writes} of {self.name}"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(content)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def ending(folder: Path) -> dict[str, str]:
    """A hash for each file that a run has left."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.name in ("result.json", "config.json"):
            values = json.loads(content)
            for name in ("seconds", "memory", "made", "resume"):
                values.pop(name, None)
            content = json.dumps(values).encode()
        elif path.name == "metrics.csv":
            rows = list(csv.DictReader(content.decode().splitlines()))
            rows = [{key: row[key] for key in row if key not in TIMES} for row in rows]
            content = json.dumps(rows).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()[:12]
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """The names of the files that differ from the undisturbed run's; "" if none does."""
    names = sorted(set(found) | set(expected))
    return ", ".join(name for name in names if found.get(name) != expected.get(name))


@contextlib.contextmanager
def work_folder(outer: Path):
    """A new folder for one run, removed afterwards."""
    folder = Path(tempfile.mkdtemp(dir=outer))
    yield folder
    shutil.rmtree(folder)


def undisturbed(outer: Path) -> tuple[dict[str, str], float]:
    """The files of an undisturbed run, and how long it takes."""
    with work_folder(outer) as folder:
        started = time.perf_counter()
        if wait(fork(run, folder)):
            raise SystemExit((folder / "log").read_text())
        return ending(folder / "runs"), time.perf_counter() - started


def finish(folder: Path, expected: dict[str, str]) -> str:
    """Resume a killed run. Returns what went wrong, or ""."""
    status = wait(fork(lambda: run("--resume"), folder))
    if status:
        return f"status {status}: {(folder / 'log').read_text()[-300:]}"
    return differences(ending(folder / "runs"), expected)


def kill_at_points(outer: Path, step: int = 1, first: int = 1) -> tuple[int, list[str]]:
    """Kill a run at every `step`-th point and resume it. Returns the number of kills, and what went
    wrong."""
    expected, _ = undisturbed(outer)
    with work_folder(outer) as folder:

        def count() -> int:
            points = Points(folder)
            points.start()
            status = run()
            (folder / "points").write_text("\n".join(points.names))
            return status

        if wait(fork(count, folder)):
            raise SystemExit((folder / "log").read_text())
        names = (folder / "points").read_text().splitlines()
    wrong = []
    targets = range(first, len(names) + 1, step)
    for target in targets:
        with work_folder(outer) as folder:

            def killed(folder: Path = folder, target: int = target) -> int:
                Points(folder, target).start()
                return run()

            if wait(fork(killed, folder)) != -signal.SIGKILL:
                wrong.append(f"{target} ({names[target - 1]}): it wasn't reached")
                continue
            problem = finish(folder, expected)
            if problem:
                wrong.append(f"{target} ({names[target - 1]}): {problem}")
    return len(targets), wrong


def kill_at_random(outer: Path, count: int) -> tuple[int, int, list[str]]:
    """Kill runs up to three times each at random moments, until there were `count` kills. Returns
    how many kills and runs there were, and what went wrong."""
    expected, seconds = undisturbed(outer)
    rng = random.Random(0)
    wrong = []
    kills = 0
    runs = 0
    while kills < count:
        runs += 1
        with work_folder(outer) as folder:
            more = []
            for _ in range(rng.randint(1, 3)):
                child = fork(lambda more=more: run(*more), folder)
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                kills += wait(child) == -signal.SIGKILL
                more = ["--resume"]
            problem = finish(folder, expected)
            if problem:
                wrong.append(f"run {runs}: {problem}")
    return kills, runs, wrong


def kill_downloads(outer: Path, count: int) -> list[str]:
    """Kill each download over a slow connection once and start it again; every second one runs
    beside another process that downloads the same file. Returns what went wrong."""
    from conftest import serve

    rng = random.Random(0)
    body = rng.randbytes(3_000_000)

    def send(handler) -> None:
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        for place in range(start, len(body), 100_000):
            handler.wfile.write(body[place : min(place + 100_000, len(body))])
            time.sleep(0.01)

    server = next(serving := serve())
    server.handle_error = lambda *_: None  # killed clients cause errors
    server.answers["/f"] = send
    wrong = []
    for number in range(count):
        with work_folder(outer) as folder:

            def fetch(folder: Path = folder) -> int:
                data.download(f"{server.url}/f", folder / "f")
                return 0

            child = fork(fetch, folder)
            other = fork(fetch, folder) if number % 2 else None
            time.sleep(rng.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            wait(child)
            status = wait(fork(fetch, folder))
            if other:
                status = status or wait(other)
            names = sorted(path.name for path in folder.iterdir())
            if status or (folder / "f").read_bytes() != body or names != ["f", "log"]:
                wrong.append(f"{number}: status {status}, {names}")
    del serving
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--random", type=int, default=0, metavar="N", help="kills at random")
    parser.add_argument("--points", action="store_true", help="a kill at every write and move")
    parser.add_argument("--downloads", type=int, default=0, metavar="N", help="killed downloads")
    options = parser.parse_args()
    if not (options.random or options.points or options.downloads):
        parser.error("give --random N, --points or --downloads N")
    torch.set_num_threads(1)
    outer = Path(tempfile.mkdtemp())
    wrong = []
    if options.points:
        count, found = kill_at_points(outer)
        print(f"points     {count} kills, {len(found)} runs that ended otherwise")
        wrong += found
    if options.random:
        kills, runs, found = kill_at_random(outer, options.random)
        print(f"random     {kills} kills in {runs} runs, {len(found)} that ended otherwise")
        wrong += found
    if options.downloads:
        found = kill_downloads(outer, options.downloads)
        print(f"downloads  {options.downloads} kills, {len(found)} that ended otherwise")
        wrong += found
    shutil.rmtree(outer)
    for text in wrong:
        print(text)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
