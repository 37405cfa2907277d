"""LiNeS: scales by block, the scaled weights, the choice of α, and what it may stand on."""

import copy

import pytest
import tiny_workload
import torch
from small_net import loss_fn, net, task, train
from torch import nn

from keeplora.families import find_targets
from keeplora.lora import Target
from keeplora.methods import METHODS, create
from keeplora.methods.lines import Lines, LinesConfig, layer_scales
from keeplora.methods.registry import Registered
from keeplora.methods.zero_shot import NoConfig, ZeroShot

LORA = {"base": "lora", "settings": {"r": 2, "alpha": 4.0, "target_modules": "all-linear"}}


def test_scales_grow_evenly_from_alpha_to_one_in_every_tower():
    def target(tower, depth, leaf):
        name = f"{tower}.b.{depth}.{leaf}"
        return Target(name, name, "weight", None, depth, tower)

    targets = [target("vision", depth, leaf) for depth in (3, 4, 7) for leaf in ("attn", "fc")]
    targets += [target("text", depth, "fc") for depth in (0, 1)]
    for alpha in (0.0, 0.3, 1.0):
        expected = {
            "vision.b.3.fc.weight": alpha,
            "vision.b.4.fc.weight": alpha + (1 - alpha) / 2,
            "vision.b.4.ln.bias": alpha + (1 - alpha) / 2,  # inside the module that holds the block's targets
            "vision.b.7.attn.bias": 1.0,
            "vision.b.73.fc.weight": alpha,  # no block's name, though it begins like one
            "text.b.1.fc.weight": 1.0,
            "text.b.1.ln.bias": alpha,  # a block with a single target is that layer alone
            "logit_scale": alpha,
        }
        assert layer_scales(expected, targets, alpha) == pytest.approx(expected)


def test_scales_of_an_open_clip_model():
    model = tiny_workload.model()
    names = [name for name, _ in model.named_parameters()]
    scales = layer_scales(names, find_targets(model), 0.25)
    for name, scale in scales.items():
        if "visual.transformer.resblocks.1." in name or ("transformer.resblocks.0." in name and "visual" not in name):
            assert scale == 1.0  # the deepest of two blocks, and a tower's only one
        else:
            assert scale == 0.25
    assert {name.split(".")[-2] for name in names if "resblocks.1." in name} >= {"ln_1", "attn", "c_fc", "out_proj"}


def lines_on(model, **settings):
    return create("lines", model, settings)


def expected_weights(before, after, alpha):
    """By hand for the net of two layers: the first keeps α of its change, the second all of it."""
    return [b + s * (a - b) for b, a, s in zip(before, after, (alpha, 1.0), strict=True)]


@pytest.mark.parametrize("base", [LORA, {"base": "full"}, {"base": "keeplora", "settings": {
    "r": 2, "target_modules": "all-linear", "weight_energy": 0.2, "feature_energy": 0.4}}])  # fmt: skip
def test_every_task_is_scaled_where_it_was_learned(base):
    plain = create(base["base"], net(), base.get("settings"))
    lines = lines_on(net(), **base, alpha=0.25)
    for t in range(2):
        plain.model.load_state_dict(lines.model.state_dict())  # both start the task from the scaled weights
        before = [layer.weight.detach().double() for layer in (lines.model[0], lines.model[2])]
        reports = []
        for method in (plain, lines):
            method.before_task(task(t), loss_fn)
            train(method, task(t))
            reports.append(method.after_task(task(t)))
        after = [layer.weight.detach().double() for layer in (plain.model[0], plain.model[2])]
        got = [layer.weight.detach().double() for layer in (lines.model[0], lines.model[2])]
        for value, want in zip(got, expected_weights(before, after, 0.25), strict=True):
            torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)
        if base["base"] == "keeplora":
            break  # its second task depends on features, which the scaling has changed
    assert (reports[0] is None) == (reports[1] is None)
    assert lines.alphas == [0.25] * len(lines.alphas)


def chooser(lines, favourite):
    """Scores the model by how near the first layer's change is to ``favourite`` of the unscaled one."""
    start = lines.model[0].weight.detach().clone()
    trained = {}

    def validate():
        change = (lines.model[0].weight - start).norm().item()
        trained.setdefault("whole", change)  # the grid starts at 1
        return -abs(change / trained["whole"] - favourite)

    return validate


def test_alpha_is_the_best_of_the_grid_on_validation():
    lines = lines_on(net(), **LORA)
    lines.validate = chooser(lines, 0.32)
    lines.before_task(task(0), loss_fn)
    train(lines, task(0))
    lines.after_task(task(0))
    assert lines.alphas == [0.3]
    assert -lines.validate() == pytest.approx(0.02, abs=1e-4)
    assert lines.state().meta["alphas"] == [0.3]


