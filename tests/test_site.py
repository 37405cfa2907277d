"""The documentation site: what makes its build fail, what stands in its pages, and how a browser shows them."""

import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urldefrag, urljoin

import nbformat
import pytest
from click.testing import CliRunner
from html_page import Page
from mkdocs.__main__ import cli
from nbclient import NotebookClient
from pages import ROOT

from keeplora._version import __version__

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NOTEBOOK = ROOT / "docs" / "notebooks" / "first-steps.ipynb"
RAW = r":(?:attr|class|data|exc|func|math|meth|mod|obj|ref):`|\.\. [a-z-]+::"
"""Roles and directives, which the site does not know."""


def build(config, site):
    """(exit code, what was printed) of the command in `make docs`."""
    [command] = re.findall(r"/mkdocs (build .*) --site-dir", (ROOT / "Makefile").read_text())
    done = CliRunner().invoke(cli, [*command.split(), "--config-file", str(config), "--site-dir", str(site)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    code, printed = build(ROOT / "mkdocs.yml", folder)
    assert code == 0, printed
    return folder


def pages(site):
    return {str(path.relative_to(site)): path.read_text() for path in sorted(site.rglob("*.html"))}


# --- what makes the build fail


PACKAGE = '''"""A package."""


class Thing:
    """A class."""

    def act(self):
        """Act, by $x$."""


class Other(Thing):
    """Acts as its base does."""

    def act(self): ...
'''


@pytest.fixture
def small(tmp_path):
    """A site with the settings of ours, two pages, a picture and a package of one class."""
    settings = (
        (ROOT / "mkdocs.yml").read_text().split("\nnav:")[0].replace("tools/site.py", str(ROOT / "tools/site.py"))
    )
    files = {
        "mkdocs.yml": settings + "\nnav:\n  - index.md\n  - api.md\n",
        "docs/index.md": "# One\n\n## Part\n\n![a chart](chart.png) [there](api.md#small.Thing) [here](#part)\n",
        "docs/api.md": "# API\n\n::: small\n",
        "docs/chart.png": "",
        "small/__init__.py": PACKAGE,
    }
    for name in ("katex/katex.min.css", "katex/katex.min.js", "formulas.js", "site.css"):
        files[f"docs/assets/{name}"] = ""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_site_without_a_fault_is_built(small):
    code, printed = build(small / "mkdocs.yml", small / "site")
    assert code == 0, printed
    assert "arithmatex" in (small / "site" / "api" / "index.html").read_text()


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("docs/index.md", "(api.md#small.Thing)", "(nowhere.md)", "nowhere.md"),
        ("docs/index.md", "(#part)", "(#party)", "#party"),
        ("docs/index.md", "#small.Thing", "#small.Thin", "#small.Thin"),
        ("docs/index.md", "# One\n", "# One\n\nOf :class:`Thing`.\n", "markup is shown as it is: "),
        ("docs/index.md", "chart.png", "graph.png", "graph.png"),
        ("mkdocs.yml", "  - api.md\n", "", "api.md"),
        ("small/__init__.py", '"""Act, by $x$."""', "...", "small.Thing.act has no docstring"),
        ("small/__init__.py", '    """A class."""\n', "", "small.Thing has no docstring"),
        ("small/__init__.py", "Act, by $x$.", "Act on :meth:`act`.", "markup is shown as it is: "),
        ("small/__init__.py", "Act, by $x$.", "Act on [`axt`][].", "axt"),
        ("small/__init__.py", "Act, by $x$.", "Act.\n\n        .. math:: x\n        ", "markup is shown as it is: "),
        ("small/__init__.py", "Act, by $x$.", "Act.\n\n        Args:\n            x: None.\n        ", "'x'"),
        ("small/__init__.py", "Act, by $x$.", "Act.\n\n        Example:\n            >>> 1\n        ", "> > > 1"),
    ],
)
def test_a_fault_stops_the_build(small, file, old, new, said):
    text = (small / file).read_text()
    assert old in text
    (small / file).write_text(text.replace(old, new))
    code, printed = build(small / "mkdocs.yml", small / "site")
    assert code == 1, f"the build did not notice: {new!r}\n{printed}"
    assert said in printed
    assert "Aborted with 1 warnings" in printed or "strict mode" in printed


# --- what stands in the package and in the pages


