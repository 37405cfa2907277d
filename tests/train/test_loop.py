"""One run: what it measures, that it repeats itself, stops at bad losses and resumes exactly."""

import dataclasses
import gc
import json
import math
import time
import weakref

import pytest
import tiny_workload
import torch

from keeplora.methods import ZeroShot, create
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import StateError, sealed
from keeplora.train.config import parse_config
from keeplora.train.loop import NonFiniteLossError, derive_seed, run_one
from keeplora.train.record import RunRecord, load_progress

KEEP = {"r": 4, "alpha": 4.0, "learning_rate": 1e-2, "feature_energy": 0.5, "weight_energy": 0.3}
VALUES = {
    "benchmark": "tiny_workload:workload",
    "methods": ["full", "lora", "keeplora", "keeplora++"],
    "epochs": 2,
    "batch_size": 16,
    "evaluation_batch_size": 32,
    "tensorboard": False,
    "method": {
        "full": {"learning_rate": 3e-3},
        "lora": {"r": 4, "alpha": 4.0, "learning_rate": 1e-2},
        "keeplora": KEEP,
        "keeplora++": KEEP,
    },
}


def config_of(**changes):
    return parse_config({**VALUES, **changes})


@pytest.fixture(scope="module")
def workload():
    return tiny_workload.workload("cpu")


def numbers(record: RunRecord):
    """All that must repeat: not the seconds and bytes."""
    plain = dataclasses.asdict(record)
    for name in ("train_seconds", "switch_seconds", "evaluate_seconds", "inference_seconds", "peak_bytes"):
        del plain[name]
    return plain


def interrupt_at(task, step):
    def listener(event):
        if event.kind == "step" and (event.task, event.step) == (task, step):
            raise KeyboardInterrupt

    return listener


@pytest.mark.parametrize("label", ["full", "lora", "keeplora", "keeplora++"])
def test_a_run_repeats_itself_and_resumes_exactly(tmp_path, workload, label):
    config = config_of()
    straight = run_one(config, workload, label, 3)
    assert numbers(straight) == numbers(run_one(config, workload, label, 3, folder=tmp_path / "whole"))

    folder = tmp_path / "broken off"
    for task, step in ((0, 2), (1, 4), (2, 1)):  # three interruptions, the first before anything is saved
        with pytest.raises(KeyboardInterrupt):
            run_one(config, workload, label, 3, folder=folder, listener=interrupt_at(task, step))
    saved = load_progress(folder, config.identity(label, 3))
    assert saved is not None
    assert saved[0].finished_tasks == 2
    torch.randn(7)  # the generators' state where the run resumes must not matter
    assert numbers(run_one(config, workload, label, 3, folder=folder)) == numbers(straight)


def test_trained_a_stays_confined_in_a_run(workload):
    settings = {**KEEP, "train_a": True}
    config = config_of(methods=["keeplora"], method={"keeplora": settings})
    record = run_one(config, workload, "keeplora", 3)
    plain = run_one(config_of(), workload, "keeplora", 3)
    assert all(certificate["leak"] <= 1e-6 for certificate in record.certificates)
    assert record.trainable[0] > plain.trainable[0]
    assert record.loss != plain.loss


def test_a_run_that_draws_noise_resumes_exactly(tmp_path):
    config, noisy = config_of(), tiny_workload.noisy("cpu")
    torch.manual_seed(5)
    straight = run_one(config, noisy, "lora", 0)
    with pytest.raises(KeyboardInterrupt):
        run_one(config, noisy, "lora", 0, folder=tmp_path, listener=interrupt_at(1, 2))
    assert numbers(run_one(config, noisy, "lora", 0, folder=tmp_path)) == numbers(straight)
    assert straight.loss != run_one(config, tiny_workload.workload("cpu"), "lora", 0).loss