def test_ties_go_to_the_first_of_the_grid():
    lines = lines_on(net(), **LORA, grid=(0.6, 1.0, 0.2))
    lines.validate = lambda: 0.5
    lines.before_task(task(0), loss_fn)
    train(lines, task(0))
    lines.after_task(task(0))
    assert lines.alphas == [0.6]


def test_without_a_score_it_stops_before_any_training():
    lines = lines_on(net(), **LORA)
    with pytest.raises(RuntimeError, match=r"before_task: validate must .*got None"):
        lines.before_task(task(0), loss_fn)
    assert not lines.base.training_task


def test_a_score_that_fails_leaves_the_task_learned_and_unscaled():
    plain, lines = create("lora", net(), LORA["settings"]), lines_on(net(), **LORA)
    calls = []

    def validate():
        calls.append(0)
        if len(calls) == 4:
            raise OSError("the disk is gone")
        return 0.0

    lines.validate = validate
    for method in (plain, lines):
        method.before_task(task(0), loss_fn)
        train(method, task(0))
    plain.after_task(task(0))
    with pytest.raises(OSError, match="the disk is gone"):
        lines.after_task(task(0))
    for mine, theirs in zip(lines.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert lines.alphas == []
    assert (lines.tasks_learned, lines.training_task) == (1, False)
    assert lines.state().meta["base"]["tasks_learned"] == 1
    lines.validate = lambda: 0.0
    lines.before_task(task(1), loss_fn)  # and it goes on


def test_half_precision_keeps_exact_weights():
    lines = lines_on(net().to(torch.bfloat16), **LORA, alpha=0.5)
    data = [(x.to(torch.bfloat16), y) for x, y in task(0)]
    lines.before_task(data, loss_fn)
    train(lines, data)
    slot = lines.base.slots[0]
    before, update = slot.exact_weight.clone(), slot.adapter.scaling * slot.adapter.B @ slot.adapter.A
    lines.after_task(data)
    torch.testing.assert_close(slot.exact_weight, before + 0.5 * update, rtol=1e-5, atol=1e-6)
    assert slot.exact_weight.dtype == torch.float32
    assert torch.equal(slot.weight, slot.exact_weight.to(torch.bfloat16))


def test_the_seed_reaches_a_base_that_draws():
    drawn = []
    for seed in (0, 1):
        lines = lines_on(net(), **LORA, alpha=1.0, seed=seed)
        lines.before_task(task(0), loss_fn)
        drawn.append(lines.base.slots[0].adapter.A.detach().clone())
    assert not torch.equal(*drawn)


class Hooked(ZeroShot):
    name = "hooked"
    trains = True
    merges = False


def test_what_it_cannot_stand_on_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "hooked", Registered(Hooked, NoConfig))
    for base in ("zero-shot", "hooked"):
        with pytest.raises(ValueError, match=f"LinesConfig: base must be a method that puts .* got '{base}'"):
            create("lines", net(), {"base": base})
    with pytest.raises(ValueError, match=r"Lines: base must be another method, .* got 'zero-shot'"):
        Lines(ZeroShot(net()))
    with pytest.raises(ValueError, match=r"base must .*got 'lora\+'. Nearest names: lora"):
        create("lines", net(), {"base": "lora+"})
    with pytest.raises(ValueError, match=r"base must .*got 'lines'"):
        create("lines", net(), {"base": "lines"})
    with pytest.raises(ValueError, match="method 'lora' do not include 'rank'"):
        create("lines", net(), {"base": "lora", "settings": {"rank": 3}})


@pytest.mark.parametrize("settings", [{"alpha": 1.5}, {"grid": ()}, {"grid": (0.5, 2.0)}, {"settings": 3}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="LinesConfig: "):
        LinesConfig(**settings)


def test_it_is_joint_where_its_base_is():
    assert lines_on(net(), base="joint").joint
    assert not lines_on(copy.deepcopy(net()), base="full").joint
    assert isinstance(lines_on(net(), base="full", alpha=0.5).merge(), nn.Sequential)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_was_scaled_is_not_exported_as_trained(tmp_path, alpha):
    settings = {**LORA["settings"], "weight_energy": 0.2, "feature_energy": 0.4}
    lines = lines_on(net(), base="keeplora", settings=settings, alpha=alpha)
    lines.before_task(task(0), loss_fn)
    train(lines, task(0))
    lines.after_task(task(0))
    if alpha == 1:
        lines.base.export_peft(tmp_path)
        return
    with pytest.raises(RuntimeError, match=r"export_peft: .* that LiNeS has scaled"):
        lines.base.export_peft(tmp_path)
    assert not list(tmp_path.iterdir())
