"""KeepLoRA++cls: classifiers that start at class means and take part where their classes are scored."""

import copy
from types import SimpleNamespace

import pytest
import tiny_workload
import torch
from torch import nn

from keeplora.methods import State, create
from keeplora.methods.keeplora_cls.classifiers import CosineClassifiers
from keeplora.methods.keeplora_cls.method import KeepLoraCls, KeepLoraClsConfig
from keeplora.tasks.classification import Batch, accuracy, classification_loss, loader, normalize
from tests.close import assert_rounded

CONFIG = KeepLoraClsConfig(r=1, weight_energy=0.1, feature_energy=0.4, target_modules=("q_proj",))


def data(task, batch_size=16):
    return loader(task.train, task.tokens, batch_size, seed=0)


def learn(keeper, task):
    keeper.before_task(data(task), classification_loss)
    optimizer = keeper.optimizer(lr=1e-2)
    for batch in data(task):
        optimizer.zero_grad()
        classification_loss(keeper.model, batch).backward()
        optimizer.step()
    return keeper.after_task(data(task))


@pytest.fixture(scope="module")
def learned():
    """Two tasks learned, and the tasks."""
    tasks = [tiny_workload.task(n) for n in range(3)]
    keeper = KeepLoraCls(tiny_workload.model(), CONFIG)
    for task in tasks[:2]:
        learn(keeper, task)
    return keeper, tasks


def text_logits(model, images, tokens):
    features = model.encode_image(images, normalize=True)
    return features, model.logit_scale.exp() * features @ model.encode_text(tokens, normalize=True).T


def logits(model, images, tokens):
    features, scores = text_logits(model, images, tokens)
    return model.keeplora_head(scores, features, tokens)


def test_a_classifier_starts_at_the_class_means():
    model, task = tiny_workload.model(), tiny_workload.task(0)
    task.train.labels[task.train.labels == 2] = 1  # a class without an image
    keeper = KeepLoraCls(model, CONFIG)
    with pytest.warns(UserWarning, match="1 of 3 classes had no image"):
        keeper.before_task(data(task), classification_loss)
    twin = copy.deepcopy(tiny_workload.model()).double()
    with torch.no_grad():
        features = twin.encode_image(normalize(task.train.images).double())
        text = twin.encode_text(task.tokens)[2]
    start = torch.zeros(3, 16, dtype=torch.float64)
    for f, label in zip(features, task.train.labels.tolist(), strict=True):
        start[label] += f / f.square().sum().sqrt()
    start[2] = text
    start /= start.square().sum(1, keepdim=True).sqrt()
    weight = keeper.trainable_parameters()[-1]
    assert weight.shape == (3, 16)
    assert_rounded(weight, start, terms=4096, what="class means")  # a forward of float32 layers


def test_logits_are_the_sum_of_both(learned):
    keeper, tasks = learned
    task, weight = tasks[1], keeper.head.tasks[1].weight
    with torch.no_grad():
        features, scores = text_logits(keeper.model, normalize(task.test.images), task.tokens)
        found = keeper.model.keeplora_head(scores, features, task.tokens)
    w, f = weight.detach().double(), features.double()
    cosine = f @ w.T / (f.norm(dim=1, keepdim=True) * w.norm(dim=1))
    assert_rounded(found, scores.double() + 30 * cosine, terms=16, what="logits")


def test_classes_that_were_not_learned_keep_the_logits_of_their_texts(learned):
    keeper, tasks = learned
    images = normalize(tasks[0].test.images[:4])
    mixed = torch.cat([tasks[0].tokens, tasks[2].tokens[:1]])
    with torch.no_grad():
        for tokens in (tasks[2].tokens, mixed):
            assert torch.equal(logits(keeper.model, images, tokens), text_logits(keeper.model, images, tokens)[1])


def test_classes_are_known_in_any_order_and_across_tasks(learned):
    keeper, tasks = learned
    images = normalize(tasks[0].test.images[:4])
    order = torch.tensor([4, 1, 3, 0])
    union = torch.cat([tasks[0].tokens, tasks[1].tokens])
    with torch.no_grad():
        separate = torch.cat([logits(keeper.model, images, task.tokens) for task in tasks[:2]], dim=1)
        torch.testing.assert_close(logits(keeper.model, images, union[order]), separate[:, order])


def test_of_two_tasks_with_the_same_prompts_the_later_counts():
    head, tokens = CosineClassifiers(2.0), torch.tensor([[1, 2], [3, 4]])
    weights = [torch.randn(2, 5) for _ in range(2)]
    for weight in weights:
        head.add(weight, tokens)
    assert torch.equal(head.rows(tokens), weights[1])
    assert torch.equal(head.rows(tokens.flip(0)), weights[1].flip(0))


def test_evaluation_uses_the_classifiers_and_batches_of_one_agree(learned):
    keeper, tasks = learned
    assert accuracy(keeper.model, tasks[1]) > accuracy(tiny_workload.model(), tasks[1])
    assert accuracy(keeper.model, tasks[1], batch_size=1) == accuracy(keeper.model, tasks[1])
    kept, keeper.head.tasks = keeper.head.tasks, nn.ModuleList()
    without = accuracy(keeper.model, tasks[1])
    keeper.head.tasks = kept
    assert without != accuracy(keeper.model, tasks[1])


