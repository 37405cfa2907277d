"""What cannot be used is refused in one sentence that begins with the call the user made."""

import ast
import dataclasses
import inspect
import sys

import pytest
import tiny_workload
import torch
from pages import PUBLIC, ROOT
from torch import nn

import keeplora
from keeplora._calls import INNER, public
from keeplora._messages import warn
from keeplora.integrations import shard
from keeplora.integrations.accelerate import resume
from keeplora.lora import select_targets
from keeplora.methods import METHODS, AdapterConfig
from keeplora.plan import Setting, plan
from keeplora.tasks import load_workload
from keeplora.tasks.own import DataSettings, ModelSource, OwnTasks, TaskSource

DATA = [torch.ones(4, 8), torch.zeros(4, 8)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)


def loss_fn(model, batch):
    return model(batch).square().mean()


def keeper():
    return keeplora.KeepLora(net(), keeplora.KeepLoraConfig(r=2, target_modules="all-linear", feature_energy=0.5))


@pytest.fixture(params=METHODS)
def entry(request):
    pytest.importorskip("peft")
    return METHODS[request.param]


@pytest.mark.parametrize("config", ["x", {"r": 2}, 3])
def test_settings_of_another_kind(entry, config):
    with pytest.raises(
        TypeError, match=rf"^\w+: config must be a {entry.config.__name__}, got .*{type(config).__name__}"
    ):
        entry.build(tiny_workload.model(), config)


@pytest.mark.parametrize("model", ["folder", None])
def test_something_else_than_a_model(entry, model):
    with pytest.raises(TypeError, match=rf"^\w+: model must be a torch.nn.Module, got {type(model).__name__}"):
        entry.build(model)


@pytest.mark.parametrize(("name", "here"), [("lora_alpha", "alpha"), ("lora_dropout", "dropout"), ("rank", "r")])
def test_names_that_peft_has_for_settings(entry, name, here):
    known = [field.name for field in dataclasses.fields(entry.config)]
    remedy = f"It is called '{here}' here" if here in known else "(Nearest names: .|It has no settings|.* go into set)"
    with pytest.raises(TypeError, match=rf"^{entry.config.__name__}: settings .*got {name}=4\. {remedy}"):
        entry.config(**{name: 4})
    with pytest.raises(ValueError, match=rf"^create: settings .*'{name}'\. {remedy}"):
        keeplora.create(next(key for key, value in METHODS.items() if value is entry), net(), {name: 4})


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda k: k.before_task(None, loss_fn), TypeError, "before_task: loader must .* got NoneType"),
        (lambda k: k.before_task("abc", loss_fn), TypeError, "before_task: loader must .* got str"),
        (lambda k: k.before_task(loss_fn, DATA), TypeError, "before_task: loss_fn must .* got list"),
        (lambda k: k.before_task([], loss_fn), ValueError, "before_task: loader must .* got none"),
        (lambda k: k.before_task(DATA, lambda m, b: m(b)), ValueError, r"before_task: loss_fn must .* got shape"),
        (lambda k: k.before_task(DATA, loss_fn, batch_size=4), TypeError, "before_task: batch_size must .* got 4"),
        (lambda k: k.after_task(3), RuntimeError, "after_task: a task must be open"),
        (lambda k: k.save(None), TypeError, "save: path must .* got None"),
        (lambda k: k.export_peft(5), TypeError, "export_peft: path must .* got 5"),
        (lambda k: k.import_peft(None), TypeError, "import_peft: path must .* got None"),
        (lambda k: k.load_state("folder"), TypeError, "load_state: state must .* got str"),
        (lambda k: keeplora.load("/nowhere", net()), ValueError, "load: /nowhere/state.json must exist"),
        (lambda k: keeplora.KeepLora.load(None, net()), TypeError, "load: path must .* got None"),
        (lambda k: k.from_pretrained("folder"), TypeError, "from_pretrained: model must .* got none. Load it first"),
        (lambda k: k.from_pretrained("folder", "x"), TypeError, "from_pretrained: model must .* got str"),
        (lambda k: keeplora.create("lora", net(), "r"), TypeError, "create: settings must .* got str"),
        (lambda k: keeplora.create(net(), "lora"), TypeError, "create: name must .* got Sequential"),
        (lambda k: keeplora.create("lora", net(), {"target_modules": "q"}), ValueError, "create: target_modules"),
        (lambda k: keeplora.KeepLora(net(), targets=["0"]), TypeError, r"KeepLora: targets must .* got \['0'\]"),
        (lambda k: keeplora.KeepLora(net(), targets="0"), TypeError, "KeepLora: targets must .* got '0'"),
        (lambda k: keeplora.KeepLora(net(), token_mask=5), TypeError, "KeepLora: token_mask must .* got 5"),
        (lambda k: keeplora.find_targets("x"), TypeError, "find_targets: model must .* got str"),
        (lambda k: keeplora.run_benchmark("x"), TypeError, "run_benchmark: config must .* got str"),
        (lambda k: keeplora.load_config(None), TypeError, "load_config: path must .* got None"),
        (lambda k: keeplora.comparison(None), TypeError, "comparison: benchmark must .* got None"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(call, error, said):
    known = keeper()
    before = known.digest()
    with pytest.raises(error, match=f"^{said}"):
        call(known)
    assert known.digest() == before


@pytest.mark.parametrize("call", ["export_peft", "import_peft"])
def test_what_needs_peft_says_so(call, monkeypatch, tmp_path):
    known = keeper()
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"^{call}: peft must be installed, got none\. Run pip install"):
        getattr(known, call)(tmp_path)


