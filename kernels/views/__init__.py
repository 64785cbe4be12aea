"""Pixels in, views out."""
