"""Does one short training run with all ranks at once tell how much rank a task needs? In each step the adapters use only their
first r hidden units, r drawn from RANKS (DyLoRA, https://arxiv.org/abs/2210.07558); then the validation images are read with
each rank. Printed: the mean loss by rank, and the least rank whose loss is within a standard error of the least (of the
differences, image by image).

    python tests/bench_nested.py --epochs 3 --seeds 0,1,2 [options of train.py]
"""
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adaptertune  # noqa: E402
import cli  # noqa: E402
import train  # noqa: E402

RANKS = (1, 2, 4, 8, 16, 32, 64)


def first_units(adapter, rank, z):
    """What Adapter.forward gives with `rank` (a list of one number) hidden units alone."""
    r, down, up = rank[0], adapter.down, adapter.up
    return adapter.scale * F.linear(adapter.act(F.linear(z, down.weight[:r], down.bias[:r])), up.weight[:, :r], up.bias)


def losses(options, seed):
    """The loss of each validation image with each rank, [ranks, n], after the epochs of `options`."""
    run, rank, drawn = train.prepare(options, seed), [0], torch.Generator().manual_seed(seed)
    for block in run.model.blocks:
        if block.adapter:
            block.adapter.forward = functools.partial(first_units, block.adapter, rank)

    def draw(module, _):
        if module.training:
            rank[0] = RANKS[int(torch.randint(len(RANKS), (1,), generator=drawn))]

    run.model.register_forward_pre_hook(draw)
    optimizer = torch.optim.AdamW(adaptertune.groups(run.model, options.weight_decay), lr=options.lr)
    for epoch in range(1, options.epochs + 1):
        run.state = train.State(epoch)
        train.train_epoch(run, optimizer)
    run.model.eval()
    found = []
    with torch.inference_mode():
        for rank[0] in RANKS:
            found.append(torch.cat([F.cross_entropy(run.logits(x), labels, reduction="none")
                                    for x, labels in run.batches.eval(run.data.val, run.data.center)]))
    return torch.stack(found)


def main():
    options = cli.parse(sys.argv[1:] + ["--rank", str(RANKS[-1])])[0]
    print("seed", *(f"{f'rank {rank}':>8}" for rank in RANKS), "  within a standard error")
    for seed in options.seeds:
        loss = losses(options, seed)
        more = loss - loss[loss.mean(dim=1).argmin()]
        near = more.mean(dim=1) <= more.std(dim=1) / loss.shape[1] ** 0.5
        print(f"{seed:4}", *(f"{each:8.4f}" for each in loss.mean(dim=1)), f"  rank {RANKS[int(near.nonzero()[0])]}")


if __name__ == "__main__":
    main()
