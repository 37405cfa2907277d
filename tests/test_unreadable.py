"""Every function that reads what was saved, or settings: a path that cannot be read is refused, and nothing is changed.

What was saved is refused with a StateError, settings are with a ConfigError; neither lets an OSError out.
"""

import errno
import json
import os
import shutil
from typing import NamedTuple

import pytest
import torch
from stock_peft import loss_fn, stock, task

import keeplora
from keeplora import KeepLora, SubspaceState, cli
from keeplora.compare.comparison import comparison
from keeplora.integrations import accelerate
from keeplora.integrations.hf_trainer import KeepLoraCallback
from keeplora.methods import State, StateError
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import read_state
from keeplora.train.config import load_config, parse_config
from keeplora.train.record import RunRecord, claim_folder, load_progress, load_result, save_progress, save_result
from tests.integrations.one_layer import Classifier, batches, make_keeper, task_data
from tests.integrations.one_layer import loss_fn as one_loss

RUN = {"benchmark": "tiny_workload:workload", "methods": ["lora"], "epochs": 1}


def state(folder):
    keeper = make_keeper()
    keeper.before_task(batches(task_data(0)), one_loss)  # from now on there are tensors
    keeper.save(folder)


def peft_state(folder):
    keeplora.initialize(stock(), task(1), loss_fn).save(folder)


def adapter(folder):
    stock(init_lora_weights=False).save_pretrained(folder)


def checkpoint(folder):
    make_keeper().save(folder / "keeplora")
    (folder / "trainer_state.json").write_text('{"global_step": 3, "log_history": [{"grad_norm": NaN}]}')


def run(folder):
    figures = {name: [1.0] for name in ("loss", "train_seconds", "switch_seconds", "evaluate_seconds")}
    save_result(folder, RunRecord("lora", 0, ["a"], [[1.0]], certificates=[None], **figures), {}, keep_state=True)
    save_progress(folder, RunRecord("lora", 0, ["a"]), State({"x": torch.zeros(1)}), {})
    claim_folder(parse_config({**RUN, "out": str(folder)}), "data")


def settings(folder):
    (folder / "my.toml").write_text('benchmark = "nobody:knows"\nmethods = ["lora"]\nepochs = 1\n')


def in_a_terminal(*arguments):
    code = cli.main([*arguments, "--workers", "0"])
    raise StateError(f"exit {code}.")  # what a user of the command sees is looked at below


class Reader(NamedTuple):
    write: object
    files: tuple[str, ...]
    read: object
    subject: object = lambda: None
    error: type = StateError
    missing: bool = True
    """Whether a file that is not there is refused; otherwise there is nothing to go on from."""


SAVED = ("", "state.json", "tensors-*.safetensors")
READERS = {
    "load": Reader(state, SAVED, keeplora.load, Classifier),
    "KeepLora.load": Reader(state, SAVED, KeepLora.load, Classifier),
    "SubspaceState.load": Reader(peft_state, SAVED, lambda folder, _: SubspaceState.load(folder)),
    "read_state": Reader(state, SAVED, lambda folder, _: read_state(folder)),
    "import_peft": Reader(
        adapter, ("", "adapter_config.json", "adapter_model.safetensors"),
        lambda folder, keeper: keeper.import_peft(folder), make_keeper,
    ),
    "KeepLoraCallback.resume": Reader(
        checkpoint, ("", "keeplora", "keeplora/state.json", "trainer_state.json"),
        lambda folder, keeper: KeepLoraCallback(keeper).resume(folder), make_keeper,
    ),
    "accelerate.resume": Reader(
        checkpoint, ("", "keeplora", "keeplora/state.json"), lambda folder, keeper: accelerate.resume(keeper, folder),
        make_keeper,
    ),
    "load_result": Reader(run, ("result.json",), lambda folder, _: load_result(folder, {}), missing=False),
    "load_progress": Reader(
        run, ("state/state.json", "state/tensors-*.safetensors"), lambda folder, _: load_progress(folder, {}),
        missing=False,
    ),
    "claim_folder": Reader(
        run, ("config.json",), lambda folder, _: claim_folder(parse_config({**RUN, "out": str(folder)}), "data"),
        missing=False,
    ),
    "load_config": Reader(
        settings, ("my.toml",), lambda folder, _: load_config(folder / "my.toml"), error=ConfigError
    ),
    "comparison": Reader(settings, ("my.toml",), lambda folder, _: comparison(folder / "my.toml"), error=ConfigError),
    "keeplora run": Reader(settings, ("my.toml",), lambda folder, _: in_a_terminal("run", str(folder / "my.toml"))),
    "keeplora compare": Reader(
        settings, ("my.toml",), lambda folder, _: in_a_terminal("compare", "--benchmark", str(folder / "my.toml"))
    ),
}  # fmt: skip


