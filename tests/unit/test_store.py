"""Stage folders: the same run continues, another is refused by name, counts are proved, and nobody reads a half."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from kun_ray import store
from kun_ray.config import KunError
from kun_ray.counts import count_rows, prove_counts
from kun_ray.schema import DOCUMENT, doc_id, to_table
from kun_ray.store import Folder, open_stage, require_complete

FINGERPRINT: dict[str, Any] = {
    "input": "abc",
    "pools": {"label": {"model": "/m", "steps": ["label"]}},
    "steps": {"label": {"prompt": "很长的开头" * 30 + "甲", "sampling": {"top_p": 0.95, "seed": None}}},
}
SECRET = "s3://AKIA:SECRET@bucket/run"


def row(number: int, status: str = "ok", reason: str | None = None) -> dict[str, Any]:
    return {"doc_id": doc_id("s", "f", number, ""), "source": "s", "status": status, "reason": reason}


def write_part(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(to_table(rows, DOCUMENT), folder / name)


def changed(path: str, value: Any) -> dict[str, Any]:
    """FINGERPRINT with one value, given by its dotted path, replaced."""
    copy = json.loads(json.dumps(FINGERPRINT))
    *above, last = path.split(".")
    place = copy
    for key in above:
        place = place[key]
    place[last] = value
    return dict(copy)


def test_new_stage_writes_its_manifest(tmp_path: Path) -> None:
    folder = open_stage(str(tmp_path / "a/b"), FINGERPRINT, {"input": "x", "path": Path("/p")})
    manifest = folder.read_json("manifest.json")
    assert manifest["config"] == {"input": "x", "path": "/p"}
    assert {**manifest["fingerprint"], "versions": None} == {**FINGERPRINT, "versions": None}
    assert {"kun_ray", "ray"} <= set(manifest["fingerprint"]["versions"])
    assert not folder.is_complete() and os.listdir(tmp_path / "a/b") == ["manifest.json"]


def test_same_run_continues_whatever_its_config(tmp_path: Path) -> None:
    open_stage(str(tmp_path), FINGERPRINT, {"replicas": 1})
    write_part(tmp_path, "part-0.parquet", [row(0)])
    before = (tmp_path / "manifest.json").read_bytes()
    assert open_stage(str(tmp_path), FINGERPRINT, {"replicas": 8}).parts() == [str(tmp_path / "part-0.parquet")]
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("input", "xyz", 'input: was "abc", now "xyz"'),
        ("pools.label.model", "/n", 'pools.label.model: was "/m", now "/n"'),
        ("pools.label.steps", ["label", "score"], 'pools.label.steps: was ["label"], now ["label", "score"]'),
        ("steps.label.sampling.top_p", 1.0, "steps.label.sampling.top_p: was 0.95, now 1.0"),
        ("steps.label.sampling.seed", 0, "steps.label.sampling.seed: was null, now 0"),
        ("steps.score", {"mode": "choose"}, 'steps.score.mode: was "absent", now "choose"'),
        ("pools.label", {"steps": ["label"]}, 'pools.label.model: was "/m", now "absent"'),
    ],
)
def test_another_run_is_refused_by_name(tmp_path: Path, path: str, value: Any, said: str) -> None:
    open_stage(str(tmp_path), FINGERPRINT, {})
    with pytest.raises(KunError) as caught:
        open_stage(str(tmp_path), changed(path, value), {})
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [f"  {said}"], "this difference and no other"
    assert str(tmp_path) in lines[0] and "output=" in lines[-1]


def test_every_difference_is_named_and_versions_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_stage(str(tmp_path), FINGERPRINT, {})
    monkeypatch.setattr("kun_ray.__version__", "99")
    with pytest.raises(KunError, match=r"(?s)  input: .*  versions\.kun_ray: was .*, now \"99\""):
        open_stage(str(tmp_path), changed("input", "xyz"), {})


def test_long_values_are_shown_where_they_differ(tmp_path: Path) -> None:
    open_stage(str(tmp_path), FINGERPRINT, {})
    with pytest.raises(KunError) as caught:
        open_stage(str(tmp_path), changed("steps.label.prompt", "很长的开头" * 30 + "乙"), {})
    line = str(caught.value).splitlines()[1]
    assert "甲" in line and "乙" in line and len(line) < 250


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    write_part(tmp_path / "parquet", "part-0.parquet", [row(0)])
    with pytest.raises(KunError, match=r"has no manifest.json, so kun_ray did not write .* \(part-0.parquet\); choose"):
        open_stage(str(tmp_path / "parquet"), FINGERPRINT, {})
    (tmp_path / "model").mkdir()
    (tmp_path / "model/manifest.json").write_text('{"trained": "elsewhere"}')
    with pytest.raises(KunError, match="something else than a stage"):
        open_stage(str(tmp_path / "model"), FINGERPRINT, {})
    assert os.listdir(tmp_path / "parquet") == ["part-0.parquet"] and os.listdir(tmp_path / "model") == [
        "manifest.json"
    ]


def test_a_folder_of_other_files_is_refused_with_some_of_them(tmp_path: Path) -> None:
    for name in ("letter.odt", "photos", "notes.tmp", "thesis.tex", ".profile"):
        (tmp_path / name).mkdir() if name == "photos" else (tmp_path / name).write_text("mine")
    with pytest.raises(KunError, match=r"is not empty .*\(letter.odt, notes.tmp, photos and 1 more\); choose"):
        open_stage(str(tmp_path), FINGERPRINT, {})
    assert len(os.listdir(tmp_path)) == 5, "nothing is written or deleted"


@pytest.mark.parametrize("name", ["manifest.json.0a1b2c3d.tmp", "_lease.json", "_lease.json.0a1b2c3d.tmp", ".gitkeep"])
def test_what_a_kill_before_the_manifest_leaves_is_no_others(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{")
    assert open_stage(str(tmp_path), FINGERPRINT, {}).exists("manifest.json")


def test_a_run_that_begins_between_two_looks_is_left_to_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_stage(str(tmp_path), FINGERPRINT, {})
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(Folder, "exists", lambda self, name="": False)
    open_stage(str(tmp_path), FINGERPRINT, {})


@pytest.mark.parametrize(
    ("key", "stage"),
    [("corpora", "prepare"), ("selection", "export"), ("training", "train"), ("answers", "review")],
)
def test_a_folder_of_another_stage_is_refused_in_one_line(tmp_path: Path, key: str, stage: str) -> None:
    """Also one whose manifest an older version wrote: the fingerprint tells."""
    open_stage(str(tmp_path), {key: {"a": 1, "b": 2}, "input": "x"}, {})
    with pytest.raises(KunError) as caught:
        open_stage(str(tmp_path), FINGERPRINT, {})
    assert f"{tmp_path} holds a {stage} run, not a generate one" in str(caught.value)
    assert "\n" not in str(caught.value) and "output=" in str(caught.value)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KunError, match="choose another output="):
        open_stage(str(tmp_path / "file/stage"), FINGERPRINT, {})


def test_require_complete_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(KunError, match=r"there is no folder .*gone.*run the stage"):
        require_complete(str(tmp_path / "gone"))
    folder = open_stage(str(tmp_path / "s"), FINGERPRINT, {})
    write_part(tmp_path / "s", "part-0.parquet", [row(0)])
    with pytest.raises(KunError, match=r"not complete \(no _SUCCESS\).*continues"):
        require_complete(str(tmp_path / "s"))
    folder.finish({})
    assert require_complete(str(tmp_path / "s")).dataset().count_rows() == 1
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/wudao.json").write_text("[]")
    for path in (tmp_path / "corpus", tmp_path / "corpus/wudao.json"):
        with pytest.raises(KunError, match=rf"{path} is not a stage folder \(no manifest.json\); export reads"):
            require_complete(str(path), "export reads what jobs/generate.py writes")
    (tmp_path / "s/part-0.parquet").unlink()
    with pytest.raises(KunError, match="nothing to read"):
        require_complete(str(tmp_path / "s"))


def test_counts_by_status_and_reason(tmp_path: Path) -> None:
    write_part(tmp_path, "part-0.parquet", [row(0), row(1), row(2, "rejected", "too_long")])
    write_part(tmp_path, "part-1.parquet", [row(3, "rejected", "too_long"), row(4, "failed", "truncated")])
    counts = count_rows(Folder(str(tmp_path)))
    assert counts == {
        "rows": 5,
        "ok": 2,
        "rejected": 2,
        "failed": 1,
        "reasons": {"rejected/too_long": 2, "failed/truncated": 1},
        "repeated_ids": 0,
    }
    assert prove_counts(Folder(str(tmp_path)), 5) == counts


def test_counts_of_an_empty_folder(tmp_path: Path) -> None:
    empty = {"rows": 0, "ok": 0, "rejected": 0, "failed": 0, "reasons": {}, "repeated_ids": 0}
    assert count_rows(Folder(str(tmp_path))) == empty
    write_part(tmp_path, "part-0.parquet", [])
    assert count_rows(Folder(str(tmp_path))) == empty


@pytest.mark.parametrize(
    ("rows", "expected", "said"),
    [
        ([row(0), row(1)], 3, "3 rows in, 2 out"),
        ([row(0), row(1)], 1, "1 rows in, 2 out"),
        ([row(0), row(0)], 2, "1 twice"),
        ([row(0), row(1), row(1), row(1)], 4, "2 twice"),
        ([row(0), row(1, "deferred")], 2, "1 ok, 0 rejected, 0 failed"),
    ],
)
def test_counts_that_do_not_add_up(tmp_path: Path, rows: list[dict[str, Any]], expected: int, said: str) -> None:
    write_part(tmp_path, "part-0.parquet", rows[:1])
    write_part(tmp_path, "part-1.parquet", rows[1:])
    with pytest.raises(KunError) as caught:
        prove_counts(Folder(str(tmp_path)), expected)
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


def test_input_fingerprint_follows_the_parts(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_part(tmp_path, "part-0.parquet", [row(0)])
    first = store.input_fingerprint(folder)
    (tmp_path / "summary.json").write_text("{}")
    assert store.input_fingerprint(folder) == first
    write_part(tmp_path, "part-1.parquet", [row(1)])
    second = store.input_fingerprint(folder)
    (tmp_path / "part-1.parquet").rename(tmp_path / "part-2.parquet")
    assert len({first, second, store.input_fingerprint(folder)}) == 3


def test_stage_errors_and_manifest_never_show_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "resolve", lambda uri: (fs.LocalFileSystem(), str(tmp_path / uri.rpartition("/")[2])))
    messages = []

    def say(call: Any, *args: Any) -> None:
        with pytest.raises(KunError) as caught:
            call(*args)
        messages.append(str(caught.value))

    say(require_complete, SECRET)
    folder = open_stage(SECRET, {"input": SECRET}, {"output": SECRET})
    assert "SECRET" not in (tmp_path / "run/manifest.json").read_text()
    open_stage(SECRET.replace("SECRET", "ROTATED"), {"input": SECRET.replace("SECRET", "ROTATED")}, {})
    say(require_complete, SECRET)
    say(open_stage, SECRET, {"input": "other"}, {})
    folder.finish({})
    say(require_complete, SECRET)
    say(prove_counts, folder, 7)
    (tmp_path / "run/manifest.json").unlink()
    write_part(tmp_path / "run", "part-0.parquet", [row(0)])
    say(open_stage, SECRET, {}, {})
    assert len(messages) == 6 and all("s3://bucket/run" in message for message in messages)
    assert not any("SECRET" in message or "AKIA" in message for message in messages)


def test_dataset_reads_the_parts_by_uri(tmp_path: Path) -> None:
    write_part(tmp_path, "part-0.parquet", [row(0)])
    assert Folder(f"file://{tmp_path}").dataset().schema.equals(DOCUMENT)


@pytest.mark.parametrize(
    ("uri", "found"),
    [("a/b", "a/c"), ("/b/", "/c"), ("b", "c"), ("s3://k/a/b?region=x", "s3://k/a/c?region=x")],
)
def test_a_folder_beside_a_folder(uri: str, found: str) -> None:
    assert Folder(uri).beside("c").uri == found
