"""The cost of a training step, compared with published implementations; also by operation.

    pip install timm peft torchvision
    python tests/bench_train.py [--rounds 5] [--threads 1] [--batch 32]
    python tests/bench_train.py --epoch                wall-clock time with the input pipeline
    python tests/bench_train.py --operations ours-bf16
    python tests/bench_train.py --device cuda --batch 128 --steps 30
                                --variants timm-bf16 ours-bf16 ours-bf16-compiled

DeiT-tiny's shape at 224 px with random weights, 100 classes, AdamW, gradients clipped to 1.0:

    ours-fp32, ours-bf16    train.py's step: adapters of rank 8 behind every block
    timm-fp32, timm-bf16    timm's model with wrapped blocks, as in AdapterTune's recipe
    peft-fp32, peft-bf16    peft's LoRA of rank 4 on qkv of the same model: 56,164 trainable
                            parameters with the head; the adapters' run has 58,564
    full-fp32, full-bf16    ours, everything trained
    timm-full-bf16          timm's, everything trained
    …-compiled              the same after torch.compile

With --epoch, train.py's batches of uint8 images [n, 3, 32, 32] are compared with PIL images,
torchvision's RandomResizedCrop(224) and flip in a DataLoader with two workers.

On a GPU, ours also uses train.py's settings: fused AdamW and reproducible results.

In each round every variant runs in a process of its own, one after the other; memory is that
process's peak. The figures are medians over rounds, and ratios of medians. The matrix rate is what
one product of [batch · 197, 192] by [192, 768] reaches in the same process. On a GPU the seconds
are wall-clock time, and memory is the GPU's.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune
import data
import train
import vit

CLASSES = 100
CONFIG = vit.BACKBONES["deit_ti16"].config
VARIANTS = (
    *("timm-fp32", "timm-bf16", "ours-fp32", "ours-bf16", "peft-fp32", "peft-bf16"),
    *("full-fp32", "full-bf16", "timm-full-bf16"),
)
COMPILED = tuple(f"{variant}-compiled" for variant in VARIANTS)


class Wrapped(nn.Module):
    """A timm block with a bottleneck behind it: the usual way to extend a library's blocks."""

    def __init__(self, block: nn.Module, width: int, rank: int):
        super().__init__()
        self.block = block
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.up(F.gelu(self.down(x)))


def build(kind: str) -> nn.Module:
    """The network of a variant. Only what it trains requires gradients."""
    torch.manual_seed(0)
    if kind in ("ours", "full"):
        model = vit.ViT(CONFIG)
        model.init_weights()
        adaptertune.adapt(model, "full" if kind == "full" else "adaptertune", CLASSES)
        return model
    import timm

    model = timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES)
    if kind == "timm-full":
        return model
    model.requires_grad_(False)
    if kind == "timm":
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Wrapped(block, CONFIG.width, 8)
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"]))
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".down.", ".up.", "lora_", "head.")):
            parameter.requires_grad_(True)
    return model


