"""What is measured of a run is that run's."""

import sys

import pytest
import torch

from keeplora.train.measure import peak_bytes, reset_peak


@pytest.mark.skipif(sys.platform != "linux", reason="the mark that is reset is Linux's")
def test_memory_that_was_freed_before_does_not_count():
    reset_peak("cpu")
    before = peak_bytes("cpu")
    held = [torch.ones(2**14) for _ in range(8000)]  # 0.5 GB in pieces that glibc keeps when they are freed
    top = torch.ones(2**14)
    assert peak_bytes("cpu") > before + 4e8
    del held
    reset_peak("cpu")
    assert peak_bytes("cpu") < before + 1e8
    assert float(top.sum()) == 2**14
