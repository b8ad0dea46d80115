"""How much rank does a task need, and in which directions? An estimate before training.

    python tests/bench_spectrum.py estimate [options of train.py]
    python tests/bench_spectrum.py start --rank 8 --seeds 0,1,2,3,4 [options of train.py]

What is estimated. A linear map M, initialised to zero, follows each block of the frozen network,
whose head is fitted to other images. One pass over the images gives

    G = dLoss/dM = Σ over tokens of (dLoss/dh)·hᵀ       C = Σ over tokens of h·hᵀ

Of all first steps of the same size E|M·h|² = |M·C^½|², the best one is along the whitened gradient
W = G·C^(-½). The best one of rank r is along W's r leading singular pairs (Eckart and Young); of
|W|² it takes Σ_{i<=r} σ_i². That much is proved, to first order, for each block by itself.
With n images W is noisy, and the noise adds to every σ_i. Two halves of the images, with W and W',
remove it: a pair (u_i, v_i) of one half is worth σ_i·u_iᵀ·W'·v_i in the other, whose expectation is
free of noise. `estimate` prints the lowest rank that takes 90 % of the most that any rank takes.

What is assumed: the first step points where the whole training goes; an adapter of rank r does what
a linear map of rank r does; blocks don't compensate for each other. None of it holds exactly.

Results. The elbow is the lowest of the ranks 1, 2, 4, ... 64 whose mean test accuracy is within a
standard error of the best (seeds 0 to 2; CIFAR-100 with 5,000 training images):

                                        estimate recorded   estimate now,
                                blocks   before the sweep      by seed       elbow
    digits on vit_micro            6            19           20, 19, 19       32
    flowers12 on DeiT-tiny        12            20           23, 17, 20       16
    CIFAR-100 on DeiT-tiny        12            13           15, 14, 14       16
    CIFAR-100 on a small ViT       4            10           16, 17, 16       64
    its 20 superclasses on that    4            14           14, 15, 15       64

The recorded estimates are from earlier forms; the current form was fixed when some of the elbows
were known. It gives nearly the same rank for every task, and a rank four times too low for four
blocks. So it isn't in train.py. It does show which blocks would change most: on digits the first
three have 68 %. The records: assets/results/rank-predictions.txt.

`start` trains adapters of one rank in every block from four initialisations. G and C are as above,
but from all training images, with each half in both roles, and without the temperature of
`estimate`:

    zero     V from Xavier's uniform, U = 0: what train.py does
    plain    V's rows are the leading right singular vectors of W, as long as Xavier's; U = 0
    white    the same vectors after whitening, v·C^(-½), which reads those directions off h; V·h is
             as large as with Xavier's
    uneven   zero, but each rank goes to the block where it is worth most: at least 1 per block, the
             same sum of ranks

Results relative to zero, in points of test accuracy (mean of five seeds ± standard error): on
digits white -0.33 ± 0.41, plain +0.11, uneven +0.17. An older recipe gave white +0.61 ± 0.19 on
digits, +1.33 ± 0.77 on flowers12 and -0.14 ± 0.44 on CIFAR-100; plain -0.06, +0.25 and +0.03;
uneven -0.34, +0.42 and -0.14. None was kept. Log: assets/results/spectrum-start.txt.

Shapes: B images, N tokens, D width, L blocks, r rank.
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune
import data
import train

VARIANTS = ("zero", "plain", "white", "uneven")

# ---------------------------------------------------------------------------------- the spectrum


class Shift(nn.Linear):
    """A map h -> M·h after a block, in place of an adapter; it accumulates h·hᵀ on the way."""

    reads = "block"

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)
        nn.init.zeros_(self.weight)  # M
        self.register_buffer("moment", torch.zeros(width, width))

    def forward(self, h: Tensor) -> Tensor:
        x = h.detach().flatten(0, 1)  # [B·N, D]
        self.moment += x.T @ x
        return super().forward(h)


def shift_gradients(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable = F.cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Gradients and second moments of a linear map after each block of a ViT without adapters.

    Args:
        batches: images [B, 3, S, S] and their labels.
        loss: a function of logits and labels, mean over the images.

    Returns:
        G [2, L, D, D], the means over the images of the even and of the odd batches, and
        C [L, D, D], the mean over all images.
    """
    D = model.config.width
    device = model.pos_embed.device
    shifts = [Shift(D).to(device) for _ in model.blocks]
    for block, shift in zip(model.blocks, shifts, strict=True):
        block.adapter = shift
    gradients = torch.zeros(2, len(shifts), D, D)
    seen = torch.zeros(2)  # images, in even and in odd batches
    for step, (images, labels) in enumerate(batches):
        half = step % 2
        summed = loss(model(images), labels) * len(labels)
        summed.backward()
        seen[half] += len(labels)
        for i, shift in enumerate(shifts):
            gradients[half, i] += shift.weight.grad.cpu()
            shift.weight.grad = None
    for block in model.blocks:
        block.adapter = None
    moments = torch.stack([shift.moment.cpu() for shift in shifts])  # [L, D, D]
    G = gradients / seen.clamp(min=1).view(2, 1, 1, 1)
    C = moments / seen.sum()
    return G, C


