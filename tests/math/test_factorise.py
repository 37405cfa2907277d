"""Which way matrices are factorised on a GPU: the choice, that it loops over no layers, and what the ways promise."""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from keeplora.math import batch, factorise, lowrank
from keeplora.math.factorise import CPU, CUDA, CUDA_LOOPS, plan_for, symmetric_eigh
from keeplora.math.lowrank import directions_within, extend_basis, top_directions, weight_basis
from keeplora.math.orthonormal import complement, nearest_orthonormal, orthonormal_again
from keeplora.math.sketch import leading_eigenvectors, triples
from keeplora.math.subspace import certificates, spectrum_outside
from tests.math.spectra import away_from_ties, f64, off_identity, orthonormal, smallest_rank, tensor

PLANS = {"torch 2.12": CUDA, "torch 2.11": CUDA_LOOPS}
LEAK = 1e-6  # of new directions into the basis they extend


def follow(monkeypatch, plan, together=True):
    """As on a device with such a plan."""
    monkeypatch.setattr(factorise, "plan_for", lambda device: plan)
    monkeypatch.setattr(batch, "batched", lambda tensor: together)
    monkeypatch.setattr(lowrank, "batched", lambda tensor: together)


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def as_on_a_gpu(request, monkeypatch):
    follow(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize(
    ("device", "version", "plan"),
    [
        ("cpu", "2.11.0+cu130", CPU), ("cpu", "2.15.0", CPU), ("mps", "2.15.0", CPU),
        ("cuda", "2.11.0+cu130", CUDA_LOOPS), ("cuda", "2.11.1", CUDA_LOOPS), ("cuda", "2.12.0a0+git1", CUDA),
        ("cuda", "2.15.0+cu132", CUDA), ("cuda", "3.0.1", CUDA),
    ],
)  # fmt: skip
def test_the_plan_of_a_device(device, version, plan):
    assert plan_for(device, version) is plan


@pytest.mark.parametrize(
    ("plan", "columns", "batch", "on_host"),
    [
        (CPU, 2, 1, False), (CPU, 80, 48, False), (CUDA, 2, 1, False), (CUDA, 80, 48, False), (CUDA, 768, 48, False),
        (CUDA_LOOPS, 32, 48, False), (CUDA_LOOPS, 32, 1, True), (CUDA_LOOPS, 33, 48, True), (CUDA_LOOPS, 80, 48, True),
        (CUDA_LOOPS, 128, 1, True), (CUDA_LOOPS, 129, 48, False), (CUDA_LOOPS, 768, 1, False),
    ],
)  # fmt: skip
def test_what_goes_to_the_host(plan, columns, batch, on_host):
    assert plan.on_host(columns, batch) is on_host


def test_the_host_gives_what_the_device_gives(monkeypatch):
    c = torch.randn(3, 40, 40, dtype=torch.float64)
    c = c @ c.mT
    here = symmetric_eigh(c)
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.shape) or cpu(tensor))
    follow(monkeypatch, CUDA_LOOPS)
    for one, other in zip(symmetric_eigh(c), here, strict=True):
        assert torch.equal(one, other)
    assert moved == [(3, 40, 40)]


class Factorised(TorchDispatchMode):
    """Counts what torch factorises on a GPU, by name: matrices one after the other, and calls for whole batches."""

    def __init__(self, plan):
        super().__init__()
        self.plan, self.one_by_one, self.calls = plan, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name in {"_linalg_eigh", "linalg_qr", "_linalg_svd", "linalg_cholesky_ex", "geqrf"}:
            columns, count = args[0].shape[-1], args[0].shape[:-2].numel()
            loops = {"_linalg_eigh": self.plan is CUDA_LOOPS and columns > 32, "linalg_cholesky_ex": False}
            if name == "_linalg_eigh" and self.plan.on_host(columns, count):
                self.calls["host"] += 1
            elif loops.get(name, True):
                self.one_by_one[name.removeprefix("_linalg_").removeprefix("linalg_")] += count
            else:
                self.calls[name.removeprefix("_linalg_")] += 1
        return func(*args, **(kwargs or {}))


