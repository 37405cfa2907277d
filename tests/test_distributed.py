"""Two processes over one task's data: the same as one process over all of it, and no process is left waiting."""

import pytest
import torch

from keeplora.statistics.passes import ALONE
from tests.processes import SETTINGS, found_by, shares, statistics, task, task_of_a_group, work


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    return found_by(tmp_path_factory.mktemp("processes"), work, 2)


def close(found, expected, tolerance=2e-5):
    # Sums of a few float32 matrices, added in another order
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


def same_bits(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_bits(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return first == second


@pytest.mark.parametrize("name", ["uneven", "one idle", "idle first", "one input", "short batches"])
def test_statistics_are_those_of_all_data(both, name):
    data = [batch for share in shares(name) for batch in share]
    expected = statistics(data, ALONE)
    assert same_bits(both[0]["statistics"][name], both[1]["statistics"][name])
    found = both[0]["statistics"][name]
    for kind, values in expected.items():
        if kind == "features, sketch":  # the factor of a core that may be as badly conditioned as the moment
            close([f @ f.T for f in found[kind]], [f @ f.T for f in values], tolerance=1e-4)
        elif kind.startswith("counts"):
            for (tokens, energy), (all_tokens, all_energy) in zip(found[kind], values, strict=True):
                assert tokens == all_tokens
                # of slot_mean it is that of means, which are float32 sums in another order
                assert energy == pytest.approx(all_energy, rel=1e-6 if "slot_mean" in kind else 1e-12)
        elif kind.startswith("shared"):
            assert found[kind] is values is (name == "one input")
        else:
            close(found[kind], values)


@pytest.mark.parametrize(("name", "settings"), [("exact", {}), ("sketch", {"gradient_statistic": "sketch", "r": 1})])
def test_a_task_is_the_same_everywhere_and_the_same_as_alone(both, name, settings):
    alone = task([batch for share in shares("uneven") for batch in share], **settings)
    assert same_bits(both[0]["tasks"][name], both[1]["tasks"][name])
    found = both[0]["tasks"][name]
    for kind in ("adapters", "bases"):  # spaces: directions of nearly equal energy may turn among themselves
        close([m if kind == "bases" else m.T for m in map(span, found[kind], [kind] * 3)],
              [m if kind == "bases" else m.T for m in map(span, alone[kind], [kind] * 3)], tolerance=1e-3)  # fmt: skip
    for mine, expected in zip(found["certificate"]["layers"], alone["certificate"]["layers"], strict=True):
        assert mine["added"] == expected["added"]
        assert mine["captured"] == pytest.approx(expected["captured"], rel=1e-5)
        assert mine["leak"] <= 1e-6


def test_a_task_of_some_processes_is_no_matter_of_the_others(tmp_path):
    first, other, second = found_by(tmp_path, task_of_a_group, 3)
    alone = task([batch for share in shares("uneven") for batch in share])
    assert same_bits(first["task"], second["task"])
    close([span(q, "bases") for q in first["task"]["bases"]], [span(q, "bases") for q in alone["bases"]], 1e-3)
    assert same_bits(other["task"], task(shares("uneven")[0][:1]))
    assert [found["peers"] for found in (first, other, second)] == [(0, 2), (0, 1), (1, 2)]
    kind, text = other["stranger"]
    assert (kind, "on rank 1" in text) == ("ValueError", True)
    assert first["error"][0] == "TypeError"
    assert second["error"][0] == "PeerError"
    assert "process 0 of 2 failed, so this one (rank 1) stops: TypeError: before_task: loss_fn" in second["error"][1]
    assert first["kept"] is second["kept"] is True  # before_task changed nothing


def test_a_layer_that_one_process_alone_has_reached_is_reached(both):
    alone = task([batch for share in shares("b on one alone") for batch in share])
    assert same_bits(both[0]["tasks"]["b on one alone"], both[1]["tasks"]["b on one alone"])
    layers = both[0]["tasks"]["b on one alone"]["certificate"]["layers"]
    assert [row["added"] for row in layers] == [row["added"] for row in alone["certificate"]["layers"]]
    assert all(row["added"] for row in layers)


def span(matrix, kind):
    """The projector onto the columns of a basis, or onto the rows of an adapter."""
    return matrix @ matrix.T if kind == "bases" else matrix.T @ matrix


@pytest.mark.parametrize(
    ("name", "culprit", "error", "message"),
    [
        ("nan loss on 1", 1, "ValueError", "the loss must be finite, got nan [batch 1]"),
        ("loader breaks on 0", 0, "OSError", "the disk is gone"),
        ("no loss function on 1", 1, "TypeError", "loss_fn must be a function"),
        ("nan feature on 1", 1, "ValueError", "got NaN or Inf in batch 1"),
        ("adapter broken on 0", 0, "ValueError", "trained parameters must be finite"),
    ],
)
def test_an_error_in_one_process_is_one_in_both(both, name, culprit, error, message):
    kind, text, unchanged = both[culprit]["failures"][name]
    assert kind == error
    assert message in text
    assert unchanged
    kind, text, unchanged = both[1 - culprit]["failures"][name]
    assert kind == "PeerError"
    assert f"process {culprit} of 2 failed" in text
    assert message in text
    assert unchanged


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no batch at all", "at least one batch, got none"),
        ("other weights", "must hold the same weights, got sums"),
        ("adapters apart", "[b.B]"),
    ],
)
def test_what_both_can_see_both_refuse(both, name, message):
    for found in both:
        kind, text, unchanged = found["failures"][name]
        assert kind == "ValueError"
        assert message in text
        assert unchanged


def test_processes_with_other_layers_or_settings_are_refused(both):
    for found in both:
        kind, text = found["others"]["layers"]
        assert kind == "ValueError"
        assert "must adapt the same layers" in text
        assert "[head]" in text
        kind, text = found["others"]["kinds"]
        assert kind == "ValueError"
        assert "must gather the same statistics" in text


def test_where_one_has_to_sketch_all_do(both):
    first, second = (found["others"]["a budget of nothing on 1"] for found in both)
    assert same_bits(first, second)
    assert SETTINGS["r"] == 3  # eight rows for each of one direction are fewer than a layer has
