"""Recipes: small YAML parts that compose into a named run."""

from fastgessl.recipes.compose import Recipe, backbones, describe, dotted_keys, load, names, parts

__all__ = ["Recipe", "backbones", "describe", "dotted_keys", "load", "names", "parts"]
