"""Classification tasks as a workload."""

import dataclasses

import tiny_workload
import torch

from keeplora.tasks.classification import ClassificationWorkload, Split
from keeplora.tasks.workload import Workload


def test_it_is_a_workload():
    made = tiny_workload.workload("cpu")
    assert isinstance(made, Workload)
    assert list(made.tasks) == ["squares-0", "squares-1", "squares-2"]
    assert made.witness == "squares-9"
    assert ClassificationWorkload([tiny_workload.task(0)], None, tiny_workload.model).witness is None


def test_the_fingerprint_follows_data_and_weights():
    task = tiny_workload.task(0)
    first = ClassificationWorkload([task], None, tiny_workload.model).fingerprint()
    assert first == ClassificationWorkload([tiny_workload.task(0)], None, tiny_workload.model).fingerprint()
    images = task.test.images.clone()
    images[5, 1, 2, 3] += 1
    other = dataclasses.replace(task, test=Split(images, task.test.labels))
    assert first != ClassificationWorkload([other], None, tiny_workload.model).fingerprint()

    def moved():
        model = tiny_workload.model()
        with torch.no_grad():
            model.logit_scale += 1e-6
        return model

    assert first != ClassificationWorkload([task], None, moved).fingerprint()
    assert first != ClassificationWorkload([task], tiny_workload.task(1), tiny_workload.model).fingerprint()


def test_every_model_is_a_fresh_copy():
    made = tiny_workload.workload("cpu")
    one, two = made.model(), made.model()
    assert one is not two
    with torch.no_grad():
        one.logit_scale += 1
    assert two.logit_scale != one.logit_scale