def whitener(moment: Tensor) -> Tensor:
    """C^(-½) of a second moment C [D, D]; a thousandth of its mean eigenvalue is added to each."""
    values, vectors = torch.linalg.eigh(moment)
    damped = values.clamp(min=0) + 1e-3 * values.mean()
    return vectors * damped.rsqrt() @ vectors.T


def spectrum(G: Tensor, C: Tensor) -> Tensor:
    """How much a map of rank r after a block reduces the loss at first, without the noise.

    Args:
        G: gradients [2, L, D, D] of two halves of the images.
        C: second moments [L, D, D].

    Returns:
        [L, D], cumulative over r; the mean over both orders of the halves.
    """
    energy = []
    for pair, moment in zip(G.double().transpose(0, 1), C.double(), strict=True):
        whitened = pair @ whitener(moment)  # [2, D, D]
        worth = torch.zeros_like(moment[0])  # [D], of each singular pair
        for half, other in ((0, 1), (1, 0)):
            U, sigma, V = torch.linalg.svd(whitened[half])  # U's columns, V's rows
            seen_by_other = ((U.T @ whitened[other]) * V).sum(dim=1)  # u_iᵀ·W'·v_i
            worth = worth + sigma * seen_by_other / 2
        energy.append(worth.cumsum(dim=0))
    return torch.stack(energy)


def rank_for(energy: Tensor, share: float = 0.9) -> int:
    """The least rank that takes `share` of the most that any rank takes; 0 if none takes anything.

    Args:
        energy: what each rank takes, [D], cumulative.
    """
    most = float(energy.max())
    if most <= 0:
        return 0
    enough = energy >= share * most
    return int(enough.nonzero()[0]) + 1


def prepare_head(options: argparse.Namespace, epochs: int) -> train.Run:
    """A run without adapters, in which to fit a head."""
    changes = {"method": "head", "rank": None, "epochs": epochs, "lr": train.RATES["head"]}
    return train.prepare(argparse.Namespace(**vars(options) | changes))


