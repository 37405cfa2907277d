"""An orthogonal adapter and the residual adapters of all tasks: confined by how they are written, scaled by sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.families.class_tokens import ClassTokens
from keeplora.lora import LoraAdapter
from keeplora.math.subspace import project

__all__ = ["DualAdapter", "ResidualAdapter", "relevance"]


def relevance(x: Tensor, basis: Tensor, share: float) -> Tensor:
    r"""How much the rows of ``x`` look like a task's features: 1 as much as those do on average, 0 not at all.

    $$
    w(x) = \min\Bigl(1,\; \frac{\lVert x \Psi \rVert^2}{\rho\, \lVert x \rVert^2}\Bigr), \qquad
    \rho = \frac{\mathrm{tr}\, \Psi^\top C\, \Psi}{\mathrm{tr}\, C}
    $$

    Args:
        x: ``[samples, d]``.
        basis: ``Ψ [d, k]``, orthonormal columns.
        share: ρ > 0, the same share of the task's own features, whose second moment is C.

    Returns:
        ``[samples]``; 0 for a row of zeros.

    Examples:
        >>> relevance(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0], [0.0]]), 0.72)
        tensor([0.5000, 0.0000])
    """
    inside, whole = (x @ basis).square().sum(-1), x.square().sum(-1)
    return torch.where(whole > 0, inside / (share * whole), 0.0).clamp(max=1.0)


class ResidualAdapter(nn.Module):
    r"""One task's residual adapter $B\, (R \Psi^\top)$: its A lies in the span of Ψ whatever R is trained to.

    Args:
        r: R ``[q, k]``.
        b: B ``[out, q]``.
        basis: Ψ ``[in, k]``, the task's residual bases.
        share: As in [`relevance`][].
        new: Whether it is the open task's.
    """

    basis: Tensor

    def __init__(self, r: Tensor, b: Tensor, basis: Tensor, share: float, *, new: bool = False):
        super().__init__()
        self.new = new
        self.R, self.B = nn.Parameter(r.detach().clone()), nn.Parameter(b.detach().clone())
        self.register_buffer("basis", basis.detach().clone())
        self.share = float(share)

    def tensors(self) -> dict[str, Tensor]:
        """All that makes it again: R, B, Ψ, ρ and whether it is the open task's."""
        share = torch.tensor(self.share, dtype=torch.float64)
        return {**self.state_dict(), "share": share, "new": torch.tensor(self.new)}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> ResidualAdapter:
        """The adapter with these [`tensors`][].

        Raises:
            KeyError, ValueError: one is missing, or of another shape.
        """
        r, b, basis = tensors["R"], tensors["B"], tensors["basis"]
        if not r.dim() == b.dim() == basis.dim() == 2 or (r.shape[1], b.shape[1]) != (basis.shape[1], r.shape[0]):
            raise ValueError(f"R [q, k], B [out, q] and a basis [in, k], got {[list(t.shape) for t in (r, b, basis)]}")
        if not r.dtype == b.dtype == basis.dtype:
            raise ValueError(f"R, B and a basis of one dtype, got {[t.dtype for t in (r, b, basis)]}")
        new = bool(tensors["new"])
        return ResidualAdapter(r, b, basis, float(tensors["share"]), new=new).requires_grad_(new)

    def down(self) -> Tensor:
        """A = R Ψᵀ ``[q, in]``."""
        return self.R @ self.basis.T


class DualAdapter(LoraAdapter):
    r"""What DualLoRA adds to one weight: an orthogonal adapter, and a residual adapter for each task, scaled by sample.

    $$
    y = c\,(x A_o^\top) B_o^\top + c \sum_\tau w_\tau(x_{cls})\,(x A_\tau^\top) B_\tau^\top, \qquad
    A_o = A (I - \Phi \Phi^\top), \quad A_\tau = R_\tau \Psi_\tau^\top
    $$

    A and R are trained as they are, so gradients arrive projected, ``G_o (I − ΦΦᵀ)`` and ``G_τ Ψ_τ``, and whatever the
    optimizer makes of them, nothing leaves its subspace. The weights w take no gradient.

    Args:
        a: A ``[r, in]``; no rows between tasks.
        b: B_o ``[out, r]``.
        scaling: c.
        basis: Φ ``[in, k]``, what earlier tasks' features span.
        residuals: By task; the last one may be trained.
        tokens: Where the class tokens are.
        tower: Which of its towers the layer belongs to.
    """

    basis: Tensor

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scaling: float,
        *,
        basis: Tensor,
        residuals: list[ResidualAdapter],
        tokens: ClassTokens,
        tower: str,
    ):
        super().__init__(a, b, scaling, train_a=True)
        self.register_buffer("basis", basis.detach().clone())
        self.residuals = nn.ModuleList(residuals)
        self.tokens, self.tower = tokens, tower

    def tasks(self) -> list[ResidualAdapter]:
        """The residual adapters, in order of tasks."""
        return [task for task in self.residuals if isinstance(task, ResidualAdapter)]

    def tensors(self) -> dict[str, Tensor]:
        mine = {"A": self.A, "B": self.B, "basis": self.basis}
        for i, task in enumerate(self.tasks()):
            mine |= {f"residuals.{i}.{key}": tensor for key, tensor in task.tensors().items()}
        return mine

    def down(self) -> Tensor:
        """A_o ``[r, in]``. Two passes: one leaves 1e-6 of what training has put inside Φ."""
        return project(project(self.A, self.basis), self.basis)

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """w ``[samples, tasks]`` for a batch with these layer inputs."""
        samples = self.tokens.of(self.tower, x)
        with torch.autocast(x.device.type, enabled=False):
            parts = [relevance(samples.to(task.basis.dtype), task.basis, task.share) for task in self.tasks()]
            return torch.stack(parts, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        tasks = self.tasks()
        y = x.new_zeros(*x.shape[:-1], self.B.shape[0])
        if self.rank:
            t = F.linear(x, self.down().to(x.dtype)) * self.scaling
            y = F.linear(t, self.B.to(t.dtype))
        if tasks:
            weights = self.weights(x)
            weights = torch.cat([weights[:, i : i + 1].expand(-1, len(task.R)) for i, task in enumerate(tasks)], dim=1)
            shape = (*x.shape[:1], *(1,) * (x.dim() - 2), weights.shape[-1]) if x.dim() > 1 else weights.shape[-1:]
            t = F.linear(x, torch.cat([task.down() for task in tasks]).to(x.dtype))
            t = t * (weights.view(shape) * self.scaling).to(t.dtype)
            y = y + F.linear(t, torch.cat([task.B for task in tasks], dim=1).to(t.dtype))
        return y

    def train_parts(self, *, new: bool) -> None:
        """Let A_o and B_o be trained, where there is room for them, and the last residual adapter if it is ``new``."""
        tasks = self.tasks()
        for i, task in enumerate(tasks):
            task.requires_grad_(new and i == len(tasks) - 1)
        self.A.requires_grad_(self.rank > 0)
        self.B.requires_grad_(self.rank > 0)

    def orthogonal(self) -> LoraAdapter:
        """A plain adapter of the orthogonal part."""
        return LoraAdapter(self.down().detach(), self.B.detach(), self.scaling)
