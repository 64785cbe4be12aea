"""What one of two gloo processes does for models/test_shuffle.py."""

import torch
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


def report(rank, folder):
    every = [
        [torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(10 * r + v)) for v in range(2)]
        for r in range(2)
    ]
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(rank)) + rank
    # The first rank's permutation counts, whatever the second would have drawn.
    torch.manual_seed(7 + 50 * rank)
    found = {"rows": rows, "normalised": shuffled_over_ranks(nn.BatchNorm1d(4), rows).detach()}
    found["unchanged"] = shuffled_over_ranks(nn.Identity(), rows)
    with rank_local():
        found["alone"] = shuffled_over_ranks(nn.BatchNorm1d(4), rows).detach()
    found["keys"] = moco(False).targets(every[rank]).positive
    shuffling = moco(True)
    torch.manual_seed(8 + 50 * rank)
    found["keys shuffled"] = shuffling.targets(every[rank]).positive
    found["keys by hand"] = keys_by_hand(every)
    return found
