import pytest
import torch
from close import assert_rounded
from guarded import at_the_end_of_memory
from ops.conftest import has_cpu_kernel

from keeplora.ops import build_info, thin_matmul

pytestmark = pytest.mark.usefixtures("every_level")

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# n, k, r: one element, nothing, nothing to sum, no rows of a; one less and one more than a tile, a panel, a strip and
# a block of either kernel; LoRA's sizes; more rows of a than a tile has.
SIZES = [
    (1, 1, 1), (0, 5, 2), (4, 0, 3), (6, 7, 0), (5, 3, 2), (7, 17, 15), (48, 16, 16), (49, 15, 17), (23, 33, 5),
    (25, 511, 4), (96, 513, 31), (300, 129, 64), (1, 40, 3), (40, 1, 3), (2048, 96, 16), (96, 2048, 16),
    (57, 600, 40), (9, 20, 90),
]  # fmt: skip
LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.T.contiguous().T,
    "rows of a wider matrix": lambda x: torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :],
    "columns of a wider matrix": lambda x: torch.cat([torch.full_like(x, torch.nan), x]).T.contiguous().T[len(x) :],
    "neither": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2)[..., 0],
}


def exact(x, a, scale):
    return scale * torch.einsum("nk,rk->nr", x.detach().cpu().double(), a.detach().cpu().double())


def check(x, a, scale):
    product = thin_matmul(x, a, scale=scale)
    assert product.dtype == (torch.float64 if torch.float64 in (x.dtype, a.dtype) else torch.float32)
    assert product.device == x.device
    assert product.is_contiguous()
    assert_rounded(product, exact(x, a, scale), terms=x.shape[1], what="product")


def test_there_is_a_kernel_for_the_cpu():
    assert has_cpu_kernel("thin_matmul")
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("keeplora::thin_matmul", "CPU")
    assert registered == (not build_info()["without_cpu"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_float64(device, dtype, size, layout):
    n, k, r = size
    x, a = torch.randn(n, k, device=device, dtype=dtype), torch.randn(r, k, device=device, dtype=dtype)
    check(layout(x), a, 1.0)
    check(layout(x), layout(a), -0.75)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtypes", [(x, a) for x in FLOATS for a in FLOATS], ids=str)
def test_x_and_a_have_dtypes_of_their_own(device, dtypes, layout):
    x, a = torch.randn(70, 40, device=device).to(dtypes[0]), torch.randn(3, 40, device=device).to(dtypes[1])
    check(LAYOUTS[layout](x), a, 0.5)


def test_broadcast_inputs(device):
    """As the gradient of a sum is: every stride is zero."""
    x, a = torch.ones((), device=device).expand(30, 20), torch.randn(4, 20, device=device)
    check(x, a, 1.0)
    check(torch.randn(9, 20, device=device), a[:1].expand(5, 20), 1.0)


def test_long_sums_are_summed_in_blocks(device):
    """64 and 2^18 times 2^-20: added one by one to a float of 64, none of them would count."""
    x = torch.full((2, 1 + (1 << 18)), 2.0**-20, device=device)
    x[:, 0] = 64.0
    for layout in ("rows", "columns"):
        product = thin_matmul(LAYOUTS[layout](x), torch.ones_like(x))
        torch.testing.assert_close(product, torch.full_like(product, 64.25), rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_threads_do_not_change_a_bit(layout):
    x, a = LAYOUTS[layout](torch.randn(3000, 700)), torch.randn(16, 700)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = thin_matmul(x, a)
        torch.set_num_threads(4)
        together = thin_matmul(x, a)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_not_a_number_stays_where_it_is(device):
    x, a = torch.ones(13, 5, device=device), torch.ones(3, 5, device=device)
    x[4, 2], a[1, 0] = torch.inf, torch.nan
    for layout in ("rows", "columns"):
        product = thin_matmul(LAYOUTS[layout](x), a)
        expected = torch.full((13, 3), 5.0, device=device)
        expected[4], expected[:, 1] = torch.inf, torch.nan
        assert torch.equal(product.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("size", [(13, 29, 5), (24, 16, 16), (7, 100, 17), (100, 7, 3), (49, 51, 4)], ids=str)
def test_reads_nothing_beyond_its_inputs(size):
    """Under a bug the process ends here."""
    n, k, r = size
    check(at_the_end_of_memory(n, k, torch.float32), at_the_end_of_memory(r, k, torch.float32), 1.0)


def test_gradients(device):
    x = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    a = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: thin_matmul(x, a, scale=-0.5), (x, a))
    half = x.detach().bfloat16().requires_grad_()
    thin_matmul(half, a.detach().float()).sum().backward()
    assert half.grad.dtype == torch.bfloat16