def fit_head(run: train.Run, images: data.Images, val: data.Images) -> None:
    """Fit the head, restore it from the epoch with the lowest loss on val, and freeze it.

    Args:
        images, val: features [n, D] in place of pixels.
    """
    options = run.options
    head = run.model.head
    features = replace(run.dataset, train=images)
    steps = options.epochs * run.batches.count(images)
    groups = adaptertune.parameter_groups(run.model, options.weight_decay, options.lr)
    optimizer = torch.optim.AdamW(groups)
    taken = 0  # steps
    best_loss = math.inf
    for epoch in range(1, options.epochs + 1):
        for step, (x, labels) in enumerate(run.batches.train(features, options.seed, epoch)):
            # As in train.train_epochs; a head that is initialised later depends on this seed.
            torch.manual_seed(data.seed_from(f"{options.seed}/{epoch}/{step}"))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * train.schedule(taken, steps)
            loss = F.cross_entropy(run.logits(x), labels, label_smoothing=options.label_smoothing)
            if not loss.isfinite():
                raise ValueError(f"the head's loss became {loss.item()} in epoch {epoch}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            taken += 1
        with torch.no_grad():
            logits = head(val.pixels.to(run.device))
            val_loss = F.cross_entropy(logits, val.labels.to(run.device)).item()
        # Without validation images the loss is NaN, and the last epoch is taken.
        if not val_loss >= best_loss:
            best_loss = val_loss
            weights = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(weights)
    run.model.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------- the estimate


def flattened_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at a temperature of 4: the gradient then doesn't come only from the few images
    that the head gets wrong, and differs less between seeds (rank-predictions.txt)."""
    return F.cross_entropy(logits / 4, labels)


def estimate_rank(options: argparse.Namespace) -> None:
    """Print the rank that takes 90 % of what the first step could take, and the table of blocks.

    It uses four fifths of the training images, at most 4,000, and takes less time than an epoch.
    The head is fitted to one half of them and the gradient is taken from the other: on its own
    images, a head that fits them leaves nothing to learn.
    """
    started = time.perf_counter()
    run = prepare_head(options, epochs=12)
    images = run.dataset.train
    order = data.stratified_order(images.labels, f"spectrum/{options.seed}")
    count = min(4000, round(0.8 * len(images)))
    for_head, for_gradient = order[:count].tensor_split(2)
    features = with_features(run, images[for_head])
    val = with_features(run, run.dataset.val)
    fit_head(run, features, val)
    batches = run.batches.eval(images[for_gradient], run.dataset.center)
    G, C = shift_gradients(run.model, batches, flattened_loss)
    energy = spectrum(G, C)
    print_blocks(energy)
    rank = max(1, rank_for(energy.sum(dim=0)))  # 1 if nothing transfers between the halves
    elapsed = data.clock_text(time.perf_counter() - started)
    print(f"spectrum rank {rank} takes 90 % of it (a start, not a prescription); {elapsed}")


def with_features(run: train.Run, images: data.Images) -> data.Images:
    """The features [n, D] that the head reads in place of images."""
    return data.Images(train.find_features(run, images, "images"), images.labels, images.names)


def print_blocks(energy: Tensor) -> None:
    """Print a row for each block: its share of the total and its ranks, from energy [L, D]."""
    most = energy.max(dim=1)[0].clamp(min=1e-12)
    shares = 100 * most / most.sum()
    print(f"\n{'block':>6}{'share %':>9}{'50 % by rank':>14}{'90 % by rank':>14}")
    for i, block_energy in enumerate(energy):
        rank_50 = rank_for(block_energy, 0.5)
        rank_90 = rank_for(block_energy, 0.9)
        print(f"{i:>6}{shares[i]:>9.1f}{rank_50:>14}{rank_90:>14}")


# ------------------------------------------------------------------------------------ the starts


def measure_gradients(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """G [L, D, D], C [L, D, D] and the spectrum [L, D], means over the halves' two roles."""
    run = prepare_head(options, epochs=30)
    images = run.dataset.train
    images = images[data.stratified_order(images.labels, f"spectrum/{options.seed}")]
    features = with_features(run, images)
    val = with_features(run, run.dataset.val)
    first, second = torch.arange(len(images)).tensor_split(2)
    gradients = []
    moments = []
    spectra = []
    for for_head, for_gradient in ((first, second), (second, first)):
        adaptertune.add_head(run.model, len(run.dataset.classes))
        run.model.to(run.device)
        fit_head(run, features[for_head], val)
        batches = run.batches.eval(images[for_gradient], run.dataset.center)
        G, C = shift_gradients(run.model, batches)
        gradients.append(G)
        moments.append(C)
        spectra.append(spectrum(G, C))
    G = torch.stack(gradients).mean(dim=0)  # [2, L, D, D]
    C = torch.stack(moments).mean(dim=0)
    return G.mean(dim=0), C, torch.stack(spectra).mean(dim=0)


def directions(G: Tensor, C: Tensor, rank: int, white: bool) -> Tensor:
    """V [r, D] along the leading directions of a block's G [D, D] and C [D, D]."""
    C = C.double()
    D = len(C)
    whiten = whitener(C)
    _, _, right = torch.linalg.svd(G.double() @ whiten)  # rows
    V = right[:rank]  # of length 1
    # The entries of Xavier's uniform have a variance of 2/(r + D). A row's squared length is D
    # times that, and the mean square of V·h is trace(C) times that.
    if not white:
        return (V * (2 * D / (rank + D)) ** 0.5).float()
    V = V @ whiten
    power = ((V @ C) * V).sum(dim=1, keepdim=True)  # [r, 1], the mean square of V·h
    wanted = 2 / (rank + D) * C.trace()
    return (V * (wanted / power) ** 0.5).float()


def uneven_ranks(energy: Tensor, total: int) -> list[int]:
    """A rank for each block, `total` in sum: added one by one where the next three would gain most.

    Args:
        energy: the spectrum [L, D].
    """
    worth = energy.diff(dim=1, prepend=torch.zeros_like(energy[:, :1]))  # of each rank
    ranks = [1] * len(energy)
    for _ in range(total - len(energy)):
        gains = []
        for block, rank in enumerate(ranks):
            gains.append(worth[block, rank : rank + 3].mean().item())
        best = gains.index(max(gains))
        ranks[best] += 1
    return ranks


def set_start(
    run: train.Run, variant: str, found: tuple[Tensor, Tensor, Tensor], rank: int
) -> None:
    """Set up a variant in a new run, whose adapters have `rank` in every block."""
    G, C, energy = found
    blocks = run.model.blocks
    if variant == "uneven":
        ranks = uneven_ranks(energy, rank * len(blocks))
        for block, block_rank in zip(blocks, ranks, strict=True):
            torch.manual_seed(data.seed_from(f"{run.options.seed}/{block_rank}"))
            adapter = adaptertune.Adapter(run.model.config.width, block_rank)
            block.adapter = adapter.to(run.device)
        adaptertune.freeze(run.model)
    elif variant in ("plain", "white"):
        for i, block in enumerate(blocks):
            V = directions(G[i], C[i], rank, white=variant == "white")
            block.adapter.down.weight.data.copy_(V)


def train_variant(
    options: argparse.Namespace, variant: str, found: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float]:
    """Train one variant: validation accuracy after epoch 1 and test accuracy, in percent."""
    run = train.prepare(options)
    set_start(run, variant, found, options.rank)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = replace(run, folder=Path(folder))
        train.fit(run)
    first_epoch = run.state.rows[0]
    val = float(first_epoch[train.COLUMNS.index("val%")])
    return val, run.meta["test_accuracy"]


def compare_starts(grid: list[argparse.Namespace]) -> None:
    """Train every variant with every seed; print each run, then means and standard deviations."""
    first = grid[0]
    if first.method != "adaptertune" or first.every > 1 or first.blocks:
        raise ValueError("start adapts every block; leave out --method, --every and --blocks")
    vals = {variant: [] for variant in VARIANTS}
    tests = {variant: [] for variant in VARIANTS}
    for options in grid:
        found = measure_gradients(options)
        for variant in VARIANTS:
            val, test = train_variant(options, variant, found)
            vals[variant].append(val)
            tests[variant].append(test)
            numbers = f"val after an epoch {val:6.2f} %, test {test:6.2f} %"
            print(f"seed {options.seed}  {variant:8} {numbers}", flush=True)
    for variant in VARIANTS:
        val = mean_and_spread(vals[variant])
        print(f"{variant:8}  val after an epoch {val}  test {mean_and_spread(tests[variant])}")


def mean_and_spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


# ------------------------------------------------------------------------------------------ main


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("use", choices=("estimate", "start"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of train.py")
    arguments = parser.parse_args()
    grid = train.parse([*arguments.options, "--name", "bench"])
    try:
        if arguments.use == "start":
            compare_starts(grid)
        else:
            for options in grid:
                estimate_rank(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
