"""Settings of a user's own tasks: what they say, and how wrong ones are refused."""

import pytest

from keeplora.methods.settings import ConfigError
from keeplora.train.config import load_config, parse_config, restored

MODEL = {"open_clip": "ViT-B-16", "pretrained": "openai"}
TASK = {"name": "a", "folder": "a"}


def settings(**changes):
    return {"methods": ["lora"], "epochs": 1, "model": MODEL, "task": [TASK], **changes}


def test_a_file_names_tasks_and_model_and_is_called_by_its_name(tmp_path):
    file = tmp_path / "birds.toml"
    file.write_text(
        'methods = ["lora"]\nepochs = 1\n[model]\nopen_clip = "ViT-B-16"\npretrained = "openai"\n'
        '[data]\ntest_fraction = 0.3\n[data.faults]\ngrey = "convert"\n[[task]]\nname = "a"\nfolder = "x/a"\n'
    )
    config = load_config(file)
    assert config.benchmark == "birds"
    assert config.own.tasks[0].folder == "x/a"
    assert config.own.path("x/a") == tmp_path / "x" / "a"
    assert config.own.data.action("grey") == "convert"
    assert config.own.data.action("alpha") == "refuse"


def test_yaml_gives_the_same_settings(tmp_path):
    (tmp_path / "a.toml").write_text(
        'methods = ["lora"]\nepochs = 1\n[model]\ntransformers = "m"\n[[task]]\nname = "a"\njson = "a.json"\n'
        "[method.lora]\nlearning_rate = 1e-3\n"
    )
    (tmp_path / "a.yaml").write_text(
        "methods: [lora]\nepochs: 1\nmodel: {transformers: m}\ntask:\n- name: a\n  json: a.json\n"
        "method: {lora: {learning_rate: 1e-3}}\n"  # in YAML 1.1 that is text
    )
    assert load_config(tmp_path / "a.toml") == load_config(tmp_path / "a.yaml")


def test_yaml_with_a_key_twice_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("methods: [lora]\nmethods: [gpm]\n")
    with pytest.raises(ConfigError, match=r"a\.yaml must be YAML.*methods"):
        load_config(tmp_path / "a.yaml")


def test_where_the_file_lies_and_what_is_about_speed_decide_no_numbers(tmp_path):
    def identity(folder, cache):
        folder.mkdir()
        file = folder / "t.toml"
        file.write_text(
            'methods = ["lora"]\nepochs = 1\n[model]\ntransformers = "m"\n[data]\nreaders = 3\n'
            f'cache = "{cache}"\n[[task]]\nname = "a"\nfolder = "a"\n'
        )
        return load_config(file).identity("lora", 0)

    assert identity(tmp_path / "one", "c") == identity(tmp_path / "two", "d")
    changed = parse_config(settings(data={"template": "{}."})).identity("lora", 0)
    assert changed != parse_config(settings()).identity("lora", 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {}}, "exactly one of open_clip and transformers.*none"),
        ({"model": {**MODEL, "transformers": "x"}}, "exactly one of open_clip and transformers.*both"),
        ({"model": {"open_clip": "ViT-B-16"}}, "pretrained must be given.*ViT-B-16"),
        ({"model": {"open_clp": "x"}}, "open_clp.*Did you mean 'open_clip'"),
        ({"model": {**MODEL, "dtype": "float8"}}, "dtype.*float8"),
        ({"task": []}, "tasks must hold at least one"),
        ({"task": [{"name": "a"}]}, "exactly one of folder, dataset, json.*none"),
        ({"task": [{"name": "a", "folder": "x", "json": "y"}]}, "exactly one of.*folder and json"),
        ({"task": [TASK, TASK]}, "name of its own, got 'a' twice"),
        ({"task": [{"folder": "x"}]}, "incomplete.*name"),
        ({"task": [{**TASK, "images": "x"}]}, "images must stand beside json, got 'x' beside folder"),
        ({"task": [TASK, {"name": "b", "json": "b.json"}]}, "all json.*got both"),
        ({"task": [{"name": "b", "json": "b.json"}]}, "must be one of transformers.*ViT-B-16"),
        ({"data": {"template": "a photo"}}, "template must have one {}.*'a photo'"),
        ({"data": {"test_fraction": 1.0}}, r"test_fraction must lie in \(0, 1\), got 1.0"),
        ({"data": {"faults": {"gray": "skip"}}}, "gray.*Did you mean 'grey'"),
        ({"data": {"faults": {"corrupt": "convert"}}}, "faults.corrupt must be one of refuse, skip, got 'convert'"),
        ({"data": {"evaluate_at_most": -1}}, "evaluate_at_most.*-1"),
        ({"data": {"shots": 1}}, "shots must be left out but for benchmarks of images, got 1"),
        ({"data": {"order": "II"}}, "order must be left out"),
        ({"task": [], "benchmark": "ucitt"}, "tasks must hold at least one"),
        ({"data": 3}, r"\[data\] must be a table, got 3"),
        ({"data": {"template": "a\0{}"}}, "data.template must be text that can be read, got a NUL character"),
    ],
)
def test_wrong_settings_are_refused_by_name_and_value(changes, named):
    with pytest.raises(ConfigError, match=named):
        parse_config(settings(**changes))


def test_a_misspelled_benchmark_is_told():
    values = settings(benchmark="ucitt")
    del values["task"]
    with pytest.raises(ConfigError, match=r"benchmark must be one of .*got 'ucitt'.*'ucit'"):
        parse_config(values)


def test_answers_have_the_length_that_the_benchmark_says():
    values = settings(benchmark="ucit", model={"transformers": "x"})
    del values["task"]
    assert parse_config(values).own.new_tokens == 1024
    assert parse_config({**values, "data": {"max_new_tokens": 3}}).own.new_tokens == 3
    assert parse_config(settings()).own.new_tokens == 64


def test_tasks_without_a_model_are_refused():
    values = settings()
    del values["model"]
    with pytest.raises(ConfigError, match=r"must have a table \[model\]"):
        parse_config(values)


@pytest.mark.parametrize(
    "values",
    [
        settings(witness={"name": "w", "folder": "w"}, data={"faults": {"grey": "skip"}, "evaluate_at_most": 3}),
        {**settings(benchmark="mtil", rate_factors=[1.0, 0.5]), "task": []},
    ],
)
def test_what_a_run_writes_of_its_settings_gives_them_back(values):
    config = parse_config(values)
    again = restored(config.as_dict())
    assert again.as_dict() == config.as_dict()
    assert again.identity("lora", 0) == config.identity("lora", 0)
    assert not again.changed(config.as_dict())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": []}, "epochs must hold at least one"),
        ({"epochs": [1, 0]}, r"epochs must .* 0"),
        ({"rate_factors": [0.0]}, "rate_factors must be above 0 and finite, got 0.0"),
        ({"schedule": "linear"}, "schedule must be one of one-cycle, cosine, got 'linear'"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_of_the_loop_are_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        parse_config(settings(**changes))


@pytest.mark.parametrize(("name", "told"), [("a" * 300, "a name of 300 bytes"), ("a/" * 3000, "a path of 6000 bytes")])
def test_paths_that_no_file_system_has_are_refused(name, told):
    own = parse_config(settings()).own
    with pytest.raises(ConfigError, match=told):
        own.path(name)