def test_no_role_and_no_directive_is_left_in_the_package():
    """Nor in comments and in docstrings that no page shows: whoever copies one would bring it back."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "keeplora").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(RAW, line)
    ]
    assert found == []
    assert re.search(RAW, "See :class:`KeepLora`.")
    assert re.search(RAW, "    .. math:: x")


def test_the_site_needs_no_other_host(site):
    """Scripts, styles, pictures and fonts come with it."""
    elsewhere = []
    for name, text in pages(site).items():
        for tag, attributes in Page(text).elements:
            loads = tag in ("script", "img", "iframe", "source", "video")
            loads |= tag == "link" and attributes.get("rel") in ("stylesheet", "preconnect", "preload", "icon")
            address = attributes.get("src") or attributes.get("href") or ""
            if loads and re.match(r"(?:\w+:)?//", address):
                elsewhere.append((name, tag, address))
    for path in site.rglob("*.css"):
        elsewhere += [
            (path.name, "url", url) for url in re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)]*)", path.read_text())
        ]
    assert elsewhere == []


def test_every_address_inside_the_site_leads_somewhere(site):
    """Pages, files and anchors, menus and the reference included."""
    everything = pages(site)
    ids = {name: {a["id"] for _, a in Page(text).elements if "id" in a} for name, text in everything.items()}
    broken = []
    for name, text in everything.items():
        for tag, attributes in Page(text).elements:
            address = attributes.get("href") if tag in ("a", "link") else attributes.get("src")
            if not address or re.match(r"(?:\w+:|//)", address) or name == "404.html":
                continue
            target, anchor = urldefrag(urljoin(f"http://x/{name}", address))
            place = unquote(target).removeprefix("http://x/")
            place += "index.html" if not place or place.endswith("/") else ""
            if not (site / place).is_file() or (anchor and unquote(anchor) not in ids.get(place, {unquote(anchor)})):
                broken.append((name, address))
    assert broken == []
    assert len(everything) > 20


def test_no_page_is_a_book(site):
    """One page with all of the reference had 1.9 MB."""
    sizes = {name: len(text.encode()) for name, text in pages(site).items()}
    assert {name: size for name, size in sizes.items() if size > 500_000} == {}
    assert sum(name.startswith("api/") for name in sizes) > 10


def test_every_page_shows_the_version(site):
    for name, text in pages(site).items():
        assert f"keeplora {__version__}" in Page(text).text, name


def test_links_of_the_readme_lead_to_files():
    readme = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", readme) if not re.match(r"\w+:", link)]
    assert [link for link in links if not (ROOT / link).exists()] == []


# --- the notebook


def test_the_notebook_runs(tmp_path, monkeypatch):
    """With a few images; it is shown with the outputs of all that it names."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for output in shown} == {"stream", "display_data"}
    assert not [output for output in shown if output.get("name") == "stderr"]
    [budget] = [cell for cell in code if "budget" in cell.metadata.get("tags", [])]
    assert budget.source == "train_images, test_images = 384, 200"
    budget.source = "train_images, test_images = 32, 16"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "captured" in "".join(output.text for cell in code for output in cell.outputs if "text" in output)


# --- in a browser


@pytest.fixture(scope="module")
def address(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


LOOK = r"""() => {
  const content = document.querySelector(".md-content");
  const walker = document.createTreeWalker(content, NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!parent.closest("pre, code, script, style, annotation")) text += walker.currentNode.data + "\n";
  }
  const scrolls = (element) => {
    for (let e = element; e && e !== document.body; e = e.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  return {
    raw: (text.match(/:[a-z]+:`|\.\. [a-z-]+::|\$\$|\\frac|\\[a-z]+\{|\\\(|\]\[|``|^>>> /gm) || []),
    formulas: content.querySelectorAll(".arithmatex").length,
    rendered: content.querySelectorAll(".arithmatex .katex").length,
    errors: [...content.querySelectorAll(".katex-error")].map((e) => e.title),
    cut: [...content.querySelectorAll("pre, pre code, table, .katex-display")]
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
      .map((e) => e.textContent.trim().slice(0, 80)),
    wide: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    pictures: [...content.querySelectorAll("img")].filter((e) => e.complete && !e.naturalWidth).map((e) => e.src),
  };
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium) to look at pages with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def faults_of(seen):
    """What ``LOOK`` saw and should not have."""
    left = [f"{seen['formulas'] - seen['rendered']} formulas as they are written"] * (
        seen["formulas"] > seen["rendered"]
    )
    return left + [(part, seen[part]) for part in ("raw", "errors", "cut", "pictures", "wide") if seen[part]]


def test_pages_as_a_browser_shows_them(site, address, browser):
    """At the widths of a desk and of a telephone: no raw markup, nothing cut, every formula set, no errors."""
    faults, formulas = [], 0
    tab = browser.new_page()
    tab.on("console", lambda said: faults.append((tab.url, said.text)) if said.type == "error" else None)
    tab.on("pageerror", lambda error: faults.append((tab.url, str(error))))
    here = (address, "data:", "blob:")
    tab.on("request", lambda asked: None if asked.url.startswith(here) else faults.append(asked.url))
    for name in pages(site):
        for width in (1280, 390):
            tab.set_viewport_size({"width": width, "height": 900})
            if width == 1280:
                tab.goto(address + name, wait_until="load")
            seen = tab.evaluate(LOOK)
            formulas += seen["formulas"]
            faults += [(name, width, fault) for fault in faults_of(seen)]
    assert faults == []
    assert formulas > 100


@pytest.mark.parametrize(
    "fault",
    [
        "<p>See :class:`<code>x</code></p>".replace("`<code>", "`"),
        "<p>.. math:: x</p>",
        "<p>$$ x $$</p>",
        r"<p>\frac{1}{2}</p>",
        "<p>[x][]</p>",
        '<span class="arithmatex">\\(x\\)</span>',
        '<span class="arithmatex katex">x <i class="katex-error" title="no">x</i></span>',
        "<pre><code>" + "wide " * 99 + "</code></pre>",
        "<pre style='position: absolute'><code>" + "wide " * 99 + "</code></pre>",
        "<img src='data:image/png;base64,AAAA'>",
    ],
)
def test_the_browser_sees_a_fault(browser, fault):
    tab = browser.new_page(viewport={"width": 390, "height": 900})
    tab.set_content(f"<body><div class='md-content'><p>A page.</p>{fault}</div></body>")
    assert faults_of(tab.evaluate(LOOK)), fault
    tab.set_content("<body><div class='md-content'><p>A page.</p><pre style='overflow: auto'>" + "x " * 99)
    assert not faults_of(tab.evaluate(LOOK))
