"""A model, data and a keeper so small that a training loop around them takes no time."""

import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig

BATCH, STEPS = 4, 6


class Classifier(nn.Module):
    """Two layers and a forward that returns the loss, as Trainer wants it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x.to(self.layers[0].weight.dtype)), labels)}


def task_data(seed):
    """Samples of a task that lies in its own half of the input space, mostly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH * STEPS, 12, generator=generator)
    x[:, 6 * (seed % 2) : 6 * (seed % 2) + 6] *= 0.1
    return [{"x": row, "labels": (row[6 - 6 * (seed % 2)] > 0).long() + 2 * (row[0] > 0).long()} for row in x]


def batches(data):
    return torch.utils.data.DataLoader(data, batch_size=BATCH)


def make_keeper(dtype=torch.float32, **options):
    config = KeepLoraConfig(
        r=2, alpha=2.0, target_modules="all-linear", depth_scale=1.0, weight_energy=0.2, feature_energy=0.6, **options
    )
    return KeepLora(Classifier(dtype), config)


def loss_fn(model, batch):
    return model(**batch)["loss"]


def assert_same(keeper, other):
    """The two have learned the same: weights, bases, and whatever adapters are open, to the last bit."""
    mine, theirs = keeper.state(), other.state()
    assert mine.meta == theirs.meta
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, tensor in mine.tensors.items():
        assert torch.equal(tensor, theirs.tensors[name]), name
