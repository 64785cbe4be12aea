"""Softmax assignments of images to prototypes or to other images: how invariant, how spread out, how sure
they are.

The three properties that characterise an ideal representation: Dubois et al., "Improving Self-Supervised
Learning by Characterizing Idealized Representations", NeurIPS 2022, section 4.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastgessl.kernels import soft_cross_entropy
from fastgessl.kernels.prototypes import entropy_of_mean


def assignment_measures(
    first: Tensor, second: Tensor, key: Tensor, temperature: float, group: ProcessGroup | None
) -> dict[str, Tensor]:
    """Of p = softmax(rows·keyᵀ / temperature), rows (N, D) of an image's two views, key (K, D), in nats:

    maximality: H[mean p], all prototypes in use at log K; determinism: mean H[p], 0 if each image is sure of
    one; invariance: mean KL(p(view) ‖ p(other view)), 0 if both views agree.

    >>> rows = torch.eye(4)
    >>> measured = assignment_measures(rows, rows, rows, 0.05, None)
    >>> {name: round(value.item(), 4) for name, value in measured.items()}
    {'maximality': 1.3863, 'determinism': 0.0, 'invariance': 0.0}
    """
    rows, others = torch.cat([first, second]), torch.cat([second, first])
    entropy = soft_cross_entropy(rows, key, rows, key, temperature=temperature)
    crossed = soft_cross_entropy(others, key, rows, key, temperature=temperature)
    return {
        "maximality": entropy_of_mean(rows, key, temperature, group),
        "determinism": entropy,
        "invariance": crossed - entropy,
    }
