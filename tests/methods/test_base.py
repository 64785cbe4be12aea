import pytest
from torch import nn

from fastgessl.config import MethodConfig, UsageError
from fastgessl.methods import METHODS, Method, RunFacts, build_method, register


def test_every_registered_method_is_built_by_its_name():
    for name, method in METHODS.items():
        backbone = nn.Flatten()
        backbone.num_features = 12
        assert type(build_method(MethodConfig(name=name), backbone, RunFacts(classes=3))) is method


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"'simclrr' is no method that is known. Perhaps you meant simclr"):
        build_method(MethodConfig(name="simclrr"), nn.Flatten(), RunFacts())
    with pytest.raises(UsageError, match=" or ".join(sorted(METHODS))):
        build_method(MethodConfig(name="qqq"), nn.Flatten(), RunFacts())


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="registered already, by SimCLR"):
        register("simclr")(Method)
    assert METHODS["simclr"].__name__ == "SimCLR"
