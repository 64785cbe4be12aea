"""Recipes: small YAML parts that compose into a named run, and the options that change it."""

from fastgessl.recipes.compose import Recipe, backbones, describe, load, names, parts
from fastgessl.recipes.options import Parser, leading_word, override

__all__ = ["Parser", "Recipe", "backbones", "describe", "leading_word", "load", "names", "override", "parts"]
