"""Evaluation of frozen features: probes, k-NN, episodes, σ as a measurement, geometry. See
docs/evaluation.md.
"""

from fastgessl.evaluate.features import Features, extract_features, extract_views
from fastgessl.evaluate.measure import Evaluation, EvaluationData, evaluate, measure, monitor
from fastgessl.evaluate.online import OnlineProbe
from fastgessl.evaluate.sources import held_out_test
from fastgessl.evaluate.tasks import TASKS
from fastgessl.evaluate.tasks.conditions import measure_conditions
from fastgessl.evaluate.tasks.few_shot import few_shot
from fastgessl.evaluate.tasks.geometry import (
    alignment,
    crowding_ratio,
    effective_rank,
    measure_geometry,
    uniformity,
    view_retrieval,
)
from fastgessl.evaluate.tasks.gradient_probes import (
    SgdProtocol,
    fit_gradient_probe,
    gradient_probe,
)
from fastgessl.evaluate.tasks.knn import Neighbours, knn_classify, knn_protocols
from fastgessl.evaluate.tasks.linear import (
    Probe,
    few_label_probe,
    fit_probe,
    label_fraction_probe,
    linear_probe,
    sigma_to_labels,
)

__all__ = [
    "TASKS",
    "Evaluation",
    "EvaluationData",
    "Features",
    "Neighbours",
    "OnlineProbe",
    "Probe",
    "SgdProtocol",
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
    "sigma_to_labels",
    "uniformity",
    "view_retrieval",
]
