"""What a training step asks of the host, counted on a CPU: few launches and calls beyond the frozen one, no waits."""

import pytest
import torch
from torch import nn

import keeplora.lora.optimizer as optimizer_module
from bench.launches import Calls, Launches, autograd_nodes, count_blocks, count_steps
from keeplora.lora import LoraAdapter, LoraAttention, ProjectedAdamW, attention_targets, merge_ahead, wrap

WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}
BLOCKS = 24  # of open_clip's ViT-B/16: 12 of each tower


@pytest.fixture(scope="module")
def counts():
    """Of forward and backward of open_clip's ViT-B/16 in bfloat16 autocast, 96 adapters with a B0 each, by provider."""
    return count_steps()


def test_a_step_launches_few_kernels_more_than_the_frozen_one(counts):
    beyond = counts["keeplora"].total() - counts["frozen model"].total()
    assert beyond <= 38, counts["keeplora"] - counts["frozen model"]
    assert counts["PEFT"].total() - counts["frozen model"].total() > 20 * beyond


def test_what_they_are(counts):
    """One merge for the model; of every layer one product x Aᵀ, in which q, k and v share, and one for all its dB."""
    ours = counts["keeplora"]
    assert ours["keeplora::merge_weights"] == 1
    assert ours["keeplora::lora_grad_b"] == 2 * BLOCKS
    assert not any(name.startswith("keeplora::") for name in counts["frozen model"])


def test_a_step_waits_for_nothing(counts):
    assert counts["keeplora"].keys() & WAITS == counts["frozen model"].keys() & WAITS == set()


@pytest.fixture(scope="module")
def blocks():
    """Python's calls and autograd's nodes of an attention block's forward and backward, by provider."""
    return count_blocks()


def test_a_block_calls_few_functions_more_than_the_frozen_one(blocks):
    ours, frozen = (blocks[name][0].ours for name in ("keeplora", "frozen model"))
    assert ours.total() - frozen.total() <= 120, ours - frozen
    assert blocks["keeplora"][0].all < blocks["PEFT"][0].all


def test_a_block_has_no_more_autograd_nodes_than_the_frozen_one_but_for_what_is_trained(blocks):
    ours, frozen = blocks["keeplora"][1], blocks["frozen model"][1]
    assert ours["_MergedBackward"] == 2  # q, k and v share one
    assert ours["torch::autograd::AccumulateGrad"] - frozen["torch::autograd::AccumulateGrad"] == 4
    assert ours.total() <= frozen.total()


def test_an_optimizer_step_calls_few_functions_for_each_parameter(monkeypatch):
    """Names and messages are formatted, and tensors checked, where something is wrong or new; not in every step."""
    monkeypatch.setattr(optimizer_module, "_projected_adamw", lambda *arguments: None)

    def calls_of_a_later_step(count):
        parameters = [nn.Parameter(torch.randn(2, 6)) for _ in range(count)]
        bases = {p: torch.eye(6)[:, :2] for p in parameters}
        optimizer = ProjectedAdamW(parameters, bases=bases)
        for p in parameters:
            p.grad = torch.randn(2, 6)
        optimizer.step()
        with Calls() as calls:
            optimizer.step()
        return calls.ours

    few, many = calls_of_a_later_step(4), calls_of_a_later_step(24)
    assert many.total() - few.total() <= 20 * 3, many - few


def test_what_is_counted():
    x = torch.ones(2, requires_grad=True)
    assert autograd_nodes(x * 2 + x) == {"AddBackward0": 1, "MulBackward0": 1, "torch::autograd::AccumulateGrad": 1}
    with Calls() as calls:
        LoraAdapter(torch.eye(2), torch.eye(2), 1.0).update()
    assert calls.ours["update"] == 1
    assert calls.all > calls.ours.total() > 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True).requires_grad_(False)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.fixture
def block():
    block = Block()
    for slot in wrap(block, attention_targets("attn", block.attn, 0, "model")):
        b = torch.randn(16, 3)
        slot.attach(LoraAdapter(torch.randn(3, 16), b, 0.5, origin=b))
    assert isinstance(block.attn, LoraAttention)
    merge_ahead(block)
    return block


def launched(call):
    with Launches() as launches:
        call()
    return launches.by_operator


@pytest.mark.parametrize("autocast", [False, True])
def test_evaluation_forms_nothing_that_only_gradients_need(block, autocast):
    x = torch.randn(2, 20, 16)
    plain = Block().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        frozen = launched(lambda: wrapped(plain)(x))
        ours = launched(lambda: block(x))
    casts = 2 if autocast else 0  # of the weights, which are merged in the dtype they are multiplied in
    assert ours.total() == frozen.total() - casts + ours["keeplora::merge_weights"]
    assert ours["keeplora::merge_weights"] == 2  # each just before it is needed, so that one copy is there at a time


def wrapped(block):
    wrap(block, attention_targets("attn", block.attn, 0, "model"))
    return block


def test_only_the_adapters_that_are_trained_take_part(block):
    x = torch.randn(2, 20, 16, requires_grad=True)
    for _ in range(2):
        block(x).sum().backward()
    block.attn.slots["k_proj"].adapter.B.requires_grad_(False)
    block.attn.out_proj.slots["weight"].adapter.B.requires_grad_(False)
    before = [p.grad for p in block.parameters()]
    ours = launched(lambda: block(x).sum().backward())
    assert ours["keeplora::lora_grad_b"] == ours["keeplora::thin_matmul"] == 1
    assert all((p.grad is not g) <= p.requires_grad for p, g in zip(block.parameters(), before, strict=True))


def test_counts_what_launches_and_not_what_looks():
    x = torch.randn(3, 4)
    ours = launched(lambda: (x.T, x.view(2, 6), x[1:], x.chunk(2), torch.empty(3), x.detach(), x.unsqueeze(0)))
    assert ours.total() == 0
    assert launched(lambda: x.T.contiguous().add_(1).sum().item())["aten::_local_scalar_dense"] == 1
