"""Backbones by name, projector and predictor heads, momentum copies, and a batch norm that spans ranks and
can be differentiated twice.
"""

from fastgessl.models.backbone import build_backbone, load_weights
from fastgessl.models.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from fastgessl.models.heads import (
    BottleneckHead,
    MoCoV3Head,
    PlainProjector,
    Predictor,
    Projector,
    apply_head,
    encode,
    feature_width,
)
from fastgessl.models.momentum import follow, momentum_copy
from fastgessl.models.shuffle import shuffled_over_ranks

__all__ = [
    "BottleneckHead",
    "MoCoV3Head",
    "PlainProjector",
    "Predictor",
    "Projector",
    "SynchronisedBatchNorm",
    "apply_head",
    "build_backbone",
    "encode",
    "feature_width",
    "follow",
    "load_weights",
    "momentum_copy",
    "shuffled_over_ranks",
    "synchronise_batch_norm",
]
