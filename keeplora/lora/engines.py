"""Engines that keep a model's weights elsewhere: cut up, on the host, on disk; how each is recognised, and what to do.

A method reads and writes whole weights. Every public call looks for what is in ``ENGINES`` before it does anything.
Classes are known by name: nothing is imported, and what is not installed needs no import.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .quantised import quantised_layers
from .shares import DTENSORS, MODULES, is_dtensor, is_shared_out, reshard, unfit

__all__ = ["DATA_PARALLEL", "ENGINES", "Engine", "require_module", "require_rows", "require_whole"]

Seen = Callable[[nn.Module], str]
"""What of an engine is in a module itself, its children apart: a class, or a parameter and its class; "" if nothing."""


@dataclass(frozen=True)
class Engine:
    """An engine no method can work with.

    Attributes:
        name: As its users call it.
        seen: How it is recognised.
        why: What it does to weights.
        remedy: What to do instead.
        where: ``"model"``: anywhere in the method's model. ``"inside"``: there too, while the same may stand *around*
            the model. ``"adapted"``: only in layers that get an adapter; elsewhere it is welcome.
    """

    name: str
    seen: Seen
    why: str
    remedy: str
    where: Literal["model", "inside", "adapted"] = "model"

    def error(self, function: str, what: str, fault: str = "") -> TypeError:
        """What a call says that has met it; ``fault``: what keeps it from being welcome."""
        must = "weights must be whole and on their device"
        if fault:
            must += ", or frozen and cut into rows over all processes by fully_shard"
            return TypeError(f"{function}: {must}, got {what} ({self.name}): {fault}. {_FREEZE_FIRST} {self.remedy}")
        return TypeError(f"{function}: {must}, got {what} ({self.name}): {self.why}. {self.remedy}")


def require_module(function: str, model: object) -> None:
    """Refuse a name, a folder or whatever else was given in a model's place."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {_class_of(model)}. Load the model first.")


def require_whole(
    function: str,
    model: nn.Module,
    adapted: Collection[str] = (),
    *,
    around: bool = False,
    structure: bool = False,
    shares: bool = False,
    quantised: bool = False,
) -> None:
    """Refuse a model whose weights are not all here, in one piece and in numbers that can be read.

    Args:
        function: For messages: what the user called.
        adapted: Paths of the modules that get adapters.
        around: Whether ``model`` is what a loop trains, which may be an engine around the method's own.
        structure: Whether a model that is on the meta device as a whole will do, to look at its targets.
        shares: Whether rows of frozen weights will do, as FSDP2 leaves them to each process.
        quantised: Whether weights will do that can be read in floating point, and not be written.

    Raises:
        TypeError: no module; or an engine of ``ENGINES`` is there: the module and its class are named.
    """
    require_module(function, model)
    wanted = set(adapted)
    bare = structure and all(parameter.is_meta for parameter in model.parameters())
    shared = shares and is_shared_out(model)
    fault = unfit(model) if shared else ""
    welcome = (FSDP2, TENSOR_PARALLEL) if shared and not fault else ()
    readable = {id(layer) for _, layer in quantised_layers(model)} if quantised and not shared else set()
    for path, module in model.named_modules():
        for engine in ENGINES:
            elsewhere = engine.where == "adapted" and path not in wanted
            if elsewhere or (around and engine.where == "inside") or (bare and engine is NO_VALUES):
                continue
            if engine is QUANTISED and id(module) in readable:
                break  # those after it are of other libraries
            if engine not in welcome and (what := engine.seen(module)):
                raise engine.error(function, f"{what} at {path or 'the model itself'}", fault)


def require_rows(function: str, model: nn.Module, *, works: bool) -> None:
    """Leave every process its own rows of weights; refuse whatever else may have come, and calls that need more.

    Args:
        works: Whether the call can do with rows.
    """
    if not works:
        raise TypeError(
            f"{function}: weights must be whole in one process, got rows in each (FSDP2). Call save(path) in all "
            f"processes, load the state into the whole model in one, and call {function} there."
        )
    require_whole(function, model, shares=True)
    reshard(model)


