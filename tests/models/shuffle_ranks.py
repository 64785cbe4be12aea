"""What one of two gloo processes does for test_shuffle.py: python shuffle_ranks.py RANK WORLD_SIZE FOLDER.
Writes FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize
from toys import method_config

from fastgessl.distributed import rank_local
from fastgessl.methods import RunFacts, build_method
from fastgessl.methods.moco import shuffled_over_ranks


def moco(shuffles):
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))
    backbone.num_features = 12
    config = method_config("moco", queue_length=12, shuffle_batch_norm=shuffles)
    return build_method(config, backbone, RunFacts(total_steps=2))


def keys_by_hand(everyone):
    """The keys of both ranks' views, each normalised among the rows of its hand: (2, 12, 4)."""
    method = moco(False)
    rows = torch.cat([torch.cat([first, second]) for first, second in everyone])
    torch.manual_seed(8)
    features = torch.empty(24, 12)
    for hand in torch.randperm(24).chunk(2):
        features[hand] = method.momentum_backbone(rows[hand]).detach()
    keys = normalize(method.momentum_projector(features), dim=-1).detach()
    return torch.cat([half.unflatten(0, (2, 6)) for half in keys.chunk(2)], dim=1)


def main(rank, size, folder):
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    every = [
        [torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(10 * r + v)) for v in range(2)]
        for r in range(size)
    ]
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(rank)) + rank
    # The first rank's permutation counts, whatever the second would have drawn.
    torch.manual_seed(7 + 50 * rank)
    report = {
        "world_size": dist.get_world_size(),
        "rows": rows,
        "normalised": shuffled_over_ranks(nn.BatchNorm1d(4), rows).detach(),
    }
    report["unchanged"] = shuffled_over_ranks(nn.Identity(), rows)
    with rank_local():
        report["alone"] = shuffled_over_ranks(nn.BatchNorm1d(4), rows).detach()
    report["keys"] = moco(False).targets(every[rank]).positive
    shuffling = moco(True)
    torch.manual_seed(8 + 50 * rank)
    report["keys shuffled"] = shuffling.targets(every[rank]).positive
    report["keys by hand"] = keys_by_hand(every)
    torch.save(report, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
