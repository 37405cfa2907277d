"""The linear layers of a transformer's blocks, whatever the library that built it calls them."""

from __future__ import annotations

from torch import nn

from keeplora.lora import Target, attention_targets, expert_targets

__all__ = ["block_targets", "by_design", "main_blocks", "outermost_lists"]

_CROSS_ATTENTION = ("cross_attn", "cross_attention", "crossattention", "encoder_attn", "EncDecAttention")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_NOT_CALLED = ("dt_proj",)
_NOT_ADAPTED = frozenset((*_CROSS_ATTENTION, *_ROUTERS, "rel_pos", *_NOT_CALLED))
"""Keys and values of another tower, choices between experts, biases of positions: none of these maps tokens. And
what is read without a call: a state-space block's ``dt_proj``."""
_BESIDE = {"attentions": "ffns"}
"""Lists whose blocks are halves: XLM's attention and its MLPs."""


def by_design(name: str) -> bool:
    """Whether a layer of this name stays frozen in every family."""
    return not _NOT_ADAPTED.isdisjoint(name.split("."))


def outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules by path; lists inside them do not count."""
    outermost: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, nn.ModuleList) and not inside:
            outermost[path] = module
    return outermost


def main_blocks(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Path, block and depth of the list of blocks whose linear layers hold most of the weights.

    Other lists of blocks of the same class go on in depth, in order of definition (Mllama's images, CANINE's
    characters); where blocks are halves, both stand at one depth.
    """
    lists = outermost_lists(model)
    beside = {path: lists.get(_beside(path)) for path in lists}
    sizes = {
        path: sum(_linear_weights(half) for half in (blocks, beside[path]) if half is not None)
        for path, blocks in lists.items()
    }
    if not any(sizes.values()):
        return []
    main = max(sizes, key=sizes.__getitem__)
    found: list[tuple[str, nn.Module, int]] = []
    depth = 0
    for path, blocks in lists.items():
        if path == main or (sizes[path] and {type(b) for b in blocks} == {type(b) for b in lists[main]}):
            other = beside[path]
            for i, block in enumerate(blocks):
                found.append((f"{path}.{i}", block, depth))
                if other is not None:
                    found.append((f"{_beside(path)}.{i}", other[i], depth))
                depth += 1
    return found


def _beside(path: str) -> str:
    parent, _, name = path.rpartition(".")
    return f"{parent}.{_BESIDE.get(name, '')}".lstrip(".")


def _linear_weights(blocks: nn.Module) -> int:
    return sum(layer.out_features * layer.in_features for layer in blocks.modules() if isinstance(layer, nn.Linear))


def block_targets(path: str, block: nn.Module, depth: int, tower: str, *, split_qkv: bool = False) -> list[Target]:
    """Every linear layer of a block, q, k, v of every ``nn.MultiheadAttention``, and the weights of every expert.

    No cross-attention, no router.

    Args:
        split_qkv: Whether a layer named ``qkv`` holds queries, keys and values in that order, in three equal row
            ranges: they become targets of their own, named ``q_proj``, ``k_proj`` and ``v_proj``.
    """
    targets: list[Target] = []
    attention: list[str] = []
    for name, layer in block.named_modules():
        full = f"{path}.{name}" if name else path
        if by_design(name) or any(name.startswith(f"{a}.") for a in attention):
            continue
        if isinstance(layer, nn.MultiheadAttention):
            attention.append(name)
            targets += attention_targets(full, layer, depth, tower)
        elif isinstance(layer, nn.Linear):
            if split_qkv and name.rpartition(".")[2] == "qkv":
                targets += _thirds(full, layer, depth, tower)
            else:
                targets.append(Target(full, full, "weight", None, depth, tower))
        else:
            targets += expert_targets(full, layer, depth, tower)
    return targets


def _thirds(path: str, layer: nn.Linear, depth: int, tower: str) -> list[Target]:
    width, parent = layer.out_features // 3, path.rpartition(".")[0]
    return [
        Target(f"{parent}.{letter}_proj", path, "weight", (i * width, (i + 1) * width), depth, tower)
        for i, letter in enumerate("qkv")
    ]
