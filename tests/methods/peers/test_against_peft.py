"""The peers against stock PEFT on the same layers, and what they promise on their own."""

import copy
import itertools
import warnings

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, OSFConfig, get_peft_model, preprocess_loraga
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

from keeplora.methods import create
from tests.close import assert_rounded

PEERS = ["mica", "osf", "corda", "lora-ga", "eva"]
R, SMALL = 2, {"target_modules": "all-linear"}


def net(layers=2):
    torch.manual_seed(3)
    sizes = [9, 12, 7][: layers + 1]
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for linear in linears for part in (linear, nn.Tanh())])


def task(seed, batches=3, size=16):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 9, generator=g), torch.randint(5, (size,), generator=g)) for _ in range(batches)]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def made(name, model, **settings):
    rank = {} if name == "osf" else {"r": R}
    return create(name, model, {**SMALL, **rank, **settings})


def train(model, parameters, data, steps=4):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model, data[step % len(data)]).backward()
        optimizer.step()


def trained(method, data):
    method.before_task(data, loss_fn)
    train(method.model, method.trainable_parameters(), data)
    return method


def stock(name, data, layers=1, alpha=R, scale="stable"):
    """The same, by PEFT's own calls as its documentation has them."""
    model, names = net(layers), [str(2 * i) for i in range(layers)]
    options = {"r": R, "lora_alpha": alpha, "target_modules": names}
    torch.manual_seed(0)  # what a method draws from with seed 0 in its first task
    if name == "mica":
        return get_peft_model(model, LoraConfig(init_lora_weights="mica", **options))
    if name == "osf":
        return get_peft_model(model, OSFConfig(effective_rank=0.5, target_modules=names))
    if name == "lora-ga":
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(scale=scale), **options)
        preprocess_loraga(model, config, lambda: [loss_fn(model, batch).backward() for batch in data])
    else:
        config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), **options)
        preprocess_corda(model, config, run_model=lambda: model(torch.cat([x for x, _ in data])))
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "alpha", "settings"),
    [
        ("mica", R, {}), ("mica", 3.0, {}), ("osf", R, {}), ("lora-ga", R, {}), ("lora-ga", 3.0, {}),
        ("lora-ga", 3.0, {"init_scale": "gd_scale"}),
    ],
)  # fmt: skip
def test_a_task_is_what_stock_peft_makes_of_it(name, alpha, settings):
    data = task(0)
    theirs = stock(name, data, alpha=alpha, scale=settings.get("init_scale", "stable"))
    method = made(name, net(1), **settings, **({} if name == "osf" else {"alpha": float(alpha)}))
    train(theirs, [p for p in theirs.parameters() if p.requires_grad], data)
    trained(method, data)
    x = task(7)[0][0]
    assert (method.model(x) - net(1)(x)).abs().max() > 1e-3
    near = 1e-5  # outputs are about 1; both round their start on their own, and Adam's steps make more of it
    torch.testing.assert_close(method.model(x), theirs(x), rtol=0, atol=near)
    method.after_task(data)
    merged = theirs.merge_and_unload() if name != "osf" else theirs.base_model.merge_and_unload()
    torch.testing.assert_close(method.merge()(x), merged(x), rtol=0, atol=near)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [R, 3.0])
def test_corda_takes_out_what_stock_peft_takes_out(alpha):
    """The product: how PEFT shares it out between A and B depends on the number of tokens."""
    data = task(0)
    theirs = stock("corda", data, alpha=alpha).base_model.model[0]
    method = made("corda", net(1), alpha=float(alpha))
    method.before_task(data, loss_fn)
    adapter = method.slots[0].adapter
    expected = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(adapter.origin @ adapter.start, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.vector_norm(adapter.A), torch.linalg.vector_norm(adapter.B))


