import pytest
import torch

from keeplora.ops import orthonormalize

ORTHOGONAL = 5e-6  # the documented bound in float32
EPS = torch.finfo(torch.float32).eps


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
@pytest.mark.parametrize("shape", [(300, 24, 0), (300, 24, 100), (64, 64, 0), (50, 20, 30), (768, 32, 700)], ids=str)
def test_any_condition(device, random_basis, shape, condition):
    d, width, k = shape
    y, q = conditioned(d, width, condition).to(device), random_basis(d, k).to(device)
    (z,), rank = orthonormalize([y], [q])
    check(z, rank[0], y, q)
    if condition <= 1e4:
        assert rank[0] == width


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dependent_columns_are_dropped(device, random_basis, dtype):
    q = random_basis(40, 10, dtype).to(device)
    y = torch.randn(40, 9, dtype=dtype, device=device)
    y[:, 0] = 0
    y[:, 3] = y[:, 2]
    y[:, 5] = 2 * y[:, 1] - y[:, 4]
    y[:, 7] = q @ torch.randn(10, dtype=dtype, device=device)
    (z,), rank = orthonormalize([y], [q])
    assert rank.tolist() == [5]
    check(z, rank[0], y, q, ORTHOGONAL if dtype == torch.float32 else 1e-14)


def test_structured_columns():
    """Unit vectors, where a factorisation that fills gaps with arbitrary directions loses the later ones."""
    eye = torch.eye(6)
    y = torch.stack([torch.zeros(6), eye[0], eye[0], eye[1], eye[0] + eye[1], eye[5]], 1)
    (z,), rank = orthonormalize([y])
    assert rank.tolist() == [3]
    assert torch.equal(z.abs(), torch.stack([eye[0], eye[1], eye[5], *torch.zeros(3, 6)], 1))


def test_column_lengths_do_not_matter():
    y = torch.randn(50, 8) * torch.logspace(-12, 12, 8)
    (z,), rank = orthonormalize([y])
    assert rank.tolist() == [8]
    check(z, rank[0], y, torch.zeros(50, 0))


def test_ragged_group_and_edges(device, random_basis):
    shapes = [(5, 3, 2), (4, 7, 1), (6, 2, 6), (3, 0, 1), (8, 1, 0), (1, 1, 0), (5, 4, 2)]
    y = [torch.randn(d, width, device=device) for d, width, _ in shapes]
    q = [random_basis(d, k).to(device) for d, _, k in shapes]
    z, rank = orthonormalize(y, q)
    assert (rank.dtype, rank.device) == (torch.int64, y[0].device)
    assert rank.tolist() == [3, 3, 0, 0, 1, 1, 3]  # never more than the room that is left
    for i in range(len(shapes)):
        check(z[i], rank[i], y[i], q[i])
    assert [t.shape for t in orthonormalize([])[0]] == []


def test_float64(random_basis):
    y, q = torch.randn(60, 12, dtype=torch.float64), random_basis(60, 20, torch.float64)
    (z,), rank = orthonormalize([y], [q])
    assert rank.tolist() == [12]
    check(z, rank[0], y, q, 1e-14)


def test_strided_input(device):
    y = torch.randn(12, 80, device=device).t()[::2]
    (z,), rank = orthonormalize([y])
    check(z, rank[0], y, torch.zeros(40, 0))
    assert z.is_contiguous()


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
        (torch.zeros(3, 2), None, TypeError, r"y must be a sequence of matrices"),
        ([torch.zeros(3)], None, ValueError, r"y\[0\] must be a matrix"),
        ([torch.zeros(3, 2)], [], ValueError, r"q must have one item for each of y, got 0 for 1"),
        ([torch.zeros(3, 2)], [torch.zeros(4, 1)], ValueError, r"q\[0\] must have the rows of y\[0\], got \[4, 1\]"),
        ([torch.zeros(3, 2)], [torch.zeros(3, 1).double()], TypeError, r"q\[0\] must have the dtype and device"),
        ([torch.zeros(3, 2).bfloat16()], None, TypeError, r"got torch.bfloat16"),
    ],
)
def test_refuses(y, q, error, message):
    with pytest.raises(error, match=message):
        orthonormalize(y, q)
