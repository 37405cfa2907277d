"""KeepLoRA in transformers' Trainer: the same numbers as a loop of one's own, checkpoints, and order."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from keeplora.integrations.hf_trainer import KeepLoraCallback
from keeplora.methods import create
from keeplora.methods.state import StateError
from tests.integrations.one_layer import BATCH, STEPS, assert_same, batches, loss_fn, make_keeper, task_data

RATE, DECAY = 1e-2, 0.1


def trainer_for(keeper, data, out, callbacks=(), eval_dataset=None, **options):
    args = TrainingArguments(
        str(out),
        per_device_train_batch_size=BATCH,
        num_train_epochs=2,
        learning_rate=RATE,
        weight_decay=DECAY,
        optim="adamw_torch",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        **{"lr_scheduler_type": "constant", "save_strategy": "no", **options},
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = KeepLoraCallback(keeper)
    callbacks = [callback, *callbacks]
    return Trainer(keeper.model, args, train_dataset=data, eval_dataset=eval_dataset, callbacks=callbacks), callback


def plain_loop(keeper, data, accumulate=1, bf16=False):
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=RATE, weight_decay=DECAY)
    for step, batch in enumerate([*batches(data), *batches(data)]):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_fn(keeper.model, batch)
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str)
def test_trainer_learns_what_a_loop_of_ones_own_learns(tmp_path, options):
    keeper, own = make_keeper(), make_keeper()
    for number in range(2):
        data = task_data(number)
        trainer, _ = trainer_for(keeper, data, tmp_path, **options)
        keeper.before_task(batches(data), loss_fn)
        trainer.train()
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in keeper.trainable_parameters()}  # nothing frozen in it
        own.before_task(batches(data), loss_fn)
        plain_loop(own, data, options.get("gradient_accumulation_steps", 1), options.get("bf16", False))
        assert all(p.detach().any() for p in own.trainable_parameters())
        assert_same(keeper, own)
        if "bf16" in options:  # Trainer has patched the model's forward: later passes of the keeper's are in bf16, too
            break
        assert keeper.after_task(batches(data)).leak <= 1e-6
        own.after_task(batches(data))


def test_after_step_is_called_once_per_optimizer_step(tmp_path, monkeypatch):
    keeper, data, calls = make_keeper(), task_data(0), []
    monkeypatch.setattr(keeper, "after_step", lambda: calls.append(1))
    trainer, _ = trainer_for(keeper, data, tmp_path, gradient_accumulation_steps=2)
    keeper.before_task(batches(data), loss_fn)
    assert trainer.train().global_step == len(calls) == STEPS


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


SAVING = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_task_resumed_in_the_middle_ends_as_if_never_stopped(tmp_path, dtype):
    first, second = task_data(0), task_data(1)

    def start(out, callbacks=()):
        keeper = make_keeper(dtype)
        keeper.before_task(batches(first), loss_fn)
        trainer_for(keeper, first, out / "0")[0].train()
        keeper.after_task(batches(first))
        trainer, _ = trainer_for(keeper, second, out / "1", callbacks, **SAVING)
        keeper.before_task(batches(second), loss_fn)
        trainer.train()
        return keeper

    whole = start(tmp_path / "whole")
    whole.after_task(batches(second))

    start(tmp_path / "cut", [StopAt(5)])
    checkpoint = tmp_path / "cut" / "1" / "checkpoint-3"
    keeper = make_keeper(dtype)  # a new process: the pretrained model, and nothing learned
    trainer, callback = trainer_for(keeper, second, tmp_path / "cut" / "1", **SAVING)
    callback.resume(checkpoint)
    assert keeper.tasks_learned == 1
    assert trainer.train(resume_from_checkpoint=str(checkpoint)).global_step == 2 * STEPS
    keeper.after_task(batches(second), loss_fn)
    assert_same(keeper, whole)


def test_the_best_checkpoint_is_what_is_merged(tmp_path):
    keeper, data = make_keeper(), task_data(0)
    wrong = [{**row, "labels": 3 - row["labels"]} for row in data]  # the more is learned, the worse
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    trainer, _ = trainer_for(keeper, data, tmp_path, eval_dataset=wrong, eval_steps=3, **SAVING, **options)
    keeper.before_task(batches(data), loss_fn)
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    best = make_keeper()
    KeepLoraCallback(best).resume(trainer.state.best_model_checkpoint)
    assert_same(keeper, best)


def test_checkpoints_share_what_lasts_whichever_trainer_deletes(tmp_path):
    keeper, first = make_keeper(), task_data(0)
    keeper.before_task(batches(first), loss_fn)
    trainer_for(keeper, first, tmp_path / "first")[0].train()
    keeper.after_task(batches(first))
    out, data = tmp_path / "out", task_data(1)
    trainer, _ = trainer_for(keeper, data, out, **{**SAVING, "save_steps": 1}, save_total_limit=1)
    keeper.before_task(batches(data), loss_fn)
    trainer.train()
    [checkpoint] = out.glob("checkpoint-*")
    [shared] = (out / "_keeplora-files").glob("tensors-*")
    assert shared.stat().st_nlink == 2
    assert (checkpoint / "keeplora" / shared.name).stat().st_ino == shared.stat().st_ino
    again = make_keeper()
    KeepLoraCallback(again).resume(checkpoint)
    assert_same(again, keeper)


def test_train_before_before_task_is_refused_and_changes_nothing(tmp_path):
    keeper, data = make_keeper(), task_data(0)
    trainer, _ = trainer_for(keeper, data, tmp_path)
    before = {name: value.clone() for name, value in keeper.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"a task must be open .* Call before_task"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in keeper.model.state_dict().items())
    keeper.before_task(batches(data), loss_fn)
    with pytest.raises(RuntimeError, match=r"got 0 of them.*new Trainer"):  # its optimizer was made when none was open
        trainer.train()


def test_a_trainer_with_the_optimizer_of_an_earlier_task_is_refused(tmp_path):
    keeper, data = make_keeper(), task_data(0)
    trainer, _ = trainer_for(keeper, data, tmp_path)
    keeper.before_task(batches(data), loss_fn)
    trainer.train()
    keeper.after_task(batches(data))
    keeper.before_task(batches(task_data(1)), loss_fn)
    with pytest.raises(RuntimeError, match=r"the optimizer must hold the 2 parameters .* got 0"):
        trainer.train()
    assert not any(p.detach().any() for p in keeper.trainable_parameters())


def test_resuming_half_is_refused(tmp_path):
    data = task_data(0)
    keeper = make_keeper()
    keeper.before_task(batches(data), loss_fn)
    trainer_for(keeper, data, tmp_path, [StopAt(3)], **SAVING)[0].train()
    checkpoint = str(tmp_path / "checkpoint-3")

    fresh = make_keeper()
    fresh.before_task(batches(data), loss_fn)
    with pytest.raises(RuntimeError, match=r"at step 0, got 3\. Call callback\.resume"):
        trainer_for(fresh, data, tmp_path, **SAVING)[0].train(resume_from_checkpoint=checkpoint)

    fresh = make_keeper()
    trainer, callback = trainer_for(fresh, data, tmp_path, **SAVING)
    callback.resume(checkpoint)
    with pytest.raises(RuntimeError, match=r"at step 3, got 0\. .*resume_from_checkpoint"):
        trainer.train()

    with pytest.raises(StateError, match="must exist"):
        callback.resume(tmp_path)


@pytest.mark.parametrize("with_callback", [True, False])
def test_a_trained_a_stays_outside_of_what_is_protected(tmp_path, with_callback):
    keeper, data = make_keeper(train_a=True), task_data(0)
    trainer, callback = trainer_for(keeper, data, tmp_path)
    if not with_callback:
        trainer.remove_callback(callback)
    keeper.before_task(batches(data), loss_fn)
    trainer.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keeper.after_task(batches(data))
    strayed = [str(warning.message) for warning in caught if "had left their free space" in str(warning.message)]
    assert bool(strayed) != with_callback


def test_a_checkpoint_elsewhere_is_no_silent_loss(tmp_path):
    keeper, data = make_keeper(), task_data(0)
    trainer, callback = trainer_for(keeper, data, tmp_path)
    keeper.before_task(batches(data), loss_fn)
    with pytest.raises(RuntimeError, match=r"checkpoint must be at .*checkpoint-0"):
        callback.on_save(trainer.args, trainer.state, trainer.control)


def weights_of(folder):
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def test_a_model_saved_before_its_task_is_closed_is_said_to_be_the_base(tmp_path):
    keeper, data = make_keeper(), task_data(0)
    trainer, _ = trainer_for(keeper, data, tmp_path, save_strategy="steps", save_steps=2)
    before = {name: value.clone() for name, value in keeper.model.state_dict().items()}
    keeper.before_task(batches(data), loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()  # whose checkpoints have the keeper's state
    with pytest.warns(UserWarning, match="KeepLoraCallback: the task must be closed before the model is saved"):
        trainer.save_model(tmp_path / "early")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.save_model(tmp_path / "early")  # it is said once
        keeper.after_task(batches(data))
        keeper.merge()
        trainer.save_model(tmp_path / "learned")
    early, learned = weights_of(tmp_path / "early"), weights_of(tmp_path / "learned")
    assert set(learned) == set(before)
    assert all(torch.equal(early[name], value) for name, value in before.items())
    assert not all(torch.equal(learned[name], value) for name, value in before.items())


def test_other_methods_are_told_too_and_pickles_do_not_carry_them(tmp_path):
    model = make_keeper().merge()
    method, data = create("lora", model, {"r": 2, "target_modules": "all-linear"}), task_data(0)
    trainer, _ = trainer_for(method, data, tmp_path)
    method.before_task(batches(data), loss_fn)
    trainer.train()
    copied = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        copied.state_dict()
    with pytest.warns(UserWarning, match="open task of 'lora'"):
        model.state_dict()
