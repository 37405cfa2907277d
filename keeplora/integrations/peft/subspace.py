"""KeepLoRA on a stock PeftModel: two calls around one's own training (the shape of PEFT's EVA helper)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keeplora._calls import public
from keeplora.distributed import Group, together
from keeplora.lora import LoraAdapter, LoraSlot, Target, TokenMask, depth_factor, depth_positions
from keeplora.math.lowrank import TopDirections
from keeplora.methods.arguments import require_data, require_function, require_targets
from keeplora.methods.bases import Bases
from keeplora.methods.buffers import Buffers
from keeplora.methods.keeplora.certificate import RetentionCertificate, certified
from keeplora.methods.keeplora.config import KeepLoraConfig
from keeplora.methods.keeplora.directions import TaskGradients
from keeplora.methods.keeplora.protected import extended_bases, weight_bases
from keeplora.methods.keeplora.trained_a import confined_again
from keeplora.methods.method import LossFn
from keeplora.methods.ranks import warn_of_ranks, warn_of_unreached
from keeplora.methods.shares import UNKNOWN
from keeplora.methods.size import update_size, warn_of_size
from keeplora.statistics import BatchSize
from keeplora.statistics.budget import budget_of

from .adapter import (
    PeftAdapter,
    PeftLayer,
    borrow,
    find_adapter,
    forget_buffers,
    held_buffers,
    hold_buffers,
)
from .checks import begin, check_finite, refuse_neighbours, require_fresh, require_kinds, with_stock_settings
from .fingerprints import fingerprint, frozen_fingerprint
from .state import SubspaceState

__all__ = ["bases_so_far", "freeze_a", "initialize", "scaled_alphas", "update_subspace"]


@together
@public
def initialize(
    model: Any,
    loader: Iterable[Any],
    loss_fn: LossFn,
    state: SubspaceState | None = None,
    *,
    config: KeepLoraConfig | None = None,
    adapter_name: str | None = None,
    targets: Sequence[Target] | None = None,
    also_train: Sequence[str] = (),
    batch_size: BatchSize | None = None,
    token_mask: TokenMask | None = None,
    progress: bool | None = None,
    group: Group | None = None,
) -> SubspaceState:
    r"""Point a fresh LoRA adapter of a stock ``PeftModel`` into free space: A frozen, B zero, the depth in its scaling.

    $$
    A = \text{top-}r \text{ right singular vectors of } G (I - Q Q^\top), \quad B = 0, \quad
    c = \lambda_l\, \alpha / r
    $$

    with Q the protected basis of the base weight (of the state, or before the first task of the weight itself) and G
    the mean gradient with respect to it. Train as you like afterwards, then call [`update_subspace`][]. Where there
    are fewer than r free directions, the rest of A is zero. ``λ_l`` goes into the adapter's ``alpha_pattern``, so
    ``save_pretrained`` keeps it.

    Args:
        model: A ``PeftModel`` with LoRA on linear layers, its adapter fresh (B zero). Other adapters may be in the
            model while they are not active.
        loader: The task's training batches; can be iterated again later.
        loss_fn: ``loss_fn(model, batch) -> scalar``. Remembered for [`update_subspace`][].
        state: Of the earlier tasks; changed when everything has succeeded. A new one is made if None.
        config: Settings for a new state. r, alpha, rslora and dropout are ``LoraConfig``'s.
        adapter_name: The adapter; the active one if None.
        targets: Tower and depth of the base model's layers; found if None.
        also_train: Names of modules that may be trained beside the adapter, such as a new classifier head, and whose
            buffers may move. Nothing protects what they do. All other buffers of the model stay as they are until
            [`update_subspace`][], running statistics in ``train()`` too.
        batch_size: What a batch's loss is a mean over, as of [`keeplora.KeepLora.before_task`][].
        token_mask: Which inputs count as features, instead of what [`keeplora.families.token_mask`][] tells.
            Remembered for [`update_subspace`][].
        progress: Whether passes draw bars on stderr; None: if that is a terminal.
        group: The ``torch.distributed.ProcessGroup`` of those that share the task's data; the default group if None.

    Returns:
        ``state``, or the new one.

    Raises:
        TypeError: no PeftModel; ``state`` or ``config`` of another kind; a layer that is not linear, or PEFT's
            MultiheadAttention; adapters in half precision.
        ValueError: DoRA, biases, an initialisation that changed the base weights, any other field of ``LoraConfig``
            beyond plain LoRA; trainable parameters beside the adapter; an empty loader; tied weights.
        RuntimeError: a task is open, the adapter is not fresh, several adapters are active, one is merged, or the base
            weights are not those the state belongs to.

    Warns:
        UserWarning: layers with fewer than r free directions.

    Source: KeepLoRA, arXiv:2601.19659; KeepLoRA++, arXiv:2606.16256.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> import keeplora
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> task = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
        >>> state = keeplora.initialize(peft_model, task, loss_fn, config=keeplora.KeepLoraConfig(feature_energy=0.5))
        >>> optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-2)
        >>> for batch in task:
        ...     loss_fn(peft_model, batch).backward()
        ...     optimizer.step(); optimizer.zero_grad()
        >>> keeplora.update_subspace(peft_model, task, state).leak < 1e-6
        True
    """
    require_kinds("initialize", state, config)
    require_data("initialize", loader, loss_fn, batch_size=batch_size)
    require_function("initialize", "token_mask", token_mask)
    require_targets("initialize", targets)
    if isinstance(also_train, str) or not isinstance(also_train, Sequence):
        raise TypeError(
            f"initialize: also_train must be a list of modules' names, got {also_train!r}. Example: ['head']."
        )
    state, adapter = begin("initialize", model, state, config, adapter_name, targets)
    settings = with_stock_settings(state.config, adapter)
    require_fresh(adapter)
    refuse_neighbours("initialize", adapter, state.kept, also_train)
    layers, buffers = adapter.layers, Buffers(adapter.base, also_train)
    ranks = [min(layer.rank, layer.base.in_features) for layer in layers]
    with borrow(adapter) as slots:
        gradients = TaskGradients(
            model, slots, loader, loss_fn, settings, shown=progress, ranks=ranks, batch_size=batch_size,
            own_mask=token_mask,
        )  # fmt: skip
        bases = bases_so_far(state, slots, settings, progress)
        directions = gradients.directions(bases)
    names = [layer.name for layer in layers]
    unreached = [name for name, yes in zip(names, gradients.reached, strict=True) if not yes]
    warn_of_unreached("initialize", unreached, len(layers), closing=False)
    warn_of_ranks(
        "initialize", names, [len(top.a) for top in directions], [layer.rank for layer in layers],
        none="gradient in free space",
        full=[name for name, parts in zip(names, bases.parts, strict=True) if _is_full(parts)],
        silent=gradients.silent,
        unreached=unreached,
        remedy="Lower weight_energy or feature_energy for more room.",
    )  # fmt: skip
    for layer, top in zip(layers, directions, strict=True):
        _start(layer, top)
    adapter.set_alphas(scaled_alphas(adapter, state))
    adapter.freeze(state.kept)
    state.parts = {name: tuple(parts) for name, parts in zip(names, bases.parts, strict=True)}
    before = {name: state.free_shares.get(name, UNKNOWN) for name in names}
    state.free_shares = {n: before[n].opened(s) for n, s in zip(names, gradients.free_shares, strict=True)}
    state.alphas = {layer.name: layer.alpha for layer in layers}
    state.ranks = {layer.name: layer.rank for layer in layers}
    state.also_train, state.open_adapter = tuple(also_train), adapter.name
    state.loss_fn, state.token_mask = loss_fn, token_mask
    state.frozen = frozen_fingerprint(adapter, also_train)
    hold_buffers("initialize", adapter, buffers)
    return state


@together
@public
@torch.no_grad()
def update_subspace(
    model: Any,
    loader: Iterable[Any],
    state: SubspaceState,
    *,
    loss_fn: LossFn | None = None,
    merge: bool = True,
    token_mask: TokenMask | None = None,
    progress: bool | None = None,
    group: Group | None = None,
) -> RetentionCertificate:
    r"""Close the task: protect what its inputs look like, put the update into the base weights, and prove retention.

    One pass over ``loader`` without gradients collects ``C = Σ xᵀx`` of every adapted layer; Q grows until it captures
    ``feature_energy`` of it. Then, with ``merge=True``, ``W ← W + c B A`` (in float32, rounded once; layers in half
    precision remember the unrounded result) and ``B ← 0``: the same adapter is fresh for the next
    [`initialize`][], or ``model.unload()`` gives the base model with what was learned. The update itself stays in
    the state. Save the adapter before this call if you want it as a file of its own.

    With ``merge=False`` nothing is merged: the adapter stays, and must stay active. Add another one for the next task
    and activate both, ``model.base_model.set_adapter([...])``. That is the way for quantised base weights, which
    cannot be merged into without rounding in the protected directions too.

    Args:
        model: The model [`initialize`][] was given, or one brought back by [`SubspaceState.restore`][].
        loader: The task's training batches.
        state: Changed when everything has succeeded.
        loss_fn: Runs the model on a batch; by default the one [`initialize`][] was given.
        merge: Whether the update goes into the base weights.
        token_mask: Which inputs count as features; by default what [`initialize`][] was given, or what
            [`keeplora.families.token_mask`][] tells.
        progress: Whether passes draw bars on stderr; None: if that is a terminal.
        group: As of [`initialize`][].

    Returns:
        The retention certificate: leak, orthogonality, captured energy and room, per layer and the worst.

    Raises:
        RuntimeError: no task is open; no ``loss_fn`` is known; the base weights have changed since.
        ValueError: an empty loader; features or a trained adapter that are not finite; parameters trained beside it.
        TypeError: ``merge=True`` with quantised base weights.

    Warns:
        UserWarning: A was trained and left its free space (PEFT unfreezes it in ``set_adapter``, ``disable_adapter``
            and ``is_trainable=True``); it is projected back before anything else.
    """
    if not isinstance(state, SubspaceState):
        raise TypeError(
            f"update_subspace: state must be the SubspaceState that initialize returned, got {type(state).__name__}."
        )
    require_function("update_subspace", "token_mask", token_mask)
    if state.open_adapter is None:
        raise RuntimeError("update_subspace: a task must be open, got none. Call initialize(...) first.")
    forward = loss_fn or state.loss_fn
    if forward is None:
        raise RuntimeError("update_subspace: loss_fn must be given after loading a state, got None")
    require_data("update_subspace", loader, forward)
    adapter = state.adapter_of("update_subspace", model, state.open_adapter)
    state.require_base("update_subspace", adapter.layers)
    refuse_neighbours("update_subspace", adapter, state.kept, state.also_train)
    layers = adapter.layers
    quantised = [layer.name for layer in layers if layer.quantised]
    if merge and quantised:
        raise TypeError(
            f"update_subspace: base weights must not be quantised to be merged into, got {len(quantised)} that are "
            f"(first: {quantised[0]}): rounding would move what is protected. Pass merge=False and add an adapter per "
            "task."
        )
    bases = Bases([state.parts[layer.name] for layer in layers], [layer.base.weight.device for layer in layers])
    check_finite(layers)
    buffers = held_buffers(adapter) or Buffers(adapter.base, state.also_train)
    buffers.settle("update_subspace")
    with (
        buffers.closing(),
        confined_again(
            "update_subspace",
            {layer.name: (layer.a, partial(bases.__getitem__, i)) for i, layer in enumerate(layers)},
            "PEFT unfreezes A in set_adapter, disable_adapter and is_trainable=True: call keeplora.freeze_a(model) "
            "after those.",
        ),
        borrow(adapter, state.masters) as slots,
    ):
        updates = [layer.update(slot.exact_dtype) for layer, slot in zip(layers, slots, strict=True)]
        new, reached = extended_bases(
            model, slots, loader, forward, state.config, bases, own_mask=token_mask or state.token_mask,
            shown=progress,
        )  # fmt: skip
        # Where A is zero nothing was learned, and initialize has said why.
        unseen = [p.name for p, yes in zip(layers, reached, strict=True) if not yes and bool(p.a.any())]
        warn_of_unreached("update_subspace", unseen, len(layers), closing=True)
        for slot, update in zip(slots, updates, strict=True):
            slot.attach(LoraAdapter(update.a.to(slot.weight.device), update.b.to(slot.weight.device), 1.0))
        budget = budget_of(state.config.memory_budget, slots)
        proofs = certified(slots, bases, new, merge=merge, budget=budget, shown=progress)
        size = update_size([[(update.a, update.b)] for update in updates], [slot.weight for slot in slots])
    if merge:
        for layer in layers:
            layer.b.zero_()
    for layer, extension in zip(layers, new, strict=True):
        state.parts[layer.name] = (*state.parts[layer.name], extension.q)
        state.free_shares[layer.name] = state.free_shares[layer.name].closed()
    if not merge:
        state.kept = (*state.kept, adapter.name)
    state.learned.append({layer.name: update for layer, update in zip(layers, updates, strict=True)} if merge else {})
    state.current = fingerprint(layers)
    state.open_adapter, state.loss_fn, state.token_mask = None, None, None
    result = RetentionCertificate(state.tasks_learned, tuple(proofs), tuple(buffers.moved()))
    forget_buffers(adapter)
    state.certificates.append(result.worst())
    state.tasks_learned += 1
    warn_of_size("update_subspace", size)
    return result


@public
def freeze_a(model: Any, adapter_name: str | None = None) -> None:
    """Freeze the A of an adapter and let its B be trained.

    PEFT unfreezes A whenever it activates an adapter: in ``set_adapter``, at the end of ``with
    model.disable_adapter()``, and with ``from_pretrained(..., is_trainable=True)``. [`SubspaceState.restore`][] calls
    this; after the others, call it yourself.

    Args:
        model: A ``PeftModel``.
        adapter_name: The adapter; the active one if None.

    Raises:
        TypeError, ValueError, RuntimeError: as [`initialize`][].
    """
    find_adapter("freeze_a", model, adapter_name).freeze()


def bases_so_far(
    state: SubspaceState, slots: Sequence[LoraSlot], config: KeepLoraConfig, progress: bool | None
) -> Bases:
    """What is protected; before the first task what the base weights know."""
    if state.parts:
        parts: list[Sequence[Tensor]] = [state.parts[slot.name] for slot in slots]
    else:
        parts = [(q,) for q in weight_bases(slots, config, shown=progress)]
    return Bases(parts, [slot.weight.device for slot in slots])


def _is_full(parts: Sequence[Tensor]) -> bool:
    return sum(part.shape[1] for part in parts) == len(parts[0])


@torch.no_grad()
def _start(layer: PeftLayer, directions: TopDirections) -> None:
    layer.a.zero_()
    layer.a[: directions.a.shape[0]] = directions.a.to(layer.a)
    layer.b.zero_()


def scaled_alphas(adapter: PeftAdapter, state: SubspaceState) -> dict[str, float]:
    """Every layer's alpha times its depth factor, once: an adapter that is fresh again has it already."""
    now = {layer.name: layer.alpha for layer in adapter.layers}
    if now == state.alphas:
        return now
    positions = depth_positions([layer.target for layer in adapter.layers])
    return {
        layer.name: layer.alpha * depth_factor(state.config.depth_scale_of(layer.target.tower), *positions[layer.name])
        for layer in adapter.layers
    }
