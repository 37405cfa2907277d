"""A run of one task: Transfer, Forgetting and BWT are means over nothing, and nowhere a 0."""

import csv
import json

import numpy as np
import pytest
from html_page import Page
from made_folders import keep
from made_records import record_of

from keeplora.report import report_run
from keeplora.report.comparison import ONE_TASK, report_comparison
from keeplora.report.fronts_table import report_fronts
from keeplora.report.page import page_html
from keeplora.report.page.read import read_run
from keeplora.train.config import parse_config

UNDEFINED = ("transfer", "forgetting", "bwt")


def run_of(label, right):
    items = np.arange(20) < right
    rest = {"trainable": [], "steps": 0} if label == "zero-shot" else {}
    return record_of([[items]], label, **rest)


@pytest.fixture
def one_task(tmp_path):
    config = parse_config({"benchmark": "embedded", "methods": ["lora", "gpm"], "epochs": 1, "out": str(tmp_path)})
    return config, [run_of(label, right) for label, right in (("zero-shot", 5), ("lora", 15), ("gpm", 10))]


@pytest.mark.parametrize("report", [report_run, report_comparison])
def test_files_tables_and_page_say_that_there_is_none(one_task, tmp_path, report):
    config, records = one_task
    keep(config, records)
    text = report(config, records)
    header, _, *lines = text.splitlines()[1:]
    place = header.index("Transfer")
    assert [line[place : place + 8].strip() for line in lines[:3]] == ["–"] * 3
    assert ONE_TASK in text
    values = json.loads((tmp_path / "summary.json").read_text())["methods"]["lora"]
    assert [values[name] for name in UNDEFINED] == [None] * 3
    assert values["last"] == {"mean": 75.0, "std": None}
    with (tmp_path / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["method"] == "lora")
    assert [row[name] for name in UNDEFINED] == [""] * 3
    assert not (tmp_path / "last-transfer.png").exists()
    page = Page(page_html([read_run(tmp_path)]))
    results = page.table("Accuracy on the test split")
    assert [row[1] for row in results[1:]] == ["–"] * 3
    assert results[2][results[0].index("Forgetting")] == "–"
    assert ONE_TASK in page.text


def test_a_table_of_methods_has_a_dash_for_what_is_undefined_and_nothing_for_what_was_not_measured(one_task):
    config, records = one_task
    from keeplora.report.comparison import table_rows
    from keeplora.report.summary import summarize

    header, zero, lora, _ = table_rows(summarize(config, records))
    assert [lora[header.index(name)] for name in ("Transfer", "Forgetting")] == ["–", "–"]
    assert zero[header.index("Transfer")] == "–"
    assert zero[header.index("ms/step")] == ""  # the untouched model takes no step


def test_rates_of_one_task_are_chosen_by_last_alone(tmp_path):
    rates = {"lora@0.1": 8, "lora@0.2": 15, "lora@0.4": 11}
    method = {label: {"method": "lora", "learning_rate": float(label[5:])} for label in rates}
    config = parse_config({"benchmark": "embedded", "methods": list(rates), "method": method, "epochs": 1,
                           "evaluate_on": "both", "out": str(tmp_path)})  # fmt: skip
    records = [run_of("zero-shot", 5), *(run_of(label, right) for label, right in rates.items())]
    keep(config, records)
    text = report_fronts(config, {"lora": list(rates)}, records)
    saved = json.loads((tmp_path / "fronts.json").read_text())
    assert [saved["chosen"][allowance]["lora"]["label"] for allowance in ("0", "3")] == ["lora@0.2"] * 2
    assert set(saved["zero_shot"]["test"]) == {"avg", "last"}
    assert ONE_TASK in text
    assert not (tmp_path / "fronts.png").exists()
    with (tmp_path / "fronts.csv").open() as file:
        assert {row["transfer_mean"] for row in csv.DictReader(file)} == {""}
    page = Page(page_html([read_run(tmp_path)]))
    assert page.table("Transfer may fall 3 points")[1][2] == "–"
