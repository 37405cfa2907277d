"""The page of `keeplora report`: its structure, its numbers, what it says of folders as they are, and in a browser."""

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from made_folders import LABELS, TASKS, config_of, keep, record_of
from made_records import record_of as record_with_items

from keeplora import cli
from keeplora._files import write_json
from keeplora.methods.settings import ConfigError
from keeplora.methods.state import State, StateError
from keeplora.report.page import page_html, write_page
from keeplora.report.page.read import read_run
from keeplora.report.page.sections import TERMS
from keeplora.report.summary import METRICS, summarize
from keeplora.train.record import run_folder, save_progress, save_result


@pytest.fixture
def finished(tmp_path):
    """The settings and records of a finished run, whose folder is there."""
    config = config_of(tmp_path / "mine")
    records = [record_of(label, seed) for label, seed in config.pairs()]
    keep(config, records)
    write_json(f"{config.out}/summary.json", summarize(config, records))
    return config, records


def page_of(*folders):
    return Page(page_html([read_run(folder) for folder in folders]))


def test_structure_can_be_read_by_everyone(finished):
    config, _ = finished
    text = page_html([read_run(config.out)])
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == len(page.all("main")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), page.headings
    assert {"Results", "Accuracy matrices", "Capacity", "Certificates", "Costs", "Settings", "Environment"} <= {
        heading for _, heading in page.headings
    }
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for _, a in page.elements if "href" in a]
    assert "#main" in targets
    assert any("run-1-curves" in target for target in targets)  # markers of a chart
    targets += re.findall(r"url\((.*?)\)", text)
    assert {target[0] for target in targets} == {"#"}
    assert {target[1:] for target in targets} <= set(ids)
    boxes = [attributes for _, attributes in page.elements if "scroll" in (attributes.get("class") or "").split()]
    assert len(boxes) == len(page.all("table")) + len(page.all("svg"))
    assert all(box["tabindex"] == "0" and box["aria-label"] and box["role"] == "region" for box in boxes)
    assert len(page.tables) == len(page.all("table"))  # a caption each, none twice
    assert all("scope" in cell for cell in page.all("th"))


def test_nothing_is_loaded(finished):
    config, _ = finished
    text = page_html([read_run(config.out)])
    page = Page(text)
    assert not [tag for tag, a in page.elements if tag in ("link", "img", "iframe", "object", "embed") or "src" in a]
    assert not re.search(r"@import|@font-face", text)
    assert set(re.findall(r"\S*https?://[^\s\"<]+", text)) == {'xmlns="http://www.w3.org/2000/svg'}
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_every_number_of_the_summary_is_there(finished):
    config, records = finished
    page = page_of(config.out)
    summary = summarize(config, records)
    results = page.table("Accuracy on the test split")
    assert results[0][: 1 + len(METRICS)] == ["method", "Transfer", "Avg", "Last", "Forgetting", "Learn"]
    lines = {row[0]: row[1:] for row in results[1:]}
    assert list(lines) == LABELS
    for label, values in summary["methods"].items():
        for name, shown in zip(METRICS, lines[label], strict=False):
            mean, std = values[name]["mean"], values[name]["std"]
            assert shown == (f"{mean:.1f} ± {std:.1f}" if std else f"{mean:.1f}"), (label, name)
    assert lines["zero-shot"][:3] == [f"{summary['zero_shot'][name]['mean']:.1f}" for name in METRICS[:3]]
    costs = {row[0]: row[1:] for row in page.table("What a run costs")}
    assert costs["keeplora"] == ["6.0", "1.5", "0.8", "200", "1,000", "64", "+10", "validation"]
    assert costs["lora"][-1] == "none"
    assert page.table("Retention certificates")[1] == ["keeplora", "1.0e-06", "3.0e-08", "2.0e-07", "0.9876"]
    assert page.table("lora: accuracy")[2] == [f"after {TASKS[1]}", "70.0", "80.0", "10.0", "30.0"]
    assert page.table("keeplora: accuracy")[3][2] == "83.1"  # the mean of two seeds
    assert page.table("Mean accuracy over all tasks after each")[2][1:] == ["40.0", "53.3", "77.7"]
    assert page.table("Protected share")[1:] == [["vision 0", "38"], ["text 1", "25"]]
    assert page.table("keeplora: directions by depth")[1][:3] == ["vision 0", "2", "38%"]
    assert ["keeplora", "keeplora", "0.002", "0.01", "r = 8"] in page.table("Settings of every method")
    assert summary["environment"]["platform"] in page.text
    assert set(METRICS) <= set(TERMS)  # what each of them means
    assert all(meaning in page.text for _, meaning in TERMS.values())
    assert len(page.all("dt")) == len(TERMS) + 4 + 8


