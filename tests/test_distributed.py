"""Which ranks a collective spans; with several processes see tests/objective/test_ranks.py and
tests/models/test_batch_norm.py.
"""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastgessl.distributed import rank_local, world_group, world_size


def test_one_process_spans_itself():
    assert (world_size(), world_group()) == (1, None)


@pytest.fixture
def four_ranks():
    """A process group of four whose collectives send nothing: this process is its rank 1."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def test_inside_rank_local_a_rank_is_alone_even_if_left_by_an_error(four_ranks):
    assert (world_size(), world_group()) == (4, dist.group.WORLD)
    with pytest.raises(KeyError), rank_local():
        with rank_local():
            assert (world_size(), world_group()) == (1, None)
        assert world_size() == 1
        raise KeyError
    assert world_size() == 4
