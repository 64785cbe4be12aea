"""Self-supervised methods: one file each, registered by name. Every module of this folder is imported, so
that a new file is enough.
"""

from importlib import import_module
from pkgutil import iter_modules

from fastgessl.methods.base import Method, Outputs, RunFacts, Similarity
from fastgessl.methods.dsa import DSA
from fastgessl.methods.registry import METHODS, build_method, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["DSA", "METHODS", "Method", "Outputs", "RunFacts", "Similarity", "build_method", "register"]
