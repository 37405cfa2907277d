"""A state that anybody may have written: refused quickly, by name, with a remedy, and the model is as it was."""

import json
import os
import re
import socket
import struct
import time

import pytest
import torch
from torch import nn

from keeplora import KeepLora, KeepLoraConfig, SubspaceState
from keeplora._untrusted import check_tensor_file, parse_json, read_bytes
from keeplora.methods import State, StateError, load
from keeplora.methods.state import has_state, read_state, sealed, write_state
from tests.methods.contract import Net, learn, make, task


@pytest.fixture
def folder(tmp_path):
    write_state(
        tmp_path, State({"x": torch.arange(6.0).view(2, 3), "n": torch.arange(3)}, {"method": "lora", "k": [1]})
    )
    return tmp_path


def tensors(folder):
    [file] = folder.glob("*.safetensors")
    return file


def refused(folder, match):
    started = time.monotonic()
    with pytest.raises(StateError, match=match) as caught:
        read_state(folder)
    assert time.monotonic() - started < 5
    assert str(caught.value).endswith(".")  # with what to do about it


def edit(folder, change, seal=False):
    file = folder / "state.json"
    header = json.loads(file.read_text())
    change(header)
    file.write_text(json.dumps(sealed(header) if seal else header))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["meta"].update(k=[2]),
        lambda header: header["meta"].update(k=None),
        lambda header: header["meta"].pop("k"),
        lambda header: header["meta"].update(more=1),
        lambda header: header["meta"].update(k=[1.0]),
        lambda header: header["meta"].update(k=[True]),
        lambda header: header.update(more=1),
        lambda header: header.pop("sha256"),
        lambda header: header.update(sha256=None),
    ],
)
def test_every_value_is_under_the_hash(folder, change):
    edit(folder, change)
    refused(folder, "values that were changed")


def test_the_order_of_keys_and_the_spaces_are_not(folder):
    file = folder / "state.json"
    header = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(header.items())), separators=(",", ":")))
    assert read_state(folder).meta == {"method": "lora", "k": [1]}


def test_the_tensor_file_is_under_it_with_its_own_header(folder):
    file = tensors(folder)
    raw = file.read_bytes()
    assert b'"x"' in raw
    file.write_bytes(raw.replace(b'"x"', b'"y"'))
    refused(folder, "must (have sha256|be a file that holds)")
    file.write_bytes(raw[:-1])
    refused(folder, rf"must be of the {len(raw)} bytes .* got {len(raw) - 1}")


def pipe(file):
    os.mkfifo(file)


def unix_socket(file):
    os.chdir(file.parent)  # the path of a socket may be no longer than 108 bytes
    socket.socket(socket.AF_UNIX).bind(file.name)


@pytest.mark.parametrize("which", ["state.json", "tensors"])
@pytest.mark.parametrize(
    ("make_it", "got"),
    [
        (pipe, "a pipe"),
        (unix_socket, "a socket"),
        (lambda file: file.symlink_to("/dev/zero"), "a device"),
        (lambda file: file.mkdir(), "a folder"),
        (lambda file: file.symlink_to(file), "symbolic links"),
    ],
    ids=["pipe", "socket", "device", "folder", "link to itself"],
)
def test_what_is_no_file_is_refused_and_not_waited_for(folder, monkeypatch, which, make_it, got):
    monkeypatch.chdir(folder)
    file = folder / "state.json" if which == "state.json" else tensors(folder)
    file.unlink()
    make_it(file)
    refused(folder, got)


