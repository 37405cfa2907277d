"""KeepLoRA's public procedure, written from its description: what a task switch costs without this library."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


def weight_basis(weight: Tensor, energy: float) -> Tensor:
    """Leading right singular vectors from a full SVD."""
    s, vh = torch.linalg.svd(weight, full_matrices=False)[1:]
    share = s.square().cumsum(0) / s.square().sum()
    return vh[: int((share < energy).sum()) + 1].T


def mean_gradients(model: nn.Module, loader: Iterable[Any], loss_fn: Loss) -> dict[str, Tensor]:
    """Gradients of every parameter, copied to the CPU after each batch and added up there."""
    sums: dict[str, Tensor] = {}
    batches = 0
    model.eval()
    for batch in loader:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.cpu()
                sums[name] = sums[name] + gradient if name in sums else gradient.clone()
        batches += 1
    model.zero_grad()
    return {name: total / batches for name, total in sums.items()}


def directions(gradient: Tensor, basis: Tensor, rank: int) -> Tensor:
    """Rows of A: the projector formed, then torch.svd_lowrank of width 4r with 4 iterations."""
    projector = torch.eye(len(basis), device=basis.device) - basis @ basis.T
    return torch.svd_lowrank(gradient @ projector, q=4 * rank, niter=4)[2][:, :rank].T


@torch.no_grad()
def features(model: nn.Module, layers: Sequence[str], loader: Iterable[Any], forward: Loss) -> list[Tensor]:
    """Inputs of each layer ``[in, tokens of a batch]``, averaged over batches position by position."""
    sums: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        activation = x.detach().float().flatten(0, -2).T
        sums[name] = sums[name] + activation if name in sums else activation

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: keep(name, inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    batches = 0
    for batch in loader:
        forward(model, batch)
        batches += 1
    for handle in handles:
        handle.remove()
    return [sums[name] / batches for name in layers]


def extended_basis(activation: Tensor, basis: Tensor, threshold: float) -> Tensor:
    """GPM's update: one SVD for the total energy, one of what is left outside the basis."""
    total = (torch.linalg.svd(activation, full_matrices=False).S ** 2).sum()
    left = activation - basis @ (basis.T @ activation)
    u, s, _ = torch.linalg.svd(left, full_matrices=False)
    captured = (total - (s**2).sum() + (s**2).cumsum(0)) / total
    return torch.cat([basis, u[:, : int((captured < threshold).sum()) + 1]], dim=1)