def test_after_task_is_named_too():
    known = keeper()
    known.before_task(DATA, loss_fn)
    for loader, loss, said in (
        (None, None, "loader must yield batches, got NoneType"),
        (DATA, 3, "loss_fn must be a function of (model, batch), got 3"),
        ([], None, "loader must yield at least one batch, got none"),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            known.after_task(loader, loss)
        assert str(caught.value).startswith(f"after_task: {said}")


def test_the_outermost_call_is_named():
    @public
    def inner():
        warn("mean_gradients: a warning")
        select_targets([], "all-linear")  # its messages begin with its name

    @public
    def outer():
        inner()

    with pytest.warns(UserWarning, match=r"^outer: a warning"), pytest.raises(ValueError, match=r"^outer: "):
        outer()
    with pytest.warns(UserWarning, match=r"^inner: "), pytest.raises(ValueError, match=r"^inner: "):
        inner()


def test_what_others_say_is_left_alone():
    @public
    def call(message):
        raise ValueError(message)

    for message in ("addmm: shapes", "KeepLoraConfig: r must", "no colon", "wrap: of a user's own function", 3):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what is looked at)
            call(message)
        assert caught.value.args == (message,)


def test_an_error_of_the_users_own_function_is_left_alone():
    def failing(model, batch):
        raise ValueError("wrap: my own words")

    with pytest.raises(ValueError, match=r"^wrap: my own words"):
        keeper().before_task(DATA, failing)


MADE_HERE = {"Capacity", "Comparison", "LayerCapacity", "LayerCertificate", "RetentionCertificate", "RunRecord",
             "State", "StateError", "SubspaceState"}  # fmt: skip
"""Classes that users are given, and do not make."""
CALLS = {
    name: getattr(keeplora, name)
    for name in keeplora.__all__
    if name not in {*MADE_HERE, "METHODS", "Method", "__version__"}
}
CALLS |= {kind.__name__: kind for kind in (ModelSource, DataSettings, TaskSource, OwnTasks, Setting, AdapterConfig)}
CALLS |= {call.__name__: call for call in (shard, resume, load_workload, plan)}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_is_not_known_is_refused_with_the_name_that_was_meant(name):
    call = CALLS[name]
    known = list(inspect.signature(call).parameters)
    meant = max(known, key=len)
    said = f"(settings|arguments) do not include '{meant}s', got {meant}s=0.1. Nearest names: {meant}"
    with pytest.raises(TypeError, match=rf"^{call.__name__}: {said}\b"):
        call(**{f"{meant}s": 0.1})


def test_an_argument_that_no_method_knows(entry):
    with pytest.raises(TypeError, match=r"^\w+: arguments do not include 'progres', got .*\. Nearest names: pro"):
        entry.build(tiny_workload.model(), progres=False)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: keeplora.MethodConfig("lora", lr=1e-3), "MethodConfig: .* got lr=0.001. It is called 'learning_rate'"),
        (lambda: keeplora.MethodConfig("lora", lora_alpha=8), "MethodConfig: .*go into settings={'alpha': …}"),
        (lambda: keeplora.MethodConfig("lora", feature_energy=1), "MethodConfig: .*go into settings={'feature_energy'"),
        (lambda: keeplora.RunConfig("embedded", (), lr=1e-3), r"RunConfig: .*MethodConfig\('lora', learning_rate=…\)"),
        (lambda: keeplora.RunConfig("embedded", (), r=8), r"RunConfig: .*MethodConfig\('lora', settings={'r': …}\)"),
        (lambda: keeplora.RunConfig("embedded", (), num_train_epochs=3), "RunConfig: .*It is called 'epochs' here"),
        (lambda: keeplora.KeepLora(net(), lora_alpha=8), r"KeepLora: .*goes into config=KeepLoraConfig\(alpha=…\)"),
        (lambda: keeplora.KeepLora(net(), r=8), r"KeepLora: .*goes into config=KeepLoraConfig\(r=…\)"),
        (lambda: keeplora.create("lora", net(), rank=8), "create: .*go into settings={'r': …}"),
        (
            lambda: keeper().before_task(dataloader=DATA),
            "before_task: .*got dataloader=a list. It is called 'loader'",
        ),
        (lambda: keeper().save(folder="x"), "save: .* got folder='x'. Nearest names: path"),
    ],
)
def test_names_of_other_libraries_and_of_other_places(call, said):
    with pytest.raises(TypeError, match=f"^{said}"):
        call()


def test_a_type_error_inside_of_a_call_stays_what_it_is():
    def loss(model, batch):
        return model(batch, wrong=1)

    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        keeper().before_task(DATA, loss)


def test_no_message_begins_with_a_function_that_nobody_calls():
    """Of the rooms below the calls of a task: every message begins with a public name, or with one that is replaced."""
    named = set()
    for room in ("families", "lora", "methods", "statistics"):
        for path in sorted((ROOT / "keeplora" / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and getattr(node.func, "id", "").endswith(("Error", "warn"))
                    and node.args
                ):
                    first = node.args[0]
                    first = first.values[0] if isinstance(first, ast.JoinedStr) else first
                    text = first.value if isinstance(first, ast.Constant) else ""
                    name, colon, _ = text.partition(": ") if isinstance(text, str) else ("", "", "")
                    named |= {name} if colon and name.isidentifier() else set()
    known = {name for place in PUBLIC for name in dir(__import__(place, fromlist=["_"]))}
    made = [kind for entry in METHODS.values() for kind in (entry.build, entry.config)]
    known |= {kind.__name__ for kind in made} | {name for kind in made for name in dir(kind)} | {"Lines"}
    assert {"before_task", "mean_gradients"} <= named
    assert sorted(named - known - INNER) == []
