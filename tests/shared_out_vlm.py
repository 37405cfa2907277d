"""What four processes do with a LLaVA that FSDP2 has cut into rows, in tests/test_shared_out_vlm.py."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import keeplora
from tests.processes import joined
from tests.shared_out import drawn, whole

COUNT = 4
SIZES = {"intermediate_size": 42, "num_hidden_layers": 2, "num_attention_heads": 2}  # 42 rows, 6 of k and v
LANGUAGE = {
    **SIZES, "vocab_size": 60, "hidden_size": 24, "num_key_value_heads": 1, "head_dim": 6, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
VISION = {**SIZES, "hidden_size": 18, "image_size": 8, "patch_size": 4}
IMAGE, WORDS = 50, 20
OWN = {"weight_energy": 0.3, "feature_energy": 0.5, "forward": "factored"}
LIVES = {  # method, dtype, settings
    "keeplora": ("keeplora", "float32", OWN | {"depth_scale": 1.0}),
    "keeplora++": ("keeplora", "bfloat16", OWN | {"depth_scale": 0.2}),
    "inflora": ("inflora", "float32", {"feature_energy": 0.6, "final_energy": 0.7, "tasks": 3}),
    "o-lora": ("o-lora", "float32", {"dropout": 0.0, "decay": 0.1, "alpha": 4.0}),
    "lora": ("lora", "bfloat16", {"alpha": 2.0}),
    "gpm": ("gpm", "float32", {"feature_energy": 0.5}),
    "gpm, bf16": ("gpm", "bfloat16", {"feature_energy": 0.5}),
}
TWO = ("keeplora", "gpm")
"""Those that two processes learn as well, with the data of two each."""
WHOLE = ("gpm", "gpm, bf16")
"""Those that train whole weights."""


def llava(dtype="float32", head_dim=6):
    torch.manual_seed(4)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), image_token_id=IMAGE,
        text_config=tf.LlamaConfig(**LANGUAGE | {"head_dim": head_dim}),
        vision_feature_layer=-1,
    )  # fmt: skip
    return drawn(tf.LlavaForConditionalGeneration(config).eval(), dtype)


def sharded(dtype="float32", mesh=None):
    model = llava(dtype)
    for block in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers, model):
        fully_shard(block, mesh=mesh)
    return model


def batches(rank, task, dtype="float32"):
    """Of a process: one of two images, one of one."""
    generator = torch.Generator().manual_seed(100 * task + rank)
    made = []
    for count in (2, 1):
        words = torch.randint(3, IMAGE, (count, WORDS), generator=generator)
        ids = torch.cat([torch.full((count, 4), IMAGE), words], dim=1)
        pixels = torch.randn(count, 3, 8, 8, generator=generator) + task
        seen = torch.ones_like(ids)
        seen[-1, -3 * count :] = 0  # padding
        labels = torch.where((ids == IMAGE) | (seen == 0), -100, ids)
        pixels = pixels.to(getattr(torch, dtype))
        made.append({"input_ids": ids * seen, "attention_mask": seen, "pixel_values": pixels, "labels": labels})
    return made


def loss_fn(model, batch):
    return model(**batch).loss


def train(method, members, task, dtype):
    """Steps on the mean loss of all processes, of which this one has those of ``members``."""
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        losses = []
        for rank in members:
            batch = batches(rank, task, dtype)[step % 2]
            penalty = method.penalty()
            losses.append(loss_fn(method.model, batch) + (0.0 if penalty is None else penalty))
        sum(losses).backward()
        for parameter in method.trainable_parameters():
            assert parameter.grad is not None
            parameter.grad /= len(members)
        optimizer.step()


def life(name, model, members, folder=None, group=None):
    """Three tasks; what every process must find alike."""
    kind, dtype, settings = LIVES[name]
    rank = {} if kind == "gpm" else {"r": 2}
    method, found = keeplora.create(kind, model, {"target_modules": "all-linear"} | rank | settings), {}
    for task in range(3):
        data = [batch for rank in members for batch in batches(rank, task, dtype)]
        method.before_task(data, loss_fn, group=group)
        train(method, members, task, dtype)
        found[f"B A, {task}"] = [(s.adapter.B @ s.adapter.A).detach() for s in method.slots if s.adapter is not None]
        if task == 2 and folder is not None:
            method.save(Path(folder) / name)
            if name not in WHOLE:
                method.export_peft(Path(folder) / f"{name}-peft", base_model="llava")
            found["held"] = held(method)
        method.after_task(data)
        found[f"W, {task}"] = [whole(slot.weight) for slot in method.slots]
    if name in WHOLE:
        model(**batches(0, 3, dtype)[0])  # outermost weights are whole now
        weights, first = [whole(slot.weight) for slot in method.slots], {}
        method.before_task([], loss_fn)
        train(method, members, 3, dtype)
        first["moved"] = any(not torch.equal(whole(s.weight), w) for s, w in zip(method.slots, weights, strict=True))
        model(**batches(0, 3, dtype)[0])
        method.abandon_task()
        first["back"] = all(torch.equal(whole(s.weight), w) for s, w in zip(method.slots, weights, strict=True))
        found |= first | {"shares": [shares.last for shares in method.shares]}
    capacity = method.capacity()
    found["capacity"] = None if capacity is None else [(c.protected, c.free, c.added) for c in capacity]
    return found


def held(method):
    """Of a method with an open task, copies."""
    adapters = [slot.adapter.tensors() for slot in method.slots if slot.adapter is not None]
    copies = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors in adapters]
    return [[whole(slot.weight) for slot in method.slots], copies]


def work(rank, folder):
    with joined(rank, folder, COUNT):
        warnings.filterwarnings("ignore")
        found = {name: life(name, sharded(dtype), [rank], folder) for name, (_, dtype, _) in LIVES.items()}
        pair = dist.new_group([0, 1])
        if rank < 2:
            mesh = DeviceMesh.from_group(pair, "cpu")
            found["two"] = {
                name: held(keeplora.load(Path(folder) / name, sharded(dtype, mesh), group=pair))
                for name, (_, dtype, _) in LIVES.items()
            }
            found["two lives"] = {name: life(name, sharded(mesh=mesh), [rank, rank + 2], group=pair) for name in TWO}
        torch.save(found, Path(folder) / f"{rank}.pt")
