"""What cannot be differentiated twice is refused in exact mode, with the way out named, before it can give a
wrong gradient.

Found: torch's SyncBatchNorm and compiled modules among the method's modules; every hand-written
`autograd.Function` and C++ function in the graph of the inner loss that does not vouch for itself. Avoided:
fused attention (exact steps take the math path). PyTorch itself raises where a built-in operation has no
second derivative. Not found: an operation that hides its dependence on the weights altogether (`.data`,
`.detach()` or NumPy in a forward), which gives a wrong first gradient too.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._functorch import config as functorch_config
from torch.autograd.function import BackwardCFunction
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgessl.config import GesslConfig, UsageError
from fastgessl.methods.base import Method

WAYS_OUT = (
    "Use --gessl.scope head if the backbone holds it, or --gessl.hypergradient first_order, or "
    "finite_difference if the activations are "
    "smooth, as GELU is (with ReLU it costs more than first_order and is not exact either)"
)


def math_attention() -> AbstractContextManager[None]:
    """Inside, attention takes the math path: the fused kernels have no second derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


def buffers_retained() -> AbstractContextManager[None]:
    """Inside, what torch.compile compiles keeps the buffers of its backward: with K = 0 the SSL loss and σ
    run back through one forward.
    """
    return functorch_config.patch(donated_buffer=False)


def check_modules(method: Method, settings: GesslConfig) -> None:
    """Raise UsageError for modules that the inner loop cannot run as gessl.md defines it."""
    backbone = set(method.backbone.modules())
    for name, module in method.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise UsageError(
                f"the method's module '{name}' is torch's SyncBatchNorm, which has no second derivative and "
                "would mix the ranks' "
                "tasks in the inner steps. Convert the method with fastgessl.models.synchronise_batch_norm."
            )
        inner = settings.scope == "all" or module not in backbone
        compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
        if second_order(settings) and inner and compiled:
            raise UsageError(
                f"the method's module '{name}' is compiled, and a compiled graph has no second derivative. "
                f"{WAYS_OUT}."
            )


def check_sharding(method: nn.Module) -> None:
    """Raise UsageError if FSDP shards parts of the method: inner forwards would run at gathered weights,
    whatever they were given.
    """
    parts = [name for name, module in method.named_modules() if isinstance(module, FSDPModule)]
    parts += [name for name, parameter in method.named_parameters() if isinstance(parameter, DTensor)]
    if parts:
        raise UsageError(
            f"the method's '{parts[0] or type(method).__name__}' is sharded (fully_shard or DTensor). An "
            "inner step calls the method at "
            "weights of its own, and a sharded module gathers its stored weights in their place: sigma and "
            "its gradient would be wrong "
            "without an error. Shard the objective as one unit, fully_shard(objective), or wrap it in "
            "DistributedDataParallel, or train "
            "with --gessl.w_sigma 0."
        )


def second_order(settings: GesslConfig) -> bool:
    """Whether the outer gradient needs second derivatives of the inner loss."""
    return settings.hypergradient == "exact" and settings.inner_steps > 0


def keeps_graph(settings: GesslConfig) -> bool:
    """Whether the inner steps stay in autograd's graph until the end; else each is made anew when the
    hypergradient reaches it.
    """
    # One step is kept in any case: anew, the peak is 2.75 x plain instead of 3.33, operations 6.04 instead of
    # 5.04 (ResNet-18, 32 pixels).
    return second_order(settings) and (settings.inner_steps == 1 or not settings.checkpoint_inner_steps)


def check_graph(loss: Tensor, inputs: Iterable[Tensor] = ()) -> None:
    """Raise UsageError for a function in the graph of `loss`, down to `inputs`, whose backward may not be
    differentiable.

    A hand-written backward that computes with plain numbers gives a wrong second-order gradient without an
    error (56 % off in one test). A class says that its backward is differentiable by `twice_differentiable =
    True`; ours are.
    """
    pending, seen = [loss.grad_fn], {tensor.grad_fn for tensor in inputs}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_foreign(node):
            raise UsageError(
                f"the inner loss goes through {node.name()}, a hand-written autograd function; nothing says "
                "that its backward can be "
                f"differentiated, so an exact hypergradient could be silently wrong. {WAYS_OUT}; or set "
                "twice_differentiable = True on "
                "the class if its backward is made of differentiable operations "
                "(torch.autograd.gradgradcheck tells)."
            )
        pending.extend(following for following, _ in node.next_functions)


def _is_foreign(node: torch.autograd.graph.Node) -> bool:
    if isinstance(node, BackwardCFunction):
        function = type(node)._forward_cls
        return not (
            function.__module__.startswith("fastgessl.") or getattr(function, "twice_differentiable", False)
        )
    return "CppNode" in node.name()
