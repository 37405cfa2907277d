"""Tiny models with stock PEFT on them, and a task to learn."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import keeplora

WIDTH = 24
WIDE = 64
"""Width of models in bitsandbytes' 4 bits. On CPUs with AVX-512 bf16 its kernel wants out features that 32 divides and
in features that 64 (the block of one scale) divides, of every quantised layer: here 64 → 128 → 64."""
CONFIG = keeplora.KeepLoraConfig(weight_energy=0.3, feature_energy=0.8, depth_scale=0.2)


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """Two blocks and a head, like a transformer's MLPs."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.blocks(x))


def net(seed=0, width=WIDTH):
    torch.manual_seed(seed)
    return Net(width)


def of_bitsandbytes(model, make, flag):
    """The net with ``make(in, out)`` in place of its blocks' linear layers, quantised."""
    for block in model.blocks:
        for name, dense in list(block.named_children()):
            if isinstance(dense, nn.Linear):
                layer = make(dense.in_features, dense.out_features)
                layer.load_state_dict(dense.state_dict())
                setattr(block, name, layer)
    setattr(model, flag, True)  # as transformers marks its models for PEFT
    return model.to("cpu")  # where bitsandbytes quantises


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(seed, batches=3, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, width, generator=g)
    return [(torch.randn(16, 6, generator=g) @ mix, torch.randint(5, (16,), generator=g)) for _ in range(batches)]


def lora(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], **changes})


def stock(model=None, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks about unusual settings are not what is tested
        return get_peft_model(net() if model is None else model, lora(**changes))


def train(model, data, steps=6, lr=2e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model, data[step % len(data)]).backward()
        optimizer.step()


def logits(model, seed=9, width=WIDTH):
    model.eval()
    with torch.no_grad():
        return model(torch.randn(7, width, generator=torch.Generator().manual_seed(seed)))


def adapter_layers(model, name="default"):
    return {path: m for path, m in model.named_modules() if hasattr(m, "lora_A") and name in m.lora_A}
