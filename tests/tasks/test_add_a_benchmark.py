"""The benchmark of docs/add-a-benchmark.md, as printed there: it is found, and a method learns it."""

import shutil
from pathlib import Path

import pages
import pytest
import torch

from keeplora.methods.settings import ConfigError
from keeplora.report.info import describe
from keeplora.tasks import Workload, benchmarks, load_workload
from keeplora.train.config import parse_config
from keeplora.train.loop import run_one

PAGE = pages.ROOT / "docs" / "add-a-benchmark.md"
VALUES = {
    "benchmark": "waves", "methods": ["keeplora"], "steps": 30, "batch_size": 32, "workers": 0, "tensorboard": False,
    "method": {"keeplora": {"r": 4, "alpha": 8.0, "target_modules": "all-linear", "learning_rate": 1e-2}},
}  # fmt: skip


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The names of the page's blocks; the benchmark is known while the test runs."""
    monkeypatch.chdir(tmp_path)
    before = benchmarks()
    with pages.running(PAGE, tmp_path) as names:
        yield names
    assert (
        benchmarks()
        == before
        == tuple(f"{name}{small}" for name in ("clip-b16", "embedded", "minilm") for small in ("", "-small"))
    )


def test_the_folder_is_found_by_its_name(page):
    assert benchmarks()[-2:] == ("waves", "waves-small")
    assert "waves-small" in describe()
    assert list(load_workload("waves").tasks) == ["low", "middle", "high"]
    assert list(load_workload("waves-small").tasks) == ["low", "middle"]


def test_it_is_a_workload(page):
    made, again = load_workload("waves"), load_workload("waves")
    assert isinstance(made, Workload)
    assert made.witness == "highest"
    assert made.fingerprint() == again.fingerprint() != load_workload("waves-small").fingerprint()
    one, two, other = (torch.cat([y for _, y in made.batches(0, 32, seed)]) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort().values, other.sort().values)


def test_a_method_learns_it(page):
    record = run_one(parse_config(VALUES), load_workload("waves"), "keeplora", 0)
    assert record.tasks == ["low", "middle", "high"]
    assert all(record.accuracy[i][i] > 0.7 for i in range(3)), record.accuracy  # a third is chance
    assert all(certificate["leak"] <= 1e-6 for certificate in record.certificates)


def test_the_pages_run_has_its_records(page):
    records = page["keeplora"].run_benchmark(page["config"])  # read back, not run again
    assert [record.label for record in records] == ["zero-shot", "lora", "keeplora"]
    assert (Path("runs/waves") / "runs" / "keeplora" / "seed-0" / "result.json").is_file()


def test_what_it_needs_is_told_with_the_command(page, tmp_path):
    """And nothing but the folder's name is looked at before."""
    file = tmp_path / "keeplora" / "tasks" / "whales" / "workload.py"
    shutil.copytree(file.parents[1] / "waves", file.parent)
    needs = 'NEEDS = {"no_such_library": "pip install whales", "torch": "pip install torch"}'
    file.write_text(f"{file.read_text()}\n{needs}\n")
    assert "whales" in benchmarks()
    with pytest.raises(ConfigError, match=r"'whales' must have .* got no no_such_library. Run pip install whales"):
        load_workload("whales")


def test_a_folder_without_a_workload_is_none(page, tmp_path):
    (tmp_path / "keeplora" / "tasks" / "waves" / "workload.py").unlink()
    assert "waves" not in benchmarks()
    with pytest.raises(ConfigError, match="got 'waves'"):
        load_workload("waves")
