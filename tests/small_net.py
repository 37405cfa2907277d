"""A net of two linear layers whose inputs are easily written down, and tasks for it, for tests of single methods."""

import numpy as np
import torch
from torch import nn

WIDTH, HIDDEN, CLASSES = 10, 14, 3


def net(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / WIDTH**0.5
    return model.to(dtype)


def task(seed, dtype=torch.float32, batches=3):
    """Inputs whose energy falls quickly, each task's along directions of its own."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
    mix = turn * 0.6 ** torch.arange(WIDTH, dtype=torch.float64)[:, None]
    xs = [torch.randn(24, WIDTH, generator=generator, dtype=torch.float64) @ mix for _ in range(batches)]
    return [(x.to(dtype), (x[:, :CLASSES]).argmax(1)) for x in xs]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(method, data, steps=12, lr=0.05, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(method.trainable_parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss, penalty = loss_fn(method.model, data[step % len(data)]), method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step()


def inputs(model, data):
    """What the two layers are given over a task, one row per sample, in float64."""
    x = np.concatenate([batch[0].double().numpy() for batch in data])
    weight, bias = (p.detach().double().numpy() for p in (model[0].weight, model[0].bias))
    return x, np.tanh(x @ weight.T + bias)


def projector(columns):
    columns = np.asarray(columns, dtype=np.float64)
    return columns @ columns.T


def weights(method):
    return [slot.weight.detach().double().numpy().copy() for slot in method.slots]
