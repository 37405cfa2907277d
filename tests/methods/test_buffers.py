"""Frozen means frozen: no buffer of the model moves while a task is learned, whatever train() does to it."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from keeplora.methods import METHODS, FullFineTuning, StateError, create, load
from keeplora.methods.buffers import Buffers
from tests.methods.contract import SMALL, WIDTH, make, task
from tests.methods.stateful import KINDS, Average, Codebook, Stateful, Written, buffers, equal, loss_fn, stateful, train


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stays_at_every_moment_and_computes_as_the_frozen_model_does(kind):
    method = stateful(kind)
    before, x = buffers(method), torch.randn(2, 4, WIDTH)
    reference = copy.deepcopy(method.model).eval()(x)
    method.before_task(task(0), loss_fn)
    method.model.train()
    method.model.drop.p = 0.0
    if kind not in ("codebook", "average"):  # what is frozen beside training answers as it does in evaluation
        torch.testing.assert_close(method.model(x), reference, rtol=0, atol=1e-6)
    for batch in task(0):
        loss_fn(method.model, batch).backward()
        assert equal(buffers(method), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert method.after_task(task(0)).buffers == ()
    assert equal(buffers(method), before)
    assert method.model.layer.training
    assert "train" not in vars(method.model.layer)
    method.merge()
    assert not any(m._forward_hooks or (m._forward_pre_hooks and kind != "spectral norm, older")
                   for m in method.model.layer.modules())  # fmt: skip


def test_every_method_keeps_them_but_those_that_train_everything(name):
    method = stateful("BatchNorm", name)
    before = buffers(method)
    method.before_task(task(0), loss_fn)
    train(method, task(0))
    assert equal(buffers(method), before) is (name not in ("full", "joint"))
    assert method.model.drop.training
    method.after_task(task(0))
    assert equal(buffers(method), before) is (name not in ("full", "joint"))


def test_dropout_still_drops_and_eval_still_does_not():
    method, x = stateful("BatchNorm"), torch.randn(2, 4, WIDTH)
    method.before_task(task(0), loss_fn)
    method.model.train()
    assert method.model.drop.training
    assert not method.model.layer.training
    assert not torch.equal(method.model(x), method.model(x))
    method.model.eval()
    assert torch.equal(method.model(x), method.model(x))
    method.after_task(task(0))
    assert not method.model.layer.training
    assert method.model.train().layer.training


def test_what_is_written_from_elsewhere_is_put_back_and_named():
    method = stateful(Written())
    before, x = buffers(method), torch.randn(2, 4, WIDTH)
    unlearned = method.model.eval()(x)
    method.before_task(task(0), loss_fn)
    train(method, task(0), lr=0.0)
    assert not equal(buffers(method), before)
    with pytest.warns(UserWarning, match=r"after_task: buffers must .*got 1 .*layer\.queue\.rows"):
        method.after_task(task(0))
    assert equal(buffers(method), before)
    assert torch.equal(method.model.eval()(x), unlearned)


class Observer(Average):
    """It moves in eval() too, as observers of quantisation do."""

    def forward(self, x):
        self.mean.add_(x.detach().mean(0))
        return x


def test_what_moves_in_the_passes_is_put_back_too():
    method = stateful(Observer())
    before = buffers(method)
    with pytest.raises(IndexError):
        method.before_task(task(0), lambda model, batch: model(batch[0]).sum() + [][0])
    assert equal(buffers(method), before)
    with pytest.warns(UserWarning, match=r"before_task: buffers must .*layer\.mean"):
        method.before_task(task(0), loss_fn)
    assert equal(buffers(method), before)
    method.after_task(task(0))
    assert equal(buffers(method), before)


class Cache(Average):
    """A table outside of the state_dict that grows with what it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x):
        if len(self.table) < len(x):
            self.table = torch.zeros(len(x))
        return x


def test_caches_are_left_alone_and_named_in_the_certificate():
    method = stateful(Cache())
    method.before_task(task(0)[:1], loss_fn)
    assert len(method.model.layer.table) == 8
    report = method.after_task(task(0))
    assert report.buffers == ("layer.table",)
    assert len(method.model.layer.table) == 8
    assert report.to_dict()["buffers"] == ["layer.table"]
    assert "layer.table" in str(report)


