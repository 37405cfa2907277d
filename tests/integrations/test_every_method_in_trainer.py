"""Every registered method under transformers' Trainer: the numbers of a plain loop, or refused by name."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

from keeplora.integrations._task_hooks import TaskHooks
from keeplora.integrations.hf_trainer import KeepLoraCallback
from keeplora.lora.optimizer import unwrapped
from tests.integrations.every_method import (
    BATCH,
    EPOCHS,
    PENALTIES,
    RATE,
    REFUSED,
    TRAINED,
    Classifier,
    assert_same,
    fresh,
    like,
    opened,
    plain_loop,
    samples,
)
from tests.methods.contract import loss_fn

CLIP = 0.01  # of every gradient here: the smallest norm is larger


def trainer_for(method, out, kind=Trainer, callbacks=(), model=None, callback=None, **options):
    defaults = {"lr_scheduler_type": "constant", "save_strategy": "no", "max_grad_norm": 0, "weight_decay": 0.1}
    args = TrainingArguments(
        str(out),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        **{**defaults, **options},
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return kind(
        model or Classifier(method.model),
        args,
        train_dataset=samples(1),
        eval_dataset=samples(2),
        callbacks=[callback or KeepLoraCallback(method), *callbacks],
    )


def names_of(method):
    """Of the trained parameters, in the model."""
    names = {id(parameter): name for name, parameter in method.model.named_parameters()}
    return [names[id(parameter)] for parameter in method.trainable_parameters()]


def hooks_left(trainer):
    inner = unwrapped(trainer.optimizer)
    return [*trainer.model._forward_hooks, *inner._optimizer_step_pre_hooks, *inner._optimizer_step_post_hooks]


CASES = [(name, *case) for name in TRAINED for case in [(1, 0), (3, CLIP)]]
CASES += [(name, *case) for name in PENALTIES for case in [(1, CLIP), (3, 0)]]


@pytest.mark.parametrize(("name", "accumulate", "clip"), CASES)
def test_a_method_learns_what_it_learns_in_a_plain_loop(name, accumulate, clip, tmp_path):
    method, own = opened(name), opened(name)
    trainer = trainer_for(method, tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    if name == "gpm":
        trainer.optimizer = method.optimizer(lr=RATE)
    trainer.train()
    optimizer = like(unwrapped(trainer.optimizer), method, own)
    plain_loop(own, samples(1), optimizer, accumulate, clip)
    assert_same(method, own)
    assert hooks_left(trainer) == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_a_trainer_cannot_train_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"method must .*{REFUSED[name]}, got '{name}'"):
        KeepLoraCallback(fresh(name))


def test_an_optimizer_that_breaks_the_methods_promise_is_refused_before_training(tmp_path):
    method = opened("gpm")
    trainer = trainer_for(method, tmp_path, lr_scheduler_type="linear")
    before = copy.deepcopy(method.model.state_dict())
    with pytest.raises(ValueError, match=r"optimizer must be SGD .* 'gpm', got AdamW"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    assert hooks_left(trainer) == []
    trainer.optimizer = method.optimizer(lr=RATE)  # the remedy
    trainer.train()
    (group,) = trainer.optimizer.param_groups
    assert group["initial_lr"] == RATE  # Trainer's schedule ran on it, down to 0
    assert group["lr"] == 0
    assert not all(map(torch.equal, method.trainable_parameters(), map(before.get, names_of(method))))


class TwoForwards(Trainer):
    def compute_loss(self, model, inputs, **options):
        super().compute_loss(model, dict(inputs), **options)
        return super().compute_loss(model, inputs, **options)


class Recomputed(Trainer):
    reentrant = False

    def compute_loss(self, model, inputs, **options):
        if not model.training:
            return super().compute_loss(model, inputs, **options)

        def loss(images):
            return model(images, inputs["labels"])["loss"]

        return checkpoint(loss, inputs["images"].requires_grad_(), use_reentrant=self.reentrant)


class RecomputedReentrant(Recomputed):
    reentrant = True


@pytest.mark.parametrize("kind", [TwoForwards, Recomputed, RecomputedReentrant])
def test_a_penalty_counts_once_however_often_forward_runs(kind, tmp_path):
    method, own = opened("o-lora"), opened("o-lora")
    trainer = trainer_for(method, tmp_path, kind, gradient_accumulation_steps=3, eval_strategy="steps", eval_steps=1)
    trainer.train()
    plain_loop(own, samples(1), like(unwrapped(trainer.optimizer), method, own), accumulate=3)
    assert_same(method, own)


def test_a_compiled_models_penalty_counts(tmp_path):
    method, own = opened("o-lora"), opened("o-lora")
    options = {"torch_compile": True, "torch_compile_backend": "eager", "gradient_accumulation_steps": 3}
    trainer = trainer_for(method, tmp_path, **options)
    trainer.train()
    plain_loop(own, samples(1), like(unwrapped(trainer.optimizer), method, own), accumulate=3)
    assert_same(method, own)


class PastForward(Trainer):
    def compute_loss(self, model, inputs, **options):
        return loss_fn(model.net, (inputs["images"], inputs["labels"]))


@pytest.mark.parametrize("name", PENALTIES)
def test_a_loss_that_bypasses_forward_is_no_silent_loss_of_the_penalty(name, tmp_path):
    with pytest.raises(RuntimeError, match=rf"penalty of '{name}' must .* must call the model's forward"):
        trainer_for(opened(name), tmp_path, PastForward).train()
    method, own = opened("lora"), opened("lora")  # which has no penalty
    trainer = trainer_for(method, tmp_path, PastForward)
    trainer.train()
    plain_loop(own, samples(1), like(unwrapped(trainer.optimizer), method, own))
    assert_same(method, own)


class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_train_leaves_nothing_that_a_new_trainer_would_count_twice(tmp_path):
    method, own = opened("o-lora"), opened("o-lora")
    broken = trainer_for(method, tmp_path, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = trainer_for(method, tmp_path, model=broken.model)
    again.train()
    assert hooks_left(again) == []
    plain_loop(own, samples(1), like(unwrapped(again.optimizer), method, own))
    assert_same(method, own)


def test_a_scaled_loss_gets_a_scaled_penalty(tmp_path):
    """fp16, without a GPU: what GradScaler multiplies the loss by, the penalty needs as well."""
    method, own = opened("o-lora"), opened("o-lora")
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=RATE)
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # as Accelerate's wrapper has it
    TaskHooks("test", method, optimizer, "").add_penalty_gradient()
    optimizer.scaler.unscale_(optimizer)
    own.penalty().backward()
    for mine, theirs in zip(method.trainable_parameters(), own.trainable_parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # a power of two, so exactly


SAVING = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
