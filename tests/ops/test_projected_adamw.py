import pytest
import torch
from close import assert_rounded

from keeplora.ops import build_info, projected_adamw

OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


BACKENDS = ["op", "emulated kernel"] + (["CUDA kernel"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The op as users call it, its kernel run on the CPU and, where there is one, on a GPU; and the device."""
    if request.param == "emulated kernel":
        return request.getfixturevalue("emulated").projected_adamw, "cpu"
    if request.param == "CUDA kernel":
        assert "projected_adamw" in build_info()["kernels"]
        return projected_adamw, "cuda"
    return projected_adamw, "cpu"


class ExactAdamW:
    """From the papers' formulas with the projector as a matrix, in float64."""

    def __init__(self, a, q):
        self.a = a.cpu().double().clone()  # the op overwrites a
        q = q.cpu().double()
        self.projector = torch.eye(q.shape[0], dtype=torch.float64) - q @ q.T
        self.m, self.v, self.t = torch.zeros_like(self.a), torch.zeros_like(self.a), 0
        self.size = self.a.abs().max() if self.a.numel() else torch.zeros(())

    def step(self, grad, lr, betas, eps, weight_decay):
        g = grad.cpu().double() @ self.projector
        self.t += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * g
        self.v = betas[1] * self.v + (1 - betas[1]) * g * g
        m_hat, v_hat = self.m / (1 - betas[0] ** self.t), self.v / (1 - betas[1] ** self.t)
        # Adam divides by a denominator that may be small: what a rounding of g becomes in a, per row.
        self.size = self.size + lr * g.abs().amax(1, keepdim=True) * (1 / (v_hat.sqrt() + eps)).norm(
            dim=1, keepdim=True
        )
        self.a = (self.a - lr * weight_decay * self.a - lr * m_hat / (v_hat.sqrt() + eps)) @ self.projector


def make(shapes, random_basis, device, dtype=torch.float32):
    q = [random_basis(d, k, dtype).to(device) for _, d, k in shapes]
    a = [torch.randn(r, d, dtype=dtype, device=device) for r, d, _ in shapes]
    a = [m - m @ basis @ basis.T for m, basis in zip(a, q, strict=True)]
    return a, q, [torch.zeros_like(m) for m in a], [torch.zeros_like(m) for m in a]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_float64_step_by_step(backend, random_basis, dtype, grad_dtype):
    adamw, device = backend
    shapes = [(4, 33, 8), (1, 7, 0), (16, 96, 60), (0, 5, 2), (20, 130, 70)]
    a, q, m, v = make(shapes, random_basis, device, dtype)
    exact = [ExactAdamW(p, basis) for p, basis in zip(a, q, strict=True)]
    lr = [1e-2, 1e-3, 5e-2, 1.0, 1e-2]
    for step in range(1, 6):
        grad = [torch.randn_like(p).to(grad_dtype) for p in a]
        leak = adamw(a, grad, m, v, q, step=step, lr=lr, **OPTIONS)
        for i, reference in enumerate(exact):
            reference.step(grad[i], lr[i], **OPTIONS)
            # Each step rounds once more; the projections sum d and k products.
            terms = step * sum(shapes[i][1:])
            assert_rounded(a[i], reference.a, terms=terms, what=f"a[{i}], step {step}", size=reference.size)
            assert_rounded(m[i], reference.m, terms=terms, what=f"exp_avg[{i}]")
            assert_rounded(v[i], reference.v, terms=4 * terms, what=f"exp_avg_sq[{i}]")
        assert (leak <= 1e-6).all()


def test_full_basis_leaves_rounding_only(backend, random_basis):
    adamw, device = backend
    a, grad = torch.randn(3, 12, device=device), torch.randn(3, 12, device=device)
    size = 1 + a.abs().max()  # Adam makes steps of lr = 1 from rounding, too
    adamw([a], [grad], [torch.zeros_like(a)], [torch.zeros_like(a)], [random_basis(12, 12).to(device)], step=1, lr=1.0)
    assert a.abs().max() <= 8 * torch.finfo(torch.float32).eps * size


def test_is_adamw_without_a_basis(backend):
    adamw, device = backend
    a = torch.randn(3, 5, device=device)
    other = torch.nn.Parameter(a.clone())
    optimizer = torch.optim.AdamW([other], lr=1e-2, **OPTIONS)
    m, v, q = torch.zeros_like(a), torch.zeros_like(a), torch.zeros(5, 0, device=device)
    for step in range(1, 8):
        grad = torch.randn_like(a)
        other.grad = grad.clone()
        optimizer.step()
        adamw([a], [grad], [m], [v], [q], step=step, lr=1e-2, **OPTIONS)
    assert_rounded(a, other.detach().cpu().double(), terms=7 * 4, what="a")


def test_every_parameter_counts_its_own_steps(backend, random_basis):
    adamw, device = backend
    start = make([(4, 33, 8)] * 4, random_basis, device)
    grad = [torch.randn_like(p) for p in start[0]]
    counts = [1, 30, 30, 4000]
    places = ["cpu", device, "cpu", device]
    steps = [torch.tensor(float(n), device=where) for n, where in zip(counts, places, strict=True)]
    a, q, m, v = ([t.clone() for t in group] for group in start)
    adamw(a, grad, m, v, q, step=steps, lr=0.1)
    for i, count in enumerate(counts):
        alone = [[group[i].clone()] for group in start]
        adamw(alone[0], grad[i : i + 1], alone[2], alone[3], alone[1], step=count, lr=0.1)
        assert torch.equal(a[i], alone[0][0])


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_the_leak_does_not_depend_on_the_size_of_numbers(backend, random_basis, size):
    """Squares of float32 end at 1.8e19: a leak of infinity over infinity, or of nothing over infinity."""
    adamw, device = backend
    a, q, m, v = make([(4, 33, 8)], random_basis, device)
    plain, scaled = (adamw([a[0] * by], [torch.zeros_like(a[0])], m, v, q, step=1, lr=0.1) for by in (1.0, size))
    assert plain[0] > 1e-8
    assert torch.equal(plain, scaled)


def test_the_leak_of_what_is_no_number_is_none(backend, random_basis):
    adamw, device = backend
    a, q, m, v = make([(4, 33, 8), (2, 7, 3)], random_basis, device)
    a[0][1, 1] = float("nan")
    leak = adamw(a, [torch.randn_like(p) for p in a], m, v, q, step=1, lr=0.1)
    assert leak.isnan().tolist() == [True, False]


def test_one_tensor_counts_for_all(device, random_basis):
    start = make([(4, 33, 8), (2, 7, 3)], random_basis, device)
    grad = [torch.randn_like(p) for p in start[0]]
    results = []
    for step in (30, torch.tensor(30.0), torch.tensor(30.0, device=device)):
        a, q, m, v = ([t.clone() for t in group] for group in start)
        projected_adamw(a, grad, m, v, q, step=step, lr=0.1)
        results.append(a)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_stays_outside_for_a_thousand_steps(backend, random_basis):
    """Gradients that pull into the protected space: plain Adam would leave, and does."""
    adamw, device = backend
    (a,), (q,), (m,), (v,) = make([(8, 64, 24)], random_basis, device)
    plain = torch.nn.Parameter(a.clone())
    optimizer = torch.optim.AdamW([plain], lr=1e-2)
    target = torch.randn(8, 64, device=device)
    for step in range(1, 1001):
        leak = adamw([a], [a - target], [m], [v], [q], step=step, lr=1e-2)
        plain.grad = (plain.detach() - target) @ (torch.eye(64, device=device) - q @ q.T)
        optimizer.step()
    assert leak.item() <= 1e-6
    assert ((plain @ q).norm() / plain.norm()).item() > 1e-3  # projecting the gradient alone is not enough


def test_leak_is_what_it_says(backend, random_basis):
    adamw, device = backend
    a, q = torch.randn(3, 20, device=device), 0.8 * random_basis(20, 5).to(device)
    leak = adamw([a], *([torch.zeros_like(a)] for _ in range(3)), [q], step=1, lr=0.0)
    exact = ((a.double() @ q.double()).norm() / a.double().norm()).cpu()
    assert exact > 0.01
    assert_rounded(leak, exact[None], terms=60, what="leak")


def test_zero_parameter_has_no_leak(backend, random_basis):
    adamw, device = backend
    zeros = [torch.zeros(2, 6, device=device) for _ in range(4)]
    leak = adamw(*([z] for z in zeros), [random_basis(6, 2).to(device)], step=1, lr=0.1)
    assert leak.tolist() == [0.0]
    assert torch.equal(zeros[0], torch.zeros_like(zeros[0]))


def test_no_parameters():
    assert projected_adamw([], [], [], [], [], step=1, lr=0.1).shape == (0,)


def test_a_thousand_parameters_with_gradients_of_any_dtype(backend, random_basis):
    adamw, device = backend
    shapes = [(1 + i % 3, 6, i % 4) for i in range(1000)]
    a, q, m, v = make(shapes, random_basis, device)
    exact = [ExactAdamW(p, basis) for p, basis in zip(a, q, strict=True)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    grad = [torch.randn_like(p).to(dtypes[i % 4]) for i, p in enumerate(a)]
    leak = adamw(a, grad, m, v, q, step=1, lr=1e-2, **OPTIONS)
    for i, reference in enumerate(exact):
        reference.step(grad[i], 1e-2, **OPTIONS)
        assert_rounded(a[i], reference.a, terms=12, what=f"a[{i}]", size=reference.size)
    assert leak.max() <= 1e-6


def test_kernel_gives_the_same_bits_in_any_order(emulated, random_basis):
    start = make([(9, 130, 70), (3, 31, 8)], random_basis, "cpu")
    grad = [torch.randn_like(p).bfloat16() for p in start[0]]
    results = []
    for order, seed in (("sequential", 0), ("reversed", 0), ("random", 1), ("random", 2)):
        emulated.set_schedule(order, seed)
        a, q, m, v = ([t.clone() for t in group] for group in start)
        leak = emulated.projected_adamw(a, grad, m, v, q, step=2, lr=[0.1, 0.01])
        results.append([*a, *m, *v, leak])
    emulated.set_schedule("sequential")
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_parameters_that_require_grad(random_basis):
    (a,), q, m, v = make([(2, 6, 2)], random_basis, "cpu")
    parameter = torch.nn.Parameter(a)
    before = parameter.detach().clone()
    projected_adamw([parameter], [torch.randn(2, 6)], m, v, q, step=1, lr=0.1)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert not torch.equal(parameter, before)


def test_compiles_in_one_graph(device, random_basis):
    def step(a, grad, m, v, q):
        return projected_adamw([a], [grad], [m], [v], [q], step=3, lr=0.1)

    (a,), (q,), (m,), (v,) = make([(3, 9, 4)], random_basis, device)
    grad = torch.randn_like(a)
    eager, compiled = ([t.clone() for t in (a, grad, m, v, q)] for _ in range(2))
    leak = step(*eager)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled), leak)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": 0}, ValueError, r": step must .* got 0"),
        ({"step": torch.ones(1)}, TypeError, r": step must .* got torch.float32 \[1\]"),
        ({"step": torch.tensor(1)}, TypeError, r": step must .* got torch.int64 \[\]"),
        ({"step": [torch.tensor(1.0)] * 2}, ValueError, r": step must .*\ba, got 2 for 1"),
        ({"step": torch.ones((), device="meta")}, ValueError, r": step must .*cpu.*a\[0\], got meta"),
        ({"step": 1.5}, TypeError, r": step must .* got float"),
        ({"lr": -1.0}, ValueError, r": lr must .* got .*-1.0"),
        ({"lr": [1.0, 2.0]}, ValueError, r": lr must .* got 2 for 1"),
        ({"betas": (0.9, 1.0)}, ValueError, r": betas must .*\[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1e-8}, ValueError, r": eps must .* got -1e-08"),
        ({"weight_decay": -0.1}, ValueError, r": weight_decay must .* got -0.1"),
        ({"grad": [torch.ones(2, 3)]}, ValueError, r": grad\[0\] must .*\[2, 4\].*a\[0\], got \[2, 3\]"),
        ({"q": [torch.zeros(3, 1)]}, ValueError, r": q\[0\] must .*\[4, k\].* got \[3, 1\]"),
        ({"exp_avg": []}, ValueError, r": exp_avg must .*\ba, got 0 for 1"),
        (
            {"exp_avg": [torch.ones(2, 4).double()]},
            TypeError,
            r": exp_avg\[0\] must .*torch.float32.*a\[0\], got torch.float64",
        ),
        ({"exp_avg_sq": [torch.ones(4, 2).t()]}, ValueError, r": exp_avg_sq\[0\] must .* got strides \[1, 2\]"),
    ],
)
def test_refuses_and_changes_nothing(changes, error, message):
    tensors = {name: [torch.ones(2, 4)] for name in ("a", "grad", "exp_avg", "exp_avg_sq")} | {"q": [torch.zeros(4, 1)]}
    tensors |= {name: value for name, value in changes.items() if name in tensors}
    options = {"step": 1, "lr": 0.1} | {name: value for name, value in changes.items() if name not in tensors}
    before = [t.clone() for group in tensors.values() for t in group]
    with pytest.raises(error, match="^projected_adamw" + message):
        projected_adamw(*tensors.values(), **options)
    after = [t for group in tensors.values() for t in group]
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
