"""Backbones by name, heads, and a batch norm that spans ranks and
can be differentiated twice.
"""

from fastgessl.models.backbone import build_backbone, load_weights
from fastgessl.models.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from fastgessl.models.heads import (
    BottleneckHead,
    MoCoV3Head,
    PlainProjector,
    Projector,
    apply_head,
    at_least_float32,
    encode,
    feature_width,
)

__all__ = [
    "BottleneckHead",
    "MoCoV3Head",
    "PlainProjector",
    "Projector",
    "SynchronisedBatchNorm",
    "apply_head",
    "at_least_float32",
    "build_backbone",
    "encode",
    "feature_width",
    "load_weights",
    "synchronise_batch_norm",
]
