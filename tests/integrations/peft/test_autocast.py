"""A loop that is all inside autocast, whose copies of trained weights last until it ends, learns what any loop does."""

import copy
from contextlib import nullcontext

import pytest
import torch
from stock_peft import CONFIG, loss_fn, net, stock, task

from keeplora.integrations.peft import SubspaceState, initialize, update_subspace

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def autocast():
    return torch.autocast(**BF16)


def as_it_is(model, state, folder):
    return model, state


def copied(model, state, folder):
    return copy.deepcopy(model), state


def loaded(model, state, folder):
    from peft import PeftModel

    model.save_pretrained(folder)
    state.save(folder)
    model, state = PeftModel.from_pretrained(net(), folder, is_trainable=True), SubspaceState.load(folder)
    state.restore(model)
    return model, state


class Quiet(torch.optim.SGD):
    """Writes as optimizers with kernels of their own do: nothing counts it."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad, alpha=0.1)


def learned(whole, part, folder, *, optimizer=torch.optim.AdamW, between=as_it_is, merge=True):
    """All tensors after two tasks (one, where it is not merged), and outputs, with autocast around all or each part."""
    data, model, state = [task(seed) for seed in range(2 if merge else 1)], stock(), None
    results = {}
    with whole():
        for number, batches in enumerate(data):
            with part():
                state = initialize(model, batches, loss_fn, state, config=None if state else CONFIG)
            model, state = between(model, state, folder) if number == 0 else (model, state)
            stepping = optimizer([p for p in model.parameters() if p.requires_grad], lr=2e-2)
            for batch in batches * 2:
                with part():
                    loss = loss_fn(model, batch)
                loss.backward()
                stepping.step()
                stepping.zero_grad()
            with part():
                update_subspace(model, batches, state, loss_fn=loss_fn, merge=merge)
                results[f"loss {number}"] = loss_fn(model, batches[0]).detach()
    return {**results, **model.state_dict(), **{f"{name}.basis": basis for name, basis in state.bases.items()}}


@pytest.mark.parametrize(
    "options",
    [{}, {"merge": False}, {"between": copied}, {"between": loaded}, {"optimizer": Quiet}],
    ids=["merged", "kept", "copied", "loaded", "an optimizer that nobody notices"],
)
def test_autocast_around_all_learns_what_autocast_around_each_part_does(tmp_path, options):
    once, each = (
        learned(autocast, nullcontext, tmp_path, **options),
        learned(nullcontext, autocast, tmp_path, **options),
    )
    assert list(once) == list(each)
    assert [name for name in each if not torch.equal(once[name], each[name])] == []
    moved = [name for name, value in stock().state_dict().items() if not torch.equal(each[name], value)]
    assert moved  # something was learned
