"""A large folder of photos: time of the first pass and of later starts, memory, a killed pass.

    python tests/bench_photos.py --count 100000 --size 224

The script generates the photos, JPEGs of 96 x 72 pixels. Decoded at 224 px, 100,000 of them take
20 GB of disk, twice: once decoded in one pass, and once in a pass that is killed half-way and then
continued, which must give the same bytes. Training is observed for a minute on all photos and on a
thousand of them: the difference is the memory that the others take.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
READ = """
import sys, time
sys.path.insert(0, {root!r})
import data
started = time.perf_counter()
data.read({folder!r}, image_size={size})
print("seconds", time.perf_counter() - started)
"""


def make_photos(folder, first, count):
    """Write `count` photos, numbered from `first`: blobs of colour, in a hundred classes."""
    draw = np.random.default_rng(first)
    for i in range(first, first + count):
        blots = draw.integers(0, 256, (6, 8, 3), np.uint8)
        path = folder / f"class{i % 100:03d}" / f"{i:06d}.jpg"
        Image.fromarray(blots).resize((96, 72), 3).save(path, quality=88)


def make_folder(folder, count):
    """A folder of `count` photos, made on all cores."""
    for i in range(100):
        (folder / f"class{i:03d}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(make_photos, folder, count=1000), range(0, count, 1000)))


def reader(folder, size, cache):
    """A process that reads a folder as train.py does."""
    code = READ.format(root=str(ROOT), folder=str(folder), size=size)
    environment = os.environ | {"ADAPTERTUNE_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )


def read(folder, size, cache):
    """Seconds that reading a folder takes, not counting imports."""
    out, _ = reader(folder, size, cache).communicate()
    return float(re.search(r"seconds (\S+)", out)[1])


def cache_file(cache):
    """The file of decoded photos."""
    (folder,) = (cache / "photos").iterdir()
    return folder / "pixels"


def memory_of_training(folder, cache, options, place):
    """Peak resident memory in GB during --seconds of training, read from the child process's status
    every tenth of a second."""
    command = [sys.executable, ROOT / "train.py", "--dataset", folder, "--batch", "128"]
    command += ["--weights", options.weights.resolve(), "--epochs", "30"]
    command += ["--image-size", str(options.size)]
    environment = os.environ | {"ADAPTERTUNE_CACHE": str(cache)}
    child = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL)
    most = 0
    started = time.perf_counter()
    while child.poll() is None and time.perf_counter() - started < options.seconds:
        status = Path(f"/proc/{child.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        most = max(most, int(found[1]) if found else 0)
        time.sleep(0.1)
    if child.poll():
        sys.exit("train.py failed; see its error above")
    child.kill()
    child.wait()
    return most / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="in steps of 1,000")
    parser.add_argument("--size", type=int, default=224, help="--image-size")
    parser.add_argument("--weights", type=Path, default=ROOT / "assets" / "vit_micro.safetensors")
    parser.add_argument("--seconds", type=int, default=60, help="of training")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    photos = place / "photos"
    few = place / "few"
    try:
        make_folder(photos, options.count)
        make_folder(few, 1000)
        first = read(photos, options.size, place / "cache")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"first pass     {first:8.1f} s, {peak:.2f} GB resident at most", flush=True)
        later = [read(photos, options.size, place / "cache") for _ in range(3)]
        print(f"later starts   {', '.join(f'{seconds:.1f}' for seconds in later)} s", flush=True)

        killed = reader(photos, options.size, place / "killed")
        time.sleep(first / 2)
        killed.kill()
        killed.wait()
        rest = read(photos, options.size, place / "killed")
        whole, continued = cache_file(place / "cache"), cache_file(place / "killed")
        same = subprocess.run(["cmp", whole, continued]).returncode == 0
        print(f"killed after   {first / 2:8.1f} s; the rest {rest:.1f} s; same bytes: {same}")
        continued.unlink()

        found = {}
        for folder in (photos, few):
            found[folder] = memory_of_training(folder, place / "cache", options, place)
        more = found[photos] - found[few]
        print(f"training       {found[photos]:.2f} GB resident at most, {found[few]:.2f} GB with a")
        print(f"               thousand photos: {more:.2f} GB for the others; the file has")
        print(f"               {whole.stat().st_size / 1e9:.1f} GB")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
