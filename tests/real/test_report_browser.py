"""The report in a real headless Chromium: its script runs, its filters work, hostile text stays text, a phone shows it whole."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable
from html import unescape
from pathlib import Path

import browser
import pytest
from browser import needs_chromium
from example_run import HOSTILE, make_run

from kun_ray.report import write_report

pytestmark = needs_chromium
SCRIPT = re.compile(r"<script.*?</script>", re.DOTALL)

Browse = Callable[..., str]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two runs, with hostile text in both."""
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "run")
    other = make_run(folder / "strict", run / "corpora", threshold=0.8)
    return Path(write_report([str(run), str(other)]))


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a file with an optional #fragment and returns the page as it is after its scripts have run."""

    def open_page(path: Path, fragment: str = "") -> str:
        return browser.browse(path, tmp_path / "profile", fragment)

    return open_page


def shown(dom: str) -> list[str]:
    """The cards of the sample browser."""
    return re.findall(r'<article class="card.*?</article>', dom, re.DOTALL)


def ask(page: Path, script: str) -> str:
    """The page, without its policy, with JavaScript that runs when all is shown."""
    page_without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    return page_without_policy.replace("</body>", f"<script>onload = () => {{ {script} }}</script></body>")


def test_the_samples_are_shown_and_hostile_text_is_inert(browse: Browse, page: Path) -> None:
    dom = browse(page)
    assert re.search(r"<title>([^<]*)</title>", dom)[1] == "run · strict · kun_ray report"  # type: ignore[index]
    assert len(shown(dom)) == 20 and "21 of 21 sampled documents" in dom
    assert HOSTILE in unescape("".join(shown(dom)))
    assert "<img" not in SCRIPT.sub("", dom)


def test_the_payload_would_run_without_the_escapes(browse: Browse, tmp_path: Path) -> None:
    bare = tmp_path / "bare.html"
    bare.write_text(f"<title>safe</title><script>const text = '{HOSTILE}'</script>")
    assert "<title>owned</title>" in browse(bare)


def test_filters_of_the_address_choose_the_samples(browse: Browse, page: Path) -> None:
    chosen = shown(browse(page, "#reason=verdict_bad&step=score"))
    assert len(chosen) == 1 and "那个东西怎么弄？" in chosen[0] and "the model judged the instruction bad" in chosen[0]
    chosen = shown(browse(page, "#run=1&reason=below_threshold&low=0.6"))
    assert len(chosen) == 1 and "自行车链条" in chosen[0]
    chosen = shown(browse(page, f"#query={urllib.parse.quote('rows.parquet')}"))
    assert len(chosen) == 5 and all("Parquet row" in card for card in chosen)
    assert shown(browse(page, "#query=nowhere")) == []


def test_a_filter_shows_what_became_of_a_document_in_one_run_alone(browse: Browse, page: Path) -> None:
    chosen = shown(browse(page, "#fate=differs"))
    assert len(chosen) == 2 and all("below_threshold" in card for card in chosen)


def test_a_duplicate_leads_to_the_document_that_was_kept(browse: Browse, page: Path, tmp_path: Path) -> None:
    click = "document.querySelector('#cards a').click();"
    text = ask(page, click)
    first, second = re.findall(r'"id":"([0-9a-f]{32})"', text)[:2]
    meta = f'"meta":{{"duplicate_of":"{second}"}},"file"'
    (tmp_path / "page.html").write_text(re.sub(r'"meta":\{[^}]*\},"file"', meta, text, count=1))
    chosen = shown(browse(tmp_path / "page.html"))
    assert [re.search(r"[0-9a-f]{32}", card)[0] for card in chosen] == [first, second]  # type: ignore[index]
    (tmp_path / "page.html").write_text(
        re.sub(r'"meta":\{[^}]*\},"file"', meta.replace(second, "0" * 32), text, count=1)
    )
    assert 'href="#query' not in browse(tmp_path / "page.html"), "a document that is not among the samples is no link"


def test_the_answer_is_shown_as_a_change_of_the_text(browse: Browse, page: Path) -> None:
    card = next(card for card in shown(browse(page, "#status=ok")) if "怎样掌握水温" in card)
    assert "<del>" in card and re.search(r"<ins>[^<]*温一温壶", card)


def test_a_value_stands_below_the_name_of_its_run(browse: Browse, page: Path, tmp_path: Path) -> None:
    edges = "(cells) => [...cells].map((cell) => Math.round(cell.getBoundingClientRect().left)).join()"
    align = "(cells) => [...cells].map((cell) => getComputedStyle(cell).textAlign).join()"
    row = 'document.querySelector(".differences tbody tr").children'
    head = 'document.querySelector(".differences thead tr").children'
    says = f"document.title = [{edges}, {align}].map((of) => (of({row}) === of({head}) ? 'same' : 'not'))"
    (tmp_path / "page.html").write_text(ask(page, says))
    assert "<title>same,same</title>" in browse(tmp_path / "page.html")


def test_a_phone_shows_the_page_without_scrolling_sideways(browse: Browse, page: Path, tmp_path: Path) -> None:
    tell = "parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')"
    (tmp_path / "page.html").write_text(ask(page, tell))
    frame = tmp_path / "phone.html"
    frame.write_text(
        "<script>onmessage = event => { document.title = event.data.join(' of ') }</script>"
        '<iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>'
    )
    assert "<title>390 of 390</title>" in browse(frame)
