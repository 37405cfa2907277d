"""The field's instruction benchmarks end to end: small files in the real forms, tiny models of real classes."""

import json

import pytest
import tiny_vlm
import torch
from tasks.field.test_instructions import coco, put, rows_of, train_row

from keeplora.methods.settings import ConfigError
from keeplora.tasks.field import instruction_benchmark
from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, open_workload
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vlm.llava(tmp_path_factory.mktemp("model") / "llava")


def own(root, model, benchmark, **data):
    settings = DataSettings(root=str(root), max_new_tokens=4, validation_fraction=0.0, **data)
    return OwnTasks(ModelSource(transformers=str(model)), (), settings, base=str(root), benchmark=benchmark)


def ucit(root, tests=3):
    """UCIT with images that can be opened."""
    for task in instruction_benchmark("ucit").tasks:
        folder = task.folders[0]
        train = [f"{folder}/train/{number}.jpg" for number in range(4)]
        test = [f"{folder}/test/{number}.jpg" for number in range(tests)]
        for number, image in enumerate([*train, *test]):
            tiny_vlm.picture(root / "datasets" / image, "red", seed=number)
        put(root / folder / task.train, [train_row(image) for image in train])
        put(root / folder / task.test, rows_of(test))
        if task.captions:
            put(root / folder / task.captions, coco(tests))
    return root


def test_ucit_is_learned_generated_and_scored_task_after_task(tmp_path, model):
    workload = open_workload(own(ucit(tmp_path), model, "ucit"))
    assert list(workload.tasks) == [task.name for task in instruction_benchmark("ucit").tasks]
    config = parse_config(
        {"benchmark": "x", "methods": ["lora"], "steps": 1, "batch_size": 4, "precision": "fp32", "workers": 0,
         "method": {"lora": {"r": 2, "target_modules": "all-linear"}}}
    )  # fmt: skip
    record = run_one(config, workload, "lora", 0)
    assert len(record.accuracy) == 6
    assert any("METEOR by NLTK" in note for note in workload.notes())
    with pytest.raises(ConfigError, match="'VizWiz' must be right or wrong for a paired test, got captions"):
        workload.correct(workload.model(), 2, "test", 2)


def test_every_rule_scores_what_the_model_wrote(tmp_path, model, monkeypatch):
    workload = open_workload(own(ucit(tmp_path), model, "ucit"))
    written = {0: ["X", "y", " x\n"], 2: ["1 0", "2 1", "what is this"]}
    monkeypatch.setattr(workload, "predictions", lambda model, task, split, size: written[task])
    assert workload.accuracy(None, 0, "test", 2) == pytest.approx(2 / 3)
    assert torch.equal(workload.correct(None, 0, "test", 2), torch.tensor([True, False, True]))
    assert 0.3 < workload.accuracy(None, 2, "test", 2) <= 1.0  # two of three captions are references


def test_mllm_dcl_asks_in_its_own_words_and_scores_by_domain(tmp_path, model, monkeypatch):
    for task in instruction_benchmark("mllm-dcl").tasks:
        for image in ("a.jpg", "b.jpg"):
            tiny_vlm.picture(tmp_path / "Domain_data" / task.name / "images" / image, "red")
        rows = [{**row, "answer": "yes"} for row in rows_of(["images/b.jpg", "images/a.jpg"])]
        put(tmp_path / "Domain_data" / task.name / "train.json", [train_row("images/a.jpg")])
        put(tmp_path / "Domain_data" / task.name / "test.json", rows)
    workload = open_workload(own(tmp_path, model, "mllm-dcl"))
    questions = [workload.samples(number, "test")[0].question for number in range(5)]
    assert questions[1] == "What? Answer the question with a single word (or phrase)."
    assert questions[4] == "What? Only answer with yes or no directly."
    monkeypatch.setattr(workload, "predictions", lambda model, task, split, size: ["Y e s.", "it is yes"])
    assert [workload.accuracy(None, number, "test", 2) for number in range(5)] == [0.5, 0.5, 0.5, 0.5, 0.5]
    assert workload.correct(None, 4, "test", 2).tolist() == [True, False]
    assert workload.correct(None, 1, "test", 2).tolist() == [False, True]


def test_a_file_that_is_missing_is_refused_unless_it_may_be_left_out(tmp_path, model):
    root = ucit(tmp_path)
    (root / "datasets/IconQA/test/1.jpg").unlink()
    with pytest.raises(ConfigError, match="IconQA"):
        open_workload(own(root, model, "ucit"))
    workload = open_workload(own(root, model, "ucit", faults={"missing": "skip"}))
    assert workload.evaluated(3) == 2
    assert any("1 of 3 questions" in note for note in workload.notes())


def test_a_quick_look_asks_fewer_questions(tmp_path, model):
    workload = open_workload(own(ucit(tmp_path), model, "ucit", evaluate_at_most=2))
    assert [workload.evaluated(number) for number in range(6)] == [2] * 6
    assert any("at most 2 samples of a split" in note for note in workload.notes())


def test_an_exported_model_answers_as_the_run_did(tmp_path, model):
    import transformers

    task = tiny_vlm.colours(tmp_path, "warm", ("red", "blue"), count=6)
    workload = open_workload(tiny_vlm.own(tmp_path, model, task))
    trained = workload.model()
    with torch.no_grad():
        trained.get_output_embeddings().weight.mul_(-1.0)
    before = workload.predictions(workload.model(), 0, "test", 4)
    expected = workload.predictions(trained, 0, "test", 4)
    assert expected != before
    workload.save_model(trained, tmp_path / "out")
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    loaded.generation_config = trained.generation_config
    assert workload.predictions(loaded, 0, "test", 4) == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
