from dataclasses import replace

import pytest
import torch
from toys import assert_same_loss, logits, toy_backbone, toy_images, toy_method, trained, unit

from fastgessl.config import UsageError
from fastgessl.methods import Outputs, RunFacts


def toy(classes=None, images_per_forward=5, steps_per_epoch=4.0, **options):
    facts = RunFacts(
        total_steps=40,
        steps_per_epoch=steps_per_epoch,
        images_per_forward=images_per_forward,
        classes=classes,
    )
    given = {"prototypes": 9, "queue_length": 0, "temperature": 0.1}
    return toy_method("swav", facts, toy_backbone(norm=True), **given | options)


def outputs(crops=2):
    torch.manual_seed(0)
    rows = unit(torch.randn(crops, 7, 4, dtype=torch.float64)).requires_grad_()
    return Outputs(rows, rows, prototypes=unit(torch.randn(9, 4, dtype=torch.float64)).requires_grad_())


def sinkhorn(scores, epsilon, iterations):
    """Caron et al. 2020, algorithm 1 of the appendix: scores (B, K) -> codes (B, K)."""
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    prototypes, rows = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / rows
    return (q * rows).T


def loss_by_definition(out, epsilon=0.05, iterations=3, temperature=0.1, queue=None):
    scores = out.projections @ out.prototypes.T
    terms = []
    for coded in (0, 1):
        balanced = scores[coded].detach()
        if queue is not None:
            balanced = torch.cat([balanced, queue[coded] @ out.prototypes.detach().T])
        codes = sinkhorn(balanced, epsilon, iterations)[:7]
        for other in range(len(scores)):
            if other != coded:
                terms.append(
                    -(codes * torch.log(torch.softmax(scores[other] / temperature, dim=1))).sum(1).mean()
                )
    return torch.stack(terms).mean()


@pytest.mark.parametrize("crops", [2, 5])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.3, 1)])
@pytest.mark.parametrize("rows_of_queue", [0, 12])
def test_swav_s_loss_and_gradient_are_the_definition(crops, epsilon, iterations, rows_of_queue):
    out = outputs(crops)
    queue = unit(torch.randn(2, rows_of_queue, 4, dtype=torch.float64)) if rows_of_queue else None
    found = toy(sinkhorn_epsilon=epsilon, sinkhorn_iterations=iterations).loss(out, queue)
    expected = loss_by_definition(out, epsilon, iterations, queue=queue)
    assert_same_loss(found, expected, [out.projections, out.prototypes])


@pytest.mark.parametrize("rows_of_queue", [0, 12])
def test_swav_s_loss_and_gradient_are_lightly_s(rows_of_queue):
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    out = outputs(crops=4)
    queue = unit(torch.randn(2, rows_of_queue, 4, dtype=torch.float64)) if rows_of_queue else None
    scores = [view @ out.prototypes.T for view in out.projections]
    queued = None if queue is None else [rows @ out.prototypes.T for rows in queue]
    expected = lightly.SwaVLoss()(scores[:2], scores[2:], queued)
    operands = [out.projections, out.prototypes]
    found = toy().loss(out, queue)
    assert_same_loss(found, expected.squeeze(), operands, rtol=1e-8, slopes=(1e-6, 1e-10))


def test_codes_once_settled_stay_while_the_outputs_move():
    method, out = toy(), outputs()
    codes = method.settle(out)
    moved = Outputs(out.features, unit(out.projections + 0.3), prototypes=out.prototypes)
    torch.testing.assert_close(method.loss(out, codes), method.loss(out), rtol=0, atol=0)
    assert method.settle(moved, codes) is codes
    assert (method.loss(moved, codes) - method.loss(moved)).abs() > 1e-3
    assert not any(tensor.requires_grad for tensor in (codes.rows, codes.prototypes, codes.potentials))


def test_swav_s_pi_is_the_softmax_of_every_view_over_the_prototypes_without_balance():
    out = outputs(crops=3)
    (pi,) = toy(temperature=0.3).similarity(out)
    torch.testing.assert_close(logits(pi), out.projections.flatten(0, 1) @ out.prototypes.T / 0.3)


def test_the_queue_holds_the_newest_rows_in_order_and_serves_once_full_since_its_first_epoch():
    method = toy(queue_length=20, queue_start_epoch=0.5)
    passes = trained(method, 6, views=3)
    queues = [queue for _, queue in passes]
    rows = [out.projections[:2].detach() for out, _ in passes]
    # Two steps pass before the first epoch of the queue begins; 20 rows are two steps of two micro-batches of
    # 5.
    assert [queue is not None for queue in queues] == [False] * 8 + [True] * 4
    for used, pair in zip(queues[8:], (4, 4, 5, 5), strict=True):
        assert torch.equal(used, torch.cat(rows[2 * pair - 4 : 2 * pair], dim=1))
    assert torch.equal(method.queue, torch.cat(rows[-4:], dim=1))


def test_prototypes_stand_still_in_the_first_epochs_and_have_unit_length_after_every_step():
    method = toy(freeze_epochs=0.5)
    start = method.prototypes.detach().clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(9, dtype=torch.float64), rtol=1e-6, atol=0)
    trained(method, 2, views=3)
    torch.testing.assert_close(method.prototypes.detach(), start, rtol=1e-6, atol=1e-7)
    trained(method, 1, first=2, views=3)
    assert (method.prototypes - start).abs().max() > 1e-4
    torch.testing.assert_close(
        method.prototypes.norm(dim=1), torch.ones(9, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_what_a_forward_gave_does_not_change_with_the_prototypes():
    method = toy()
    out = method(toy_images())
    before = out.prototypes.detach().clone()
    with torch.no_grad():
        method.prototypes.add_(1.0)
    assert torch.equal(out.prototypes, before)


def test_the_gradient_of_a_step_reaches_prototypes_that_are_not_normalised_within_it():
    """The paper's code makes them of unit length between steps; within one, scores are z·c, also along c."""
    method = toy(temperature=0.3, sinkhorn_epsilon=0.3)
    out = method(toy_images())
    raw = replace(out, prototypes=method.prototypes)
    found, expected = method.loss(out), loss_by_definition(raw, epsilon=0.3, temperature=0.3)
    assert_same_loss(found, expected, [method.prototypes])
    (slope,) = torch.autograd.grad(found, method.prototypes)
    assert (slope * method.prototypes).sum(1).abs().max() > 1e-3


def test_too_few_prototypes_and_a_queue_of_parts_of_batches_are_refused():
    with pytest.raises(
        UsageError, match=r"method.swav.prototypes is 9, and the training images have 9 classes"
    ):
        toy(classes=9)
    toy(classes=8)
    with pytest.raises(UsageError, match="queue_length 12 does not hold a whole number of batches of 5"):
        toy(queue_length=12)
