"""`keeplora run tasks.toml` as a user gives it: dry run, run, interruption, and what is left for other libraries."""

import json
import shutil
import sys

import open_clip
import pytest
import torch
from PIL import Image
from tasks.own.places import write_classes, write_model

from keeplora.cli import main
from keeplora.train.config import load_config
from keeplora.train.loop import run_one
from keeplora.train.record import run_folder
from keeplora.train.workload import configured_workload

SETTINGS = """
methods = ["lora", "keeplora"]
epochs = 4
batch_size = 8
workers = 0
precision = "fp32"
tensorboard = false

[model]
open_clip = "local-dir:model"

[data]
cache = "cache"

[[task]]
name = "light"
folder = "light"

[[task]]
name = "dark"
folder = "dark"

[method.lora]
learning_rate = 3e-3

[method.keeplora]
learning_rate = 3e-3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A settings file, a model and two tasks, with runs in `whole`."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model")
    write_classes(folder / "light", 10)
    write_classes(folder / "dark", 10, prefix="dark_")
    (folder / "tasks.toml").write_text(SETTINGS)
    assert main(["run", str(folder / "tasks.toml"), "--out", str(folder / "whole"), "--export"]) == 0
    return folder


def last_row(folder):
    return json.loads((folder / "result.json").read_text())["record"]["accuracy"][-1]


def test_the_run_has_learned_and_says_so(place, capsys):
    assert main(["run", str(place / "tasks.toml"), "--out", str(place / "whole")]) == 0  # finished: read, not repeated
    shown = capsys.readouterr()
    assert "21 train, 3 validation, 6 test images; 'a photo of a blue.'" in shown.err
    assert "keeplora" in shown.out
    assert json.loads((place / "whole" / "summary.json").read_text())["benchmark"] == "tasks"
    assert min(last_row(run_folder(place / "whole", "lora", 0))) == 1.0


def test_the_run_has_a_page(place, capsys):
    assert main(["report", str(place / "whole"), "--out", str(place / "page.html")]) == 0
    page = (place / "page.html").read_text()
    assert "keeplora" in page
    assert "light" in page


@pytest.mark.parametrize("label", ["lora", "keeplora"])
def test_the_exported_model_is_as_good_in_plain_open_clip(place, label):
    folder = run_folder(place / "whole", label, 0)
    where = f"local-dir:{folder / 'export' / 'model'}"
    model, _, preprocess = open_clip.create_model_and_transforms(where)
    tokenize, model = open_clip.get_tokenizer(where), model.eval()
    workload = configured_workload(load_config(place / "tasks.toml"), "cpu")
    for number, (name, accuracy) in enumerate(zip(("light", "dark"), last_row(folder), strict=True)):
        task = workload.task(number)
        files = sorted((place / name).glob("*/*.png"))
        images = torch.stack([preprocess(Image.open(files[place]).convert("RGB")) for place in task.places["test"]])
        with torch.no_grad():
            texts = model.encode_text(tokenize(list(task.texts)), normalize=True)
            scores = model.encode_image(images, normalize=True) @ texts.T
        right = scores.argmax(1) == task.labels[task.places["test"]]
        assert right.float().mean().item() == pytest.approx(accuracy)


def test_the_exported_adapter_is_one_of_peft(place):
    folder = run_folder(place / "whole", "keeplora", 0) / "export"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (folder / "adapter").iterdir()
    }
    assert "open_clip.create_model_and_transforms" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("kind", "library"), [("adapter", "peft"), ("model", "open_clip")])
def test_what_is_exported_has_a_card_with_the_runs_figures(place, kind, library):
    import huggingface_hub as hub

    folder = run_folder(place / "whole", "keeplora", 0)
    card = hub.ModelCard.load(folder / "export" / kind / "README.md")
    assert (card.data.library_name, card.data.model_name) == (library, "keeplora, seed 0")
    assert card.data.base_model is None  # a folder of this machine is no id on the Hub
    assert [(each.dataset_name, each.metric_value) for each in card.data.eval_results] == [
        (name, pytest.approx(value, abs=1e-4)) for name, value in zip(("light", "dark"), last_row(folder), strict=True)
    ]
    record = json.loads((folder / "result.json").read_text())["record"]
    for task, proof in enumerate(record["certificates"], 1):
        assert f"| {task} | {proof['leak_after_rounding']:.1e} | {proof['leak']:.1e} |" in card.text
    for said in (
        '"learning_rate": 0.003',
        '"epochs": 4',
        '"weight_energy"',
        "Not protected:",
        "`model`, which is no id",
    ):
        assert said in card.text, said
    assert str(place) not in card.text
    assert "this folder" in card.text
    assert (f"import {library}" if kind == "model" else "PeftModel") in card.text


def test_a_run_that_was_killed_goes_on_and_ends_the_same(place):
    class Killed(BaseException):
        pass

    def kill_in_the_second_task(event):
        if event.kind == "step" and event.task == 1:
            raise Killed

    config = load_config(place / "tasks.toml")
    folder = run_folder(place / "broken", "keeplora", 0)
    with pytest.raises(Killed):
        run_one(
            config, configured_workload(config, "cpu"), "keeplora", 0, folder=folder, listener=kill_in_the_second_task
        )
    record = run_one(config, configured_workload(config, "cpu"), "keeplora", 0, folder=folder)
    whole = json.loads((run_folder(place / "whole", "keeplora", 0) / "result.json").read_text())["record"]
    assert record.accuracy == whole["accuracy"]
    assert record.loss == whole["loss"]


def test_a_dry_run_tells_time_and_memory_and_writes_nothing(place, capsys):
    before = sorted(place.rglob("*"))
    only = ["--methods", "keeplora", "--out", str(place / "dry"), "--workers", "0"]
    assert main(["run", str(place / "tasks.toml"), "--dry-run", *only]) == 0
    shown = capsys.readouterr().out
    assert "keeplora: " in shown
    assert "2 runs of 2 tasks, 1 at a time: about " in shown
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_of_steps_and_on_another_device(place, capsys):
    (place / "steps.toml").write_text(SETTINGS.replace("epochs = 4", 'steps = 3\ndevice = "cuda"'))
    only = ["--methods", "lora", "--out", str(place / "dry"), "--device", "cpu"]
    assert main(["run", str(place / "steps.toml"), "--dry-run", *only]) == 0
    assert "lora: " in capsys.readouterr().out


def test_a_dry_run_refuses_what_a_run_would(place, capsys):
    text = SETTINGS.replace("[method.lora]", "[method.lora]\nrank = 3")
    (place / "wrong.toml").write_text(text)
    assert main(["run", str(place / "wrong.toml"), "--dry-run"]) == 2
    assert "rank" in capsys.readouterr().err


def test_an_export_of_runs_that_kept_no_state_is_refused(place, capsys):
    folder = place / "stateless"
    shutil.copytree(place / "whole", folder)
    shutil.rmtree(run_folder(folder, "keeplora", 0) / "state")
    assert main(["run", str(place / "tasks.toml"), "--out", str(folder), "--export"]) == 2
    told = capsys.readouterr().err
    assert "must hold the state of the run" in told
    assert "seed-0" in told


def test_without_peft_an_export_is_refused_before_training(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    assert main(["run", str(place / "tasks.toml"), "--out", str(place / "none"), "--export"]) == 2
    assert "peft must be installed, got none. Run pip install 'keeplora[peft]', or leave" in capsys.readouterr().err
    assert not (place / "none").exists()


def test_a_benchmark_is_not_exported(tmp_path, capsys):
    assert main(["run", "quick", "--out", str(tmp_path), "--dry-run", "--export"]) == 2
    assert "must be of your own tasks" in capsys.readouterr().err


def test_a_split_without_images_is_refused_before_training(place, capsys):
    text = SETTINGS.replace("[data]", "[data]\nvalidation_fraction = 0").replace(
        "workers = 0", 'workers = 0\nevaluate_on = "validation"'
    )
    (place / "empty.toml").write_text(text)
    assert main(["run", str(place / "empty.toml"), "--out", str(place / "empty")]) == 2
    assert "every task must have validation data" in capsys.readouterr().err
    assert not (place / "empty").exists()
