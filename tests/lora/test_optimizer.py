"""ProjectedAdamW: torch's AdamW, except that some parameters stay outside their bases."""

import copy
import pickle

import pytest
import torch
from confined import confined, give_gradients, leak, trained, twins
from torch import nn

from keeplora.lora import ProjectedAdamW, confine
from keeplora.ops.declare import OPS
from keeplora.ops.projected_adamw import checked_arguments

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_is_torchs_adamw_without_bases(options, device):
    """The same bits, whatever the shapes and dtypes."""
    shapes = [(3, 4), (7,), (), (2, 3, 4), (0, 5)]
    ours = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    if not options:
        ours.append(nn.Parameter(torch.randn(4, 3, device=device).bfloat16()))
    theirs = twins(ours)
    expected = {} if device.type == "cpu" and "capturable" in options else options  # torch has none there
    pair = ProjectedAdamW(ours, **OPTIONS, **options), torch.optim.AdamW(theirs, **OPTIONS, **expected)
    for step in range(5):
        for params, optimizer in zip((ours, theirs), pair, strict=True):
            give_gradients(params, step)
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stays_outside_and_matches_float64(dtype):
    """Against the formulas with the projector as a matrix; eps keeps Adam from turning rounding into steps."""
    params, bases = zip(*(confined(r, d, k, dtype) for r, d, k in [(4, 24, 9), (2, 10, 0), (3, 12, 7)]), strict=True)
    rate, beta1, beta2, eps, decay = 1e-2, 0.9, 0.99, 1e-2, 0.1
    optimizer = ProjectedAdamW(params, rate, (beta1, beta2), eps, decay, bases=dict(zip(params, bases, strict=True)))
    exact = [p.detach().double().clone() for p in params]
    m, v = ([torch.zeros_like(p) for p in exact] for _ in range(2))
    for step in range(1, 11):
        give_gradients(params, step)
        optimizer.step()
        for i, q in enumerate(bases):
            projector = torch.eye(q.shape[0], dtype=torch.float64) - q.double() @ q.double().T
            g = params[i].grad.double() @ projector
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            moved = m[i] / (1 - beta1**step) / ((v[i] / (1 - beta2**step)).sqrt() + eps)
            exact[i] = (exact[i] * (1 - rate * decay) - rate * moved) @ projector
    for p, q, expected in zip(params, bases, exact, strict=True):
        assert (p.detach().double() - expected).abs().max() <= 100 * torch.finfo(dtype).eps * expected.abs().max()
        assert leak(p, q) <= 4 * torch.finfo(dtype).eps


def test_all_confined_parameters_are_stepped_in_one_call(monkeypatch):
    calls = []

    def counted(a, *arguments):
        calls.append(len(a))
        return OPS["projected_adamw"].call(a, *arguments)

    monkeypatch.setattr("keeplora.lora.optimizer._projected_adamw", counted)
    made = [confined(2, 6 + i, 2) for i in range(5)]
    params = [p for p, _ in made]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-3}]  # lr does not divide them
    optimizer = ProjectedAdamW(groups, bases=dict(made))
    give_gradients(params, 0)
    optimizer.step()
    assert calls == [5]
    optimizer.param_groups[1]["weight_decay"] = 0.5
    optimizer.step()
    assert calls == [5, 3, 2]


def test_arguments_are_checked_once_and_whenever_a_tensor_is_another(monkeypatch):
    checks = []

    def counted(*arguments):
        checks.append(len(arguments[0]))
        return checked_arguments(*arguments)

    monkeypatch.setattr("keeplora.lora.optimizer.checked_arguments", counted)
    (a, q), (b, p) = confined(2, 8, 3), confined(2, 8, 3)
    optimizer = ProjectedAdamW([a, b], bases={a: q, b: p})
    give_gradients([a, b], 0)
    for _ in range(3):
        optimizer.step()
    assert checks == [2]
    b.grad = None
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert checks == [2, 1, 1]
    before = a.detach().clone()
    optimizer.state[a]["exp_avg"] = torch.zeros(8, 2).T
    with pytest.raises(ValueError, match=r"exp_avg\[0\] must be contiguous, got strides \[1, 2\]"):
        optimizer.step()
    assert torch.equal(a, before)
    assert optimizer.state[a]["step"] == 5
    twin = pickle.loads(pickle.dumps(ProjectedAdamW([a], bases={a: q})))
    [[copied]] = [group["params"] for group in twin.param_groups]
    copied.grad = torch.ones_like(copied)
    twin.step()
    assert checks[3:] == [1, 1]


