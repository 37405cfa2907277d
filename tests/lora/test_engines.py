"""Sharded and offloaded models: every public call says so at once, whatever the engine, and before data are read.

The engines are the real ones, in one process; DeepSpeed and the layers of quantisation libraries that are not installed
are stand-ins with the attributes that theirs have.
"""

import copy
import re

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

import keeplora
from keeplora import KeepLora, KeepLoraCallback, KeepLoraConfig
from keeplora.integrations import accelerate as with_accelerate
from keeplora.integrations import lightning as with_lightning
from keeplora.lora import linear_targets, require_whole
from keeplora.lora.engines import ENGINES

CONFIG = KeepLoraConfig(r=2, target_modules="all-linear", weight_energy=0.2, feature_energy=0.5)


@pytest.fixture(scope="module", autouse=True)
def alone():
    """One process, which is enough for every engine to do to a model what it does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3))


DATA = [(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3)]


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Untouched:
    """Data that nobody may read."""

    def __iter__(self):
        raise AssertionError("data were read")


PLACES = dict.fromkeys(("0", "1", "2", "3"), "cpu")


class DeepSpeedEngine(nn.Module):
    """A stand-in: what deepspeed.initialize returns."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module):
        super().__init__()
        self.module = module


def zero3(model):
    """A stand-in: what deepspeed.zero.Init leaves of parameters."""
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.ds_status = i, parameter.shape, "NOT_AVAILABLE"
        parameter.ds_tensor, parameter.data = parameter.data.flatten(), torch.empty(0)


def fsdp1(model, original=True):
    model.requires_grad_(True)  # it takes no mixture
    FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))


def fsdp2(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def of_a_block_around(model):
    """The root holds the method's model, whose own class tells nothing."""
    fsdp2(nn.Sequential(model))


def tensor_parallel(model):
    """What ColwiseParallel does to a layer's weight; it takes none with adapters."""
    layer = getattr(model[2][0], "base_layer", model[2][0])
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))


def inside(kind):
    def put(model):
        model[2] = kind(model[2].requires_grad_(True))

    return put


ENGINE = {  # what it does to a model, and what the message must tell
    "FSDP1": (fsdp1, "weight (torch.nn.parameter.Parameter) of"),
    "FSDP1, flat": (lambda model: fsdp1(model, original=False), "_flat_param"),
    "FSDP1, inside": (
        inside(lambda block: FullyShardedDataParallel(block, device_id=torch.device("cpu"))),
        "fully_sharded_data_parallel.FullyShardedDataParallel at 2 (FSDP1)",
    ),
    "FSDP2": (fsdp2, "FSDPSequential at the model itself (FSDP2)"),
    "FSDP2, around": (of_a_block_around, "weight (torch.distributed.tensor.DTensor) of"),
    "tensor parallel": (tensor_parallel, "Linear at 2.0 (tensor parallel)"),
    "DeepSpeed ZeRO-3": (zero3, "weight (torch.nn.parameter.Parameter) of"),
    "DeepSpeed": (inside(DeepSpeedEngine), "deepspeed.runtime.engine.DeepSpeedEngine at 2 (DeepSpeed)"),
    "offload, cpu": (lambda model: cpu_offload(model, "cpu"), "AlignDevicesHook of accelerate"),
    "offload, disk": (
        lambda model: dispatch_model(model, PLACES | {"2": "disk"}, "cpu", offload_dir="off"),
        "Linear at 2.0 (",
    ),
    "offload, pipeline": (
        lambda model: accelerate.cpu_offload_with_hook(model, "cpu"),
        "CpuOffload of accelerate on Sequential at the model itself",
    ),
    "DistributedDataParallel": (
        inside(nn.parallel.DistributedDataParallel),
        "DistributedDataParallel at 2 (DistributedDataParallel)",
    ),
    "DistributedDataParallel, in place": (replicate, "DDPSequential at the model itself (DistributedDataParallel)"),
    "DataParallel": (inside(nn.DataParallel), "torch.nn.parallel.data_parallel.DataParallel at 2 (DataParallel)"),
    "no values": (lambda model: model[2].to("meta"), "(no values)"),
}


def refused(function, told, call):
    with pytest.raises(TypeError, match=rf"^{function}: weights must be whole .*{re.escape(told)}.*\. [A-Z]") as error:
        call()
    assert not isinstance(error.value.__cause__, AssertionError)


