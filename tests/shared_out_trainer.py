"""What two or four processes do with accelerate's FSDP2 plugin, in tests/test_shared_out_trainer.py."""

import os
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import Trainer, TrainingArguments

import keeplora
from keeplora import KeepLora, KeepLoraConfig
from keeplora.integrations import KeepLoraCallback, shard
from keeplora.integrations.accelerate import OneTask, resume
from tests import shared_out_vlm
from tests.processes import error_of, joined
from tests.shared_out import SETTINGS, loss_fn, whole
from tests.shared_out_vlm import IMAGE

MOST, BATCH, STEPS, RATE = 4, 2, 2, 0.05
METHODS = {
    "keeplora": {**SETTINGS, "balance": False},
    "gpm": {"target_modules": "all-linear", "feature_energy": 0.6},
}
"""What does not depend on the number of processes: balancing samples the inputs of each."""
OWN = METHODS | {"keeplora": SETTINGS}
TASKS = {2: 2, MOST: 3}
BLOCKS = ["CLIPEncoderLayer", "LlamaDecoderLayer"]


def llava(name="keeplora"):
    """With 6 rows of k and v, of which the last of four processes has none; GPM may not have that here."""
    return shared_out_vlm.llava(head_dim=8 if name == "gpm" else 6)


def samples(task):
    """As many as the steps of a task take, of four processes that accumulate two gradients, or two that do four."""
    generator = torch.Generator().manual_seed(task)
    count = STEPS * BATCH * 2 * MOST
    words = torch.randint(3, IMAGE, (count, 16), generator=generator)
    ids = torch.cat([torch.full((count, 4), IMAGE), words], dim=1)
    pixels = torch.randn(count, 3, 8, 8, generator=generator) + task
    labels = torch.where(ids == IMAGE, -100, ids)
    return [
        {"input_ids": row, "labels": own, "pixel_values": picture}
        for row, own, picture in zip(ids, labels, pixels, strict=True)
    ]


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
    return Trainer(model, args, train_dataset=samples(task), callbacks=list(callbacks))


def fsdp2(**options):
    return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": BLOCKS, **options}}


