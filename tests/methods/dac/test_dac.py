"""DAC: the pool's output, the vote, the router's gradient and the AGO loss, against float64 from the definition."""

import copy

import pytest
import tiny_workload
import torch
from torch import nn

from keeplora.families.class_tokens import ClassTokens
from keeplora.methods import create
from keeplora.methods.dac.experts import ExpertPool, ago_loss
from keeplora.methods.dac.method import Dac, DacConfig
from keeplora.tasks.classification import Batch, classification_loss, loader
from tests.close import assert_rounded

OUT, IN, EXPERTS, ACTIVE, SCALE = 5, 7, 6, 3, 0.5


def pool(seed=0, **options):
    torch.manual_seed(seed)
    a, b, router = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((EXPERTS, IN), (OUT, EXPERTS), (EXPERTS, IN))
    )
    made = ExpertPool(a, b, router, SCALE, active=ACTIVE, tokens=ClassTokens({}), tower="model", **options)
    with torch.no_grad():
        made.router_bias.normal_()
    return made


def routed(made, x):
    """Counts, probabilities and chosen experts, sample by sample."""
    counts, likely = [0] * EXPERTS, []
    for sample in x:
        scores = [
            sum(w * v for w, v in zip(row, sample[0].tolist(), strict=True)) + bias
            for row, bias in zip(made.router.tolist(), made.router_bias.tolist(), strict=True)
        ]
        weights = [torch.tensor(s, dtype=torch.float64).exp().item() for s in scores]
        likely.append([w / sum(weights) for w in weights])
        for i in sorted(range(EXPERTS), key=lambda i: -scores[i])[:ACTIVE]:
            counts[i] += 1
    chosen = sorted(range(EXPERTS), key=lambda i: (-counts[i], i))[:ACTIVE]
    return counts, torch.tensor(likely, dtype=torch.float64), sorted(chosen)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_computed_with_the_experts_its_samples_vote_for(seed):
    made, x = pool(seed), torch.randn(9, 4, IN, dtype=torch.float64)
    counts, _, chosen = routed(made, x)
    change = sum(torch.outer(made.B[:, i], made.A[i]) for i in chosen)
    assert_rounded(made(x), SCALE * x @ change.T, terms=IN * EXPERTS, what="pool")
    assert made.counts.tolist() == counts
    made(x)
    assert made.counts.tolist() == [2 * count for count in counts]


def test_the_router_has_the_gradient_of_the_mean_probabilities():
    """Straight through: what the loss would gain of each expert, times the derivative of its mean probability."""
    made, x, dy = pool(), torch.randn(9, 4, IN, dtype=torch.float64), torch.randn(9, 4, OUT, dtype=torch.float64)
    made(x).backward(dy)
    _, likely, chosen = routed(made, x)
    gain = SCALE * torch.einsum("nti,ei,nto,oe->e", x, made.A.detach(), dy, made.B.detach())
    router, bias = torch.zeros(EXPERTS, IN).double(), torch.zeros(EXPERTS).double()
    for p, sample in zip(likely, x, strict=True):
        for e in range(EXPERTS):
            for i in range(EXPERTS):
                slope = gain[e] / len(x) * p[e] * (float(e == i) - p[i])
                bias[i] += slope
                router[i] += slope * sample[0]
    assert_rounded(made.router.grad, router, terms=9 * 4 * EXPERTS * IN, what="router")
    assert_rounded(made.router_bias.grad, bias, terms=9 * 4 * EXPERTS * IN, what="bias")
    idle = [i for i in range(EXPERTS) if i not in chosen]
    assert not made.A.grad[idle].any()
    assert not made.B.grad[:, idle].any()
    assert made.B.grad[:, chosen].abs().sum(0).all()


