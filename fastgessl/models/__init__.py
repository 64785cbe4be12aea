"""Backbones by name, projector and predictor heads, momentum copies, and a batch norm that spans ranks and can be differentiated twice."""

from fastgessl.models.backbone import build_backbone
from fastgessl.models.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from fastgessl.models.encode import apply_head, encode, feature_width
from fastgessl.models.heads import Predictor, Projector
from fastgessl.models.momentum import follow, momentum_copy

__all__ = [
    "Predictor",
    "Projector",
    "SynchronisedBatchNorm",
    "apply_head",
    "build_backbone",
    "encode",
    "feature_width",
    "follow",
    "momentum_copy",
    "synchronise_batch_norm",
]
