import pytest
import torch

from keeplora.ops.declare import OPS, declare


@pytest.fixture
def raw_writer():
    """An op whose kernel writes behind torch's back, as a compiled kernel does."""

    def reference(x, factor):
        x.numpy()[...] *= factor

    op = declare(
        "raw_writer(Tensor(a!) x, float factor) -> ()",
        reference=reference,
        fake=lambda x, factor: None,
        samples=lambda device, dtype: [(torch.ones(3, device=device, dtype=dtype), 2.0)],
    )
    yield op
    del OPS["raw_writer"]


def test_declared_op_is_listed_and_counts_its_writes(raw_writer):
    assert OPS["raw_writer"] is raw_writer
    x = torch.ones(3)
    version = x._version
    raw_writer.call(x, 2.0)
    assert x.tolist() == [2.0, 2.0, 2.0]
    assert x._version > version

    # So autograd notices that a tensor it saved has been overwritten.
    weight, saved = torch.ones(3, requires_grad=True), torch.ones(3)
    product = weight * saved
    raw_writer.call(saved, 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
