"""Small tables on a CPU go to the dense reference by themselves: here they take the chunked path, unless a
test asks otherwise.
"""

import pytest

from fastgessl.kernels import backend


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(backend, "SMALL_TABLE", 0)
