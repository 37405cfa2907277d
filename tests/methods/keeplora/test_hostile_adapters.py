"""A PEFT checkpoint that anybody may have written: refused quickly as a StateError, and nothing has changed."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_peft import CONFIG, loss_fn, net, stock, task, train

from keeplora import KeepLora, KeepLoraConfig, StateError
from keeplora.integrations.peft import SubspaceState, initialize, update_subspace
from keeplora.methods.state import read_state, write_state

NOTHING_PROTECTED = KeepLoraConfig(
    **{**CONFIG.to_dict(), "weight_energy": 0.0, "r": 4, "target_modules": ["up", "down"]}
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    stock(init_lora_weights=False).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(folder, match):
    keeper = KeepLora(net(), NOTHING_PROTECTED)
    before, started = {k: v.clone() for k, v in keeper.model.state_dict().items()}, time.monotonic()
    with pytest.raises(StateError, match=match) as caught:
        keeper.import_peft(folder)
    assert time.monotonic() - started < 5
    assert str(caught.value).startswith("import_peft: ")
    assert str(caught.value).endswith(".")
    assert not keeper.training_task
    after = keeper.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_it_is_imported_as_it_is(folder):
    keeper = KeepLora(net(), NOTHING_PROTECTED)
    keeper.import_peft(folder)
    assert keeper.training_task


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_alpha": "8"}, {"lora_alpha": True},
        {"lora_alpha": 1e300}, {"r": 3}, {"r": "4"}, {"r": 4.0}, {"r": None}, {"alpha_pattern": [1]},
        {"alpha_pattern": {"(a+)+$": 1.0}}, {"alpha_pattern": {".*.*.*.*.*x": 1.0}}, {"rank_pattern": {"up": "x"}},
        {"peft_type": "nothing"}, {"peft_type": 3}, {"use_dora": "x"}, {"init_lora_weights": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_none(folder, changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(folder, "import_peft: ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": 1, "r": 2}', "", "3", "[]", '{"r": NaN}'])
def test_json_that_is_none(folder, text):
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "import_peft: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * float("nan"), lambda t: t.to(torch.int64), lambda t: t.bool(), lambda t: t[:-1],
        lambda t: t[None], lambda t: t.to(torch.complex64), lambda t: t[:0], lambda t: torch.full_like(t, float("inf")),
    ],
)  # fmt: skip
def test_tensors_that_are_none(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)
    refused(folder, "import_peft: ")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_none(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "a pipe")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(folder, "a device")
    (folder / name).unlink()
    (folder / name).touch()
    os.truncate(folder / name, 40 * 2**30)
    refused(folder, "must be ")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    model, held = stock(), None
    for seed in (0, 1):
        held = initialize(model, task(seed), loss_fn, held, config=CONFIG if held is None else None)
        train(model, task(seed))
        if not seed:
            update_subspace(model, task(seed), held)
    held.save(folder)
    return read_state(folder)


VALUES = None, True, -1, 0, 0.5, 10**30, "x", [], ["x"], [[1]], {}, {"x": 1}, [["x", 0, "model"]], {"blocks.0.up": "x"}


def test_every_value_of_a_state_is_judged(state, tmp_path):
    accepted = []
    for key in sorted(state.meta):
        for value in VALUES:
            if value == state.meta[key] or key == "versions":
                continue
            write_state(tmp_path, type(state)(state.tensors, {**state.meta, key: value}))
            try:
                SubspaceState.load(tmp_path)
            except StateError:
                pass
            else:
                accepted.append((key, value))
    assert [entry for entry in accepted if entry not in HARMLESS] == []


HARMLESS = [
    *((key, "x") for key in ("pretrained", "current", "frozen", "open_adapter")),  # restore compares them
    ("open_adapter", None), ("kept", ["x"]), ("also_train", ["x"]), ("config", {}),
]  # fmt: skip


def test_every_tensor_of_a_state_is_judged(state, tmp_path):
    for name, tensor in state.tensors.items():
        for changed in (None, tensor * float("nan"), tensor.to(torch.int8), tensor[None], 0 * tensor):
            if changed is not None and name.endswith(("A", "B")) and not changed.isnan().any() and changed.dim() == 2:
                continue  # an update may be anything
            tensors = {k: v for k, v in state.tensors.items() if k != name}
            write_state(tmp_path, type(state)(tensors | ({} if changed is None else {name: changed}), state.meta))
            with pytest.raises(StateError):
                SubspaceState.load(tmp_path)
    write_state(tmp_path, type(state)({**state.tensors, "stranger": torch.zeros(1)}, state.meta))
    with pytest.raises(StateError, match="stranger"):
        SubspaceState.load(tmp_path)


@pytest.mark.parametrize("where", ["head.weight", "head.bias", "blocks.0.up.bias"])
def test_a_base_model_that_differs_anywhere_is_another_model(state, tmp_path, where):
    write_state(tmp_path, state)
    model = net()
    model.get_parameter(where).data.view(-1)[3] += 1e-3
    with pytest.raises(StateError, match="other weights and buffers must"):
        SubspaceState.load(tmp_path).restore(stock(model))
    SubspaceState.load(tmp_path).restore(stock())
