import pytest
import torch

from keeplora.ops import build_info, orthonormalize

ORTHOGONAL = 5e-6  # the documented bound in float32
EPS = torch.finfo(torch.float32).eps

BACKENDS = ["op", "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


def on_gpu(y, q=None):
    assert "orthonormalize" in build_info()["kernels"]
    z, rank = orthonormalize([m.cuda() for m in y], None if q is None else [m.cuda() for m in q])
    assert rank.device == z[0].device
    return [m.cpu() for m in z], rank.cpu()


@pytest.fixture(params=BACKENDS)
def columns(request):
    """The op as users call it, the CUDA kernel's source run on the CPU and, where there is one, on a GPU."""
    if request.param == "CUDA kernel":
        return on_gpu
    return orthonormalize if request.param == "op" else request.getfixturevalue("emulated").orthonormalize


@pytest.fixture(params=BACKENDS[1:])
def kernel(request):
    return on_gpu if request.param == "CUDA kernel" else request.getfixturevalue("emulated").orthonormalize


def conditioned(d, width, condition):
    """A float32 matrix with singular values from 1 down to 1/condition."""
    n = min(d, width)
    left, right = (torch.linalg.qr(torch.randn(s, n, dtype=torch.float64)).Q for s in (d, width))
    values = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), n, dtype=torch.float64)
    return (left * values @ right.T).float()


def check(z, rank, y, q, bound=ORTHOGONAL):
    """Orthonormal, orthogonal to q, zero from the rank on, and spanning what y adds to q."""
    rank, z64, q64, y64 = int(rank), z.cpu().double(), q.cpu().double(), y.cpu().double()
    assert z.shape == y.shape
    assert z.dtype == y.dtype
    kept = z64[:, :rank]
    assert torch.equal(z64[:, rank:], torch.zeros_like(z64[:, rank:]))
    if rank:
        assert (kept.T @ kept - torch.eye(rank, dtype=torch.float64)).abs().max() <= bound
    if rank and q.shape[1]:
        assert (q64.T @ kept).abs().max() <= bound
    both = torch.cat([q64, kept], 1)
    left = y64 - both @ (both.T @ y64)
    left = left - both @ (both.T @ left)
    # A dropped column leaves at most 32 eps of its length, plus what rounding leaves of any column.
    allowed = (32 + 2 * y.shape[0] ** 0.5) * torch.finfo(y.dtype).eps
    assert (left.norm(dim=0) <= allowed * y64.norm(dim=0)).all()


@pytest.mark.parametrize("condition", [1, 1e4, 1e6, 1e8], ids=str)
@pytest.mark.parametrize("shape", [(300, 24, 0), (300, 24, 100), (64, 64, 0), (50, 20, 30), (160, 12, 140)], ids=str)
def test_any_condition(columns, random_basis, shape, condition):
    d, width, k = shape
    y, q = conditioned(d, width, condition), random_basis(d, k)
    (z,), rank = columns([y], [q])
    check(z, rank[0], y, q)
    if condition <= 1e4:
        assert rank[0] == width


