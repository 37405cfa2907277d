"""The benchmarks as data agree with what is published of them."""

import json
from pathlib import Path

import pytest

from keeplora.methods.settings import ConfigError
from keeplora.tasks.field import BENCHMARKS, image_benchmark, instruction_benchmark
from keeplora.tasks.scoring import DOMAINS


def test_all_are_there():
    assert BENCHMARKS == ("cl-vista", "mllm-dcl", "mtil", "mtil-coop", "ucit", "x-tail")


def test_mtil():
    mtil = image_benchmark("mtil")
    sets = mtil.in_order("I")
    assert [each.classes for each in sets] == [100, 101, 100, 47, 10, 102, 101, 10, 37, 196, 397]
    assert [each.test for each in sets] == [3333, 1736, 10000, 1880, 5400, 6149, 25250, 10000, 3669, 8041, 21751]
    for name, whole in {"Caltech101": 8677, "EuroSAT": 27000, "SUN397": 108754}.items():
        each = mtil.sets[name]
        assert (each.train, each.train + each.test) == (int(0.8 * whole), whole)
    assert [len(each.names) for each in sets] == [0, 101, 0, 0, 10, 102, 0, 0, 0, 0, 0]
    assert mtil.published["zero-shot"] == (69.4, 65.3, 65.3)
    assert "DPW" not in mtil.published  # it is on the other splits
    assert image_benchmark("mtil-coop").published == {"DPW": (70.4, 79.3, 88.3)}


def test_x_tail_is_one_label_space_of_1100():
    x_tail = image_benchmark("x-tail")
    assert sum(each.classes for each in x_tail.in_order("I")) == 1100
    assert x_tail.one_label_space
    assert x_tail.shots == 16
    assert {each.template for each in x_tail.sets.values()} == {"a photo of a {}."}
    assert x_tail.sets["mnist"].class_format.format("0 - zero") == 'number: "0 - zero"'
    assert x_tail.sets["eurosat"].class_format.format("River") == "River satellite location"
    assert "aircraft" in x_tail.sets
    assert "cifar100" not in x_tail.sets
    assert len(image_benchmark("mtil-coop").sets) == 11


@pytest.mark.parametrize("name", ["mtil", "mtil-coop", "x-tail"])
def test_every_image_benchmark_is_consistent(name):
    benchmark = image_benchmark(name)
    assert set(benchmark.orders) == {"I", "II"}
    for order in benchmark.orders:
        assert sorted(benchmark.orders[order]) == sorted(benchmark.sets)
    assert benchmark.orders["I"] != benchmark.orders["II"]
    for each in benchmark.sets.values():
        assert all(template.count("{}") == 1 for template in (each.template, each.class_format, *each.templates))
        assert len(set(each.templates)) == len(each.templates)
        assert len(set(each.names)) in (0, each.classes)
        assert each.folders
        assert each.needs


def test_instruction_benchmarks():
    ucit, dcl, vista = map(instruction_benchmark, ("ucit", "mllm-dcl", "cl-vista"))
    assert [task.name for task in ucit.tasks if task.scoring == "captions"] == ["VizWiz", "Flickr30k"]
    assert all(bool(task.captions) == (task.scoring == "captions") for task in ucit.tasks)
    assert [task.scoring for task in dcl.tasks] == [f"MLLM-DCL {domain}" for domain in DOMAINS]
    assert [task.name for task in vista.tasks] == [
        "Counting", "Space", "Traffic", "Movie", "GUI", "Science", "Sports", "STAR"
    ]  # fmt: skip
    assert all(task.answers for task in vista.tasks)
    assert [each.max_new_tokens for each in (ucit, dcl, vista)] == [1024, 128, 256]


def test_unknown_names_are_refused():
    with pytest.raises(
        ConfigError, match=r"name must be one of mtil, mtil-coop, x-tail, got 'mtill'. Did you mean 'mtil'"
    ):
        image_benchmark("mtill")
    with pytest.raises(ConfigError, match="name must be one of cl-vista, mllm-dcl, ucit, got 'mtil'"):
        instruction_benchmark("mtil")
    with pytest.raises(ConfigError, match="order must be one of I, II, got 'III'"):
        image_benchmark("mtil").in_order("III")


def test_published_means_are_those_of_the_published_matrices():
    printed = json.loads((Path(__file__).parents[2] / "report/data/mtil_order1.json").read_text())
    published = image_benchmark("mtil").published
    assert list(published["ZSCL"]) == printed["ZSCL / order I"]["mean"]
    assert list(published["continual fine-tuning"]) == printed["Continual FT / order I"]["mean"]
