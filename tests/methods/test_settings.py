"""Every setting of every method is checked when the settings are made, by the checks of keeplora.methods.settings."""

import ast
import dataclasses
import re
import typing
from collections.abc import Mapping

import pytest
from pages import ROOT

from keeplora import KeepLoraConfig
from keeplora.methods import METHODS, configure
from keeplora.methods.settings import (
    SEEDS,
    AdapterConfig,
    ConfigError,
    ConfigTypeError,
    check_by_tower,
    check_choice,
    check_flag,
    check_name,
    check_names,
    check_range,
    check_whole,
)

NAN, INF = float("nan"), float("inf")
CONFIGS = {entry.config for entry in METHODS.values()} | {AdapterConfig}
NO_NUMBERS = (True, "3", b"3", [1], (), 1j, object())


def kinds(config, name):
    """The types that a setting's annotation names, the insides of lists and mappings aside."""
    hint = typing.get_type_hints(config)[name]
    arguments = typing.get_args(hint)
    union = not isinstance(hint, type) and typing.get_origin(hint) not in (tuple, Mapping, typing.Literal)
    return {typing.get_origin(kind) or kind for kind in (arguments if union and arguments else (hint,))}


def settings_of(*wanted):
    return [
        pytest.param(config, field.name, id=f"{config.__name__}-{field.name}")
        for config in sorted(CONFIGS, key=lambda config: config.__name__)
        for field in dataclasses.fields(config)
        if kinds(config, field.name) & set(wanted)
    ]


def refused(config, kind, **settings):
    [(name, value)] = settings.items()
    with pytest.raises(kind) as caught:
        config(**settings)
    text = str(caught.value)
    assert text.startswith(f"{config.__name__}: {name} must ")
    assert f"got {value!r}" in text


@pytest.mark.parametrize(("config", "name"), settings_of(int, float))
def test_what_is_no_finite_number_is_refused(config, name):
    types = kinds(config, name)
    for value in NO_NUMBERS:
        refused(config, ConfigTypeError, **{name: value})
    for value in (NAN, INF, -INF):
        refused(config, ConfigError, **{name: value})
    if float in types:
        refused(config, ConfigError, **{name: 10**400})  # an int that no float can hold
    else:
        refused(config, ConfigTypeError, **{name: 2.0})
    if type(None) in types:
        assert getattr(config(**{name: None}), name) is None
    else:
        refused(config, ConfigTypeError, **{name: None})


@pytest.mark.parametrize(("config", "name"), settings_of(Mapping))
def test_numbers_by_tower_are_checked_one_by_one(config, name):
    if name == "settings":
        pytest.skip("another method's settings, which that method checks: test_lines.py")
    assert getattr(config(**{name: {"vision": 0, "text": 1.0}}), name) == {"vision": 0, "text": 1.0}
    refused(config, ConfigError, **{name: {}})
    for value in (NAN, INF, -0.1, 1.1):
        with pytest.raises(ConfigError, match=rf"{config.__name__}: {name} must .*got {value} \[text\]"):
            config(**{name: {"vision": 0.5, "text": value}})
    for value in (True, "0.5", None):
        with pytest.raises(ConfigTypeError, match=rf"{name} must .*got {value!r} \[text\]"):
            config(**{name: {"vision": 0.5, "text": value}})
    for tower in (0, None, ("vision",)):
        with pytest.raises(ConfigTypeError, match=rf"{name} must "):
            config(**{name: {tower: 0.5}})


@pytest.mark.parametrize(("config", "name"), settings_of(bool))
def test_flags_are_true_or_false(config, name):
    assert getattr(config(**{name: True}), name) is True
    for value in (1, 0, "yes"):
        refused(config, ConfigTypeError, **{name: value})
    if type(None) in typing.get_args(typing.get_type_hints(config)[name]):
        assert getattr(config(**{name: None}), name) is None
    else:
        refused(config, ConfigTypeError, **{name: None})


@pytest.mark.parametrize(("config", "name"), settings_of(typing.Literal))
def test_choices_are_among_those_the_annotation_names(config, name):
    (hint,) = {typing.get_type_hints(config)[name]}
    choices = typing.get_args(hint)
    usual = getattr(config(), name)
    for value in choices:
        if value == usual or (config.__name__, name) not in RESTRICTED:
            assert getattr(config(**{name: value}), name) == value
    with pytest.raises(ConfigError, match=f"{config.__name__}: {name} must .*{', '.join(choices)}, got 'other'"):
        config(**{name: "other"})
    for value in (None, 1, [usual]):
        refused(config, ConfigTypeError, **{name: value})


RESTRICTED = {("KeepLoraClsConfig", "directions")}  # by another setting, or in this method


