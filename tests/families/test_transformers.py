"""transformers' families: the method's promises on a tiny model of each, however the library runs it."""

import pytest
import torch
import transformers as tf
from families.members import CONFIG, LANGUAGE, MEMBERS, fresh, learn, loss_fn, outputs, text_batch, train
from torch import nn

import keeplora
from keeplora.families import find_targets
from keeplora.lora import LoraAdapter

NAMES = list(MEMBERS)
SPEAKING = [name for name, member in MEMBERS.items() if member.language]


@pytest.mark.parametrize("name", NAMES)
def test_zero_adapters_change_no_bit_and_every_adapter_matters(name):
    model, tasks = fresh(name)
    before = outputs(model, tasks[0][0])
    keeper = keeplora.KeepLora(model, CONFIG)
    assert torch.equal(outputs(model, tasks[0][0]), before)
    keeper.before_task(tasks[0], loss_fn)
    assert torch.equal(outputs(model, tasks[0][0]), before)
    for slot in keeper.slots:  # an adapter that is attached but never applied would be silent
        slot.detach()
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.randn(2, width), torch.randn(out, 2), 1.0))
        assert not torch.equal(outputs(model, tasks[0][0]), before), slot.name
        slot.detach()


@pytest.mark.parametrize("name", NAMES)
def test_protected_inputs_are_mapped_as_before_and_a_saved_state_goes_on(name, tmp_path):
    model, tasks = fresh(name)
    keeper = keeplora.KeepLora(model, CONFIG)
    keeper.before_task(tasks[0], loss_fn)
    protected = [keeper.basis(slot.name) for slot in keeper.slots]
    old = [slot.weight.clone() for slot in keeper.slots]
    train(keeper, tasks[0])
    keeper.after_task(tasks[0])
    learned = False
    for slot, q, weight in zip(keeper.slots, protected, old, strict=True):
        inputs = torch.randn(8, q.shape[1]) @ q.T
        with torch.no_grad():
            change = nn.functional.linear(inputs, slot.weight) - nn.functional.linear(inputs, weight)
            assert change.norm() <= 1e-5 * nn.functional.linear(inputs, weight).norm(), slot.name
        learned |= not torch.equal(slot.weight, weight)
    assert learned
    keeper.save(tmp_path)
    again = keeplora.KeepLora.load(tmp_path, fresh(name)[0])
    assert torch.equal(outputs(again.model, tasks[1][0]), outputs(model, tasks[1][0]))
    assert learn(again, tasks[1]) == learn(keeper, tasks[1])
    mine, other = keeper.state().tensors, again.state().tensors
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("name", SPEAKING)
def test_generation_after_the_merge_equals_generation_before(name):
    model, tasks = fresh(name)
    prompt = {k: v for k, v in tasks[0][0].items() if k != "labels"}
    said = []

    def speak():
        with torch.no_grad():
            said.append(model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None))

    speak()
    keeper = keeplora.KeepLora(model, CONFIG)
    keeper.before_task(tasks[0], loss_fn)
    train(keeper, tasks[0], steps=6)
    speak()  # factored for one token at a time, merged for the prompt
    keeper.after_task(tasks[0])
    speak()
    keeper.merge()
    speak()
    untrained, *trained = said
    assert all(torch.equal(trained[0], other) for other in trained[1:])
    assert trained[0].shape == untrained.shape
    assert not torch.equal(trained[0], untrained)


def test_attention_implementations_agree():
    found = []
    for implementation in ("eager", "sdpa"):
        model, (task, _) = fresh("llava")
        model.set_attn_implementation(implementation)
        keeper = keeplora.KeepLora(model, CONFIG)
        learn(keeper, task, steps=0)
        found.append([keeper.basis(slot.name) for slot in keeper.slots])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a @ a.T, b @ b.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, (task, _) = fresh("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        keeper = keeplora.KeepLora(model, CONFIG)
        keeper.before_task(task, loss_fn)
        model.train()
        loss_fn(model, task[0]).backward()
        gradients.append([p.grad for p in keeper.trainable_parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_in_bfloat16():
    model, (task, other) = fresh("llava")
    model.to(torch.bfloat16)
    task, other = (
        [{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()} for batch in t]
        for t in (task, other)
    )
    before = outputs(model, task[0])
    keeper = keeplora.KeepLora(model, CONFIG)
    keeper.before_task(task, loss_fn)
    assert torch.equal(outputs(model, task[0]), before)
    train(keeper, task)
    assert keeper.after_task(task).leak <= 1e-6
    assert learn(keeper, other).leak <= 1e-6
    assert model.dtype == torch.bfloat16


def test_tied_embeddings_stay_tied():
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LANGUAGE, tie_word_embeddings=True)).eval()
    task = [text_batch(model, torch.Generator().manual_seed(0))]
    keeper = keeplora.KeepLora(model, CONFIG)
    learn(keeper, task)
    assert keeper.merge().lm_head.weight is model.model.embed_tokens.weight
    assert not any("head" in t.name or "embed" in t.name for t in find_targets(model))