def test_nothing_is_counted_in_evaluation():
    made, x = pool(), torch.randn(9, 4, IN, dtype=torch.float64)
    trained = made(x)
    seen = made.counts.clone()
    made.eval()
    assert torch.equal(made(x), trained)
    with torch.no_grad():
        made.train()(x)
    assert torch.equal(made.counts, seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ago_loss_and_its_gradient(dtype):
    torch.manual_seed(1)
    past = [torch.randn(out, m, dtype=dtype) for out, m in ((6, 4), (3, 8), (5, 0))]
    new = [torch.randn(out, 4, dtype=dtype, requires_grad=True) for out in (6, 3, 5)]
    loss = ago_loss(past, new)
    loss.backward()
    exact, slopes = torch.zeros((), dtype=torch.float64), [torch.zeros(n.shape, dtype=torch.float64) for n in new]
    for p, n, slope in list(zip(past, new, slopes, strict=True))[:2]:  # the third has no past: not in the mean
        p, n = p.double(), n.detach().double()
        for i in range(p.shape[1]):
            for j in range(n.shape[1]):
                product = sum(p[k, i] * n[k, j] for k in range(len(p)))
                exact += abs(product) / 2
                slope[:, j] += (1 if product > 0 else -1) * p[:, i] / 2
    assert_rounded(loss, exact, terms=6 * 32, what="loss")
    for n, slope in zip(new[:2], slopes[:2], strict=True):
        assert_rounded(n.grad, slope, terms=8, what="gradient")
    assert new[2].grad is None


def test_the_ago_loss_refuses_nothing():
    with pytest.raises(ValueError, match=r"got none\. Leave the loss out"):
        ago_loss([torch.zeros(3, 0)], [torch.ones(3, 2)])
    with pytest.raises(ValueError, match="got 1 and 0"):
        ago_loss([torch.ones(3, 1)], [])


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 8, generator=g), torch.randint(4, (16,), generator=g)) for _ in range(3)]


def trained(method, data, rate=1e-2):
    method.before_task(data, loss_fn)
    optimizer = method.optimizer(lr=rate)
    for batch in data:
        optimizer.zero_grad()
        loss, penalty = loss_fn(method.model, batch), method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
    return method


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 4))


CONFIG = DacConfig(r=6, alpha=6.0, target_modules="all-linear", dropout=0.0)


def test_the_most_used_experts_are_merged_and_the_others_dropped():
    method = trained(Dac(net(), CONFIG), task(0))
    slot = method.slots[1]
    pool, before = slot.adapter, slot.weight.double().clone()
    assert len(set(pool.counts.tolist())) > 1
    leading = sorted(range(6), key=lambda i: (-pool.counts[i].item(), i))[:2]
    change = sum(torch.outer(pool.B[:, i].double(), pool.A[i].double()) for i in leading)
    method.after_task(task(0))
    assert slot.adapter is None
    assert_rounded(slot.weight, before + change.detach(), terms=4, what="merged")
    assert torch.equal(method.past[1], pool.B.detach()[:, sorted(leading)])


def test_what_is_merged_has_the_most_votes_of_all_processes(monkeypatch):
    class Other:
        def add(self, counts):
            counts += torch.tensor([0, 0, 0, 0, 10**6, 10**6])

    method = trained(Dac(net(), CONFIG), task(0))
    pool = method.slots[0].adapter
    monkeypatch.setattr("keeplora.methods.dac.method.processes", Other)
    method.after_task(task(0))
    assert torch.equal(method.past[0], pool.B.detach()[:, 4:])


def test_the_penalty_is_of_the_leading_experts_and_what_was_merged():
    method = trained(Dac(net(), CONFIG), task(0))
    assert method.penalty() is None
    method.after_task(task(0))
    assert method.penalty() is None
    trained(method, task(1))
    found = [
        (past.T @ slot.adapter.B[:, slot.adapter.counts.argsort(descending=True, stable=True)[:2].sort().values])
        for past, slot in zip(method.past, method.slots, strict=True)
    ]
    expected = 0.1 * torch.stack([products.abs().sum() for products in found]).mean()
    torch.testing.assert_close(method.penalty(), expected, rtol=1e-6, atol=0)
    method.after_task(task(1))
    assert [past.shape[1] for past in method.past] == [4, 4]


