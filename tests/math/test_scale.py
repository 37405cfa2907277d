"""No function of keeplora.math depends on the size of its numbers: a power of two changes no basis, and no fraction."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keeplora.math import (
    certificate,
    complement,
    extend_basis,
    fewest_directions,
    orthogonality,
    project,
    reorthogonalize,
    top_directions,
    weight_basis,
)
from keeplora.math.lowrank import directions_within
from keeplora.math.moment import SketchedMoment, extend_sketched, nystrom
from keeplora.math.rank import rounding_level
from keeplora.methods.duallora.method import _leading
from keeplora.methods.inflora import DualBasis, extended


def basis(d, k, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q[:, :k].to(dtype).contiguous()


def falling(rows, columns):
    return torch.randn(rows, columns) * torch.arange(1, columns + 1) ** -0.5


def second_moment(d):
    x = falling(2 * d, d)
    return x.T @ x


def extension(q, c):
    (new,) = extend_basis([q], [c], 0.8)
    return new.q, new.fraction


def of_sketch(q, y):
    """``y`` is C Ω for an Ω of ones and zeros."""
    (new,) = extend_basis([q], [nystrom(y, torch.eye(40)[:, :12], float(3 * y.double().abs().sum()))], 0.1)
    return new.q, new.fraction


def dual_gpm(q, c, *, free):
    (new,) = extended([DualBasis(q, free=free)], [c], 0.9)
    return new.columns


def dual_lora(q, c):
    (top,) = top_directions([project(c, q).T.contiguous()], [q], 6)
    return _leading(c, q, top, 0.5)


class Case(NamedTuple):
    """A function of a basis or the like, and of numbers whose size must not matter."""

    call: Callable[[Any, Any], Any]
    numbers: Callable[[], torch.Tensor]
    fixed: Callable[[], Any] = lambda: basis(40, 6)


def moment():
    return second_moment(40)


CASES = {
    "top_directions, exact": Case(lambda q, g: top_directions([g], [q], 5)[0].a, lambda: falling(50, 40)),
    "top_directions, sketched": Case(
        lambda q, g: top_directions([g], [q], 5)[0].a, lambda: falling(150, 140), lambda: basis(140, 10)
    ),
    "directions_within": Case(lambda q, x: directions_within([x], [q], 5)[0].a, lambda: falling(50, 6)),
    "weight_basis, tall": Case(lambda _, w: weight_basis([w], 0.8)[0], lambda: falling(50, 40)),
    "weight_basis, wide": Case(lambda _, w: weight_basis([w], 0.8)[0], lambda: falling(20, 40)),
    "extend_basis": Case(extension, moment),
    "extend_basis of a sketch": Case(of_sketch, lambda: moment()[:, :12]),
    "reorthogonalize": Case(lambda q, y: reorthogonalize([y], [q])[0], lambda: falling(40, 9)),
    "DualGPM, protected": Case(partial(dual_gpm, free=False), moment),
    "DualGPM, free": Case(partial(dual_gpm, free=True), moment, lambda: basis(40, 16)),
    "DualLoRA": Case(dual_lora, moment),
    "certificate of A": Case(lambda q, a: certificate(a, torch.ones(7, 3), q).leak, lambda: falling(3, 40)),
    "certificate of B": Case(lambda q, b: certificate(torch.ones(3, 40), b, q).leak, lambda: falling(7, 3)),
    "fewest_directions": Case(
        lambda _, e: fewest_directions(e, float(e.double().sum()), 0.7), lambda: torch.linspace(1, 0, 40)
    ),
}


def equal(one, other):
    if isinstance(one, tuple):
        return all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None)
@given(power=st.integers(-100, 116), seed=st.integers(0, 3))
@example(power=57, seed=0)  # data of 4e8, squared
@example(power=100, seed=0)  # 1e30
@example(power=-100, seed=0)
def test_a_power_of_two_changes_nothing(name, power, seed):
    torch.manual_seed(seed)
    case = CASES[name]
    fixed, numbers = case.fixed(), case.numbers()
    assert equal(case.call(fixed, numbers), case.call(fixed, numbers * 2.0**power))


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"DualLoRA"}))  # which projects for itself, in float32
def test_denormal_numbers_are_numbers(name):
    """As if they were larger: what they lost when they were rounded is all that is lost."""
    case = CASES[name]
    fixed, tiny = case.fixed(), case.numbers() * 2.0**-135
    assert 0 < tiny.abs().max() < torch.finfo(tiny.dtype).tiny
    assert equal(case.call(fixed, tiny), case.call(fixed, (tiny.double() * 2.0**135).float()))


@pytest.mark.parametrize("power", [-900, 900])
def test_float64_has_sizes_of_its_own(power):
    q, g, c = basis(40, 6).double(), falling(50, 40).double(), second_moment(40).double()
    q = torch.linalg.qr(q).Q
    for call, numbers in ((lambda g: top_directions([g], [q], 5)[0].a, g), (lambda c: extension(q, c), c)):
        assert equal(call(numbers), call(numbers * 2.0**power))
    assert equal(weight_basis([g], 0.8)[0], weight_basis([g * 2.0**power], 0.8)[0])


def test_what_has_a_size_keeps_it():
    q, g, c = basis(140, 10), falling(150, 140), second_moment(140)
    for power in (2.0**-90, 2.0**90):
        one, other = top_directions([g], [q], 5)[0], top_directions([g * power], [q], 5)[0]
        assert torch.equal(one.s * power, other.s)
        assert torch.equal(one.b, other.b)
        one, other = extend_basis([q], [c], 0.8)[0], extend_basis([q], [c * power], 0.8)[0]
        assert (other.captured, other.total) == (one.captured * power, one.total * power)
        omega = torch.randn(140, 20)
        one, other = nystrom(c @ omega, omega, 3.0), nystrom(c @ omega * power, omega, 3.0 * power)
        assert torch.equal(one.factor * power**0.5, other.factor)
        new, same = (extend_sketched([q], [sketch], 0.5)[0] for sketch in (one, other))
        assert (same.captured, same.total) == (new.captured * power, new.total * power)


def test_layers_of_different_sizes_in_one_list():
    q, g = basis(40, 6), falling(50, 40)
    sizes = [1.0, 2.0**100, 2.0**-100]
    tops = top_directions([g * size for size in sizes], [q] * 3, 5)
    assert all(torch.equal(top.a, tops[0].a) for top in tops)
    bases = weight_basis([g * size for size in sizes], 0.8)
    assert all(torch.equal(one, bases[0]) for one in bases)


def test_nothing_is_nothing():
    q, none = basis(40, 6), torch.zeros(40, 40)
    assert [len(top.s) for top in top_directions([none, none[:0]], [q, q], 5)] == [0, 0]
    assert [b.shape[1] for b in weight_basis([none, none[:0]], 0.9)] == [0, 0]
    assert extend_basis([q], [none], 1.0)[0].added == 0
    assert reorthogonalize([none], [q])[0].shape == (40, 0)
    assert extend_basis([q], [nystrom(none, none, 0.0)], 1.0)[0].added == 0
    assert len(directions_within([none], [none], 5)[0].s) == 0
    assert certificate(none[:3], none[:, :3], q).leak == 0
    assert rounding_level(none) == 0


def spoiled(tensor, value):
    bad = tensor.clone()
    bad[1, 1] = value
    return bad


REFUSALS = {
    "top_directions: g": lambda q, c, bad: top_directions([bad(c)], [q], 3),
    "top_directions: q": lambda q, c, bad: top_directions([c], [bad(q)], 3),
    "directions_within: images": lambda q, c, bad: directions_within([bad(q)], [q], 3),
    "directions_within: frames": lambda q, c, bad: directions_within([q], [bad(q)], 3),
    "weight_basis: w": lambda q, c, bad: weight_basis([bad(c)], 0.5),
    "extend_basis: c": lambda q, c, bad: extend_basis([q], [bad(c)], 0.5),
    "extend_basis: q": lambda q, c, bad: extend_basis([bad(q)], [c], 0.5),
    "extend_sketched: moments": lambda q, c, bad: extend_sketched([q], [SketchedMoment(bad(c).double(), 1.0)], 0.5),
    "extend_sketched: q": lambda q, c, bad: extend_sketched([bad(q)], [SketchedMoment(c.double(), 1e4)], 0.5),
    "extend_sketched: moments[0].total": lambda q, c, bad: extend_sketched(
        [q], [SketchedMoment(c.double(), float(bad(c)[1, 1]))], 0.5
    ),
    "nystrom: y": lambda q, c, bad: nystrom(bad(c), c, 1.0),
    "nystrom: omega": lambda q, c, bad: nystrom(c, bad(c), 1.0),
    "nystrom: total": lambda q, c, bad: nystrom(c, c, float(bad(c)[1, 1])),
    "reorthogonalize: y": lambda q, c, bad: reorthogonalize([bad(c[:, :3])], [q]),
    "reorthogonalize: q": lambda q, c, bad: reorthogonalize([c[:, :3]], [bad(q)]),
    "fewest_directions: energies": lambda q, c, bad: fewest_directions(bad(c)[1], 1.0, 0.5),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_number_is_refused_by_name(name, value):
    function, argument = name.split(": ")
    with pytest.raises(ValueError, match=rf"^{function}: {re.escape(argument)}.* must be finite"):
        REFUSALS[name](basis(40, 6), second_moment(40), lambda tensor: spoiled(tensor, value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_proof_of_what_is_no_number_is_no_number(value):
    """Never 0, which would look like a promise that was kept."""
    q, a, b = basis(40, 6), falling(3, 40), falling(7, 3)
    for parts in ((spoiled(a, value), b, q), (a, spoiled(b, value), q), (a, b, spoiled(q, value))):
        assert not certificate(*parts).leak < 1
    assert not certificate(a, b, q, delta=spoiled(b @ a, value)).leak_after_rounding < 1
    assert not orthogonality(spoiled(q, value)) < 1
    assert not project(spoiled(a, value), q).isfinite().all()
    assert not complement(spoiled(q, value)).isfinite().all()
