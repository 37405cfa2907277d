"""bitsandbytes' 4-bit weights on both kinds of CPU: those where they stay as quantised, and those that repack them."""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from stock_peft import (
    CONFIG,
    WIDE,
    WIDTH,
    adapter_layers,
    logits,
    lora,
    loss_fn,
    net,
    of_bitsandbytes,
    stock,
    task,
    train,
)
from torch import nn

import keeplora
from keeplora.integrations.peft.adapter import PeftLayer
from keeplora.integrations.peft.fingerprints import fingerprint
from keeplora.lora import Target, wrap
from keeplora.lora.four_bit import dequantize_four_bit, keep_differentiable
from keeplora.lora.quantised import dequantised

KINDS = pytest.mark.parametrize(
    "kind",
    [(q, double) for q in ("nf4", "fp4") for double in (True, False)],
    ids=["nf4 double", "nf4", "fp4 double", "fp4"],
)
BLOCK = 64  # weights that share a scale


@pytest.fixture(params=[False, True], ids=["as quantised", "repacked"])
def repacks(request, monkeypatch):
    """What bitsandbytes is told of the CPU when a layer is made. When imported, it asks too: for the kernel."""
    if request.param and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("bitsandbytes multiplies by repacked weights only on a CPU with avx512_bf16")
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: request.param)
    return request.param


def layer_of(columns, rows, kind=("nf4", True), dtype=torch.float32, storage=torch.uint8, bias=False):
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=bias, compute_dtype=dtype, quant_type=kind[0], compress_statistics=kind[1],
        quant_storage=storage,
    )  # fmt: skip
    # Blocks of very different sizes: scales in a wrong place must not pass for rounding.
    sizes = torch.logspace(-2, 1, rows * columns // BLOCK)[torch.randperm(rows * columns // BLOCK)]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, columns) * sizes.repeat_interleave(BLOCK).view(rows, columns))
    return layer.to(dtype).to("cpu").requires_grad_(False)


def repack(layer):
    """As the first forward in eval() does, on any CPU."""
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)


def decoded(weight, scale_dtype):
    """The weight of a layer that is as quantised, by the definition of the format."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        blocks = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code[scales.long()] * blocks + state.offset
    data = weight.data.view(torch.uint8).flatten().long()
    codes = torch.stack([data >> 4, data & 15], 1).flatten()
    return (state.code[codes] * scales.to(scale_dtype).float().repeat_interleave(BLOCK)).view(state.shape)


def assert_rounded_to(dtype, actual, exact):
    """Each number is the exact one, rounded to the dtype once: CPUs' kernels need not round alike."""
    torch.testing.assert_close(actual.float(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def peft_layer(layer):
    module = nn.Module()
    module.base_layer = layer
    return PeftLayer(Target("layer", "layer", "weight", None, 0, "model"), module, "default")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (128, 64), (320, 96)], ids=str)
