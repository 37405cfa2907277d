"""FSDP2 by accelerate's plugin, which Trainer uses, too: the model is cut up before a method is made of it."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn

from keeplora._calls import named
from keeplora.lora import LoraHost, require_module
from keeplora.lora.shares import is_wrapped, without_rows
from keeplora.methods.flags import freeze
from keeplora.methods.method import Method
from keeplora.methods.slot_states import SlotStates

__all__ = ["settle_engine", "shard"]


@named
def shard(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Freeze ``model`` and cut it into rows with accelerate's FSDP2 plugin, before a method is made of it.

    Accelerate and Trainer shard in ``prepare`` and ``train()`` otherwise, when a task's adapters are in the model
    already: these would be cut up too. Adapters that come later stay whole in every process, and a model that is
    sharded is left as it is:

        trainer = Trainer(model, TrainingArguments(out, fsdp=True), train_dataset=task)
        shard(trainer.accelerator, model)
        keeper = KeepLora(model, KeepLoraConfig(target_modules="all-linear"))
        trainer.add_callback(KeepLoraCallback(keeper))

    Args:
        accelerator: With a ``FullyShardedDataParallelPlugin(fsdp_version=2)``.
        model: What the loop calls. Every process holds all of its weights.

    Returns:
        ``model``, the same object, on the accelerator's device.

    Raises:
        ValueError: the accelerator does not run FSDP2, loads weights on the first process alone
            (``cpu_ram_efficient_loading``), offloads them, or has activation checkpointing of its own.
        RuntimeError: the model holds a method's layers already.
    """
    require_module("shard", model)
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"shard: accelerator must run FSDP2, got {accelerator.distributed_type} with {accelerator.num_processes} "
            "processes. Give it FullyShardedDataParallelPlugin(fsdp_version=2), or Trainer fsdp=True, and start "
            "several processes with GPUs: on CPUs accelerate runs DistributedDataParallel in its place."
        )
    plugin = accelerator.state.fsdp_plugin
    for name, remedy in (
        ("cpu_ram_efficient_loading", "Load the weights in every process: set it to False."),
        ("activation_checkpointing", "Use the model's own: model.gradient_checkpointing_enable()."),
    ):
        if getattr(plugin, name):
            raise ValueError(f"shard: fsdp_plugin.{name} must be off, got {getattr(plugin, name)!r}. {remedy}")
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ValueError("shard: fsdp_plugin.cpu_offload must be off, got CPUOffloadPolicy. Set it to False.")
    if any(isinstance(module, LoraHost) for module in model.modules()):
        raise RuntimeError("shard: model must be sharded before a method is made of it, got one with a method's layers")
    freeze(model)
    cut: nn.Module = fsdp2_prepare_model(accelerator, model)
    return cut


def settle_engine(caller: str, state: AcceleratorState, method: Method, model: nn.Module) -> None:
    """Refuse what accelerate would do to the method's model when a loop begins; let it leave a sharded one as it is.

    Raises:
        TypeError: it would shard a model whose method was made of whole weights, or one around the method's; or put
            DistributedDataParallel around one that is sharded; or mistake weights that are trained for others.
    """
    shard_first = "Call keeplora.integrations.shard(accelerator, model) first (trainer.accelerator in a Trainer), then "
    if state.is_fsdp2 and not method.shared_out:
        raise TypeError(
            f"{caller}: FSDP2 must have the model before {method.name!r} is made, got a method of whole weights, whose "
            f"adapters would be cut up with the model. {shard_first}make the method, then before_task."
        )
    if state.is_fsdp2 and not is_wrapped(model):
        raise TypeError(
            f"{caller}: model must be the one that FSDP2 has, got a {type(model).__name__} around it, which would be "
            f"cut up with the adapters. {shard_first}use that model in the loop."
        )
    if method.shared_out and not state.is_fsdp2 and state.num_processes > 1:
        raise TypeError(
            f"{caller}: accelerate must run FSDP2 for a model that fully_shard has cut up, got "
            f"{state.distributed_type}, which would put DistributedDataParallel around it. Give the Accelerator "
            "FullyShardedDataParallelPlugin(fsdp_version=2), or Trainer fsdp=True."
        )
    for slot in method.slots if method.trains_weights and isinstance(method, SlotStates) else ():
        rank = without_rows(slot.weight)
        if rank is not None:  # prepare knows parameters by where their rows are
            raise TypeError(
                f"{caller}: every process must have rows of every weight under accelerate where {method.name!r} trains "
                f"them, got none of {len(slot.weight)} on rank {rank} [{slot.name}]. Start fewer processes, leave the "
                "layer out of target_modules, or write the loop without accelerate."
            )
    if method.shared_out and state.is_fsdp2:
        state.fsdp_plugin.auto_wrap_policy = None  # it looks for classes whose names fully_shard has changed
