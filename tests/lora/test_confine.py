"""confine: any optimizer of torch keeps some parameters outside their bases."""

import pytest
import torch
from confined import confined, give_gradients, leak, outside, trained, twins
from torch import nn

from keeplora.lora import confine

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "Lion": lambda params: Lion(params),
}


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: the sign of the momentum, which no projected gradient keeps in its subspace."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_((0.9 * momentum + 0.1 * p.grad).sign_(), alpha=group["lr"])
                momentum.lerp_(p.grad, 0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_confine_keeps_any_optimizer_outside(name):
    made = [confined(3, 20, 8), confined(2, 9, 0), confined(2, 12, 5, torch.float64)]
    params, bases = [p for p, _ in made], dict(made)
    free = nn.Parameter(torch.randn(4))
    plain = twins(params)
    optimizer, other = OPTIMIZERS[name]([*params, free]), OPTIMIZERS[name](plain)
    start = free.detach().clone()
    handle = confine(optimizer, bases)
    for step in range(20):
        give_gradients([*params, free], step)
        given = [p.grad.clone() for p in params]
        optimizer.step()
        for p, g, (_, q) in zip(params, given, made, strict=True):
            assert torch.allclose(p.grad, outside(g, q), atol=1e-5)  # in place
        for p, g, (_, q) in zip(plain, given, made, strict=True):
            p.grad = outside(g, q)
        other.step()
    assert all(leak(p, q) <= 1e-6 for p, q in made)
    assert not torch.equal(free, start)
    if name != "SGD":  # linear in the gradient: projecting that is enough
        assert leak(plain[0], made[0][1]) > 1e-3
    else:
        assert all((p - t).abs().max() <= 1e-5 for p, t in zip(params, plain, strict=True))
    handle.remove()
    give_gradients([*params, free], 99)
    given = params[0].grad.clone()
    optimizer.step()
    assert torch.equal(params[0].grad, given)
    assert leak(*made[0]) > 1e-5


def test_confine_skips_missing_gradients_and_ends_with_its_block():
    (a, q), (b, p) = confined(2, 8, 3), confined(2, 8, 3)
    optimizer = torch.optim.AdamW([a, b], lr=0.1)
    with confine(optimizer, {a: q, b: p}):
        for step in range(3):
            give_gradients([a], step)
            optimizer.step()
    assert b.grad is None
    assert leak(a, q) <= 1e-6
    give_gradients([a], 3)
    optimizer.step()
    assert leak(a, q) > 1e-3


@pytest.mark.parametrize("keyword", [False, True])
def test_confine_projects_what_a_closure_computes(keyword):
    """L-BFGS evaluates several times in a step, and remembers the gradients."""
    a, q = confined(2, 8, 3)
    optimizer = torch.optim.LBFGS([a], lr=0.5, max_iter=5)
    target = torch.randn(2, 8)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = ((a - target) ** 2).sum()
        loss.backward()
        seen.append(a.grad)
        return loss

    confine(optimizer, {a: q})
    for _ in range(5):
        optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert len(seen) > 5
    assert all((g @ q).norm() <= 1e-6 * seen[0].norm() for g in seen)
    assert (a - outside(target, q)).abs().max() <= 1e-3
    assert leak(a, q) <= 1e-6


def test_momentum_from_before_is_left_alone_but_has_no_effect_inside():
    a, q = confined(2, 8, 3)
    optimizer = torch.optim.SGD([a], lr=0.1, momentum=0.9)
    trained(optimizer, [a], range(3))
    assert leak(a, q) > 1e-3
    confine(optimizer, {a: q})
    trained(optimizer, [a], [3])
    assert leak(a, q) <= 1e-6
    assert leak(optimizer.state[a]["momentum_buffer"], q) > 1e-3
