"""A world of seconds for the training tests: a CLIP of one block per tower and tasks of coloured squares."""

from __future__ import annotations

import os
import signal
import time

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from keeplora.tasks.classification import Batch, ClassificationWorkload, Split, Task

CLASSES, CONTEXT, SIZE = 3, 6, 16


def model() -> CLIP:
    """Always the same weights, whatever the generators' state."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        return CLIP(
            embed_dim=16,
            vision_cfg=CLIPVisionCfg(image_size=SIZE, layers=2, width=32, head_width=16, patch_size=8),
            text_cfg=CLIPTextCfg(context_length=CONTEXT, vocab_size=40, width=32, heads=2, layers=1),
        ).eval()


def task(number: int, images: int = 48) -> Task:
    """Class c of task n has its own mean colour; the splits are drawn apart."""
    generator = torch.Generator().manual_seed(number)
    colours = torch.randint(30, 225, (CLASSES, 3, 1, 1), generator=generator)
    tokens = torch.randint(1, 38, (CLASSES, CONTEXT), generator=generator)
    tokens[:, -1] = 39

    def split(size: int) -> Split:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        noise = torch.randint(-30, 30, (size, 3, SIZE, SIZE), generator=generator)
        return Split((colours[labels] + noise).clamp(0, 255).to(torch.uint8), labels)

    names = tuple(f"colour {number}.{c}" for c in range(CLASSES))
    return Task(f"squares-{number}", names, names, tokens, split(images), split(24), split(32))


def workload(device: str) -> ClassificationWorkload:
    """Three tasks and a witness."""
    return ClassificationWorkload([task(n) for n in range(3)], task(9), model, device=device)


def broken(device: str) -> ClassificationWorkload:
    """The same, but the loss of the second task's third batch is not a number."""
    made = workload(device)
    calls = {"squares-1": 0}
    plain = made.loss
    second = made._tasks[1].tokens

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        value = plain(model, batch)
        if torch.is_grad_enabled() and batch.tokens is second:
            calls["squares-1"] += 1
            if calls["squares-1"] == 3:
                return value * float("nan")
        return value

    made.loss = loss  # type: ignore[method-assign]
    return made


def noisy(device: str) -> ClassificationWorkload:
    """The same, with noise on the training images from torch's global generator."""
    made = workload(device)
    plain = made.loss

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        noise = torch.randint(0, 40, batch.images.shape, dtype=torch.uint8)
        return plain(model, batch._replace(images=batch.images // 2 + noise))

    made.loss = loss  # type: ignore[method-assign]
    return made


def slow(device: str) -> ClassificationWorkload:
    """The same, a fifth of a second per evaluation, so that a test can interrupt it in time."""
    made = workload(device)
    plain = made.accuracy

    def accuracy(*args: object) -> float:
        time.sleep(0.2)
        return plain(*args)  # type: ignore[arg-type]

    made.accuracy = accuracy  # type: ignore[method-assign]
    return made


def dying(device: str) -> ClassificationWorkload:
    """The same, but the process is killed at the first training batch."""
    made = workload(device)

    def loss(model: torch.nn.Module, batch: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("the process is dead")

    made.loss = loss  # type: ignore[method-assign]
    return made
