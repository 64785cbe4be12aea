"""The same weights in a head of ours and in lightly's: outputs and gradients."""

import pytest
import torch
from toys import toy_method


@pytest.mark.parametrize(
    ("name", "part", "theirs", "options"),
    [
        ("simclr", "projector", "SimCLRProjectionHead", {}),
        ("moco", "projector", "MoCoProjectionHead", {"queue_length": 5}),
        ("byol", "projector", "BYOLProjectionHead", {}),
        ("byol", "predictor", "BYOLPredictionHead", {}),
        ("barlow", "projector", "BarlowTwinsProjectionHead", {"projector_layers": 3}),
        ("swav", "projector", "SwaVProjectionHead", {"prototypes": 9, "queue_length": 0}),
    ],
)
def test_a_head_and_its_gradients_are_lightly_s(name, part, theirs, options):
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is the oracle here")
    ours = getattr(toy_method(name, **options), part)
    width = ours[0].in_features
    oracle = getattr(heads, theirs)(width, 8, 4).double()
    # Away from where norms start.
    with torch.no_grad():
        for found, expected in zip(ours.parameters(), oracle.parameters(), strict=True):
            found.add_(0.3 * torch.randn_like(found))
            expected.copy_(found)
    rows = torch.randn(9, width, dtype=torch.float64, requires_grad=True)
    out, expected = ours(rows), oracle(rows)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    sides = [
        torch.autograd.grad((weight * rows_of).sum(), [rows, *head.parameters()])
        for rows_of, head in ((out, ours), (expected, oracle))
    ]
    torch.testing.assert_close(*sides, rtol=1e-10, atol=1e-12)
