import pytest
import torch
from torch import nn

from keeplora.lora import Target, depth_positions, linear_targets, select_targets, unwrap, wrap
from keeplora.statistics import feature_statistics, mean_gradients


def tower():
    blocks = [
        nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8), "act": nn.ReLU()}) for _ in range(2)
    ]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(8, 3)})


def test_finds_attention_as_four_targets_and_no_inner_linear():
    names = [target.name for target in linear_targets(tower())]
    assert names[:5] == [f"blocks.0.attn.{p}_proj" for p in ("q", "k", "v", "out")] + ["blocks.0.fc"]
    assert len(names) == 11
    assert names[-1] == "head"


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("all-linear", 11),
        (["attn"], 8),
        (["q_proj", "v_proj"], 4),
        (["blocks.1"], 5),
        ("head", 1),
        (["attn.out_proj"], 2),
    ],
)
def test_selects_by_whole_components(names, count):
    assert len(select_targets(linear_targets(tower()), names)) == count


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["q_prj"], r"got 'q_prj', which matches none of 11 linear layers. Nearest names: .*q_proj"),
        (["att"], "Nearest names: .*attn"),
        (["attn", "heed"], "got 'heed'.*head"),
        ([], "at least one module"),
    ],
)
def test_unknown_names_offer_the_nearest(names, message):
    with pytest.raises(ValueError, match=message):
        select_targets(linear_targets(tower()), names)


def test_model_without_linear_layers():
    with pytest.raises(ValueError, match="without any linear layer"):
        select_targets(linear_targets(nn.Sequential(nn.Conv2d(1, 1, 1))), "all-linear")


def test_depth_counts_adapted_blocks_inside_each_tower():
    def at(tower, depth, name):
        return Target(name, name, "weight", None, depth, tower)

    positions = depth_positions([at("vision", 3, "a"), at("vision", 9, "b"), at("text", 1, "c"), at("vision", 3, "d")])
    assert positions == {"a": (0, 2), "b": (1, 2), "c": (0, 1), "d": (0, 2)}


def test_wrap_refuses_what_it_cannot_do_and_changes_nothing():
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def target(path, parameter="weight"):
        return Target(path, path, parameter, None, 0, "model")

    cases = [
        (nn.Sequential(shared, shared), [target("0"), target("1")], ValueError, "got 0 and 1, which are one layer"),
        (tied, [target("0"), target("1")], ValueError, "shared by 0.weight and 1.weight"),
        (hooked, [target("0")], RuntimeError, "must not carry hooks"),
        (plain, [target("0"), target("1")], TypeError, "got torch.nn.modules.activation.ReLU"),
        (plain, [target("0"), target("0")], ValueError, "unique names"),
        (plain, [target("7")], ValueError, "name modules of the model, got '7'"),
    ]
    for model, targets, error, message in cases:
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(error, match=message):
            wrap(model, targets)
        assert [type(module) for module in model.modules()] == kinds
    wrap(plain, [target("0")])
    with pytest.raises(RuntimeError, match="wrapped already"):
        wrap(plain, [target("0")])


def test_a_layer_in_several_places_is_one_layer_in_all_of_them():
    shared, attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ModuleList([shared, attention]), nn.ModuleList([attention, shared])

        def forward(self, x):
            x = self.a[1](*[self.a[0](x)] * 3, need_weights=False)[0]
            return self.b[1](self.b[0](x, x, x, need_weights=False)[0].tanh())

    model, x = Twice().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    expected = model(x)
    weights = [shared.weight, attention.in_proj_weight, attention.out_proj.weight]
    exact = torch.autograd.grad(expected.square().mean(), weights)
    slots = wrap(model, linear_targets(model))
    assert [slot.name for slot in slots] == ["a.0", "a.1.q_proj", "a.1.k_proj", "a.1.v_proj", "a.1.out_proj"]
    assert model.a[0] is model.b[1] is slots[0].host
    assert model.a[1] is model.b[0] is slots[1].host
    torch.testing.assert_close(model(x), expected)
    found = mean_gradients(model, slots, [x], lambda model, x: model(x).square().mean())
    for wanted, got in zip(exact, [found[0], torch.cat(found[1:4]), found[4]], strict=True):
        torch.testing.assert_close(got, wanted)
    features = feature_statistics(model, slots, [x], lambda model, x: model(x))
    assert features[0].tokens == 2 * x.shape[0] * x.shape[1]
    unwrap(model)
    assert type(model.a[0]) is nn.Linear
    assert model.a[0] is model.b[1]
    assert type(model.a[1]) is nn.MultiheadAttention
    assert model.a[1] is model.b[0]
    assert torch.equal(model(x), expected)


def test_wrapped_model_still_loads_the_plain_checkpoint():
    plain, wrapped = tower(), tower()
    wrap(wrapped, linear_targets(wrapped))
    wrapped.load_state_dict(plain.state_dict())
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b)