@pytest.mark.filterwarnings("ignore")
def test_eva_finds_what_stock_peft_finds():
    """On one batch again and again, where PEFT's components settle."""
    data = [(x * 3.0 ** -torch.arange(9), y) for x, y in task(0, batches=1, size=64)] * 3
    for layers, rho in ((1, 1.0), (2, 2.0)):
        names = [str(2 * i) for i in range(layers)]
        config = LoraConfig(r=R, init_lora_weights="eva", eva_config=EvaConfig(rho=rho), target_modules=names)
        theirs = get_eva_state_dict(
            net(layers), data, config, forward_fn=lambda model, batch: model(batch[0]),
            prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
        method = made("eva", net(layers), rho=rho)
        method.before_task(data, loss_fn)
        for slot, (name, rows) in zip(method.slots, theirs.items(), strict=True):
            assert slot.name == name
            mine = slot.weight.new_zeros(0, rows.shape[1]) if slot.adapter is None else slot.adapter.A.detach()
            assert mine.shape == rows.shape
            torch.testing.assert_close((mine @ rows.float().T).abs(), torch.eye(len(rows)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PEERS)
def test_opening_changes_no_bit_and_closing_no_function(name, dtype, tmp_path):
    data = [(x.to(dtype), y) for x, y in task(0)]
    method, x = made(name, net().to(dtype)), data[0][0]
    before, numbers = method.model(x), torch.get_rng_state()
    method.before_task(data, loss_fn)
    assert torch.equal(method.model(x), before)
    assert torch.equal(torch.get_rng_state(), numbers)  # nobody else's draws are moved
    train(method.model, method.trainable_parameters(), data)
    method.save(tmp_path)
    again = made(name, net().to(dtype))
    again.load_state(type(method).load(tmp_path, net().to(dtype)).state())
    assert torch.equal(again.model(x), method.model(x))
    learned = method.model(x)
    assert not torch.equal(learned, before)
    method.after_task(data)
    near = 0.05 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(method.model(x), learned, rtol=0, atol=near)
    plain = method.merge()
    assert [type(part) for part in plain] == [type(part) for part in net()]
    torch.testing.assert_close(plain(x), learned, rtol=0, atol=near)


@pytest.mark.parametrize("name", PEERS)
def test_every_task_starts_anew_and_draws_its_own_numbers(name):
    method = made(name, net())
    starts = []
    for seed in range(2):
        method.before_task(task(seed), loss_fn)
        starts.append([slot.adapter.B.detach().clone() for slot in method.slots if slot.adapter is not None])
        train(method.model, method.trainable_parameters(), task(seed))
        method.after_task(task(seed))
        assert all(slot.adapter is None for slot in method.slots)
    assert starts[0]
    if name != "eva":  # whose B starts at 0
        assert not any(one.shape == other.shape and torch.equal(one, other) for one, other in zip(*starts, strict=True))


@pytest.mark.parametrize(("name", "most"), [("mica", 7), ("corda", 7), ("eva", 7), ("lora-ga", 3)])
def test_a_rank_that_a_weight_has_no_directions_for_is_refused_before_anything_changes(name, most):
    model = net()
    with pytest.raises(ValueError, match=rf"r must be at most {most}, got {most + 1} for a weight \[7, 12\] \[2\]"):
        create(name, model, {**SMALL, "r": most + 1})
    assert type(model[0]) is type(model[2]) is nn.Linear
    method = create(name, model, {**SMALL, "r": most})
    method.before_task(task(0), loss_fn)
    assert method.slots[1].adapter is not None


@pytest.mark.parametrize("version", [None, "0.20.1", "0.9"])
@pytest.mark.parametrize("name", PEERS)
def test_without_peft_nothing_changes_and_the_remedy_is_told(name, version, monkeypatch):
    from importlib import metadata

    def old(package):
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", old)
    model = net()
    with pytest.raises(ImportError, match=rf"peft must be .*0\.21.* got {version or 'none'}\. .*keeplora\[peft\]"):
        made(name, model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("name", PEERS)
def test_peft_has_nothing_to_warn_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(made(name, net()), task(0)).after_task(task(0))


def test_corda_counts_earlier_tasks_as_much_as_the_new_one():
    """Against float64 from the definition: C, W C, and the components that it holds least of."""
    method, moments = made("corda", net(1)), []
    for seed in range(3):
        data = [(x * (1 + torch.arange(9) * seed), y) for x, y in task(seed)]
        rows = torch.cat([x for x, _ in data]).double()
        moments.append(rows.T @ rows / len(rows))
        weight = method.slots[0].weight.detach().double()
        method.before_task(data, loss_fn)
        c = torch.stack(moments).sum(0)
        c = c + 0.01 * c.diagonal().mean() * torch.eye(9, dtype=c.dtype)
        u, s, v = torch.linalg.svd(weight @ c, full_matrices=False)
        exact = (u[:, -R:] * s[-R:]) @ v[-R:] @ torch.linalg.inv(c)
        adapter = method.slots[0].adapter
        error = torch.linalg.matrix_norm(adapter.origin.double() @ adapter.start.double() - exact)
        assert error < 1e-3 * torch.linalg.matrix_norm(exact)
        method.after_task(data)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_corda_starts_where_nothing_varies_too(scale):
    data = [(torch.full_like(x, scale), y) for x, y in task(0)]
    method = made("corda", net())
    method.before_task(data, loss_fn)
    assert all(torch.isfinite(p).all() for p in method.trainable_parameters())


def test_lora_ga_starts_along_the_mean_gradient():
    method, data = made("lora-ga", net()), task(0)
    method.before_task(data, loss_fn)
    plain = net()
    torch.stack([loss_fn(plain, batch) for batch in data]).mean().backward()
    for slot, layer in zip(method.slots, (plain[0], plain[2]), strict=True):
        gradient = layer.weight.grad.double()
        u, s, v = torch.linalg.svd(gradient)
        a, b = slot.adapter.A.detach().double(), slot.adapter.B.detach().double()
        torch.testing.assert_close((a @ v[:R].T).abs(), torch.eye(R, dtype=a.dtype), rtol=0, atol=1e-4)
        scale = len(gradient) ** 0.25 / 4
        torch.testing.assert_close((u[:, R : 2 * R].T @ b).abs(), torch.diag(s[R : 2 * R]) * scale, rtol=0, atol=1e-5)


def test_osf_keeps_the_leading_directions_and_trains_a_smaller_rest_in_every_task():
    method = made("osf", net(1), effective_rank=0.5, rank_step=0.2)
    trained_ranks = []
    for seed in range(4):
        before = method.slots[0].weight.detach().double().clone()
        u, s, v = torch.linalg.svd(before, full_matrices=False)
        trained(method, task(seed))
        k = 9 - method.slots[0].adapter.rank
        trained_ranks.append(9 - k)
        method.after_task(task(seed))
        after = method.slots[0].weight.double()
        assert (after - before).abs().max() > 1e-3
        core = u[:, :k].T @ after @ v[:k].T  # SGD stays where gradients are
        assert_rounded(core.float(), torch.diag(s[:k]), terms=400, what="leading directions")
        assert method.slots[0].learned is None
    assert trained_ranks == [5, 3, 1, 1]  # 0.5, 0.7, 0.9, then all but one of 9


def test_osf_is_trained_as_it_is_after_a_copy_and_from_a_state():
    method, data = trained(made("osf", net()), task(0)), task(0)
    twin, loaded = copy.deepcopy(method), made("osf", net())
    loaded.load_state(method.state())
    for each in (method, twin, loaded):
        train(each.model, each.trainable_parameters(), data)
    assert torch.equal(method.model(data[0][0]), twin.model(data[0][0]))
    assert torch.equal(method.model(data[0][0]), loaded.model(data[0][0]))
