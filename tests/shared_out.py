"""What processes do whose model FSDP2 has cut into rows, in tests/test_shared_out.py; each writes what it found."""

import datetime
import itertools
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import keeplora
from keeplora import KeepLora, KeepLoraConfig
from keeplora.lora import LoraHost, Target
from tests.processes import error_of

SIZES = {  # k and v have 4 rows, of which the last of three processes has none; 70 rows are not for three, either
    "vocab_size": 60, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
SETTINGS = {
    "r": 4, "target_modules": "all-linear", "weight_energy": 0.3, "feature_energy": 0.6, "depth_scale": 0.2,
    "forward": "factored",
}  # fmt: skip
LIVES = {  # dtype, batches of every process, settings
    "even": ("float32", (1, 1, 1), {}),
    "uneven": ("bfloat16", (1, 2, 1), {"balance": True}),
    "none": ("float32", (0, 2, 1), {"gradient_statistic": "sketch", "r": 1, "depth_scale": 1.0}),
    "trained A": ("float32", (2, 0, 1), {"feature_source": "gradients", "train_a": True}),
}


COMPILED = {"lora": {"r": 2}, "gpm": {}}


def llama(dtype="float32", **sizes):
    torch.manual_seed(4)
    return drawn(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES | sizes)), dtype)


def drawn(model, dtype):
    """With matrices large enough that layers differ."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.2)
    return model.to(getattr(torch, dtype)).requires_grad_(False)


def sharded(dtype="float32", mesh=None):
    model = llama(dtype)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def batches(rank, count, task):
    generator = torch.Generator().manual_seed(100 * task + rank)
    ids = [torch.randint(3, 60, (2, 40), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def loss_fn(model, batch):
    return model(**batch).loss


def plain_lora(model, members):
    """Two tasks of LoRA, which looks at no data."""
    method = keeplora.create("lora", model, {"r": 2, "target_modules": "all-linear"})
    for task in range(2):
        method.before_task([], loss_fn)
        train(method, members, task)
        method.after_task([])
    return [whole(slot.weight) for slot in method.slots]


def kept_as_large(model, data, forward):
    """Shapes of weights, of what a training step keeps for its backward pass besides the model's own parameters."""
    keeper = KeepLora(model, KeepLoraConfig(**SETTINGS | {"r": 3, "forward": forward}))
    keeper.before_task(data, loss_fn)
    shapes, found = {tuple(slot.weight.shape) for slot in keeper.slots}, []

    def look(tensor):
        whole_ones = (p for p in model.parameters() if not hasattr(p, "to_local"))
        own = {p.untyped_storage().data_ptr() for p in whole_ones}
        shape = tuple(tensor.shape)
        if {shape, shape[::-1]} & shapes and tensor.untyped_storage().data_ptr() not in own:
            found.append(shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        loss = loss_fn(model, data[0])
    loss.backward()
    return found


def compiled(rank, names):
    """What methods learn when blocks are compiled, and when they are not."""
    found = {}
    for name, compiling in itertools.product(names, (False, True)):
        model = llama()
        for block in model.model.layers if compiling else ():
            block.compile(backend="aot_eager")
        for module in (*model.model.layers, model):
            fully_shard(module)
        method = keeplora.create(name, model, {"target_modules": "all-linear"} | names[name])
        method.before_task(batches(rank, 1, 0), loss_fn)
        optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.05)
        for batch in batches(rank, 2, 0):
            loss_fn(model, batch).backward()
            optimizer.step()
        method.after_task(batches(rank, 1, 0))
        found[name, compiling] = [whole(slot.weight) for slot in method.slots]
    return found | {"graphs": counters["stats"]["unique_graphs"]}


def saved(folder, rank):
    """A task closed and one open, saved by three processes; what they hold, and the first two of them load."""
    path, pair = Path(folder) / "state", dist.new_group([0, 1])
    keeper = KeepLora(sharded(), KeepLoraConfig(**SETTINGS))
    keeper.before_task(batches(rank, 2, 0), loss_fn)
    keeper.save(Path(folder) / "first")  # before anything is merged
    train(keeper, [rank], 0)
    keeper.after_task(batches(rank, 2, 0))
    keeper.before_task(batches(rank, 2, 1), loss_fn)
    train(keeper, [rank], 1)
    keeper.save(path)
    found = {"three": held(keeper)}
    other = sharded()
    with torch.no_grad():
        other.lm_head.weight.to_local().add_(0.25 if rank == 1 else 0.0)
    found["other model"] = error_of(lambda: KeepLora.load(path, other))
    if rank < 2:
        two = KeepLora.load(path, sharded(mesh=DeviceMesh.from_group(pair, "cpu")), group=pair)
        found["two"] = held(two)
        two.save(Path(folder) / "again")
        train(two, [rank], 1)
        two.after_task(batches(rank, 2, 1), loss_fn)
        found["two, closed"] = held(two)
    keeper.slots[0].local.rows.add_(float(rank == 2))
    found["written to"] = error_of(lambda: keeper.save(Path(folder) / "never"))
    return found


def held(keeper):
    """Copies."""
    open_ones = [slot.adapter for slot in keeper.slots if slot.adapter is not None]
    adapters = [(adapter.A.detach().clone(), adapter.B.detach().clone()) for adapter in open_ones]
    return [[whole(s.weight) for s in keeper.slots], [keeper.basis(s.name) for s in keeper.slots], adapters]


