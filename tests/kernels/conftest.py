"""Small tables on a CPU go to the dense reference by themselves: here they take the chunked path, unless a
test asks otherwise.
"""

import pytest

from fastgessl.kernels import backend as dispatch


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL_TABLE", 0)