def layers(d, count, rng):
    """Second moments or weights, and bases of the different widths that layers have after a task."""
    c = [tensor(orthonormal(d, d, rng) * np.arange(1, d + 1) ** -0.5) for _ in range(count)]
    return [m @ m.T for m in c], [tensor(orthonormal(d, 4 + i % 7, rng)) for i in range(count)]


CALLS = {
    "extend_basis": lambda c, q: extend_basis(q, c, 0.9),
    "top_directions": lambda c, q: top_directions(c, q, 8),
    "weight_basis": lambda c, q: weight_basis(c, 0.6),
    "directions_within": lambda c, q: directions_within([m @ b for m, b in zip(c, q, strict=True)], q, 3),
    "certificates": lambda c, q: certificates([m[:4] for m in c], [m[:, :4] for m in c], q),
}
# Of 96 layers, 48 each of two widths, with seven widths of bases: matrices factorised one after the other, and calls
# for batches. Before there were plans, and with them.
BEFORE = {
    "extend_basis": ({"qr": 96}, {"eigh": 14}),
    "top_directions": ({"qr": 96}, {"eigh": 2}),
    "weight_basis": ({}, {"eigh": 2}),
    "directions_within": ({"qr": 96}, {"eigh": 14}),
    "certificates": ({"qr": 192}, {}),
}
AFTER = {
    "extend_basis": ({}, {"eigh": 2}),
    "top_directions": ({}, {"eigh": 2}),
    "weight_basis": ({}, {"eigh": 2}),
    "directions_within": ({}, {"eigh": 14}),
    "certificates": ({}, {}),
}


