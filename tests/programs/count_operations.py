"""Count what forward and backward of losses ask of a device, in Triton's interpreter, and print it as JSON.

A program of its own because TRITON_INTERPRET must be set before the kernels are defined.
"""

import json
from collections import Counter
from functools import partial

import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from fastgessl.kernels import clip_loss, gessl_loss, info_nce, nt_xent, sigma_kl, similarity_logsumexp

ROWS, FEATURES, TEMPERATURE = 32, 16, 0.1
FREE = ("empty", "empty_like", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh", "scalar_tensor")


class Operations(TorchDispatchMode):
    """Names of what would be launched: no views, no allocations, nothing without elements."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.inside_a_kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, (tuple, list)) else output
        name = function.overloadpacket.__name__
        if (
            not self.inside_a_kernel
            and not function.is_view
            and name not in FREE
            and (not isinstance(first, torch.Tensor) or first.numel())
        ):
            self.found[name] += 1
        return output


counting = Operations()
run = InterpretedFunction.run


def counted(kernel, *arguments, **settings):
    counting.found[kernel.fn.__name__] += 1
    counting.inside_a_kernel = True
    run(kernel, *arguments, **settings)
    counting.inside_a_kernel = False


def count(step):
    counting.found.clear()
    with counting:
        step()
    return dict(counting.found)


def unit(dtype=torch.float32, moving=True):
    return normalize(torch.randn(ROWS, FEATURES), dim=1).to(dtype).requires_grad_(moving)


def dense_info_nce(query, key):
    """The three lines that people write."""
    return cross_entropy(query @ key.T / TEMPERATURE, torch.arange(len(query)))


def dense_nt_xent(first, second):
    rows = normalize(torch.cat([first, second]), dim=1)
    index = torch.arange(len(rows))
    table = (rows @ rows.T / TEMPERATURE).masked_fill(index[:, None] == index, -torch.inf)
    return cross_entropy(table, index.roll(len(first)))


def dense_clip(image, text):
    table, index = image @ text.T / TEMPERATURE, torch.arange(len(image))
    return (cross_entropy(table, index) + cross_entropy(table.T, index)) / 2


PAIRS = {
    "info_nce": (info_nce, dense_info_nce),
    "nt_xent": (nt_xent, dense_nt_xent),
    "clip": (clip_loss, dense_clip),
}
STORED = {
    "info_nce": lambda a, b, how: info_nce(a, b, temperature=TEMPERATURE, implementation=how),
    "clip": lambda a, b, how: clip_loss(a, b, temperature=TEMPERATURE, implementation=how),
    "sigma_kl": lambda a, b, how: sigma_kl(a, b, a.detach(), b.detach(), implementation=how),
    "gessl_loss": lambda a, b, how: sum(
        rows.mean() for rows in gessl_loss(a, b, a.detach(), b.detach(), implementation=how)
    ),
}


def derivative(loss, dtype, order):
    """Forward and backward of a loss of two operands, and at the second order a product with its Hessian."""
    leaves = unit(dtype), unit(dtype)

    def step():
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=order == 2)
        if order == 2:
            torch.autograd.grad((first[0] * first[1]).sum(), leaves)

    return count(step)


def beside_dense(name, dtype, order):
    ours, dense = PAIRS[name]
    return (
        derivative(lambda a, b: ours(a, b, temperature=TEMPERATURE, implementation="triton"), dtype, order),
        derivative(dense, dtype, order),
    )


def needing(query=False, key=False, temperature=False, bias=False):
    """What is launched where only these need a gradient."""
    operands = unit(moving=query), unit(moving=key)
    scale, columns = torch.tensor(0.1, requires_grad=temperature), torch.zeros(ROWS, requires_grad=bias)
    leaves = [part for part in (*operands, scale, columns) if part.requires_grad]

    def step():
        settings = {"temperature": scale if temperature else 0.1, "bias": columns if bias else None}
        loss = similarity_logsumexp(*operands, implementation="triton", **settings)
        torch.autograd.grad(loss.sum(), leaves)

    found = count(step)
    return [found.get("gradient_rows_kernel", 0), found.get("gradient_columns_kernel", 0)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    InterpretedFunction.run = counted
    dtypes = (torch.float32, torch.bfloat16)
    found = {
        "beside dense": {
            f"{name} {dtype} order {order}": beside_dense(name, dtype, order)
            for name in PAIRS
            for dtype in dtypes
            for order in (1, 2)
        },
        "stored": {
            f"{name} {dtype}": [
                derivative(partial(loss, how=how), dtype, 1) for how in ("triton", "reference")
            ]
            for name, loss in STORED.items()
            for dtype in dtypes
        },
        "needs": {
            "query": needing(query=True),
            "key": needing(key=True),
            "both": needing(query=True, key=True),
            "temperature": needing(temperature=True),
            "bias": needing(bias=True),
        },
    }
    print(json.dumps(found))
