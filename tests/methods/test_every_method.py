"""The contract every registered method keeps. A new method is covered the moment it is registered."""

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from keeplora.families.class_head import adjusted_logits
from keeplora.methods import METHODS, State, create

WIDTH = 8
SMALL = {
    "lora": {"r": 2},
    "gpm": {"feature_energy": 0.5},
    "inflora": {"r": 2, "alpha": 2.0, "feature_energy": 0.5, "tasks": 40},
    "o-lora": {"r": 2, "decay": 0.01},
    "sd-lora": {"r": 2, "alpha": 2.0},
    "loda": {"r": 2},
    "lines": {"base": "lora", "settings": {"r": 2}, "alpha": 0.5},
    "keeplora": {"r": 2, "weight_energy": 0.1, "feature_energy": 0.3},
    "keeplora++": {"r": 2, "weight_energy": 0.1, "feature_energy": 0.3},
    "keeplora++cls": {"r": 2, "weight_energy": 0.1, "feature_energy": 0.3},
    "dac": {"r": 3, "dropout": 0.0},  # which draws from the global generator
    "duallora": {"r": 2, "feature_energy": 0.5},
    "hdsd": {"r": 2},
}


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


class Net(nn.Module):
    """Two towers, since some methods work on image features; an "image" is a sequence, a text one of three words."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.words = nn.Embedding(3, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0].mean(1)

    def encode_image(self, image, normalize=False):
        features = self(image)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text, normalize=False):
        features = self.head(self.words(text[:, 0]))
        return nn.functional.normalize(features, dim=-1) if normalize else features


def scores(model, x, classes=3):
    """Logits with the say of the method's head, if it has one."""
    tokens = torch.arange(classes)[:, None]
    images, texts = model.encode_image(x, normalize=True), model.encode_text(tokens, normalize=True)
    return adjusted_logits(model, model.logit_scale.exp() * images @ texts.T, images, tokens)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(scores(model, batch[0]), batch[1])


def one_class_loss(model, batch):
    logits = scores(model, batch[0], classes=1)
    return nn.functional.cross_entropy(logits, batch[1]) - 0.01 * logits.mean()  # one class alone has no gradient


