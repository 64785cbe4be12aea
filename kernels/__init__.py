"""Contrastive and distillation losses of self-supervised learning: no similarity table is stored, and all are
twice differentiable.

>>> import torch
>>> from fastgessl.kernels import nt_xent
>>> view1, view2 = torch.randn(2, 8, 16, requires_grad=True)
>>> nt_xent(view1, view2, temperature=0.5).backward()
"""

if __name__ != "fastgessl.kernels":
    raise ImportError(
        f"this package is fastgessl.kernels, but was imported as {__name__!r}, which would load it twice. "
        "Write `import fastgessl.kernels`."
    )

from fastgessl.kernels.backend import implementation_for
from fastgessl.kernels.losses import (
    clip_loss,
    gessl_loss,
    info_nce,
    nt_xent,
    sigma_kl,
    similarity_logsumexp,
    soft_cross_entropy,
)
from fastgessl.kernels.modules import (
    ClipLoss,
    DINOLoss,
    DISSLLoss,
    NTXentLoss,
    SigmaLoss,
    SupConLoss,
    SwaVLoss,
)
from fastgessl.kernels.prototypes import (
    dissl_loss,
    sinkhorn_potentials,
    softmax_marginal,
    swapped_cross_entropy,
)
from fastgessl.kernels.views.parameters import ViewParameters
from fastgessl.kernels.views.torch import augment_views, color_views

__all__ = [
    "ClipLoss",
    "DINOLoss",
    "DISSLLoss",
    "NTXentLoss",
    "SigmaLoss",
    "SupConLoss",
    "SwaVLoss",
    "ViewParameters",
    "augment_views",
    "clip_loss",
    "color_views",
    "dissl_loss",
    "gessl_loss",
    "implementation_for",
    "info_nce",
    "nt_xent",
    "sigma_kl",
    "similarity_logsumexp",
    "sinkhorn_potentials",
    "soft_cross_entropy",
    "softmax_marginal",
    "swapped_cross_entropy",
]
