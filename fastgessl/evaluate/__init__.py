"""Evaluation of frozen features: probes, k-NN, σ as a measurement, geometry. See docs/evaluation.md."""

from fastgessl.evaluate.features import Features, extract_features, extract_views, raw_pixels
from fastgessl.evaluate.geometry import (
    Geometry,
    alignment,
    crowding_ratio,
    effective_rank,
    measure_geometry,
    uniformity,
    view_retrieval,
)
from fastgessl.evaluate.knn import knn_classify
from fastgessl.evaluate.linear import LinearProbe, ProbeResult, few_label_probe, fit_probe, linear_probe
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.report import Report
from fastgessl.evaluate.sigma import Sigma, sigma_to_labels
from fastgessl.evaluate.suite import TASKS, EvaluationData, evaluate, held_out_test, monitor, plan_tasks, require_known_tasks

__all__ = [
    "TASKS",
    "EvaluationData",
    "Features",
    "Geometry",
    "LinearProbe",
    "OnlineProbe",
    "ProbeResult",
    "Report",
    "Sigma",
    "alignment",
    "crowding_ratio",
    "effective_rank",
    "evaluate",
    "extract_features",
    "extract_views",
    "few_label_probe",
    "fit_probe",
    "held_out_test",
    "knn_classify",
    "linear_probe",
    "measure_geometry",
    "monitor",
    "plan_tasks",
    "raw_pixels",
    "require_known_tasks",
    "sigma_to_labels",
    "uniformity",
    "view_retrieval",
]
