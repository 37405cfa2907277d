"""Every registered method with its second task open, and that task in a plain loop: what other loops are held to."""

import torch
from torch import nn

from keeplora.methods import METHODS, create
from tests.methods.contract import SMALL, WIDTH, Batch, Net, loss_fn

BATCH, STEPS, EPOCHS = 6, 4, 2
RATE = 1e-2
REFUSED = {"zero-shot": "one that trains", "joint": "the data of one task"}
TRAINED = sorted(set(METHODS) - set(REFUSED))
PENALTIES = ["dac", "o-lora"]
SETTINGS = SMALL | {"o-lora": {**SMALL["o-lora"], "dropout": 0.0}}  # dropout draws from the global generator


class Classifier(nn.Module):
    """The net, with a forward that returns the loss."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images, labels):
        return {"loss": loss_fn(self.net, (images, labels))}


def samples(seed):
    g = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(BATCH * STEPS, 4, WIDTH, generator=g), torch.randint(3, (BATCH * STEPS,), generator=g)
    return [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def batches(data):
    """As a loop's own loader gives them."""
    return torch.utils.data.DataLoader(data, batch_size=BATCH)


def passes(data):
    """As the method's own passes get them."""
    return [Batch(**batch) for batch in batches(data)]


def fresh(name):
    torch.manual_seed(11)
    return create(name, Net(), SETTINGS.get(name))


def opened(name):
    """The method with its second task open: penalties look at the first."""
    method, first = fresh(name), samples(0)
    method.before_task(passes(first), loss_fn)
    plain_loop(method, first, method.optimizer(lr=RATE))
    method.after_task(passes(first))
    method.before_task(passes(samples(1)), loss_fn)
    return method


def plain_loop(
    method, data, optimizer, accumulate=1, clip=None, epochs=EPOCHS, share=True, bf16=False, by_optimizer=False
):
    """The loop of a user who knows the method's protocol.

    ``share``: an incomplete last group of batches is averaged over those it has, and the penalty counts once a step
    (Trainer). Else every batch's loss and penalty is divided by ``accumulate`` (Accelerate, Lightning).
    ``by_optimizer``: gradients are clipped in the order of the optimizer's parameters (Lightning), not the model's.
    """
    method.model.train()
    for _ in range(epochs):
        for number, batch in enumerate(passes(data)):
            first = number % accumulate == 0
            group = min(accumulate, STEPS - number + number % accumulate) if share else accumulate
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_fn(method.model, batch)
            penalty = method.penalty()
            if share:
                loss = loss / group
                if penalty is not None and first:
                    loss = loss + penalty
            else:
                loss = (loss if penalty is None else loss + penalty) / group
            loss.backward()
            if (number + 1) % accumulate == 0 or number + 1 == STEPS:
                if clip:
                    held = [p for group in optimizer.param_groups for p in group["params"]]
                    nn.utils.clip_grad_norm_(held if by_optimizer else method.model.parameters(), clip)
                optimizer.step()
                method.after_step()
                optimizer.zero_grad()


def like(optimizer, method, other):
    """The same optimizer, unused, over the parameters of another method in place of ``method``'s."""
    places = {id(p): i for i, p in enumerate(method.trainable_parameters())}
    own = other.trainable_parameters()
    groups = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [own[places[id(p)]] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return torch.optim.SGD(groups, lr=RATE) if isinstance(optimizer, torch.optim.SGD) else torch.optim.AdamW(groups)


def assert_same(method, other):
    """Both have learned the same in the open task and when it is closed, to the last bit."""
    for mine, theirs in zip(method.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert torch.equal(mine, theirs), (mine - theirs).abs().max()
    for one in (method, other):
        one.after_task(passes(samples(1)), loss_fn)
    mine, theirs = method.state(), other.state()
    assert mine.meta == theirs.meta
    assert all(torch.equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors.keys() | theirs.tensors)
