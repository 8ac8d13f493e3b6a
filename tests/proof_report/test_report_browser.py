"""The page in a real browser. Skipped by name where there is none: CONTRIBUTING says how to get one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import report_browser
from report_browser import Browser

from eco_llm.proof.report import write_report
from eco_llm.proof.watch import Server

Runs = Callable[..., list[Path]]

pytestmark = pytest.mark.skipif(
    report_browser.find() is None, reason="no Chromium found (CONTRIBUTING: “The report in a browser”)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = report_browser.find()
    assert path is not None
    with Browser(path) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser) -> Browser:
    browser.complaints.clear()
    return browser


LINE, BAND = "path.line", "path.band"


def shown(page: Browser, path: Path) -> None:
    page.open(path.as_uri())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_renders(page: Browser, runs: Runs, tmp_path: Path, width: int, dark: bool) -> None:
    html = write_report(runs("before", "after", "died"))[1]
    page.view(width, dark=dark)
    shown(page, html)
    assert page.complaints == []
    # No sideways scrolling of the page; what is wide scrolls in its own box.
    assert page.js("document.documentElement.scrollWidth") == width
    assert page.js("[...document.querySelectorAll('table')].every(t => t.closest('.scroll'))")
    # Charts are there, have a size, and lines of the runs' colours in them.
    charts = page.js("[...document.querySelectorAll('figure.chart svg')].map(s => s.getBoundingClientRect().height)")
    assert len(charts) >= 4
    assert min(charts) > 150
    assert page.js("[...document.querySelectorAll('figure.bars svg rect')].length") >= 15
    background, ink, blue = page.js(
        """["--page", "--ink", "--h0"].map(name => {
             const probe = document.body.appendChild(document.createElement("i"));
             probe.style.color = `var(${name})`;
             const rgb = getComputedStyle(probe).color.match(/[0-9]+/g).slice(0, 3).join(",");
             probe.remove();
             return rgb;
           })"""
    )
    colours = page.colours(page.screenshot(tmp_path / "page.png", whole=True))
    assert sum(map(int, background.split(","))) < 150 if dark else sum(map(int, background.split(","))) > 600
    assert colours.get(background, 0) > 10_000
    assert colours.get(ink, 0) > 1_000
    assert colours.get(blue, 0) > 200


def test_text_is_readable_in_both_schemes(page: Browser, runs: Runs) -> None:
    """WCAG AA: 4.5 to 1 for text; 3 to 1 for lines and dots, on the page and on its cards."""
    html = write_report(runs("before", "after"))[1]
    for dark in (False, True):
        page.view(1000, dark=dark)
        shown(page, html)
        ratios = page.js(
            """(() => {
              const probe = document.body.appendChild(document.createElement("i"));
              const light = (name) => {
                probe.style.color = `var(${name})`;
                const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map(v => v / 255)
                  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const ratio = (a, b) => {
                const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
                return (x + 0.05) / (y + 0.05);
              };
              const found = {};
              for (const back of ["--page", "--card"])
                for (const name of ["--ink", "--soft", "--link", ...[0,1,2,3,4,5,6,7].map(i => `--h${i}`)])
                  found[`${name} on ${back}`] = ratio(name, back);
              found["--ink on --mark"] = ratio("--ink", "--mark");
              return found;
            })()"""
        )
        assert len(ratios) == 23
        low = {k: v for k, v in ratios.items() if v < (3.0 if k.startswith("--h") else 4.5)}
        assert low == {}, f"dark: {dark}"


def test_nothing_is_lost_without_scripts(page: Browser, runs: Runs) -> None:
    html = write_report(runs("before"))[1]
    page.view(1000)
    shown(page, html)
    texts = [page.js("document.body.innerText")]
    page.view(1000, script=False)
    shown(page, html)
    texts.append(page.js("document.body.innerText"))
    page.view(1000)
    assert texts[0] == texts[1]
    assert "Measured results" in texts[0]


def test_the_pointer_shows_values_and_leaves_nothing_behind(page: Browser, runs: Runs) -> None:
    (run,) = runs("before")
    loss = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    page.view(1000, 1200)
    shown(page, write_report([run])[1])
    page.js("document.querySelector('.canvas').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = page.js(
        "(b => [b.left, b.top, b.width, b.height])(document.querySelector('.canvas').getBoundingClientRect())"
    )
    page.move_pointer(box[0] + box[2] - 1, box[1] + box[3] / 2)
    tip = page.js("document.querySelector('.tip').innerText")
    assert f"training {loss[-1]:.5g}".rstrip("0") in tip.replace("\n", " ")
    page.move_pointer(5, 5)
    assert page.js("document.querySelectorAll('.tip, .rule').length") == 0
    assert page.complaints == []


def test_names_and_messages_are_text_in_the_browser_too(page: Browser, runs: Runs) -> None:
    (run,) = runs("died")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["config"]["training"]["sample_prompt"] = (
        "<img src=x onerror='document.title=666'><script>document.title=666</script>"
    )
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    page.view(1000)
    shown(page, write_report([run])[1])
    assert page.js("document.title") == "PROOF_OF_EVOLUTION: died"
    assert page.js("document.querySelectorAll('img').length") == 0
    assert "onerror='document.title=666'" in page.js("document.body.innerText")
    assert page.complaints == []


def test_a_watched_page_follows_the_run_without_a_flash(page: Browser, runs: Runs) -> None:
    (run,) = runs("before")
    page.view(1000)
    with Server(run, 0) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            page.open(server.address)
            page.js("window.mark = 1; document.querySelector('#page details').open = true; scrollTo(0, 500)")
            before = page.js("scrollY")
            with (run / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps({"step": 61, "loss": 1.0, "val_loss": 0.98765}) + "\n")
            page.until("document.body.innerText.includes('0.9877')")
            assert page.js("window.mark") == 1, "the page was loaded anew"
            assert page.js("document.querySelector('#page details').open")
            assert page.js("scrollY") == before
            assert page.js("document.getElementById('live').textContent") == "live"
        finally:
            server.stop()
            thread.join(10)
    assert page.complaints == []
    page.until("document.getElementById('live').textContent.includes('has ended')")
    assert "0.9877" in page.js("document.body.innerText")