def learned(out, accumulate, cut, name="keeplora", tasks=3, **options):
    """Tasks in Trainer, gradients accumulated, then clipped: what every process must find alike, and all norms."""
    model, keeper, found, norms = llava(name), None, {}, []
    for task in range(tasks):
        trainer = trainer_for(model, out, task, accumulate, logging_steps=1, **options)
        if keeper is None:
            keeper = keeplora.create(name, shard(trainer.accelerator, model) if cut else model, METHODS[name])
        trainer.add_callback(KeepLoraCallback(keeper))
        keeper.before_task(trainer.get_train_dataloader(), loss_fn)
        trainer.train()
        norms += [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        found[f"B, {task}"] = [s.adapter.B.detach().clone() for s in keeper.slots if s.adapter is not None]
        report = keeper.after_task(trainer.get_train_dataloader())
        found[f"certificate, {task}"] = None if report is None else report.to_dict()
        found[f"W, {task}"] = [whole(slot.weight) for slot in keeper.slots]
    return found, norms


def stopped(out, name):
    """A task that is gone on with from Trainer's checkpoint in its middle, and one that was not stopped."""
    ends = []
    for again in (False, True):
        model = llava(name)
        options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
        if name == "gpm":  # trained with SGD alone; torch cannot load the state of one that has none
            options |= {"optim": "sgd", "optim_args": "momentum=0.9"}
        trainer = trainer_for(model, out, 0, **options, **fsdp2())
        keeper = keeplora.create(name, shard(trainer.accelerator, model), OWN[name])
        callback = KeepLoraCallback(keeper)
        trainer.add_callback(callback)
        checkpoint = f"{out}/checkpoint-1"
        if again:
            callback.resume(checkpoint)
        else:
            keeper.before_task(trainer.get_train_dataloader(), loss_fn)
        trainer.train(resume_from_checkpoint=checkpoint if again else None)
        trained = [whole(parameter) for parameter in keeper.trainable_parameters()]
        report = keeper.after_task(trainer.get_train_dataloader(), loss_fn)
        ends.append((trained, keeper.capacity().to_dict(), None if report is None else report.to_dict()))
    return ends


def own_loop(out, rank, name):
    """A task under Accelerate, stopped after a step and gone on with; as it was in the end, and when not stopped."""
    rows = samples(0)[4 * rank : 4 * rank + 4]
    data = [{key: torch.stack([row[key] for row in pair]) for key in pair[0]} for pair in (rows[:2], rows[2:])]
    ends, plugin = [], FullyShardedDataParallelPlugin(fsdp_version=2, transformer_cls_names_to_wrap=BLOCKS)
    for again in (False, True):
        accelerator = Accelerator(fsdp_plugin=plugin)
        keeper = keeplora.create(name, shard(accelerator, llava(name)), OWN[name])
        resume(keeper, out) if again else keeper.before_task(data, loss_fn)
        momentum = {"momentum": 0.9} if name == "gpm" else {}
        task = OneTask(accelerator, keeper, keeper.model, keeper.optimizer(lr=1e-2, **momentum))
        if again:
            accelerator.load_state(out)
        for batch in data[1:] if again else data:
            task.backward(loss_fn(task.model, batch))
            accelerator.clip_grad_norm_(task.model.parameters(), 0.05)
            task.optimizer.step()
            task.optimizer.zero_grad()
            if batch is data[0]:
                accelerator.save_state(out)
        ends.append([whole(parameter) for parameter in keeper.trainable_parameters()])
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
        keeper = KeepLora(llava(), KeepLoraConfig(**SETTINGS))
        trainer_for(keeper.model, out, 0, callbacks=[KeepLoraCallback(keeper)], **fsdp2())

    def whole_method_added():
        keeper = KeepLora(llava(), KeepLoraConfig(**SETTINGS))
        trainer_for(keeper.model, out, 0, **fsdp2()).add_callback(KeepLoraCallback(keeper))

    def around():
        trainer = trainer_for(llava(), out, 0, **fsdp2())
        keeper = KeepLora(shard(trainer.accelerator, trainer.model), KeepLoraConfig(**SETTINGS))
        trainer_for(Around(keeper.model), out, 0, callbacks=[KeepLoraCallback(keeper)], **fsdp2())

    def second_method():
        trainer = trainer_for(llava(), out, 0, **fsdp2())
        shard(trainer.accelerator, KeepLora(trainer.model, KeepLoraConfig(**SETTINGS)).model)

    def no_rows():
        trainer = trainer_for(llava(), out, 0, **fsdp2())
        model = shard(trainer.accelerator, trainer.model)
        KeepLoraCallback(keeplora.create("gpm", model, METHODS["gpm"]))

    def setting(name):
        trainer = trainer_for(llava(), out, 0, **fsdp2())
        plugin = trainer.accelerator.state.fsdp_plugin
        before, value = getattr(plugin, name), True
        if name == "cpu_offload":
            value = torch.distributed.fsdp.CPUOffloadPolicy()
        setattr(plugin, name, value)
        try:
            shard(trainer.accelerator, trainer.model)
        finally:
            setattr(plugin, name, before)

    calls = (whole_method, whole_method_added, around, second_method, no_rows)
    found = {call.__name__: error_of(call) for call in calls}
    names = ("cpu_ram_efficient_loading", "activation_checkpointing", "cpu_offload")
    return found | {name: error_of(lambda name=name: setting(name)) for name in names}


def on_cpus(out):
    """What accelerate would do by itself where processes have no GPU."""
    trainer = trainer_for(llava(), out, 0, gpus=False, **fsdp2())
    found = {"no FSDP": error_of(lambda: shard(trainer.accelerator, trainer.model))}
    model = llava()
    torch.distributed.fsdp.fully_shard(model)
    keeper = KeepLora(model, KeepLoraConfig(**SETTINGS))
    found["DDP"] = error_of(lambda: trainer_for(model, out, 0, callbacks=[KeepLoraCallback(keeper)]))
    found["DDP, added"] = error_of(lambda: KeepLoraCallback(keeper))
    return found


def work(rank, folder, count):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate gives every process more threads than it has cores
    warnings.filterwarnings("ignore")
    with joined(rank, folder, count):
        found = {"on CPUs": on_cpus(Path(folder) / "cpus")} if count == 2 else {}
        for name in METHODS:
            found[name] = learned(Path(folder) / name, 2 * MOST // count, True, name, TASKS[count], **fsdp2())
            if count == MOST:
                found[f"{name}, stopped"] = stopped(Path(folder) / f"{name}-stopped", name)
                found[f"{name}, own loop"] = own_loop(f"{folder}/{name}-own", rank, name)
        if count == 2:
            found["bf16"] = learned(Path(folder) / "bf16", MOST, True, tasks=2, bf16=True, **fsdp2())
        else:
            found["refusals"] = refusals(Path(folder) / "refused")
        torch.save(found, Path(folder) / f"{rank}.pt")