def test_an_abandoned_task_never_moved_them(name):
    method = stateful("BatchNorm", name)
    before = buffers(method)
    method.before_task(task(0), loss_fn)
    train(method, task(0))
    method.abandon_task()
    assert equal(buffers(method), before)
    assert method.model.train().layer.training


@pytest.mark.parametrize("kind", ["BatchNorm", "codebook"])
def test_a_task_that_cannot_be_opened_or_closed_leaves_them(kind):
    method = stateful(kind)
    before, broken = buffers(method), lambda model, batch: model(batch[0]).sum() + [][0]
    with pytest.raises(IndexError):
        method.before_task(task(0), broken)
    assert equal(buffers(method), before)
    assert method.model.train().layer.training
    method.before_task(task(0), loss_fn)
    with pytest.raises(IndexError):
        method.after_task(task(0), broken)
    train(method, task(0))  # the task is still open
    assert equal(buffers(method), before)


@pytest.mark.parametrize("kind", ["BatchNorm", "codebook"])
def test_a_task_from_a_state_keeps_them(kind, tmp_path):
    method = stateful(kind)
    pretrained = Stateful(KINDS[kind]())
    pretrained.load_state_dict(method.model.state_dict())
    method.before_task(task(0), loss_fn)
    train(method, task(0))
    method.save(tmp_path)
    again = load(tmp_path, pretrained)
    before = buffers(again)
    train(again, task(0))
    assert equal(buffers(again), before)
    again.abandon_task()
    assert again.model.train().layer.training


@pytest.mark.parametrize("name", ["keeplora", "lora", "gpm", "lines"])
def test_if_the_user_wants_them_to_move_they_are_part_of_the_state(name, tmp_path):
    free = {"frozen_buffers": False}
    free = {"settings": {**SMALL["lines"]["settings"], **free}} if name == "lines" else free
    method = stateful("BatchNorm", name, **free)
    pretrained = Stateful(KINDS["BatchNorm"]())
    pretrained.load_state_dict(method.model.state_dict())
    before = buffers(method)
    method.before_task(task(0), loss_fn)
    train(method, task(0))
    moved = buffers(method)
    assert not equal(moved, before)
    method.save(tmp_path / "open")
    report = method.after_task(task(0))
    if name == "keeplora":
        names = [f"layer.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")]
        assert list(report.buffers) == names
        assert "3 buffers moved" in str(report)
    method.save(tmp_path / "closed")
    for folder in ("open", "closed"):
        again = load(tmp_path / folder, copy.deepcopy(pretrained))
        assert equal(buffers(again), moved)
        if folder == "open":
            again.abandon_task()
            assert equal(buffers(again), before)


def test_moving_buffers_of_another_shape_are_refused():
    method = stateful("BatchNorm", frozen_buffers=False)
    state = method.state()
    state.tensors["buffers.layer.running_mean"] = torch.zeros(3)
    with pytest.raises(StateError, match=r"buffers\.layer\.running_mean must be \[8\]"):
        method.load_state(state)


def test_modules_that_may_move_and_lazy_ones():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH), nn.LazyBatchNorm1d())
    held = Buffers(model, free=["1"])
    held.hold()
    model.train()(torch.randn(4, WIDTH) + 3)
    assert model[0].running_mean.eq(0).all()
    assert not model[1].running_mean.eq(0).any()
    held.release()
    assert all(layer.training for layer in model)


@pytest.mark.parametrize("kind", ["BatchNorm", "codebook"])
def test_a_copy_or_a_pickle_of_an_open_task_holds_its_own(kind):
    method = stateful(kind)
    method.before_task(task(0), loss_fn)
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method)) if kind == "BatchNorm" else None):
        if twin is not None:
            before = buffers(twin)
            train(twin, task(0))
            assert equal(buffers(twin), before)
            twin.abandon_task()
            assert twin.model.train().layer.training
    before = buffers(method)
    train(method, task(0))
    assert equal(buffers(method), before)


