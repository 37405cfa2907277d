"""LoraExperts: the experts of one layer of a mixture, kept as weights of three dimensions, with an adapter for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import LoraAdapter, compute_dtype
from .grouped import Groups, Stack, grouped_linear
from .host import LoraHost
from .mixture import expert_layout
from .slot import LoraSlot, Rows
from .targets import Target

__all__ = ["ExpertSlot", "LoraExperts"]

_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
"""What transformers computes experts with, all of it the same formula; ``eager`` is a loop over experts."""


class ExpertSlot(LoraSlot):
    """The place of an adapter in one expert's slice of a weight of three dimensions."""

    def part(self, tensor: Tensor) -> Tensor:
        host, expert = self.host, self.target.expert
        assert isinstance(host, LoraExperts)
        assert expert is not None
        return host.layout.slice(tensor, expert)

    def extra_repr(self) -> str:
        return f"{self.parameter}[{self.target.expert}]"


@dataclass(frozen=True)
class _Routing:
    """Which tokens the experts are given, in the order of the experts, and what becomes of their outputs.

    Attributes:
        rows: ``[routed]``: of the module's input.
        tokens: ``[routed]``: of ``source``.
        source: The input with a row for each token.
        groups: Which of the rows each expert has.
        combine: Outputs ``[routed, width]`` to what the module returns.
    """

    rows: Tensor
    tokens: Tensor
    source: Tensor
    groups: Groups
    combine: Callable[[Tensor], Tensor]


