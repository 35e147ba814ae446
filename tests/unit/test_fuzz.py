"""Readers, filters and the config loader under input that nobody thought of.

A few seconds in `make test`, the same each time. `KUN_RAY_FUZZ_S=300 pytest tests/unit/test_fuzz.py` searches at random
for so many seconds per test; what it finds becomes a kind in hostile.py.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import KINDS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kun_ray import cleaning, schema
from kun_ray.config import ConfigError, KunError, load, without_credentials
from kun_ray.corpora import FORMATS, CorpusConfig, list_files, read_file
from kun_ray.export import ExportConfig
from kun_ray.filters import FilterConfig, build_filters, filter_texts
from kun_ray.generate import GenerateConfig
from kun_ray.prepare import PrepareConfig, clean_batch

REPO = Path(__file__).parents[2]
FUZZ_S = float(os.environ.get("KUN_RAY_FUZZ_S", 0))
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".tar", ".tar.gz", ".parquet")
SEEDS = [kind.content for kind in KINDS.values() if len(kind.content) < 20_000]


def search(test: Callable[..., None], strategies: dict[str, st.SearchStrategy[Any]], num_examples: int) -> None:
    """Runs `test` on examples of the strategies: `num_examples` fixed ones, or new ones for KUN_RAY_FUZZ_S seconds."""
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    phases = [Phase.generate, *([Phase.shrink] if FUZZ_S else [])]  # a failure in `make test` need not be the smallest
    common: dict[str, Any] = {"deadline": None, "database": None, "phases": phases, "suppress_health_check": quiet}
    if not FUZZ_S:
        settings(max_examples=num_examples, derandomize=True, **common)(given(**strategies)(test))()
    ends = time.monotonic() + FUZZ_S
    while time.monotonic() < ends:
        settings(max_examples=200, **common)(given(**strategies)(test))()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """One of the kinds with bytes changed, cut out, repeated, or taken from another."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        piece = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from(
                    [b"{", b"}", b"[", b"]", b'"', b",", b"\\", b"\\u", b"\n", b"\0" * 512, b"\x1f\x8b", b"PAR1"]
                ),
                st.sampled_from(SEEDS).map(lambda other: other[:300]),
            )
        )
        data[start : min(end, start + draw(st.integers(0, 600)))] = piece
    return bytes(data)


