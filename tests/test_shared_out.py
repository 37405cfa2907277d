"""FSDP2: every process holds some rows of each weight, and learns what one process with the whole model learns."""

import pytest

from keeplora import KeepLora
from keeplora.methods.state import read_state
from tests.processes import found_by
from tests.shared_out import COMPILED, LIVES, batches, held, kept_as_large, life, llama, plain_lora, work
from tests.test_distributed import close, same_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared_out")


@pytest.fixture(scope="module")
def three(folder):
    """What each of three processes found."""
    return found_by(folder, work, 3)


@pytest.mark.parametrize("name", LIVES)
def test_two_tasks_are_those_of_one_process(three, name):
    dtype, counts, settings = LIVES[name]
    found = [each[name] for each in three]
    alone = life(llama(dtype), counts, range(len(counts)), settings)
    for each in found[1:]:  # bases, adapters, certificates: the same bits everywhere
        assert same_bits(each, found[0])
    mine = found[0]
    assert mine["capacity"] == alone["capacity"]
    assert mine["classes"] == alone["classes"] == ["Linear"] * 15
    wide = dtype == "float32"  # else a number that rounds to another one in the first merge is all that differs later
    for task, most in enumerate((2e-5, 2e-4 if wide else 1e-2)):
        close(mine[f"A B, {task}"], alone[f"A B, {task}"], most)
        for layer, expected in zip(*(f[f"certificate, {task}"]["layers"] for f in (mine, alone)), strict=True):
            assert layer["leak"] <= 1e-6
            assert layer["captured"] == pytest.approx(expected["captured"], rel=1e-5 if wide or not task else 1e-3)
            stored = layer["leak_after_rounding"], expected["leak_after_rounding"]
            assert stored[0] == pytest.approx(stored[1], rel=1e-2, abs=1e-6)
    close([q @ q.T for q in mine["Q"]], [q @ q.T for q in alone["Q"]], 2e-5 if wide else 1e-2)
    close(mine["W"], alone["W"], 5e-6 if wide else 5e-3)
    close([mine["logits"]], [alone["logits"]], 1e-5 if wide else 5e-2)


def test_plain_lora_is_that_of_one_process(three):
    alone = plain_lora(llama(), range(3))
    for found in three:
        close(found["lora"], alone, 5e-6)
    assert max(float((w - llama().state_dict()[name]).abs().max()) for name, w in _named(alone)) > 1e-3


def test_a_step_keeps_no_merged_weights_for_its_backward(three):
    """They would be whole in every process."""
    assert all(found["kept"] == [] for found in three)
    assert len(kept_as_large(llama(), batches(0, 1, 0), "merged")) == 14


@pytest.mark.parametrize("name", COMPILED)
def test_blocks_may_be_compiled(three, name):
    for found in three:
        compiled = found["compiled"]
        assert compiled["graphs"] > 0
        close(compiled[name, True], compiled[name, False], 5e-6)


def _named(weights):
    names = [name for name, p in llama().named_parameters() if p.dim() == 2 and ".layers." in name]
    return zip(names, weights, strict=True)


def test_what_three_processes_saved_one_or_two_load(three, folder):
    """The same bits, hashes of whole weights among them, in the middle of a task."""
    state = read_state(folder / "state")
    alone = KeepLora.load(folder / "state", llama())
    for found in three:
        assert same_bits(found["saved"]["three"], held(alone))
    for found in three[:2]:
        assert same_bits(found["saved"]["two"], held(alone))
    assert read_state(folder / "again").meta == state.meta
    assert alone.live_state().meta == state.meta
    assert len(held(alone)[2]) == 14
    first = KeepLora.load(folder / "first", llama())
    assert first.live_state().meta == read_state(folder / "first").meta
    assert not first.tasks_learned
    assert same_bits(*(found["saved"]["two, closed"] for found in three[:2]))


def test_what_cannot_be_loaded_or_saved_is_refused_everywhere(three, folder):
    for rank, found in enumerate(three):
        kind, text = found["saved"]["other model"]
        assert kind == "StateError"
        assert "other weights and buffers must be those the state was made with" in text
        kind, text = found["saved"]["written to"]
        assert kind == "StateError", rank
        assert "something else has been written to [model.layers.0.self_attn.q_proj]" in text
    assert not (folder / "never").exists()


def test_gradients_of_adapters_are_averaged(three):
    """B of three processes with other data, after steps in which gradients accumulate, and B of one with all data."""
    alone = life(llama(), LIVES["even"][1], range(3), {})
    for found in three:
        close(found["even"]["B, 0"], alone["B, 0"], 1e-4)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("merged", "ValueError", 'forward must be "auto" or "factored"'),
        ("sd-lora", "TypeError", "SdLora: weights must be whole"),
        (
            "two dimensions",
            "TypeError",
            "2 dimensions, as (Replicate(), Shard(dim=0)). Call model.requires_grad_(False)",
        ),
        (
            "osf",
            "TypeError",
            "Methods that work with rows (KeepLoRA, KeepLoRA++, LoRA, InfLoRA, O-LoRA, GPM) are made after",
        ),
        ("requires_grad", "TypeError", "model.layers.0.mlp.up_proj.weight with requires_grad. Call model.requires_"),
        ("a layer itself", "TypeError", "got a layer that fully_shard was called with at '0'"),
        ("fused", "TypeError", "got rows 0 to 20 of a fused weight at"),
    ],
)
def test_what_does_not_work_is_refused_before_anything_changes(three, what, kind, message):
    for found in three:
        got, text, unchanged = found["refusals"][what]
        assert got == kind
        assert message in text
        assert unchanged


def test_a_model_that_is_cut_up_after_the_method_was_made_is_refused(three):
    for found in three:
        kind, text = found["refusals"]["late"]
        assert kind == "TypeError"
        assert "before_task: weights must be whole" in text


def test_an_error_between_two_steps_reaches_all_who_can_go_on(three):
    for rank, found in enumerate(three):
        errors = found["failures"]
        assert errors["loader"][0] == ("PeerError" if rank else "OSError")
        assert "the disk is gone" in errors["loader"][1]
        assert errors["nan"][0] == ("ValueError" if rank == 1 else "PeerError")
        assert "the loss must be finite, got nan [batch 0]" in errors["nan"][1]
        assert "at least one batch, got none" in errors["nothing"][1]
        assert "group must be the 3 processes" in errors["group"][1]
        for call, (kind, text) in zip(("state", "digest", "import_peft"), errors["copied"], strict=True):
            assert kind == "TypeError"
            assert f"{call}: weights must be whole in one process, got rows in each (FSDP2). Call save(path)" in text
        assert "every process must hold the same weights" in errors["apart"][1]
        assert errors["abandoned"]
