"""Every registered method under Accelerate and Lightning: the numbers of a plain loop, or refused by name."""

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from keeplora.integrations import accelerate as keeplora_accelerate
from keeplora.integrations import lightning as keeplora_lightning
from keeplora.lora.optimizer import unwrapped
from keeplora.methods import StateError
from tests.integrations import one_layer
from tests.integrations.every_method import (
    EPOCHS,
    PENALTIES,
    RATE,
    REFUSED,
    STEPS,
    TRAINED,
    Classifier,
    assert_same,
    batches,
    fresh,
    opened,
    passes,
    plain_loop,
    samples,
)
from tests.methods.contract import Batch, loss_fn

CLIP = 0.01
OPTIONS = {"lr": RATE, "weight_decay": 0.1}
CASES = [(name, *case) for name in TRAINED for case in [(1, None, False), (3, CLIP, True)]]
CASES += [(name, *case) for name in PENALTIES for case in [(1, CLIP, False), (3, None, False)]]

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings in the class: a test must find none, of Trainer's either, and leave none."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def accelerated(method, optimizer=None, **options):
    accelerator = Accelerator(cpu=True, **options)
    optimizer = optimizer or method.optimizer(**OPTIONS)
    return keeplora_accelerate.OneTask(accelerator, method, Classifier(method.model), optimizer)


def accelerate_loop(task, clip=None, epochs=EPOCHS):
    accelerator, loader = task.accelerator, task.accelerator.prepare(batches(samples(1)))
    task.model.train()
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(task.model):
                task.backward(task.model(**batch)["loss"])
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(task.model.parameters(), clip)
                task.optimizer.step()
                task.optimizer.zero_grad()


class OneTask(keeplora_lightning.OneTask):
    def training_step(self, batch, index):
        return self.with_penalty(self.loss_fn(self.model, Batch(**batch)))


def fit(module, folder, epochs=EPOCHS, checkpoint=None, callbacks=(), **options):
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False,
        default_root_dir=folder, callbacks=[*callbacks], **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    module.model.train()
    trainer.fit(module, batches(samples(1)), ckpt_path=checkpoint)
    return trainer


def steps_hooked(optimizer):
    inner = unwrapped(optimizer)
    return [*inner._optimizer_step_pre_hooks, *inner._optimizer_step_post_hooks]


@pytest.mark.parametrize(("name", "accumulate", "clip", "bf16"), CASES)
def test_accelerate_teaches_a_method_what_a_plain_loop_does(name, accumulate, clip, bf16):
    method, own = opened(name), opened(name)
    precision = "bf16" if bf16 else "no"
    accelerate_loop(accelerated(method, gradient_accumulation_steps=accumulate, mixed_precision=precision), clip)
    plain_loop(own, samples(1), own.optimizer(**OPTIONS), accumulate, clip, share=False, bf16=bf16)
    assert_same(method, own)


@pytest.mark.parametrize(("name", "accumulate", "clip", "bf16"), CASES)
def test_lightning_teaches_a_method_what_a_plain_loop_does(name, accumulate, clip, bf16, tmp_path):
    method, own = opened(name), opened(name)
    precision = "bf16-mixed" if bf16 else "32-true"
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "precision": precision}
    trainer = fit(OneTask(method, loss_fn, **OPTIONS), tmp_path, **options)
    assert steps_hooked(trainer.optimizers[0]) == []
    plain_loop(own, samples(1), own.optimizer(**OPTIONS), accumulate, clip, share=False, bf16=bf16, by_optimizer=True)
    assert_same(method, own)


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_a_loop_cannot_train_is_refused_by_name(name):
    refused = pytest.raises(ValueError, match=rf"OneTask: method must .*{REFUSED[name]}, got '{name}'")
    method, optimizer = fresh(name), torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with refused:
        keeplora_accelerate.OneTask(Accelerator(cpu=True), method, Classifier(method.model), optimizer)
    with refused:
        keeplora_lightning.OneTask(method, loss_fn)


class WithAdamW(OneTask):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.method.trainable_parameters(), lr=RATE)


def test_an_optimizer_that_breaks_the_methods_promise_is_refused_before_training(tmp_path):
    method = opened("gpm")
    before = [parameter.detach().clone() for parameter in method.trainable_parameters()]
    refused = pytest.raises(ValueError, match=r"optimizer must be SGD .* 'gpm', got AdamW")
    with refused:
        accelerated(method, torch.optim.AdamW(method.trainable_parameters(), lr=RATE))
    with refused:
        fit(WithAdamW(method, loss_fn), tmp_path)
    assert all(map(torch.equal, method.trainable_parameters(), before))


class WithoutPenalty(OneTask):
    def training_step(self, batch, index):
        return self.loss_fn(self.model, Batch(**batch))