@pytest.mark.parametrize(("name", "value"), [("lr", -0.1), ("lr", float("nan")), ("eps", -1.0), ("betas", (0.9, 1.0))])
def test_numbers_set_later_are_refused_before_anything_changes(name, value):
    (a, q), free = confined(2, 8, 3), nn.Parameter(torch.randn(3))
    optimizer = ProjectedAdamW([{"params": [free]}, {"params": [a]}], bases={a: q})
    give_gradients([a, free], 0)
    optimizer.step()
    before = [p.detach().clone() for p in (a, free)]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"ProjectedAdamW: {name} must"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip((a, free), before, strict=True))
    assert optimizer.state[free]["step"] == optimizer.state[a]["step"] == 1


def test_groups_have_options_of_their_own():
    (a, q), (b, p) = confined(2, 8, 3), confined(2, 8, 3)
    twin_a, twin_b = twins([a, b])
    options = {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.3}
    together = ProjectedAdamW([{"params": [a]}, {"params": [b], **options}], lr=1e-3, bases={a: q, b: p})
    apart = [
        ProjectedAdamW([twin_a], lr=1e-3, bases={twin_a: q}),
        ProjectedAdamW([twin_b], **options, bases={twin_b: p}),
    ]
    for step in range(3):
        give_gradients([a, b], step)
        give_gradients([twin_a, twin_b], step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert torch.equal(a, twin_a)
    assert torch.equal(b, twin_b)


def test_a_parameter_without_gradient_is_skipped_and_counts_its_own_steps():
    (a, q), (b, p) = confined(2, 8, 3), confined(2, 8, 3)
    free = nn.Parameter(torch.randn(3))
    optimizer = ProjectedAdamW([a, b, free], lr=0.1, bases={a: q, b: p})
    (twin,) = twins([b])
    alone = ProjectedAdamW([twin], lr=0.1, bases={twin: p})
    before = b.detach().clone(), free.detach().clone()
    give_gradients([a], 0)
    optimizer.step()
    assert torch.equal(b, before[0])
    assert torch.equal(free, before[1])
    assert list(optimizer.state) == [a]
    give_gradients([a, b, free], 1)
    give_gradients([twin], 2)
    b.grad.copy_(twin.grad)
    optimizer.step()
    alone.step()
    assert torch.equal(b, twin)  # its first step, though the second of a
    optimizer.zero_grad()
    assert a.grad is None


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("through", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_continues_from_a_state_dict_bit_for_bit(options, through):
    a, q = confined(3, 10, 4)
    params = [a, nn.Parameter(torch.randn(5))]
    optimizer = ProjectedAdamW(params, **OPTIONS, **options, bases={a: q})
    trained(optimizer, params, range(4))
    again = twins(params)
    other = ProjectedAdamW(again, bases={again[0]: q})
    other.load_state_dict(through(optimizer.state_dict()))
    for pair in ((optimizer, params), (other, again)):
        trained(*pair, range(4, 8))
    assert all(map(torch.equal, params, again))
    assert other.state[again[0]]["step"].item() == 8
    assert q.shape not in [v.shape for state in optimizer.state_dict()["state"].values() for v in state.values()]


@pytest.mark.parametrize("through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_keep_their_bases(through):
    a, q = confined(3, 10, 4)
    optimizer = ProjectedAdamW([a], lr=0.1, bases={a: q})
    trained(optimizer, [a], range(3))
    copied, b = through((optimizer, a))
    assert b is not a
    trained(optimizer, [a], range(3, 6))
    trained(copied, [b], range(3, 6))
    assert torch.equal(a, b)
    assert leak(b, q) <= 1e-6


def test_schedulers_change_the_rate():
    (a, q), (b, _) = confined(2, 8, 3), confined(2, 8, 3)
    with torch.no_grad():
        b.copy_(a)
    scheduled, manual = ProjectedAdamW([a], lr=0.1, bases={a: q}), ProjectedAdamW([b], lr=0.1, bases={b: q})
    schedule = torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=0.1, total_steps=10)
    for step in range(10):
        (group,) = scheduled.param_groups
        manual.param_groups[0] |= {"lr": group["lr"], "betas": group["betas"]}
        trained(scheduled, [a], [step])
        trained(manual, [b], [step])
        if step < 9:
            schedule.step()
    assert torch.equal(a, b)
    assert group["lr"] < 1e-3
    assert group["betas"] != (0.9, 0.999)  # the schedule moves momentum, too


def test_closure_is_called_once_with_gradients_and_its_loss_returned():
    a, q = confined(2, 8, 3)
    optimizer = ProjectedAdamW([a], lr=0.1, bases={a: q})
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (a**2).sum()
        loss.backward()
        calls.append(loss.detach())
        return loss

    assert torch.equal(optimizer.step(closure), calls[0])
    assert len(calls) == 1


def test_added_groups_bring_their_bases():
    (a, q), (b, p) = confined(2, 8, 3), confined(2, 8, 3)
    optimizer = ProjectedAdamW([a], lr=0.1, bases={a: q})
    optimizer.add_param_group({"params": iter([b]), "lr": 0.5}, bases={b: p})
    trained(optimizer, [a, b], range(20))
    assert leak(a, q) <= 1e-6
    assert leak(b, p) <= 1e-6


def test_works_with_a_gradient_scaler():
    """Steps with infinite gradients are left out, and the scale does not matter."""
    made = [confined(2, 8, 3) for _ in range(2)]
    (a, q), (b, _) = made
    with torch.no_grad():
        b.copy_(a)
    scaled, plain = ProjectedAdamW([a], lr=0.1, bases={a: q}), ProjectedAdamW([b], lr=0.1, bases={b: q})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    target = torch.randn(2, 8)
    for step in range(6):
        for p in (a, b):
            p.grad = None
        loss = ((a - target) ** 2).sum() * (float("inf") if step == 2 else 1.0)
        scaler.scale(loss).backward()
        before = a.detach().clone()
        scaler.step(scaled)
        scaler.update()
        if step == 2:
            assert torch.equal(a, before)
            continue
        ((b - target) ** 2).sum().backward()
        plain.step()
    assert torch.equal(a, b)


def test_sparse_gradients_are_refused_and_nothing_changes():
    (a, q), free = confined(2, 8, 3), nn.Parameter(torch.randn(2, 8))
    optimizer = ProjectedAdamW([a, free], lr=0.1, bases={a: q})
    give_gradients([a], 0)
    free.grad = torch.eye(2, 8).to_sparse()
    before = [p.detach().clone() for p in (a, free)]
    with pytest.raises(RuntimeError, match=r"gradients must be dense, got torch.sparse_coo"):
        optimizer.step()
    assert all(map(torch.equal, (a, free), before))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must not be negative, and be finite, got -1.0"),
        ({"lr": torch.tensor(0.1)}, TypeError, r"lr must be a number, got a tensor"),
        ({"eps": float("nan")}, ValueError, r"eps must not be negative"),
        ({"weight_decay": float("inf")}, ValueError, r"weight_decay must not be negative, and be finite"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}, TypeError, r"params must be real"),
    ],
)
def test_options_out_of_range_are_refused(change, error, message):
    arguments = {"params": [nn.Parameter(torch.zeros(2))], **change}
    with pytest.raises(error, match=message):
        ProjectedAdamW(**arguments)
    optimizer = ProjectedAdamW([nn.Parameter(torch.zeros(1))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group(arguments)
    assert len(optimizer.param_groups) == 1


MAKERS = {
    "ProjectedAdamW": lambda params, bases: ProjectedAdamW(params, bases=bases),
    "confine": lambda params, bases: confine(torch.optim.SGD(params), bases),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("parameter", "q", "error", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(7, 2), ValueError, r"a basis must be \[in, k\] .* got \[7, 2\] on cpu for"),
        (torch.zeros(8), torch.zeros(8, 2), ValueError, r"a basis must be \[in, k\]"),
        (torch.zeros(2, 8), torch.zeros(8, 2, device="meta"), ValueError, r"got \[8, 2\] on meta for \[2, 8\] on cpu"),
        (torch.zeros(2, 8), torch.zeros(8, 2).double(), TypeError, r"float32 or float64 like it"),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(8, 2).bfloat16(), TypeError, r"got torch.bfloat16"),
        (torch.zeros(8, 2).T, torch.zeros(8, 2), ValueError, r"must be contiguous, got strides \[1, 2\]"),
    ],
)
def test_bases_that_do_not_fit_are_refused(make, parameter, q, error, message):
    p = nn.Parameter(parameter)
    with pytest.raises(error, match=message):
        make([p], {p: q})


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bases_of_strangers_are_refused(make):
    (a, q), (b, p) = confined(2, 8, 3), confined(2, 8, 3)
    with pytest.raises(ValueError, match=r"bases must .*got 1 of 2 for others"):
        make([a], {a: q, b: p})


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")


@GPU
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_a_captured_graph_advances(options):
    a, q = confined(4, 100, 30)
    start, q = [a.detach().cuda(), torch.randn(50, device="cuda")], q.cuda()
    grads = [torch.randn_like(p) for p in start]

    def made(capturable):
        params = twins(start)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        return params, ProjectedAdamW(params, lr=0.1, bases={params[0]: q}, capturable=capturable, **options)

    (eager, one), (captured, two) = made(False), made(True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        two.step()  # makes the state
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two.step()
    for _ in range(4):
        graph.replay()
    for _ in range(5):
        one.step()
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-6)
    assert two.state[captured[0]]["step"].item() == 5
    assert leak(captured[0].cpu(), q.cpu()) <= 1e-6


@GPU
def test_a_graph_without_capturable_is_refused():
    p = nn.Parameter(torch.randn(3, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = ProjectedAdamW([p])
    with pytest.raises(RuntimeError, match=r"capturable must be True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
