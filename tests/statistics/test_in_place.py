"""Models that change a layer's output in place: every pass and step sees what it does where a copy is changed."""

import copy
import importlib
import pkgutil

import bitsandbytes as bnb
import pytest
import stock_peft
import torch
from open_clip.transformer import Attention
from timm.layers import Mlp
from timm.models.eva import EvaAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

import keeplora
from keeplora import KeepLora, KeepLoraConfig
from keeplora.families._open_clip_attention import attention_host, attention_targets
from keeplora.families._timm_attention import eva_host
from keeplora.lora import LoraAdapter, grouped, linear_targets, register_host, wrap
from keeplora.lora.forward import Part, _Merged
from keeplora.lora.grouped import Groups
from keeplora.ops.product import _Product
from keeplora.plan.activations import _Flash
from keeplora.statistics import mean_gradients
from keeplora.statistics.gradients import _Tap

WIDTH = 16
CHANGES = {
    "relu": lambda y: nn.functional.relu(y, inplace=True),
    "add": lambda y: y.__iadd__(0.5),
    "divide": lambda y: y.__itruediv__(2.0),
    "residual": lambda y: y.__iadd__(y.tanh()),
    "fill": lambda y: y.masked_fill_(y < 0, -0.1),
    "a part": lambda y: (y[..., : WIDTH // 2].mul_(3.0), y)[1],
}
HOSTS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "attention": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    "attention, sequence first": lambda: nn.MultiheadAttention(WIDTH, 2),
    "open_clip's attention": lambda: Attention(WIDTH, 2),
    "timm's attention": lambda: EvaAttention(WIDTH, 2, scale_norm=False),
    "timm's MLP": lambda: Mlp(WIDTH, 24, act_layer=lambda: nn.ReLU(inplace=True)),
}


class Changing(nn.Module):
    """Two layers of one kind, whose outputs are changed: in place, or a copy of them."""

    def __init__(self, make, change, *, copies, how="direct"):
        super().__init__()
        self.first, self.second = make(), make()
        self.change, self.copies, self.how = change, copies, how

    def block(self, layer, x):
        y = layer(x, x, x, need_weights=False)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
        return self.change(y.clone() if self.copies else y)

    def forward(self, x):
        for layer in (self.first, self.second):
            if self.how == "direct":
                x = self.block(layer, x)
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.how == "reentrant")
        return x


def loss_fn(model, batch):
    return model(batch).square().mean()


def targets_of(model):
    register_host(Attention, attention_host())
    register_host(EvaAttention, eva_host(), reads="qkv")
    own = [("first", model.first), ("second", model.second)]
    packed = [t for path, m in own if isinstance(m, Attention) for t in attention_targets(path, m, 0, "model")]
    return packed or linear_targets(model)


def life(model, data, **settings):
    """All numbers of a task: directions, gradients of a step, bases, outputs."""
    config = KeepLoraConfig(r=2, target_modules="all-linear", weight_energy=0.2, feature_energy=0.5, **settings)
    keeper = KeepLora(model.train(), config, targets=targets_of(model))
    keeper.before_task(data, loss_fn)
    numbers = [slot.adapter.A.detach().clone() for slot in keeper.slots]
    for _ in range(2):  # the second forward finds weights that were merged ahead
        loss_fn(model, data[0]).backward()
    numbers += [p.grad.clone() for p in keeper.trainable_parameters()]
    with torch.no_grad():
        for p in keeper.trainable_parameters():
            p -= p.grad
    keeper.after_task(data)
    with torch.no_grad():
        return [*numbers, *(keeper.basis(slot.name) for slot in keeper.slots), model.eval()(data[0])]


def both(make, change, how="direct", **settings):
    torch.manual_seed(0)
    plain = Changing(make, change, copies=True, how=how)
    changing = copy.deepcopy(plain)
    changing.copies = False
    data = [torch.randn(3, 5, WIDTH, requires_grad=how == "reentrant") for _ in range(2)]
    return life(plain, data, **settings), life(changing, data, **settings)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", ["direct", "reentrant", "not reentrant"])
@pytest.mark.parametrize("host", HOSTS)
def test_every_host_in_every_pass(host, how):
    plain, changing = both(HOSTS[host], CHANGES["add"], how)
    assert all(map(torch.equal, plain, changing))