def test_modules_whose_buffers_rest_cost_nothing_after_their_first_forward():
    layer = Average()
    layer.forward = lambda x: x - layer.mean
    method = stateful(layer)
    method.before_task(task(0), loss_fn)
    assert layer._forward_hooks
    train(method, task(0)[:1])
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_compiled_model_keeps_running_statistics():
    method = stateful("BatchNorm")
    method.before_task(task(0), loss_fn)
    compiled, before = torch.compile(method.model, backend="eager"), buffers(method)
    compiled.train()
    compiled(task(0)[0][0])
    assert equal(buffers(method), before)


def test_what_moves_between_tasks_is_said_when_a_state_is_made(tmp_path):
    method = stateful("BatchNorm")
    method.before_task(task(0), loss_fn)
    train(method, task(0))
    method.after_task(task(0))
    method.state()
    method.model.train()
    loss_fn(method.model, task(1)[0])
    with pytest.warns(UserWarning, match=r"save: buffers must .* 3 .*running_mean"):
        method.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.save(tmp_path)  # once is enough


def test_a_model_in_another_dtype_has_the_same_buffers():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), Codebook()).to(torch.bfloat16)
    model[0].running_mean[0] = torch.nan  # equal to itself here
    held = Buffers(model)
    held.hold()
    model.double()
    assert held.put_back() == []
    model[0].running_mean[1] = 7.0
    assert held.put_back() == ["0.running_mean"]
    assert model[0].running_mean.dtype == torch.float64
    assert model[0].running_mean[1] == 0


def test_a_layer_that_is_replaced_in_an_open_task_is_noticed():
    method = stateful("BatchNorm")
    method.before_task(task(0), loss_fn)
    method.model.layer = nn.BatchNorm1d(WIDTH).requires_grad_(False)  # as convert_sync_batchnorm does it
    train(method, task(0), lr=0.0)
    with pytest.warns(UserWarning, match=r"after_task: buffers must .*layer\.running_mean"):
        method.after_task(task(0))
    assert method.model.layer.running_mean.eq(0).all()


def test_what_trains_everything_says_so():
    assert not FullFineTuning(nn.Sequential(nn.Linear(3, 3))).frozen_buffers
    assert make("lora").frozen_buffers
    assert not make("lines").freezes


class Momentum(nn.Module):
    """A momentum encoder: frozen parameters that the forward moves by hand, as in MoCo and ALBEF."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.training:
            self.key.weight.data = 0.9 * self.key.weight.data + 0.1 * self.query.weight.data
        return self.query(x) + self.key(x)


def test_frozen_parameters_that_are_written_to_are_named():
    method = stateful(Momentum())
    method.before_task(task(0), loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.state()
    train(method, task(0))
    with pytest.warns(UserWarning, match=r"after_task: frozen parameters must .*got 1 .*layer\.key\.weight"):
        method.after_task(task(0))


def one_of_4096(weight):
    weight.data.view(-1)[1234] += 1e-3  # past the counter of versions


def a_sign(weight):
    with torch.no_grad():
        weight[3, 7] *= -1


def rows_in_another_order(weight):
    with torch.no_grad():
        weight[[5, 6]] = weight[[6, 5]].clone()


def nothing(weight):
    with torch.no_grad():
        weight.copy_(weight.clone())


class Wide(nn.Module):
    """Frozen values of which a sample sees few."""

    def __init__(self):
        super().__init__()
        self.layer, self.rest = nn.Linear(WIDTH, WIDTH), nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("write", [one_of_4096, a_sign, rows_in_another_order, nothing])
@pytest.mark.parametrize("calls", [1, 2])
def test_every_value_of_a_frozen_parameter_counts(write, calls):
    method = create("keeplora", Wide(), {"r": 2, "target_modules": "layer", "feature_energy": 0.3})
    data = [torch.randn(4, WIDTH) for _ in range(2)]
    for _ in range(calls):  # the second time hashes are remembered
        method.before_task(data, lambda model, x: model(x).square().mean())
        write(method.model.rest.weight)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            method.after_task(data)
        named = [str(each.message) for each in told if "frozen parameters" in str(each.message)]
        assert len(named) == (write is not nothing)
        assert all("got 1 that" in message and "rest.weight" in message for message in named)


def test_no_method_moves_what_it_froze(name):
    method = stateful("BatchNorm", name)
    for seed in range(2):
        method.before_task(task(seed), loss_fn)
        train(method, task(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", message=f"{type(method).__name__}: |Gpm: ")
            method.after_task(task(seed))
