import pytest
import torch
from close import assert_rounded

from keeplora.ops import build_info, project_rows

# rows, d, k: one row, odd sizes, no basis, several chunks of columns, more rows than a block owns.
SHAPES = [(1, 1, 0), (3, 31, 8), (1, 96, 40), (9, 33, 0), (16, 100, 47), (20, 160, 64), (8, 768, 300)]


def exact_projection(g, q, scale, passes):
    """From the definition, with the projector formed as a matrix, in float64."""
    g, q = g.detach().cpu().double(), q.detach().cpu().double()
    projector = torch.eye(q.shape[0], dtype=torch.float64) - q @ q.T
    rows = scale * g @ torch.linalg.matrix_power(projector, passes)
    length = rows.norm()
    return rows, (rows @ q).norm() / length if length > 0 else torch.zeros((), dtype=torch.float64)


BACKENDS = ["op", "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


def project_on_gpu(g, q, scale, passes):
    assert "project_rows" in build_info()["kernels"]
    rows, leak = project_rows([m.cuda() for m in g], [m.cuda() for m in q], scale=scale, passes=passes)
    return [m.cpu() for m in rows], leak.cpu()


@pytest.fixture(params=BACKENDS)
def project(request):
    """The op as users call it, the CUDA kernel's source run on the CPU and, where there is one, on a GPU."""
    if request.param == "CUDA kernel":
        return project_on_gpu
    if request.param == "op":
        return lambda g, q, scale, passes: project_rows(g, q, scale=scale, passes=passes)
    return request.getfixturevalue("emulated").project_rows


def check(result, g, q, scale, passes):
    rows, leak = result
    for i, (matrix, basis) in enumerate(zip(g, q, strict=True)):
        exact, _ = exact_projection(matrix, basis, scale[i], passes)
        d, k = basis.shape
        size = (scale[i] * matrix).abs().max() if matrix.numel() else 0  # what is left may be much smaller
        assert_rounded(rows[i], exact, terms=passes * (d + k), what=f"rows[{i}]", size=size)
        bound = 3e-6 if passes == 1 else 5e-7
        assert leak[i] <= bound if matrix.dtype == torch.float32 else leak[i] <= bound * 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(project, random_basis, shape, passes, dtype):
    r, d, k = shape
    g, q = [torch.randn(r, d, dtype=dtype)], [random_basis(d, k, dtype)]
    check(project(g, q, [0.7], passes), g, q, [0.7], passes)


def test_ragged_group(project, random_basis):
    g = [torch.randn(r, d) for r, d, _ in SHAPES]
    q = [random_basis(d, k) for _, d, k in SHAPES]
    scale = torch.linspace(-1, 2, len(g)).tolist()
    check(project(g, q, scale, 2), g, q, scale, 2)


@pytest.mark.parametrize("passes", [1, 2])
def test_basis_that_is_not_orthonormal(project, random_basis, passes):
    """Much is left then, and a second pass changes much, so rows and leak can be compared digit by digit."""
    g, q = [torch.randn(5, 40), torch.randn(11, 77)], [0.8 * random_basis(40, 10), 0.5 * random_basis(77, 30)]
    scale = [1.0, 3.0]
    rows, leak = project(g, q, scale, passes)
    exact = [exact_projection(a, b, c, passes) for a, b, c in zip(g, q, scale, strict=True)]
    for i in range(2):
        assert exact[i][1] > 0.02
        assert_rounded(rows[i], exact[i][0], terms=passes * 120, what=f"rows[{i}]")
    assert_rounded(leak, torch.stack([inside for _, inside in exact]), terms=120, what="leak")


def test_second_pass_repairs_what_the_first_leaves(project, random_basis):
    """One free direction of 130: what is left is small beside G, so one pass leaks more."""
    g, q = [torch.randn(2, 130)], [random_basis(130, 129)]
    once, twice = (project(g, q, [1.0], passes)[1].item() for passes in (1, 2))
    assert twice <= 5e-7 < once


def test_full_basis_leaves_rounding_only(project, random_basis):
    g, q = [torch.randn(4, 24)], [random_basis(24, 24)]
    rows, _ = project(g, q, [1.0], 2)
    assert rows[0].abs().max() <= 8 * torch.finfo(torch.float32).eps * g[0].abs().max()


def test_nothing_to_project(project, random_basis):
    g, q = [torch.zeros(3, 8), torch.zeros(0, 8), torch.randn(3, 8)], [random_basis(8, 2)] * 3
    rows, leak = project(g, q, [1.0, 1.0, 0.0], 2)
    assert torch.equal(rows[0], g[0])
    assert rows[1].shape == (0, 8)
    assert torch.equal(rows[2], torch.zeros(3, 8))
    assert torch.equal(leak, torch.zeros(3))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_leak_does_not_depend_on_the_size_of_numbers(project, random_basis, size):
    """Squares of float32 end at 1.8e19: a leak of infinity over infinity, or of nothing over infinity."""
    g, q = torch.randn(9, 100), random_basis(100, 40) * 1.25  # not orthonormal: the leak is no rounding
    exact = exact_projection(g * size, q, 1.0, 1)
    (rows,), leak = project([g * size], [q], [1.0], 1)
    assert_rounded(leak[0], exact[1], terms=200, what="leak")
    assert_rounded(rows / size, exact[0] / size, terms=400, what="rows")


@pytest.mark.parametrize("where", ["g", "q"])
def test_the_leak_of_what_is_no_number_is_none(project, random_basis, where):
    """Never 0, the leak of a promise that was kept."""
    g, q = torch.randn(9, 100), random_basis(100, 40)
    (g if where == "g" else q)[1, 1] = float("nan")
    assert project([g], [q], [1.0], 2)[1].isnan().all()


def test_no_problems():
    rows, leak = project_rows([], [])
    assert rows == []
    assert leak.shape == (0,)


def test_a_thousand_problems(project, random_basis):
    g = [torch.randn(1 + i % 3, 6) for i in range(1000)]
    q = [random_basis(6, i % 4) for i in range(1000)]
    scale = [1.0] * 1000
    check(project(g, q, scale, 1), g, q, scale, 1)


def test_a_basis_wider_than_one_panel(project, random_basis):
    g, q = [torch.randn(2, 1300)], [random_basis(1300, 1100)]
    check(project(g, q, [1.0], 1), g, q, [1.0], 1)


def test_strided_and_unaligned_inputs(project, random_basis):
    g = torch.randn(24, 12).t()[:, ::2]  # [12, 12], neither dimension dense
    q = random_basis(12, 4)
    unaligned = torch.cat([torch.zeros(1), g.flatten()])[1:].view(12, 12)
    assert unaligned.data_ptr() % 16 != 0
    for matrix, basis in ((g, q), (unaligned, q), (g, q.t().contiguous().t())):
        check(project([matrix], [basis], [1.0], 2), [matrix], [basis], [1.0], 2)


def test_long_rows_in_the_kernel(emulated, random_basis):
    g, q = [torch.randn(1, 16384)], [random_basis(16384, 3)]
    (rows,), leak = emulated.project_rows(g, q, [1.0], 1)
    wide, basis = g[0].double(), q[0].double()  # the projector itself would take 2 GB
    assert_rounded(rows, wide - (wide @ basis) @ basis.T, terms=16384, what="rows")
    assert leak[0] <= 3e-6


def test_kernel_gives_the_same_bits_in_any_order(emulated, random_basis):
    g, q = [torch.randn(9, 130), torch.randn(3, 31)], [random_basis(130, 40), random_basis(31, 8)]
    results = []
    for order, seed in (("sequential", 0), ("reversed", 0), ("random", 1), ("random", 2)):
        emulated.set_schedule(order, seed)
        rows, leak = emulated.project_rows(g, q, [1.0, 0.5], 2)
        results.append([*rows, leak])
    emulated.set_schedule("sequential")
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("passes", [1, 2])
def test_gradient(device, random_basis, passes):
    # Not orthonormal, so that one pass and two have different gradients.
    q = [0.8 * random_basis(6, 2, torch.float64).to(device), random_basis(5, 0, torch.float64).to(device)]
    g = [torch.randn(n, d, dtype=torch.float64, device=device, requires_grad=True) for n, d in ((3, 6), (2, 5))]
    assert torch.autograd.gradcheck(lambda *g: tuple(project_rows(g, q, scale=[0.3, 2.0], passes=passes)[0]), g)


def test_compiles_in_one_graph(device, random_basis):
    q = random_basis(6, 2).to(device)
    compiled = torch.compile(lambda g: project_rows([g], [q], scale=0.5), fullgraph=True, backend="aot_eager")
    g = torch.randn(3, 6, device=device)
    torch.testing.assert_close(compiled(g), project_rows([g], [q], scale=0.5))


@pytest.mark.parametrize(
    ("g", "q", "options", "error", "message"),
    [
        (torch.zeros(2, 3), [], {}, TypeError, r": g must .* got a single tensor.*\[g\]"),
        ([torch.zeros(3)], [torch.zeros(3, 1)], {}, ValueError, r": g\[0\] must .* got .*\[3\]"),
        ([torch.zeros(2, 3)], [], {}, ValueError, r": q must .*\bg, got 0 for 1"),
        (
            [torch.zeros(2, 3)],
            [torch.zeros(4, 1)],
            {},
            ValueError,
            r": q\[0\] must .*g\[0\].* got \[4, 1\] for \[2, 3\]",
        ),
        (
            [torch.zeros(2, 3).half()],
            [torch.zeros(3, 1)],
            {},
            TypeError,
            r": g\[0\] must .*float32, float64, got torch.float16",
        ),
        (
            [torch.zeros(2, 3)],
            [torch.zeros(3, 1).double()],
            {},
            TypeError,
            r": q must .*\bg, got torch.float64 .* for torch.float32",
        ),
        ([torch.zeros(2, 3)], [torch.zeros(3, 1)], {"passes": 3}, ValueError, r": passes must .* got 3"),
        ([torch.zeros(2, 3)], [torch.zeros(3, 1)], {"scale": [1.0, 2.0]}, ValueError, r": scale must .* got 2 for 1"),
        ([torch.zeros(2, 3)], [torch.zeros(3, 1)], {"scale": float("nan")}, ValueError, r": scale must .* got nan"),
    ],
)
def test_refuses(g, q, options, error, message):
    with pytest.raises(error, match="^project_rows" + message):
        project_rows(g, q, **options)
