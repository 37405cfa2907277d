"""Means are over samples: however they are put into batches, and whichever process has them."""

import copy
import dataclasses
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset
from transformers import BatchEncoding

from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import linear_targets, wrap
from keeplora.methods import create
from keeplora.statistics import batch_size_of, first_batches, mean_gradients

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    scale: float
    x: torch.Tensor
    y: torch.Tensor


SETTINGS = {"r": 2, "target_modules": "all-linear", "feature_energy": 0.5}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def data(n=37):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 8, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def parts(x, y, *sizes):
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def gradients(batches, **options):
    model = net()
    return mean_gradients(model, wrap(model, linear_targets(model)), batches, loss_fn, **options)


@pytest.mark.parametrize("sizes", [(16, 16, 5), (5, 16, 16), (1, 35, 1), (7,) * 5 + (2,)], ids=str)
@pytest.mark.parametrize("kept", ["exact", "sketch", "images"])
def test_batches_of_any_size_give_the_mean_over_samples(sizes, kept):
    frames = [
        torch.linalg.qr(torch.randn(n, 4, generator=torch.Generator().manual_seed(2)).double()).Q for n in (8, 16)
    ]
    keep = {"exact": None, "sketch": [4, 2], "images": frames}[kept]
    whole, split = (gradients(batches, keep=keep) for batches in ([data()], parts(*data(), *sizes)))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_one_size_for_all_changes_no_bit():
    x, y = data(36)
    model = net().float()
    slots = wrap(model, linear_targets(model))
    batches = [(a.float(), b) for a, b in parts(x, y, 12, 12, 12)]
    got = mean_gradients(model, slots, batches, loss_fn)
    assert all(map(torch.equal, got, mean_gradients(model, slots, batches, loss_fn, batch_size=lambda _: 7)))
    assert all(map(torch.equal, got, mean_gradients(model, slots, batches, loss_fn, batch_size=lambda _: 1)))


def test_what_a_batch_is_a_mean_over_can_be_told():
    """A loss over labelled tokens: rows weigh by how many labels they have."""
    x, y = data(12)
    y[[0, 1, 2, 5]] = -100
    pairs = parts(x, y, 4, 8)
    [whole, _], [told, _], [rows, _] = (
        gradients([(x, y)]), gradients(pairs, batch_size=lambda b: (b[1] >= 0).sum()), gradients(pairs)
    )  # fmt: skip
    torch.testing.assert_close(told, whole, rtol=1e-12, atol=1e-14)
    assert (rows - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("given", [0, -1, 2.5, None, "4"])
def test_a_size_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="batch_size must return a whole number of at least 1, got"):
        gradients([data()], batch_size=lambda _: given)


@pytest.mark.parametrize("method", ["keeplora", "keeplora++", "lines"])
def test_methods_hand_it_on(method):
    settings = {"base": "keeplora", "settings": SETTINGS, "alpha": 1.0} if method == "lines" else SETTINGS
    made = create(method, net(), settings)
    seen = []
    made.before_task([data()], loss_fn, batch_size=lambda batch: seen.append(batch) or len(batch[0]))
    assert len(seen) == 1


X = torch.zeros(6, 3)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (X, 6),
        ((X[:2], X), 2),
        ([{"a": "text", "b": [X]}], 6),
        (Pair(X, X[:1]), 6),
        (Sample(2.0, X[:4], X), 4),
        (BatchEncoding({"input_ids": X[:5]}), 5),
        ({"t": torch.tensor(1.0), "none": X[:0], "x": X}, 6),
        ({"boxes": {"of": (Sample(1.0, X[:3], X),)}}, 3),
        (np.zeros((4, 2)), None),
        ("text", None),
        ([], None),
    ],
)
def test_the_first_tensor_says_how_many_samples_there_are(batch, size):
    assert batch_size_of(batch) == size


def test_batches_without_a_tensor_are_told_of_once():
    model = nn.Sequential(nn.Linear(4, 4))
    slots = wrap(model, linear_targets(model))
    rows = [np.ones((2, 4), dtype=np.float32)] * 3

    def loss(model, batch):
        return model(torch.from_numpy(batch)).square().mean()

    with pytest.warns(UserWarning, match="batch_size=") as caught:
        mean_gradients(model, slots, rows, loss)
    assert len(caught) == 1


SET = TensorDataset(torch.arange(40))


def loaders():
    yield False, DataLoader(SET, 4, shuffle=True)
    yield True, DataLoader(SET, 4)
    yield True, DataLoader(SET, batch_sampler=BatchSampler(SequentialSampler(SET), 4, drop_last=False))
    yield False, DataLoader(SET, batch_sampler=BatchSampler(torch.utils.data.RandomSampler(SET), 4, drop_last=False))
    yield True, DataLoader(SET, 4, sampler=DistributedSampler(SET, 2, 0, shuffle=False))
    yield False, DataLoader(SET, 4, sampler=DistributedSampler(SET, 2, 0))
    yield False, [1, 2, 3, 4]  # who knows


@pytest.mark.parametrize(("sequential", "loader"), loaders())
@pytest.mark.parametrize("accelerated", [False, True])
def test_the_first_part_of_data_in_order_is_no_sample(sequential, loader, accelerated, recwarn):
    if accelerated and isinstance(loader, DataLoader):
        from accelerate.data_loader import prepare_data_loader

        loader = prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)
    first_batches(loader, 0.25)
    told = [w for w in recwarn if "shuffle=True" in str(w.message)]
    assert len(told) == sequential
    recwarn.clear()
    first_batches(loader, 1.0)
    first_batches(loader, 0.99)  # rounds to all
    assert not [w for w in recwarn if "shuffle=True" in str(w.message)]


def test_it_is_said_once_though_a_sketch_takes_two_passes(recwarn):
    keeper = KeepLora(
        copy.deepcopy(net()), KeepLoraConfig(**SETTINGS | {"r": 1}, gradient_statistic="sketch", data_fraction=0.5)
    )
    keeper.before_task(DataLoader(TensorDataset(*data()), 8), loss_fn)
    assert len([w for w in recwarn if "shuffle=True" in str(w.message)]) == 1
