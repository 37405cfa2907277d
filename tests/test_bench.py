"""Every benchmark case runs: a provider that fails would otherwise show only when somebody measures."""

import pytest
import torch

from bench import run
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


def test_only_chooses_cases_by_their_names(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(run, "measure", lambda cases, *_: iter(asked.append([case.name for case in cases]) or []))
    monkeypatch.setattr("sys.argv", ["bench.run", "B3", "--only", "top_directions"])
    with pytest.raises(SystemExit, match="0"):
        run.main()
    assert asked[0]
    assert all("top_directions" in name for name in asked[0])
    monkeypatch.setattr("sys.argv", ["bench.run", "B3", "--only", "merge_weights"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "some case of B3 must have it in its name, got 'merge_weights'" in capsys.readouterr().err