@KINDS
def test_a_repacked_weight_is_read_as_what_it_is(kind, shape, dtype, storage):
    layer = layer_of(*shape, kind, dtype, storage)
    exact, rounded = decoded(layer.weight, torch.float32), decoded(layer.weight, torch.bfloat16)
    assert_rounded_to(torch.float32, dequantised(layer), exact)
    read = dequantize_four_bit(layer.weight, rounded_scales=True)
    assert_rounded_to(torch.float32, read, rounded)
    before = fingerprint([peft_layer(layer)])
    repack(layer)
    data, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    assert torch.equal(dequantised(layer), read)
    assert torch.equal(dequantize_four_bit(layer.weight, rounded_scales=True), read)
    assert fingerprint([peft_layer(layer)]) == before
    assert fingerprint([peft_layer(copy.deepcopy(layer))]) == before
    # Reading changes nothing.
    assert torch.equal(layer.weight.data, data)
    assert torch.equal(layer.weight.quant_state.absmax, scales)
    assert layer.weight.quant_state.packing_format_for_cpu
    keep_differentiable("test", layer)
    assert torch.equal(dequantised(layer), read)
    assert_rounded_to(dtype, dequantize_module_weight(layer), rounded)  # PEFT reads it too, as quantised
    assert fingerprint([peft_layer(layer)]) == before
    assert layer.weight.shape == (data.numel() // storage.itemsize, 1)
    assert layer.weight.dtype == storage
    assert layer.quant_state is layer.weight.quant_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KINDS
def test_the_weight_that_is_read_is_the_one_that_is_multiplied_with(repacks, kind, dtype):
    """The weight by its products with unit vectors, in eval() on either CPU, and when it has its gradient again."""
    layer = layer_of(192, 96, kind, dtype)
    exact = decoded(layer.weight, torch.bfloat16 if repacks else torch.float32)
    eye = torch.eye(192, dtype=dtype)
    products = layer.eval()(eye).T.float()
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == repacks
    if repacks:  # the kernel rounds the code of a weight, and the product
        assert bool(((products - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs()).all())
    else:
        assert_rounded_to(dtype, products, exact)
    assert_rounded_to(torch.float32, dequantize_four_bit(layer.weight), exact)
    keep_differentiable("test", layer)
    for mode in (True, False):
        x = eye.clone().requires_grad_()
        y = layer.train(mode)(x)
        assert_rounded_to(dtype, y.T, exact)
        assert torch.equal(layer(eye), y)  # no gradient is asked for, in eval(): still not repacked
        y.backward(torch.eye(192, 96, dtype=dtype))
        assert_rounded_to(dtype, x.grad[:96], exact)


def four_bit(kind, width=WIDE):
    def make(columns, rows):
        return bnb.nn.Linear4bit(
            columns, rows, compute_dtype=torch.float32, quant_type=kind[0], compress_statistics=kind[1]
        )

    model = net(width=width)
    with torch.no_grad():  # blocks of different sizes, as in layer_of
        for weight in (weight for block in model.blocks for weight in (block.up.weight, block.down.weight)):
            weight.view(-1, BLOCK).mul_(torch.logspace(-0.3, 0.3, weight.numel() // BLOCK)[:, None].roll(7, 0))
    return of_bitsandbytes(model, make, "is_loaded_in_4bit")


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def adapted(model, folder=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it could not merge: nor are we to
        return stock(model) if folder is None else PeftModel.from_pretrained(model, folder)


def round_scales(model):
    """What repacking leaves of the scales, in layers that never were repacked."""
    for layer in layers_of(model):
        state, dense = layer.weight.quant_state, decoded(layer.weight, torch.bfloat16)
        if state.nested:
            blocks = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(state.absmax)]
            state.absmax = state.state2.code[state.absmax.long()] * blocks + state.offset
            state.nested, state.state2, state.offset = False, None, None
        state.absmax = state.absmax.bfloat16().float()
        assert torch.equal(decoded(layer.weight, torch.float32), dense)
    return model


class Evaluation:
    """A user who evaluates the model at every opportunity, or never."""

    def __init__(self, wanted):
        self.wanted = wanted

    def __call__(self, model):
        if self.wanted:
            logits(model, width=WIDE)
        model.train()


def first_task(model, evaluate, folder):
    evaluate(model)
    model = adapted(model)
    evaluate(model)
    state = keeplora.initialize(model, task(1, width=WIDE), loss_fn, config=CONFIG)
    evaluate(model)
    train(model, task(1, width=WIDE), steps=3)
    evaluate(model)
    train(model, task(1, width=WIDE), steps=3)
    evaluate(model)
    assert keeplora.update_subspace(model, task(1, width=WIDE), state, merge=False).leak <= 1e-6
    evaluate(model)
    model.save_pretrained(folder)
    state.save(folder)
    evaluate(model)
    return model, state


def second_task(model, state, evaluate):
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    evaluate(model)
    keeplora.initialize(model, task(2, width=WIDE), loss_fn, state)
    train(model, task(2, width=WIDE))
    evaluate(model)
    assert keeplora.update_subspace(model, task(2, width=WIDE), state, merge=False).leak <= 1e-6
    factors = {
        f"{path}.{name}.{f}": layer.get_submodule(f"lora_{f}.{name}").weight.detach().clone()
        for name in ("default", "second")
        for path, layer in adapter_layers(model, name).items()
        for f in "AB"
    }
    return {**factors, **state.bases, "logits": logits(model, width=WIDE)}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


@KINDS
def test_evaluating_changes_nothing_that_is_learned(repacks, kind, tmp_path):
    """But for the scales, which repacking rounds once: bitwise what a model with such scales learns unevaluated."""
    never, always = Evaluation(False), Evaluation(True)
    base = four_bit(kind)
    model, state = first_task(round_scales(base) if repacks else base, never, tmp_path / "never")
    expected = second_task(model, state, never)
    model, state = first_task(four_bit(kind), always, tmp_path / "always")
    assert_same(second_task(model, state, always), expected)

    resumed = adapted(four_bit(kind), tmp_path / "always")
    always(resumed)
    state = keeplora.SubspaceState.load(tmp_path / "always")
    state.restore(resumed)
    assert_same(second_task(resumed, state, always), expected)

    resumed = adapted(four_bit(kind), tmp_path / "always")  # not evaluated: its scales are not rounded yet
    state = keeplora.SubspaceState.load(tmp_path / "always")
    state.restore(resumed)
    again = second_task(resumed, state, never)
    assert all(torch.equal(again[name], expected[name]) for name in expected) != repacks


def test_a_base_that_was_evaluated_before_its_adapter_was_loaded(repacks, tmp_path):
    """PEFT calls ``state_dict()`` to load one, after which bitsandbytes has the scales in another order."""
    kind = ("nf4", False)
    always = Evaluation(True)
    model, state = first_task(four_bit(kind), always, tmp_path)
    expected = second_task(model, state, always)
    base = four_bit(kind)
    always(base)
    resumed = adapted(base, tmp_path)
    state = keeplora.SubspaceState.load(tmp_path)
    state.restore(resumed)  # puts them back
    assert_same(second_task(resumed, state, always), expected)

    base = four_bit(kind)
    always(base)
    resumed = adapted(base, tmp_path)
    always(resumed)  # repacked in that order: these are other weights now
    state = keeplora.SubspaceState.load(tmp_path)
    if repacks:
        with pytest.raises(keeplora.methods.StateError, match=r"restore: .* before evaluating them"):
            state.restore(resumed)
    else:
        state.restore(resumed)


@KINDS
def test_saving_leaves_the_weights_as_they_are(repacks, kind):
    """``state_dict()`` of repacked layers loses the order of their scales, or quantises them anew."""
    model = four_bit(kind)
    rounded = [decoded(layer.weight, torch.bfloat16 if repacks else torch.float32) for layer in layers_of(model)]
    logits(model, width=WIDE)
    model = adapted(model)
    keeplora.initialize(model, task(1, width=WIDE), loss_fn, config=CONFIG)
    logits(model, width=WIDE)
    saved = copy.deepcopy(model.state_dict())
    logits(model, width=WIDE)
    again = model.state_dict()
    assert_same(again, saved)
    for layer, weight in zip(layers_of(model), rounded, strict=True):
        assert torch.equal(decoded(layer.weight, torch.float32), weight)


def test_scales_that_state_dict_left_in_another_order_are_put_back():
    layer = layer_of(192, 96, ("nf4", False))
    rounded = decoded(layer.weight, torch.bfloat16)
    repack(layer)
    layer.state_dict()
    assert not layer.weight.quant_state.packing_format_for_cpu
    assert (dequantize_module_weight(layer) - rounded).norm() > 0.1 * rounded.norm()  # else this test is of no use
    keep_differentiable("test", layer)
    assert torch.equal(decoded(layer.weight, torch.float32), rounded)


def test_widths_that_the_kernel_does_not_take(repacks):
    """24 → 48 → 24: bitsandbytes' forward in eval() fails before ``initialize``, and ours do not."""
    model = adapted(four_bit(("nf4", True), width=WIDTH))
    if repacks:
        with pytest.raises(AssertionError, match="N must be divisible by block_n"):
            logits(model)
        model.train()
    state = keeplora.initialize(model, task(1), loss_fn, config=CONFIG)
    logits(model)
    train(model, task(1))
    assert keeplora.update_subspace(model, task(1), state, merge=False).leak <= 1e-6
    # 24 → 64: it fails half-way, when the scales of the scales are gone.
    layer = layer_of(24, 64)
    exact = decoded(layer.weight, torch.float32)
    if repacks:
        with pytest.raises(RuntimeError, match=r"shape '\[64, 0\]' is invalid"):
            layer.eval()(torch.eye(24))
        assert not layer.weight.quant_state.nested
    keep_differentiable("test", layer)
    assert_rounded_to(torch.float32, dequantize_four_bit(layer.weight), exact)
    assert_rounded_to(torch.float32, layer.eval()(torch.eye(24)).T, exact)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_keeper_learns_behind_frozen_four_bit_layers(repacks, bias):
    def model():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(WIDE, WIDE), layer_of(WIDE, 96, bias=bias), nn.Linear(96, 5))

    targets = [Target("0", "0", "weight", None, 0, "model")]
    learned = []
    for evaluate in (Evaluation(True), Evaluation(False)):
        net = model()
        if repacks and not evaluate.wanted:
            round_scales(net)
        evaluate(net)
        keeper = keeplora.KeepLora(
            net, keeplora.KeepLoraConfig(r=4, feature_energy=0.8, target_modules=("0",)), targets=targets
        )
        evaluate(net)
        for seed in (1, 2):
            data = task(seed, width=WIDE)
            keeper.before_task(data, loss_fn)
            train(net, data)
            evaluate(net)
            keeper.after_task(data)
            evaluate(net)
        learned.append(net[0].weight.detach().clone())
    assert torch.equal(*learned)
    assert not torch.equal(learned[0], model()[0].weight)


def test_layouts_that_cannot_be_read_are_refused(monkeypatch):
    layer = layer_of(192, 96)
    repack(layer)
    with monkeypatch.context() as patch:
        patch.delattr(bnb.functional, "_convert_weight_packed_for_cpu_inverse")
        with pytest.raises(RuntimeError, match=r"wrap: 4-bit weights .* cannot undo \[1\.weight\]"):
            wrap(nn.Sequential(nn.Linear(5, 192), layer), [Target("0", "0", "weight", None, 0, "model")])
        assert layer.weight.quant_state.packing_format_for_cpu
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax[:, :95]
    with pytest.raises(RuntimeError, match=r"wrap: .* scales of shape \(3, 95\) \[1\.weight\]"):
        wrap(nn.Sequential(nn.Linear(5, 192), layer), [Target("0", "0", "weight", None, 0, "model")])
