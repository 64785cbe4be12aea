"""Modules against their originals: lightly itself where it has them, the published formula where not."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fastgessl import kernels
from fastgessl.kernels import ClipLoss, DINOLoss, DISSLLoss, NTXentLoss, SigmaLoss, SupConLoss, SwaVLoss


@pytest.fixture(scope="module")
def lightly_loss():
    return pytest.importorskip("lightly.loss")


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return normalize(rows(*shape, seed=seed), dim=-1)


def loss_and_gradients(function, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    return loss, *torch.autograd.grad(loss, leaves, allow_unused=True)


def test_nt_xent_equals_lightlys(lightly_loss):
    leaves = rows(10, 8), rows(10, 8, seed=1)
    found, expected = (
        loss_and_gradients(module.NTXentLoss(temperature=0.3), *leaves) for module in (kernels, lightly_loss)
    )
    torch.testing.assert_close(found, expected)


def test_memory_bank_equals_lightlys_over_several_steps(lightly_loss):
    ours, theirs = (
        module.NTXentLoss(temperature=0.2, memory_bank_size=(12, 4)).double()
        for module in (kernels, lightly_loss)
    )
    theirs(rows(1, 4), rows(1, 4))
    ours.bank = theirs.memory_bank.bank.clone().double()
    theirs.memory_bank.bank = theirs.memory_bank.bank.double()
    for step in range(4):  # 5 rows a step into 12: the third step reaches the end
        leaves = rows(5, 4, seed=step), rows(5, 4, seed=step + 10)
        found, expected = (loss_and_gradients(criterion, *leaves) for criterion in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(ours.bank, theirs.memory_bank.bank)


def test_the_memory_bank_rests_without_gradient_and_survives_a_backward():
    criterion = NTXentLoss(memory_bank_size=(8, 4)).double()
    before = criterion.bank.clone()
    criterion(rows(3, 4), rows(3, 4, seed=1))
    torch.testing.assert_close(criterion.bank, before, rtol=0, atol=0)
    query = rows(3, 4).requires_grad_()
    loss = criterion(query, rows(3, 4, seed=1))
    criterion(query, rows(3, 4, seed=2))
    loss.backward()  # after the bank has moved on twice
    assert not torch.equal(criterion.bank, before)


def test_clip_module_takes_open_clips_arguments():
    image, text, scale = unit(6, 4), unit(6, 4, seed=1), torch.tensor(8.0, dtype=torch.float64)

    def expected(image, text, scale):
        logits, target = scale * image @ text.T, torch.arange(6)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    by_name = ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1, use_horovod=False
    )
    for criterion in (by_name, ClipLoss(True, True, True, 0, 1, False)):
        torch.testing.assert_close(
            loss_and_gradients(criterion, image, text, scale),
            loss_and_gradients(expected, image, text, scale),
        )
    torch.testing.assert_close(
        criterion(image, text, scale, output_dict=True)["contrastive_loss"], expected(image, text, scale)
    )
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    biased = criterion(image, text, scale, bias, True)["contrastive_loss"]
    torch.testing.assert_close(biased, expected(image, text, scale))
    assert torch.autograd.grad(biased, bias)[0] == 0


def supcon_of_pairs(features, mask, temperature, rows):
    """SupContrast's own formula with a mask (N, N) of pairs of images, over the first `rows` of all views'
    rows.
    """
    flat, pairs = (
        torch.cat(features.unbind(1)),
        mask.repeat(features.shape[1], features.shape[1]).fill_diagonal_(0),
    )
    logits = flat @ flat.T / temperature
    log_probability = logits - logits.masked_fill(
        torch.eye(len(flat), dtype=torch.bool), -torch.inf
    ).logsumexp(1, keepdim=True)
    return temperature / 0.07 * -((pairs * log_probability).sum(1) / pairs.sum(1))[:rows].mean()


CLASSES = torch.tensor([2, 0, 2, 7, 0, 2])
SAME = (CLASSES[:, None] == CLASSES).double()


@pytest.mark.parametrize("mode, anchors", [("all", 12), ("one", 6)])
@pytest.mark.parametrize("positives", ["labels", "column of labels", "mask", "weighted mask", "neither"])
def test_supcon_takes_supcontrasts_arguments(mode, anchors, positives):
    weights = SAME * (1 + torch.arange(36.0, dtype=torch.float64).view(6, 6))
    given, mask = {
        "labels": ({"labels": CLASSES}, SAME),
        "column of labels": ({"labels": CLASSES[:, None]}, SAME),
        "mask": ({"mask": SAME.bool()}, SAME),
        "weighted mask": ({"mask": weights}, weights),
        "neither": ({}, torch.eye(6, dtype=torch.float64)),
    }[positives]
    features = unit(6, 2, 5)
    found = loss_and_gradients(
        lambda leaf: SupConLoss(0.2, mode, 0.07)(leaf.view(6, 2, 5, 1), **given), features
    )
    expected = loss_and_gradients(lambda leaf: supcon_of_pairs(leaf, mask, 0.2, anchors), features)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cast", ["autocast", "bfloat16 features"])
@pytest.mark.parametrize("noise", [0.04, 0.06])
def test_supcon_keeps_its_gradient_in_bfloat16_where_positives_are_nearly_certain(cast, noise):
    centres = unit(64, 1, 64)
    features = normalize(centres + noise * rows(64, 2, 64, seed=1), dim=2).to(
        torch.bfloat16 if cast == "bfloat16 features" else torch.float32
    )
    exact = loss_and_gradients(SupConLoss(), features.double())
    assert 1e-5 < exact[0] < 1e-1
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast == "autocast"):
        found = loss_and_gradients(SupConLoss(), features)
    error = (found[1].double() - exact[1]).norm() / exact[1].norm()
    print(f"{cast}: loss {exact[0]:.1e}, off by {found[0] / exact[0] - 1:.1e}, gradient {error:.1e}")
    assert abs(found[0] / exact[0] - 1) < 1e-2 and error < 1e-2


def test_sigma_module_normalises_and_detaches_the_teacher():
    leaves = [rows(5, 4, seed=i) for i in range(4)]

    def expected(student_query, student_key, teacher_query, teacher_key):
        student = (normalize(student_query) @ normalize(student_key).T / 0.1).log_softmax(1)
        teacher = (normalize(teacher_query.detach()) @ normalize(teacher_key.detach()).T / 0.3).log_softmax(1)
        return torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    criterion = SigmaLoss(temperature=0.1, teacher_temperature=0.3)
    torch.testing.assert_close(loss_and_gradients(criterion, *leaves), loss_and_gradients(expected, *leaves))


def test_dino_equals_lightlys_on_the_full_table_and_moves_its_centre_alike(lightly_loss):
    ours = DINOLoss(output_dim=9, teacher_temp=0.07).double()
    theirs = lightly_loss.DINOLoss(output_dim=9, teacher_temp=0.07, warmup_teacher_temp=0.07).double()
    weight, student_weight = rows(9, 4, seed=20), rows(9, 4, seed=21)
    for step in range(3):
        teacher, student = rows(2, 5, 4, seed=step), rows(4, 5, 4, seed=9 + step)
        found = loss_and_gradients(lambda s, w, t=teacher: ours(t, weight, s, w), student, student_weight)
        expected = loss_and_gradients(
            lambda s, w, t=teacher: theirs(list(t @ weight.T), list(s @ w.T), epoch=0),
            student,
            student_weight,
        )
        ours.update_center(teacher, weight)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_queue", [False, True])
def test_swav_equals_lightlys_on_the_full_table(lightly_loss, with_queue):
    high, low, prototypes = unit(2, 6, 4), unit(3, 6, 4, seed=1), unit(5, 4, seed=2)
    queue = unit(2, 7, 4, seed=3) if with_queue else None

    def expected(high, low, prototypes):
        queued = None if queue is None else list(queue @ prototypes.T)
        return lightly_loss.SwaVLoss()(list(high @ prototypes.T), list(low @ prototypes.T), queued).squeeze()

    found = loss_and_gradients(
        lambda high, low, prototypes: SwaVLoss()(high, low, prototypes, queue), high, low, prototypes
    )
    torch.testing.assert_close(found, loss_and_gradients(expected, high, low, prototypes))


def test_the_centre_moves_in_float32_under_autocast():
    criterion, views, weight = DINOLoss(output_dim=9), rows(2, 5, 4).float(), rows(9, 4, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        criterion.update_center(views.bfloat16(), weight)
    torch.testing.assert_close(criterion.center, 0.1 * (views.bfloat16().float() @ weight.T).mean((0, 1)))


def test_dissl_with_prototypes_that_nobody_takes_has_finite_gradients():
    student, teacher = rows(2, 8, 128).float(), rows(2, 8, 128, seed=1).float()
    prototypes = 2 * rows(4096, 128, seed=2).float()
    assignment = (teacher[0].double() @ prototypes.T.double() / 0.5).softmax(1).mean(0)
    assert (assignment.float() == 0).any()
    found = loss_and_gradients(lambda s, t, p: DISSLLoss()(s, prototypes, t, p), student, teacher, prototypes)
    wide = (part.double() for part in (student, teacher, prototypes))
    expected = loss_and_gradients(lambda s, t, p: DISSLLoss()(s, prototypes.double(), t, p), *wide)
    for ours, want in zip(found, expected, strict=True):
        assert (ours.double() - want).norm() <= 1e-4 * want.norm()


MODULES = {
    "NTXentLoss": lambda a, b: NTXentLoss()(a, b),
    "NTXentLoss with a bank": lambda a, b: NTXentLoss(memory_bank_size=(6, 4))(a, b),
    "ClipLoss": lambda a, b: ClipLoss()(a, b, 10.0),
    "SupConLoss": lambda a, b: SupConLoss()(torch.stack([a, b], 1)),
    "SigmaLoss": lambda a, b: SigmaLoss()(a, b, b, a),
    "DINOLoss": lambda a, b: DINOLoss(output_dim=6)(b[None], b, a[None].expand(2, 6, 4), b),
    "SwaVLoss": lambda a, b: SwaVLoss()(a.expand(2, 6, 4), [a], b, [b, b]),
    "DISSLLoss": lambda a, b: DISSLLoss()(a.expand(2, 6, 4), b, b.expand(2, 6, 4), a),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_takes_a_layers_output_beside_float32_under_autocast(name):
    first, second = unit(6, 4).bfloat16(), unit(6, 4, seed=1).float()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *gradients = loss_and_gradients(MODULES[name], first, second)
    torch.manual_seed(0)
    expected, *wide = loss_and_gradients(MODULES[name], first.float(), second.bfloat16().float())
    assert loss.dtype == torch.float32 and abs(loss - expected) < 2e-2 * abs(expected)
    for gradient, operand, want in zip(gradients, (first, second), wide, strict=True):
        assert (gradient is None and want is None) or gradient.dtype == operand.dtype
        assert want is None or (gradient.float() - want).norm() < 5e-2 * want.norm()


def test_dissl_is_its_formula_on_the_full_table_with_gradients_to_the_teacher():
    leaves = rows(2, 6, 4), rows(9, 4, seed=1), rows(2, 6, 3, seed=2), rows(9, 3, seed=3)

    def expected(student, student_prototypes, teacher, teacher_prototypes):
        log_q = (student @ student_prototypes.T).log_softmax(2).flip(0)
        log_p = (teacher @ teacher_prototypes.T / 0.5).log_softmax(2)
        p, mean = log_p.exp(), log_p.exp().mean(1)
        own, others = (p * log_q).sum(2).mean(), (p * log_p.flip(0)).sum(2).mean()
        return -own + 2.3 * (mean * mean.log()).sum(1).mean() - 0.8 * others

    torch.testing.assert_close(
        loss_and_gradients(DISSLLoss(), *leaves), loss_and_gradients(expected, *leaves)
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NTXentLoss(temperature=0), "temperature must be positive"),
        (
            lambda: NTXentLoss(memory_bank_size=4096),
            r"memory_bank_size must be 0 or \(rows, features\), found 4096",
        ),
        (lambda: SupConLoss()(torch.zeros(4, 3)), r"found \(4, 3\)"),
        (
            lambda: SupConLoss()(torch.zeros(4, 2, 3), torch.zeros(3)),
            r"labels must have shape \(4,\).* found \(3,\)",
        ),
        (
            lambda: SupConLoss()(torch.zeros(4, 2, 3), mask=torch.zeros(4, 3)),
            r"mask must have shape \(4, 4\).* found \(4, 3\)",
        ),
        (
            lambda: SupConLoss()(torch.zeros(4, 2, 3), torch.zeros(4), torch.zeros(4, 4)),
            r"labels and mask both",
        ),
        (lambda: SupConLoss(contrast_mode="two"), r"contrast_mode must be 'all' or 'one', found 'two'"),
        (
            lambda: ClipLoss(world_size=8)(torch.eye(2), torch.eye(2), 1.0),
            r"world_size is 8, but torch.distributed is not initialised",
        ),
        (lambda: ClipLoss(use_horovod=True), r"use_horovod=True. Launch with torchrun"),
        (
            lambda: ClipLoss()(torch.eye(2), torch.eye(2), 1.0, True),
            r"logit_bias must be .* found True. Pass output_dict by its name",
        ),
        (
            lambda: DINOLoss(output_dim=5)(
                torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.zeros(1, 2, 3), torch.zeros(5, 3)
            ),
            "one view of each",
        ),
        (lambda: SwaVLoss()(torch.zeros(1, 2, 3), [], torch.zeros(5, 3)), "one view in all"),
    ],
)
def test_bad_input_is_refused_with_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()
