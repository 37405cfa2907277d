"""A pool of rank-1 experts in the place of an adapter, of which a router activates some for each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keeplora.families.class_tokens import ClassTokens
from keeplora.lora import LoraAdapter
from keeplora.lora.adapter import compute_dtype

__all__ = ["ExpertPool", "ago_loss", "most_used", "votes"]


class ExpertPool(LoraAdapter):
    r"""Rank-1 experts $b_i a_i^\top$ of one weight; the router reads the samples' class tokens.

    $$
    \Delta W = c \sum_i g_i\, b_i a_i^\top, \quad p(x) = \mathrm{softmax}(R\, x_{cls} + r), \quad
    g_i = m_i + \bar p_i - \mathrm{sg}(\bar p_i)
    $$

    m marks the experts that get the most votes of the batch, where each sample votes for the k it finds likeliest;
    $\bar p$ is the mean of p over the batch, sg stops gradients. So g is 0 or 1, and its gradient reaches the
    router of every expert (a straight-through estimator). ``counts`` adds up the votes while the layer is trained.

    Args:
        a: ``[experts, in]``.
        b: ``[out, experts]``. Both trained.
        router: ``[experts, in]``, the router's first weight; its bias starts at 0.
        scaling: c.
        active: k, at most the number of experts.
        dropout: Of the experts' inputs in training.
        tokens: Where the class tokens are.
        tower: Which of its towers the layer belongs to.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        router: Tensor,
        scaling: float,
        *,
        active: int,
        tokens: ClassTokens,
        tower: str,
        dropout: float = 0.0,
    ):
        super().__init__(a, b, scaling, train_a=True, dropout=dropout)
        self.router = nn.Parameter(router.detach().clone())
        self.router_bias = nn.Parameter(router.new_zeros(len(router)))
        self.counts = torch.zeros(len(router), dtype=torch.int64)  # no buffer: DistributedDataParallel would share it
        self.active, self.tokens, self.tower = active, tokens, tower

    def tensors(self) -> dict[str, Tensor]:
        """With the votes so far."""
        return {**super().tensors(), "counts": self.counts}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The router's bias and the votes, where they are among the ``tensors`` of a pool that was saved.

        Raises:
            ValueError: they, or the router, are not those of as many experts.
        """
        experts = len(self.A)
        for name, mine in (("router", self.router), ("router_bias", self.router_bias), ("counts", self.counts)):
            theirs = tensors.get(name, mine)
            shape = [experts, self.A.shape[1]] if name == "router" else [experts]
            if list(theirs.shape) != shape:
                raise ValueError(f"{name} of shape {shape}, got {list(theirs.shape)}")
        if "router_bias" in tensors:
            self.router_bias.copy_(tensors["router_bias"])
        if "counts" in tensors:
            self.counts = tensors["counts"].to(torch.int64, copy=True)

    def plain(self) -> LoraAdapter:
        raise RuntimeError(
            "export_peft: the open task must be closed first, got a pool of experts whose choice depends on the batch. "
            "Call after_task(loader)."
        )

    def gates(self, x: Tensor) -> Tensor:
        """g ``[experts]`` for the batch with these layer inputs."""
        samples = self.tokens.of(self.tower, x.detach()).to(self.router.dtype)
        with torch.autocast(x.device.type, enabled=False):
            likely = F.linear(samples, self.router, self.router_bias).softmax(-1)
        count = votes(likely.detach(), self.active)
        if self.training and torch.is_grad_enabled():
            self.counts = self.counts.to(count.device) + count
        chosen = likely.new_zeros(likely.shape[1]).index_fill_(0, most_used(count, self.active), 1.0)
        mean = likely.mean(0)
        return chosen + mean - mean.detach()

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        x = x.to(compute_dtype(x))  # autocast would reuse its own copy of A after the next step
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        t = F.linear(x, self.A.to(x.dtype))
        t = t * (gates * self.scaling).to(t.dtype)
        return F.linear(t, self.B.to(t.dtype))

    def strongest(self, count: int) -> LoraAdapter:
        """A plain adapter of the ``count`` experts with the most votes so far."""
        kept = most_used(self.counts, count).to(self.A.device)
        return LoraAdapter(self.A.detach()[kept], self.B.detach()[:, kept], self.scaling)


def votes(likely: Tensor, k: int) -> Tensor:
    """How many samples have each expert among their ``k`` likeliest: ``[samples, experts]`` → int64 ``[experts]``.

    Examples:
        >>> votes(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]), 2)
        tensor([1, 2, 1])
    """
    chosen = likely.topk(k, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=likely.shape[-1])


def most_used(counts: Tensor, k: int) -> Tensor:
    """The ``k`` experts with the largest counts, in their own order; of equals the first.

    Examples:
        >>> most_used(torch.tensor([3, 5, 3, 0]), 2)
        tensor([0, 1])
    """
    return counts.sort(descending=True, stable=True).indices[:k].sort().values


def ago_loss(past: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    r"""Activation-guided orthogonality: how much new experts of a weight write where critical past ones do.

    $$ \frac1L \sum_{l=1}^{L} \sum_{i=1}^{m} \sum_{j=1}^{n} | b_{past,i}^\top b_{new,j} | $$

    Args:
        past: ``[out_l, m_l]`` each, the past experts' B; no gradient.
        new: ``[out_l, n_l]`` each.

    Returns:
        A scalar; the mean over the L weights that have past experts.

    Raises:
        ValueError: no weight has any, or the numbers of weights differ.

    Source: DAC, arXiv:2601.22828; the sum over pairs, which makes past tasks count more the more there are, is that of
    its public code.

    Examples:
        >>> past, new = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [-1.0]])
        >>> ago_loss([past], [new])
        tensor(5.)
    """
    if len(past) != len(new):
        raise ValueError(f"ago_loss: past and new must be as many, got {len(past)} and {len(new)}")
    terms = [(p.to(n.dtype).T @ n).abs().sum() for p, n in zip(past, new, strict=True) if p.numel() and n.numel()]
    if not terms:
        raise ValueError("ago_loss: past must hold an expert of some weight, got none. Leave the loss out.")
    return torch.stack(terms).mean()
