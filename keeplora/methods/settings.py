"""Settings: what those of several methods have in common, and how wrong ones are refused.

Every check names the config, the setting and its value. It raises ``ConfigError``, which is a ``ValueError``; where a
value is of the wrong type ``ConfigTypeError``, which is a ``TypeError`` besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from typing_extensions import Self

from keeplora._names import suggest, unknown_name

__all__ = [
    "SEEDS",
    "AdapterConfig",
    "ConfigError",
    "ConfigTypeError",
    "Settings",
    "check_adapter",
    "check_by_tower",
    "check_choice",
    "check_flag",
    "check_kind",
    "check_name",
    "check_names",
    "check_range",
    "check_whole",
    "plain",
]

SEEDS = f"[0, {2**32})"
"""Every seed: what NumPy and Lightning take, too."""


class ConfigError(ValueError):
    """Settings that cannot be used; the message says which one and what to write instead."""


class ConfigTypeError(ConfigError, TypeError):
    """A setting of the wrong type."""


class Settings:
    """Settings, given by name; one that there is not is refused, with the name that was meant."""

    if not TYPE_CHECKING:  # the dataclasses say which there are

        def __new__(cls, *values: Any, **given: Any) -> Self:
            known = [field.name for field in fields(cls)]
            for name, value in given.items():
                if name not in known:
                    raise ConfigTypeError(
                        f"{cls.__name__}: settings do not include {name!r}, got {name}={value!r}. "
                        f"{unknown_name(name, known)}"
                    )
            return super().__new__(cls)


@dataclass(frozen=True)
class AdapterConfig(Settings):
    """Rank, scale, and which layers.

    Args:
        r: Rank of every adapter; less where less free space is left.
        alpha: LoRA's alpha, ``r`` if None. The update is scaled by ``alpha / r``, so by 1 if None; or by
            ``alpha / sqrt(r)`` with ``rslora``, so by ``sqrt(r)`` if None.
        rslora: Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
        target_modules: Names of the adapted layers, matched as whole dotted components: ``attn`` (also where it is
            called ``self_attn`` or ``attention``), ``q_proj``, ``mlp.c_fc``, or ``"all-linear"``.
        frozen_buffers: Whether running statistics and all other buffers stay as they are while a task is learned. False
            lets them move as in any training: they are then in the state, and the certificate names them, since nothing
            protects what moves with them.
        exact_weights: Where the exact value of a weight in half precision is kept, so that roundings do not pile up
            over tasks: ``"host"``, as its pretrained value and the tasks' updates in main memory; ``"device"``, in
            float32 beside the weight, which takes 4 more bytes per adapted parameter there and saves a task switch the
            sum. The numbers are the same.
        merge: Whether a closed task's update is merged into the weights. False leaves them as they are: updates are
            kept beside them, as factors, and every forward adds what all of them make of its inputs. Quantised weights
            are always left as they are. ``method.merge()`` merges then.

    Raises:
        ValueError: a setting is out of range; the message names it. Of the wrong type: a ``TypeError`` besides.
    """

    r: int = 16
    alpha: float | None = None
    rslora: bool = False
    target_modules: tuple[str, ...] | str = ("attn",)
    frozen_buffers: bool = True
    exact_weights: Literal["host", "device"] = "host"
    merge: bool = True

    def __post_init__(self) -> None:
        check_adapter(self)
        check_choice(self, "exact_weights", ("host", "device"))
        check_flag(self, "merge")

    @property
    def scaling(self) -> float:
        """s = ``alpha / r``, or ``alpha / sqrt(r)`` with ``rslora``."""
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the class makes the settings of them again."""
        return plain(self)


def check_adapter(config: Any) -> None:
    """The settings of ``AdapterConfig``; ``target_modules`` becomes a tuple, unless it is one name."""
    check_whole(config, "r", "[1, inf)", remedy="Typical ranks are 8 to 64.")
    check_range(config, "alpha", "(0, inf)", optional=True)
    check_flag(config, "rslora")
    check_names(config, "target_modules")
    check_flag(config, "frozen_buffers")


_OWN: Any = object()  # stands for the config's attribute of that name


def check_range(
    config: Any,
    name: str,
    interval: str,
    *,
    value: Any = _OWN,
    optional: bool = False,
    where: str = "",
    remedy: str = "",
) -> None:
    """A number in ``interval``, written as in mathematics: ``"[0, 1)"`` has its lower end, ``"(0, inf)"`` neither.

    Args:
        config: What the message begins with: a name, or an object of that class.
        value: What to check, if it is not ``config``'s attribute ``name``.
        optional: Whether None will do.
        where: What tells this value from others of the setting, a tower or a position.
        remedy: A sentence to end with.

    Raises:
        ConfigError: the number lies outside; NaN lies in no interval.
        ConfigTypeError: it is no number. Booleans and strings are none.

    Examples:
        >>> check_range("LoraConfig", "dropout", "[0, 1)", value=1.0)
        Traceback (most recent call last):
        keeplora.methods.settings.ConfigError: LoraConfig: dropout must lie in [0, 1), got 1.0
    """
    value = _value(config, name, value)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(ConfigTypeError, config, name, "be a number", value, where, remedy)
    if not _inside(value, interval):
        _refuse(ConfigError, config, name, _rule(interval), value, where, remedy)