@pytest.mark.parametrize("name", PENALTIES)
def test_a_loop_that_forgets_the_penalty_is_told(name, tmp_path):
    task = accelerated(opened(name))
    task.accelerator.backward(task.model(**next(iter(batches(samples(1)))))["loss"])
    with pytest.raises(RuntimeError, match=rf"OneTask: the penalty of '{name}' must .* task\.backward"):
        task.optimizer.step()
    with pytest.raises(RuntimeError, match=rf"OneTask: the penalty of '{name}' must .* self\.with_penalty"):
        fit(WithoutPenalty(opened(name), loss_fn, **OPTIONS), tmp_path)


def test_after_step_runs_once_for_every_step(tmp_path, monkeypatch):
    for loop in (
        lambda m: accelerate_loop(accelerated(m, gradient_accumulation_steps=3)),
        lambda m: fit(OneTask(m, loss_fn, **OPTIONS), tmp_path, accumulate_grad_batches=3),
    ):
        method, calls = opened("lora"), []
        monkeypatch.setattr(method, "after_step", lambda calls=calls: calls.append(1))
        loop(method)
        assert len(calls) == 2 * EPOCHS  # a step after three of four batches, and one at the end


@pytest.mark.parametrize("name", TRAINED)
def test_accelerates_checkpoint_goes_on_in_the_middle_of_a_task(name, tmp_path):
    whole = opened(name)
    task = accelerated(whole)
    accelerate_loop(task, epochs=1)
    task.accelerator.save_state(str(tmp_path))
    accelerate_loop(task, epochs=1)

    again = fresh(name)  # a new process: the pretrained model, nothing learned, no task open
    keeplora_accelerate.resume(again, tmp_path)
    task = accelerated(again)
    task.accelerator.load_state(str(tmp_path))
    accelerate_loop(task, epochs=1)
    assert_same(again, whole)


@pytest.mark.parametrize("name", TRAINED)
def test_lightnings_checkpoint_goes_on_in_the_middle_of_a_task(name, tmp_path):
    whole, again = opened(name), fresh(name)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=STEPS, save_top_k=-1)
    module = OneTask(whole, loss_fn, **OPTIONS)
    assert fit(module, tmp_path, callbacks=[keep], enable_checkpointing=True).global_step == EPOCHS * STEPS
    fit(OneTask(again, loss_fn, **OPTIONS), tmp_path, checkpoint=tmp_path / f"step={STEPS}.ckpt")
    assert_same(again, whole)


@pytest.mark.parametrize("checkpoint", [{}, {"keeplora": None}, {"keeplora": {"tensors": {}}}])
def test_a_checkpoint_without_the_methods_state_is_refused(checkpoint):
    method = opened("lora")
    module = OneTask(method, loss_fn, **OPTIONS)
    with pytest.raises(StateError, match=r"on_load_checkpoint: the checkpoint must hold the method's state.*\.$"):
        module.on_load_checkpoint(checkpoint)
    assert_same(method, opened("lora"))


@pytest.mark.parametrize("prepared_by", ["OneTask", "the user"])
def test_a_trained_a_is_kept_by_the_optimizer_that_accelerate_wraps(prepared_by):
    data = one_layer.task_data(0)
    keeper = one_layer.make_keeper(train_a=True)
    keeper.before_task(one_layer.batches(data), one_layer.loss_fn)
    accelerator, adamw = Accelerator(cpu=True), torch.optim.AdamW(keeper.trainable_parameters(), lr=RATE)
    if prepared_by == "OneTask":
        task = keeplora_accelerate.OneTask(accelerator, keeper, keeper.model, adamw)
        model, optimizer = task.model, task.optimizer
    else:
        model, optimizer = accelerator.prepare(keeper.model, adamw)
        keeper.confine(optimizer)
    for batch in accelerator.prepare(one_layer.batches(data)):
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    bases = [keeper.basis(slot.name) for slot in keeper.slots]
    assert max((slot.adapter.A @ q).abs().max() for slot, q in zip(keeper.slots, bases, strict=True)) < 1e-6


def test_without_before_task_both_refuse(tmp_path):
    method = fresh("keeplora")
    with pytest.raises(RuntimeError, match=r"a task must be open.*Call before_task"):
        accelerated(method, torch.optim.SGD(method.model.parameters(), lr=RATE))
    with pytest.raises(RuntimeError, match=r"a task must be open.*Call before_task"):
        fit(OneTask(method, loss_fn), tmp_path)


def test_an_optimizer_of_an_earlier_task_is_refused():
    method = fresh("lora")
    method.before_task(passes(samples(0)), loss_fn)
    optimizer = method.optimizer(lr=RATE)
    method.after_task(passes(samples(0)))
    method.before_task(passes(samples(1)), loss_fn)
    with pytest.raises(RuntimeError, match=r"OneTask: the optimizer must hold the \d+ parameters .* got 0"):
        accelerated(method, optimizer)
