"""A user's own image tasks with a two-tower model of transformers."""

import pytest
import torch
import transformers
from PIL import Image
from tasks.own.places import write_classes, write_clip

from keeplora.methods.settings import ConfigError
from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, TaskSource, open_workload
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder / "model")
    write_classes(folder / "light", 8)
    write_classes(folder / "dark", 8, prefix="dark_")
    return folder


def own(place, **data):
    tasks = TaskSource("light", folder="light"), TaskSource("dark", folder="dark")
    return OwnTasks(ModelSource(transformers="model"), tasks, DataSettings(cache="cache", **data), base=str(place))


def test_features_are_those_of_the_plain_model_with_its_processor(place):
    workload = open_workload(own(place))
    model = transformers.AutoModel.from_pretrained(place / "model").eval()
    processor = transformers.AutoProcessor.from_pretrained(place / "model")
    task = workload.task(1)
    files = sorted((place / "dark").glob("*/*.png"))
    inputs = processor(
        text=list(task.texts),
        images=[Image.open(file).convert("RGB") for file in files],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        right = model(**inputs).logits_per_image.argmax(1) == task.labels
    got = workload.correct(workload.model(), 1, "test", 4)
    assert torch.equal(got, right[task.places["test"]])


@pytest.mark.parametrize("method", ["lora", "keeplora"])
def test_it_learns_and_what_is_saved_is_the_same(place, tmp_path, method):
    workload = open_workload(own(place))
    settings = {"r": 4, "target_modules": ["self_attn"], "learning_rate": 1e-2}
    config = parse_config(
        {"benchmark": "x", "methods": [method], "steps": 50, "batch_size": 8, "precision": "fp32", "workers": 0,
         "method": {method: settings}}
    )  # fmt: skip
    record = run_one(config, workload, method, 0)
    assert record.accuracy[0][0] >= 0.8
    model = workload.model()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    workload.save_model(model, tmp_path / "out")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_texts_beyond_the_context_are_refused(place):
    with pytest.raises(ConfigError, match="6 are texts longer than the model's context in light, dark"):
        open_workload(own(place, template="a photo of a photo of a photo of a {}."))


def test_a_model_that_compares_nothing_is_refused(place):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(place / "bert")
    transformers.AutoProcessor.from_pretrained(place / "model").save_pretrained(place / "bert")
    tasks = own(place).tasks
    with pytest.raises(ConfigError, match="must compare images with texts, got BertModel"):
        open_workload(OwnTasks(ModelSource(transformers="bert"), tasks, base=str(place)))