def check_whole(
    config: Any,
    name: str,
    interval: str,
    *,
    value: Any = _OWN,
    optional: bool = False,
    where: str = "",
    remedy: str = "",
) -> None:
    """A whole number in ``interval``; the rest as ``check_range``. 2.0 is none.

    Examples:
        >>> check_whole("LoraConfig", "r", "[1, inf)", value=2.0)
        Traceback (most recent call last):
        keeplora.methods.settings.ConfigTypeError: LoraConfig: r must be an int, got 2.0
    """
    value = _value(config, name, value)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(ConfigTypeError, config, name, "be an int", value, where, remedy)
    if not _inside(value, interval):
        _refuse(ConfigError, config, name, _rule(interval).removesuffix(" and finite"), value, where, remedy)


def check_by_tower(config: Any, name: str, interval: str) -> None:
    """One number for every tower, or numbers by tower's name: ``{"vision": 0.85, "text": 0.2}``."""
    value = getattr(config, name)
    if not isinstance(value, Mapping):
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(ConfigTypeError, config, name, "be a number, or numbers by tower", value)
        check_range(config, name, interval)
        return
    if not value:
        _refuse(ConfigError, config, name, "name at least one tower", value, remedy="One number serves all towers.")
    for tower, number in value.items():
        if not isinstance(tower, str):
            _refuse(ConfigTypeError, config, name, "have towers' names for keys", tower)
        check_range(config, name, interval, value=number, where=tower)


def check_choice(config: Any, name: str, choices: Sequence[str], *, value: Any = _OWN) -> None:
    """One of a few words.

    Examples:
        >>> check_choice("LoraConfig", "forward", ("merged", "factored"), value="merge")
        Traceback (most recent call last):
        keeplora.methods.settings.ConfigError: LoraConfig: forward must be one of merged, factored, got 'merge'. Did you
        mean 'merged'?
    """
    value = _value(config, name, value)
    if not isinstance(value, str):
        _refuse(ConfigTypeError, config, name, f"be one of {', '.join(choices)}", value)
    if value not in choices:
        _refuse(ConfigError, config, name, f"be one of {', '.join(choices)}", value, remedy=suggest(value, choices))


def check_flag(config: Any, name: str, *, value: Any = _OWN) -> None:
    """True or False; 1 and "yes" are neither."""
    value = _value(config, name, value)
    if not isinstance(value, bool):
        _refuse(ConfigTypeError, config, name, "be True or False", value)


def check_name(config: Any, name: str, *, value: Any = _OWN) -> None:
    """A string that is not empty."""
    value = _value(config, name, value)
    if not isinstance(value, str):
        _refuse(ConfigTypeError, config, name, "be a name", value)
    if not value:
        _refuse(ConfigError, config, name, "be a name", value)


def check_names(config: Any, name: str, *, optional: bool = False) -> None:
    """Names, at least one. A single string stays what it is; anything else that yields strings becomes a tuple."""
    value = getattr(config, name)
    if value is None and optional:
        return
    if not isinstance(value, str):
        if not isinstance(value, Iterable):
            _refuse(ConfigTypeError, config, name, "be names", value)
        value = tuple(value)
        object.__setattr__(config, name, value)
    entries = (value,) if isinstance(value, str) else value
    if not all(isinstance(entry, str) for entry in entries):
        _refuse(ConfigTypeError, config, name, "be names", value)
    if not entries or "" in entries:
        _refuse(ConfigError, config, name, "name at least one, and none by an empty string", value)


def _value(config: Any, name: str, value: Any) -> Any:
    return getattr(config, name) if value is _OWN else value


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float can hold
        return False
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _rule(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    if high == "inf":
        return f"be at least {low} and finite" if interval[0] == "[" else f"be above {low} and finite"
    return f"lie in {interval}"


def _refuse(
    kind: type[ConfigError], config: Any, name: str, rule: str, value: Any, where: str = "", remedy: str = ""
) -> NoReturn:
    owner = config if isinstance(config, str) else type(config).__name__
    place = f" [{where}]" if where else ""
    raise kind(f"{owner}: {name} must {rule}, got {value!r}{place}{remedy and '. ' + remedy.removeprefix('. ')}")


def check_kind(function: str, config: Any, kind: type) -> None:
    """Refuse settings of another kind; None are the defaults."""
    if config is not None and not isinstance(config, kind):
        raise TypeError(
            f"{function}: config must be a {kind.__name__}, got {type(config).__module__}.{type(config).__qualname__}. "
            f"Make one: {kind.__name__}(…)."
        )


def plain(config: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values; its class makes it again of them.

    Examples:
        >>> plain(AdapterConfig(target_modules=("q_proj", "v_proj")))["target_modules"]
        ['q_proj', 'v_proj']
    """
    values: dict[str, Any] = _plain(asdict(config))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
