"""Every benchmark case runs: a provider that fails would otherwise show only when somebody measures."""

import pytest
import torch

from bench import bench_basis, bench_init, experts, run
from bench.plans import PLANS, by_plan
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


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_finds_the_same(name):
    """On a GPU they are providers of B2 and B3."""
    cpu = torch.device("cpu")
    for ours, arguments in (
        (bench_basis.ours, bench_basis.features(48, 40, 3, 300, cpu)),
        (bench_init.ours, bench_init.gradients(60, 48, 10, 4, 2, cpu)),
    ):
        call = by_plan(ours, cuda=True)[f"keeplora, {name}"]
        for one, other in zip(call(*arguments), ours(*arguments), strict=True):
            torch.testing.assert_close(one.abs(), other.abs(), rtol=0, atol=1e-3)
    assert by_plan(ours, cuda=False) == {}


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


@pytest.mark.filterwarnings("ignore::UserWarning")  # experts without a token
def test_what_an_expert_costs_is_measured():
    batch = {"input_ids": torch.arange(32).view(2, 16), "labels": torch.arange(32).view(2, 16)}
    small, large = (experts.row(count, batch, 1, hidden=32, inner=16) for count in (4, 8))
    assert small["weights_bytes"] == large["weights_bytes"] == 4 * 3 * 32 * 16
    assert small["moments_bytes"] == 4 * (32**2 + 16**2)
    assert small["factored_kept_bytes"] < small["merged_kept_bytes"]
    assert all(value > 0 for value in large.values())


def test_what_others_left_behind_is_not_taken_off_a_calls_memory():
    import gc

    import torch

    from bench.harness import recorded_bytes

    def left():
        cycle = [torch.zeros(2**20)]
        cycle.append(cycle)

    def call():
        gc.collect()  # as it happens at any time
        return torch.ones(2**18)

    gc.disable()
    try:
        recorded_bytes(left)  # the profiler takes off only what it has seen coming
        peak, held = recorded_bytes(call)
    finally:
        gc.enable()
    assert (peak, held) == (2**20, 2**20)