def check_rows(data: bytes, suffix: str, format: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(data)
        corpus = CorpusConfig("c", format, [str(path)], title_field="title", meta_fields=["id", "k"])
        config = PrepareConfig(corpora=[corpus], output="x")
        tables = [table for file in list_files(corpus) for table in read_file(corpus, file)]
        rows = [row for table in tables for row in clean_batch(table, config).to_pylist()]
    assert all(table.schema == schema.DOCUMENT for table in tables)
    assert rows and len({row["doc_id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["status"] in schema.STATUSES and (row["text"] is None) == (row["status"] != schema.OK)
        meta = json.loads(row["meta"])
        assert meta["offset"] >= 0 and meta["file"].startswith(f"x{suffix}")
    return rows


def test_damaged_files_become_rows() -> None:
    def test(data: bytes, suffix: str, format: str) -> None:
        started = time.process_time()
        check_rows(data, suffix, format)
        assert time.process_time() - started < 5

    strategies = {"data": damaged(), "suffix": st.sampled_from(SUFFIXES), "format": st.sampled_from(FORMATS)}
    search(test, strategies, 150)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)
KEYS = st.sampled_from(["text", "content", "title", "id", "k", "q_main", "option_a", "std_ans", "answer", "subset"])
RECORDS = st.lists(
    st.dictionaries(KEYS | st.text(max_size=6), VALUES, max_size=6).map(lambda rest: {"first": 0, **rest}),
    min_size=1,
    max_size=8,
)
"""In an array a record is known by its first key, which must be a plain word."""


def test_every_valid_record_is_one_row_in_every_layout() -> None:
    def test(records: list[dict[str, Any]], ascii: bool, indent: int | None, format: str) -> None:
        lines = [json.dumps(record, ensure_ascii=ascii).encode("utf-8", "surrogatepass") for record in records]
        array = json.dumps(records, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")
        for data in (b"\n".join(lines), array):
            assert len(check_rows(data, ".json", format)) == len(records)

    search(
        test,
        {
            "records": RECORDS,
            "ascii": st.booleans(),
            "indent": st.none() | st.integers(0, 3),
            "format": st.sampled_from(["wudao", "wanjuan", "skypile"]),
        },
        60,
    )


ODD = st.text(st.characters(), max_size=300) | st.text(
    "<>[]{}/&;#@.-0123456789abcd \n\t汉字\u200b\ud800\u202e", max_size=300
)


def test_filters_take_any_text() -> None:
    config = FilterConfig(min_chars=0, pii="mask")
    filters = build_filters(config)

    def test(text: str) -> None:
        (result,) = filter_texts([text], filters, config)
        cleaning.clean(text).encode()
        cleaning.find_personal(text)
        assert result.reason is None or re.fullmatch(r"[a-z_]+", result.reason)
        assert result.reason is not None or result.text.encode()

    search(test, {"text": ODD}, 150)


SCHEMAS = (PrepareConfig, GenerateConfig, ExportConfig)
SHIPPED = [path.read_text() for path in sorted((REPO / "conf").rglob("*.yaml"))]
KEY_WORDS = sorted({word for text in SHIPPED for word in re.findall(r"[a-z_]+(?=:)", text)})


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """A shipped YAML file with lines changed, or any small tree of known and unknown keys."""
    if draw(st.booleans()):
        leaves = (
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=12)
            | st.sampled_from(["${", "${x}", "???"])
        )
        keys = st.sampled_from(KEY_WORDS) | st.text(max_size=5)
        tree = st.recursive(
            leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)
        )
        return yaml.safe_dump(draw(tree), allow_unicode=True)
    lines = draw(st.sampled_from(SHIPPED)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = lines[place][: draw(st.integers(0, len(lines[place])))] + draw(
            st.text(st.characters(), max_size=6)
            | st.sampled_from([": {}", ": []", ": null", ": 3", "- x", "&a *a", "!!python/name:os.system"])
        )
    return "\n".join(lines)


def test_any_configuration_loads_or_is_refused() -> None:
    def test(content: str, schema: type, arguments: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.yaml"
            path.write_bytes(content.encode("utf-8", "surrogatepass"))
            for argv in ([str(path)], [f"{key}" for key in arguments]):
                try:
                    load(schema, argv)
                except ConfigError as error:
                    assert str(error).strip()

    values = st.text(max_size=12) | st.sampled_from(
        ["[]", "{}", "[1,", "{a: b}", "${oc.env:HOME}", "${oc.decode:'1'}", "null", "0x1F"]
    )
    arguments = st.builds("{}={}".format, st.sampled_from(KEY_WORDS) | st.text(max_size=8), values)
    strategies = {
        "content": configurations(),
        "schema": st.sampled_from(SCHEMAS),
        "arguments": st.lists(arguments, max_size=3),
    }
    search(test, strategies, 40)


def test_any_path_is_listed_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x[1].jsonl").write_text("{}")

    def test(pattern: str) -> None:
        try:
            files = list_files(CorpusConfig("c", "jsonl", [f"{tmp_path}/a/{pattern}"]))
        except KunError as error:
            assert str(error).strip()
        else:
            assert [file.name for file in files] and all(file.name == "x[1].jsonl" for file in files)

    parts = st.sampled_from(
        ["*", "**", "?", "[", "]", "[z-a]", "[!x]", "[]", "x", "1", ".jsonl", "/", "..", "\\", "~", "%", "\0"]
    )
    search(test, {"pattern": st.lists(parts | st.text(max_size=2), max_size=6).map("".join)}, 150)


def test_taking_out_credentials_never_fails_and_is_stable() -> None:
    def test(text: str) -> None:
        once = without_credentials(text)
        assert without_credentials(once) == once
        secret = f"s3://key:{'S' * 30}@bucket/x {text}"
        assert "S" * 30 not in without_credentials(secret)
        assert json.loads(without_credentials(json.dumps({"a": text}))) is not None

    search(test, {"text": st.text("s3:/@?&=sigtoken\"'\\ a", max_size=60) | st.text(max_size=60)}, 200)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_loader_of_a_schema_runs_nothing(schema: type, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"):
        (tmp_path / "x.yaml").write_text(f"output: {tag} ['touch {mark}']\n")
        with pytest.raises(ConfigError):
            load(schema, [str(tmp_path / "x.yaml")])
    assert not mark.exists()
