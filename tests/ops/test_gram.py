import pytest
import torch
from close import assert_rounded
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from keeplora.ops import gram
from keeplora.ops.declare import OPS

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exact(*batches):
    x = torch.cat([batch.cpu().double() for batch in batches])
    return torch.einsum("ti,tj->ij", x, x), (x * x).sum()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (37, 31), (500, 24), (5000, 7), (200, 517)], ids=str)
def test_matches_float64(device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    c, energy = gram(x)
    exact_c, exact_energy = exact(x)
    assert (c.dtype, energy.dtype) == (torch.float64 if dtype == torch.float64 else torch.float32, torch.float64)
    assert_rounded(c, exact_c, terms=shape[0], what="c")
    terms_eps = torch.finfo(c.dtype).eps * (shape[1] ** 0.5 + 2)  # rows are summed in the dtype of c
    assert abs(energy.item() - exact_energy.item()) <= terms_eps * exact_energy.item()


def test_accumulates_over_batches(device):
    batches = [torch.randn(n, 6, device=device) for n in (3, 0, 11)]
    c, energy = gram(batches[0])
    for batch in batches[1:]:
        again = gram(batch, out=c, energy=energy)
        assert again[0] is c
        assert again[1] is energy
    exact_c, exact_energy = exact(*batches)
    assert_rounded(c, exact_c, terms=17, what="c")
    assert_rounded(energy.float(), exact_energy, terms=6, what="energy")


def test_adds_to_any_matrix(device):
    """Also to one that is not symmetric, where products form one half of the moment only."""
    before, x = torch.randn(530, 530, device=device), torch.randn(300, 530, device=device)
    c, _ = gram(x, out=before.clone())
    assert_rounded(c, exact(x)[0] + before.cpu().double(), terms=301, what="c")


class Allocations(TorchDispatchMode):
    """The names of the ops that run, and the most elements of a tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        if isinstance(result, torch.Tensor) and func._schema.returns[0].alias_info is None:  # not a view, nor in place
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_input_is_not_widened_as_a_whole(dtype):
    x = torch.randn(20000, 4).to(dtype)
    with Allocations() as seen:
        OPS["gram"].reference(torch.zeros(4, 4), torch.zeros((), dtype=torch.float64), x)
    assert 4 <= seen.largest <= 2048 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_input_is_multiplied_as_it_is_on_a_gpu(dtype):
    """What runs there, on tensors without data; the numbers are those of test_matches_float64 where there is a GPU."""
    with FakeTensorMode():
        x = torch.empty(5000, 4, dtype=dtype, device="cuda")
        out, energy = torch.empty(4, 4, device="cuda"), torch.empty((), dtype=torch.float64, device="cuda")
        with Allocations() as seen:
            OPS["gram"].reference(out, energy, x)
    assert seen.ops.count("aten.addmm.dtype_out") == 3
    assert seen.largest <= 2048  # norms of rows


def test_strided_input(device):
    x = torch.randn(8, 20, device=device).t()[::2]
    assert_rounded(gram(x)[0], exact(x)[0], terms=10, what="c")


def test_takes_no_gradient(device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    c, energy = gram(x)
    assert not c.requires_grad
    assert not energy.requires_grad


def test_compiles_in_one_graph(device):
    x = torch.randn(7, 5, device=device)

    def twice(x):
        c, energy = gram(x)
        return gram(x, out=c, energy=energy)

    torch.testing.assert_close(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out": torch.ones(3, 3)}, ValueError, r": out must .*\[4, 4\].* got .*\[3, 3\]"),
        ({"out": torch.ones(4, 8)[:, ::2]}, ValueError, r": out must .* got .*strides \[8, 2\]"),
        ({"out": torch.ones(4, 4).double()}, TypeError, r": out must .*float32, got torch.float64"),
        ({"energy": torch.ones(())}, TypeError, r": energy must .*float64, got torch.float32"),
        ({"energy": torch.ones(1).double()}, ValueError, r": energy must .* got .*\[1\]"),
    ],
)
def test_refuses_and_changes_nothing(options, error, message):
    accumulators = {"out": torch.ones(4, 4), "energy": torch.ones(()).double()} | options
    before = {name: value.clone() for name, value in accumulators.items()}
    with pytest.raises(error, match="^gram" + message):
        gram(torch.ones(2, 4), **accumulators)
    assert all(torch.equal(accumulators[name], before[name]) for name in before)
