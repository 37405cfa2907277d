"""A model that answers, as a workload: what it is trained on, how it is scored, and that runs repeat and resume."""

import json
from collections import Counter

import pytest
import tiny_vlm
import torch
from torch.nn.functional import cross_entropy

import keeplora
from keeplora.statistics import feature_statistics
from keeplora.tasks.own.answer_workload import AnswerWorkload
from keeplora.tasks.own.config import TaskSource
from keeplora.tasks.workload import ItemWorkload
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one

# llava-hf's, in short: no end token
NO_END = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>\n{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
KINDS = {
    "llava": tiny_vlm.llava,
    "llava with a template": lambda folder: tiny_vlm.llava(folder, template=NO_END),
    "qwen2-vl": tiny_vlm.qwen,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: make(folder / kind.replace(" ", "-")) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tasks = [tiny_vlm.colours(folder, "warm", ("red", "blue")), tiny_vlm.colours(folder, "cold", ("green", "white"))]
    return folder, tasks


@pytest.fixture(scope="module", params=["llava", "qwen2-vl"])
def workload(request, models, data):
    return AnswerWorkload(tiny_vlm.own(data[0], models[request.param], *data[1]))


def of_samples(folder, model, samples, **data):
    (folder / "s.json").write_text(json.dumps(samples))
    source = TaskSource("s", json="s.json", test="s.json", validation="s.json")
    return AnswerWorkload(tiny_vlm.own(folder, model, source, **data))


def batch_of(workload, samples, side="right"):
    ((group, media),) = workload._loaded([samples])
    return workload.training_batch(group, media, side=side)


def talks(folder):
    """Several turns, several images, none; questions that hold the words of answers."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        tiny_vlm.picture(folder / f"{name}.png", colour, size=(16, 8) if name == "b" else (8, 8))
    said = ["<image>\nIs it red? red", "red", "Is red blue?", "no", "<image> red ASSISTANT: red", "red"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return [
        {"image": ["a.png", "b.png"], "conversations": turns},
        {"image": "c.png", "text": "red <image>", "answer": "a longer answer than others"},
        {"text": "What is red?", "answer": "red"},
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_answers_and_their_ends_have_labels(tmp_path, models, kind, side):
    workload = of_samples(tmp_path, models[kind], talks(tmp_path))
    samples = workload.samples(0, "train")
    batch = batch_of(workload, samples, side)
    ids, labels, tokenizer = batch["input_ids"], batch["labels"], workload._processor.tokenizer
    end, space = tokenizer.eos_token, " " if kind.startswith("llava") else ""
    counted = labels != -100
    assert torch.equal(labels[counted], ids[counted])
    assert not (counted & (batch["attention_mask"] == 0)).any()
    assert (batch["attention_mask"] == 0)[:, 0 if side == "left" else -1].any()
    for row, answers in enumerate([["red", "no", "red"], ["a longer answer than others"], ["red"]]):
        assert tokenizer.decode(ids[row][counted[row]]) == "".join(f"{space}{answer}{end}" for answer in answers)
        starts = (counted[row].int().diff(prepend=torch.tensor([0])) == 1).nonzero().flatten().tolist()
        assert len(starts) == len(answers)
        name = "assistant\n" if kind == "qwen2-vl" else "ASSISTANT:"
        assert all(tokenizer.decode(ids[row, :start]).endswith(name) for start in starts)


def test_the_loss_is_the_mean_over_the_answers_tokens(workload):
    model, batch = workload.model(), next(iter(workload.batches(0, 5, 0)))
    loss = workload.loss(model, batch)
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model.double()(**{n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}).logits
    labels = batch["labels"]
    counted = labels[:, 1:] != -100
    assert int(counted.sum()) < labels.numel() / 2
    terms = cross_entropy(logits[:, :-1][counted].double(), labels[:, 1:][counted], reduction="none")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(terms.mean().item(), rel=1e-5)


def test_in_bfloat16_the_loss_is_still_of_float32(models, data):
    own = tiny_vlm.own(data[0], models["llava"], *data[1])
    half = AnswerWorkload(own.__class__(own.model.__class__(transformers=own.model.transformers, dtype="bfloat16"),
                                        own.tasks, own.data, base=own.base))  # fmt: skip
    model, batch = half.model(), next(iter(half.batches(0, 5, 0)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {batch["pixel_values"].dtype}
    assert half.loss(model, batch).dtype == torch.float32
    assert len(half.predictions(model, 0, "validation", 4)) == len(half.samples(0, "validation"))


def test_the_seed_alone_decides_the_order(workload):
    def order(seed, size=4):
        made = workload.batches(1, size, seed)
        batches = list(made)
        assert len(made) == len(batches)
        return [
            tuple(row.tolist()) for batch in batches for row in batch["pixel_values"].reshape(len(batch["labels"]), -1)
        ]

    first = order(3)
    torch.rand(5)
    assert first == order(3) == order(3, size=5)
    assert first != order(4)
    assert Counter(first) == Counter(order(4))
    assert len(set(first)) == len(workload.samples(1, "train"))


def test_padding_stays_out_of_the_features(tmp_path, models):
    """With the default targets, and on either side: the sums of a padded batch are those of its samples alone."""
    for kind in ("llava", "qwen2-vl"):
        workload = of_samples(tmp_path, models[kind], talks(tmp_path))
        samples = workload.samples(0, "train")
        keeper = keeplora.KeepLora(workload.model(), keeplora.KeepLoraConfig(r=2))
        names = [slot.name for slot in keeper.slots]
        assert len(names) == 8  # q, k, v and o of two layers
        assert all("language_model" in name and "self_attn" in name for name in names)

        def moments(batches, keeper=keeper, workload=workload):
            with keeplora.families.token_mask(keeper.model) as mask:
                return feature_statistics(keeper.model, keeper.slots, batches, workload.loss, token_mask=mask)

        alone = moments([batch_of(workload, [sample]) for sample in samples])
        for side in ("left", "right"):
            batch = batch_of(workload, samples, side)
            together = moments([batch])
            for one, other in zip(together, alone, strict=True):
                assert one.tokens == other.tokens == int(batch["attention_mask"].sum())
                torch.testing.assert_close(one.moment, other.moment, rtol=2e-5, atol=2e-5 * other.energy)
        unmasked = feature_statistics(keeper.model, keeper.slots, [batch], workload.loss)
        assert unmasked[0].tokens > alone[0].tokens


@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_answers_do_not_depend_on_the_batch_and_keep_their_order(tmp_path, models, kind):
    """Questions of different lengths, with two images, one and none."""
    workload = of_samples(tmp_path, models[kind], talks(tmp_path) * 2)
    model = workload.model().train()
    plain, lengths = model.generate, []

    def generate(**inputs):
        tokens = plain(**inputs)
        lengths.append(tokens.shape[1] - inputs["input_ids"].shape[1])
        return tokens

    model.generate = generate
    one, four = (workload.predictions(model, 0, "test", size) for size in (1, 4))
    assert one == four
    assert one[:3] == one[3:]
    assert len(set(one)) > 1
    assert model.training
    assert max(lengths) == 4  # max_new_tokens


def test_how_an_answer_is_scored(workload, monkeypatch):
    samples = workload.samples(0, "test")
    answers = [sample.answer for sample in samples]
    given = [f" {answers[0].upper()}\n", f"{answers[1]}.", *answers[2:]]
    monkeypatch.setattr(workload, "predictions", lambda *args: given)
    right = workload.correct(None, 0, "test", 4)
    assert right.dtype == torch.bool
    assert right.tolist() == [True, False, *[True] * (len(answers) - 2)]
    assert workload.accuracy(None, 0, "test", 4) == (len(answers) - 1) / len(answers)


def config(**changes):
    rates = {"r": 8, "alpha": 8.0, "learning_rate": 3e-2}
    return parse_config(
        {
            "benchmark": "x:y", "methods": ["lora", "keeplora"], "epochs": 12, "batch_size": 8,
            "evaluation_batch_size": 8, "tensorboard": False,
            "method": {"lora": rates, "keeplora": {**rates, "feature_energy": 0.5, "weight_energy": 0.3}},
            **changes,
        }
    )  # fmt: skip


def numbers(record):
    return record.accuracy, record.witness, record.loss, record.steps, record.certificates


@pytest.mark.parametrize("label", ["lora", "keeplora"])
def test_two_tasks_are_learned_and_a_run_resumes_exactly(tmp_path, models, data, label):
    own = tiny_vlm.own(
        data[0], models["llava"], *data[1], witness=tiny_vlm.colours(data[0], "rest", ("red", "white"), 6)
    )
    workload = AnswerWorkload(own)
    assert isinstance(workload, ItemWorkload)
    losses, stop = [], [False]

    def listener(event):
        if event.kind == "step":
            losses.append((event.task, event.loss))
            if stop[0] and (event.task, event.step) == (1, 2):
                raise KeyboardInterrupt

    straight = run_one(config(), workload, label, 0, listener=listener)
    for task in (0, 1):
        mine = [loss for number, loss in losses if number == task]
        assert mine[-1] < 0.6 * mine[0]
    assert workload.accuracy(workload.model(), 0, "test", 8) == 0
    assert straight.accuracy[0][0] >= 0.75  # a model that saw no image would get half of them
    assert straight.accuracy[1][1] >= 0.75
    assert len(straight.witness) == 2

    stop[0] = True
    with pytest.raises(KeyboardInterrupt):
        run_one(config(), workload, label, 0, folder=tmp_path, listener=listener)
    stop[0] = False
    resumed = run_one(config(), AnswerWorkload(own), label, 0, folder=tmp_path)
    assert numbers(resumed) == numbers(straight)


def test_merged_weights_answer_as_the_adapters_did(workload):
    keeper = keeplora.KeepLora(workload.model(), keeplora.KeepLoraConfig(r=4, target_modules="all-linear"))
    batches = list(workload.batches(0, 8, 0))
    keeper.before_task(batches, workload.loss)
    optimizer = keeper.optimizer(lr=1e-2)
    for batch in batches * 3:
        workload.loss(keeper.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    pretrained = workload.predictions(workload.model(), 0, "test", 4)
    with_adapters = workload.predictions(keeper.model, 0, "test", 4)
    keeper.after_task(batches, workload.loss)
    assert workload.predictions(keeper.model, 0, "test", 4) == with_adapters
    assert workload.predictions(keeper.merge(), 0, "test", 4) == with_adapters != pretrained


def test_the_copies_of_the_model_are_fresh(workload):
    first = workload.model()
    with torch.no_grad():
        next(first.parameters()).add_(1)
    second, third = workload.model().state_dict(), workload.model().state_dict()
    assert all(torch.equal(second[name], third[name]) for name in third)
    assert not torch.equal(next(iter(first.state_dict().values())), next(iter(third.values())))


def test_the_fingerprint_tells_data_and_models_apart(tmp_path, models):
    model, samples = models["llava"], talks(tmp_path)
    first = of_samples(tmp_path, model, samples)
    assert first.fingerprint() == of_samples(tmp_path, model, samples).fingerprint()
    (tmp_path / "moved").mkdir()
    moved = of_samples(tmp_path / "moved", model, talks(tmp_path / "moved"))
    assert moved.fingerprint() == first.fingerprint()
    tiny_vlm.picture(tmp_path / "c.png", "green", size=(9, 8))
    others = [of_samples(tmp_path, model, samples).fingerprint()]
    samples[2]["answer"] = "Red"
    others.append(of_samples(tmp_path, model, samples).fingerprint())
    others.append(of_samples(tmp_path, models["llava with a template"], samples).fingerprint())
    with torch.no_grad():
        first._model.lm_head.weight[0, 0] += 1
    assert len({moved.fingerprint(), first.fingerprint(), *others}) == 5


def test_notes_tell_how_and_of_what(tmp_path, models):
    samples = talks(tmp_path)
    samples[0]["image"][0] = "none.png"
    made = {kind: of_samples(tmp_path, model, samples, faults={"missing": "skip"}) for kind, model in models.items()}
    notes = {kind: "\n".join(workload.notes()) for kind, workload in made.items()}
    assert all("at most 4 tokens" in text and "none.png (no such file): left out" in text for text in notes.values())
    assert r"USER: <image>\nquestion ASSISTANT: answer</s>" in notes["llava"]
    assert "</s> added behind every answer" in notes["llava with a template"]
    assert "added" not in notes["qwen2-vl"]


def test_contents_of_a_split_are_other_where_its_evaluation_may_be(tmp_path, models):
    model, samples = models["llava"], talks(tmp_path)

    def contents(model=model, **data):
        return of_samples(tmp_path, model, samples, **data).contents(0, "test")

    first = contents()
    assert first == contents()
    others = [contents(max_new_tokens=3), contents(evaluate_at_most=2), contents(models["llava with a template"])]
    samples[2]["answer"] = "Red"
    others.append(contents())
    tiny_vlm.picture(tmp_path / "c.png", "green", seed=1)
    others.append(contents())
    assert len({first, *others}) == 6


def test_reading_a_model_draws_no_bars_and_leaves_them_to_others(tmp_path, models, capfd):
    from transformers.utils import logging

    AnswerWorkload(tiny_vlm.own(tmp_path, models["llava"], tiny_vlm.colours(tmp_path, "warm", ("red", "blue"), 6)))
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    for _ in logging.tqdm([1], desc="Loading weights"):
        pass
    assert "Loading weights" in capfd.readouterr().err  # what is asserted above can fail
