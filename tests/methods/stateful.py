"""Models that remember something in buffers, of every kind we know, and how a method trains them."""

import torch
from torch import nn

from keeplora.methods import create
from tests.methods.contract import SMALL, WIDTH, Net, scores


class OwnNorm(nn.Module):
    """A normalisation layer that is not torch's, as model zoos have them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x):
        var = x.var(0, unbiased=False) if self.training else self.running_var
        if self.training:
            self.running_var.lerp_(var.detach(), 0.1)
        return x / (var + 1e-5).sqrt()


class InstanceNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(WIDTH, track_running_stats=True)

    def forward(self, x):
        return self.norm(x[..., None].expand(-1, -1, 2) * torch.tensor([1.0, 2.0]))[..., 0]


class Codebook(nn.Module):
    """Vector quantisation with a codebook that follows its inputs, through .data as the common package does it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, WIDTH))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x):
        near = torch.cdist(x.detach(), self.codes).argmin(1)
        if self.training:
            self.codes.data.index_add_(0, near, 0.1 * x.detach())
            self.initialised.fill_(True)
        return x + self.codes[near]


class Average(nn.Module):
    """An average of its inputs that is set anew in every forward, and subtracted."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Written(nn.Module):
    """A buffer that somebody else's forward writes to: found only when it has happened."""

    def __init__(self):
        super().__init__()
        self.queue = nn.Module()
        self.queue.register_buffer("rows", torch.zeros(WIDTH))

    def forward(self, x):
        if self.training:
            self.queue.rows += x.detach().mean(0)
        return x + self.queue.rows


KINDS = {
    "BatchNorm": lambda: nn.BatchNorm1d(WIDTH),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(WIDTH),  # which trains on GPUs alone
    "InstanceNorm": InstanceNorm,
    "a norm of one's own": OwnNorm,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm, older": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "codebook": Codebook,
    "average": Average,
}


class Stateful(Net):
    """Two towers and a layer that remembers something, behind a dropout."""

    def __init__(self, layer):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), layer

    def forward(self, x):
        return self.layer(self.drop(super().forward(x)))


TARGETS = "attn", "head"


def loss_fn(model, batch):
    return nn.functional.cross_entropy(scores(model, batch[0]), batch[1])


def settings(name, **more):
    own = {**SMALL.get(name, {}), **more}
    return {**own, "settings": {**own["settings"], "target_modules": TARGETS}} if name == "lines" else own


def stateful(kind, name="keeplora", **more):
    torch.manual_seed(0)
    own = settings(name, **more)
    return create(name, Stateful(KINDS[kind]() if isinstance(kind, str) else kind), own)


def train(method, data, lr=0.05):
    parameters = method.trainable_parameters() if method.trains else []
    optimizer = torch.optim.SGD(parameters, lr=lr) if parameters else None
    method.model.train()
    for batch in data:
        loss_fn(method.model, batch).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()


def buffers(method):
    return {n: b.clone() for n, b in method.model.named_buffers() if n.startswith("layer.")}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