def train(keeper, members, task):
    """Steps on the mean loss of all processes' batches, of which this one has those of ``members``."""
    optimizer = keeper.optimizer(lr=1e-2, eps=1e-4)  # or Adam makes much of gradients that are rounding alone
    for step in range(3):
        optimizer.zero_grad()
        for rank in members:  # two backward passes before a step: gradients accumulate
            for batch in batches(rank, 2, task)[:: 1 if step else -1]:
                (loss_fn(keeper.model, batch) / 2).backward()
        for parameter in keeper.trainable_parameters():  # not of the loss: thirds would be rounded in bfloat16
            assert parameter.grad is not None
            parameter.grad /= len(members)
        optimizer.step()


def whole(weight):
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach().clone()


def life(model, counts, members, settings):
    """Two tasks; what every process must find alike."""
    keeper, found = KeepLora(model, KeepLoraConfig(**SETTINGS | settings)), {}
    for task in range(2):
        data = [batch for rank in members for batch in batches(rank, counts[rank], task)]
        keeper.before_task(data, loss_fn)
        train(keeper, members, task)
        found[f"A B, {task}"] = [(s.adapter.B @ s.adapter.A).detach() for s in keeper.slots]
        found[f"B, {task}"] = [s.adapter.B.detach().clone() for s in keeper.slots]
        found[f"certificate, {task}"] = keeper.after_task(data).to_dict()
    found["capacity"] = [(c.protected, c.free, c.added) for c in keeper.capacity()]
    found["Q"] = [keeper.basis(slot.name) for slot in keeper.slots]
    found["W"] = [whole(slot.weight) for slot in keeper.slots]
    found["logits"] = keeper.merge()(batches(0, 1, 5)[0]["input_ids"]).logits.detach()
    found["classes"] = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear | LoraHost)]
    return found


def refusals():
    """Before any data are read: what of FSDP2 does not go, and whether the model was left as it is."""

    def fails(call):
        model = sharded()
        before = [type(module) for module in model.modules()]
        return (*error_of(lambda: call(model)), [type(module) for module in model.modules()] == before)

    def trained(model):
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        KeepLora(model, KeepLoraConfig(**SETTINGS))

    def around(_):
        layer = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
        fully_shard(layer[0])
        KeepLora(layer, KeepLoraConfig(r=2, target_modules="all-linear"))

    def fused(model):
        KeepLora(
            model, KeepLoraConfig(r=2, target_modules="all-linear"), targets=[
                Target("x", "model.layers.0.mlp.up_proj", "weight", (0, 20), 0, "model")
            ],
        )  # fmt: skip

    def both_ways(_):
        model, mesh = llama(), init_device_mesh("cpu", (3, 1), mesh_dim_names=("copies", "rows"))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
        KeepLora(model, KeepLoraConfig(**SETTINGS))

    return {
        "two dimensions": fails(both_ways),
        "merged": fails(lambda model: KeepLora(model, KeepLoraConfig(**SETTINGS | {"forward": "merged"}))),
        "sd-lora": fails(lambda model: keeplora.create("sd-lora", model)),
        "osf": fails(lambda model: keeplora.create("osf", model)),
        "requires_grad": fails(trained),
        "a layer itself": fails(around),
        "fused": fails(fused),
        "late": error_of(late),
    }


def late():
    model = llama()
    keeper = KeepLora(model, KeepLoraConfig(**SETTINGS))
    fully_shard(model)
    keeper.before_task([], loss_fn)


def failures(rank):
    """An error between two steps reaches all, who can go on."""
    data, keeper, found = batches(rank, 2, 0), KeepLora(sharded(), KeepLoraConfig(**SETTINGS)), {}

    def stops():
        yield data[0]
        raise OSError("the disk is gone")

    def loss_of_nan(model, batch):
        return loss_fn(model, batch) * float("nan")

    alone = [dist.new_group([each]) for each in range(3)][rank]
    found["loader"] = error_of(lambda: keeper.before_task(stops() if rank == 0 else data, loss_fn))
    found["nan"] = error_of(lambda: keeper.before_task(data, loss_of_nan if rank == 1 else loss_fn))
    found["nothing"] = error_of(lambda: keeper.before_task([], loss_fn))
    found["group"] = error_of(lambda: keeper.before_task(data, loss_fn, group=alone))
    keeper.before_task(data, loss_fn)
    found["copied"] = [error_of(keeper.state), error_of(keeper.digest)]
    train(keeper, [rank], 0)
    keeper.trainable_parameters()[0].data[0, 0] += rank
    found["apart"] = error_of(lambda: keeper.after_task(data))
    keeper.abandon_task()
    found["copied"].append(error_of(lambda: keeper.import_peft("nowhere")))
    first = llama()
    found["abandoned"] = all(torch.equal(whole(s.weight), first.get_submodule(s.name).weight) for s in keeper.slots)
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    store = dist.FileStore(str(Path(folder) / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=60))
    found = {name: life(sharded(dtype), counts, [rank], more) for name, (dtype, counts, more) in LIVES.items()}
    found |= {"refusals": refusals(), "failures": failures(rank), "lora": plain_lora(sharded(), [rank])}
    found |= {"saved": saved(folder, rank), "compiled": compiled(rank, COMPILED)}
    found["kept"] = kept_as_large(sharded(), batches(rank, 1, 0), "auto")
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
