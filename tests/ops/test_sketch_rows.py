import pytest
import torch
from close import assert_rounded

from keeplora.ops import build_info, random_signs, sketch_rows

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def mix(h):
    """MurmurHash3's finalizer on Python integers."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def sign(seed, i, j):
    """Entry (i, j) from the documented rule, one number at a time."""
    state = mix(mix(seed & 0xFFFFFFFF) ^ (seed >> 32))
    return 1 - 2 * (mix(mix(state ^ i) ^ (j // 32)) >> (j % 32) & 1)


def sketched(delta, width, seed):
    psi = torch.tensor([[sign(seed, i, j) for j in range(delta.shape[1])] for i in range(width)], dtype=torch.float64)
    return psi.reshape(width, -1) @ delta.cpu().double().T / width**0.5


def exact(x, delta, width, seed):
    return sketched(delta, width, seed) @ x.cpu().double()


BACKENDS = ["op", "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


def sketch_on_gpu(x, delta, *, width, seed, out=None):
    assert "sketch_rows" in build_info()["kernels"]
    z = None if out is None else out.cuda()
    z = sketch_rows(x.cuda(), delta.cuda(), width=width, seed=seed, out=z).cpu()
    return z if out is None else out.copy_(z)


@pytest.fixture(params=BACKENDS)
def sketch(request):
    """The op as users call it, the CUDA kernel's source run on the CPU and, where there is one, on a GPU."""
    if request.param == "CUDA kernel":
        return sketch_on_gpu
    return sketch_rows if request.param == "op" else request.getfixturevalue("emulated").sketch_rows


