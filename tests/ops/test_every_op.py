"""The contract every declared op keeps. A new op is covered the moment it is declared."""

import pytest
import torch

from keeplora.ops.declare import OPS


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_registration(op, device):
    for args in op.samples(device, torch.float32):
        torch.library.opcheck(op.call, args)