@pytest.mark.parametrize("condition", [1, 1e5], ids=str)
def test_more_columns_than_one_panel_of_the_kernel(columns, random_basis, condition):
    y, q = conditioned(170, 135, condition), random_basis(170, 30)
    (z,), rank = columns([y], [q])
    assert rank.tolist() == [135]
    check(z, rank[0], y, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dependent_columns_are_dropped(columns, random_basis, dtype):
    q = random_basis(40, 10, dtype)
    y = torch.randn(40, 9, dtype=dtype)
    y[:, 0] = 0
    y[:, 3] = y[:, 2]
    y[:, 5] = 2 * y[:, 1] - y[:, 4]
    y[:, 7] = q @ torch.randn(10, dtype=dtype)
    (z,), rank = columns([y], [q])
    assert rank.tolist() == [5]
    check(z, rank[0], y, q, ORTHOGONAL if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank(columns, random_basis, dtype):
    """Far more columns than directions; the dependent ones lie between and behind the others."""
    y = torch.randn(90, 7, dtype=dtype) @ torch.randn(7, 80, dtype=dtype)
    y[:, 2] = y[:, 1]
    q = random_basis(90, 3, dtype)
    (z,), rank = columns([y], [q])
    assert rank.tolist() == [7]
    check(z, rank[0], y, q, ORTHOGONAL if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(("part", "kept"), [(8, False), (128, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_left_decides(columns, random_basis, dtype, part, kept):
    """Columns that differ from earlier ones, and from Q, by a few eps of their length."""
    basis = random_basis(400, 8, dtype)
    q, a, b, c, e = basis[:, :4], *basis[:, 4:].T
    small = part * torch.finfo(dtype).eps
    y = torch.stack([a, a + small * b, q.sum(1) / 2 + small * c, (a + q[:, 0]) / 2**0.5 + small * e], 1)
    (z,), rank = columns([y], [q.contiguous()])
    assert rank.tolist() == [4 if kept else 1]
    check(z, rank[0], y, q, ORTHOGONAL if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("part", [1e-2, 2e-3, 1e-4], ids=str)
def test_columns_that_lie_nearly_in_q(columns, random_basis, part):
    """What rounding left of q in them is 1 / part times larger in unit columns."""
    basis = random_basis(420, 92)
    q, others = basis[:, :80].contiguous(), basis[:, 80:]
    y = q @ torch.randn(80, 12) / 80**0.5 + part * others
    (z,), rank = columns([y], [q])
    assert rank.tolist() == [12]
    check(z, rank[0], y, q)


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4], ids=str)
def test_later_columns_along_a_badly_determined_direction(columns, random_basis, gap):
    """The second column's direction is known to eps / gap only, and the third is mostly that direction."""
    a, b, c, e = random_basis(200, 4).T
    y = torch.stack([a, a + gap * b, b + c, b + 2 * c + e], 1)
    (z,), rank = columns([y])
    assert rank.tolist() == [4]
    check(z, rank[0], y, torch.zeros(200, 0))


def test_structured_columns(columns):
    """Unit vectors, where a factorisation that fills gaps with arbitrary directions loses the later ones."""
    eye = torch.eye(6)
    y = torch.stack([torch.zeros(6), eye[0], eye[0], eye[1], eye[0] + eye[1], eye[5]], 1)
    (z,), rank = columns([y])
    assert rank.tolist() == [3]
    assert torch.equal(z.abs(), torch.stack([eye[0], eye[1], eye[5], *torch.zeros(3, 6)], 1))


@pytest.mark.parametrize("size", [12, 30])
def test_column_lengths_do_not_matter(columns, random_basis, size):
    q = random_basis(50, 6)
    y = torch.randn(50, 8) * torch.logspace(-size, size, 8)
    (z,), rank = columns([y], [q])
    assert rank.tolist() == [8]
    check(z, rank[0], y, q)


def test_denormal_columns_are_as_good_as_others(random_basis):
    q, y = random_basis(50, 6), torch.randn(50, 8) * 2.0**-135
    (z,), rank = orthonormalize([y], [q])
    (same,), _ = orthonormalize([(y.double() * 2.0**135).float()], [q])
    assert rank.tolist() == [8]
    assert torch.equal(z, same)


def test_ragged_group_and_edges(columns, random_basis):
    shapes = [(5, 3, 2), (4, 7, 1), (6, 2, 6), (3, 0, 1), (8, 1, 0), (1, 1, 0), (5, 4, 2), (0, 2, 0)]
    y = [torch.randn(d, width) for d, width, _ in shapes]
    q = [random_basis(d, k) for d, _, k in shapes]
    z, rank = columns(y, q)
    assert rank.dtype == torch.int64
    assert rank.tolist() == [3, 3, 0, 0, 1, 1, 3, 0]  # never more than the room that is left
    for i in range(len(shapes)):
        check(z[i], rank[i], y[i], q[i])


def test_no_problems():
    z, rank = orthonormalize([])
    assert z == []
    assert (rank.shape, rank.dtype) == ((0,), torch.int64)


def test_a_thousand_problems(columns, random_basis):
    y = [torch.randn(7, 1 + i % 3) for i in range(1000)]
    q = [random_basis(7, 5 if i % 6 == 0 else 0) for i in range(1000)]
    z, rank = columns(y, q)
    assert rank.tolist() == [min(1 + i % 3, 7 - m.shape[1]) for i, m in enumerate(q)]
    for i in range(1000):
        check(z[i], rank[i], y[i], q[i])


def test_float64(columns, random_basis):
    y, q = torch.randn(60, 12, dtype=torch.float64), random_basis(60, 20, torch.float64)
    (z,), rank = columns([y], [q])
    assert rank.tolist() == [12]
    check(z, rank[0], y, q, 1e-14)


def test_strided_and_unaligned_input(columns, random_basis):
    strided = torch.randn(12, 80).t()[::2]
    unaligned = torch.randn(1 + 40 * 12)[1:].view(40, 12)
    assert unaligned.data_ptr() % 16 != 0
    basis = random_basis(40, 8)
    for y, q in ((strided, basis), (unaligned, basis), (unaligned, basis.t().contiguous().t())):
        (z,), rank = columns([y], [q])
        assert rank.tolist() == [12]
        check(z, rank[0], y, q)
        assert z.is_contiguous()


@pytest.mark.parametrize("where", ["y", "q"])
def test_kernel_ends_without_finite_numbers(kernel, random_basis, where):
    y, q = torch.randn(20, 70), random_basis(20, 3)
    (y if where == "y" else q)[4, 1] = float("nan")
    _, rank = kernel([y, torch.full((5, 3), float("inf"))], [q, torch.zeros(5, 0)])
    assert ((rank >= 0) & (rank <= torch.tensor([20, 3]))).all()


def test_kernel_gives_the_same_bits_in_any_order(emulated, random_basis):
    y = [conditioned(130, 40, 1e7), torch.randn(31, 9), torch.randn(6, 3).repeat_interleave(2, 1)]
    q = [random_basis(130, 20), random_basis(31, 4), random_basis(6, 0)]
    results = []
    for order, seed in (("sequential", 0), ("sequential", 0), ("reversed", 0), ("random", 1), ("random", 2)):
        emulated.set_schedule(order, seed)
        z, rank = emulated.orthonormalize(y, q)
        results.append([*z, rank])
    emulated.set_schedule("sequential")
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_takes_no_gradient():
    (z,), _ = orthonormalize([torch.randn(5, 2, requires_grad=True)])
    assert not z.requires_grad


def test_compiles_in_one_graph(device):
    y = torch.randn(9, 3, device=device)
    call = torch.compile(lambda y: orthonormalize([y]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(y), orthonormalize([y]))


@pytest.mark.parametrize(
    ("y", "q", "error", "message"),
    [
        (torch.zeros(3, 2), None, TypeError, r": y must .*\[y\]"),
        ([torch.zeros(3)], None, ValueError, r": y\[0\] must .* got .*\[3\]"),
        ([torch.zeros(3, 2)], [], ValueError, r": q must .*\by, got 0 for 1"),
        ([torch.zeros(3, 2)], [torch.zeros(4, 1)], ValueError, r": q\[0\] must .*y\[0\], got \[4, 1\] for \[3, 2\]"),
        (
            [torch.zeros(3, 2)],
            [torch.zeros(3, 1).double()],
            TypeError,
            r": q\[0\] must .*y\[0\], got torch.float64 .* for torch.float32",
        ),
        ([torch.zeros(3, 2).bfloat16()], None, TypeError, r": y\[0\] must .* got torch.bfloat16"),
    ],
)
def test_refuses(y, q, error, message):
    with pytest.raises(error, match="^orthonormalize" + message):
        orthonormalize(y, q)
