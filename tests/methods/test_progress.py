"""Bars: what they count, when they are silent, and that they do not change what is computed."""

import functools
import io
import re
from contextlib import redirect_stderr

import pytest
import torch
from torch import nn
from tqdm import tqdm

from keeplora import KeepLora, KeepLoraConfig
from keeplora.methods.progress import for_all_layers, progress

WIDTH = 8


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Every count is drawn, at once."""
    monkeypatch.setattr("keeplora.methods.progress.PATIENCE", 0)
    monkeypatch.setattr("keeplora.methods.progress.tqdm", functools.partial(tqdm, mininterval=0, miniters=1))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(batches=4):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, WIDTH, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(batches)
    ]


def keeper_of(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    settings = {"r": 2, "target_modules": "all-linear", "feature_energy": 0.5, "data_fraction": 0.5}
    return KeepLora(model, KeepLoraConfig(**settings), **options)


def learn(keeper, stream):
    with redirect_stderr(stream):
        keeper.before_task(data(), loss_fn)
        return keeper.after_task(data())


def counts(stream):
    """What each bar has shown: name, done, of how many, and whether it told a remaining time."""
    shown = re.findall(r"(\w+): +\d+%\|[^|]*\| (\d+)/(\d+) \[\d\d:\d\d<(\S+),", stream.getvalue())
    return {(name, int(done), int(total)): remaining != "?" for name, done, total, remaining in shown}


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_every_phase_counts_its_batches_or_layers(stream):
    learn(keeper_of(progress=True), stream)
    phases = {"gradients": 2, "weights": 2, "adapters": 2, "features": 4, "bases": 2, "merge": 2}
    seen = counts(stream)
    steps = {(name, done, total) for name, total in phases.items() for done in range(total + 1)}
    assert set(seen) == steps - {("merge", 1, 2)}  # all layers at once
    assert all(told == (done > 0) for (_, done, _), told in seen.items())
    assert not stream.getvalue().split("\r")[-1].strip()  # bars vanish


@pytest.mark.parametrize(("stream", "shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_a_terminal_decides_unless_told(stream, shown):
    learn(keeper_of(), stream)
    assert bool(counts(stream)) is shown


def test_short_passes_draw_nothing_unless_told(monkeypatch):
    monkeypatch.setattr("keeplora.methods.progress.PATIENCE", 60)
    stream = Terminal()
    learn(keeper_of(), stream)
    assert not stream.getvalue()
    learn(keeper_of(progress=True), stream)
    assert counts(stream)


def test_told_to_be_quiet_is_quiet():
    stream, keeper = Terminal(), keeper_of(progress=True)
    learn(keeper_of(progress=False), stream)
    keeper.progress = False
    learn(keeper, stream)
    assert not stream.getvalue()


def test_a_loaded_keeper_is_as_quiet_as_it_is_asked_to_be(tmp_path):
    keeper_of().save(tmp_path)
    assert KeepLora.load(tmp_path, keeper_of().merge(), progress=False).progress is False


def test_bars_change_nothing():
    assert learn(keeper_of(progress=True), Terminal()) == learn(keeper_of(progress=False), Terminal())


def test_loaders_without_a_length_are_counted():
    stream = Terminal()
    with redirect_stderr(stream), progress((i for i in range(3)), "items", "item", shown=True) as items:
        assert list(items) == [0, 1, 2]
    assert "items: 3item" in stream.getvalue()


def test_an_error_takes_the_bar_away_and_names_its_layers():
    stream = Terminal()
    with redirect_stderr(stream), pytest.raises(ValueError, match="batch 1"):
        keeper_of(progress=True).before_task(
            [data()[0], (torch.full((8, WIDTH), torch.nan), data()[0][1])] * 2, loss_fn
        )
    assert not stream.getvalue().split("\r")[-1].strip()

    keeper = keeper_of()

    def fail(group):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        for_all_layers(keeper.slots, fail, "layers", shown=False)
    assert caught.value.__notes__ == ["in 0"]
