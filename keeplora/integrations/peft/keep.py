"""An adapter that was trained before keeplora came: it stays an adapter, and what it reads is protected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from keeplora._calls import public
from keeplora.distributed import together
from keeplora.lora import Target, TokenMask
from keeplora.math.orthonormal import reorthogonalize
from keeplora.methods.arguments import require_function, require_loader, require_targets
from keeplora.methods.bases import Bases, keeper_of
from keeplora.methods.keeplora.config import KeepLoraConfig
from keeplora.methods.keeplora.protected import extended_bases
from keeplora.methods.method import LossFn
from keeplora.methods.shares import UNKNOWN

from .adapter import PeftLayer, borrow
from .checks import begin, require_kinds
from .fingerprints import frozen_fingerprint
from .state import SubspaceState
from .subspace import bases_so_far, scaled_alphas

__all__ = ["keep_adapter"]


@together
@public
@torch.no_grad()
def keep_adapter(
    model: Any,
    state: SubspaceState | None = None,
    *,
    adapter_name: str | None = None,
    config: KeepLoraConfig | None = None,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    targets: Sequence[Target] | None = None,
    token_mask: TokenMask | None = None,
    progress: bool | None = None,
) -> SubspaceState:
    r"""Keep a trained LoRA adapter as it is, and protect what it reads from the tasks to come.

    $$
    Q \leftarrow [Q,\; \text{the rows of } A_{\text{old}} \text{ that } B_{\text{old}} \text{ uses}],
    \qquad \text{so that later } A\, A_{\text{old}}^\top = 0
    $$

    with Q of the base weights before. The adapter is not merged and its factors do not change. Inputs in the span of
    its A are mapped as before by every adapter that [`keeplora.initialize`][] starts from now on. With ``loader``,
    batches of the old task, Q also grows by what its inputs look like, as [`keeplora.update_subspace`][] lets it:
    without them the protection ends with the span. It counts as a task.

    Add an adapter for the next task on the same layers and activate both:

        state = keeplora.keep_adapter(model)            # the active adapter, "default"
        model.add_adapter("new", LoraConfig(...))
        model.base_model.set_adapter(["default", "new"])
        keeplora.initialize(model, loader, loss_fn, state)
        ...                                             # your training
        keeplora.update_subspace(model, loader, state, merge=False)
        state.export_peft("both", model)                # the old update and the new one as one adapter

    Args:
        model: A ``PeftModel`` with plain LoRA on linear layers; ``adapter_name`` is active.
        state: Of earlier tasks; changed when everything has succeeded. A new one is made if None.
        adapter_name: The adapter; the active one if None.
        config: Settings for a new state, as of [`keeplora.initialize`][].
        loader: Batches of the old task.
        loss_fn: What runs the model on one; together with ``loader``.
        targets: As of [`keeplora.initialize`][].
        token_mask: As of [`keeplora.initialize`][].
        progress: As of [`keeplora.initialize`][].

    Returns:
        ``state``, or the new one.

    Raises:
        TypeError: no PeftModel, a layer that is not linear, adapters in half precision.
        ValueError: more than plain LoRA; the adapter is fresh (B zero): there is nothing to keep; ``loader`` without
            ``loss_fn`` or the reverse.
        RuntimeError: a task is open; several adapters are active, one is merged; the base weights are not the state's.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> import keeplora
        >>> _ = torch.manual_seed(0)
        >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)  # stands for one you have trained
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), lora)
        >>> state = keeplora.keep_adapter(model, config=keeplora.KeepLoraConfig(weight_energy=0.5))
        >>> q = state.bases["0"]
        >>> a = model.base_model.model[0].lora_A["default"].weight.detach()
        >>> bool((a - a @ q @ q.T).abs().max() < 1e-6)
        True
    """
    require_kinds("keep_adapter", state, config)
    if loader is not None:
        require_loader("keep_adapter", loader)
    require_function("keep_adapter", "loss_fn", loss_fn)
    require_function("keep_adapter", "token_mask", token_mask)
    require_targets("keep_adapter", targets)
    if (loader is None) != (loss_fn is None):
        raise ValueError("keep_adapter: loader and loss_fn must be given together, got one without the other")
    result, adapter = begin("keep_adapter", model, state, config, adapter_name, targets)
    layers = adapter.layers
    if not any(bool(layer.b.any()) for layer in layers):
        raise ValueError(
            f"keep_adapter: adapter {adapter.name!r} must be trained, got B = 0 everywhere. "
            "Start it with keeplora.initialize."
        )
    with borrow(adapter, result.masters) as slots:
        bases = bases_so_far(result, slots, result.config, progress)
        added = _span(bases, layers, result.config)
        if loader is not None and loss_fn is not None:
            new, _ = extended_bases(
                model, slots, loader, loss_fn, result.config, bases.joined(added), own_mask=token_mask, shown=progress
            )
            added = [torch.cat([rows, more.q.to(rows.device)], dim=1) for rows, more in zip(added, new, strict=True)]
    names = [layer.name for layer in layers]
    for name, parts, more in zip(names, bases.parts, added, strict=True):
        result.parts[name] = (*parts, more)
        result.free_shares[name] = result.free_shares.get(name, UNKNOWN).closed()
    if state is None:
        result.ranks = {layer.name: layer.rank for layer in layers}
        result.alphas = scaled_alphas(adapter, result)  # what the next adapter, of the same alpha, is to have
        result.frozen = frozen_fingerprint(adapter, ())
    for layer in layers:
        layer.a.requires_grad_(False)
        layer.b.requires_grad_(False)
    result.kept = (*result.kept, adapter.name)
    result.learned.append({})
    result.certificates.append(None)
    result.tasks_learned += 1
    return result


def _span(bases: Bases, layers: Sequence[PeftLayer], config: KeepLoraConfig) -> list[Tensor]:
    """The rows of A that B uses, outside of every basis, one layer at a time."""
    kept, added = keeper_of(config.bases), []
    for layer, q in zip(layers, bases, strict=True):
        (z,) = reorthogonalize([layer.a.detach()[layer.b.detach().any(0)].T.to(q)], [q])
        added.append(kept(z))
    return added
