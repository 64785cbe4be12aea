"""Blocks are as large as a device likes them, and no smaller than a matmul wants."""

import pytest
import torch

from fastgessl.kernels.similarity import row_blocks


@pytest.mark.parametrize("device, logits", [("cpu", 1 << 18), ("cuda", 1 << 24)])
def test_a_block_has_as_many_rows_as_its_logits_allow_on_the_device_and_at_least_128(device, logits):
    for columns in (1, 96, 1024, 1 << 14, 1 << 17, 1 << 20):
        rows = row_blocks.rows_of_block(columns, torch.device(device))
        assert rows == 128 if columns > logits // 128 else rows * columns <= logits < (rows + 1) * columns


def test_a_gpu_takes_a_table_in_one_block_that_a_cpu_takes_in_many():
    query, key = torch.empty(4096, 8), torch.empty(4096, 8)
    assert [(rows.start, rows.stop) for rows in row_blocks.row_blocks(query.to("meta"), key.to("meta"))] == [
        (0, 4096)
    ]
    assert [rows.stop for rows in row_blocks.row_blocks(query, key)] == list(range(128, 4097, 128))