@pytest.mark.parametrize(("config", "name"), [*settings_of(tuple), *settings_of(str)])
def test_names_are_strings(config, name):
    if name == "grid":
        for value, kind in ((3, ConfigTypeError), ("0.5", ConfigTypeError), ((), ConfigError)):
            refused(config, kind, grid=value)
        for value, kind in ((NAN, ConfigError), (True, ConfigTypeError), ("1", ConfigTypeError), (2.0, ConfigError)):
            with pytest.raises(kind, match=f"LinesConfig: grid must .*got {value!r}"):
                config(grid=(0.5, value))
        return
    for value in (3, True, 1.5):
        refused(config, ConfigTypeError, **{name: value})
    refused(config, ConfigError, **{name: ""})
    if tuple in kinds(config, name):
        assert getattr(config(**{name: ["a", "b"]}), name) == ("a", "b")
        refused(config, ConfigError, **{name: ()})
        refused(config, ConfigTypeError, **{name: ("a", 1)})
        refused(config, ConfigError, **{name: ("a", "")})


def test_no_setting_is_left_out():
    """Every annotation is one of the kinds above; a new kind needs a test of its own."""
    covered = {int, float, bool, str, tuple, Mapping, typing.Literal}
    left = [f"{c.__name__}.{f.name}" for c in CONFIGS for f in dataclasses.fields(c) if not kinds(c, f.name) & covered]
    assert not left


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_a_wrong_type_are_refused_by_name_too(name):
    fields = {field.name for field in dataclasses.fields(METHODS[name].config)}
    for setting in fields & {"r", "alpha", "seed", "feature_energy"}:
        with pytest.raises(ConfigTypeError, match=f"Config: {setting} must be .*got '3'"):
            configure(name, {setting: "3"})
    if "seed" in fields:
        assert configure(name, {"seed": 2**32 - 1}).seed == 2**32 - 1
        with pytest.raises(ConfigError, match=rf"seed must lie in .*got {2**32}"):
            configure(name, {"seed": 2**32})


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", (0, 1, 0.5), (-1e-9, 1 + 1e-9, 2)),
        ("(0, 1]", (1e-9, 1), (0, 1.5)),
        ("[0, 1)", (0, 0.999), (1, -1)),
        ("(0, inf)", (1e-300, 1e300), (0, INF, 10**400)),
        ("[1e-8, inf)", (1e-8,), (9e-9, NAN)),
    ],
)
def test_intervals_are_read_as_written(interval, inside, outside):
    for value in inside:
        check_range("Config", "x", interval, value=value)
    for value in outside:
        with pytest.raises(ConfigError, match=r"^Config: x must .*got ") as caught:
            check_range("Config", "x", interval, value=value)
        assert not isinstance(caught.value, TypeError)


def test_a_refusal_says_where_and_what_to_do():
    with pytest.raises(ConfigError, match=r"^Run: x must be above 0 and finite, got 0 \[vision\]\. Try 1\.$"):
        check_range("Run", "x", "(0, inf)", value=0, where="vision", remedy="Try 1.")
    with pytest.raises(ConfigError, match=r"^Run: x must be at least 1, got 0$"):
        check_whole("Run", "x", "[1, inf)", value=0)
    with pytest.raises(ConfigError, match=r"^Run: x must .*got 'tow'\. Did you mean 'two'\?$"):
        check_choice("Run", "x", ("one", "two"), value="tow")
    with pytest.raises(ConfigTypeError, match=r"^Run: x must be True or False, got 1$"):
        check_flag("Run", "x", value=1)
    with pytest.raises(ConfigError, match=r"^Run: x must .*got ''$"):
        check_name("Run", "x", value="")


def test_checks_read_the_setting_of_a_config():
    @dataclasses.dataclass(frozen=True)
    class Own:
        share: float = 0.5
        count: int | None = None
        energy: float | Mapping[str, float] = 0.5
        names: tuple[str, ...] = ("a",)
        seed: int = 0

        def __post_init__(self):
            check_range(self, "share", "[0, 1]")
            check_whole(self, "count", "[1, inf)", optional=True)
            check_by_tower(self, "energy", "[0, 1]")
            check_names(self, "names")
            check_whole(self, "seed", SEEDS)

    assert Own(names=iter("bc")).names == ("b", "c")
    for settings in ({"share": 2}, {"count": 0}, {"energy": {"text": 2}}, {"names": []}, {"seed": -1}):
        (name,) = settings
        with pytest.raises(ConfigError, match=rf"^Own: {name} must .*got "):
            Own(**settings)
    assert issubclass(ConfigTypeError, ConfigError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigTypeError, TypeError)


def test_what_the_page_calls_defaults_are_the_defaults():
    """Tables of docs/which-settings.md whose second column says `value`, the default."""
    page = (ROOT / "docs" / "which-settings.md").read_text()
    said = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)`, the default", page, re.MULTILINE))
    assert len(said) > 5
    defaults = {field.name: getattr(KeepLoraConfig(), field.name) for field in dataclasses.fields(KeepLoraConfig)}
    for name, value in said.items():
        value = ast.literal_eval(value)
        assert (tuple(value) if isinstance(value, list) else value) == defaults[name], name
