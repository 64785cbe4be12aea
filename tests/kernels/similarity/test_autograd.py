"""How the operators meet PyTorch: transforms, strides, orders, opcheck, torch.compile."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

from fastgessl.kernels import (
    clip_loss,
    gessl_loss,
    info_nce,
    nt_xent,
    sigma_kl,
    similarity_logsumexp,
    soft_cross_entropy,
    softmax_marginal,
)
from fastgessl.kernels.similarity import autograd

M, N, D = 5, 7, 3
POSITIVES = torch.tensor([1, 2, -1, 4, 5])
EXCLUDE = torch.tensor([[0, 1], [3, -1], [-1, -1], [2, 2], [6, 4]])
ALL = tuple(range(5))


def contrastive(query, key, temperature, other_query, other_key, implementation=None):
    settings = {"temperature": temperature, "implementation": implementation}
    return (
        info_nce(query, key, positives=POSITIVES, exclude=EXCLUDE, **settings)
        + nt_xent(query, other_query, **settings)
        + clip_loss(query, key[:M], **settings)
        + similarity_logsumexp(other_query, key, bias=other_key[:, 0], **settings).square().sum()
    )


def distilled(query, key, temperature, other_query, other_key, implementation=None):
    sides = (query, key, other_query, other_key)
    settings = {
        "temperature": temperature,
        "teacher_temperature": 0.5,
        "exclude": EXCLUDE,
        "implementation": implementation,
    }
    both = gessl_loss(*sides, positives=POSITIVES, **settings)
    return sigma_kl(*sides, **settings) + soft_cross_entropy(*sides, **settings) + (both[0] * both[1]).sum()


def marginal(query, key, temperature, other_query, other_key, implementation=None):
    mean = softmax_marginal(
        query, key, temperature=temperature, bias=other_key[:, 0], implementation=implementation
    )
    return (mean * mean.log()).sum() + other_query.square().sum()


FAMILIES = pytest.mark.parametrize("loss", [contrastive, distilled, marginal])


def dense(loss):
    return lambda *operands: loss(*operands, implementation="reference")


@pytest.fixture
def operands():
    torch.manual_seed(0)
    draw = torch.randn(4, N, D, dtype=torch.float64)
    return draw[0, :M], draw[1], torch.tensor(0.7, dtype=torch.float64), draw[2, :M], draw[3]


@pytest.fixture
def tangents(operands):
    torch.manual_seed(1)
    return tuple(torch.randn_like(operand) for operand in operands)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def along(loss, tangents):
    """The directional derivative, through reverse mode."""
    return lambda *operands: sum(
        (g * t).sum() for g, t in zip(grad(loss, ALL)(*operands), tangents, strict=True)
    )


@FAMILIES
def test_grad_grad_of_grad_and_hessian_equal_dense(loss, operands, tangents):
    close(grad(loss, ALL)(*operands), grad(dense(loss), ALL)(*operands))
    close(grad(along(loss, tangents), ALL)(*operands), grad(along(dense(loss), tangents), ALL)(*operands))
    close(jacrev(jacrev(loss, (0, 1)), (0, 1))(*operands), hessian(dense(loss), (0, 1))(*operands))


@FAMILIES
@pytest.mark.parametrize("batched", [ALL, (0,), (1, 2)], ids=str)
def test_vmap_of_grad_equals_dense(loss, operands, batched):
    scales = torch.tensor([1.0, 1.3, 0.8], dtype=torch.float64)
    dims = tuple(0 if i in batched else None for i in ALL)
    stacked = [
        torch.stack([operand * s for s in scales]) if i in batched else operand
        for i, operand in enumerate(operands)
    ]
    close(vmap(grad(loss, ALL), dims)(*stacked), vmap(grad(dense(loss), ALL), dims)(*stacked))


def dual(loss):
    """The derivative through dual tensors, outside of torch.func."""

    def derivative(operands, tangents):
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(at, way) for at, way in zip(operands, tangents, strict=True))
            return forward_ad.unpack_dual(loss(*duals)).tangent

    return derivative


FORWARD = {
    "jvp": lambda loss: lambda at, way: jvp(loss, at, way),
    "jacfwd": lambda loss: lambda at, way: jacfwd(loss)(*at),
    "forward over reverse": lambda loss: lambda at, way: jvp(grad(loss), at, way),
    "reverse over forward": lambda loss: lambda at, way: grad(lambda *x: jvp(loss, x, way)[1])(*at),
    "dual tensors": dual,
}


@FAMILIES
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_raises_and_advises_reverse_mode(loss, mode, operands, tangents):
    with pytest.raises(
        RuntimeError, match=r"forward mode .* not implemented.*torch.func.jacrev, or grad of grad"
    ):
        FORWARD[mode](loss)(operands, tangents)


def test_a_third_derivative_through_func_raises(operands):
    with pytest.raises(RuntimeError, match=r"third derivatives .* not implemented"):
        grad(lambda *at: grad(lambda *at: grad(contrastive)(*at).sum())(*at).sum())(*operands)


@FAMILIES
def test_third_derivative_raises(loss, operands):
    query = operands[0].clone().requires_grad_()
    first = torch.autograd.grad(loss(query, *operands[1:]), query, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(second.square().sum(), query)


@FAMILIES
@pytest.mark.parametrize("downstream", ["cat", "sum"])
def test_cotangents_of_any_stride_give_the_dense_gradients(loss, operands, downstream, tangents):
    """cat hands back a narrowed view, sum an expanded scalar; both at the first and, through the gradients,
    at the second order.
    """

    def combined(function):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        if downstream == "sum":
            return torch.autograd.grad(sum(g.sum() for g in grads), leaves)
        wide = torch.cat([torch.cat([grads[0], grads[3]]), torch.cat([grads[1], grads[4]])[: 2 * M]], dim=1)
        return torch.autograd.grad((wide.t() * torch.arange(2.0 * M)).sum(), leaves)

    close(combined(loss), combined(dense(loss)))


def operator_inputs(operands, has_teacher):
    query, key, _, other_query, other_key = (part.clone().requires_grad_() for part in operands)
    scale, bias = (
        torch.tensor(1.3, dtype=torch.float64, requires_grad=True),
        torch.randn(N, dtype=torch.float64, requires_grad=True),
    )
    teacher = (
        (other_query, other_key, scale.detach().clone().requires_grad_(), None)
        if has_teacher
        else (None,) * 4
    )
    return query, key, scale, bias, *teacher


@pytest.mark.parametrize("has_teacher", [False, True])
def test_operators_pass_opcheck(operands, has_teacher):
    inputs = operator_inputs(operands, has_teacher)
    rest = (POSITIVES, EXCLUDE)
    saved = autograd.statistics(*inputs, *rest, True, "chunked")[3].detach()
    weights = [torch.randn(M, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights[2] = weights[2] if has_teacher else None
    needs = [True, True, True, True, *([True, False, True, False] if has_teacher else [False] * 4)]
    tangents = [
        torch.randn_like(part) if part is not None and need else None
        for part, need in zip(inputs, needs, strict=True)
    ]
    opcheck(autograd.statistics, (*inputs, *rest, True, "chunked"))
    opcheck(autograd.gradients, (*weights, *inputs, *rest, saved, True, "chunked", needs))
    with torch.no_grad():
        opcheck(autograd.curvature, (*tangents, *weights, *inputs, *rest, saved, True, "chunked", needs))


def bilevel(loss):
    """The outer loss after one inner step: its gradient needs the second derivative of `loss`."""

    def outer(query, *others):
        return loss(query - 0.3 * grad(loss)(query, *others), *others)

    return outer


@FAMILIES
def test_compiled_loss_and_gradient_equal_dense(loss, operands):
    torch._dynamo.reset()
    leaves = [operand.clone().requires_grad_() for operand in operands]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(compiled(*leaves), leaves), grad(dense(loss), ALL)(*operands))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_loss_follows_a_schedule_of_temperatures(operands, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(nt_xent, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for temperature in (0.5, 0.4, 0.3):
        found = compiled(operands[0], operands[3], temperature=temperature)
        close(found, nt_xent(operands[0], operands[3], temperature=temperature, implementation="reference"))


def compiled_or_refused(function, *operands):
    """What the compiled function gives; None where this torch refuses to trace it, as 2.6 and 2.11 do and
    2.15 does not.
    """
    torch._dynamo.reset()
    try:
        return torch.compile(function, backend="aot_eager")(*operands)
    except (torch._dynamo.exc.TorchRuntimeError, IndexError):
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15):
            raise
        return None


@FAMILIES
def test_compiled_func_grad_of_a_bilevel_loss_is_not_silently_first_order(loss, operands):
    found = compiled_or_refused(grad(bilevel(loss)), *operands)
    assert found is None or close(found, grad(bilevel(dense(loss)))(*operands)) is None


@FAMILIES
def test_compiled_forward_mode_raises(loss, operands, tangents):
    torch._dynamo.reset()
    with pytest.raises((RuntimeError, IndexError)):
        torch.compile(lambda at, way: jvp(loss, at, way)[1], backend="aot_eager")(operands, tangents)


@FAMILIES
def test_second_order_through_a_compiled_loss_raises(loss, operands):
    torch._dynamo.reset()
    query = operands[0].clone().requires_grad_()
    value = torch.compile(loss, backend="aot_eager")(query, *operands[1:])
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        first = torch.autograd.grad(value, query, create_graph=True)[0]
        torch.autograd.grad(first.square().sum(), query)