def gone(path, monkeypatch):
    return "exist" if path.parent.exists() else "must"


def a_folder(path, monkeypatch):
    path.mkdir()
    return "got a folder"


def a_broken_link(path, monkeypatch):
    path.symlink_to("nowhere")
    return "exist"


def forbidden(path, monkeypatch):
    """Root may read everything: the system's answer to others is played."""
    path.write_text("{}")
    path.chmod(0)
    opened = os.open

    def refusing(name, *args, **kwargs):
        if os.fspath(name) == os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(name))
        return opened(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    return "Permission denied"


def a_file(path, monkeypatch):
    path.write_text("{}")
    return "exist"


FAULTS = {"file": [gone, a_folder, a_broken_link, forbidden], "folder": [gone, a_broken_link, a_file]}
CASES = [
    (name, file, fault)
    for name, reader in READERS.items()
    for file in reader.files
    for fault in FAULTS["file" if "." in file else "folder"]
    if reader.missing or fault is not gone
]


def snapshot(subject):
    model = getattr(subject, "model", subject)
    kept = {} if model is None else {name: value.clone() for name, value in model.state_dict().items()}
    return kept, [] if model is None else [type(m) for m in model.modules()]


@pytest.mark.parametrize(("name", "file", "fault"), CASES)
def test_a_path_that_cannot_be_read_is_refused(tmp_path, monkeypatch, capsys, name, file, fault):
    reader, folder = READERS[name], tmp_path / "folder"
    folder.mkdir()
    reader.write(folder)
    path = next(folder.glob(file)) if file else folder
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    subject, said = reader.subject(), fault(path, monkeypatch)
    values, kinds = snapshot(subject)
    with pytest.raises(reader.error) as caught:
        reader.read(folder, subject)
    told = str(caught.value)
    if name.startswith("keeplora "):
        assert told == "exit 2."
        told = capsys.readouterr().err
        assert told.count("\n") == 1
    assert str(path) in told
    assert fault is gone or said in told
    assert reader.error is not StateError or str(caught.value).endswith(".")  # with what to do about it
    after, kinds_after = snapshot(subject)
    assert kinds_after == kinds
    assert list(after) == list(values)
    assert all(torch.equal(after[key], value) for key, value in values.items())


@pytest.mark.parametrize("read", [lambda folder: load_result(folder, {}), lambda folder: load_progress(folder, {})])
def test_where_nothing_was_saved_a_run_begins(tmp_path, read):
    assert read(tmp_path) is None


JSON = {
    "deep": "[" * 200_000, "a key twice": '{"a": 1, "a": 2}', "NaN": '{"a": NaN}', "no object": "[3]",
    "no UTF-8": "\udcff",
}  # fmt: skip


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
@pytest.mark.parametrize(
    ("name", "file"),
    [("load_result", "result.json"), ("claim_folder", "config.json"), ("KeepLoraCallback.resume", "trainer_state.json"),
     ("import_peft", "adapter_config.json"), ("load", "state.json")],
)  # fmt: skip
def test_json_that_nobody_of_ours_wrote_is_refused(tmp_path, name, file, text):
    reader = READERS[name]
    reader.write(tmp_path)
    (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StateError, match=rf"{file} must .*\.$|adapter of PEFT's"):
        reader.read(tmp_path, reader.subject())


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = 1\na = 2", "a = ", "\udcff"])
@pytest.mark.parametrize("name", ["load_config", "comparison"])
def test_toml_that_is_none_is_refused(tmp_path, name, text):
    (tmp_path / "my.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"my\.toml must be TOML, got"):
        READERS[name].read(tmp_path, None)


@pytest.mark.parametrize("change", [{"method": 3}, {"method": "lora"}, {"versions": 3}, {"methods": 3}])
def test_a_folder_with_settings_of_another_kind_is_refused(tmp_path, change):
    run(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StateError, match=r"config\.json must hold settings of a run, got .*\.$"):
        READERS["claim_folder"].read(tmp_path, None)


@pytest.mark.parametrize("change", [{"tasks": 3}, {"tasks": [3]}, {"accuracy": 3}, {"accuracy": [3]}])
def test_a_result_of_another_kind_is_refused(tmp_path, change):
    run(tmp_path)
    file = tmp_path / "result.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "record": {**saved["record"], **change}}))
    with pytest.raises(StateError, match=r"result\.json: .*\.$"):
        load_result(tmp_path, {})


def test_a_shipped_configuration_is_meant_where_a_folder_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "quick").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("quick").benchmark == "embedded"
