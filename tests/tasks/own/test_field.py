"""The field's image benchmarks through the same workload: tiny data in the real formats, a tiny model."""

import pytest
import torch
from tasks.field import made
from tasks.own.places import write_model
from torchvision.datasets import Flowers102

from keeplora.methods.settings import ConfigError
from keeplora.tasks import field
from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, open_workload
from keeplora.train.config import load_config, parse_config, shipped_configs, with_data
from keeplora.train.loop import run_one


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("field")
    write_model(folder / "model")
    for name, spec in field.image_benchmark("mtil").sets.items():
        made.MTIL[name](folder / "data" / spec.folders[0])
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    unchecked = {key: (name, None) for key, (name, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", unchecked)
    tiny = made.small(field.image_benchmark("mtil"))
    monkeypatch.setattr("keeplora.tasks.field.read.image_benchmark", lambda name: tiny)
    monkeypatch.setattr("keeplora.tasks.own.image_workload.image_benchmark", lambda name: tiny)
    return tiny


def own(root, **data):
    settings = DataSettings(cache="cache", root="data", validation_fraction=0.0, **data)
    return OwnTasks(ModelSource(open_clip="local-dir:model"), (), settings, base=str(root), benchmark="mtil")


def test_all_data_sets_are_tasks_in_order_and_are_learned(root):
    workload = open_workload(own(root))
    assert tuple(workload.tasks) == made.small(field.image_benchmark("mtil")).orders["I"]
    assert workload.task(0).texts == (
        "a photo of a 707-320, a type of aircraft.",
        "a photo of a A 340, a type of aircraft.",
    )
    assert len(workload.task(7).places["test"]) == 3
    config = parse_config(
        {"benchmark": "x", "methods": ["lora"], "steps": 1, "batch_size": 4, "precision": "fp32", "workers": 0,
         "method": {"lora": {"r": 2, "target_modules": ["attn"]}}}
    )  # fmt: skip
    record = run_one(config, workload, "lora", 0)
    assert len(record.accuracy) == 11
    assert "Caltech101: 80 % for training, drawn with seed 42" in workload.notes()


def test_one_label_space_is_scored_over_the_texts_of_all_tasks(root, small, monkeypatch):
    import dataclasses

    xtail = dataclasses.replace(small, one_label_space=True)
    monkeypatch.setattr("keeplora.tasks.own.image_workload.image_benchmark", lambda name: xtail)
    workload = open_workload(own(root))
    model = workload.model()
    tasks = [workload.task(number) for number in range(11)]
    every = torch.cat([task.tokens for task in tasks])
    with torch.no_grad():
        texts = model.encode_text(every, normalize=True)
        chosen = tasks[7]
        x = workload._model.normalised(chosen.images[chosen.places["test"]], torch.float32)
        nearest = (model.encode_image(x, normalize=True) @ texts.T).argmax(1)
    before = sum(len(task.classes) for task in tasks[:7])
    right = nearest == chosen.labels[chosen.places["test"]] + before
    assert torch.equal(workload.correct(model, 7, "test", 2), right)
    assert any("nearest of those of all tasks' classes" in line for line in workload.notes())


def test_a_root_that_is_not_said_or_not_there_is_refused(root):
    with pytest.raises(ConfigError, match="root must say where the data of mtil is, got none"):
        open_workload(OwnTasks(ModelSource(open_clip="local-dir:model"), (), base=str(root), benchmark="mtil"))
    with pytest.raises(ConfigError, match=r"got no folder .*nowhere"):
        open_workload(own(root / "nowhere"))
    (root / "empty" / "data").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"11 of 11 missing"):
        open_workload(own(root / "empty"))


def test_shipped_configurations_of_benchmarks_are_read_and_take_their_data_from_the_command_line():
    names = [name for name in shipped_configs() if load_config(name).own is not None]
    assert {"mtil-1", "mtil-2", "mtil-1-cls", "mtil-2-cls", "x-tail"} <= set(names)
    config = load_config("mtil-1")
    assert len(config.epochs) == 11
    assert config.epochs[-1] == 5
    assert with_data(config.own, "/somewhere").data.root == "/somewhere"
    with pytest.raises(ConfigError, match="--data must go with one of"):
        with_data(None, "/somewhere")


def test_tasks_beside_a_benchmark_are_refused():
    values = {"benchmark": "mtil", "methods": ["lora"], "epochs": 1, "model": {"transformers": "x"}}
    with pytest.raises(ConfigError, match="has its own tasks"):
        parse_config({**values, "task": [{"name": "a", "folder": "b"}]})
    del values["model"]
    with pytest.raises(ConfigError, match=r"must have a table \[model\]"):
        parse_config(values)
