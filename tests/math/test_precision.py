"""The mathematics of subspaces promises float32; what a caller has switched on for speed must not reach it."""

import inspect

import pytest
import torch
from precision import FASTER, settings
from torch.overrides import TorchFunctionMode

import keeplora.math
from keeplora.math import lowrank, moment, orthonormal, rank, sketch, subspace
from keeplora.math.factorise import CPU

ROOMS = (lowrank, moment, orthonormal, rank, sketch, subspace)
FUNCTIONS = {
    name: getattr(room, name)
    for room in ROOMS
    for name in room.__all__
    if inspect.isfunction(getattr(room, name)) and getattr(room, name).__module__ == room.__name__
}


def basis(d, k):
    return torch.linalg.qr(torch.randn(d, k)).Q.contiguous()


def second_moment(d):
    x = torch.randn(2 * d, d) * torch.arange(1, d + 1) ** -0.5
    return x.T @ x


def narrow_moment(d, k):
    """Whose leading directions hold nearly all of it: subspace iteration is certain of them."""
    factor = torch.randn(d, k) * 2.0 ** -torch.arange(k)
    return factor @ factor.T + 1e-6 * torch.eye(d)


def sketched(d, w):
    c, omega = second_moment(d), torch.randn(d, w)
    return moment.nystrom(c @ omega, omega, float(c.trace()))


CASES = {
    "top_directions": lambda: ([torch.randn(96, 128), torch.randn(300, 400)], [basis(128, 40), basis(400, 9)], 8),
    "directions_within": lambda: ([torch.randn(96, 64)], [basis(128, 64)], 8),
    "weight_basis": lambda: ([torch.randn(96, 128), narrow_moment(CPU.iterative_from, 12)], 0.8),
    "extend_basis": lambda: (
        [basis(96, 40), basis(CPU.iterative_from + 8, 8)],
        [second_moment(96), narrow_moment(CPU.iterative_from + 8, 12)],
        0.9,
    ),
    "extend_sketched": lambda: ([basis(96, 40)], [sketched(96, 48)], 0.9),
    "nystrom": lambda: (torch.randn(96, 48), torch.randn(96, 48), 1e4),
    "complement": lambda: (basis(96, 40),),
    "nearest_orthonormal": lambda: (basis(96, 40).double(),),
    "orthonormal_again": lambda: (basis(96, 40).half(),),
    "reorthogonalize": lambda: ([torch.randn(96, 40)], [basis(96, 40)]),
    "fewest_directions": lambda: (torch.linspace(1, 0, 500), 250.0, 0.5),
    "fewest_directions_each": lambda: (torch.linspace(1, 0, 500)[None], torch.tensor([250.0]).double(), [0.5]),
    "rounding_level": lambda: (second_moment(96),),
    "gaussian": lambda: (5, 7, 3, torch.empty(0)),
    "leading_eigenvectors": lambda: (narrow_moment(1024, 12), basis(1024, 8)),
    "right_spectrum": lambda: (torch.randn(2, 96, 40),),
    "row_space": lambda: (torch.randn(1, 300, 400), [basis(400, 9)], 8),
    "worst_gains": lambda: after_steps(torch.randn(1, 300, 400), [basis(400, 9)]),
    "certificate": lambda: (torch.randn(8, 96), torch.randn(64, 8), basis(96, 40)),
    "certificates": lambda: ([torch.randn(8, 96)], [torch.randn(64, 8)], [basis(96, 40)]),
    "orthogonality": lambda: (basis(256, 48),),
    "project": lambda: (torch.randn(64, 96), basis(96, 40)),
    "shifts": lambda: (basis(96, 40),),
    "spectrum_outside": lambda: (
        second_moment(96)[None],
        basis(96, 40)[None],
        torch.ones(1).double(),
    ),
}


def after_steps(g, q):
    return g, q[0][None], *sketch.row_space(g, q, 8, steps=2, seed=0), 8, 8


OPTIONS = {
    "leading_eigenvectors": lambda: {"total": 2.5e3, "share": 0.5, "captured": 0.0, "floor": 1e-4, "seed": 0},
    "row_space": lambda: {"steps": 4, "seed": 0, "enough": sketch.Enough(8, 1e-9, 1e-9)},
}


class Products(TorchFunctionMode):
    """Looks, at every matrix product of float32, at what is set: also on a CPU that has no bfloat16 to multiply."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name.strip("_") in {"matmul", "mm", "addmm", "bmm", "baddbmm", "rmatmul"} and args[0].dtype == torch.float32:
            self.found.append(settings())
        return function(*args, **(kwargs or {}))


def parts(tree):
    """Every tensor and number of a result."""
    if isinstance(tree, list | tuple):
        return [part for item in tree for part in parts(item)]
    if hasattr(tree, "__dataclass_fields__"):
        return [part for name in tree.__dataclass_fields__ for part in parts(getattr(tree, name))]
    return [tree]


def test_every_public_function_is_covered():
    assert set(CASES) == set(FUNCTIONS)
    public = {name for name in keeplora.math.__all__ if inspect.isfunction(getattr(keeplora.math, name))}
    assert public <= set(FUNCTIONS)


@pytest.mark.parametrize("faster", FASTER.values(), ids=FASTER.keys())
@pytest.mark.parametrize("name", CASES)
def test_a_function_gives_the_same_bits(name, faster):
    args, options = CASES[name](), OPTIONS.get(name, dict)()
    expected = parts(FUNCTIONS[name](*args, **options))
    with faster(), Products() as products:
        before = settings()
        got = parts(FUNCTIONS[name](*args, **options))
        assert settings() == before
    assert len(expected) == len(got)
    assert any(part is not None for part in expected)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    for inside in products.found:
        assert inside["autocast"] is False
        assert {inside["cuda"], inside["mkldnn"]} <= {"ieee", "none"}