def test_every_pass_has_its_own_order(workload, monkeypatch):
    orders = {}
    plain = workload.batches

    def remember(task, batch_size, seed):
        made = plain(task, batch_size, seed)
        orders.setdefault(task, []).append(torch.cat([batch.images.flatten(1) for batch in plain(task, 16, seed)]))
        return made

    monkeypatch.setattr(workload, "batches", remember)
    run_one(config_of(), workload, "lora", 0)
    assert [len(passes) for passes in orders.values()] == [4, 4, 4]  # before, two epochs, after
    for passes in orders.values():
        for i, one in enumerate(passes):
            assert sorted(map(bytes, one.numpy())) == sorted(map(bytes, passes[0].numpy()))
            assert not any(torch.equal(one, other) for other in passes[:i])


def test_the_comparison_would_notice_a_difference(workload):
    config = config_of()
    first, other = (numbers(run_one(config, workload, "lora", seed)) for seed in (0, 1))
    assert first["loss"] != other["loss"]


def test_what_a_run_measures(workload):
    record = run_one(config_of(), workload, "full", 0)
    assert record.tasks == ["squares-0", "squares-1", "squares-2"]
    assert record.done
    assert [len(row) for row in record.accuracy] == [3, 3, 3]
    assert len(record.witness) == 3
    values = [value * 32 for row in record.accuracy for value in row]  # 32 test images
    assert all(abs(value - round(value)) < 1e-9 and 0 <= value <= 32 for value in values)
    assert sum(record.accuracy[i][i] for i in range(3)) / 3 > 0.6  # three colours: chance is a third
    assert record.steps == 3 * 2 * 3  # tasks, epochs, 48 images in batches of 16
    assert record.trainable == [sum(p.numel() for p in tiny_workload.model().parameters())] * 3
    assert record.peak_bytes > 50e6
    assert all(seconds > 0 for seconds in record.train_seconds)


