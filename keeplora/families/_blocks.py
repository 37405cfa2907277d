"""The linear layers of a transformer's blocks, whatever the library that built it calls them."""

from __future__ import annotations

from torch import nn

from keeplora.lora import Target, attention_targets

__all__ = ["block_targets", "main_blocks"]

_CROSS_ATTENTION = ("cross_attn", "cross_attention", "crossattention", "encoder_attn", "EncDecAttention")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_NOT_ADAPTED = frozenset((*_CROSS_ATTENTION, *_ROUTERS, "rel_pos"))
"""Keys and values of another tower, choices between experts, biases of positions: none of these maps tokens."""


def main_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of blocks that holds most of the model's linear layers, with its path; lists inside it do not count."""
    outermost: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, nn.ModuleList) and not inside:
            outermost[path] = module
    sizes = {path: sum(isinstance(m, nn.Linear) for m in blocks.modules()) for path, blocks in outermost.items()}
    if not any(sizes.values()):
        return None
    path = max(sizes, key=sizes.__getitem__)
    return path, outermost[path]


def block_targets(path: str, block: nn.Module, depth: int, tower: str, *, split_qkv: bool = False) -> list[Target]:
    """Every linear layer of a block, and q, k, v of every ``nn.MultiheadAttention``; no cross-attention, no router.

    Args:
        split_qkv: Whether a layer named ``qkv`` holds queries, keys and values in that order, in three equal row
            ranges: they become targets of their own, named ``q_proj``, ``k_proj`` and ``v_proj``.
    """
    targets: list[Target] = []
    attention: list[str] = []
    for name, layer in block.named_modules():
        full = f"{path}.{name}" if name else path
        if not _NOT_ADAPTED.isdisjoint(name.split(".")) or any(name.startswith(f"{a}.") for a in attention):
            continue
        if isinstance(layer, nn.MultiheadAttention):
            attention.append(name)
            targets += attention_targets(full, layer, depth, tower)
        elif isinstance(layer, nn.Linear):
            if split_qkv and name.rpartition(".")[2] == "qkv":
                targets += _thirds(full, layer, depth, tower)
            else:
                targets.append(Target(full, full, "weight", None, depth, tower))
    return targets


def _thirds(path: str, layer: nn.Linear, depth: int, tower: str) -> list[Target]:
    width, parent = layer.out_features // 3, path.rpartition(".")[0]
    return [
        Target(f"{parent}.{letter}_proj", path, "weight", (i * width, (i + 1) * width), depth, tower)
        for i, letter in enumerate("qkv")
    ]
