"""What two processes do with accelerate's FSDP2 plugin, in tests/test_shared_out_trainer.py."""

import os
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import Trainer, TrainingArguments

from keeplora import KeepLora, KeepLoraConfig
from keeplora.integrations import KeepLoraCallback, shard
from keeplora.integrations.accelerate import OneTask, resume
from tests.processes import error_of, joined
from tests.shared_out import SETTINGS, llama, loss_fn, whole

COUNT, BATCH, STEPS, RATE = 2, 2, 4, 0.05
EVERYWHERE = {**SETTINGS, "balance": False}
"""What does not depend on the number of processes: balancing samples the inputs of each."""
BLOCK = "LlamaDecoderLayer"


def samples(task, accumulate):
    """As many as the steps of a task take."""
    generator = torch.Generator().manual_seed(task)
    ids = torch.randint(3, 60, (STEPS * BATCH * accumulate * COUNT, 20), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(out, accumulate, **options):
    return TrainingArguments(
        str(out), per_device_train_batch_size=BATCH, gradient_accumulation_steps=accumulate, max_steps=STEPS,
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.05, use_cpu=True,
        train_sampling_strategy="sequential", report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", "optim": "sgd"} | options,
    )  # fmt: skip


def trainer_for(model, out, task, accumulate=2, callbacks=(), gpus=True, **options):
    args = arguments(out, accumulate, **options)
    if "fsdp" in options and gpus:
        # accelerate runs FSDP where processes have GPUs; all else that it does is done here as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model, args, train_dataset=samples(task, 2), callbacks=list(callbacks))


def fsdp2(**options):
    return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": [BLOCK], **options}}


def two_tasks(out, accumulate, cut, **options):
    """In Trainer, gradients accumulated and clipped; what every process must find alike, and the norms it clipped."""
    model, keeper, found, norms = llama(), None, {}, []
    for task in range(2):
        trainer = trainer_for(model, out, task, accumulate, logging_steps=1, **options)
        if keeper is None:
            keeper = KeepLora(shard(trainer.accelerator, model) if cut else model, KeepLoraConfig(**EVERYWHERE))
        trainer.add_callback(KeepLoraCallback(keeper))
        keeper.before_task(trainer.get_train_dataloader(), loss_fn)
        trainer.train()
        norms += [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        found[f"B, {task}"] = [s.adapter.B.detach().clone() for s in keeper.slots]
        found[f"certificate, {task}"] = keeper.after_task(trainer.get_train_dataloader()).to_dict()
    found["W"] = [whole(slot.weight) for slot in keeper.slots]
    return found, norms


def stopped(out):
    """A task that is gone on with from Trainer's checkpoint in its middle, and one that was not stopped."""
    ends = []
    for again in (False, True):
        model = llama()
        options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        trainer = trainer_for(model, out, 0, **options, **fsdp2())
        keeper = KeepLora(shard(trainer.accelerator, model), KeepLoraConfig(**SETTINGS))
        callback = KeepLoraCallback(keeper)
        trainer.add_callback(callback)
        checkpoint = f"{out}/checkpoint-2"
        if again:
            callback.resume(checkpoint)
        else:
            keeper.before_task(trainer.get_train_dataloader(), loss_fn)
        trainer.train(resume_from_checkpoint=checkpoint if again else None)
        B = [s.adapter.B.detach().clone() for s in keeper.slots]
        ends.append((B, keeper.after_task(trainer.get_train_dataloader(), loss_fn).to_dict()))
    return ends


def own_loop(out, rank):
    """A task under Accelerate, stopped after a step and gone on with; as it was in the end, and when not stopped."""
    rows = samples(0, 1)[4 * rank : 4 * rank + 4]
    data = [{key: torch.stack([row[key] for row in pair]) for key in pair[0]} for pair in (rows[:2], rows[2:])]
    ends, plugin = [], FullyShardedDataParallelPlugin(fsdp_version=2, transformer_cls_names_to_wrap=[BLOCK])
    for again in (False, True):
        accelerator = Accelerator(fsdp_plugin=plugin)
        keeper = KeepLora(shard(accelerator, llama()), KeepLoraConfig(**SETTINGS))
        resume(keeper, out) if again else keeper.before_task(data, loss_fn)
        task = OneTask(accelerator, keeper, keeper.model, keeper.optimizer(lr=1e-2))
        if again:
            accelerator.load_state(out)
        for batch in data[1:] if again else data:
            task.backward(loss_fn(task.model, batch))
            accelerator.clip_grad_norm_(task.model.parameters(), 0.05)
            task.optimizer.step()
            task.optimizer.zero_grad()
            if batch is data[0]:
                accelerator.save_state(out)
        ends.append([s.adapter.B.detach().clone() for s in keeper.slots])
    return ends


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


def refusals(out):
    """Before data are read, wherever that can be known."""

    def whole_method():
        keeper = KeepLora(llama(), KeepLoraConfig(**SETTINGS))
        trainer_for(keeper.model, out, 0, callbacks=[KeepLoraCallback(keeper)], **fsdp2())

    def whole_method_added():
        keeper = KeepLora(llama(), KeepLoraConfig(**SETTINGS))
        trainer_for(keeper.model, out, 0, **fsdp2()).add_callback(KeepLoraCallback(keeper))

    def around():
        trainer = trainer_for(llama(), out, 0, **fsdp2())
        keeper = KeepLora(shard(trainer.accelerator, trainer.model), KeepLoraConfig(**SETTINGS))
        trainer_for(Around(keeper.model), out, 0, callbacks=[KeepLoraCallback(keeper)], **fsdp2())

    def second_method():
        trainer = trainer_for(llama(), out, 0, **fsdp2())
        shard(trainer.accelerator, KeepLora(trainer.model, KeepLoraConfig(**SETTINGS)).model)

    def setting(name):
        trainer = trainer_for(llama(), out, 0, **fsdp2())
        plugin = trainer.accelerator.state.fsdp_plugin
        before, value = getattr(plugin, name), True
        if name == "cpu_offload":
            value = torch.distributed.fsdp.CPUOffloadPolicy()
        setattr(plugin, name, value)
        try:
            shard(trainer.accelerator, trainer.model)
        finally:
            setattr(plugin, name, before)

    found = {call.__name__: error_of(call) for call in (whole_method, whole_method_added, around, second_method)}
    names = ("cpu_ram_efficient_loading", "activation_checkpointing", "cpu_offload")
    return found | {name: error_of(lambda name=name: setting(name)) for name in names}


def on_cpus(out):
    """What accelerate would do by itself where processes have no GPU."""
    trainer = trainer_for(llama(), out, 0, gpus=False, **fsdp2())
    found = {"no FSDP": error_of(lambda: shard(trainer.accelerator, trainer.model))}
    model = llama()
    torch.distributed.fsdp.fully_shard(model)
    keeper = KeepLora(model, KeepLoraConfig(**SETTINGS))
    found["DDP"] = error_of(lambda: trainer_for(model, out, 0, callbacks=[KeepLoraCallback(keeper)]))
    found["DDP, added"] = error_of(lambda: KeepLoraCallback(keeper))
    return found


def work(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(COUNT)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    warnings.filterwarnings("ignore")
    with joined(rank, folder, COUNT):
        found = {"on CPUs": on_cpus(Path(folder) / "cpus")}
        found["trainer"], found["norms"] = two_tasks(Path(folder) / "two", 2, True, **fsdp2())
        found["bf16"], found["bf16, norms"] = two_tasks(Path(folder) / "bf16", 2, True, bf16=True, **fsdp2())
        found["stopped"] = stopped(Path(folder) / "stopped")
        found["own loop"] = own_loop(f"{folder}/own", rank)
        found["refusals"] = refusals(Path(folder) / "refused")
        torch.save(found, Path(folder) / f"{rank}.pt")
