"""The public losses: published formulas, rows that are ignored, reductions, autocast, and what bad input
gets.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from fastgessl.kernels import (
    clip_loss,
    gessl_loss,
    info_nce,
    nt_xent,
    sigma_kl,
    similarity_logsumexp,
    sinkhorn_potentials,
    soft_cross_entropy,
    softmax_marginal,
)

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@IMPLEMENTATIONS
def test_info_nce_is_the_cross_entropy_of_the_similarity_table(implementation):
    query, key, target = rows(6, 4), rows(9, 4, seed=1), torch.tensor([3, 0, 8, 8, 1, 5])
    loss = info_nce(query, key, temperature=0.3, positives=target, implementation=implementation)
    torch.testing.assert_close(loss, cross_entropy(query @ key.T / 0.3, target))


@IMPLEMENTATIONS
def test_nt_xent_is_the_formula_of_the_paper_term_by_term(implementation):
    first, second = rows(2, 5, 3)
    z = normalize(torch.cat([first, second]), dim=1)
    expected = []
    for i in range(10):
        partner = (i + 5) % 10
        similarity = [torch.exp(z[i] @ z[k] / 0.4) for k in range(10)]
        expected.append(-torch.log(similarity[partner] / sum(s for k, s in enumerate(similarity) if k != i)))
    found = nt_xent(first, second, temperature=0.4, reduction="none", implementation=implementation)
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(
        nt_xent(first, second, temperature=0.4, implementation=implementation), found.mean()
    )
    torch.testing.assert_close(
        nt_xent(first, second, temperature=0.4, reduction="sum", implementation=implementation), found.sum()
    )


@IMPLEMENTATIONS
def test_clip_loss_is_the_mean_of_both_cross_entropies_and_trains_its_temperature(implementation):
    image, text, temperature = (
        rows(6, 4),
        rows(6, 4, seed=1),
        torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
    )
    logits, target = image @ text.T / temperature, torch.arange(6)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    loss = clip_loss(image, text, temperature=temperature, implementation=implementation)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, temperature), torch.autograd.grad(expected, temperature)
    )


@IMPLEMENTATIONS
def test_sigma_is_torch_kl_div_and_cross_entropy_adds_the_teachers_entropy(implementation):
    student_query, student_key, teacher_query, teacher_key = (
        rows(6, 4),
        rows(9, 4, seed=1),
        rows(6, 5, seed=2),
        rows(9, 5, seed=3),
    )
    bias, teacher_bias = rows(9, seed=4), rows(9, seed=5)
    log_student = (student_query @ student_key.T / 0.3 + bias).log_softmax(1)
    log_teacher = (teacher_query @ teacher_key.T / 0.7 + teacher_bias).log_softmax(1)
    operands = (student_query, student_key, teacher_query, teacher_key)
    options = {
        "temperature": 0.3,
        "teacher_temperature": 0.7,
        "student_bias": bias,
        "teacher_bias": teacher_bias,
    }
    expected = torch.nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    torch.testing.assert_close(sigma_kl(*operands, **options, implementation=implementation), expected)
    entropy = -(log_teacher.exp() * log_teacher).sum(1).mean()
    torch.testing.assert_close(
        soft_cross_entropy(*operands, **options, implementation=implementation), expected + entropy
    )


@IMPLEMENTATIONS
def test_gessl_loss_is_info_nce_and_sigma_of_the_same_table(implementation):
    operands, positives = (
        (rows(5, 4), rows(8, 4, seed=1), rows(5, 3, seed=2), rows(8, 3, seed=3)),
        torch.tensor([7, -1, 0, 3, 2]),
    )
    contrastive, sigma = gessl_loss(
        *operands, temperature=0.5, positives=positives, implementation=implementation
    )
    torch.testing.assert_close(
        contrastive, info_nce(*operands[:2], temperature=0.5, positives=positives, reduction="none")
    )
    torch.testing.assert_close(sigma, sigma_kl(*operands, temperature=0.5, reduction="none"))


def test_sigma_of_a_model_with_itself_is_zero_with_zero_gradient():
    query, key = rows(6, 4).requires_grad_(), rows(9, 4, seed=1).requires_grad_()
    sigma = sigma_kl(query, key, query.detach(), key.detach())
    assert sigma.abs() < 1e-14
    assert all(gradient.abs().max() < 1e-14 for gradient in torch.autograd.grad(sigma, (query, key)))


@IMPLEMENTATIONS
def test_losses_composed_as_documented_equal_their_own_formulas(implementation):
    query, key, queue = (
        normalize(rows(5, 4), dim=1),
        normalize(rows(5, 4, seed=1), dim=1),
        normalize(rows(11, 4, seed=2), dim=1),
    )
    settings = {"temperature": 0.2, "implementation": implementation}
    positive = (query * key).sum(1) / 0.2
    moco = (torch.logaddexp(positive, similarity_logsumexp(query, queue, **settings)) - positive).mean()
    expected = cross_entropy(
        torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.2,
        torch.zeros(5, dtype=torch.long),
    )
    torch.testing.assert_close(moco, expected)
    decoupled = info_nce(query, key, exclude=torch.arange(5), **settings)
    others = (query @ key.T / 0.2).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(decoupled, (others.logsumexp(1) - positive).mean())


@IMPLEMENTATIONS
def test_ignored_rows_have_zero_loss_and_zero_gradient_and_count_in_the_mean(implementation):
    query, key = rows(4, 3).requires_grad_(), rows(2, 3, seed=1)
    positives, exclude = torch.tensor([0, -1, 1, 0]), torch.tensor([[-1, -1], [-1, -1], [0, 1], [1, -1]])
    found = info_nce(
        query, key, positives=positives, exclude=exclude, reduction="none", implementation=implementation
    )
    assert found[1] == 0 and found[2] == 0 and found[0] != 0
    mean = info_nce(query, key, positives=positives, exclude=exclude, implementation=implementation)
    torch.testing.assert_close(mean, found.sum() / 4)
    gradient = torch.autograd.grad(found.sum(), query, create_graph=True)[0]
    curvature = torch.autograd.grad(gradient.square().sum(), query)[0]
    assert gradient[1:3].abs().max() == 0 and curvature[1:3].abs().max() == 0
    assert gradient.isfinite().all() and curvature.isfinite().all() and curvature[0].abs().max() > 0


@IMPLEMENTATIONS
def test_a_row_without_columns_gives_zero_divergence_and_minus_infinite_lse(implementation):
    query, key, exclude = (
        rows(3, 2).requires_grad_(),
        rows(2, 2, seed=1),
        torch.tensor([[0, 1], [0, -1], [-1, -1]]),
    )
    lse = similarity_logsumexp(query, key, exclude=exclude, implementation=implementation)
    assert lse[0] == -torch.inf and lse[1:].isfinite().all()
    for divergence in (sigma_kl, soft_cross_entropy):
        found = divergence(
            query,
            key,
            2 * query.detach(),
            key,
            exclude=exclude,
            reduction="none",
            implementation=implementation,
        )
        gradient = torch.autograd.grad(found.sum(), query)[0]
        assert found[0] == 0 and gradient[0].abs().max() == 0 and gradient.isfinite().all() and found[2] > 0


EVERY = {
    "similarity_logsumexp": lambda *x, **how: similarity_logsumexp(*x[:2], **how).mean(),
    "info_nce": lambda *x, **how: info_nce(*x[:2], **how),
    "nt_xent": lambda *x, **how: nt_xent(*x[:2], **how),
    "clip_loss": lambda *x, **how: clip_loss(*x[:2], temperature=0.1, **how),
    "softmax_marginal": lambda *x, **how: softmax_marginal(*x[:2], **how).sum(),
    "sigma_kl": lambda *x, **how: sigma_kl(*x, **how),
    "soft_cross_entropy": lambda *x, **how: soft_cross_entropy(*x, **how),
    "gessl_loss": lambda *x, **how: torch.stack(gessl_loss(*x, **how)).mean(),
}


WITH_TEACHER = ("sigma_kl", "soft_cross_entropy", "gessl_loss")


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "name, operand",
    [(name, operand) for name in EVERY for operand in range(4 if name in WITH_TEACHER else 2)],
)
def test_nan_in_an_operand_gives_a_loss_and_gradients_of_nan(name, operand, implementation):
    leaves = [rows(3, 2, seed=i) for i in range(4)]
    leaves[operand][1, 0] = torch.nan
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = EVERY[name](*leaves, implementation=implementation)
    assert loss.isnan()
    assert torch.autograd.grad(loss, leaves[operand])[0].isnan().any()


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_of_nan_or_infinity_gives_potentials_an_entropy_and_its_gradients_of_nan(value, implementation):
    query, key = rows(4, 3), rows(5, 3, seed=1)
    query[1, 0] = value
    potentials = sinkhorn_potentials(query, key, implementation=implementation)
    assert potentials.isnan().all()
    loss = soft_cross_entropy(query, key, query, key, teacher_bias=potentials, implementation=implementation)
    assert loss.isnan()
    query.requires_grad_()
    mean = softmax_marginal(query, key, implementation=implementation)
    entropy = -torch.special.xlogy(mean, mean).sum()
    assert entropy.isnan() and torch.autograd.grad(entropy, query)[0].isnan().all()


@IMPLEMENTATIONS
def test_the_slope_of_an_entropy_at_an_unused_prototype_gives_gradients_of_nan_and_no_error_about_a_bias(
    implementation,
):
    query, key = torch.eye(3, requires_grad=True), torch.cat([torch.eye(3), -torch.ones(1, 3)])
    mean = softmax_marginal(query, key, temperature=1e-3, implementation=implementation)
    assert mean[3] == 0
    assert torch.autograd.grad(-torch.special.xlogy(mean, mean).sum(), query)[0].isnan().any()


MIXED = EVERY | {"sinkhorn_potentials": lambda *x, **how: sinkhorn_potentials(*x[:2], **how).square().sum()}


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", MIXED)
def test_every_function_takes_a_layers_output_beside_float32_under_autocast(name, implementation):
    own = [
        normalize(rows(6, 4, seed=i), dim=1).to(torch.float32 if i % 2 else torch.bfloat16).requires_grad_()
        for i in range(4)
    ]
    wide = [leaf.detach().bfloat16().float().requires_grad_() for leaf in own]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = MIXED[name](*own, implementation=implementation)
    expected = MIXED[name](*wide, implementation=implementation)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, expected, rtol=4e-3 if name == "nt_xent" else 1e-5, atol=1e-7
    )  # which normalises, then rounds
    if name == "sinkhorn_potentials":
        return
    gradients, wanted = (
        torch.autograd.grad(loss, leaves, allow_unused=True)
        for loss, leaves in ((found, own), (expected, wide))
    )
    for gradient, leaf, want in zip(gradients, own, wanted, strict=True):
        assert (gradient is None and want is None) or gradient.dtype == leaf.dtype
        assert want is None or (gradient.float() - want).norm() <= 2e-2 * want.norm() + 1e-6


@IMPLEMENTATIONS
@pytest.mark.parametrize("given", [False, True], ids=["default", "given"])
def test_a_learnt_temperature_has_the_students_gradient_unless_the_teacher_is_given_it_too(
    given, implementation
):
    operands, tau = (
        [rows(6, 4, seed=i) for i in range(4)],
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
    )
    log_student = (operands[0] @ operands[1].T / tau).log_softmax(1)
    log_teacher = (operands[2] @ operands[3].T / (tau if given else tau.detach())).log_softmax(1)
    sigma = torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
    settings = {
        "temperature": tau,
        "teacher_temperature": tau if given else None,
        "implementation": implementation,
    }
    for found, expected in (
        (sigma_kl(*operands, **settings), sigma.mean()),
        (gessl_loss(*operands, **settings)[1].mean(), sigma.mean()),
        (soft_cross_entropy(*operands, **settings), -(log_teacher.exp() * log_student).sum(1).mean()),
    ):
        first, wanted = (torch.autograd.grad(value, tau, create_graph=True)[0] for value in (found, expected))
        torch.testing.assert_close(first, wanted)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, tau, retain_graph=True)[0] for value in (first, wanted))
        )


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", EVERY)
def test_an_empty_operand_or_one_of_another_width_device_or_dtype_is_refused_by_every_loss(
    name, implementation
):
    good = [rows(3, 2, seed=i) for i in range(4)]
    for wrong, message in (
        (torch.zeros(0, 2, dtype=torch.float64), r"found shape \(0, 2\)"),
        (torch.zeros(3, 0, dtype=torch.float64), r"found shape \(3, 0\)"),
        (torch.zeros(3, 5, dtype=torch.float64), r"as many features.*\(3, 5\)"),
        (good[1].to("meta"), "meta"),
        (good[1].float(), "torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            EVERY[name](good[0], wrong, *good[2:], implementation=implementation)


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 40),
    extra=st.integers(0, 30),
    D=st.integers(1, 33),
    temperature=st.floats(0.02, 5.0),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    expanded=st.booleans(),
)
def test_any_shape_stride_dtype_temperature_and_mask_equals_the_reference(
    M, extra, D, temperature, seed, dtype, transposed, expanded
):
    N = M + extra
    generator = torch.Generator().manual_seed(seed)
    unit = [
        normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1).to(dtype)
        for n in (M, N)
    ]
    leaves = [(part.t().contiguous().t() if transposed else part).requires_grad_() for part in unit]
    positives = torch.randint(-1, N, (M,), generator=generator)
    exclude = torch.randint(-1, N, (M, 2), generator=generator)

    def gradients(implementation):
        loss = info_nce(
            *leaves,
            temperature=temperature,
            positives=positives,
            exclude=exclude,
            reduction="none",
            implementation=implementation,
        )
        weight = torch.randn(2 * M, generator=torch.Generator().manual_seed(1), dtype=loss.dtype)
        return loss, *torch.autograd.grad(loss, leaves, weight[:1].expand(M) if expanded else weight[::2])

    tolerance = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for found, expected in zip(gradients("chunked"), gradients("reference"), strict=True):
        assert found.dtype == expected.dtype
        assert (found.double() - expected.double()).norm() <= tolerance * (1 + expected.double().norm())


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: info_nce(GOOD, torch.zeros(4, 5)), r"as many features; found query \(4, 3\), key \(4, 5\)"),
        (
            lambda: info_nce(GOOD, GOOD.double()),
            r"share dtype and device; found query \(4, 3\), key \(4, 3\): torch.float32",
        ),
        (lambda: info_nce(GOOD, GOOD.to("meta")), r"share dtype and device.*meta"),
        (lambda: info_nce(GOOD[0], GOOD), r"query must have two dimensions .* found shape \(3,\)"),
        (lambda: info_nce(GOOD[:0], GOOD), r"none of them 0; found shape \(0, 3\)"),
        (lambda: info_nce(GOOD.long(), GOOD.long()), r"found torch.int64 of shape \(4, 3\)"),
        (lambda: info_nce([[1.0]], GOOD), r"query must be a tensor, found list"),
        (lambda: info_nce(GOOD, GOOD[:2]), r"more rows \(4\) than keys \(2\)"),
        (
            lambda: info_nce(GOOD, GOOD, positives=torch.zeros(3, dtype=torch.long)),
            r"positives .* \(4 rows\).* found torch.int64 of shape \(3,\)",
        ),
        (
            lambda: info_nce(GOOD, GOOD, positives=torch.zeros(4)),
            r"positives must be int64.* found torch.float32",
        ),
        (
            lambda: info_nce(GOOD, GOOD, positives=torch.full((4,), 4)),
            r"positives of shape \(4,\) must lie in \[-1, 4\), found \[4, 4\]",
        ),
        (
            lambda: info_nce(GOOD, GOOD, exclude=torch.full((4,), -2)),
            r"exclude of shape \(4, 1\) must lie in \[-1, 4\), found \[-2, -2\]",
        ),
        (
            lambda: info_nce(GOOD, GOOD, exclude=torch.zeros(4, 3, dtype=torch.long)),
            r"exclude must have shape .* found \(4, 3\)",
        ),
        (
            lambda: info_nce(GOOD, GOOD, temperature=0.0),
            r"temperature must be positive and finite, found 0.0",
        ),
        (
            lambda: info_nce(GOOD, GOOD, temperature=1e-40),
            r"an inverse that torch.float32 can hold, 1e-38 to 3e\+38; found 1e-40",
        ),
        (
            lambda: nt_xent(GOOD, GOOD, temperature=1e40),
            r"an inverse that torch.float32 can hold.* found 1e\+40",
        ),
        (
            lambda: info_nce(GOOD, GOOD, temperature=torch.tensor(-0.1)),
            r"temperature must be positive and finite, found -0.1",
        ),
        (
            lambda: info_nce(GOOD, GOOD, temperature=torch.tensor(float("nan"))),
            r"temperature must be positive and finite, found nan",
        ),
        (
            lambda: info_nce(GOOD, GOOD, temperature=torch.ones(1)),
            r"0-d floating tensor, found torch.float32 of shape \(1,\)",
        ),
        (lambda: info_nce(GOOD, GOOD, temperature="0.1"), r"0-d floating tensor, found str"),
        (
            lambda: info_nce(GOOD, GOOD, reduction="avg"),
            r"reduction must be one of mean, sum, none, found 'avg'",
        ),
        (lambda: info_nce(GOOD, GOOD, mode="star"), r"mode must be one of .*found 'star'"),
        (
            lambda: similarity_logsumexp(GOOD, GOOD, bias=torch.zeros(3)),
            r"bias must hold .* shape \(4,\).* found torch.float32 of shape \(3,\)",
        ),
        (
            lambda: similarity_logsumexp(GOOD, GOOD, bias=torch.full((4,), -torch.inf)),
            r"bias of shape \(4,\) must not be infinite",
        ),
        (lambda: similarity_logsumexp(GOOD, GOOD, bias=[0.0] * 4), r"bias must be a tensor, found list"),
        (
            lambda: info_nce(GOOD, GOOD, positives=[0, 1, 2, 3]),
            r"positives must be a tensor of int64, found list",
        ),
        (
            lambda: info_nce(GOOD, GOOD, exclude=[0, 1, 2, 3]),
            r"exclude must be a tensor of int64, found list",
        ),
        (
            lambda: sigma_kl(GOOD, GOOD, GOOD, GOOD[:3]),
            r"as many keys; found \(rows, keys\) \(4, 4\) and \(4, 3\)",
        ),
        (lambda: sigma_kl(GOOD, GOOD, GOOD.double(), GOOD.double()), r"student and teacher must share dtype"),
        (
            lambda: sigma_kl(GOOD, GOOD, GOOD, GOOD, teacher_temperature=-1.0),
            r"teacher_temperature must be positive",
        ),
        (lambda: nt_xent(GOOD, GOOD[:2]), r"same images; found shapes \(4, 3\) and \(2, 3\)"),
        (
            lambda: clip_loss(GOOD, GOOD[:2], temperature=0.1),
            r"paired row by row; found shapes \(4, 3\) and \(2, 3\)",
        ),
        (lambda: softmax_marginal(GOOD, torch.zeros(2, 2)), r"as many features"),
    ],
)
def test_bad_input_is_refused_with_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("positives", [torch.full((4,), 4), torch.tensor([0, 1, 2, -2])])
def test_values_are_checked_by_the_reference_and_under_vmap_too(positives):
    with pytest.raises(ValueError, match="positives of shape"):
        info_nce(GOOD, GOOD, positives=positives, implementation="reference")
    for how in ("chunked", "reference"):
        with pytest.raises(ValueError, match="positives of shape"):
            torch.func.vmap(
                lambda query, how=how: info_nce(query, GOOD, positives=positives, implementation=how)
            )(GOOD.expand(2, 4, 3).clone())


def test_compiled_code_checks_values_too():
    torch._dynamo.reset()
    loss = torch.compile(similarity_logsumexp, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"exclude of shape \(4, 1\) must lie in \[-1, 4\)"):
        loss(GOOD, GOOD, exclude=torch.full((4,), 4))
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, found -1.0"):
        loss(GOOD, GOOD, temperature=torch.tensor(-1.0))
    with pytest.raises(ValueError, match=r"bias of shape .* must not be infinite"):
        loss(GOOD, GOOD, bias=torch.full((4,), torch.inf))


def test_an_empty_batch_under_vmap_is_refused():
    loss = torch.func.vmap(lambda query: info_nce(query, GOOD, implementation="chunked"))
    with pytest.raises(ValueError, match="vmap over a batch of 0 examples"):
        loss(torch.zeros(0, 4, 3))


@pytest.mark.parametrize("order", [1, 2])
def test_grad_scaler_and_float16_autocast_give_the_unscaled_gradient(order):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    layer = torch.nn.Linear(6, 8)
    views = torch.randn(2, 16, 6)

    def gradients(scale, device_type, enabled):
        layer.zero_grad()
        with torch.autocast(device_type, dtype=torch.float16, enabled=enabled):
            loss = nt_xent(layer(views[0]), layer(views[1]), temperature=0.5)
        if order == 2:
            first = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
            loss = loss + sum(gradient.square().sum() for gradient in first)
        (scaler.scale(loss) / scaler.get_scale() * scale).backward()
        return torch.cat([parameter.grad.flatten() / scale for parameter in layer.parameters()])

    found, expected = gradients(scaler.get_scale(), "cpu", True), gradients(1.0, "cpu", False)
    assert (found - expected).norm() < 2e-2 * expected.norm()