def make_step(variant: str, device: str) -> Callable[[Tensor, Tensor], None]:
    """A function that takes one training step."""
    kind, bf16 = parse_variant(variant)
    model = build(kind).train().to(device)
    parameters = [each for each in model.parameters() if each.requires_grad]
    ours = kind in ("ours", "full")
    fused = ours and device == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, fused=fused)
    network = model
    if variant in COMPILED:  # in train.py's mode
        network = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None)
    if ours:
        train.be_repeatable(torch.device(device), variant not in COMPILED)

    def step(images: Tensor, labels: Tensor) -> None:
        parts = 1
        if ours and variant not in COMPILED:  # as train.take_step does
            parts = train.count_parts(model, images)
        optimizer.zero_grad()
        for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                logits = network(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
            loss = loss * (len(y) / len(labels))
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def parse_variant(variant: str) -> tuple[str, bool]:
    """The kind of a variant's network, and whether it trains in bf16."""
    kind, _, precision = variant.removesuffix("-compiled").rpartition("-")
    return kind, precision == "bf16"


def wait(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """Peak memory in GiB, of a GPU or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matrix_rate(bf16: bool, batch: int, device: str) -> float:
    """GFLOP/s of this process's threads or of a GPU, in a matrix product of the network's shape."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.ones(batch * 197, CONFIG.width, dtype=dtype, device=device)
    weight = torch.ones(4 * CONFIG.width, CONFIG.width, dtype=dtype, device=device)
    products = 50 if device == "cuda" else 1  # launched together, as in a step
    times = []
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        for _ in range(products):
            F.linear(x, weight)
        wait(device)
        times.append((time.perf_counter() - started) / products)
    return 2 * x.numel() * len(weight) / min(times) / 1e9


@functools.cache
def operations_of(batch: int) -> float:
    """GFLOP of our training step, by torch's counter. It doesn't know the CPU's fused attention, so
    the bf16 step is counted, whose attention is plain products; the fp32 step has as many GFLOP."""
    images = torch.zeros(batch, 3, 224, 224)
    labels = torch.zeros(batch, dtype=torch.long)
    step = make_step("ours-bf16", "cpu")
    with FlopCounterMode(display=False) as counter:
        step(images, labels)
    return counter.get_total_flops() / 1e9


def time_steps(variant: str, options: argparse.Namespace) -> dict:
    """CPU and wall-clock seconds of a step in this process, and its peak memory."""
    device = options.device
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    labels = torch.randint(0, CLASSES, (options.batch,), device=device)
    step = make_step(variant, device)
    for _ in range(3 if device == "cuda" else 1):  # the second call records a CUDA graph
        step(images, labels)
    wait(device)
    cpu = []
    wall = []
    for _ in range(options.steps):
        before = time.process_time(), time.perf_counter()
        step(images, labels)
        wait(device)
        cpu.append(time.process_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    _, bf16 = parse_variant(variant)
    return {
        "cpu": statistics.median(cpu),
        "wall": statistics.median(wall),
        "memory": peak_memory(device),
        "rate": matrix_rate(bf16, options.batch, device),
    }


def time_epoch(variant: str, options: argparse.Namespace) -> dict:
    """Wall-clock seconds for all images of an epoch, with the input pipeline of the variant."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, CLASSES, (options.images,), generator=draw)
    kind, _ = parse_variant(variant)
    step = make_step(variant, "cpu")
    step(torch.randn(options.batch, 3, 224, 224), labels[: options.batch])
    started = time.perf_counter()
    if kind in ("ours", "full"):
        images = data.Images(pixels, labels)
        dataset = data.Dataset("noise", [], images, images, images)
        batches = data.Batches(224, vit.IMAGENET, options.batch, torch.device("cpu"))
        for x, y in batches.train(dataset, 0, 1):
            step(x, y)
    else:
        from PIL import Image
        from torchvision import transforms

        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(224, interpolation=Image.Resampling.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*vit.IMAGENET),
            ]
        )
        photos = [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).numpy()]

        class Photos(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(photos)

            def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
                return transform(photos[i]), labels[i]

        loader = torch.utils.data.DataLoader(Photos(), options.batch, shuffle=True, num_workers=2)
        for x, y in loader:
            step(x, y)
    wall = time.perf_counter() - started
    return {"cpu": 0.0, "wall": wall, "memory": peak_memory("cpu"), "rate": 0.0}


def run_worker(variant: str, options: argparse.Namespace) -> dict:
    """The figures of a variant, measured in a process of its own."""
    command = [sys.executable, __file__, "--worker", variant, "--batch", str(options.batch)]
    command += ["--threads", str(options.threads), "--steps", str(options.steps)]
    command += ["--images", str(options.images), *(["--epoch"] if options.epoch else [])]
    command += ["--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_operations(variant: str, options: argparse.Namespace) -> None:
    """Print where a step's time goes, by operation."""
    images = torch.randn(options.batch, 3, 224, 224)
    labels = torch.randint(0, CLASSES, (options.batch,))
    step = make_step(variant, "cpu")
    step(images, labels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(images, labels)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print(f"| operation of {variant} | share | ms | calls |\n|---|--:|--:|--:|")
    for row in rows[:14]:
        share = 100 * row.self_cpu_time_total / total
        print(f"| {row.key} | {share:.1f} % | {row.self_cpu_time_total / 1000:.0f} | {row.count} |")


def print_table(found: dict[str, list[dict]], options: argparse.Namespace) -> None:
    """Print medians over the rounds, and ratios to the first two variants."""
    key = "wall" if options.epoch or options.device == "cuda" else "cpu"
    middle = {}
    for variant, rounds in found.items():
        middle[variant] = {
            name: statistics.median(each[name] for each in rounds) for name in rounds[0]
        }
    names = list(middle)
    first = names[0]
    second = names[1] if len(names) > 1 else first
    print(f"\n| | s | min to max | {first} is | {second} is | memory, GiB | of the matrix rate |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for variant, figures in middle.items():
        times = [each[key] for each in found[variant]]
        share = ""
        if variant.startswith("ours") and not options.epoch:
            reached = operations_of(options.batch) / figures["wall"] / figures["rate"]
            share = f"{100 * reached:.0f} % of {figures['rate']:.0f} GFLOP/s"
        print(
            f"| {variant} | {figures[key]:.3g} | {min(times):.3g} to {max(times):.3g} "
            f"| {middle[first][key] / figures[key]:.2f} | {middle[second][key] / figures[key]:.2f} "
            f"| {figures['memory']:.2f} | {share} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS + COMPILED)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epoch", action="store_true")
    parser.add_argument("--images", type=int, default=512, help="images in an epoch")
    parser.add_argument("--operations", metavar="VARIANT", choices=VARIANTS)
    parser.add_argument("--worker", choices=VARIANTS + COMPILED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and (options.epoch or options.operations):
        parser.error("--epoch and --operations are measured on the CPU")
    torch.set_num_threads(options.threads)
    if options.worker:
        measure = time_epoch if options.epoch else time_steps
        print(json.dumps(measure(options.worker, options)))
        return
    if options.operations:
        print_operations(options.operations, options)
        return
    found = {variant: [] for variant in options.variants}
    for _ in range(options.rounds):
        for variant, rounds in found.items():
            rounds.append(run_worker(variant, options))
    where = f"{options.threads} threads"
    if options.device == "cuda":
        where = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, batch {options.batch}, {options.rounds} rounds")
    print_table(found, options)


if __name__ == "__main__":
    main()
