"""The toys of `smooth_toys`, under short names."""

import pytest
from smooth_toys import BI_LEVEL, LiteralObjective, gradients, toy_labels, toy_method, toy_views


class Toys:
    method, views, labels, gradients = map(staticmethod, (toy_method, toy_views, toy_labels, gradients))
    Literal, bi_level = LiteralObjective, BI_LEVEL


@pytest.fixture(scope="session")
def toys():
    return Toys
