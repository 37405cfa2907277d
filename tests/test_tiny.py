"""First gate, in seconds: one task of the method on two linear layers, from public names only."""

import torch
from torch import nn

import keeplora


def test_one_task_end_to_end(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(4)]

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    config = keeplora.KeepLoraConfig(r=4, alpha=8.0, target_modules="all-linear", feature_energy=0.5)
    keeper = keeplora.KeepLora(model, config)
    keeper.before_task(data, loss_fn)
    first = sum(loss_fn(model, batch).item() for batch in data)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=3e-2)
    for _ in range(20):
        for batch in data:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    assert sum(loss_fn(model, batch).item() for batch in data) < first
    certificate = keeper.after_task(data)
    assert certificate.leak <= 1e-6
    keeper.save(tmp_path)
    assert type(keeper.merge()[0]) is nn.Linear
