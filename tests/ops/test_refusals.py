"""Every op refuses a wrong call with the documented error, before it has changed anything."""

import inspect
import math

import pytest
import torch

import keeplora.ops
from keeplora.ops.declare import OPS


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def eye(d, k, scale=1.0):
    return scale * torch.eye(d)[:, :k]


# A call that each op accepts; the tests below spoil one argument at a time.
CALLS = {
    "project_rows": {"g": [ones(2, 4)], "q": [eye(4, 2)], "scale": 0.5},
    "projected_adamw": {
        "a": [ones(2, 4)],
        "grad": [ones(2, 4)],
        "exp_avg": [ones(2, 4)],
        "exp_avg_sq": [ones(2, 4)],
        "q": [eye(4, 2)],
        "step": 1,
        "lr": 0.1,
    },
    "merge_weights": {
        "w": [ones(3, 4)],
        "a": [ones(2, 4)],
        "b": [ones(3, 2)],
        "scale": 1.0,
        "origin": [ones(3, 2)],
    },
    "lora_grad_b": {"dy": ones(5, 3), "t": ones(5, 2), "columns": [(0, 2)], "rows": [(0, 3)], "scale": 1.0},
    "orthonormalize": {"y": [ones(4, 1)], "q": [eye(4, 2)]},
    "sketch_rows": {"x": ones(5, 4), "delta": ones(5, 3), "width": 2, "seed": 0, "out": ones(2, 4)},
    "thin_matmul": {"x": ones(5, 4), "a": ones(2, 4), "scale": 1.0},
    "gram": {"x": ones(5, 4), "out": ones(4, 4), "energy": ones(dtype=torch.float64)},
}
NUMBERS = ("scale", "lr", "eps", "weight_decay")
LISTS = ("scale", "lr")


def spoiled(kind, make):
    """(op, argument, bad value) for every tensor argument of every op."""
    found = []
    for name, call in CALLS.items():
        for argument, value in call.items():
            if isinstance(value, torch.Tensor):
                found.append(pytest.param(name, argument, make(value), id=f"{name}-{argument}-{kind}"))
            elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
                found.append(pytest.param(name, argument, [make(value[0])], id=f"{name}-{argument}-{kind}"))
    return found


def refuses(name, changes, error, message):
    arguments = {key: copy(value) for key, value in CALLS[name].items()} | changes
    before = copy(arguments)
    with pytest.raises(error, match=message):
        getattr(keeplora.ops, name)(**arguments)
    assert same(arguments, before)


def copy(tree):
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: copy(value) for key, value in tree.items()}
    return [copy(item) for item in tree] if isinstance(tree, list) else tree


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.is_meta or torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(map(same, one, other))
    return one == other or (one != one and other != other)


def test_every_op_is_here_and_accepts_its_call():
    assert set(CALLS) == set(OPS)
    for name, call in CALLS.items():
        getattr(keeplora.ops, name)(**copy(call))


@pytest.mark.parametrize(("name", "argument", "bad"), spoiled("shape", lambda t: torch.ones(*t.shape[:-1], 9)))
def test_wrong_shape(name, argument, bad):
    if (name, argument) in (("project_rows", "q"), ("projected_adamw", "q"), ("orthonormalize", "q")):
        bad = [ones(9, 2)]  # any number of columns is a basis
    if (name, argument) == ("orthonormalize", "y"):
        bad = [ones(9, 1)]
    if (name, argument) in (("lora_grad_b", "dy"), ("lora_grad_b", "t"), ("sketch_rows", "delta")):
        bad = ones(9, 3)  # any number of outputs
    bad = bad.double() if argument == "energy" else bad
    refuses(name, {argument: bad}, ValueError, rf"^{name}: .*must ")


@pytest.mark.parametrize(("name", "argument", "bad"), spoiled("dimensions", lambda t: t[None]))
def test_wrong_number_of_dimensions(name, argument, bad):
    refuses(name, {argument: bad}, ValueError, rf"^{name}: {argument}.* must be ")


@pytest.mark.parametrize(("name", "argument", "bad"), spoiled("dtype", lambda t: t.to(torch.int32)))
def test_wrong_dtype(name, argument, bad):
    refuses(name, {argument: bad}, TypeError, rf"^{name}: {argument}.* must be ")


@pytest.mark.parametrize(("name", "argument", "bad"), spoiled("device", lambda t: t.to("meta")))
def test_devices_mixed(name, argument, bad):
    refuses(name, {argument: bad}, (ValueError, TypeError), rf"^{name}: .*must .*meta")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name in CALLS
        for argument in inspect.signature(getattr(keeplora.ops, name)).parameters
        if argument in NUMBERS
    ],
)
def test_number_not_finite(name, argument, value):
    refuses(name, {argument: value}, ValueError, rf"^{name}: {argument} must .*finite")


@pytest.mark.parametrize("value", [True, "0.5", None, [True], ["0.5"]])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, call in CALLS.items() for argument in call if argument in LISTS]
)
def test_what_is_no_number_is_refused(name, argument, value):
    got = repr(value[0] if isinstance(value, list) else value)
    refuses(name, {argument: value}, TypeError, rf"^{name}: {argument} must be .*got {got}")


@pytest.mark.parametrize(
    ("basis", "off"),
    [
        (eye(4, 2, scale=1.001), "2.00e-03"),
        (torch.full((4, 2), 0.5), "1.00e[+]00"),
        (torch.full((4, 2), math.nan), "nan"),
        (eye(4, 2).double() * (1 + 1e-9), "2.00e-09"),
    ],
    ids=["scaled", "dependent", "NaN", "float64"],
)
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if "q" in call])
def test_basis_is_checked_when_asked(name, basis, off):
    call = {key: [t.to(basis.dtype) for t in value] for key, value in CALLS[name].items() if isinstance(value, list)}
    message = rf"^{name}: q\[0\] must .* got .* = {off} > 1e-.*orthonormalize\(\[q\[0\]\]\)"
    refuses(name, call | {"q": [basis], "check_basis": True}, ValueError, message)
    getattr(keeplora.ops, name)(**copy(CALLS[name] | call | {"q": [basis]}))  # not asked
    fixed, _ = keeplora.ops.orthonormalize([eye(4, 2).to(basis.dtype)])
    getattr(keeplora.ops, name)(**copy(CALLS[name] | call | {"q": fixed, "check_basis": True}))


def test_the_second_basis_is_named():
    with pytest.raises(ValueError, match=r"^project_rows: q\[1\] must .* got .*3.00e\+00"):
        keeplora.ops.project_rows([ones(2, 4)] * 2, [eye(4, 0), eye(4, 2, scale=2.0)], check_basis=True)
    keeplora.ops.project_rows([], [], check_basis=True)
