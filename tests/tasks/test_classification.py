"""Batches, loss and accuracy, against counting by hand and float64."""

import pickle

import pytest
import torch
from torch import nn

from keeplora.tasks.classification import Split, Task, accuracy, classification_loss, loader, normalize


class Pixels(nn.Module):
    """Reads an image's feature from its first pixels and a text's from its first tokens."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.drop = nn.Dropout(0.5)

    def encode_image(self, image, normalize=False):
        x = self.drop(image[:, 0, 0, :3])
        return nn.functional.normalize(x, dim=-1) if normalize else x

    def encode_text(self, text, normalize=False):
        x = text[:, :3].float()
        return nn.functional.normalize(x, dim=-1) if normalize else x


def make_task(n=23):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(n) % 3)
    tokens = torch.tensor([[5, 1, 0], [0, 4, 1], [1, 0, 3]])
    return Task("toy", ("a", "b", "c"), ("an a", "a b", "a c"), tokens, split, split, split)


def by_hand(task, model):
    """Float64 logits of the toy model, written without the library."""
    x = (task.test.images[:, 0, 0, :3].double() / 255 - 0.5) / 0.3
    t = task.tokens.double()
    return (x / x.norm(dim=1, keepdim=True)) @ (t / t.norm(dim=1, keepdim=True)).T * model.logit_scale.double().exp()


def test_loss_is_the_cross_entropy_of_scaled_cosines():
    task, model = make_task(), Pixels().eval()
    batch = next(iter(loader(task.test, task.tokens, 100, seed=0, shuffle=False)))
    logits = by_hand(task, model)
    exact = (logits.exp().sum(1).log() - logits[torch.arange(len(logits)), task.test.labels]).mean()
    # A dozen float32 roundings on logits of at most e^1.5.
    assert abs(classification_loss(model, batch).item() - exact.item()) < 12 * 4.5 * 2**-24 * 2


def test_accuracy_counts_and_restores_the_mode():
    task, model = make_task(), Pixels()
    right = int((by_hand(task, model).argmax(1) == task.test.labels).sum())
    model.train()
    model.drop.eval()
    assert accuracy(model, task, "test", batch_size=5) == pytest.approx(100 * right / len(task.test))
    assert model.training
    assert not model.drop.training


def test_accuracy_restores_the_mode_after_an_error():
    model = Pixels().train()
    model.encode_text = None
    with pytest.raises(TypeError):
        accuracy(model, make_task())
    assert model.training


def test_batches_cover_each_epoch_once_in_a_new_order():
    task = make_task()
    batches = loader(task.train, task.tokens, 4, seed=7)
    assert len(batches) == 6
    epochs = [torch.cat([b.images for b in batches]).flatten(1) for _ in range(3)]
    stored = sorted(map(tuple, task.train.images.flatten(1).tolist()))
    for epoch in epochs:
        assert sorted(map(tuple, epoch.tolist())) == stored
    assert not torch.equal(epochs[0], epochs[1])
    repeat = loader(task.train, task.tokens, 4, seed=7)
    assert all(torch.equal(torch.cat([b.images for b in repeat]).flatten(1), epoch) for epoch in epochs)
    other = loader(task.train, task.tokens, 4, seed=8)
    assert not torch.equal(torch.cat([b.images for b in other]).flatten(1), epochs[0])


def test_a_resumed_loader_continues_with_the_epoch():
    task = make_task()
    batches = loader(task.train, task.tokens, 4, seed=7)
    list(batches)
    resumed = loader(task.train, task.tokens, 4, seed=7)
    resumed.epoch = 1
    kept = pickle.loads(pickle.dumps(batches))
    expected = torch.cat([b.labels for b in batches])
    assert torch.equal(torch.cat([b.labels for b in resumed]), expected)
    assert torch.equal(torch.cat([b.labels for b in kept]), expected)


def test_drop_last_and_order():
    task = make_task()
    assert [len(b.labels) for b in loader(task.train, task.tokens, 5, seed=0, drop_last=True)] == [5, 5, 5, 5]
    plain = loader(task.train, task.tokens, 5, seed=0, shuffle=False)
    assert torch.equal(torch.cat([b.labels for b in plain]), task.train.labels)
    assert len(plain) == 5


def test_normalize_maps_black_and_white():
    exact = (torch.arange(256).double() / 255 - 0.5) / 0.3
    assert (normalize(torch.arange(256, dtype=torch.uint8)).double() - exact).abs().max() < 4 * 3.4 * 2**-24


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normalize(torch.zeros(3)), TypeError, "normalize: images must be uint8"),
        (lambda: Split(torch.zeros(3, 3, 4, 4), torch.zeros(3).long()), ValueError, "Split: images must be uint8"),
        (
            lambda: Split(torch.zeros(3, 3, 4, 4).byte(), torch.zeros(2).long()),
            ValueError,
            "Split: labels must be int64",
        ),
        (lambda: make_task().split("dev"), ValueError, "Task.split: name must be"),
        (lambda: loader(make_task().train, torch.zeros(3, 2).long(), 0, seed=0), ValueError, "batch_size must be"),
        (
            lambda: loader(make_task().train, torch.zeros(3, 2).long(), 50, seed=0, drop_last=True),
            ValueError,
            "at least one batch",
        ),
        (lambda: accuracy(Pixels(), make_task(), batch_size=0), ValueError, "accuracy: split must hold images"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_labels_outside_the_classes_are_refused():
    split = Split(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 0 to 3"):
        Task("toy", ("a", "b", "c"), ("a", "b", "c"), torch.zeros(3, 2).long(), split, split, split)
    with pytest.raises(ValueError, match="one row per class"):
        Task("toy", ("a", "b"), ("a",), torch.zeros(2, 2).long(), split, split, split)