def test_the_penalty_keeps_new_experts_away_from_past_ones():
    overlaps = []
    for weight in (0.0, 10.0):
        method = Dac(net(), DacConfig(r=6, alpha=6.0, target_modules="all-linear", dropout=0.0, ago_weight=weight))
        trained(method, task(0)).after_task(task(0))
        earlier = [past.clone() for past in method.past]
        trained(method, task(1) * 5).after_task(task(1))
        overlaps.append(
            sum(float((old.T @ now[:, 2:]).abs().mean()) for old, now in zip(earlier, method.past, strict=True))
        )
    assert overlaps[1] < 0.7 * overlaps[0]


def test_routers_learn():
    method = Dac(net(), CONFIG)
    method.before_task(task(0), loss_fn)
    before = [slot.adapter.router.detach().clone() for slot in method.slots]
    method.slots[0].adapter.B.data.normal_()
    loss_fn(method.model, task(0)[0]).backward()
    assert method.slots[0].adapter.router.grad.abs().sum() > 0
    method.optimizer(lr=0.1).step()
    assert not torch.equal(method.slots[0].adapter.router, before[0])


def test_the_towers_of_a_clip_are_routed_and_evaluated_without_a_task():
    """Texts by their ends, in eval() while the task is open, and after it with plain weights and no hook left."""
    model, learned = tiny_workload.model(), tiny_workload.task(0)
    method = create("dac", model, {"r": 3})
    data = loader(learned.train, learned.tokens, 16, seed=0)
    method.before_task(data, classification_loss)
    assert {slot.adapter.tower for slot in method.slots} == {"vision", "text"}
    model.train()
    for _ in range(2):  # the second step starts with a B that is not zero
        for batch in data:
            classification_loss(model, batch).backward()
            method.optimizer(lr=1e-2).step()
            model.zero_grad()
    text = next(slot for slot in method.slots if slot.target.tower == "text").adapter
    assert text.counts.sum() == 2 * len(data) * 2 * 3  # two votes for each of three prompts, in every step
    model.eval()
    one = Batch(learned.test.images[:1], learned.test.labels[:1], learned.tokens)
    assert torch.isfinite(classification_loss(model, one))
    method.after_task(data)
    merged = classification_loss(model, one)
    other = create("dac", tiny_workload.model(), {"r": 3})
    other.load_state(method.state())
    assert torch.equal(classification_loss(other.model.eval(), one), merged)
    assert type(method.merge().visual.transformer.resblocks[0].attn) is nn.MultiheadAttention
    torch.testing.assert_close(classification_loss(model, one), merged)


def test_a_copy_of_the_model_follows_its_own_texts():
    model = tiny_workload.model()
    method = create("dac", model, {"r": 3})
    method.before_task([], classification_loss)
    twin = copy.deepcopy(model)
    twin.encode_text(tiny_workload.task(0).tokens[:2])
    adapters = [m for m in twin.modules() if isinstance(m, ExpertPool)]
    assert adapters[0].tokens.ids.shape[0] == 2
    assert method.tokens.ids is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 13}, "active .*12.* got 13"),
        ({"merged": 0}, "merged .*12.* got 0"),
        ({"ago_weight": -1.0}, "ago_weight .*got -1.0"),
        ({"dropout": 1.0}, "dropout .*got 1.0"),
        ({"r": 0}, "DacConfig: r .*got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DacConfig(**settings)


def test_a_model_whose_samples_cannot_be_told_is_refused_untouched():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match="batch_first=False"):
        Dac(model)
    assert type(model[0]) is nn.MultiheadAttention


def test_a_state_without_its_past_is_refused():
    method = trained(Dac(net(), CONFIG), task(0))
    method.after_task(task(0))
    state = method.state()
    del state.tensors["2.past"]
    with pytest.raises(ValueError, match=r"2\.past must have shape"):
        Dac(net(), CONFIG).load_state(state)


def test_training_in_evaluation_mode_is_told():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    method = create("dac", model, {"r": 3, "target_modules": "all-linear"})
    method.before_task([], lambda model, batch: model(batch).sum())
    model(torch.randn(4, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"Dac: no batch was routed in train\(\)"):
        method.after_task([])
