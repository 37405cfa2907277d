"""Optimizers that keep parameters out of protected subspaces: an AdamW, and hooks for any other optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from keeplora.ops.check import MASTER
from keeplora.ops.declare import OPS
from keeplora.ops.projected_adamw import checked_arguments

__all__ = ["Confinement", "ProjectedAdamW", "confine", "unwrapped"]

# The ops without their checks of arguments, which take longer than all else that a step asks of the host.
_projected_adamw, _project_rows = OPS["projected_adamw"].call, OPS["project_rows"].call

Bases = Mapping[nn.Parameter, Tensor]
"""Orthonormal columns ``Q [in, k]`` for parameters ``[r, in]``, which are to keep ``A Q = 0``."""


class ProjectedAdamW(Optimizer):
    r"""AdamW, and parameters with a basis stay orthogonal to it.

    $$ g \leftarrow gP, \quad A \leftarrow \mathrm{AdamW}(A, g), \quad A \leftarrow AP, \qquad P = I - QQ^T $$

    Projecting the gradient alone would not do: Adam rescales element by element and leaves the subspace. On a GPU all
    parameters with a basis are stepped in one launch. Parameters without one are stepped by torch's own AdamW.

    Args:
        params: Parameters, or groups of them with options of their own, as for any optimizer.
        lr: As in ``torch.optim.AdamW``, but a number. A captured CUDA graph keeps what it was.
        betas: As in ``torch.optim.AdamW``.
        eps: As in ``torch.optim.AdamW``.
        weight_decay: As in ``torch.optim.AdamW``.
        bases: ``Q [in, k]`` with orthonormal columns by parameter ``A [r, in]``, with its dtype (float32 or float64)
            and device. They are no part of ``state_dict()``: whoever makes the optimizer gives them.
        capturable: Count steps on the device, so that a captured CUDA graph advances.
        fused: Step the parameters without a basis in one launch, too. Counts on the device as well.

    Raises:
        TypeError, ValueError: a hyperparameter is out of range, a parameter is complex, or a basis does not fit.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, alg. 2, with the projections of
    Saha et al., "Gradient Projection Memory", ICLR 2021.

    Examples:
        >>> a, q = nn.Parameter(torch.tensor([[0.0, 1.0]])), torch.tensor([[1.0], [0.0]])
        >>> optimizer = ProjectedAdamW([a], lr=0.1, weight_decay=0.0, bases={a: q})
        >>> a.sum().backward()
        >>> optimizer.step()
        >>> a.detach()
        tensor([[0.0000, 0.9000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bases: Bases | None = None,
        capturable: bool = False,
        fused: bool = False,
    ):
        self._bases: dict[nn.Parameter, Tensor] = {}
        # By what parameters are stepped together with: the tensors whose shapes, dtypes and strides have been checked.
        self._checked: dict[Any, tuple[list[int], list[Tensor]]] = {}
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "capturable": capturable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._confine(bases or {})

    def add_param_group(self, param_group: dict[str, Any], bases: Bases | None = None) -> None:
        """Step more parameters, with options of their own; ``bases`` as in the constructor."""
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
            self._confine(bases or {})
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _confine(self, bases: Bases) -> None:
        _check_known("ProjectedAdamW", bases, self)
        for parameter, basis in bases.items():
            _check_basis("ProjectedAdamW", parameter, basis)
        self._bases |= {parameter: basis.detach() for parameter, basis in bases.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned here.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph is being captured and ``capturable`` is not set.
            ValueError, TypeError: a group's lr, betas, eps or weight_decay is out of range by now, or a state does not
                fit its parameter.
                Nothing has been changed in any of these cases, but for parameters without a basis in the last.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for group, _ in groups:
            _check_numbers(group)  # a schedule or a user may have set others
        self._check_gradients(groups)
        confined: dict[Any, list[tuple[nn.Parameter, float]]] = {}
        for group, parameters in groups:
            self._start(parameters, group)
            self._step_free([p for p in parameters if p not in self._bases], group)
            rule = tuple(group["betas"]), group["eps"], group["weight_decay"]
            for p in parameters:
                if p in self._bases:
                    confined.setdefault((p.device, p.dtype, *rule), []).append((p, group["lr"]))
        for key, members in confined.items():
            *_, betas, eps, decay = key
            parameters, rates = [p for p, _ in members], [lr for _, lr in members]
            bases, (steps, averages, squares) = [self._bases[p] for p in parameters], self._states(parameters)
            gradients = _gradients(parameters)
            held = [*parameters, *averages, *squares, *bases, *steps]
            if [*map(id, held)] != self._checked.get(key, ((), ()))[0]:
                checked_arguments(parameters, gradients, averages, squares, bases, steps, rates, betas, eps, decay)
                self._checked[key] = [*map(id, held)], held
            torch._foreach_add_(steps, 1)
            _projected_adamw(parameters, gradients, averages, squares, bases, steps, rates, *betas, eps, decay)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bases": self._bases}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._checked = {}

    def _start(self, parameters: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        """Zeros as the state of parameters that are stepped for the first time."""
        for p in parameters:
            if not self.state[p]:
                place = p.device if group["capturable"] or group["fused"] else "cpu"
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=place),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }

    def _states(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        steps, averages, squares = (
            [self.state[p][name] for p in parameters] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        return steps, averages, squares

    def _step_free(self, parameters: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        if not parameters:
            return
        steps, averages, squares = self._states(parameters)
        on_device = all(p.device.type != "cpu" for p in parameters)  # elsewhere torch has no capturable
        adamw(
            list(parameters), _gradients(parameters), averages, squares, [], steps,
            fused=group["fused"] or None, capturable=group["capturable"] and on_device, amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _check_gradients(self, groups: Sequence[tuple[Mapping[str, Any], Sequence[nn.Parameter]]]) -> None:
        for group, parameters in groups:
            on_gpu = any(p.is_cuda for p in parameters)
            if on_gpu and not group["capturable"] and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("ProjectedAdamW: capturable must be True while a CUDA graph is captured, got False.")
            for gradient in _gradients(parameters):
                if gradient.layout != torch.strided:
                    raise RuntimeError(
                        f"ProjectedAdamW: gradients must be dense, got {gradient.layout}. Make the embedding that "
                        "gives them with sparse=False."
                    )


class Confinement:
    """What [`confine`][] returns; ``remove`` (or the end of a ``with`` block) takes the hooks away."""

    def __init__(self, handles: Sequence[torch.utils.hooks.RemovableHandle]):
        self._handles = list(handles)

    def remove(self) -> None:
        """Take the hooks off the optimizer. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Confinement:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def confine(optimizer: Optimizer, bases: Bases) -> Confinement:
    r"""Keep parameters of any optimizer orthogonal to bases, by projections before and after each of its steps.

    $$ g \leftarrow gP, \quad \text{the optimizer's step}, \quad A \leftarrow AP, \qquad P = I - QQ^T $$

    In place and without a record for autograd; on a GPU each of the two is one launch for all parameters. What the
    optimizer remembers is left alone: momentum from before the call may lie inside, and only its effect on the
    parameters is taken out. For AdamW there is [`ProjectedAdamW`][], which does all of it in one launch.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, or a wrapper that holds one as ``optimizer`` (Accelerate's,
            Lightning's); a step with a closure is fine.
        bases: ``Q [in, k]`` with orthonormal columns by parameter ``A [r, in]``, with its dtype (float32 or float64)
            and device. The parameters must belong to the optimizer.

    Returns:
        A handle with ``remove()``.

    Raises:
        TypeError, ValueError: a basis does not fit its parameter, or the parameter is not the optimizer's.

    Examples:
        >>> a, q = nn.Parameter(torch.tensor([[0.0, 1.0]])), torch.tensor([[1.0], [0.0]])
        >>> optimizer = torch.optim.SGD([a], lr=0.1)
        >>> with confine(optimizer, {a: q}):
        ...     a.sum().backward()
        ...     optimizer.step()
        >>> a.detach()
        tensor([[0.0000, 0.9000]])
    """
    optimizer = unwrapped(optimizer)
    _check_known("confine", bases, optimizer)
    kinds: dict[Any, dict[nn.Parameter, Tensor]] = {}
    for parameter, basis in bases.items():
        _check_basis("confine", parameter, basis)
        kinds.setdefault((parameter.device, parameter.dtype), {})[parameter] = basis.detach()

    def gradients() -> None:
        for members in kinds.values():
            found = {p: q for p, q in members.items() if p.grad is not None}
            _project_(_gradients(found), list(found.values()), passes=1)

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> Any:
        gradients()
        return tuple(map(projecting, args)), {name: projecting(value) for name, value in kwargs.items()}

    def projecting(argument: Any) -> Any:
        """A closure makes new gradients, which have to be projected as well."""
        if not callable(argument) or argument is optimizer:
            return argument

        def closure() -> Any:
            loss = argument()
            gradients()
            return loss

        return closure

    def after(*_: Any) -> None:
        for members in kinds.values():
            _project_(list(members), list(members.values()), passes=2)

    return Confinement([optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)])


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of wrappers as Accelerate and Lightning hand them out: steps and hooks are its."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


@torch.no_grad()
def _project_(rows: Sequence[Tensor], bases: Sequence[Tensor], passes: int) -> None:
    if rows:
        projected, _ = _project_rows([r.detach() for r in rows], bases, [1.0] * len(rows), passes)
        torch._foreach_copy_(list(rows), projected)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    found = [p.grad for p in parameters]
    return [gradient for gradient in found if gradient is not None]


def _check_options(group: Mapping[str, Any]) -> None:
    for parameter in group["params"]:
        if parameter.is_complex():
            raise TypeError(f"ProjectedAdamW: params must be real, got {parameter.dtype}.")
    _check_numbers(group)


def _check_numbers(group: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor):
            raise TypeError(f"ProjectedAdamW: {name} must be a number, got a tensor. Pass float({name}).")
        if not 0 <= value < math.inf:
            raise ValueError(f"ProjectedAdamW: {name} must not be negative, and be finite, got {value}.")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"ProjectedAdamW: betas must lie in [0, 1), got {group['betas']}.")


def _check_basis(function: str, parameter: Tensor, basis: Tensor) -> None:
    if parameter.dtype not in MASTER or basis.dtype != parameter.dtype:
        raise TypeError(
            f"{function}: a parameter with a basis must be float32 or float64 like it, got {parameter.dtype} with "
            f"{basis.dtype}."
        )
    fits = parameter.dim() == basis.dim() == 2 and parameter.shape[1] == basis.shape[0]
    if not fits or parameter.device != basis.device:
        raise ValueError(
            f"{function}: a basis must be [in, k] for a parameter [r, in] on its device, got {list(basis.shape)} on "
            f"{basis.device} for {list(parameter.shape)} on {parameter.device}."
        )
    if not parameter.is_contiguous():
        raise ValueError(
            f"{function}: a parameter with a basis must be contiguous, got strides {list(parameter.stride())}."
        )


def _check_known(function: str, bases: Bases, optimizer: Optimizer) -> None:
    known = {p for group in optimizer.param_groups for p in group["params"]}
    strangers = sum(parameter not in known for parameter in bases)
    if strangers:
        raise ValueError(
            f"{function}: bases must be for parameters of the optimizer, got {strangers} of {len(bases)} for others."
        )