@pytest.mark.parametrize(("plan", "counts"), [(CPU, BEFORE), (CUDA, AFTER)], ids=["before", "on a GPU"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_factorised_one_after_the_other(name, plan, counts, monkeypatch):
    rng = np.random.default_rng(0)
    parts = [layers(d, 48, rng) for d in (90, 70)]
    c, q = ([m for part in parts for m in part[i]] for i in (0, 1))
    follow(monkeypatch, plan)
    with Factorised(plan) as factorised:
        CALLS[name](c, q)
    assert (factorised.one_by_one, factorised.calls) == counts[name]


@pytest.mark.parametrize("name", ["top_directions", "weight_basis"])
def test_small_ones_are_the_hosts_job_where_torch_loops(name, monkeypatch):
    c, q = layers(90, 48, np.random.default_rng(0))
    follow(monkeypatch, CUDA_LOOPS)
    with Factorised(CUDA_LOOPS) as factorised:
        CALLS[name](c, q)
    assert (factorised.one_by_one, factorised.calls) == ({}, {"host": 1})


ENERGIES = {
    "power": lambda i: i**-1.5,
    "features": lambda i: i**-1.0,
    "exponential": lambda i: np.exp(-i / 40),
    "clustered": lambda i: np.where(i <= len(i) // 4, 1.0, 0.1),
}


def moment(d, name, rng):
    frame = orthonormal(d, d, rng)
    c = (frame * ENERGIES[name](np.arange(1, d + 1, dtype=np.float64))) @ frame.T
    return tensor((c + c.T) / 2)


@functools.cache
def problem(d, k, name):
    """``(c, q)``, and in float64 the energies outside q, all of it and what q holds."""
    rng = np.random.default_rng(d + k)
    c, q = moment(d, name, rng), tensor(orthonormal(d, k, rng))
    c64, q64 = f64(c), f64(q)
    left = c64 - q64 @ (q64.T @ c64)
    energies = np.linalg.eigvalsh(left - (left @ q64) @ q64.T)[::-1]
    return c, q, np.clip(energies, 0, None)[: d - k], np.trace(c64), np.trace(q64.T @ c64 @ q64)


def check_extension(new, share, c, q, energies, total, held):
    """The rank is float64's, the new directions are orthonormal and apart from the old, their energy is there."""
    wanted = smallest_rank(energies, total, share, held)
    assert new.added == wanted if away_from_ties(energies, total, share, held) else abs(new.added - wanted) <= 1
    k = q.shape[1]
    assert torch.equal(new.q[:, :k], q)
    assert off_identity(new.q) <= 5e-6
    added = f64(new.q)[:, k:]
    assert np.linalg.norm(f64(q).T @ added) <= LEAK * max(1.0, np.linalg.norm(added))
    assert new.captured == pytest.approx(np.trace(f64(new.q).T @ f64(c) @ f64(new.q)), rel=2e-6)
    assert new.fraction >= share - 1e-5


@pytest.mark.parametrize("name", ENERGIES)
def test_layers_of_any_k_are_extended_together(name, as_on_a_gpu):
    shares = [0.3, 0.9, 0.99, 0.9, 0.9]
    problems = [problem(200, k, name) for k in (0, 7, 60, 199, 200)]
    extensions = extend_basis([q for _, q, *_ in problems], [c for c, *_ in problems], shares)
    for new, share, made in zip(extensions, shares, problems, strict=True):
        check_extension(new, share, *made)


@pytest.mark.parametrize("plan", [CUDA, CUDA_LOOPS])
def test_iteration_takes_layers_one_by_one(plan, monkeypatch):
    follow(monkeypatch, replace(plan, iterative_from=150))
    problems = [problem(200, 7 + 30 * (i % 2), name) for i, name in enumerate([*ENERGIES, *ENERGIES])]
    extensions = extend_basis([q for _, q, *_ in problems], [c for c, *_ in problems], 0.5)
    for new, made in zip(extensions, problems, strict=True):
        check_extension(new, 0.5, *made)


@pytest.mark.parametrize(("d", "k", "share"), [(768, 0, 0.6), (768, 200, 0.9), (1024, 60, 0.5)])
@pytest.mark.parametrize("name", ["power", "features"])
def test_at_the_sizes_where_a_gpu_chooses_otherwise(name, d, k, share, monkeypatch):
    c, q, *known = problem(d, k, name)
    tried, certain = leading_eigenvectors, []

    def noted(*args, **kwargs):
        certain.append(tried(*args, **kwargs) is not None)
        return tried(*args, **kwargs)

    monkeypatch.setattr(lowrank, "leading_eigenvectors", noted)
    for plan in (CUDA, CUDA_LOOPS, replace(CUDA_LOOPS, iterative_from=500)):
        follow(monkeypatch, plan)
        check_extension(extend_basis([q], [c], share)[0], share, c, q, *known)
    assert len(certain) == (2 if d - k >= CUDA_LOOPS.iterative_from else 1)
    assert all(certain) or name == "features"


def test_the_spectrum_outside_is_outside_to_the_rounding_of_float64(monkeypatch):
    """Also of directions that barely count, of bases rounded to float32 and filled up with zeros."""
    rng = np.random.default_rng(0)
    frame = orthonormal(150, 150, rng)
    c = tensor((frame * np.geomspace(1, 1e-8, 150)) @ frame.T)[None].expand(2, -1, -1)
    q = torch.stack([tensor(orthonormal(150, 30, rng)), torch.zeros(150, 30)])
    q[1, :, :9] = tensor(orthonormal(150, 9, rng))
    norm = torch.linalg.matrix_norm(c).double()
    follow(monkeypatch, CUDA)
    values, vectors = spectrum_outside(c, q, norm)
    for i in range(2):
        count = int((values[i] > 6e-8 * norm[i]).sum())
        assert 80 < count < 150 - (30, 9)[i]
        assert np.abs(f64(q[i]).T @ f64(vectors[i, :, :count])).max() <= 1e-13


@pytest.mark.parametrize("shape", [(768, 768), (900, 768), (768, 1000)], ids=str)
def test_weights_where_torch_loops_are_tried_by_iteration(shape, monkeypatch):
    rng = np.random.default_rng(0)
    n = min(shape)
    sigma = np.arange(1, n + 1) ** -0.75
    w = tensor((orthonormal(shape[0], n, rng) * sigma) @ orthonormal(shape[1], n, rng).T)
    certain = []

    def tried(*args, **kwargs):
        certain.append(leading_eigenvectors(*args, **kwargs))
        return certain[-1]

    monkeypatch.setattr(lowrank, "leading_eigenvectors", tried)
    follow(monkeypatch, CUDA_LOOPS)
    for q, matrix in zip(weight_basis([w, w], 0.6), [w, w], strict=True):
        energies = np.linalg.svd(f64(matrix), compute_uv=False) ** 2
        assert away_from_ties(energies, energies.sum(), 0.6)
        assert q.shape == (shape[1], smallest_rank(energies, energies.sum(), 0.6))
        assert off_identity(q) <= 5e-6
        assert np.linalg.norm(f64(matrix) @ f64(q)) ** 2 >= (0.6 - 1e-5) * energies.sum()
    assert len(certain) == 2
    assert None not in certain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_whose_lengths_differ_by_all_that_float32_can_tell(dtype, as_on_a_gpu):
    rng = np.random.default_rng(0)
    lengths = np.geomspace(1, 1e-5, 12)
    g = tensor((orthonormal(90, 12, rng) * lengths) @ orthonormal(60, 12, rng).T, dtype)
    (top,) = top_directions([g], [g.new_zeros(60, 0)], 12)
    assert off_identity(top.b) <= 5e-6
    assert off_identity(top.a.T) <= 5e-6
    torch.testing.assert_close(top.s.double(), torch.tensor(lengths), rtol=2e-2, atol=0)
    torch.testing.assert_close((top.b * top.s) @ top.a, g, rtol=0, atol=2e-6)


def test_what_is_no_direction_is_left_out(as_on_a_gpu):
    rng = np.random.default_rng(0)
    g = tensor((orthonormal(90, 3, rng) * [3, 2, 1]) @ orthonormal(60, 3, rng).T)
    for top, count in zip(top_directions([g, torch.zeros(90, 60)], [g.new_zeros(60, 0)] * 2, 8), (3, 0), strict=True):
        assert len(top.s) == count
        assert off_identity(top.b) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_complement_without_qr(dtype, as_on_a_gpu):
    eps = torch.finfo(dtype).eps
    q = tensor(orthonormal(70, 20, np.random.default_rng(0)), dtype)
    for basis in (q, q.neg(), torch.eye(70, 20, dtype=dtype), -torch.eye(70, 20, dtype=dtype)):
        free = complement(basis)
        assert free.shape == (70, 50)
        assert off_identity(free) <= 50 * eps
        assert np.abs(f64(basis).T @ f64(free)).max() <= 50 * eps
    torch.testing.assert_close(complement(torch.stack([q, q]))[1].abs(), complement(q).abs(), rtol=0, atol=1e-5)


def test_what_is_nearly_orthonormal_becomes_it_and_zeros_stay():
    exact = torch.tensor(orthonormal(50, 8, np.random.default_rng(0)))
    y = torch.cat([exact + 1e-4 * torch.randn(50, 8, dtype=torch.float64), exact.new_zeros(50, 2)], dim=1)
    done = nearest_orthonormal(y)
    assert off_identity(done[:, :8]) <= 1e-12
    assert not done[:, 8:].any()
    assert (done[:, :8] - exact).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(1500, 40), (30, 30), (5, 1), (7, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_columns_that_were_rounded_become_the_nearest_orthonormal_ones(shape, dtype):
    y = torch.tensor(orthonormal(*shape, np.random.default_rng(0))).to(dtype)
    u, _, vt = np.linalg.svd(f64(y.double()), full_matrices=False)
    done = orthonormal_again(y)
    assert done.dtype == torch.float32
    assert np.allclose(f64(done), u @ vt, rtol=0, atol=1.2e-7)
    assert not shape[1] or off_identity(done) < 1e-7


def test_on_a_gpu_only_the_counts_are_waited_for(monkeypatch):
    """A fake device refuses to tell a number: nothing between the data and the counts asks for one."""
    follow(monkeypatch, CUDA)
    with FakeTensorMode():
        c, q = torch.empty(5, 96, 96, device="cuda"), torch.empty(5, 96, 20, device="cuda")
        values, vectors = spectrum_outside(c, q, torch.empty(5, dtype=torch.float64, device="cuda"))
        assert (values.shape, vectors.shape) == ((5, 96), (5, 96, 96))
        assert complement(q).shape == (5, 96, 76)
        image, v = torch.empty(5, 96, 40, device="cuda"), torch.empty(5, 80, 40, device="cuda")
        a, s, b = triples(image, v, torch.empty(5, 40, 40, dtype=torch.float64, device="cuda"), 8)
        assert (a.shape, s.shape, b.shape) == ((5, 8, 80), (5, 8), (5, 96, 8))
