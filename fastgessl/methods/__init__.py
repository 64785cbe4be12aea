"""Self-supervised methods: one file each, registered by name."""

from fastgessl.methods import byol, simclr
from fastgessl.methods.base import Method, Outputs, RunFacts, Similarity
from fastgessl.methods.registry import METHODS, build_method, register

__all__ = ["METHODS", "Method", "Outputs", "RunFacts", "Similarity", "build_method", "byol", "register", "simclr"]
