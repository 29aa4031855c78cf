"""The documentation as a site: what `make docs` builds, strictly and without the internet."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, ask
from project import ROOT

MOST_BYTES = 10_000_000
# mkdocs in a process that can open no connection
OFFLINE = """
import runpy, socket, sys
def refuse(*_): raise OSError("the site is built without the internet")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["mkdocs", *sys.argv[1:]]
runpy.run_module("mkdocs", run_name="__main__")
"""


def build(project: Path, site: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, "build", "--site-dir", str(site)],
        cwd=project, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser loads of itself to show a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        is_sheet = tag == "link" and attributes.get("rel") in ("stylesheet", "preconnect", "icon")
        if tag in ("script", "img", "iframe") or is_sheet:
            self.addresses += filter(None, [attributes.get("src"), attributes.get("href")])


def test_the_site_is_small_and_loads_nothing_from_elsewhere(site):
    files = [file for file in site.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    for page in site.rglob("*.html"):
        for address in Loaded(page).addresses:
            assert not re.match(r"(\w+:)?//", address), f"{page.name} loads {address}"
            if page.name != "404.html":  # whose addresses begin with the server's root
                assert (page.parent / address.partition("?")[0]).exists(), address


def test_every_page_is_in_the_navigation_once():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry)
                for page in pages(part)]  # fmt: skip

    text = (ROOT / "mkdocs.yml").read_text()
    assert sorted(pages(yaml.safe_load(text)["nav"])) == sorted(
        p.name for p in ROOT.glob("docs/*.md")
    )


def test_the_api_page_has_the_docstrings_and_a_linked_file_comes_along(site):
    page = (site / "api.html").read_text()
    for text in (
        "Train <code>model</code> sparsely",
        "Optimizer steps of the stage",
        "The token at whose place each output stands",
    ):
        assert text in page
    assert "begin_step" in (site / "repository/examples/own_loop.py.html").read_text()
    assert (site / "repository/results/reference/mini/figures/layers.svg").stat().st_size > 1000
    assert "own_loop" in (site / "search/search_index.json").read_text()


@pytest.mark.parametrize(
    "fault, said",
    [
        ("[gone](gone.md)", "'gone.md'"),
        ("[gone](index.md#gone)", "#gone"),
        ("[gone](../results/gone.svg)", "'../results/gone.svg'"),
        ("", 'not included in the "nav"'),
    ],
    ids=["link", "anchor", "file", "orphan"],
)
def test_a_fault_stops_the_build(tmp_path, fault, said):
    (tmp_path / "docs").mkdir()
    (tmp_path / "workflow").mkdir()
    (tmp_path / "workflow/docs_site.py").symlink_to(ROOT / "workflow/docs_site.py")
    settings = (ROOT / "mkdocs.yml").read_text()
    head, rest = settings.split("nav:\n", 1)
    rest = rest[rest.index("not_in_nav:") :]
    (tmp_path / "mkdocs.yml").write_text(f"{head}nav:\n  - Start: index.md\n{rest}")
    (tmp_path / "docs/index.md").write_text(f"# Start\n\n{fault}\n")
    if not fault:
        (tmp_path / "docs/orphan.md").write_text("# Orphan\n")
    done = build(tmp_path, tmp_path / "site")
    output = done.stdout + done.stderr
    assert done.returncode == 1 and output.count("WARNING") == 1 and said in output


@pytest.fixture
def address(site):
    """The site as a server gives it: a browser runs no search worker for a file."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


RESULTS = """new Promise(done => setInterval(() => {
    const found = [...document.querySelectorAll(".md-search-result__link")]
    if (found.length) done(found.map(link => link.getAttribute("href")))
}, 100))"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_searches_and_asks_nothing_of_a_network(address):
    async def steps(tab):
        return await tab.run(RESULTS), tab.problems, tab.requests

    links, problems, requests = ask(f"{address}index.html?q=sparsify", steps)
    assert any("library.html" in link for link in links)
    assert problems == []
    assert {url for url in requests if not url.startswith((address, "data:", "blob:"))} == set()