def test_accuracy_is_that_of_the_model_at_that_time(workload, monkeypatch):
    """The last row, computed again from the final weights with nothing but the model's own encoders."""
    made = []

    def remember(name, model, settings):
        made.append(create(name, model, settings))
        return made[-1]

    monkeypatch.setattr("keeplora.train.loop.create", remember)
    record = run_one(config_of(precision="fp32"), workload, "keeplora", 0)
    model = made[0].model.eval()
    for number in range(3):
        task = tiny_workload.task(number)
        pixels = (task.test.images.double() / 255 - 0.5) / 0.3
        with torch.no_grad():
            image = model.encode_image(pixels.float()).double()
            text = model.encode_text(task.tokens).double()
        cosine = (image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
        right = (cosine.argmax(1) == task.test.labels).double().mean().item()
        assert record.accuracy[-1][number] == pytest.approx(right, abs=1e-12)


def test_zero_shot_takes_no_step_and_stays(workload):
    record = run_one(config_of(), workload, "zero-shot", 0)
    assert record.steps == 0
    assert record.accuracy[0] == record.accuracy[1] == record.accuracy[2]
    assert record.witness[0] == record.witness[2]
    assert record.trainable == []


def test_certificates_and_capacity_are_recorded(workload):
    record = run_one(config_of(), workload, "keeplora", 0)
    for certificate in record.certificates:
        assert certificate is not None
        assert 0 <= certificate["leak"] <= 1e-6
        assert certificate["orthogonality"] <= 5e-6
        assert len(certificate["layers"]) == 12  # q, k, v, o of three blocks
    assert {row["in_features"] for row in record.capacity} == {32}
    assert all(row["protected"] + row["free"] == 32 for row in record.capacity)


def test_validation_and_test_are_different_images(workload):
    on_test = run_one(config_of(), workload, "zero-shot", 0).accuracy[0]
    on_validation = run_one(config_of(evaluate_on="validation"), workload, "zero-shot", 0).accuracy[0]
    assert all(abs(value * 24 - round(value * 24)) < 1e-9 for value in on_validation)  # 24 validation images
    assert on_test != on_validation


def test_steps_instead_of_epochs(workload):
    values = {name: value for name, value in VALUES.items() if name != "epochs"}
    record = run_one(parse_config({**values, "steps": 5}), workload, "lora", 0)
    assert record.steps == 15


@pytest.mark.parametrize("fraction", [0.01, 0.34, 1.0])
def test_switch_fraction_limits_the_batches_a_method_sees(workload, monkeypatch, fraction):
    seen = []

    class Counting(ZeroShot):
        trains = True

        name = "counting"

        def open_task(self, loader, loss_fn):
            assert len(loader) == len(list(loader))
            seen.append([batch.labels.tolist() for batch in loader])

        def named_trained(self):
            return [("logit_scale", self.model.logit_scale)]

        def close_task(self, loader, loss_fn):
            seen.append([batch.labels.tolist() for batch in loader])

    monkeypatch.setattr("keeplora.train.loop.create", lambda name, model, settings: Counting(model))
    run_one(config_of(switch_fraction=fraction), workload, "lora", 0)
    assert {len(batches) for batches in seen} == {max(1, round(3 * fraction))}


class Pulled(ZeroShot):
    """One parameter beside the model, which only the penalty can move; every part of the protocol is counted."""

    name = "pulled"
    trains = True

    def __init__(self, model):
        super().__init__(model)
        self.beside = torch.nn.Parameter(torch.tensor(2.0))
        self.steps = 0
        self.options = []

    def named_trained(self):
        return [("logit_scale", self.model.logit_scale), ("beside", self.beside)]

    def optimizer(self, **options):
        self.options.append(options)
        return torch.optim.SGD(self.trainable_parameters(), lr=0.05)

    def penalty(self):
        return self.beside.square()

    def after_step(self):
        self.steps += 1


def test_penalty_optimizer_and_after_step_are_the_methods_own(workload, monkeypatch):
    made = []

    def remember(name, model, settings):
        made.append(Pulled(model))
        return made[-1]

    monkeypatch.setattr("keeplora.train.loop.create", remember)
    record = run_one(config_of(), workload, "lora", 0)
    assert made[0].steps == record.steps == 18
    assert made[0].options == [{"lr": 1e-2, "weight_decay": 0.01, "fused": True}] * 3
    assert 0 < made[0].beside.item() < 1.9  # d/db b² = 2 b: nothing else has a gradient here
    assert record.loss[0] > made[0].beside.item() ** 2  # the loss that is reported has the penalty


@pytest.mark.parametrize("merges", [True, False])
def test_inference_is_timed_as_it_is_used_merged_where_that_is_possible(workload, monkeypatch, merges):
    class Slow(Pulled):
        def __init__(self, model):
            super().__init__(model)
            self.merges = merges
            self.hook = model.visual.register_forward_pre_hook(lambda *_: time.sleep(0.03))

        def merge(self):
            self.hook.remove()
            return self.model

    monkeypatch.setattr("keeplora.train.loop.create", lambda name, model, settings: Slow(model))
    ours, plain = run_one(config_of(), workload, "lora", 0).inference_seconds
    assert (ours - plain > 0.015) is not merges


@pytest.mark.parametrize("label", ["lora", "keeplora"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path, label):
    config = config_of(benchmark="tiny_workload:broken")
    broken = tiny_workload.broken("cpu")
    expected = (
        r"got nan in lora, seed 0, task 2 \(squares-1\), step 3, .* epoch 1, batch 3"
        if label == "lora"
        else r"finite, got nan \[batch 2\]"  # KeepLoRA meets it in its gradient pass, which counts batches from 0
    )
    with pytest.raises((NonFiniteLossError, ValueError), match=expected) as caught:
        run_one(config, broken, label, 0, folder=tmp_path)
    assert caught.value.__notes__ == [f"in {label}, seed 0, task 2 (squares-1)"]
    saved = load_progress(tmp_path, config.identity(label, 0))
    assert saved is not None
    assert saved[0].finished_tasks == 1


def test_a_finished_run_is_read_not_repeated(tmp_path, workload):
    config = config_of()
    first = run_one(config, workload, "lora", 0, folder=tmp_path)
    events = []
    again = run_one(config, workload, "lora", 0, folder=tmp_path, listener=events.append)
    assert dataclasses.asdict(again) == dataclasses.asdict(first)
    assert [event.kind for event in events] == ["done"]
    assert not (tmp_path / "state").exists()


def test_other_settings_in_the_same_folder_are_refused(tmp_path, workload):
    with pytest.raises(KeyboardInterrupt):
        run_one(config_of(), workload, "lora", 0, folder=tmp_path, listener=interrupt_at(1, 1))
    with pytest.raises(ConfigError, match=r"other settings \(batch_size changed\)"):
        run_one(config_of(batch_size=8), workload, "lora", 0, folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("schema"), "must have schema 2, got None"),
        (lambda saved: saved.update(schema=3), "must have schema 2, got 3"),
        (lambda saved: saved["record"].pop("inference_seconds"), r"inference_seconds.*, got \['accuracy', 'capacity'"),
        (lambda saved: saved.pop("record"), "an identity and a record .*got None"),
        (lambda saved: saved.update(identity=3), "an identity and a record"),
    ],
)
def test_results_and_progress_of_another_schema_are_refused(tmp_path, workload, change, message):
    """A run that is not finished is as particular about what it goes on from."""
    finished, stopped = tmp_path / "finished", tmp_path / "stopped"
    run_one(config_of(epochs=1), workload, "lora", 0, folder=finished)
    saved = json.loads((finished / "result.json").read_text())
    change(saved)
    (finished / "result.json").write_text(json.dumps(saved))
    with pytest.raises(StateError, match=f"load_result: .*{message}"):
        run_one(config_of(epochs=1), workload, "lora", 0, folder=finished)

    with pytest.raises(KeyboardInterrupt):
        run_one(config_of(), workload, "lora", 0, folder=stopped, listener=interrupt_at(1, 1))
    saved = json.loads((stopped / "state" / "state.json").read_text())
    change(saved["meta"])
    (stopped / "state" / "state.json").write_text(json.dumps(sealed(saved)))
    with pytest.raises(StateError, match=f"load_progress: .*{message}"):
        run_one(config_of(), workload, "lora", 0, folder=stopped)