def test_a_sparse_file_of_40_gb_is_refused_before_it_is_read(folder):
    os.truncate(tensors(folder), 40 * 2**30)
    refused(folder, "42949672960")
    os.truncate(folder / "state.json", 40 * 2**30)
    refused(folder, "at most .* got 42949672960")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"format": "keeplora-state", "format": "keeplora-state"}',
        '{"meta": {"a": 1, "a": 2}}',
        '{"a": NaN}',
        '{"a": ' + "9" * 5000 + "}",
        "\udcff",
        "",
    ],
    ids=["deep lists", "deep objects", "a key twice", "a key twice inside", "NaN", "long number", "no UTF-8", "empty"],
)
def test_json_that_no_writer_of_ours_wrote_is_refused(folder, text):
    (folder / "state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "must be JSON")


@pytest.mark.parametrize("name", ["a" * 5000, "with\0nothing", ".", "..", "state.json", "missing"])
def test_names_that_are_no_tensor_file_are_refused(folder, name):
    edit(folder, lambda header: header.update(files={name: next(iter(header["files"].values()))}), seal=True)
    refused(folder, "read_state: ")


TABLES = {
    "longer than the file": struct.pack("<Q", 2**63),
    "no JSON": struct.pack("<Q", 4) + b"{]}}",
    "a list": struct.pack("<Q", 2) + b"[]",
    "no offsets": struct.pack("<Q", 11) + b'{"x": {}}  ',
    "a tensor twice": struct.pack("<Q", 92) + b'{"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]},'
    b'"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]}} ',
    "empty": b"",
}


@pytest.mark.parametrize("name", TABLES)
def test_tensor_files_whose_table_lies_are_refused(folder, name):
    file = tensors(folder)
    file.write_bytes(TABLES[name])
    with pytest.raises(ValueError, match=r"safetensors file|JSON|bytes"):
        check_tensor_file(file)
    refused(folder, file.name)


def test_files_are_read_whole(folder):
    file = folder / "state.json"
    raw = file.read_bytes()
    assert read_bytes(file) == read_bytes(file, size=len(raw)) == read_bytes(file, most=len(raw)) == raw
    with pytest.raises(ValueError, match=f"of 3 bytes, got {len(raw)}"):
        read_bytes(file, size=3)
    assert parse_json(raw)["meta"]["k"] == [1]
    assert has_state(folder)


def rank_too_large(meta, tensors):
    meta["config"]["r"] = 10**6


def no_such_layer(meta, tensors):
    meta["config"]["target_modules"] = ["nowhere"]


def other_setting(meta, tensors):
    meta["config"]["alpha"] = "x"


def no_finite_weight(meta, tensors):
    tensors["attn.q_proj.weight"][0, 0] = float("inf")


def adapter_inside(meta, tensors):
    basis = torch.cat([tensors["attn.q_proj.basis.0"], tensors["attn.q_proj.basis.1"]], dim=1)
    tensors["attn.q_proj.adapter.A"] = basis.T[:2].contiguous()


def basis_too_small(meta, tensors):
    tensors["attn.q_proj.basis.1"] = tensors["attn.q_proj.basis.1"][:, 1:].contiguous()


@pytest.mark.parametrize(
    "change", [rank_too_large, no_such_layer, other_setting, no_finite_weight, adapter_inside, basis_too_small]
)
def test_right_hashes_around_wrong_values_are_refused_and_the_model_is_as_it_was(tmp_path, change):
    torch.manual_seed(0)
    method = make("keeplora", Net())
    learn(method, task(0))
    method.before_task(task(1), lambda model, batch: model(batch[0]).square().mean())
    state = method.state()
    change(state.meta, state.tensors)
    write_state(tmp_path, state)
    model = Net()
    kinds, values = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    for read in (lambda: load(tmp_path, model), lambda: KeepLora.load(tmp_path, model)):
        model.load_state_dict({k: method.model.state_dict().get(k, v) for k, v in values.items()})
        with pytest.raises(StateError, match=r"^load.*\.$"):
            read()
        assert [type(m) for m in model.modules()] == kinds
        assert list(model.state_dict()) == list(values)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_another_method_holds_stays_its(tmp_path):
    make("lora", Net()).save(tmp_path)
    model = Net()
    other = make("keeplora", model)
    with pytest.raises(RuntimeError, match="wrapped already"):
        load(tmp_path, model)
    learn(other, task(0))


class Tower(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer, self.rest = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
        self.norm = nn.BatchNorm1d(8, dtype=dtype)

    def forward(self, x):
        return self.norm(self.rest(self.layer(x)))


def one_of_512(model):
    model.rest.weight.data.view(-1)[37] += 1e-3  # .data: no version counter sees it


def a_sign(model):
    model.rest.weight.data[3, 4].neg_()


def two_rows(model):
    model.rest.weight.data[[1, 2]] = model.rest.weight.data[[2, 1]]


def bias(model):
    model.rest.bias.data[7] = 0


def statistics(model):
    model.norm.running_mean[2] = 1e-6


def counter(model):
    model.norm.num_batches_tracked += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [one_of_512, a_sign, two_rows, bias, statistics, counter])
def test_a_model_that_differs_anywhere_is_another_model(tmp_path, change, dtype):
    def pretrained():
        torch.manual_seed(0)
        return Tower(dtype)

    KeepLora(pretrained(), KeepLoraConfig(r=2, target_modules="layer")).save(tmp_path)
    model = pretrained()
    change(model)
    with pytest.raises(StateError, match="other weights and buffers must"):
        KeepLora.load(tmp_path, model)
    KeepLora.load(tmp_path, pretrained())


def test_a_peft_state_may_not_be_edited_either(tmp_path):
    write_state(tmp_path, State({}, {"method": "keeplora-peft", "targets": [["x", 0]]}))
    with pytest.raises(StateError, match=re.escape(os.fspath(tmp_path))):
        SubspaceState.load(tmp_path)


def test_a_method_that_cannot_be_made_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    make("keeplora", Net()).save(tmp_path)
    model = Net()
    kinds = [type(m) for m in model.modules()]

    def fails(targets):
        assert [type(m) for m in model.modules()] != kinds  # its layers are replaced already
        raise ValueError("no depth")

    monkeypatch.setattr("keeplora.methods.keeplora.method.depth_positions", fails)
    with pytest.raises(StateError, match=r"must fit the model .*no depth\."):
        load(tmp_path, model)
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
