"""The certificate leads with what is deployed: the change of the stored weight, rounded."""

import numpy as np
import pytest
import torch
from stock_peft import CONFIG as STOCK
from stock_peft import net, stock, task

import keeplora
from keeplora import KeepLora, KeepLoraConfig

CONFIG = KeepLoraConfig(r=4, alpha=8, target_modules=["up", "down"], weight_energy=0.3, feature_energy=0.8)


def half_loss(model, batch):
    dtype = next(model.parameters()).dtype
    return torch.nn.functional.cross_entropy(model(batch[0].to(dtype)).float(), batch[1])


def learned(dtype, rate):
    """A closed task: its certificate, and per layer the stored weight before and after, the basis, A and B."""
    keeper = KeepLora(net().to(dtype), CONFIG)
    keeper.before_task(task(1), half_loss)
    optimizer = torch.optim.SGD(keeper.trainable_parameters(), lr=rate)
    for batch in task(1):
        optimizer.zero_grad()
        half_loss(keeper.model, batch).backward()
        optimizer.step()
    before = [slot.weight.detach().double().numpy() for slot in keeper.slots]
    bases = [keeper.basis(slot.name).double().numpy() for slot in keeper.slots]
    factors = [(slot.adapter.A.detach().numpy(), slot.adapter.B.detach().numpy()) for slot in keeper.slots]
    certificate = keeper.after_task(task(1))
    after = [slot.weight.detach().double().numpy() for slot in keeper.slots]
    return certificate, list(zip(before, after, bases, factors, strict=True))


def leak(change, q):
    return np.linalg.norm(change @ q) / np.linalg.norm(change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stored_change_comes_first_and_is_that_of_the_matrices(dtype):
    certificate, layers = learned(dtype, 0.03)
    for layer, (before, after, q, (a, b)) in zip(certificate.layers, layers, strict=True):
        assert layer.leak_after_rounding == pytest.approx(leak(after - before, q), rel=1e-6)
        assert layer.leak == pytest.approx(leak(b.astype(np.float64) @ a.astype(np.float64), q), rel=1e-4)
        assert layer.dtype == str(dtype).removeprefix("torch.")
    rounded, exact = certificate.leak_after_rounding, certificate.leak
    assert rounded == pytest.approx(max(leak(after - before, q) for before, after, q, _ in layers), rel=1e-6)
    begin = f"task 1: leak {rounded:.1e} in the stored {layer.dtype} weights, {exact:.1e} in the factors; orthogonality"
    assert str(certificate).startswith(begin)
    assert list(certificate.to_dict())[:3] == ["task", "leak_after_rounding", "leak"]
    assert certificate.worst().items() <= certificate.to_dict().items()


def test_float32_is_recommended_where_rounding_leaks():
    half, _ = learned(torch.bfloat16, 0.03)
    assert half.leak <= 1e-6
    assert half.leak_after_rounding > 0.05
    share = f"{100 * half.leak_after_rounding:.2g} %"
    worst = max(half.layers, key=lambda layer: layer.leak_after_rounding).name
    assert half.advice.startswith(f"Rounding to bfloat16 puts {share} of the stored weight's change into protected")
    assert f"[{worst}]" in half.advice
    assert "float32 factors that are not merged (export_peft; merge=False with PEFT)" in half.advice
    assert str(half).endswith(half.advice)
    whole, _ = learned(torch.float32, 0.03)
    assert whole.advice == ""
    assert str(whole).endswith("of the space is free")


def test_an_adapter_that_stays_one_is_not_rounded():
    """What the sentence recommends does what it says: on the same bfloat16 base nothing leaks unmerged."""
    proofs = []
    for merge in (True, False):
        model = stock(net().bfloat16())
        state = keeplora.initialize(model, task(1), half_loss, config=STOCK)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03)
        half_loss(model, task(1)[0]).backward()
        optimizer.step()
        proofs.append(keeplora.update_subspace(model, task(1), state, merge=merge))
    merged, kept = proofs
    assert merged.advice
    assert merged.leak_after_rounding > 1e4 * kept.leak_after_rounding
    assert kept.leak_after_rounding == kept.leak <= 1e-6
    assert str(kept).startswith(f"task 1: leak {kept.leak:.1e} in the factors; ")
    assert not kept.advice