def test_a_result_that_is_no_json_is_refused(tmp_path, workload):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(StateError, match=r"load_result: .*result\.json must be JSON, got: "):
        run_one(config_of(), workload, "lora", 0, folder=tmp_path)


@pytest.mark.parametrize("label", ["full", "lora", "keeplora"])
def test_models_do_not_outlive_their_run(monkeypatch, label):
    held, fresh = [], tiny_workload.workload("cpu")
    make = fresh.model

    def watched():
        model = make()
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(fresh, "model", watched)
    gc.disable()  # what run_one itself does is looked at
    try:
        run_one(config_of(epochs=1), fresh, label, 0)
    finally:
        gc.enable()
    assert len(held) >= 3
    assert [model() for model in held] == [None] * len(held)


def test_tensorboard_scalars_of_a_resumed_run(tmp_path, workload):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tensorboard=True)
    with pytest.raises(KeyboardInterrupt):
        run_one(config, workload, "lora", 0, folder=tmp_path, listener=interrupt_at(1, 3))
    record = run_one(config, workload, "lora", 0, folder=tmp_path)
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    points = log.Scalars("accuracy/squares-1")
    assert [point.step for point in points] == [6, 12, 18]
    assert [point.value for point in points] == pytest.approx([100 * row[1] for row in record.accuracy], abs=1e-4)
    assert math.isfinite(log.Scalars("train/loss")[0].value)


def test_seeds_of_different_purposes_differ():
    seeds = {derive_seed(s, t, p) for s in range(3) for t in range(3) for p in ("before", "after", "epoch 0")}
    assert len(seeds) == 27
