"""The bi-level objective: inner steps on a task, a self-motivated target, σ-measurement, and one loss for
anyone's training loop.
"""

from fastgessl.objective.gessl import GeSSL, Result
from fastgessl.objective.sigma import measure_sigma
from fastgessl.objective.task import Task

__all__ = ["GeSSL", "Result", "Task", "measure_sigma"]
