"""Self-supervised methods: one file each, registered by name. Every module of this folder is imported, so
that a new file is enough.
"""

from importlib import import_module
from pkgutil import iter_modules

from fastgessl.methods.base import METHODS, Method, Outputs, RunFacts, Similarity, build_method, register
from fastgessl.methods.dsa import DSA

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["DSA", "METHODS", "Method", "Outputs", "RunFacts", "Similarity", "build_method", "register"]
