"""Backbones by name, projector and predictor heads, and the batch norm that spans ranks and can be differentiated twice."""

from fastgessl.models.backbone import build_backbone
from fastgessl.models.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from fastgessl.models.encode import apply_head, encode, feature_width
from fastgessl.models.heads import Predictor, Projector

__all__ = [
    "Predictor",
    "Projector",
    "SynchronisedBatchNorm",
    "apply_head",
    "build_backbone",
    "encode",
    "feature_width",
    "synchronise_batch_norm",
]