@pytest.fixture(params=ENGINE)
def engine(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ENGINE[request.param]


def test_a_model_that_is_sharded_before(engine):
    shard, told = engine
    model, data = net(), Untouched()
    shard(model)
    kinds = [type(module) for module in model.modules()]
    refused("KeepLora", told, lambda: KeepLora(model, CONFIG))
    refused("FullFineTuning", told, lambda: keeplora.create("full", model))
    refused("load", told, lambda: keeplora.load("nowhere", model))  # nor is the state read
    refused("load", told, lambda: KeepLora.load("nowhere", model))
    assert [type(module) for module in model.modules()] == kinds
    peft = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2.0"]))
    state = keeplora.initialize(peft, DATA, loss_fn, config=CONFIG_OF_PEFT)
    shard(peft.base_model.model)
    told = told.replace("the model itself", "base_model.model").replace(" at 2", " at base_model.model.2")
    told = told.replace(".2.0", ".2.0.base_layer")
    refused("initialize", told, lambda: keeplora.initialize(peft, data, loss_fn, config=CONFIG_OF_PEFT))
    refused("update_subspace", told, lambda: keeplora.update_subspace(peft, data, state))
    refused("restore", told, lambda: state.restore(peft))
    refused("freeze_a", told, lambda: keeplora.freeze_a(peft))


CONFIG_OF_PEFT = KeepLoraConfig(weight_energy=0.2, feature_energy=0.5)


def test_a_model_that_is_sharded_between(engine, tmp_path):
    """After the method was made, and in its open task."""
    shard, told = engine
    keeper, data = KeepLora(net(), CONFIG), Untouched()
    first, whole = keeper.state(), keeplora.create("gpm", net(), {"target_modules": "all-linear"})
    whole.before_task(DATA, loss_fn)
    opened = KeepLora(net(), CONFIG)
    opened.before_task(DATA, loss_fn)
    optimizer = opened.optimizer(lr=1e-3)
    callback, state = KeepLoraCallback(opened), opened.state()
    opened.export_peft(tmp_path / "adapter")
    for method in (keeper, opened, whole):
        shard(method.model)
    refused("before_task", told, lambda: keeper.before_task(data, loss_fn))
    refused("import_peft", told, lambda: keeper.import_peft(tmp_path / "adapter"))
    refused("merge", told, keeper.merge)
    refused("load_state", told, lambda: keeper.load_state(first))
    refused("load_state", told, lambda: opened.load_state(state))
    refused("after_task", told, lambda: opened.after_task(data))
    refused("abandon_task", told, whole.abandon_task)
    refused("state", told, opened.state)
    refused("save", told, lambda: opened.save(tmp_path / "state"))
    refused("export_peft", told, lambda: opened.export_peft(tmp_path / "other"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    refused(
        "KeepLoraCallback", told,
        lambda: callback.on_train_begin(
            arguments, TrainerState(), TrainerControl(), model=opened.model, optimizer=optimizer
        ),
    )  # fmt: skip
    refused("KeepLoraCallback", told, lambda: KeepLoraCallback(opened))
    accelerator = Accelerator(cpu=True)
    refused("OneTask", told, lambda: with_accelerate.OneTask(accelerator, opened, opened.model, optimizer))
    refused("OneTask", told, lambda: with_lightning.OneTask(opened, loss_fn, lr=1e-3))
    assert not [path for path in tmp_path.iterdir() if path.name in ("state", "other")]
    assert opened.training_task
    assert not keeper.training_task


AROUND = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FullyShardedDataParallel": lambda model: FullyShardedDataParallel(
        model.requires_grad_(True), device_id=torch.device("cpu")
    ),
    "DeepSpeedEngine": DeepSpeedEngine,
}


@pytest.mark.parametrize("name", AROUND)
def test_a_method_around_an_engine(name):
    """As of a model that a loop has wrapped already."""
    kind = AROUND[name]
    model, state, data = kind(net()), KeepLora(net(), CONFIG).state(), Untouched()
    told = f"{name} at the model itself"
    refused("KeepLora", told, lambda: KeepLora(model, CONFIG))
    refused("Gpm", told, lambda: keeplora.create("gpm", model))
    refused("load", told, lambda: keeplora.load("nowhere", model))
    peft = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2.0"]))
    refused("initialize", told, lambda: keeplora.initialize(kind(peft), data, loss_fn, config=CONFIG_OF_PEFT))
    keeper = KeepLora(net(), CONFIG)
    keeper.model = kind(keeper.model)
    refused("before_task", told, lambda: keeper.before_task(data, loss_fn))
    refused("load_state", told, lambda: keeper.load_state(state))
    refused("KeepLoraCallback", told, lambda: KeepLoraCallback(keeper))


def test_a_trainer_on_several_gpus_in_one_process(tmp_path):
    keeper = KeepLora(net(), CONFIG)
    keeper.before_task(DATA, loss_fn)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    arguments._n_gpu = 2  # no machine of the tests has them
    begin = KeepLoraCallback(keeper).on_train_begin
    refused("KeepLoraCallback", "a Trainer on 2 GPUs in one process (DataParallel)", lambda: begin(
        arguments, TrainerState(), TrainerControl(), model=keeper.model, optimizer=keeper.optimizer(lr=1e-3)
    ))  # fmt: skip


def test_a_trainer_may_put_one_engine_around_the_model():
    keeper = KeepLora(net(), CONFIG)
    keeper.before_task(DATA, loss_fn)
    require_whole("fit", nn.parallel.DistributedDataParallel(keeper.model), around=True)
    sharded = FullyShardedDataParallel(copy.deepcopy(keeper.model).requires_grad_(True), device_id=torch.device("cpu"))
    for other in (nn.DataParallel(keeper.model), sharded):
        with pytest.raises(TypeError, match="fit: weights must be whole"):
            require_whole("fit", other, around=True)


def test_a_model_without_any_values_can_be_looked_at():
    keeper = KeepLora(net().to("meta"), CONFIG)
    assert len(keeper.targets) == 3
    refused("before_task", "(no values)", lambda: keeper.before_task(Untouched(), loss_fn))


class Packed(nn.Module):
    """A stand-in: GPTQ's and AWQ's layers, which are no nn.Linear."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(width // 8, width, dtype=torch.int32))

    def forward(self, x):
        return x


class Coded(nn.Parameter):
    """A stand-in: a library's own class of parameter."""


@pytest.mark.parametrize("names", ["all-linear", ["layer"]])
def test_layers_of_libraries_that_are_not_known(names):
    config = KeepLoraConfig(r=2, target_modules=names)
    model = nn.ModuleDict({"layer": Packed(8)})
    with pytest.raises(TypeError, match=r"KeepLora: .*qweight of .*Packed at layer .quantised by"):
        KeepLora(model, config)
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    model["layer"].weight = Coded(torch.zeros(8, 8))
    with pytest.raises(TypeError, match=r"KeepLora: .*weight \(tests.lora.test_engines.Coded\) of Linear at layer"):
        KeepLora(model, config)
    model["layer"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"KeepLora: .*at layer \(quantised by a library that is not known here\)"):
        KeepLora(model, config)


def test_a_frozen_quantised_layer_beside_the_targets_is_welcome():
    model = nn.Sequential(nn.Linear(8, 8), Packed(8), nn.Linear(8, 3))
    keeper = KeepLora(model, CONFIG)
    keeper.before_task(DATA, loss_fn)
    assert keeper.after_task(DATA).leak <= 1e-6


def test_every_engine_is_tried_here():
    tried = {name.partition(",")[0] for name in ENGINE} | {"offload by accelerate"}
    untried = {engine.name for engine in ENGINES if engine.where != "adapted"} - tried
    assert not untried


def test_a_device_map_without_offloading_works():
    plain, placed = net(), net()
    x = DATA[0][0]
    dispatch_model(placed, PLACES, force_hooks=True)
    hooks = {path: vars(module).get("_hf_hook") for path, module in placed.named_modules()}
    parameters = [id(p) for p in placed.parameters()]
    certificates, ends = [], []
    for model in (plain, placed):
        keeper = KeepLora(model, CONFIG)
        assert model is plain or {id(model.get_submodule(path)._hf_hook) for path in ("0", "2.0", "3")} == {
            id(hooks[path]) for path in ("0", "2.0", "3")
        }
        keeper.before_task(DATA, loss_fn)
        optimizer = keeper.optimizer(lr=1e-2)
        for _ in range(3):
            loss_fn(model, DATA[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        certificates.append(keeper.after_task(DATA))
        ends.append(keeper.merge()(x))
    assert torch.equal(*ends)
    assert certificates[0].to_dict() == certificates[1].to_dict()
    assert [id(p) for p in placed.parameters()] == parameters
    assert {path: vars(module).get("_hf_hook") for path, module in placed.named_modules()} == hooks
    accelerate.hooks.remove_hook_from_module(placed, recurse=True)
    assert [t.name for t in linear_targets(placed)] == [t.name for t in linear_targets(plain)]
