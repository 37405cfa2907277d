"""Every case under pytest-benchmark: pytest bench --benchmark-only"""

from typing import Any

import pytest
import torch

from bench.harness import Case
from bench.run import all_cases

CASES = [
    pytest.param(case, provider, id=f"{case.id} {case.name} {provider}")
    for case in all_cases()
    for provider in case.providers
]


@pytest.mark.parametrize(("case", "provider"), CASES)
def test_benchmark(case: Case, provider: str, benchmark: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = case.setup(device)

    def call() -> None:
        case.providers[provider](*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{case.id} {case.name}"
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