class LoraExperts(LoraHost):
    r"""The experts of one layer, each with an adapter of its own for each of its weights.

    $$
    y_t = \sum_{e\ \text{of}\ t} w_{t,e}\, D_e\, \phi(U_e x_t), \qquad
    U_e = W_e + c_e (B_e - B_{0,e}) A_e, \quad D_e \text{ likewise}
    $$

    It stands in for the module it is made of: the same parameters under the same names, its activation, its routing.
    Without adapters, and while nobody looks, the module's own forward runs. Else tokens are sorted by expert; products
    are those of ``experts_implementation``: a product per expert for ``"eager"``, in the same order, grouped ones else.

    Args:
        base: The module to take over.

    Raises:
        TypeError: ``base`` keeps no experts in a layout that is known.
        ValueError: its experts are shared out among processes, or their implementation is not transformers' own.

    Examples:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> from keeplora.lora import LoraExperts
        >>> config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
        >>> layer = LoraExperts(MixtralExperts(config))
        >>> layer.experts, layer.layout.parameters
        (4, ('gate_up_proj', 'down_proj'))
        >>> layer.plain()
        MixtralExperts(
          (act_fn): SiLUActivation()
        )
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        layout = expert_layout(base)
        if layout is None:
            raise TypeError(f"LoraExperts: base must keep experts in a known layout, got {type(base).__name__}")
        self.__dict__["base"] = base  # not as a child: its parameters and modules are this one's
        self.__dict__["_parameters"], self.__dict__["_buffers"] = base._parameters, base._buffers
        self._modules.update(base._modules)
        self.layout = layout
        self.experts = len(base.get_parameter(layout.parameters[0]))
        self._routing: _Routing | None = None
        self.check(base)
        self.train(base.training)
        self._init_host()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__:  # half made, as copies are
                raise
            return getattr(self.__dict__["base"], name)

    @staticmethod
    def check(module: Any) -> None:
        """Refuse experts that are shared out among processes, or computed by what is not known.

        Raises:
            ValueError: they are; the message says what to do.
        """
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(
                "LoraExperts: experts must all be in every process, got some that are shared out (expert parallelism). "
                "Load the model without distributed_config and tp_plan, or leave experts out of target_modules."
            )
        name = _implementation(module)
        if name not in _IMPLEMENTATIONS:
            raise ValueError(
                f"LoraExperts: experts_implementation must be one of {', '.join(_IMPLEMENTATIONS)}, got {name!r}: what "
                'it computes is not known. Call model.set_experts_implementation("eager").'
            )

    def plain(self) -> nn.Module:
        base: nn.Module = self.__dict__["base"]
        return base.train(self.training)

    def add_slot(self, slot: str, parameter: str, rows: Rows, target: Target | None = None) -> LoraSlot:
        """A new place for an adapter in the slice of ``target.expert``.

        Raises:
            ValueError: no such weight or expert, or one that has a slot.
        """
        expert = None if target is None else target.expert
        if target is None or parameter not in self.layout.parameters or rows is not None:
            raise ValueError(
                f"add_slot: parameter must be one of {self.layout.parameters}, with a target, got {parameter!r}"
            )
        if expert is None or not 0 <= expert < self.experts:
            raise ValueError(f"add_slot: expert must lie in [0, {self.experts}), got {expert} [{slot}]")
        others = self.by_parameter.get(parameter, ())
        if slot in self.slots or any(other.target.expert == expert for other, _ in others):
            raise ValueError(f"add_slot: slot must be new, got {slot!r} a second time")
        made = ExpertSlot(target, self, slot, parameter, None)
        self.slots[slot] = made
        self.by_parameter[parameter] = (*others, (made, None))
        return made

    def source(self, slot: LoraSlot, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._routing is None or slot.target.expert is None:
            return x, None
        start, stop = self._routing.groups.spans[slot.target.expert]
        return self._routing.source, self._routing.tokens[start:stop]

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """As the module's own forward; ``routing`` is the experts' indices and weights, where it is given those."""
        base: Any = self.__dict__["base"]
        if self.observer is None and self.tap is None and not self.adapters:
            base.training = self.training
            y: Tensor = base(hidden_states, *routing)
            return y
        first, last = self.layout.parameters
        with self._routed(hidden_states, *routing) as now:
            x = self._linear(hidden_states[now.rows], first, now.groups)
            x = self._linear(self._activated(x), last, now.groups)
            if self.layout.routed and base.has_post_expert_norm:
                x = self.post_expert_norm(x)
            return now.combine(x)

    # ------------------------------------------------------------------ parts of the forward

    def _activated(self, x: Tensor) -> Tensor:
        base: Any = self.__dict__["base"]
        if not self.layout.routed:
            gate, up = x.chunk(2, dim=-1)
            y: Tensor = up * base.act_fn(gate)
        else:
            y = base._apply_gate(x) if base.has_gate else base.act_fn(x)
        return y

    def _linear(self, x: Tensor, parameter: str, groups: Groups) -> Tensor:
        """Every expert's product with the rows that are its own, adapters included."""
        slots = [slot for slot, _ in self.by_parameter.get(parameter, ())]
        if self.observer is not None:
            parts = groups.split(x)
            self.observer(self, {slot.slot: parts[e] for slot in slots if len(parts[e := _expert(slot)])})
        bias = self._parameters.get(f"{parameter}_bias")
        stack = Stack(self.get_parameter(parameter), self.layout.transposed, bias)
        adapters: list[LoraAdapter | None] = [None] * self.experts
        for slot in slots:
            adapters[_expert(slot)] = slot.adapter
        # transformers' grouped products look at no autocast; its other ones do.
        own = _implementation(self.__dict__["base"]) == "grouped_mm" and self.layout.routed
        dtype = stack.weight.dtype if own else compute_dtype(stack.weight)
        y = grouped_linear(x, stack, groups, adapters, self.forward_mode, dtype)
        if self.tap is None:
            return y
        inputs, outputs = groups.split(x), groups.split(y)
        for slot in slots:
            if len(inputs[e := _expert(slot)]):
                outputs[e] = self.tap(self, inputs[e], outputs[e], {slot.slot: None})
        return torch.cat(outputs)

    @contextmanager
    def _routed(self, hidden_states: Tensor, *routing: Tensor) -> Iterator[_Routing]:
        """Which tokens go where; observers may ask for ``source`` while it is open."""
        base: Any = self.__dict__["base"]
        self.check(base)  # it may have been set since
        loops = _implementation(base) == "eager"
        chosen = self._by_router(hidden_states, *routing, loops=loops) if routing else self._by_zeros(hidden_states)
        self._routing = chosen
        try:
            yield chosen
        finally:
            self._routing = None

    def _by_router(self, x: Tensor, index: Tensor, weights: Tensor, *, loops: bool) -> _Routing:
        """Tokens of the experts that ``index [tokens, k]`` names, to be added up with ``weights [tokens, k]``."""
        tokens, k = index.shape
        ids = (index.T if loops else index).reshape(-1)
        order = torch.sort(ids, stable=True)
        rows = order.indices % tokens if loops else order.indices // k
        share = (weights.T if loops else weights).reshape(-1)[order.indices].unsqueeze(-1)

        def combine(y: Tensor) -> Tensor:
            y = y * share
            if loops:  # expert after expert, as that implementation adds them
                return torch.zeros_like(x).index_add_(0, rows, y.to(x.dtype))
            place = torch.empty_like(order.indices)
            place[order.indices] = torch.arange(len(place), device=place.device)
            return y[place].view(tokens, k, -1).sum(1).to(x.dtype)

        return _Routing(rows, rows, x, Groups.of(order.values, self.experts, loops=loops), combine)

    def _by_zeros(self, x: Tensor) -> _Routing:
        """Of ``x [experts · tokens, width]`` the rows that are not zero; zeros stay zeros."""
        tokens = len(x) // self.experts
        rows = (x != 0).any(-1).nonzero()[:, 0]

        def combine(y: Tensor) -> Tensor:
            return y.new_zeros(len(x), y.shape[1]).index_copy(0, rows, y)

        groups = Groups.of(rows // max(tokens, 1), self.experts, loops=False)
        return _Routing(rows, rows % max(tokens, 1), x[:tokens], groups, combine)


def _implementation(module: Any) -> str:
    """What the module's own forward computes experts with; Llama 4's is one batched product."""
    config = getattr(module, "config", None)
    return "grouped_mm" if config is None else getattr(config, "_experts_implementation", None) or "eager"


def _expert(slot: LoraSlot) -> int:
    assert slot.target.expert is not None
    return slot.target.expert