def test_a_later_task_leaves_earlier_classifiers_alone(learned):
    keeper, tasks = learned
    other = KeepLoraCls(tiny_workload.model(), CONFIG)
    learn(other, tasks[0])
    first = other.head.tasks[0].weight.clone()
    assert not other.head.tasks[0].weight.requires_grad
    assert torch.equal(first, keeper.head.tasks[0].weight)


def test_save_and_load_in_the_middle_of_a_task(tmp_path, learned):
    _, tasks = learned
    keeper = KeepLoraCls(tiny_workload.model(), CONFIG)
    learn(keeper, tasks[0])
    keeper.before_task(data(tasks[1]), classification_loss)
    keeper.save(tmp_path / "state")
    other = KeepLoraCls.load(tmp_path / "state", tiny_workload.model())
    assert other.config == CONFIG
    assert [p.requires_grad for p in other.head.parameters()] == [False, True]
    assert len(other.trainable_parameters()) == len(keeper.trainable_parameters())
    for one in (keeper, other):
        optimizer = one.optimizer(lr=1e-2)
        classification_loss(one.model, next(iter(data(tasks[1])))).backward()
        optimizer.step()
        one.after_task(data(tasks[1]), classification_loss)
    images = normalize(tasks[1].test.images)
    with torch.no_grad():
        assert torch.equal(*(logits(one.model, images, tasks[1].tokens) for one in (keeper, other)))


def test_damaged_states_are_refused_before_anything_changes(learned):
    keeper, _ = learned
    fresh = KeepLoraCls(tiny_workload.model(), CONFIG)
    before = copy.deepcopy(fresh.model.state_dict())
    whole = keeper.state()
    for damage, message in (
        (
            State({**whole.tensors, "classifier.1.tokens": torch.zeros(2, 6, dtype=torch.int64)}, whole.meta),
            r"classifier\.1\.weight must have shape \[2, None\], got \[3, 16\]",
        ),
        (State(whole.tensors, {**whole.meta, "classifiers": 1}), "classifiers must be one for each of 2 tasks, got 1"),
        (State(whole.tensors, {**whole.meta, "method": "keeplora"}), "must be of method"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.load_state(damage)
    assert all(torch.equal(before[k], v) for k, v in fresh.model.state_dict().items())


def test_models_without_image_features_are_refused_untouched():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"must have image features .* got Sequential\. Use keeplora\+\+"):
        create("keeplora++cls", model)
    assert type(model[0]) is nn.Linear


def test_losses_and_batches_without_what_is_needed_are_refused_before_training():
    model, task = tiny_workload.model(), tiny_workload.task(0)
    keeper = KeepLoraCls(model, CONFIG)

    def bare(model, batch):
        scores = text_logits(model, normalize(batch.images), batch.tokens)[1]
        return nn.functional.cross_entropy(scores, batch.labels)

    with pytest.raises(TypeError, match="loss_fn must"):
        keeper.before_task(data(task), bare)
    with pytest.raises(TypeError, match=r"labels, integers \[16\], got NoneType"):
        keeper.before_task([tuple(batch) for batch in data(task)], lambda m, b: classification_loss(m, Batch(*b)))
    with pytest.raises(ValueError, match="every batch must"):
        keeper.before_task([next(iter(data(task))), next(iter(data(tiny_workload.task(1))))], classification_loss)
    assert not keeper.training_task
    assert not len(keeper.head.tasks)
    assert all(slot.adapter is None for slot in keeper.slots)


def test_several_processes_are_refused_before_anything_changes(monkeypatch):
    keeper, task = KeepLoraCls(tiny_workload.model(), CONFIG), tiny_workload.task(0)
    monkeypatch.setattr("keeplora.methods.keeplora_cls.method.processes", lambda: SimpleNamespace(size=2))
    with pytest.raises(RuntimeError, match=r"class means .*got 2"):
        keeper.before_task(data(task), classification_loss)
    assert not keeper.training_task


def test_a_classifier_that_is_not_finite_is_refused():
    task = tiny_workload.task(0)
    keeper = KeepLoraCls(tiny_workload.model(), CONFIG)
    keeper.before_task(data(task), classification_loss)
    with torch.no_grad():
        keeper.trainable_parameters()[-1][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"must be finite, got NaN or Inf \[classifier\]"):
        keeper.after_task(data(task))
    assert keeper.training_task


@pytest.mark.parametrize(("value", "kind"), [(0.0, ValueError), (float("inf"), ValueError), ("30", TypeError)])
def test_bad_settings_are_refused(value, kind):
    with pytest.raises(kind, match="classifier_scale must be a"):
        KeepLoraClsConfig(classifier_scale=value)


def test_random_directions_are_refused_because_no_pass_would_see_the_classes():
    with pytest.raises(ValueError, match=r"directions must be 'gradient', got 'random'.* Use keeplora\+\+"):
        KeepLoraClsConfig(directions="random")
