"""Does one short training run with all ranks at once tell how much rank a task needs?

    python tests/bench_nested.py --epochs 3 --seeds 0,1,2 [options of train.py]

In each step the adapters use only their first r hidden units, with r drawn from RANKS (DyLoRA,
https://arxiv.org/abs/2210.07558). Afterwards each rank is evaluated on the validation images. The
table shows the mean loss by rank, and the lowest rank whose mean loss exceeds the lowest mean loss
by at most one standard error of the differences per image.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune
import train

RANKS = (1, 2, 4, 8, 16, 32, 64)


class FirstUnits(nn.Module):
    """An adapter that uses only its first `rank` hidden units."""

    def __init__(self, adapter: adaptertune.Adapter):
        super().__init__()
        self.reads = adapter.reads
        self.adapter = adapter
        self.rank = adapter.down.out_features

    def forward(self, z: Tensor) -> Tensor:
        r = self.rank
        down = self.adapter.down
        up = self.adapter.up
        hidden = F.linear(z, down.weight[:r], down.bias[:r])  # [B, N, r]
        hidden = self.adapter.act(hidden)
        return self.adapter.scale * F.linear(hidden, up.weight[:, :r], up.bias)  # [B, N, D]


def set_rank(model: nn.Module, rank: int) -> None:
    """Make all adapters use only their first `rank` hidden units."""
    for block in model.blocks:
        if block.adapter is not None:
            block.adapter.rank = rank


def train_all_ranks(options: argparse.Namespace) -> train.Run:
    """Train a run to its last epoch, with a rank drawn at random in each step."""
    run = train.prepare(options)
    generator = torch.Generator().manual_seed(options.seed)
    for block in run.model.blocks:
        if block.adapter is not None:
            block.adapter = FirstUnits(block.adapter)

    def draw_rank(block: nn.Module, _) -> None:
        if block.training:
            drawn = int(torch.randint(len(RANKS), (1,), generator=generator))
            set_rank(run.model, RANKS[drawn])

    run.model.blocks[0].register_forward_pre_hook(draw_rank)
    groups = adaptertune.parameter_groups(run.model, options.weight_decay, run.options.lr)
    optimizer = torch.optim.AdamW(groups)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = replace(run, folder=Path(folder))
        train.train_epochs(run, optimizer)
    run.model.eval()
    return run


@torch.inference_mode()
def validation_losses(run: train.Run) -> Tensor:
    """The loss of each of n validation images with each rank, [ranks, n]."""
    by_rank = []
    for rank in RANKS:
        set_rank(run.model, rank)
        losses = []
        for x, labels in run.batches.eval(run.dataset.val, run.dataset.center):
            losses.append(F.cross_entropy(run.logits(x), labels, reduction="none"))
        by_rank.append(torch.cat(losses))
    return torch.stack(by_rank)


def least_sufficient(losses: Tensor) -> int:
    """The lowest rank whose mean loss is within a standard error of the lowest, from [ranks, n]."""
    best = losses.mean(dim=1).argmin()
    excess = losses - losses[best]
    standard_error = excess.std(dim=1) / losses.shape[1] ** 0.5
    near = excess.mean(dim=1) <= standard_error
    return RANKS[int(near.nonzero()[0])]


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    grid = train.parse([*sys.argv[1:], "--rank", str(RANKS[-1])])
    titles = [f"rank {rank}" for rank in RANKS]
    print("seed", *(f"{title:>8}" for title in titles), "  within a standard error")
    for options in grid:
        losses = validation_losses(train_all_ranks(options))
        means = [f"{mean:8.4f}" for mean in losses.mean(dim=1)]
        print(f"{options.seed:4}", *means, f"  rank {least_sufficient(losses)}", flush=True)


if __name__ == "__main__":
    main()
