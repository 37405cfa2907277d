"""Layers with adapters in the training loops people run: many steps, scalers, several processes."""

import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing
from torch import nn

from keeplora.lora import LoraAdapter, attention_targets, linear_targets, merge_ahead, wrap

WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.fc((x + self.attn(x, x, x, need_weights=False)[0]).mean(1))


def make(dtype=torch.float32, mode="auto", seed=0):
    torch.manual_seed(seed)
    model = Block().to(dtype).requires_grad_(False)
    slots = wrap(model, [*attention_targets("attn", model.attn, 0, "model"), *linear_targets(model)[-1:]])
    for slot in slots:
        slot.host.forward_mode = mode
        out, width = slot.weight.shape
        slot.attach(LoraAdapter(torch.randn(2, width) / width**0.5, torch.zeros(out, 2), 2.0))
    merge_ahead(model)
    return model, [slot.adapter.B for slot in slots]


def data(seed=5, n=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, WIDTH, generator=generator)
    return x, x[:, 0, :3].argmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_frozen_weights_are_the_same_bits_after_a_thousand_steps(mode, dtype):
    model, trained = make(dtype, mode)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 6 + 5  # weights and biases, and one A per adapter
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x, y = data()
    x = x.to(dtype)
    first = None
    for _ in range(1000):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < 0.5 * first
    assert all(torch.equal(model.get_parameter(name), before) for name, before in frozen.items())


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_gradient_scaler_and_half_precision_autocast(mode):
    losses = {}
    for half in (False, True):
        model, trained = make(mode=mode)
        optimizer = torch.optim.SGD(trained, lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=half, init_scale=2.0**10)
        x, y = data()
        for _ in range(60):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses[half] = loss.item()
        assert all(b.grad.dtype == torch.float32 for b in trained)
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_gradient_accumulation_is_the_gradient_of_the_sum(mode):
    model, trained = make(mode=mode)
    for b in trained:
        nn.init.normal_(b, 0.0, 0.1)
    x, y = data()
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    whole = [b.grad.clone() for b in trained]
    for b in trained:
        b.grad = None
    for part in range(4):
        nn.functional.cross_entropy(model(x[part::4]), y[part::4], reduction="sum").backward()
    for b, expected in zip(trained, whole, strict=True):
        torch.testing.assert_close(b.grad, expected, rtol=1e-4, atol=1e-5)


def _one_of_two(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, trained = make(mode="merged")
    parallel = nn.parallel.DistributedDataParallel(model)  # find_unused_parameters=False: every B must get a gradient
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x, y = data()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x[rank::2]), y[rank::2]).backward()
        optimizer.step()
    torch.save([b.detach() for b in trained], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, args=(port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model, trained = make(mode="merged")
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x, y = data()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for alone, together in zip(trained, first, strict=True):
        torch.testing.assert_close(alone.detach(), together, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; bench/gpu.sh runs it on one")
@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_a_training_step_in_a_cuda_graph(mode):
    model, trained = make(mode=mode)
    model.cuda()
    x, y = (t.cuda() for t in data())
    eager = copy.deepcopy(model)
    eager_trained = [p for p in eager.parameters() if p.requires_grad]
    loss_of = nn.functional.cross_entropy
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss_of(model(x), y).backward()
            for b in trained:
                b.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_of(model(x), y).backward()
        with torch.no_grad():
            for b in trained:
                b.sub_(0.1 * b.grad)
    for _ in range(5):
        graph.replay()
        for b in eager_trained:
            b.grad = None
        loss_of(eager(x), y).backward()
        with torch.no_grad():
            for b in eager_trained:
                b.sub_(0.1 * b.grad)
    for a, b in zip(trained, eager_trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
