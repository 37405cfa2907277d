"""FSDP2 by accelerate's plugin: in Hugging Face's Trainer and in a loop under Accelerate."""

import pytest
import torch

from tests.processes import found_by
from tests.shared_out_trainer import METHODS, MOST, TASKS, learned, work
from tests.test_distributed import close, same_bits


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    return found_by(tmp_path_factory.mktemp("trainer"), work, 2, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What each of four processes found, of which the last has no rows of some weights."""
    return found_by(tmp_path_factory.mktemp("four"), work, MOST, MOST)


@pytest.fixture(scope="module", params=METHODS)
def alone(request, tmp_path_factory):
    """What one process learns, and the norms of its gradients, with the name of the method."""
    return request.param, *learned(tmp_path_factory.mktemp("alone"), 2 * MOST, False, request.param)


@pytest.mark.parametrize("count", TASKS)
def test_trainer_learns_what_it_learns_in_one_process(request, alone, count):
    """Gradients are accumulated, then clipped: those of all processes together."""
    name, expected, norms = alone
    (mine, my_norms), *others = (each[name] for each in request.getfixturevalue("both" if count == 2 else "four"))
    for other in others:
        assert same_bits((mine, my_norms), other)
    assert len(norms) == 6
    norms = norms[: len(my_norms)]
    assert min(norms) > 0.05  # every step is clipped
    assert len(my_norms) == 2 * TASKS[count]
    torch.testing.assert_close(my_norms, norms, rtol=1e-4, atol=0)
    for task in range(TASKS[count]):
        close(mine[f"B, {task}"], expected[f"B, {task}"], 1e-4 if not task else 1e-3)
        close(mine[f"W, {task}"], expected[f"W, {task}"], 1e-5)
        if name == "keeplora":
            for layer, other in zip(*(f[f"certificate, {task}"]["layers"] for f in (mine, expected)), strict=True):
                assert layer["leak"] <= 1e-6
                assert layer["captured"] == pytest.approx(other["captured"], rel=1e-4)


def test_trainer_in_mixed_precision_keeps_the_promise(both):
    """FSDP2 computes in bfloat16 then; shares and adapters stay in float32."""
    assert same_bits(*(found["bf16"] for found in both))
    (found, norms), (_, wide) = both[0]["bf16"], both[0]["keeplora"]
    torch.testing.assert_close(norms, wide, rtol=0.05, atol=0)
    assert norms != wide
    for task in range(2):
        assert max(layer["leak"] for layer in found[f"certificate, {task}"]["layers"]) <= 1e-6
        assert {w.dtype for w in found[f"W, {task}"]} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_a_task_goes_on_from_a_checkpoint_in_its_middle(four, name):
    for found in four:
        whole, resumed = found[f"{name}, stopped"]
        assert same_bits(whole, resumed)
        assert same_bits(whole, four[0][f"{name}, stopped"][0])
        straight, again = found[f"{name}, own loop"]
        assert same_bits(straight, again)
        assert same_bits(straight, four[0][f"{name}, own loop"][0])
        assert max(float(b.abs().max()) for b in straight) > 0


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("whole_method", "TypeError", "FSDP2 must have the model before 'keeplora' is made"),
        ("whole_method_added", "TypeError", "Call keeplora.integrations.shard(accelerator, model) first"),
        ("around", "TypeError", "model must be the one that FSDP2 has, got a Around"),
        ("second_method", "RuntimeError", "before a method is made of it"),
        (
            "no_rows",
            "TypeError",
            "got none of 6 on rank 3 [model.language_model.layers.0.self_attn.k_proj]",
        ),
        ("cpu_ram_efficient_loading", "ValueError", "fsdp_plugin.cpu_ram_efficient_loading must be off, got True"),
        ("activation_checkpointing", "ValueError", "model.gradient_checkpointing_enable()"),
        ("cpu_offload", "ValueError", "fsdp_plugin.cpu_offload must be off, got CPUOffloadPolicy"),
        ("no FSDP", "ValueError", "accelerator must run FSDP2, got DistributedType.MULTI_CPU"),
        ("DDP", "TypeError", "would put DistributedDataParallel around it"),
        ("DDP, added", "TypeError", "accelerate must run FSDP2 for a model that fully_shard has cut up"),
    ],
)
def test_what_accelerate_would_break_is_refused(both, four, what, kind, message):
    for found in four if what in four[0]["refusals"] else both:
        got, text = (found["refusals"] if "refusals" in found else found["on CPUs"])[what]
        assert got == kind
        assert message in text
