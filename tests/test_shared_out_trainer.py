"""FSDP2 by accelerate's plugin: in Hugging Face's Trainer and in a loop under Accelerate."""

import pytest
import torch

from tests.processes import found_by
from tests.shared_out_trainer import COUNT, two_tasks, work
from tests.test_distributed import close, same_bits


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    return found_by(tmp_path_factory.mktemp("trainer"), work, COUNT)


def test_trainer_learns_what_it_learns_in_one_process(both, tmp_path):
    """Gradients are accumulated, then clipped: those of all processes together."""
    found = [each["trainer"] for each in both]
    assert same_bits(*found)
    alone, norms = two_tasks(tmp_path, 2 * COUNT, False)
    mine = found[0]
    assert len(norms) == 8
    assert min(norms) > 0.05  # every step is clipped
    assert both[0]["norms"] == both[1]["norms"]
    torch.testing.assert_close(both[0]["norms"], norms, rtol=1e-4, atol=0)
    close(mine["B, 0"], alone["B, 0"], 1e-4)
    for task in range(2):
        for layer, other in zip(*(f[f"certificate, {task}"]["layers"] for f in (mine, alone)), strict=True):
            assert layer["leak"] <= 1e-6
            assert layer["captured"] == pytest.approx(other["captured"], rel=1e-4)
    close(mine["W"], alone["W"], 1e-5)


def test_trainer_in_mixed_precision_keeps_the_promise(both):
    """FSDP2 computes in bfloat16 then; shares and adapters stay in float32."""
    assert same_bits(*(found["bf16"] for found in both))
    found = both[0]
    torch.testing.assert_close(found["bf16, norms"], found["norms"], rtol=0.05, atol=0)
    assert found["bf16, norms"] != found["norms"]
    for task in range(2):
        assert max(layer["leak"] for layer in found["bf16"][f"certificate, {task}"]["layers"]) <= 1e-6
    assert {w.dtype for w in found["bf16"]["W"]} == {torch.float32}


def test_a_task_goes_on_from_a_checkpoint_in_its_middle(both):
    for found in both:
        whole, resumed = found["stopped"]
        assert same_bits(whole, resumed)
        assert same_bits(whole, both[0]["stopped"][0])
        straight, again = found["own loop"]
        assert same_bits(straight, again)
        assert max(float(b.abs().max()) for b in straight) > 0


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("whole_method", "TypeError", "FSDP2 must have the model before 'keeplora' is made"),
        ("whole_method_added", "TypeError", "Call keeplora.integrations.shard(accelerator, model) first"),
        ("around", "TypeError", "model must be the one that FSDP2 has, got a Around"),
        ("second_method", "RuntimeError", "before a method is made of it"),
        ("cpu_ram_efficient_loading", "ValueError", "fsdp_plugin.cpu_ram_efficient_loading must be off, got True"),
        ("activation_checkpointing", "ValueError", "model.gradient_checkpointing_enable()"),
        ("cpu_offload", "ValueError", "fsdp_plugin.cpu_offload must be off, got CPUOffloadPolicy"),
        ("no FSDP", "ValueError", "accelerator must run FSDP2, got DistributedType.MULTI_CPU"),
        ("DDP", "TypeError", "would put DistributedDataParallel around it"),
        ("DDP, added", "TypeError", "accelerate must run FSDP2 for a model that fully_shard has cut up"),
    ],
)
def test_what_accelerate_would_break_is_refused(both, what, kind, message):
    for found in both:
        got, text = (found["refusals"] | found["on CPUs"])[what]
        assert got == kind
        assert message in text
