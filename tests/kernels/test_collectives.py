"""Losses over a group of ranks equal one process on all rows: values, gradients and Hessian-vector products
(two gloo ranks).
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.func import jvp

from fastgessl.kernels import (
    ClipLoss,
    DINOLoss,
    clip_loss,
    gessl_loss,
    info_nce,
    nt_xent,
    sigma_kl,
    similarity_logsumexp,
    sinkhorn_potentials,
    softmax_marginal,
)
from fastgessl.kernels.collectives import all_gather_rows, all_reduce_mean

RANKS, ROWS, D = 2, 5, 4
TOTAL = RANKS * ROWS


@contextmanager
def _joined(rank, store, ranks=RANKS):
    """The group of all ranks, which a rank leaves when all are done: a peer that leaves early makes gloo
    abort the others.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    assert dist.get_world_size() == ranks
    yield dist.group.WORLD
    dist.barrier()
    dist.destroy_process_group()


def _average(tensor):
    """What DDP does to losses and gradients."""
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / RANKS


def _inputs():
    torch.manual_seed(0)
    weight = torch.randn(D, D, dtype=torch.float64)
    return (
        weight,
        torch.randn(4, TOTAL, D, dtype=torch.float64),
        torch.randperm(TOTAL),
        torch.randn(TOTAL, dtype=torch.float64),
    )


def _losses(data, positives, bias, weight, temperature, group, mode):
    """Every loss on rows that depend on the weight: first order through one, second order through all."""
    query, key, teacher_query, teacher_key = data @ weight
    exclude = (positives + 3) % TOTAL
    settings = {"temperature": temperature, "group": group, "mode": mode}
    both = gessl_loss(
        query, key, teacher_query, teacher_key, positives=positives, exclude=exclude, **settings
    )
    mean = softmax_marginal(query, weight, temperature=temperature, group=group)
    return torch.stack(
        [
            info_nce(query, key, positives=positives, exclude=exclude, **settings),
            info_nce(query, key, **settings),
            nt_xent(query, key, **settings),
            clip_loss(query, key, **settings),
            similarity_logsumexp(query, key, bias=bias, **settings).mean(),
            sigma_kl(query, key, teacher_query, teacher_key, student_bias=bias, **settings),
            both[0].mean() + both[1].mean(),
            (mean * mean.log()).sum(),
        ]
    )


def _derivatives(data, positives, bias, weight, group, mode, average):
    """Losses, gradients and Hessian-vector products; `average` is what DDP does to losses and gradients."""
    weight = weight.clone().requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    losses = _losses(data, positives, bias, weight, temperature, group, mode)
    found = [average(losses.detach())]
    for loss in losses:
        first = torch.autograd.grad(loss, (weight, temperature), create_graph=True)
        # The direction is the same on all ranks, so the product with the mean gradient is the mean of the
        # ranks' products.
        along = (first[0] * torch.arange(1.0, D + 1)).sum() + 0.3 * first[1]
        found += [average(gradient.detach()) for gradient in first]
        found += [
            average(product)
            for product in torch.autograd.grad(along, (weight, temperature), retain_graph=True)
        ]
    return found


def _compare(rank, store, mode):
    weight, data, positives, bias = _inputs()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    with _joined(rank, store) as group:
        found = _derivatives(data[:, mine], positives[mine], bias[mine], weight, group, mode, _average)
        expected = _derivatives(data, positives, bias, weight, None, "gather", lambda tensor: tensor)
        for a, b in zip(found, expected, strict=True):
            # In norm: an entry may be what is left of far larger ones. The dense table itself, its rows in
            # another order, gives entries that differ by 2e-11 of themselves and by 3e-15 of the norm.
            assert (a - b).norm() <= 5e-13 * b.norm()
        potentials = sinkhorn_potentials(data[0][mine], data[1], epsilon=0.5, group=group)
        torch.testing.assert_close(potentials, sinkhorn_potentials(data[0], data[1], epsilon=0.5))


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_losses_of_two_ranks_equal_one_process_to_second_order(tmp_path, mode):
    mp.spawn(_compare, (str(tmp_path / "store"), mode), nprocs=RANKS)


def _forward(rank, store):
    _, data, _, _ = _inputs()
    query, key = data[:2, rank * ROWS : (rank + 1) * ROWS]
    with _joined(rank, store) as group:
        for mode in ("gather", "ring"):
            for loss in (info_nce, clip_loss):
                with pytest.raises(RuntimeError, match=r"forward mode .* torch.func.jacrev"):
                    jvp(partial(loss, query, temperature=0.1, group=group, mode=mode), (key,), (key,))


def test_forward_mode_across_ranks_raises_and_advises_reverse_mode(tmp_path):
    mp.spawn(_forward, (str(tmp_path / "store"),), nprocs=RANKS)


def _alone(rank, store):
    """A ring of one rank, with keys that need a gradient and with keys that need none."""
    query, key = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with _joined(rank, store, ranks=1) as group:
        for leaves in ((query.requires_grad_(),), (query, key.requires_grad_())):
            found, expected = info_nce(query, key, group=group, mode="ring"), info_nce(query, key)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(
                torch.autograd.grad(found, leaves),
                torch.autograd.grad(expected, leaves),
                rtol=1e-12,
                atol=1e-14,
            )


def test_a_ring_of_one_rank_is_the_loss_without_a_group(tmp_path):
    mp.spawn(_alone, (str(tmp_path / "store"),), nprocs=1)


def _unequal(rank, store):
    with _joined(rank, store) as group:
        with pytest.raises(ValueError, match=r"key must have as many rows on every rank .* found \[3, 4\]"):
            info_nce(torch.ones(3, 2), torch.ones(3 + rank, 2), group=group)
        with pytest.raises(ValueError, match=r"query must have as many rows on every rank .* found \[3, 4\]"):
            softmax_marginal(torch.ones(3 + rank, 2), torch.ones(5, 2), group=group)
        with pytest.raises(
            ValueError, match=r"teacher_features must have as many rows on every rank .* found \[6, 8\]"
        ):
            DINOLoss(output_dim=5).update_center(torch.ones(2, 3 + rank, 2), torch.ones(5, 2))
        with pytest.raises(ValueError, match=r"world_size is 8, but the default process group has 2 ranks"):
            ClipLoss(world_size=8)(torch.eye(3), torch.eye(3), 1.0)


def test_ranks_with_unequal_rows_all_raise_instead_of_hanging(tmp_path):
    mp.spawn(_unequal, (str(tmp_path / "store"),), nprocs=RANKS)


def _adjoints(rank, store):
    """⟨gather(x), y⟩ summed over ranks equals ⟨x, backward(y)⟩ summed over ranks; the same once more for the
    backward, and for the mean.
    """
    with _joined(rank, store) as group:
        torch.manual_seed(rank)
        for operation, shape in ((all_gather_rows, (3, 2)), (all_reduce_mean, (4,))):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            image = operation(x, group)
            y = torch.randn_like(image).requires_grad_()
            (pulled,) = torch.autograd.grad(image, x, y, create_graph=True)
            z = torch.randn_like(x)
            (pushed,) = torch.autograd.grad(pulled, y, z)
            sums = torch.stack(
                [(image * y).sum(), (x * pulled).sum(), (pulled * z).sum(), (y * pushed).sum()]
            ).detach()
            dist.all_reduce(sums)
            torch.testing.assert_close(sums[0], sums[1])
            torch.testing.assert_close(sums[2], sums[3])


def test_backwards_of_collectives_are_their_adjoints_at_both_orders(tmp_path):
    mp.spawn(_adjoints, (str(tmp_path / "store"),), nprocs=RANKS)