def test_diagonal_of_the_matrix_is_marked_and_every_cell_can_be_read(finished):
    from keeplora.report.page.blocks import heat
    from keeplora.report.plots import colours
    from keeplora.report.style import contrast, readable

    config, _ = finished
    page = page_of(config.out)
    kinds = [a.get("class") for a in page.all("td") if "background" in a.get("style", "")]
    assert kinds.count("new") == kinds.count("old") == 3 * 3
    for value in np.linspace(-5, 105, 221):
        background, ink = re.findall(r"#[0-9a-f]+", heat(value, "").style)
        assert contrast(background, ink) >= 4.5
    for colour in colours([f"method {i}" for i in range(20)]).values():
        assert contrast(readable(colour), "white") >= 4.5


def test_names_are_text_and_never_markup(finished):
    config, _ = finished
    text = page_html([read_run(config.out)])
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert "alert(1)" not in re.sub(r"&lt;/script&gt;&lt;script&gt;alert\(1\)&lt;/script&gt;", "", text)
    for task in TASKS:
        assert f"after {task}" in page.text
        assert f"+ {task}" in page.text  # in the chart, as text: also where TeX would begin


def test_an_unfinished_folder_says_what_is_missing(tmp_path):
    config = config_of(tmp_path, methods=("lora", "keeplora", "full"), seeds=(0, 1, 2))
    done = [record_of(label, 0) for label in LABELS]
    keep(config, [*done, record_of("lora", 1), record_of("full", 0, failed="loss is <nan>")])
    begun = run_folder(config.out, "keeplora", 1)
    identity = config.identity("keeplora", 1)
    save_progress(begun, record_of("keeplora", 1), State(tensors={}, meta={}), identity)
    elsewhere = run_folder(config.out, "gpm", 0)
    save_result(elsewhere, record_of("gpm", 0), config.identity("gpm", 0), keep_state=False)
    page = page_of(tmp_path)
    assert "Unfinished: 5 of 12 runs have ended. 1 more has begun." in page.text
    assert "Left out: full, seed 0, which ended early: loss is <nan>" in page.text
    assert "runs of gpm, which the folder holds and its config.json does not name" in page.text
    waiting = page.table("Runs that have not ended")
    assert len(waiting) == 1 + 7
    assert ["keeplora", "1", "begun"] in waiting
    assert ["zero-shot", "2", "not begun"] in waiting
    lines = {row[0]: row for row in page.table("Accuracy on the test split")}
    assert "full" not in lines
    assert lines["lora"][-1] == "0, 1"
    assert lines["keeplora"][-1] == "0"
    assert "The machine is recorded when the run is finished" in page.text


def test_folders_without_a_result_or_without_the_untouched_model(tmp_path):
    config = config_of(tmp_path / "empty")
    keep(config, [])
    page = page_of(config.out)
    assert "Unfinished: 0 of 6 runs have ended." in page.text
    assert not page.all("svg")
    config = config_of(tmp_path / "some")
    keep(config, [record_of("lora", 0)])
    page = page_of(config.out)
    assert "No run of the untouched model has ended yet" in page.text
    assert page.table("Accuracy on the test split")[1][0] == "lora"
    assert not page.all("svg")


