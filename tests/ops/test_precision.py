"""Ops promise float32; what a caller has switched on for speed must not reach them."""

import threading
from contextlib import suppress

import pytest
import torch
from ops.test_every_op import EVERY_OP, run
from precision import FASTER, settings

from keeplora.ops import merge_weights, orthonormalize, precision, project_rows, thin_matmul
from keeplora.ops.declare import OPS, declare
from keeplora.ops.precision import full_precision, is_full_precision

EVERY_WAY = pytest.mark.parametrize("faster", FASTER.values(), ids=FASTER.keys())


@EVERY_OP
@EVERY_WAY
@pytest.mark.parametrize("size", ["samples", "large"])
def test_an_op_gives_the_same_bits(op, faster, size, device):
    """Large ones, because a CPU leaves small products in float32 whatever is asked."""
    for args in op.samples(device, torch.float32) if size == "samples" else [moved(LARGE[op.name](), device)]:
        expected = run(op.call, args)
        with faster():
            before = settings()
            got = run(op.call, args)
            assert settings() == before
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def moved(args, device):
    if isinstance(args, list | tuple):
        return type(args)(moved(arg, device) for arg in args)
    return args.to(device) if isinstance(args, torch.Tensor) else args


def basis(d, k):
    return torch.linalg.qr(torch.randn(d, k)).Q.contiguous()


LARGE = {
    "gram": lambda: (torch.zeros(96, 96), torch.zeros((), dtype=torch.float64), torch.randn(128, 96)),
    "lora_grad_b": lambda: (torch.randn(128, 64), torch.randn(128, 32), [0, 32, 0, 64], [1.0]),
    "merge_weights": lambda: (
        *([torch.randn(shape)] for shape in ((64, 96), (48, 96), (64, 48), (64, 48))),
        [0, 0, 64, 0], [0.5], True, None,
    ),
    "orthonormalize": lambda: ([torch.randn(256, 48)], [basis(256, 40)]),
    "project_rows": lambda: ([torch.randn(64, 96)], [basis(96, 40)], [1.0], 2),
    "projected_adamw": lambda: (
        *([make(32, 96)] for make in (torch.randn, torch.randn, torch.randn, torch.rand)),
        [basis(96, 40)], [torch.tensor(1.0)], [1e-2], 0.9, 0.999, 1e-8, 0.01,
    ),
    "sketch_rows": lambda: (torch.zeros(48, 96), torch.randn(128, 96), torch.randn(128, 640), 0),
    "thin_matmul": lambda: (torch.randn(256, 96), torch.randn(48, 96), 1.0),
}  # fmt: skip


@EVERY_WAY
def test_products_that_autograd_follows_are_exact_too(faster):
    x, a, b = torch.randn(256, 96), torch.randn(48, 96, requires_grad=True), torch.randn(64, 48)

    def both():
        return thin_matmul(x, a), merge_weights([torch.zeros(64, 96)], [a], [b], scale=1.0)[0]

    expected = both()
    with faster():
        got = both()
    assert all(result.requires_grad for result in got)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@EVERY_WAY
def test_a_basis_is_checked_exactly(faster):
    """In bfloat16 the products of a good basis are 4e-3 off."""
    with faster():
        project_rows([torch.randn(4, 256)], [basis(256, 48)], check_basis=True)
        orthonormalize([torch.randn(256, 3)], [basis(256, 48)], check_basis=True)


@pytest.fixture(scope="module")
def seen():
    """What the reference of an op of its own finds set, call by call."""
    calls = []
    declare(
        "precision_reader(Tensor[] x) -> ()",
        reference=lambda x: calls.append(settings()),
        fake=lambda x: None,
        samples=lambda device, dtype: [],
    )
    yield calls
    del OPS["precision_reader"]


@EVERY_WAY
def test_every_reference_is_guarded_where_it_is_declared(seen, faster):
    """On any CPU, also one that has no bfloat16 to compute in."""
    seen.clear()
    with faster():
        torch.ops.keeplora.precision_reader([torch.ones(2)])
    (inside,) = seen
    assert inside["autocast"] is False
    assert {inside["cuda"], inside["mkldnn"]} <= {"ieee", "none"}


@EVERY_WAY
def test_what_was_set_is_restored_after_an_error(faster):
    with faster():
        before = settings()
        with suppress(ZeroDivisionError), full_precision(torch.ones(1)):
            with full_precision(torch.ones(1)):
                pass
            inside = settings()
            raise ZeroDivisionError
        assert settings() == before
    assert inside["autocast"] is False
    assert {inside["cuda"], inside["mkldnn"]} <= {"ieee", "none"}


def test_the_last_of_several_threads_restores():
    """The setting is one for the process: the first to leave must not hand it back under the other's feet."""
    torch.set_float32_matmul_precision("medium")
    entered, left, seen = threading.Event(), threading.Event(), []

    def other():
        with full_precision(torch.ones(1)):
            entered.set()
            left.wait(10)
            seen.append(settings()["mkldnn"])

    try:
        thread = threading.Thread(target=other)
        with full_precision(torch.ones(1)):
            thread.start()
            assert entered.wait(10)
        left.set()
        thread.join()
        assert seen == ["ieee"]
        assert torch.get_float32_matmul_precision() == "medium"
        assert settings()["mkldnn"] == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("moment", ["opens", "closes"])
def test_a_block_that_opens_or_closes_elsewhere_is_no_full_precision(moment, monkeypatch):
    """What it sets is seen, but goes with it: a caller that relied on it would compute in what was set before."""
    answers = []
    real = precision._matmul

    def watched(name):
        answers.append(is_full_precision())  # as another thread would ask, which takes no lock
        return real(name)

    torch.set_float32_matmul_precision("medium")
    try:
        if moment == "opens":
            monkeypatch.setattr(precision, "_matmul", watched)
        with full_precision(torch.ones(1)):
            monkeypatch.setattr(precision, "_matmul", watched)
        assert answers
        assert not any(answers)
        assert not is_full_precision()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert is_full_precision()


def test_a_block_that_closes_while_the_settings_are_read_is_noticed(monkeypatch):
    """In another thread, just after what it had set was seen."""
    real, read = precision._setting, []

    def reading(name, of):
        value = real(name, of)
        read.append(name)
        if len(read) == 2:
            monkeypatch.undo()
            block.__exit__(None, None, None)
        return value

    torch.set_float32_matmul_precision("medium")
    try:
        block = full_precision(torch.ones(1))
        block.__enter__()
        monkeypatch.setattr(precision, "_setting", reading)
        assert not is_full_precision()
        monkeypatch.undo()
        if len(read) < 2:
            block.__exit__(None, None, None)
        assert not is_full_precision()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert is_full_precision()


def test_this_cpu_shows_the_difference():
    """If it multiplies bfloat16, the tests above compare numbers that would differ; else they look at settings."""
    if not torch.cpu._is_amx_tile_supported():  # seen not to be rounded on a Zen 4, which has avx512_bf16 alone
        pytest.skip("torch rounds float32 to bfloat16 products on CPUs with AMX only")
    x = torch.randn(256, 256)
    exact = x @ x
    with FASTER["older"]():
        assert (x @ x - exact).abs().max() > 1e-2
