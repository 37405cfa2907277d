"""Settings of KeepLoRA and KeepLoRA++, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import Self

from keeplora._messages import suggest
from keeplora.methods.settings import (
    SEEDS,
    AdapterConfig,
    ConfigError,
    check_by_tower,
    check_choice,
    check_flag,
    check_names,
    check_range,
    check_whole,
)

__all__ = ["PRESETS", "KeepLoraConfig"]

PerTower = float | Mapping[str, float]
"""One number for every tower, or numbers by tower: ``{"vision": 0.85, "text": 0.2}``."""

_DEFAULTS: dict[str, dict[str, float]] = {
    "depth_scale": {"vision": 0.2, "language": 0.2, "text": 1.0, "model": 0.2},
    "weight_energy": {"vision": 0.85, "text": 0.2, "language": 0.6, "model": 0.6},
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "feature_source": ("inputs", "gradients"),
    "weight_side": ("input", "output"),
    "feature_statistic": ("second_moment", "slot_mean", "sketch"),
    "directions": ("gradient", "random"),
    "init_b": ("zero", "gradient"),
    "forward": ("auto", "merged", "factored"),
    "gradient_statistic": ("auto", "exact", "sketch"),
    "bases": ("host", "device"),
}


_CLIP: dict[str, Any] = {
    "r": 16, "alpha": 1.0, "target_modules": ("attn",), "towers": ("vision", "text"),
    "depth_scale": {"vision": 0.2, "text": 1.0}, "weight_energy": {"vision": 0.85, "text": 0.2},
    "feature_energy": 0.99, "feature_statistic": "slot_mean", "balance": False,
}  # fmt: skip
_LLAVA: dict[str, Any] = {
    "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "towers": ("language",), "depth_scale": {"language": 0.2}, "weight_energy": {"language": 0.6},
    "feature_energy": 0.99, "feature_source": "gradients", "balance": False, "dropout": 0.05,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "mtil": _CLIP,
    "parity": {**_CLIP, "depth_scale": 1.0, "weight_side": "output", "init_b": "gradient"},
    "mllm_dcl": {**_LLAVA, "r": 64, "alpha": 128.0, "data_fraction": 0.2},
    "ucit": {**_LLAVA, "r": 32, "alpha": 8.0, "data_fraction": 0.2},
    "cl_vista": {**_LLAVA, "r": 64, "alpha": 128.0, "data_fraction": 0.1},
}
"""What of published experiments is not the default."""


@dataclass(frozen=True)
class KeepLoraConfig(AdapterConfig):
    r"""How KeepLoRA adapts a model (arXiv:2601.19659) and KeepLoRA++ scales it by depth (arXiv:2606.16256).

    Args:
        r: Rank of every adapter; less where less free space is left.
        alpha: LoRA's alpha, ``r`` if None: scale 1. The paper's CLIP has alpha 1, a scale of 1/16, at which little is
            learned at usual learning rates: see [`preset`][].
        rslora: Scale ``alpha / sqrt(r)`` instead of ``alpha / r`` (Kalajdzievski 2023, arXiv:2312.03732).
        target_modules: Names of the adapted layers, as [`AdapterConfig`][] matches them.
        frozen_buffers: Whether running statistics and other buffers stay as they are, as in [`AdapterConfig`][].
        exact_weights: Where the exact value of a weight in half precision is kept, as in [`AdapterConfig`][].
        merge: As [`AdapterConfig`][] has it. On quantised models the same without it.
        towers: The towers that are adapted: by default both of a two-tower model, the language model alone of a
            vision-language model. ``("language", "vision")`` adapts its vision tower too; a projector is never adapted.
        depth_scale: γ in ``λ_l = γ + (1 − γ) l/(L − 1)``: 1 is KeepLoRA, 0.2 the paper's KeepLoRA++. By tower:
            towers not named get 1. The default scales vision and language and leaves text alone, as the public
            code does. Under Adam the update's size follows λ, under SGD λ².
        weight_energy: ε_w: share of the pretrained weight's energy that is protected. 0 protects none. By tower:
            towers not named get 0.
        feature_energy: ε_f: share of the tasks' feature energy that is protected after each task. By tower: every
            tower of the model must be named. The papers' 0.99 belongs to their statistic (``slot_mean``); of the
            second moment it fills the space in a task or two, and 0.9 was measured to end best (docs/settings.md).
        feature_source: What the directions that a task adds are taken from: ``"inputs"``, the inputs of the adapted
            layers; or ``"gradients"``, the row space of the mean gradient of the task's loss after training, as in the
            public LLaVA code: ``feature_energy`` is then a share of that gradient's energy.
        weight_side: ``"input"`` protects input directions, as derived; ``"output"`` repeats the public CLIP code,
            which takes output directions for input ones (square weights only; for parity runs).
        feature_statistic: ``"second_moment"``; ``"sketch"``, a one-pass sketch of it for layers so wide that ``in²``
            numbers are too many; or ``"slot_mean"`` as in the public CLIP code (for parity runs).
        sketch_share: Columns of the features' sketch as a share of the layer's width; more than the share of
            directions that ``feature_energy`` will protect: a warning names the layers where it was not.
        directions: Where an adapter's A comes from: ``"gradient"``, the leading directions of the task's gradient in
            free space; or ``"random"``, directions of free space drawn from ``seed``, without a gradient pass, to see
            what the gradient is worth.
        balance: Whether A is shortened where the task's inputs are strong along it, so that the rate is as hot in every
            task and layer (``balanced``). None: with ``directions="gradient"``, since random directions look at no
            inputs.
        init_b: ``"zero"``, or ``"gradient"``: B starts at the gradient's ``U S`` and the update counts from there,
            so the function starts unchanged either way.
        forward: How layers with adapters compute: ``"merged"`` multiplies with ``W + c B A``, formed once per forward,
            ``"factored"`` adds ``(x Aᵀ) Bᵀ`` and needs no second copy of the weights; ``"auto"`` takes the cheaper one
            for the number of tokens, for experts the factored one. The numbers differ by rounding.
        dropout: Probability of dropping an adapter's inputs in training; above 0 the forward is factored.
        train_a: Whether A is trained along with B. It must then be kept outside of what is protected in every step:
            train with [`KeepLora.optimizer`][], or with any optimizer after [`KeepLora.confine`][]. The forward is
            factored.
        data_fraction: Share of the loader's batches that [`KeepLora.before_task`][] sees, its first ones. Below 1 the
            loader must have a length, and shuffle.
        gradient_statistic: ``"exact"`` sums gradients of the adapted weights; ``"sketch"`` keeps ``8 r`` random
            combinations of each one's rows and takes a second pass to look at the gradients in their span; ``"auto"``
            sketches where exact sums would pass ``memory_budget``.
        memory_budget: Bytes on the device for the statistics of a pass, of gradients or of features; 20 % of what is
            free there if None. Gradients are sketched where they do not fit; features then take several passes.
        bases: Where what is protected is kept while nothing needs it: ``"host"``, main memory, from where every layer's
            comes to the device at a task switch; or ``"device"``, which saves the way and takes ``4 k / out`` bytes per
            adapted parameter there, for k protected directions.
        seed: Of the randomised decompositions.

    Raises:
        ValueError: a setting is out of range; the message names it. Of the wrong type: a ``TypeError`` besides.

    Examples:
        >>> KeepLoraConfig(r=8, depth_scale={"vision": 0.2}).depth_scale_of("text")
        1.0
    """

    towers: tuple[str, ...] | None = None
    depth_scale: PerTower = field(default_factory=lambda: dict(_DEFAULTS["depth_scale"]))
    weight_energy: PerTower = field(default_factory=lambda: dict(_DEFAULTS["weight_energy"]))
    feature_energy: PerTower = 0.9
    feature_source: Literal["inputs", "gradients"] = "inputs"
    weight_side: Literal["input", "output"] = "input"
    feature_statistic: Literal["second_moment", "slot_mean", "sketch"] = "second_moment"
    sketch_share: float = 0.25
    directions: Literal["gradient", "random"] = "gradient"
    balance: bool | None = None
    init_b: Literal["zero", "gradient"] = "zero"
    forward: Literal["auto", "merged", "factored"] = "auto"
    dropout: float = 0.0
    train_a: bool = False
    data_fraction: float = 1.0
    gradient_statistic: Literal["auto", "exact", "sketch"] = "auto"
    memory_budget: int | None = None
    bases: Literal["host", "device"] = "host"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self, "towers", optional=True)
        if isinstance(self.towers, str):
            object.__setattr__(self, "towers", (self.towers,))
        for name in ("depth_scale", "weight_energy", "feature_energy"):
            check_by_tower(self, name, "[0, 1]")
        for name, choices in _CHOICES.items():
            check_choice(self, name, choices)
        check_range(self, "sketch_share", "(0, 1]")
        check_range(self, "dropout", "[0, 1)")
        check_range(self, "data_fraction", "(0, 1]")
        check_flag(self, "train_a")
        if self.balance is not None:
            check_flag(self, "balance")
        check_whole(self, "memory_budget", "[0, inf)", optional=True, remedy="It counts bytes.")
        check_whole(self, "seed", SEEDS)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.directions == "random" and self.init_b == "gradient":
            raise ConfigError(
                f'{type(self).__name__}: init_b must be "zero" with directions="random", got "gradient": '
                "without a gradient pass there is none to start B from"
            )
        if self.directions == "random" and self.balance:
            raise ConfigError(
                f'{type(self).__name__}: balance must be None or False with directions="random", got True: '
                "without a pass over the data nothing is known of its inputs"
            )
        if self.feature_source == "gradients" and self.feature_statistic != "second_moment":
            raise ConfigError(
                f'{type(self).__name__}: feature_statistic must be "second_moment" with feature_source="gradients", '
                f"got {self.feature_statistic!r}: it is a statistic of inputs"
            )
        if self.dropout and self.forward == "merged":
            raise ConfigError(
                f'{type(self).__name__}: forward must be "auto" or "factored" with dropout, got "merged" with '
                f"{self.dropout}: a merged weight cannot drop inputs of A alone"
            )
        if self.train_a and self.forward == "merged":
            raise ConfigError(
                f'{type(self).__name__}: forward must be "auto" or "factored" with train_a, got "merged": '
                "the merged product keeps nothing that A's gradient could be computed from"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The settings of a published experiment, all of them.

        Args:
            name: ``"mtil"``, CLIP ViT-B/16 on MTIL; ``"parity"``, the same with the side of the weight basis and the
                start of B as the public CLIP code of the first paper has them; ``"mllm_dcl"`` and ``"ucit"``,
                LLaVA-1.5-7B; ``"cl_vista"``, Video-LLaVA-7B.
            changes: Settings to have otherwise.

        Source: github.com/MaolinLuo/KeepLoRA, the CLIP folders at 7abf7ec (KeepLoRA++; ``parity`` at a17f9c2), the
        LLaVA folders at f12b4dd and 536498e. What belongs to the loop (rates, epochs, batches) is in
        docs/which-settings.md.

        Examples:
            >>> ucit = KeepLoraConfig.preset("ucit")
            >>> ucit.r, ucit.scaling, ucit.feature_source
            (32, 0.25, 'gradients')
            >>> KeepLoraConfig.preset("mtil", seed=3).seed
            3
        """
        if name not in PRESETS:
            choices = ", ".join(PRESETS)
            raise ConfigError(
                f"{cls.__name__}.preset: name must be one of {choices}, got {name!r}{suggest(name, PRESETS)}"
            )
        return cls(**{**PRESETS[name], **changes})

    @property
    def balances(self) -> bool:
        """Whether A is shortened: ``balance``, where that is None decided by ``directions``."""
        return self.directions == "gradient" if self.balance is None else self.balance

    def check_towers(self, towers: set[str]) -> None:
        """Refuse settings for towers the model does not have; the defaults, which name all, are fine."""
        for name in ("depth_scale", "weight_energy", "feature_energy"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                continue
            if value != _DEFAULTS.get(name) and not set(value) <= towers:
                raise ConfigError(
                    f"{type(self).__name__}: {name} must name towers of the model ({', '.join(sorted(towers))}), "
                    f"got {', '.join(sorted(set(value) - towers))}"
                )
            if name == "feature_energy" and not towers <= set(value):
                raise ConfigError(
                    f"{type(self).__name__}: feature_energy must name every tower of the model, got none for "
                    f"{', '.join(sorted(towers - set(value)))}. Without one, nothing learned there would be protected."
                )

    def depth_scale_of(self, tower: str) -> float:
        """γ of a tower; 1 where it is not named."""
        return _of(self.depth_scale, tower, 1.0)

    def weight_energy_of(self, tower: str) -> float:
        """ε_w of a tower; 0 where it is not named."""
        return _of(self.weight_energy, tower, 0.0)

    def feature_energy_of(self, tower: str) -> float:
        """ε_f of a tower; 0 where it is not named."""
        return _of(self.feature_energy, tower, 0.0)


def _of(setting: PerTower, tower: str, missing: float) -> float:
    return float(setting.get(tower, missing)) if isinstance(setting, Mapping) else float(setting)
