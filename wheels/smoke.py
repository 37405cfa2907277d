"""Whether an installed keeplora learns a task: python wheels/smoke.py"""

import torch
from torch import nn

import keeplora
from keeplora.ops import build_info


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    batches = [(torch.randn(16, 16), torch.randint(0, 4, (16,))) for _ in range(4)]
    keeper = keeplora.KeepLora(model, keeplora.KeepLoraConfig(r=2, target_modules=["0"]))
    keeper.before_task(batches, loss)
    optimizer = torch.optim.AdamW(keeper.trainable_parameters(), lr=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    print(keeper.after_task(batches))
    facts = build_info()
    print(keeplora.__version__, keeplora.__file__, f"kernels: {facts['cpu_kernels']}", facts["without_cpu"])


if __name__ == "__main__":
    main()