def wide(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check(sketch, x, delta, width, seed):
    z = sketch(x, delta, width=width, seed=seed)
    assert z.dtype == wide(x.dtype, delta.dtype)
    expected = exact(x, delta, width, seed)
    if sketch is not sketch_rows and x.dtype == delta.dtype == torch.bfloat16:
        # The kernel rounds each number of Psi deltaᵀ to bfloat16. The errors are independent, their standard deviation
        # is at most 2**-8/√3, and over the tokens they add up as the root of the sum of squares: five of these.
        size = (sketched(delta, width, seed).square() @ x.double().square()).sqrt()
        assert ((z.double() - expected).abs() <= 5 * 2**-8 / 3**0.5 * size).all()
    else:  # a sum over outputs inside one over tokens: their rounding errors add
        assert_rounded(z, expected, terms=x.shape[0] + delta.shape[1], what="z")


# tokens, d_in, d_out, width: empty, one, odd, several tiles in each direction, several parts of the tokens
SHAPES = [(0, 4, 5, 3), (3, 0, 5, 2), (3, 4, 0, 2), (1, 1, 1, 1), (37, 31, 70, 16), (90, 8, 33, 5), (700, 150, 40, 70)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(sketch, dtype, shape):
    tokens, d_in, d_out, width = shape
    x, delta = (torch.randn(tokens, d).to(dtype) for d in (d_in, d_out))
    if x.numel() and delta.numel():
        check(sketch, x, delta, width, 2**40 + 7)
    else:
        assert torch.equal(sketch(x, delta, width=width, seed=1), torch.zeros(width, d_in, dtype=wide(dtype)))


def test_bfloat16_within_its_contract(sketch):
    x, delta = torch.randn(200, 60).bfloat16(), torch.randn(200, 50).bfloat16()
    expected = exact(x, delta, 40, 3)
    assert (sketch(x, delta, width=40, seed=3).double() - expected).norm() <= 3e-3 * expected.norm()


@pytest.mark.parametrize("delta_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_inputs_may_differ_in_dtype(sketch, x_dtype, delta_dtype):
    check(sketch, torch.randn(20, 9).to(x_dtype), torch.randn(20, 40).to(delta_dtype), 5, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_tokens_than_one_launch_takes(sketch, dtype):
    check(sketch, torch.randn(16700, 2).to(dtype), torch.randn(16700, 3).to(dtype), 2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_rank_one(sketch, dtype):
    x = torch.randn(50, 1).to(dtype).repeat(1, 20)
    delta = torch.randn(50, 1).to(dtype).repeat(1, 40)
    check(sketch, x, delta, 7, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_unaligned_inputs(sketch, dtype):
    x = torch.randn(24, 80).to(dtype).t()[:, ::2]  # [80, 12], neither dimension dense
    delta = torch.cat([torch.zeros(1), torch.randn(80 * 16)]).to(dtype)[1:].view(80, 16)
    assert delta.data_ptr() % 16 != 0
    check(sketch, x, delta, 6, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_gives_the_same_bits_in_any_order(emulated, dtype):
    x, delta = torch.randn(600, 70).to(dtype), torch.randn(600, 40).to(dtype)
    results = []
    for order, seed in (("sequential", 0), ("sequential", 0), ("reversed", 0), ("random", 1), ("random", 2)):
        emulated.set_schedule(order, seed)
        results.append(emulated.sketch_rows(x, delta, width=66, seed=4))
    emulated.set_schedule("sequential")
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_accumulates_over_batches(sketch):
    batches = [(torch.randn(n, 5), torch.randn(n, 40)) for n in (4, 9, 300)]
    z = sketch(*batches[0], width=6, seed=3)
    for batch in batches[1:]:
        assert sketch(*batch, width=6, seed=3, out=z) is z
    x, delta = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert_rounded(z, exact(x, delta, 6, 3), terms=353, what="z")


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
def test_signs_follow_the_documented_hash(device, seed):
    expected = torch.tensor([[sign(seed, i, j) for j in range(67)] for i in range(5)], dtype=torch.float32)
    assert torch.equal(random_signs(5, 67, seed=seed, device=device).cpu(), expected)


def test_signs_are_balanced_and_rows_independent():
    psi = random_signs(64, 4096, seed=5, dtype=torch.float64)
    # Means and inner products of n fair signs are within 5/sqrt(n) of 0 but for one case in 1e6.
    assert psi.mean().abs() < 5 / psi.numel() ** 0.5
    products = psi @ psi.T / 4096 - torch.eye(64, dtype=torch.float64)
    assert products.abs().max() < 5.5 / 4096**0.5
    columns = psi.T @ psi / 64 - torch.eye(4096, dtype=torch.float64)
    assert columns.square().mean() == pytest.approx(1 / 64, rel=0.05)
    assert not torch.equal(psi, random_signs(64, 4096, seed=6, dtype=torch.float64))


def test_sketch_keeps_the_rows_lengths():
    """E[ZᵀZ] = GᵀG: the sketch has the gradient's energy, to the accuracy of its width."""
    x, delta = torch.randn(50, 12), torch.randn(50, 600)
    gradient = delta.double().T @ x.double()
    z = sketch_rows(x, delta, width=512, seed=1).double()
    assert (z.norm() / gradient.norm()).item() == pytest.approx(1, abs=4 * (2 / 512) ** 0.5 / 2)


def test_compiles_in_one_graph(device):
    x, delta = torch.randn(7, 5, device=device), torch.randn(7, 40, device=device)
    call = torch.compile(lambda x, delta: sketch_rows(x, delta, width=3, seed=9), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x, delta), sketch_rows(x, delta, width=3, seed=9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0}, ValueError, r": width must .* got 0"),
        ({"seed": -1}, ValueError, r": seed must .* got -1"),
        ({"delta": torch.ones(3, 5)}, ValueError, r": delta must .*\bx, got \[3, 5\] .*\[2, 4\]"),
        ({"out": torch.ones(2, 5)}, ValueError, r": out must .*\[2, 4\].* got .*\[2, 5\]"),
        ({"out": torch.ones(2, 4).half()}, TypeError, r": out must .*float32, got torch.float16"),
    ],
)
def test_refuses_and_changes_nothing(options, error, message):
    arguments = {"delta": torch.ones(2, 5), "width": 2, "seed": 0, "out": torch.ones(2, 4)} | options
    before = arguments["out"].clone()
    with pytest.raises(error, match="^sketch_rows" + message):
        sketch_rows(torch.ones(2, 4), **arguments)
    assert torch.equal(arguments["out"], before)
