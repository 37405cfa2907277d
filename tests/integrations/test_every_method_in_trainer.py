"""Every registered method under transformers' Trainer: the numbers of a plain loop, or refused by name."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from keeplora.integrations.hf_trainer import KeepLoraCallback
from keeplora.lora import innermost
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

CLIP = 0.01  # of every gradient here: the smallest norm is larger


def trainer_for(method, out, model=None, **options):
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
    return Trainer(
        model or Classifier(method.model), args, train_dataset=samples(1), callbacks=[KeepLoraCallback(method)]
    )


CASES = [(name, *case) for name in TRAINED for case in [(1, 0), (3, CLIP)]]
CASES += [(name, *case) for name in PENALTIES for case in [(1, CLIP), (3, 0)]]


@pytest.mark.parametrize(("name", "accumulate", "clip"), CASES)
def test_a_method_learns_what_it_learns_in_a_plain_loop(name, accumulate, clip, tmp_path):
    method, own = opened(name), opened(name)
    trainer = trainer_for(method, tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    if name == "gpm":
        trainer.optimizer = method.optimizer(lr=RATE)
    trainer.train()
    optimizer = like(innermost(trainer.optimizer), method, own)
    plain_loop(own, samples(1), optimizer, accumulate, clip)
    assert_same(method, own)