@pytest.mark.parametrize("forward", ["merged", "factored", "auto"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_in_every_forward(change, forward):
    plain, changing = both(HOSTS["linear"], CHANGES[change], forward=forward)
    assert all(map(torch.equal, plain, changing))


@pytest.mark.parametrize("settings", [{"train_a": True}, {"gradient_statistic": "sketch"}, {"init_b": "gradient"}])
def test_other_passes_and_adapters(settings):
    plain, changing = both(HOSTS["linear"], CHANGES["residual"], **settings)
    assert all(map(torch.equal, plain, changing))


class ChangingBlock(stock_peft.Block):
    def forward(self, x):
        y = self.down(self.up(x).relu_())
        y += x
        return y


@pytest.mark.parametrize("four_bit", [False, True])
def test_peft_and_four_bit(four_bit):
    width = stock_peft.WIDE if four_bit else stock_peft.WIDTH
    data, numbers = stock_peft.task(0, width=width), []
    for block in (stock_peft.Block, ChangingBlock):
        net = stock_peft.net(width=width)
        if four_bit:
            net = stock_peft.of_bitsandbytes(net, bnb.nn.Linear4bit, "is_loaded_in_4bit")
        for old in net.blocks:
            old.__class__ = block
        model = stock_peft.stock(net)
        state = keeplora.initialize(model, data, stock_peft.loss_fn, config=stock_peft.CONFIG)
        a = [p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name]
        stock_peft.train(model, data, steps=2)
        keeplora.update_subspace(model, data, state, merge=not four_bit)
        numbers.append([*a, *state.bases.values(), *(p.detach() for n, p in model.named_parameters() if "lora" in n)])
    assert all(map(torch.equal, *numbers))


def test_an_input_that_is_changed_behind_a_layers_back_is_refused():
    """As torch does for every weight that takes a gradient: the product with x is yet to come."""

    class Behind(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            x += self[1](x)
            return x

    model = Behind(nn.Linear(4, 4), nn.Linear(4, 4))
    slots = wrap(model, linear_targets(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mean_gradients(model, slots, [torch.randn(3, 4)], loss_fn)


def test_a_layer_may_be_given_a_single_vector():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    one, rows = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randn(6)
    config = KeepLoraConfig(r=1, target_modules="all-linear", feature_energy=0.5)
    bases = []
    for net, data in ((one, [x]), (rows, [x[None]])):
        keeper = KeepLora(net, config)
        keeper.before_task(data, loss_fn)
        keeper.after_task(data)
        bases.append([keeper.basis(slot.name) for slot in keeper.slots])
    for a, b in zip(*bases, strict=True):
        torch.testing.assert_close(a, b)


def merged_arguments():
    adapter = LoraAdapter(torch.randn(2, 4), torch.randn(4, 2), 1.0)
    part = Part(adapter, None, adapter.A, adapter.B, None)
    return torch.randn(3, 4, requires_grad=True), torch.randn(4, 4), part.a, None, None, (part,), part.b


def merged_experts_arguments():
    adapter, groups = LoraAdapter(torch.randn(2, 4), torch.randn(4, 2), 1.0), Groups.of(torch.zeros(3), 2, loops=True)
    x = torch.randn(3, 4, requires_grad=True)
    return x, torch.randn(2, 4, 4), False, groups, (adapter, None), adapter.B


FUNCTIONS = {
    _Tap: lambda: (torch.randn(3, 4), torch.zeros((), requires_grad=True), torch.randn(3, 4), lambda x, dy: None),
    _Merged: merged_arguments,
    grouped._Merged: merged_experts_arguments,
    _Product: lambda: (torch.randn(3, 4, requires_grad=True), torch.randn(4, 2)),
}
"""Every custom autograd Function of the package, and arguments for it; but for one that only counts what it keeps."""


def test_no_custom_function_returns_its_input_or_a_view_of_it():
    for module in pkgutil.walk_packages(keeplora.__path__, "keeplora."):
        if module.name.rpartition(".")[2] not in ("__main__", "_cpu", "_cuda"):  # libraries are no modules
            importlib.import_module(module.name)
    ours = {c for c in torch.autograd.Function.__subclasses__() if c.__module__.startswith("keeplora.")}
    assert ours - {_Flash} == set(FUNCTIONS), "name arguments for a new Function above"
    for function, arguments in FUNCTIONS.items():
        given = arguments()
        result = function.apply(*given)
        held = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        assert result.untyped_storage().data_ptr() not in held
        result.add_(1.0)  # autograd refuses this for a view made in a Function
        result.sum().backward()
