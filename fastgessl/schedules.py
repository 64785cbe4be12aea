"""What changes over a run, as arrays indexed by optimiser step: resuming and plotting come for free."""

import numpy as np


def scaled_learning_rate(base: float, batch_size: int, scaling: str) -> float:
    """Peak learning rate for `batch_size` images per optimizer step: base x batch_size / 256 where `scaling`
    is "linear" (Goyal et al. 2017), else `base` itself.

    >>> scaled_learning_rate(0.1, 512, "linear")
    0.2
    """
    return base * batch_size / 256 if scaling == "linear" else base


def learning_rate(
    peak: float, total_steps: int, *, warmup_steps: int = 0, shape: str = "cosine", end: float = 0.0
) -> np.ndarray:
    """Linear warm-up from peak / warmup_steps to `peak`, then half a cosine to `end` x peak, or constant:
    (total_steps,) float64.

    A warm-up longer than the run fills all of it.  Loshchilov and Hutter, "SGDR", ICLR 2017, eq. (5), without
    restarts.

    >>> learning_rate(1.0, 5, warmup_steps=2).round(3).tolist()
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup_steps = min(warmup_steps, total_steps)
    warmup = peak * np.arange(1, warmup_steps + 1) / max(warmup_steps, 1)
    rest = total_steps - warmup_steps
    if shape == "constant":
        return np.concatenate([warmup, np.full(rest, peak)])
    progress = np.arange(rest) / max(rest - 1, 1)
    return np.concatenate([warmup, peak * (end + (1 - end) * (1 + np.cos(np.pi * progress)) / 2)])


def half_cosine(start: float, end: float, total_steps: int) -> np.ndarray:
    """From `start` to `end` along half a cosine: (total_steps,) float64. A momentum encoder's momentum, and
    DINO's weight decay.

    Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, section 3.2: tau_k = 1 - (1 - tau_0)(cos(pi k /
    K) + 1) / 2.

    >>> half_cosine(0.99, 1.0, 3).round(4).tolist()
    [0.99, 0.9925, 0.9975]
    """
    progress = np.arange(total_steps) / max(total_steps, 1)
    return end - (end - start) * (np.cos(np.pi * progress) + 1) / 2


def linear_warmup(start: float, end: float, total_steps: int, *, warmup_steps: int) -> np.ndarray:
    """A straight line from `start` to `end` over `warmup_steps` steps, then `end`: (total_steps,) float64.
    DINO's teacher temperature.

    >>> linear_warmup(0.04, 0.07, 5, warmup_steps=3).round(3).tolist()
    [0.04, 0.05, 0.06, 0.07, 0.07]
    """
    return (
        start + (end - start) * np.minimum(np.arange(total_steps) / warmup_steps, 1)
        if warmup_steps
        else np.full(total_steps, end)
    )


def inner_learning_rate(inner_lr: float, outer: np.ndarray, *, shape: str) -> np.ndarray:
    """GeSSL's alpha of every step beside the `outer` learning rates (total_steps,): (total_steps,) float64.

    "constant": `inner_lr`; "cosine": inner_lr (cos(pi k / K) + 1) / 2, above 0 at the last step too, where
    alpha = 0 would measure nothing; "times_lr": `inner_lr` times the outer rate.

    >>> inner_learning_rate(0.1, np.array([0.5, 1.0, 0.2]), shape="times_lr").round(3).tolist()
    [0.05, 0.1, 0.02]
    """
    if shape == "times_lr":
        return inner_lr * outer
    progress = np.arange(len(outer)) / max(len(outer), 1) if shape == "cosine" else np.zeros(len(outer))
    return inner_lr * (np.cos(np.pi * progress) + 1) / 2
