"""Defaults are run as defaults: at one learning rate every method learns a first task nearly as well as LoRA does."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from keeplora.families.class_head import adjusted_logits
from keeplora.methods import METHODS, create

WIDTH, CLASSES, STEPS, RATE = 32, 4, 60, 1e-2
RATES = {"gpm": 0.3}  # it takes SGD, whose steps follow the gradient's size
NO_DEFAULT = {"zero-shot": "learns nothing", "lines": "is a setting of another method, and asks for validation data"}


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Net(nn.Module):
    """Images are six tokens, a text is a word."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.words, self.head = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, image, normalize=False):
        features = self.blocks(image).mean(1)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text, normalize=False):
        features = self.head(self.words(text[:, 0]))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def forward(self, image):
        return self.encode_image(image)


def scores(model, images):
    tokens = torch.arange(CLASSES)[:, None]
    features, texts = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    return adjusted_logits(model, model.logit_scale.exp() * features @ texts.T, features, tokens)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(scores(model, batch.images), batch.labels)


def batches(count):
    """Every class is a direction, which one token of an image has in it, among noise."""
    generator = torch.Generator().manual_seed(1)
    directions = 1.5 * torch.randn(CLASSES, WIDTH, generator=generator)
    for _ in range(count):
        labels = torch.randint(CLASSES, (32,), generator=generator)
        images = torch.randn(32, 6, WIDTH, generator=generator)
        images[:, 0] += directions[labels]
        yield Batch(images, labels)


@cache
def accuracy(name):
    """Of a method at its defaults after one task, on data it has not seen."""
    torch.manual_seed(0)
    model, data = Net(), [*batches(16)]
    train, test = data[:8], data[8:]
    method = create(name, model)
    method.before_task(train, loss_fn)
    optimizer = method.optimizer(lr=RATES.get(name, RATE))
    model.train()
    for step in range(STEPS):
        loss, penalty = loss_fn(model, train[step % len(train)]), method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    method.after_task(train)
    model.eval()
    with torch.no_grad():
        right = [(scores(model, b.images).argmax(1) == b.labels).float().mean() for b in test]
    return float(torch.stack(right).mean())


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(NO_DEFAULT)))
def test_defaults_learn_nearly_what_lora_learns(name):
    assert accuracy("lora") > 0.9
    assert accuracy(name) > accuracy("lora") - 0.1