def task(seed):
    g = torch.Generator().manual_seed(seed)
    return [Batch(torch.randn(8, 4, WIDTH, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(3)]


def learn(method, data, steps=4, loss_fn=loss_fn):
    torch.manual_seed(5)  # of dropout
    method.before_task(data, loss_fn)
    parameters = method.trainable_parameters()
    if method.trains:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(method.model, data[step % len(data)])
            penalty = method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            method.after_step()
    return method.after_task(data)


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


def one_rank(name):
    """The settings of SMALL with rank 1 where there is a rank."""
    settings = dict(SMALL.get(name, {}))
    if "settings" in settings:
        return {**settings, "settings": {**settings["settings"], "r": 1}}
    return {**settings, **({"r": 1} if "r" in settings else {})}


def make(name, model=None):
    return create(name, model or Net(), SMALL.get(name))


def test_starts_from_the_unchanged_function(name):
    model, x = Net(), torch.randn(2, 4, WIDTH)
    before = model(x)
    method = make(name, model)
    assert method.model is model
    assert torch.equal(model(x), before)
    method.before_task(task(0), loss_fn)
    assert torch.equal(model(x), before)


HEADS = {"keeplora++cls": "each task brings a classifier that starts at class means, as in its public code"}


def test_a_later_task_starts_from_the_function_of_the_one_before(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    learn(method, task(0))
    before, logits = method.model(x), scores(method.model, x)
    method.before_task(task(1), loss_fn)
    torch.testing.assert_close(method.model(x), before, rtol=0, atol=1e-6)
    if name not in HEADS:
        torch.testing.assert_close(scores(method.model, x), logits, rtol=0, atol=1e-5)


def test_only_declared_parameters_change(name):
    method = make(name)
    method.before_task(task(0), loss_fn)
    declared = {id(p) for p in method.trainable_parameters()}
    assert {id(p) for p in method.model.parameters() if p.requires_grad} == declared or not method.trains
    others = {n: p.detach().clone() for n, p in method.model.named_parameters() if id(p) not in declared}
    if method.trains:
        optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1)
        loss_fn(method.model, task(0)[0]).backward()
        optimizer.step()
    now = dict(method.model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in others.items())


def test_learns_something_unless_it_never_trains(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    before = method.model(x)
    learn(method, task(0))
    assert torch.equal(method.model(x), before) is not method.trains


def test_state_round_trips(name):
    start = Net()
    one, other = make(name, copy.deepcopy(start)), make(name, copy.deepcopy(start))
    learn(one, task(0))
    state = one.state()
    other.load_state(State({k: v.clone() for k, v in state.tensors.items()}, copy.deepcopy(state.meta)))
    assert learn(one, task(1)) == learn(other, task(1))
    x = torch.randn(2, 4, WIDTH)
    assert torch.equal(one.model(x), other.model(x))


def test_state_is_a_copy(name):
    method = make(name)
    learn(method, task(0))
    state = method.state()
    kept = {k: v.clone() for k, v in state.tensors.items()}
    learn(method, task(1))
    assert all(torch.equal(kept[k], state.tensors[k]) for k in kept)


def test_two_runs_agree(name):
    start, x = Net(), torch.randn(2, 4, WIDTH)
    outputs = []
    for _ in range(2):
        method = make(name, copy.deepcopy(start))
        learn(method, task(0))
        learn(method, task(1))
        outputs.append(method.model(x))
    assert torch.equal(*outputs)


def test_evaluation_does_not_change_state(name):
    method = make(name)
    learn(method, task(0))
    before = method.state()
    method.model.eval()
    x = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        method.model(x)
        first = scores(method.model, x)
        assert torch.equal(scores(method.model, x), first)
    assert same(method.state(), before)


def test_batches_of_one_and_rank_one(name):
    method, x = create(name, Net(), one_rank(name)), torch.randn(1, 4, WIDTH)
    before = method.model(x)
    for _ in range(2):
        learn(method, [Batch(torch.randn(1, 4, WIDTH), torch.tensor([2]))])
    after = method.model.eval()(x)
    assert torch.isfinite(after).all()
    assert torch.equal(after, before) is not method.trains


def test_a_task_of_one_class(name):
    method, data = make(name), [Batch(x, torch.zeros_like(y)) for x, y in task(0)]
    for _ in range(2):
        learn(method, data, loss_fn=one_class_loss)
    assert all(torch.isfinite(p).all() for p in method.model.parameters())
    assert torch.isfinite(scores(method.model.eval(), data[0].images, classes=1)).all()


def same(one, other):
    return one.meta == other.meta and all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)


class Breaking:
    """A task's batches, until the data is gone."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        yield from self.data[:-1]
        raise OSError("the data is gone")


LOOKS_BEFORE = {"inflora", "loda", "keeplora", "keeplora++", "keeplora++cls", "duallora"}
LOOKS_AFTER = {"gpm", "inflora", "loda", "keeplora", "keeplora++", "keeplora++cls", "duallora"}


def test_a_task_that_cannot_be_opened_changes_nothing(name):
    method = make(name)
    learn(method, task(0))
    before, kinds = method.state(), [type(module) for module in method.model.modules()]
    if name not in LOOKS_BEFORE:
        method.before_task(Breaking(task(1)), loss_fn)  # it never looks at the data
        return
    with pytest.raises(OSError, match="the data is gone"):
        method.before_task(Breaking(task(1)), loss_fn)
    assert same(method.state(), before)
    assert [type(module) for module in method.model.modules()] == kinds
    learn(method, task(1))  # and it can be tried again


def test_a_task_that_cannot_be_closed_stays_open(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    method.before_task(task(0), loss_fn)
    if method.trains:
        torch.manual_seed(5)
        loss_fn(method.model, task(0)[0]).backward()
        torch.optim.SGD(method.trainable_parameters(), lr=0.1).step()
    method.model.eval()
    learned = method.model(x)
    if name not in LOOKS_AFTER:
        method.after_task(Breaking(task(0)))
        return
    with pytest.raises(OSError, match="the data is gone"):
        method.after_task(Breaking(task(0)))
    assert torch.equal(method.model(x), learned)
    method.after_task(task(0))


def test_what_training_has_driven_to_nan_is_refused(name):
    method = make(name)
    method.before_task(task(0), loss_fn)
    if name in NEVER_CHECKED:
        pytest.skip(NEVER_CHECKED[name])
    with torch.no_grad():
        method.trainable_parameters()[0].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf"):
        method.after_task(task(0))


NEVER_CHECKED = {
    "zero-shot": "it trains nothing",
    "full": "the model itself is what was trained: there is nothing to keep it out of",
    "joint": "the model itself is what was trained: there is nothing to keep it out of",
}


def test_damaged_states_are_refused_before_anything_changes(name):
    method = make(name)
    learn(method, task(0))
    state, fresh = method.state(), make(name, Net())
    before = fresh.state()
    for broken in sorted(state.tensors):
        tensors = {k: v for k, v in state.tensors.items() if k != broken}
        for damaged in (tensors, {**tensors, broken: torch.zeros(3, 1, 2)}):
            with pytest.raises(ValueError, match="load_state: "):
                fresh.load_state(State(damaged, copy.deepcopy(state.meta)))
        assert same(fresh.state(), before)


def test_a_model_without_linear_layers_is_refused_by_what_adapts_them(name):
    config = METHODS[name].config
    if name == "lines" or not any(f.name == "target_modules" for f in dataclasses.fields(config)):
        pytest.skip("it has no layers to choose")
    if name == "keeplora++cls":
        pytest.skip("it asks for image features before it asks for layers")
    with pytest.raises(ValueError, match="select_targets: targets must not be empty, got a model without any linear"):
        make(name, nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten()))


def test_a_rank_that_no_layer_can_hold_is_refused_before_any_training(name):
    settings = dict(SMALL.get(name, {}))
    if "r" not in settings:
        pytest.skip("it has no rank")
    with pytest.raises(ValueError, match=r"r must be at most .*8.* Lower r"):
        create(name, Net(), {**settings, "r": WIDTH + 1})


def test_a_merged_model_is_made_of_plain_layers_and_computes_the_same(name):
    method, x = make(name), torch.randn(2, 4, WIDTH)
    learn(method, task(0))
    learned = method.model(x)
    if not method.merges:
        with pytest.raises(RuntimeError, match="computes more than the pretrained model"):
            method.merge()
        return
    kinds = [type(module) for module in Net().modules()]
    model = method.merge()
    assert model is method.model
    assert [type(module) for module in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert set(model.state_dict()) == set(Net().state_dict())
    torch.testing.assert_close(model(x), learned, rtol=1e-5, atol=1e-6)


def test_states_of_other_methods_are_refused(name):
    method = make(name)
    with pytest.raises(ValueError, match="state must be of method"):
        method.load_state(State({}, {"method": "another"}))


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"name must be a method, got 'keplora'. Nearest names: keeplora"):
        create("keplora", Net())
    with pytest.raises(ValueError, match=r"method 'keeplora' do not include 'alfa'.* Nearest names: alpha"):
        create("keeplora", Net(), {"alfa": 3})
    with pytest.raises(ValueError, match="do not include 'lr'"):
        create("zero-shot", Net(), {"lr": 1})


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": True}, {"alpha": -1.0}])
def test_lora_refuses_bad_settings(settings):
    with pytest.raises(ValueError, match="LoraConfig: "):
        create("lora", Net(), settings)


def test_calls_out_of_order_are_refused(name):
    method = make(name)
    if not method.trains or name in ("full", "joint"):
        pytest.skip("every order is fine")
    with pytest.raises(RuntimeError, match="after_task: a task must be open"):
        method.after_task(task(0))
    with pytest.raises(RuntimeError, match="trainable_parameters: a task must be open"):
        method.trainable_parameters()
    method.before_task(task(0), loss_fn)
    with pytest.raises(RuntimeError, match="previous task must be closed first"):
        method.before_task(task(0), loss_fn)
    with pytest.raises(RuntimeError, match="merge: "):
        method.merge()


def test_lora_refuses_to_save_an_open_task():
    method = make("lora")
    method.before_task([], loss_fn)
    with pytest.raises(RuntimeError, match="state: the open task must be closed first"):
        method.state()
