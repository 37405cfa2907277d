"""Small methods that have learned something, and what must be true of one that was loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import keeplora
from keeplora.methods import create
from keeplora.methods.method import Method
from keeplora.methods.state import State

METHODS = ("keeplora", "full", "lora", "gpm", "inflora", "o-lora", "sd-lora", "loda", "dac", "duallora", "hdsd")
SETTINGS = {"target_modules": "all-linear", "r": 2, "feature_energy": 0.5, "weight_energy": 0.3}
WIDTH, CLASSES = 8, 3

Batch = tuple[Tensor, Tensor]


def pretrained() -> nn.Module:
    """Always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
        )


def task(number: int, batches: int = 3) -> list[Batch]:
    """The batches of one task."""
    draw = torch.Generator().manual_seed(number)
    return [
        (torch.randn(16, WIDTH, generator=draw), torch.randint(CLASSES, (16,), generator=draw)) for _ in range(batches)
    ]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def fresh(name: str = "keeplora") -> Method:
    """A method around the pretrained model."""
    known = {field.name for field in keeplora.METHODS[name].config.__dataclass_fields__.values()}
    return create(name, pretrained(), {key: value for key, value in SETTINGS.items() if key in known})


def learn(method: Method, number: int, *, close: bool = True) -> None:
    """One task, or what comes before its end."""
    batches = task(number)
    method.before_task(batches, loss_fn)
    optimizer = method.optimizer(lr=1e-2)
    for batch in batches:
        loss, penalty = loss_fn(method.model, batch), method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step()
        optimizer.zero_grad()
    if close:
        method.after_task(batches, loss_fn)


def learned(name: str = "keeplora", tasks: int = 1, *, open_task: bool = False) -> Method:
    """A method after some tasks, with another open if asked."""
    method = fresh(name)
    for number in range(tasks):
        learn(method, number)
    if open_task:
        learn(method, tasks, close=False)
    return method


def same(first: State, second: State) -> bool:
    """Whether two states say the same; of versions they may differ."""
    meta = [{key: value for key, value in state.meta.items() if key != "versions"} for state in (first, second)]
    return same_values(*meta) and first.tensors.keys() == second.tensors.keys() and all(
        value.dtype == second.tensors[name].dtype and torch.equal(value, second.tensors[name])
        for name, value in first.tensors.items()
    )  # fmt: skip


def same_values(first: Any, second: Any) -> bool:
    """Whether JSON would take both for the same; 1 and 1.0 are one number, 1 and true are not.

    >>> same_values({"a": [1]}, {"a": [1.0]}), same_values(1, True)
    (True, False)
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_values(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_values, first, second))
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    return bool(first == second)


def unsound(method: Method) -> str:
    """What cannot be of a method that was loaded: empty where there is nothing."""
    state = method.state()
    for name, value in state.tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return f"{name} is not finite"
        if ".basis" in name and ".adapter." not in name and value.numel():
            off = value.double().T @ value.double() - torch.eye(value.shape[1], dtype=torch.float64)
            if off.abs().max() > 1e-4:
                return f"{name} is not orthonormal"
    with torch.no_grad():
        outputs = method.model.eval()(task(99)[0][0])
    return "" if torch.isfinite(outputs).all() else "outputs are not finite"


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """All that a refused load must leave as it was."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    values = [(name, value.requires_grad, value.dtype, _bits(value)) for name, value in model.named_parameters()]
    return modules, values, [len(module._forward_hooks) for module in model.modules()]


def _bits(value: Tensor) -> float:
    total = value.detach().double().square().sum().item()
    return total if math.isfinite(total) else -1.0
