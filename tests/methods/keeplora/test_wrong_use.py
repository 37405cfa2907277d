"""Wrong use gets one sentence that says what to do, and leaves everything as it was."""

import re

import pytest
import torch
from torch import nn

import keeplora

CONFIG = keeplora.KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5)


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def data():
    return [(torch.randn(6, 8), torch.randint(3, (6,))) for _ in range(2)]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def dict_loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def as_keywords(model, batch):
    return model(**batch)


def test_target_names_that_match_nothing_offer_the_nearest():
    model = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"target_modules must name .* got 'q_prj'.* Nearest names: q_proj"):
        keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules=["q_prj"]))


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match=r"got a model without .*nn\.Linear"):
        keeplora.KeepLora(nn.Sequential(nn.Conv2d(3, 4, 3)), CONFIG)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (
            lambda m, b: m(b[0]),
            r"scalar tensor, got shape \[6, 3\] \[batch 0\]. Reduce the loss, for example with .mean",
        ),
        (lambda m, b: loss_fn(m, b).item(), r"scalar tensor, got float"),
        (lambda m, b: {"loss": loss_fn(m, b)}, r"scalar tensor, got dict"),
    ],
)
def test_a_loss_that_is_no_scalar(loss, got):
    with pytest.raises(ValueError, match=got):
        keeplora.KeepLora(net(), CONFIG).before_task(data(), loss)


@pytest.mark.parametrize(
    ("loss", "batches", "error", "note"),
    [
        (dict_loss, data(), TypeError, r"batch 0, which is a tuple of \(Tensor \[6, 8\], Tensor \[6\]\)\. Let loss_fn"),
        (as_keywords, data(), TypeError, r"a tuple of"),
        (
            loss_fn,
            [{"x": torch.randn(6, 8), "id": "a"}],
            KeyError,
            r"a dict with {'x': Tensor \[6, 8\], 'id': str}\. Let",
        ),
        (loss_fn, [torch.randn(6, 9)], RuntimeError, r"batch 0, which is Tensor \[6, 9\]\.$"),
        (loss_fn, [[(torch.zeros(1),)] * 9], RuntimeError, "a list of"),
    ],
)
def test_a_loader_that_yields_what_the_loss_does_not_read(loss, batches, error, note):
    keeper = keeplora.KeepLora(net(), CONFIG)
    with pytest.raises((error, TypeError, AttributeError)) as caught:
        keeper.before_task(batches, loss)
    [text] = caught.value.__notes__
    assert text.startswith("before_task: loss_fn(model, batch) failed on ")
    assert re.search(note, text)
    keeper.before_task(data(), loss_fn)
    with pytest.raises((error, TypeError, LookupError, AttributeError, ValueError)) as caught:
        keeper.after_task(batches, loss)
    assert caught.value.__notes__[0].startswith("after_task: loss_fn(model, batch) failed on batch 0, which is ")
    keeper.after_task(data())


def test_what_a_layer_says_needs_no_advice_about_batches():
    keeper = keeplora.KeepLora(net(), CONFIG)
    keeper.before_task(data(), loss_fn)

    def two_dimensional(model, batch):
        model[2](batch[0][:, :5])  # another width than the layer's

    with pytest.raises((ValueError, RuntimeError)) as caught:
        keeper.after_task(data(), two_dimensional)
    assert "Let loss_fn read" not in caught.value.__notes__[0]


def test_training_without_before_task():
    keeper = keeplora.KeepLora(net(), CONFIG)
    for call in (
        keeper.trainable_parameters,
        keeper.optimizer,
        lambda: keeper.confine(torch.optim.SGD(keeper.model.parameters(), lr=0.1)),
        lambda: keeper.after_task(data()),
    ):
        with pytest.raises(
            RuntimeError, match=r"a task must be open, got none. Call before_task\(loader, loss_fn\) first"
        ):
            call()


def test_after_task_twice():
    keeper = keeplora.KeepLora(net(), CONFIG)
    keeper.before_task(data(), loss_fn)
    keeper.after_task(data())
    before = keeper.state()
    with pytest.raises(RuntimeError, match="after_task: a task must"):
        keeper.after_task(data())
    after = keeper.state()
    assert before.meta == after.meta
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in before.tensors)


def test_a_generator_that_is_exhausted():
    batches = iter(data())
    keeper = keeplora.KeepLora(net(), CONFIG)
    keeper.before_task(batches, loss_fn)
    with pytest.raises(ValueError, match=r"loader must .*got none. A generator can be used once"):
        keeper.after_task(batches)
    assert keeper.training_task
    keeper.after_task(data())
    with pytest.raises(ValueError, match=r"before_task: loader must yield .* A generator can be used once"):
        keeper.before_task(batches, loss_fn)
    assert not keeper.training_task


def test_parameters_left_to_train_are_named():
    model = net()
    keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules=["0"], feature_energy=0.5))
    keeper.before_task(data(), loss_fn)
    model[2].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"after_task: 1 parameters besides .* have requires_grad, got 2\.weight"):
        keeper.after_task(data())
