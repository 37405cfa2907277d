"""What the contract of all methods is tried on: a small model of two towers, tasks for it, and how they are learned."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from keeplora.families.class_head import adjusted_logits
from keeplora.methods import create

WIDTH = 8


SMALL = {
    "lora": {"r": 2},
    "gpm": {"feature_energy": 0.5},
    "inflora": {"r": 2, "alpha": 2.0, "feature_energy": 0.5, "tasks": 40},
    "o-lora": {"r": 2, "alpha": 2.0, "decay": 0.01},
    "sd-lora": {"r": 2, "alpha": 2.0},
    "loda": {"r": 2},
    "lines": {"base": "lora", "settings": {"r": 2}, "alpha": 0.5},
    "keeplora": {"r": 2, "weight_energy": 0.1, "feature_energy": 0.3},
    "keeplora++": {"r": 2, "weight_energy": 0.1, "feature_energy": 0.3},
    "keeplora++cls": {"r": 2, "weight_energy": 0.1, "feature_energy": 0.3},
    "dac": {"r": 3, "dropout": 0.0},  # which draws from the global generator
    "duallora": {"r": 2, "feature_energy": 0.5},
    "hdsd": {"r": 2},
    "mica": {"r": 2},
    "corda": {"r": 2},
    "lora-ga": {"r": 2},
    "eva": {"r": 2},
}


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


class Net(nn.Module):
    """Two towers, since some methods work on image features; an "image" is a sequence, a text one of three words."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.words = nn.Embedding(3, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0].mean(1)

    def encode_image(self, image, normalize=False):
        features = self(image)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text, normalize=False):
        features = self.head(self.words(text[:, 0]))
        return nn.functional.normalize(features, dim=-1) if normalize else features


def scores(model, x, classes=3):
    """Logits with the say of the method's head, if it has one."""
    tokens = torch.arange(classes)[:, None]
    images, texts = model.encode_image(x, normalize=True), model.encode_text(tokens, normalize=True)
    return adjusted_logits(model, model.logit_scale.exp() * images @ texts.T, images, tokens)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(scores(model, batch[0]), batch[1])


def one_class_loss(model, batch):
    logits = scores(model, batch[0], classes=1)
    return nn.functional.cross_entropy(logits, batch[1]) - 0.01 * logits.mean()  # one class alone has no gradient


def task(seed):
    g = torch.Generator().manual_seed(seed)
    return [Batch(torch.randn(8, 4, WIDTH, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(3)]


def learn(method, data, steps=4, loss_fn=loss_fn):
    torch.manual_seed(5)  # of dropout
    method.before_task(data, loss_fn)
    parameters = method.trainable_parameters()
    if method.trains:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(method.model, data[step % len(data)])
            penalty = method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            method.after_step()
    return method.after_task(data)


def one_rank(name):
    """The settings of SMALL with rank 1 where there is a rank."""
    settings = dict(SMALL.get(name, {}))
    if "settings" in settings:
        return {**settings, "settings": {**settings["settings"], "r": 1}}
    return {**settings, **({"r": 1} if "r" in settings else {})}


def make(name, model=None):
    return create(name, model or Net(), SMALL.get(name))


def steps(method, optimizer, data, count):
    torch.manual_seed(5)  # of dropout
    for step in range(count):
        optimizer.zero_grad()
        loss = loss_fn(method.model, data[step % len(data)])
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step()


def opened(name, start, tasks):
    """A method that has learned some tasks, and is in the middle of one more; with its optimizer."""
    method = make(name, copy.deepcopy(start))
    for seed in range(tasks):
        learn(method, task(seed))
    method.before_task(task(tasks), loss_fn)
    optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=1e-2) if method.trains else None
    if optimizer:
        steps(method, optimizer, task(tasks), 3)
    return method, optimizer


@torch.no_grad()
def outputs(method, x):
    """In evaluation, and as whoever scores classes sees them."""
    modes = {module: module.training for module in method.model.modules()}
    method.model.eval()
    found = method.model(x), scores(method.model, x)
    for module, training in modes.items():
        module.training = training
    return found


def agree(one, other, x):
    return same(one.state(), other.state()) and all(map(torch.equal, outputs(one, x), outputs(other, x)))


def same(one, other):
    return one.meta == other.meta and all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)


class Breaking:
    """A task's batches, until the data is gone."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        yield from self.data[:-1]
        raise OSError("the data is gone")


LOOKS_BEFORE = {
    "inflora", "loda", "keeplora", "keeplora++", "keeplora++cls", "duallora", "corda", "lora-ga", "eva",
}  # fmt: skip


LOOKS_AFTER = {"gpm", "inflora", "loda", "keeplora", "keeplora++", "keeplora++cls", "duallora", "corda"}
