"""Measurements: everything that README and docs claim in numbers comes from here."""
