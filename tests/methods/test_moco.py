import copy

import pytest
import torch
from toys import assert_same_loss, logits, toy_backbone, toy_images, toy_method, trained, unit

from fastgessl.config import UsageError
from fastgessl.methods import Outputs, RunFacts
from fastgessl.methods.moco import Keys


def toy(images_per_forward=5, total_steps=10, **options):
    facts = RunFacts(total_steps=total_steps, images_per_forward=images_per_forward)
    return toy_method("moco", facts, toy_backbone(norm=True), **{"queue_length": 15} | options)


def outputs_and_keys(queries=2, keyed=2):
    torch.manual_seed(0)
    projections = torch.randn(queries, 7, 4, dtype=torch.float64, requires_grad=True)
    keys = Keys(
        unit(torch.randn(keyed, 7, 4, dtype=torch.float64)),
        unit(torch.randn(keyed, 15, 4, dtype=torch.float64)),
    )
    return Outputs(projections, projections), keys


def one_row(query, positive, queue, temperature):
    """Chen et al. (arXiv 2003.04297), eq. (1): the key is the positive, the queue has the negatives."""
    own = torch.exp(query @ positive / temperature)
    return -torch.log(own / (own + sum(torch.exp(query @ negative / temperature) for negative in queue)))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize(
    ("symmetric", "queries", "pairs"),
    [
        (True, 2, [(0, 1), (1, 0)]),
        (True, 4, [(0, 1), (2, 1), (3, 1), (1, 0), (2, 0), (3, 0)]),
        (False, 1, [(0, 0)]),
        (False, 3, [(0, 0), (1, 0), (2, 0)]),
    ],
)
def test_moco_s_loss_and_gradient_are_the_definition_over_all_pairs_of_a_query_and_another_view_s_key(
    temperature, symmetric, queries, pairs
):
    out, keys = outputs_and_keys(queries, 2 if symmetric else 1)
    rows = unit(out.projections)
    terms = [
        one_row(rows[q, n], keys.positive[k, n], keys.queue[k], temperature)
        for q, k in pairs
        for n in range(7)
    ]
    found = toy(temperature=temperature, symmetric=symmetric).loss(out, keys)
    assert_same_loss(found, torch.stack(terms).mean(), [out.projections])


def test_the_asymmetric_loss_and_gradient_are_lightly_s_with_a_memory_bank():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    out, keys = outputs_and_keys(1, 1)
    criterion = lightly.NTXentLoss(temperature=0.2, memory_bank_size=(15, 4)).double()
    criterion.memory_bank.bank = keys.queue[0].clone()
    criterion.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    found = toy(temperature=0.2, symmetric=False).loss(out, keys)
    expected = criterion(out.projections[0], keys.positive[0])
    assert_same_loss(found, expected, [out.projections], rtol=1e-6, slopes=(1e-5, 1e-9))


def test_moco_s_pi_is_the_softmax_of_queries_over_another_view_s_momentum_keys():
    out, keys = outputs_and_keys(3)
    first, second = toy(temperature=0.3).similarity(out, keys)
    rows = unit(out.projections)
    for pi, queries, keyed in ((first, rows[[0, 2]], 1), (second, rows[[1, 2]], 0)):
        expected = (queries.flatten(0, 1) @ keys.positive[keyed].T / 0.3).softmax(1)
        torch.testing.assert_close(logits(pi).softmax(1), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_queue_follows_a_literal_simulation(symmetric):
    method = toy(symmetric=symmetric, momentum_start=0.9)
    queue = [list(rows) for rows in method.queue]
    for step in range(4):
        before = copy.deepcopy(method)
        seen = [targets for _, targets in trained(method, 1, first=step)]
        for part, targets in enumerate(seen):
            # Both micro-batches see the queue and the momentum encoder of before the step; their keys enter
            # after it, in order.
            assert torch.equal(targets.queue, torch.stack([torch.stack(rows) for rows in queue]))
            rows = torch.cat(toy_images(2 * step + part)[0 if symmetric else 1 :])
            keys = unit(before.momentum_projector(before.momentum_backbone(rows))).unflatten(0, (-1, 5))
            torch.testing.assert_close(targets.positive, keys.detach(), rtol=1e-12, atol=1e-14)
        for targets in seen:
            queue = [rows[5:] + list(keys) for rows, keys in zip(queue, targets.positive, strict=True)]
    assert torch.equal(method.queue, torch.stack([torch.stack(rows) for rows in queue]))


def test_the_asymmetric_queries_are_the_first_view_s_and_the_keys_the_second_s():
    method, pair = toy(symmetric=False).eval(), toy_images(views=3)
    out, keys = method(pair), method.targets(pair)
    assert (
        out.features.shape == (2, 5, 6)
        and keys.positive.shape == (1, 5, 4)
        and method.queue.shape == (1, 15, 4)
    )
    torch.testing.assert_close(
        out.features, method.backbone(torch.cat([pair[0], pair[2]])).unflatten(0, (2, 5))
    )
    torch.testing.assert_close(
        keys.positive[0], unit(method.momentum_projector(method.momentum_backbone(pair[1])))
    )


def test_the_queue_starts_with_unit_vectors_in_all_directions():
    queue = toy(queue_length=1000).queue
    torch.testing.assert_close(queue.norm(dim=-1), torch.ones_like(queue[..., 0]), rtol=1e-6, atol=0)
    assert queue.mean((0, 1)).norm() < 0.1 and not torch.equal(queue[0], queue[1])


@pytest.mark.parametrize(
    ("length", "batch", "said"),
    [
        (0, 5, "negatives come from the queue"),
        (16, 5, "of 5 images. Set --method.moco.queue_length 15"),
        (3, 5, "5 im"),
    ],
)
def test_a_queue_that_does_not_hold_whole_batches_is_refused(length, batch, said):
    with pytest.raises(UsageError, match=said):
        toy(images_per_forward=batch, queue_length=length)
