"""Every benchmark case runs: a provider that fails would otherwise show only when somebody measures."""

import pytest
import torch

from bench.run import all_cases

CASES = list(all_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id} {case.name}")
@torch.compiler.set_stance("force_eager")  # what is compiled runs, too, without the compiler
def test_every_provider_runs(case):
    arguments = (case.small or case.setup)(torch.device("cpu"))
    assert next(iter(case.providers)) == "keeplora"
    assert len(case.providers) > 1
    for call in case.providers.values():
        call(*arguments)


def test_the_baseline_has_its_benchmarks():
    assert {"B2", "B3", "B4", "B6"} <= {case.id for case in CASES}
