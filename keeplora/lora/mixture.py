"""How a module keeps the experts of a mixture: weights ``[experts, out, in]``, or ``[experts, in, out]``.

Known are the modules of transformers that take their forward from ``experts_implementation``, whatever model they are
of, and Llama 4's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["ExpertLayout", "expert_layout"]


@dataclass(frozen=True)
class ExpertLayout:
    """How a module keeps its experts.

    Attributes:
        parameters: The weights a token passes, first and last: ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.
        transposed: Whether they are ``[experts, in, out]``.
        routed: Whether the forward is given what a router chose. Otherwise, as in Llama 4, every expert is given all
            tokens, those that are not its own as zeros.
    """

    parameters: tuple[str, str]
    transposed: bool
    routed: bool

    def slice(self, tensor: Tensor, expert: int) -> Tensor:
        """One expert's ``[out, in]`` of a tensor of a weight's shape: a view."""
        return tensor[expert].T if self.transposed else tensor[expert]


_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "config")
"""What transformers' ``use_experts_implementation`` sets on a module whose forward it takes over."""


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """How ``module`` keeps experts; None where it keeps none, or computes what is not known here."""
    known = module.__dict__.get("layout")
    if isinstance(known, ExpertLayout):  # it holds adapters already
        return known
    kind = type(module)
    if kind.__name__ == "Llama4TextExperts" and kind.__module__.startswith("transformers."):
        layout = ExpertLayout(("gate_up_proj", "down_proj"), transposed=True, routed=False)
    elif hasattr(kind.forward, "__wrapped__") and all(hasattr(module, name) for name in _FLAGS):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        layout = ExpertLayout((first, "down_proj"), transposed=bool(module.is_transposed), routed=True)
    else:
        return None
    weights = [module._parameters.get(name) for name in layout.parameters]
    return layout if all(weight is not None and weight.dim() == 3 for weight in weights) else None
