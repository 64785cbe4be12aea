"""Evaluation of frozen features: probes, k-NN, episodes, σ as a measurement, geometry. See
docs/evaluation.md.
"""

from fastgessl.evaluate.conditions import Conditions, measure_conditions
from fastgessl.evaluate.features import Features, extract_features, extract_views, raw_pixels
from fastgessl.evaluate.few_shot import FewShotResult, few_shot
from fastgessl.evaluate.geometry import (
    Geometry,
    alignment,
    crowding_ratio,
    effective_rank,
    measure_geometry,
    uniformity,
    view_retrieval,
)
from fastgessl.evaluate.gradient_probes import (
    GradientProbe,
    GradientProbeResult,
    fit_gradient_probe,
    gradient_probe,
)
from fastgessl.evaluate.knn import Neighbours, knn_classify, knn_protocols
from fastgessl.evaluate.label_fractions import FractionResult, label_fraction_probe
from fastgessl.evaluate.linear import LinearProbe, ProbeResult, few_label_probe, fit_probe, linear_probe
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.report import Report
from fastgessl.evaluate.sigma import Sigma, sigma_to_labels
from fastgessl.evaluate.suite import EvaluationData, Extracted, evaluate, held_out_test, measure, monitor
from fastgessl.evaluate.tasks import TASKS, plan_tasks, require_known_tasks

__all__ = [
    "TASKS",
    "Conditions",
    "EvaluationData",
    "Extracted",
    "Features",
    "FewShotResult",
    "FractionResult",
    "Geometry",
    "GradientProbe",
    "GradientProbeResult",
    "LinearProbe",
    "Neighbours",
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
    "few_shot",
    "fit_gradient_probe",
    "fit_probe",
    "gradient_probe",
    "held_out_test",
    "knn_classify",
    "knn_protocols",
    "label_fraction_probe",
    "linear_probe",
    "measure",
    "measure_conditions",
    "measure_geometry",
    "monitor",
    "plan_tasks",
    "raw_pixels",
    "require_known_tasks",
    "sigma_to_labels",
    "uniformity",
    "view_retrieval",
]
