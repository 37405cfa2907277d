"""KeepLoRA under Accelerate and Lightning: mixed precision, accumulated gradients, checkpoints inside a task."""

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from examples.with_lightning import OneTask
from keeplora import KeepLora
from tests.train.one_layer import STEPS, assert_same, batches, loss_fn, make_keeper, task_data


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings in the class: a test must find none, of Trainer's either, and leave none."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def opened(data):
    """A keeper with a task open, the second of its life."""
    keeper = make_keeper()
    keeper.before_task(batches(task_data(0)), loss_fn)
    for parameter in keeper.trainable_parameters():
        parameter.data.fill_(0.01)
    keeper.after_task(batches(task_data(0)))
    keeper.before_task(batches(data), loss_fn)
    return keeper


def adamw(keeper):
    return torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 3}], ids=str)
def test_accelerate_learns_what_a_loop_of_ones_own_learns(options):
    data = task_data(1)
    keeper, own = opened(data), opened(data)
    accelerator = Accelerator(cpu=True, **options)
    model, optimizer, loader = accelerator.prepare(keeper.model, adamw(keeper), batches(data))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()

    every, optimizer = options.get("gradient_accumulation_steps", 1), adamw(own)
    for step, batch in enumerate(batches(data)):
        with torch.autocast("cpu", torch.bfloat16, enabled="mixed_precision" in options):
            loss = loss_fn(own.model, batch)
        (loss / every).backward()
        if (step + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert all(parameter.detach().any() for parameter in keeper.trainable_parameters())
    assert_same(keeper, own)


def test_accelerates_checkpoint_goes_on_in_the_middle_of_a_task(tmp_path):
    data = task_data(1)

    def steps(accelerator, model, optimizer, loader):
        for batch in loader:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()

    accelerator, keeper = Accelerator(cpu=True), opened(data)
    model, optimizer, loader = accelerator.prepare(keeper.model, adamw(keeper), batches(data))
    accelerator.register_save_state_pre_hook(lambda models, weights, out: keeper.save(f"{out}/keeplora"))
    steps(accelerator, model, optimizer, loader)
    accelerator.save_state(str(tmp_path))
    steps(accelerator, model, optimizer, loader)

    accelerator = Accelerator(cpu=True)
    again = KeepLora.load(tmp_path / "keeplora", make_keeper().merge())
    model, optimizer, loader = accelerator.prepare(again.model, adamw(again), batches(data))
    accelerator.load_state(str(tmp_path))
    steps(accelerator, model, optimizer, loader)
    assert_same(again, keeper)
    assert again.after_task(batches(data), loss_fn).leak <= 1e-6


def test_a_trained_a_is_kept_by_the_optimizer_that_accelerate_wraps():
    data = task_data(0)
    keeper = make_keeper(train_a=True)
    keeper.before_task(batches(data), loss_fn)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(keeper.model, adamw(keeper), batches(data))
    with keeper.confine(optimizer):
        for batch in loader:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    bases = [keeper.basis(slot.name) for slot in keeper.slots]
    assert max((slot.adapter.A @ q).abs().max() for slot, q in zip(keeper.slots, bases, strict=True)) < 1e-6


class Tiny(OneTask):
    """The example's module, checkpoints and all, around another model."""

    def training_step(self, batch, index):
        return loss_fn(self.model, batch)


def trainer(folder, **options):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=folder, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_lightnings_checkpoint_goes_on_in_the_middle_of_a_task(tmp_path):
    data = task_data(1)
    keeper = opened(data)
    keeper.model.train()
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Tiny(keeper), batches(data))
    first.save_checkpoint(tmp_path / "middle.ckpt")

    whole = opened(data)
    whole.model.train()
    trainer(tmp_path, max_epochs=2).fit(Tiny(whole), batches(data))

    again = make_keeper()  # a new process: nothing learned, no task open
    again.model.train()
    second = trainer(tmp_path, max_epochs=2)
    second.fit(Tiny(again), batches(data), ckpt_path=tmp_path / "middle.ckpt")
    assert second.global_step == 2 * STEPS
    assert again.tasks_learned == 1
    assert_same(again, whole)
    assert again.after_task(batches(data), loss_fn).leak <= 1e-6


def test_lightning_without_before_task_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"a task must be open, got none\. Call before_task"):
        trainer(tmp_path, max_epochs=1).fit(Tiny(make_keeper()), batches(task_data(0)))


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_lightning_in_bf16_learns_what_a_loop_of_ones_own_learns(tmp_path):
    data = task_data(1)
    keeper, own = opened(data), opened(data)
    keeper.model.train()
    trainer(tmp_path, max_epochs=1, precision="bf16-mixed", accumulate_grad_batches=2).fit(Tiny(keeper), batches(data))
    optimizer = Tiny(own).configure_optimizers()
    for step, batch in enumerate(batches(data)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(own.model, batch)
        (loss / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert all(parameter.detach().any() for parameter in keeper.trainable_parameters())
    assert_same(keeper, own)
