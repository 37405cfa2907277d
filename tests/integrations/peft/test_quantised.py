"""Quantised base weights: PEFT's factored layers do the products, keeplora reads the weights in floating point."""

import warnings

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
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
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import keeplora
from keeplora.lora import linear_targets, wrap


def torchao_int8():
    model = net(width=WIDE)
    quantize_(model.blocks, Int8WeightOnlyConfig())
    return model


def bnb_int8():
    return of_bitsandbytes(
        net(width=WIDE), lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False), "is_loaded_in_8bit"
    )


def bnb_nf4():
    return of_bitsandbytes(
        net(width=WIDE),
        lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4"),
        "is_loaded_in_4bit",
    )


KINDS = pytest.mark.parametrize("quantised", [torchao_int8, bnb_int8, bnb_nf4])


def adapted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it could not merge: nor are we to
        return stock(model)


@KINDS
def test_bases_are_those_of_the_weight_that_is_multiplied_with(quantised):
    model = adapted(quantised())
    x = task(9, width=WIDE)[0][0]
    # In train(): in eval(), bitsandbytes' products depend on the CPU. Those with AVX-512 bf16 repack 4-bit weights (see
    # test_peft_four_bit.py), and on those without VNNI sums of int8 products saturate.
    before = model(x)
    state = keeplora.initialize(model, task(1, width=WIDE), loss_fn, config=CONFIG)
    assert torch.equal(model(x), before)
    for path, layer in adapter_layers(model).items():
        # The weight by its products: those of unit vectors.
        weight = layer.base_layer(torch.eye(layer.in_features)).detach().T - layer.base_layer.bias[:, None].detach()
        _, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        k = int(((s**2).cumsum(0) / (s**2).sum() < 0.3).sum()) + 1
        q = state.bases[path.removeprefix("base_model.model.")].double()
        assert q.shape[1] == k
        assert (q - vh[:k].T @ (vh[:k] @ q)).norm() <= k**0.5 * 2**-11  # it is kept in float16
        a = layer.lora_A["default"].weight.detach().double()
        length = float(a[0].norm())  # of all rows: test_balance.py says how long
        assert torch.linalg.vector_norm(a, dim=1) == pytest.approx(length * torch.ones(4), rel=1e-6)
        assert 0 < length <= 1 + 1e-6
        assert (a @ q).abs().max() <= 1e-6


@KINDS
def test_tasks_follow_each_other_as_adapters_and_resume(quantised, tmp_path):
    model = adapted(quantised())
    state = keeplora.initialize(model, task(1, width=WIDE), loss_fn, config=CONFIG)
    train(model, task(1, width=WIDE))
    with pytest.raises(TypeError, match=r"must .*got 4 .* Pass merge=False"):
        keeplora.update_subspace(model, task(1, width=WIDE), state)
    certificate = keeplora.update_subspace(model, task(1, width=WIDE), state, merge=False)
    assert certificate.leak <= 1e-6
    protected = {name: q.double() for name, q in state.bases.items()}
    model.save_pretrained(tmp_path)
    state.save(tmp_path)

    def second(model, state):
        model.train()  # bitsandbytes' int8 products round their inputs in eval() alone
        model.add_adapter("second", lora())
        model.base_model.set_adapter(["default", "second"])
        keeplora.initialize(model, task(2, width=WIDE), loss_fn, state)
        train(model, task(2, width=WIDE))
        assert keeplora.update_subspace(model, task(2, width=WIDE), state, merge=False).leak <= 1e-6
        return logits(model, width=WIDE)

    expected = second(model, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = PeftModel.from_pretrained(quantised(), tmp_path)
    again = keeplora.SubspaceState.load(tmp_path)
    again.restore(resumed)
    assert torch.equal(second(resumed, again), expected)
    for path, layer in adapter_layers(model, "second").items():
        b, a = (layer.get_submodule(f"lora_{f}.second").weight.detach().double() for f in "BA")
        q = protected[path.removeprefix("base_model.model.")]
        assert (b @ a).norm() > 0
        assert (b @ (a @ q)).norm() <= 1e-6 * (b @ a).norm()


def test_weights_that_nobody_can_read_are_refused():
    class Packed(nn.Linear):
        """Two numbers to a byte, in a format of its own."""

        def __init__(self, width, out):
            super().__init__(width, out)
            self.weight = nn.Parameter(torch.zeros(out, width // 2, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], self.out_features) + self.bias

    model = net()
    model.blocks[0].up = Packed(WIDTH, 2 * WIDTH)
    with pytest.raises(TypeError, match=r"of bitsandbytes or of torchao, got .* in torch\.uint8 .* at blocks\.0\.up"):
        keeplora.initialize(adapted(model), task(1), loss_fn, config=CONFIG)


def test_a_keeper_merges_and_so_refuses_them():
    model = torchao_int8()
    with pytest.raises(TypeError, match=r"weights must .*got weight \(torchao.* keeplora\.initialize"):
        wrap(model, linear_targets(model))
    assert type(model.blocks[0].up) is nn.Linear