def _class_of(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _instance_of(*names: str) -> Seen:
    """Modules of a class with one of these full names, or of one derived from it."""
    wanted = frozenset(names)

    def seen(module: nn.Module) -> str:
        known = any(f"{c.__module__}.{c.__qualname__}" in wanted for c in type(module).__mro__)
        return _class_of(module) if known else ""

    return seen


def _parameter(fits: Callable[[Tensor], bool]) -> Seen:
    """Modules with a parameter of their own that ``fits``."""

    def seen(module: nn.Module) -> str:
        for name, parameter in module._parameters.items():
            if parameter is not None and fits(parameter):
                return f"{name} ({_class_of(parameter)}) of {type(module).__name__}"
        return ""

    return seen


def _marked(*names: str) -> Seen:
    """Modules with a parameter that carries one of these attributes."""
    return _parameter(lambda parameter: any(name in vars(parameter) for name in names))


def _of_type(*names: str) -> Seen:
    """Modules with a parameter of one of these classes, by full name; or of a package, by its name and a dot."""

    def fits(parameter: Tensor) -> bool:
        kinds = [f"{c.__module__}.{c.__qualname__}" for c in type(parameter).__mro__]
        return any(kind.startswith(name) if name.endswith(".") else kind == name for kind in kinds for name in names)

    return _parameter(fits)


def _any(*several: Seen) -> Seen:
    return lambda module: next((what for seen in several if (what := seen(module))), "")


def _offloaded(module: nn.Module) -> str:
    """accelerate's hooks that fetch weights for every forward and take them away again."""
    hook: Any = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", None) or (hook,):
        if getattr(one, "offload", False) or type(one).__name__ in ("CpuOffload", "UserCpuOffloadHook"):
            return f"{type(one).__name__} of {type(one).__module__.partition('.')[0]} on {type(module).__name__}"
    return ""


def _unreadable(parameter: Tensor) -> bool:
    """Whether these numbers are in a code of some library's own."""
    known = type(parameter) in (nn.Parameter, Tensor) or is_lazy(parameter) or is_dtensor(parameter)
    return not (known and (parameter.is_floating_point() or parameter.is_complex()))


def _packed(module: nn.Module) -> str:
    """Layers that keep quantised numbers beside a weight that is none: GPTQ, AWQ, EETQ, HQQ and their like."""
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        return ""
    held = {*module._buffers, *module._parameters}
    name = next((name for name in ("qweight", "W_q", "weight_packed", "weight_q") if name in held), None)
    return f"{name} of {_class_of(module)}" if name else ""


_FREEZE_FIRST = (
    "Call model.requires_grad_(False), then fully_shard with a mesh of one dimension and without offloading."
)
_WHOLE_COPY = "Keep the model whole in every process and train under DistributedDataParallel, made after before_task."

DATA_PARALLEL = Engine(
    "DataParallel",
    _instance_of("torch.nn.parallel.data_parallel.DataParallel"),
    "its copies of the model on other GPUs read the adapters of the first",
    "Start one process per GPU (torchrun), which trains under DistributedDataParallel, or show this one a single GPU: "
    "CUDA_VISIBLE_DEVICES=0.",
)
"""Trainer puts it around the model where one process has several GPUs."""

FSDP2 = Engine(
    "FSDP2",
    _instance_of(*MODULES),
    "fully_shard leaves a share of every weight's rows in each process",
    "Methods that work with rows (KeepLoRA, KeepLoRA++, LoRA, InfLoRA, O-LoRA, GPM) are made after fully_shard. "
    "For others: " + _WHOLE_COPY[0].lower() + _WHOLE_COPY[1:],
)
"""Welcome to methods that work with rows, in the calls that do: ``require_whole(shares=True)``."""

TENSOR_PARALLEL = Engine(
    "tensor parallel",
    _of_type(*DTENSORS),
    "a DTensor holds this process's share of a weight",
    f"Load the model without tp_plan or parallelize_module. {_WHOLE_COPY}",
)

QUANTISED = Engine(
    "quantised",
    _of_type("bitsandbytes.", "torchao."),
    "what is learned cannot be merged into a quantised weight without rounding what is protected",
    "Use a method that keeps updates beside weights (all but duallora, full, gpm, lines and osf), on nn.Linear layers "
    "that are quantised already and not sharded; or keeplora.initialize on a PeftModel.",
    "adapted",
)
"""Welcome to methods that keep updates beside weights: ``require_whole(quantised=True)``."""

NO_VALUES = Engine(
    "no values",
    _parameter(lambda parameter: parameter.is_meta),
    "a parameter on the meta device has a shape and no numbers",
    "Load the weights first: from_pretrained without offloading, or model.to_empty(device=...) and "
    "load_state_dict(...).",
)

ENGINES: tuple[Engine, ...] = (
    Engine(
        "FSDP1",
        _any(
            _instance_of("torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"),
            _marked("_is_flat_param", "_fsdp_flattened"),
        ),
        "it cuts weights up and joins them in one flat parameter",
        f"{_WHOLE_COPY} Where Trainer or accelerate made it, take the FSDP plugin out of their settings.",
    ),
    FSDP2,
    TENSOR_PARALLEL,
    Engine(
        "DeepSpeed",
        _any(
            _instance_of("deepspeed.runtime.engine.DeepSpeedEngine"),
            _marked("ds_id", "ds_status", "ds_tensor"),
        ),
        "ZeRO leaves a part of every weight, or of its optimizer's state, in each process",
        f"Load the model without a DeepSpeed configuration (ZeRO-3 acts while it is loaded). {_WHOLE_COPY}",
    ),
    Engine(
        "offload by accelerate",
        _offloaded,
        "the weight is on the device only while the layer runs, and what is merged into it would be lost",
        "Load the model without offloading: a device_map without 'cpu' beside GPUs and without 'disk', more or larger "
        "GPUs, or a smaller dtype.",
    ),
    Engine(
        "DistributedDataParallel",
        _instance_of(
            "torch.nn.parallel.distributed.DistributedDataParallel", "torch.distributed._composable.replicate.DDP"
        ),
        "it averages the gradients of the parameters it was made with, and adapters come later",
        "Make the method around model.module, then DistributedDataParallel around the model, after each before_task.",
        "inside",
    ),
    DATA_PARALLEL,
    NO_VALUES,
    QUANTISED,
    Engine(
        "quantised by a library that is not known here",
        _any(_parameter(_unreadable), _packed),
        "what the layer multiplies with cannot be read in floating point",
        "Leave the layer out of the targets, load the model unquantised, or quantise it with bitsandbytes or torchao "
        "and use keeplora.initialize on a PeftModel.",
        "adapted",
    ),
)
"""Everything that is refused, in the order it is looked for: the most telling name first."""
