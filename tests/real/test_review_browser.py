"""The page of a blind review in a real headless Chromium: what a key does to the votes, and whose votes they are."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import browse, needs_chromium

from kun_ray.evaluate.review import page

pytestmark = needs_chromium

ITEMS = [{"id": str(n), "instruction": f"第{n}条指令", "answers": ["甲的回答", "乙的回答"]} for n in range(1, 11)]
HELPERS = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const press = (key, repeat) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, repeat, bubbles: true }));
const name = (text) => {
  const field = document.getElementById("reviewer");
  field.value = text;
  for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, { bubbles: true }));
};
const comment = (text) => {
  const field = document.getElementById("comment");
  field.value = text;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const now = () => structuredClone({ ...result(), at: state.at + 1 });
"""


@pytest.fixture
def after(tmp_path: Path) -> Any:
    """What is said by the last of some actions on the page (JavaScript); each text is one visit, in one browser."""

    def act(*visits: str) -> Any:
        whole = page({"review": "0" * 32, "mode": "pairs", "items": ITEMS})
        without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", whole)
        script = f"""{HELPERS}(async () => {{
            const visit = Number(sessionStorage.getItem("visit"));
            const said = await [{", ".join(f"async () => {{ {visit} }}" for visit in visits)}][visit]();
            sessionStorage.setItem("visit", visit + 1);
            if (visit + 1 < {len(visits)}) return location.reload();
            document.body.replaceChildren(element("pre", JSON.stringify(said)));
        }})();"""
        path = tmp_path / "review.html"
        path.write_text(without_policy.replace("</body>", f"<script>{script}</script></body>"))
        found = re.search(r"<pre>(.*)</pre>", browse(path, tmp_path / "profile"))
        assert found, "the actions did not come to their end"
        return json.loads(unescape(found[1]))

    return act


def votes(found: dict[str, Any]) -> dict[str, str]:
    return {item: vote["choice"] for item, vote in found["votes"].items() if "choice" in vote}


def test_a_key_votes_and_the_next_item_is_shown(after: Any) -> None:
    found = after('name("甲"); press("1"); await wait(300); press("4"); await wait(300); return now();')
    assert votes(found) == {"1": "left", "2": "right"} and found["at"] == 3


def test_a_doubled_key_votes_once_and_skips_nothing(after: Any) -> None:
    found = after('name("甲"); press("1"); await wait(60); press("1"); await wait(400); return now();')
    assert votes(found) == {"1": "left"} and found["at"] == 2


def test_a_held_key_votes_on_the_item_shown_alone(after: Any) -> None:
    held = 'press("1"); for (let n = 0; n < 30; n++) { await wait(33); press("1", true); }'
    found = after(f'name("甲"); {held} await wait(400); return now();')
    assert votes(found) == {"1": "left"} and found["at"] == 2


def test_a_second_thought_before_the_next_item_changes_the_vote(after: Any) -> None:
    found = after('name("甲"); press("1"); await wait(100); press("4"); await wait(400); return now();')
    assert votes(found) == {"1": "right"} and found["at"] == 2


def test_who_pages_back_within_the_pause_stays_there(after: Any) -> None:
    first = 'name("甲"); press("1"); await wait(300);'
    found = after(first + 'press("1"); await wait(50); press("ArrowLeft"); await wait(400); return now();')
    assert votes(found) == {"1": "left", "2": "left"} and found["at"] == 1


def test_each_reviewer_of_one_browser_has_votes_of_his_own(after: Any) -> None:
    first = 'name("甲"); press("1"); await wait(300); press("1"); await wait(300);'
    second = 'name("乙"); const empty = now(); press("4"); await wait(300); const second = now();'
    empty, second_votes, again = after(first + second + 'name("甲"); return [empty, second, now()];')
    assert empty["votes"] == {} and empty["at"] == 1
    assert second_votes["reviewer"] == "乙" and votes(second_votes) == {"1": "right"}
    assert again["reviewer"] == "甲" and votes(again) == {"1": "left", "2": "left"} and again["at"] == 3


def test_votes_outlast_the_page_under_each_name(after: Any) -> None:
    first, second = 'name("甲"); press("1"); await wait(300);', 'name("乙"); press("4"); await wait(300);'
    back = 'const last = now(); name("甲"); return [last, now()];'
    last, other = after(first, second, back)
    assert last["reviewer"] == "乙" and votes(last) == {"1": "right"}
    assert other["reviewer"] == "甲" and votes(other) == {"1": "left"}


def test_a_remark_from_before_the_name_was_typed_is_kept(after: Any) -> None:
    before = 'name("甲"); press("1"); await wait(300); name("");'
    found = after(before + 'comment("甲更完整"); name("甲"); const first = now(); name("乙"); return [first, now()];')
    assert found[0]["votes"]["1"]["choice"] == "left" and found[0]["votes"]["1"]["comment"] == "甲更完整"
    assert found[1]["votes"] == {}, "the remark is the first name's"


def test_a_remark_without_a_name_outlasts_the_page_and_becomes_the_first_names(after: Any) -> None:
    unnamed, named = after('comment("都不完整");', 'const back = now(); name("丙"); return [back, now()];')
    assert unnamed["reviewer"] == "" and named["reviewer"] == "丙"
    assert unnamed["votes"]["1"]["comment"] == named["votes"]["1"]["comment"] == "都不完整"


def test_without_a_name_a_key_says_so_and_is_not_typed_as_one(after: Any) -> None:
    keys = 'press("1"); press("1"); press("4"); await wait(300);'
    says = 'return [$("notice").hidden, $("notice").textContent, document.activeElement.id, now()];'
    hidden, text, focused, found = after(keys + says)
    assert not hidden and "填写姓名" in text and focused != "reviewer"
    assert found["votes"] == {} and found["at"] == 1


def test_two_answers_are_called_by_names_that_hold_beside_and_below_each_other(after: Any) -> None:
    titles, buttons = after(
        "const texts = (selector) => [...document.querySelectorAll(selector)].map((one) => one.lastChild.textContent);"
        'return [texts("#answers h2"), texts("#choices button")];'
    )
    assert titles == ["甲的回答", "乙的回答"] and buttons == ["甲更好", "一样好", "一样差", "乙更好"]
