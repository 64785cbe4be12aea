"""What one of several gloo processes does for training/test_ranks.py."""

from dataclasses import replace

import torch
from small_training import differences, run_steps, small_config, start

from fastgessl.config import UsageError
from fastgessl.methods import METHODS
from fastgessl.methods.simclr import SimCLR
from fastgessl.runs import checkpoint
from fastgessl.training.state import whole_tensors

PLAIN = {
    "optim": {"base_lr": 0.1, "clip_gradient": 1.0},
    "train": {"max_steps": 2, "batch_size": 8, "accumulate": 1},
}
# Small steps: gradients of norm 30 on batches of four images blow rounding up by a hundred a step.
GESSL = {
    "optim": {"base_lr": 0.01},
    "train": {"max_steps": 2, "batch_size": 8, "accumulate": 1, "checkpoint_every": 9},
}
MODES = {
    "K 0": {"w_sigma": 1.0},
    "head": {"w_sigma": 1.0, "inner_steps": 1, "scope": "head"},
    "exact": {"w_sigma": 1.0, "inner_steps": 1},
}


def sharded(sections):
    return sections | {"train": sections["train"] | {"sharding": "fsdp", "checkpoint_every": 9}}


def outcome(data, folder, name, sections):
    """Whole weights after the run, metrics of its last step on this rank, share of the weights that this rank
    holds.
    """
    training = start(small_config(data, name, **sections), folder)
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in training.method.parameters())
    run_steps(training, folder)
    weights = {
        key: value.clone()
        for key, value in whole_tensors(training.method).items()
        if isinstance(value, torch.Tensor)
    }
    generator = torch.get_rng_state()
    encoder = training.encoder()
    drew = not torch.equal(generator, torch.get_rng_state())
    views = torch.ones(2, 3, 8, 8)
    share = held / sum(w.numel() for w in weights.values())
    return {"weights": weights, "share": share, "features": encoder.eval()(views).detach(), "drew": drew}


class BadOnOneRank(SimCLR):
    """Rank 1's third and fourth forwards, of the second step, are not finite."""

    forwards = 0

    def forward(self, views=None, *, features=None):
        BadOnOneRank.forwards += 1
        bad = torch.distributed.get_rank() == 1 and BadOnOneRank.forwards in (3, 4)
        out = super().forward(views, features=features)
        return replace(out, projections=out.projections * torch.nan) if bad else out


class Remembers(SimCLR):
    """Keeps a queue of this rank's own rows, which the loss pulls towards."""

    def __init__(self, config, backbone, facts):
        super().__init__(config, backbone, facts)
        self.register_buffer("queue", torch.zeros(4, config.projector_out))

    def loss(self, out, aux=None):
        return super().loss(out, aux) + (out.projections[0, :4] - self.queue).square().mean()

    def update_state(self, passes, step):
        self.queue = passes[-1][0].projections[0, :4].clone()


def resumed_over_ranks(data, folder, rank):
    """Differences between a run of all ranks and the same from its middle."""
    sections = {"method": {"negatives": "local"}, "model": {"batch_norm": "local"}, "train": {"max_steps": 4}}
    METHODS["simclr"] = Remembers
    whole, again = folder / "whole", folder / "again"
    training = start(small_config(data, **sections), whole)
    run_steps(training, whole)
    expected = training.method.state_dict()
    training = start(small_config(data, **sections), again, whole / "checkpoints" / "step-000000002")
    run_steps(training, again)
    own = [
        place
        for place in differences(training.method.state_dict(), expected)
        if "running" not in place or rank == 0
    ]
    files = [checkpoint.load(run / "checkpoints" / "step-000000004") for run in (whole, again)]
    METHODS["simclr"] = SimCLR
    return own + differences(files[1], files[0]), len(files[0]["ranks"][1]["buffers"])


def refusal(data, folder, **sections):
    try:
        start(small_config(data, **sections), folder)
    except UsageError as error:
        return str(error)
    return ""


def report(rank, folder):
    data, found = folder / "images.npz", {}
    cached = PLAIN | {"train": PLAIN["train"] | {"gradient_cache": 2}}
    runs = [(name, name, PLAIN) for name in sorted(METHODS)]
    runs += [(label, "byol", GESSL | {"gessl": settings}) for label, settings in MODES.items()]
    for label, name, sections in [*runs, ("cached", "simclr", cached)]:
        for kind, chosen in (("ddp", sections), ("fsdp", sharded(sections))):
            found[kind, label] = outcome(data, folder / kind / label, name, chosen)
    for negatives in ("global", "ring"):
        sections = PLAIN | {"method": {"negatives": negatives}}
        found[negatives] = outcome(data, folder / negatives, "simclr", sections)
    refused = folder / "refused"
    found["nothing to pass"] = refusal(data, refused, method={"name": "byol", "negatives": "ring"})
    METHODS["simclr"] = BadOnOneRank
    found["bad"] = outcome(data, folder / "bad", "simclr", {"train": {"max_steps": 4}})
    METHODS["simclr"] = SimCLR
    found["resumed"] = resumed_over_ranks(data, folder, rank)
    found["compiled"] = refusal(data, refused, train={"sharding": "fsdp", "compile": True})
    return found
