"""A method's say in the logits over classes: part of the model, asked by losses and accuracies."""

import pytest
import tiny_workload
import torch
from torch import nn

from keeplora.families.class_head import ClassHead, adjusted_logits, class_head, is_image_text_model, put_class_head
from keeplora.tasks.classification import Batch, accuracy, classification_loss


class Prefers(ClassHead):
    """Adds to the logits of one class."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted = wanted

    def adjust(self, logits, images, tokens):
        assert images.shape == (len(logits), 16)
        assert len(tokens) == logits.shape[1]
        return logits + 1e3 * nn.functional.one_hot(torch.tensor(self.wanted), logits.shape[1])


def test_without_a_head_logits_are_what_they_were():
    logits = torch.randn(2, 3)
    assert adjusted_logits(nn.Identity(), logits, torch.randn(2, 4), torch.zeros(3, 5)) is logits


def test_losses_and_accuracies_ask_the_head():
    model, task = tiny_workload.model(), tiny_workload.task(0)
    batch = Batch(task.test.images, task.test.labels, task.tokens)
    before = classification_loss(model, batch)
    put_class_head(model, Prefers(1))
    share = (task.test.labels == 1).double().mean().item()
    assert accuracy(model, task) == pytest.approx(100 * share)
    with torch.no_grad():
        assert classification_loss(model, batch) > before + 500 * (1 - share)
    put_class_head(model, None)
    assert class_head(model) is None
    assert torch.equal(classification_loss(model, batch), before)


def test_a_model_has_one_head():
    model = nn.Identity()
    put_class_head(model, ClassHead())
    with pytest.raises(RuntimeError, match="must not have a keeplora_head yet"):
        put_class_head(model, ClassHead())


def test_what_is_an_image_text_model():
    assert is_image_text_model(tiny_workload.model())
    assert not is_image_text_model(nn.Linear(2, 2))
