import torch

from keeplora.math import batch
from keeplora.math.batch import padded, same_kind, stacked


def test_groups_cover_every_layer_once_and_never_mix():
    tensors = [torch.empty(n, 2, device="meta") for n in (3, 4, 3, 3, 4)]
    groups = list(same_kind([t.shape for t in tensors], tensors))
    assert groups == [[0, 2, 3], [1, 4]]
    on_cpu = [torch.empty(3, 2)] * 3
    assert list(same_kind([0, 0, 0], on_cpu)) == [[0], [1], [2]]


def test_groups_stay_within_memory(monkeypatch):
    monkeypatch.setattr(batch, "BATCH_BYTES", 8 * 6 * 2)
    tensors = [torch.empty(3, 2, device="meta")] * 5
    assert list(same_kind([0] * 5, tensors)) == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr(batch, "LARGEST_BATCHED", 5)
    assert list(same_kind([0] * 5, tensors)) == [[0], [1], [2], [3], [4]]


def test_stacking_and_padding():
    tensors = [torch.randn(4, 1), torch.randn(4, 3)]
    filled = padded(tensors, [0, 1])
    assert filled.shape == (2, 4, 3)
    assert torch.equal(filled[0, :, :1], tensors[0])
    assert not filled[0, :, 1:].any()
    assert stacked(tensors, [1]).data_ptr() == tensors[1].data_ptr()
    assert torch.equal(stacked([tensors[1]] * 2, [0, 1])[1], tensors[1])