def test_several_runs_stand_side_by_side(finished, tmp_path):
    config, records = finished
    other = config_of(tmp_path / "elsewhere" / "mine", methods=("lora",), seeds=(0,), benchmark="mtil", epochs=2)
    keep(other, [record_of(label, 0) for label in ("zero-shot", "lora")])
    page = page_of(config.out, other.out)
    head, titles, *rows = page.table("Accuracy in percent")
    assert head == ["", config.out, other.out]  # both are called mine
    assert titles == ["method", *["Transfer", "Avg", "Last"] * 2]
    lines = {row[0]: row[1:] for row in rows}
    means = summarize(config, records)["methods"]["lora"]
    assert lines["lora"][2] == f"{means['last']['mean']:.1f} ± {means['last']['std']:.1f}"
    assert lines["lora"][5] == "76.7"
    assert lines["keeplora"][3:] == ["–"] * 3
    assert "The runs are on different benchmarks: do not compare their numbers" in page.text
    assert ["epochs", "1", "2"] in page.table("Settings that differ")
    for name in ("id", "aria-label"):
        values = [attributes[name] for _, attributes in page.elements if name in attributes]
        assert len(values) == len(set(values))
    assert {f"Run {one.out}" for one in (config, other)} <= {heading for _, heading in page.headings}


def test_published_rows_stand_beside_their_benchmark_alone(finished, tmp_path):
    config, _ = finished
    assert "Published" not in page_of(config.out).text
    other = config_of(tmp_path / "mtil", benchmark="mtil")
    keep(other, [record_of(label, 0) for label in LABELS])
    page = page_of(other.out)
    rows = {row[0]: row[1:] for row in page.table("MTIL, order I")}
    assert rows["ZSCL"][:3] == ["68.1", "75.4", "83.6"]
    assert all(protocol and source for _, _, _, protocol, source in rows.values())
    assert "Protocols differ" in page.text


def test_a_comparison_over_learning_rates_has_its_fronts(tmp_path):
    rng = np.random.default_rng(0)
    rates = {f"{name}@{rate:g}": {"method": name, "learning_rate": rate} for name in ("lora", "gpm")
             for rate in (1e-3, 3e-3)}  # fmt: skip
    config = config_of(tmp_path, methods=tuple(rates), method=rates, evaluate_on="both")

    def right():
        return [[rng.random(40) < 0.4 + 0.2 * (j <= i) for j in range(3)] for i in range(3)]

    records = [record_with_items(right(), label, seed) for label, seed in config.pairs()]
    keep(config, records)
    page = page_of(tmp_path)
    table = page.table("Transfer may fall 3 points")
    assert table[1][0] == "zero-shot"
    assert {row[0].rstrip(" †") for row in table[2:]} == {"lora", "gpm"}
    assert any("run-1-front" in a.get("id", "") for _, a in page.elements)
    assert [a["id"] for _, a in page.elements if a.get("id") == "run-1-fronts"]
    last = run_folder(tmp_path, "gpm@0.003", 1) / "result.json"
    last.unlink()
    page = page_of(tmp_path)
    assert "Without gpm@0.003: not all seeds have ended" in page.text
    (run_folder(tmp_path, "zero-shot", 1) / "result.json").unlink()
    assert "Fronts need the untouched model" in page_of(tmp_path).text


def test_the_command_writes_the_file_whole(finished, tmp_path, capsys, monkeypatch):
    config, _ = finished
    assert cli.main(["report", config.out]) == 0
    file = tmp_path / "mine" / "report.html"
    assert capsys.readouterr().out == f"report: {file}\n"
    assert file.read_text(encoding="utf-8").rstrip().endswith("</html>")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", config.out, config.out]) == 0
    assert (tmp_path / "report.html").is_file()
    assert cli.main(["report", config.out, "--out", str(tmp_path)]) == 2  # a folder is there
    assert str(tmp_path) in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "report.html"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_none_of_a_run_is_named(tmp_path, capsys, there):
    folder = tmp_path / "strange"
    if there:
        folder.mkdir()
    assert cli.main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "config.json" in said
    assert ("no such folder" in said) is not there


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "of another task": lambda text: text.replace("cats", "dogs"),
    "of other settings": lambda text: text.replace('"batch_size": 64', '"batch_size": 32'),
    "a figure too few": lambda text: re.sub(r'("inference_seconds": \[\s+)[\d.]+,\s+', r"\1", text),
    "capacity of nothing": lambda text: text.replace('"capacity": []', '"capacity": [{"name": "a"}]'),
    "certificates of text": lambda text: re.sub(r'("certificates": \[\s+)null', r'\1"text"', text),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_named_at_the_top_and_the_others_are_shown(finished, capsys, damage):
    config, _ = finished
    file = run_folder(config.out, "lora", 0) / "result.json"
    whole = file.read_text()
    file.write_text(DAMAGE[damage](whole))
    assert file.read_text() != whole
    assert cli.main(["report", config.out]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("report: ")
    assert "keeplora: not in the report: lora, seed 0: " in said.err
    page = Page((Path(config.out) / "report.html").read_text(encoding="utf-8"))
    assert page.headings[1] == (2, "What cannot be read")
    assert "mine: lora, seed 0: " in page.text
    assert "Finished: 5 of 6 runs. 1 cannot be read." in page.text
    lines = {row[0]: row for row in page.table("Accuracy on the test split")}
    assert lines["lora"][-1] == "1"
    assert lines["keeplora"][-1] == "0, 1"
    assert not re.search(r"\b[Dd]elete", page.text + said.err)
    file.write_text(whole)
    assert not read_run(config.out).damaged


def test_damage_besides_results_is_named_and_costs_no_more_than_itself(finished, tmp_path, capsys):
    config, records = finished
    file = Path(config.out) / "config.json"
    settings = json.loads(file.read_text())
    other = config_of(tmp_path / "other")
    keep(other, records)
    for damaged in ("{", "[]", json.dumps({**settings, "unheard_of": 1}), json.dumps({**settings, "method": [1]})):
        file.write_text(damaged)
        with pytest.raises(StateError, match=r"config\.json"):
            read_run(config.out)
    assert cli.main(["report", config.out]) == 2
    both = tmp_path / "both.html"
    assert cli.main(["report", config.out, other.out, "--out", str(both)]) == 1
    assert "config.json" in capsys.readouterr().err
    assert "What cannot be read" in both.read_text()
    write_json(file, settings)
    file.with_name("summary.json").write_text("{}")
    [told] = read_run(config.out).damaged
    assert "summary.json must have 'environment'" in told


def test_what_is_not_installed_is_named(finished, monkeypatch):
    config, _ = finished
    monkeypatch.setattr("keeplora.report.page.find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(ConfigError, match=r"jinja2 must be installed.*keeplora\[demo\]"):
        write_page([config.out])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<!doctype html><meta charset="utf-8"><body>{frames}<script>
addEventListener("load", () => {{ document.title = JSON.stringify([...document.querySelectorAll("iframe")].map((f) => {{
  const root = f.contentDocument.documentElement;
  return [f.contentWindow.innerWidth, root.scrollWidth, f.contentDocument.querySelectorAll("svg text").length];
}})); }});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser_the_page_is_as_wide_as_the_screen_and_reports_no_error(finished, tmp_path):
    config, _ = finished
    page = html.escape(page_html([read_run(config.out), read_run(config.out)]))
    frames = "".join(f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>'
                     for width in (375, 1280))  # fmt: skip
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(frames=frames), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
               "--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000",
               "--dump-dom"]  # fmt: skip
    done = subprocess.run([BROWSER, *options, probe.as_uri()], capture_output=True, text=True, timeout=300)
    measured = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert [(width, wide) for width, wide, _ in measured] == [(375, 375), (1280, 1280)]
    assert all(texts > 20 for _, _, texts in measured)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
