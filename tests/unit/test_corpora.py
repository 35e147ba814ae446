"""Corpora: which files are found, how they are named and grouped."""

import json
import os
import pickle

import pytest

from kun_ray import schema
from kun_ray.config import ConfigError, KunError
from kun_ray.corpora import CorporaDatasource, CorpusConfig, list_corpora, list_files, read_file


def config(path, format="jsonl", **fields) -> CorpusConfig:
    return CorpusConfig(name="c", format=format, paths=[str(path)], **fields)


def rows(corpus: CorpusConfig) -> list[dict]:
    tables = [table for file in list_files(corpus) for table in read_file(corpus, file)]
    assert all(table.schema == schema.DOCUMENT for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def put(path, *records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")


def names(*paths) -> list[str]:
    return [file.name for file in list_files(CorpusConfig("c", "jsonl", [str(path) for path in paths]))]


def test_folders_globs_and_files_are_found_by_relative_name(tmp_path, monkeypatch):
    wanted = ["a.jsonl", "b/c.json", "b/d/e.jsonl.gz", "b/d/f.tar.gz", "g.parquet"]
    skipped = ["_SUCCESS", "_tmp/x.jsonl", ".git/y.jsonl", ".z.jsonl", "README.md", "b/f.tar.gz.md5"]
    for name in wanted + skipped + ["part-00000"]:
        put(tmp_path / name, {})
    assert names(tmp_path) == names(f"{tmp_path}/") == names(f"{tmp_path}/**") == wanted
    assert names(f"{tmp_path}/**/*.json*") == ["a.jsonl", "b/c.json", "b/d/e.jsonl.gz"]
    assert names(f"{tmp_path}/*.jsonl") == names(f"{tmp_path}/a.jsonl") == ["a.jsonl"]
    assert names(f"{tmp_path}/*/d/[e-f].*gz") == ["b/d/e.jsonl.gz", "b/d/f.tar.gz"]
    assert names(f"{tmp_path}/?/[!x].json") == ["b/c.json"]
    assert names(f"{tmp_path}/part-*") == ["part-00000"]  # without a suffix, and named
    assert names(tmp_path / "b", tmp_path / "b/*.json", tmp_path / "b") == ["c.json", "d/e.jsonl.gz", "d/f.tar.gz"]
    assert names(f"file://{tmp_path}/b/**/*.gz") == ["d/e.jsonl.gz", "d/f.tar.gz"]
    monkeypatch.chdir(tmp_path)
    assert names("b") == names("./b/**") == ["c.json", "d/e.jsonl.gz", "d/f.tar.gz"]
    assert names("*.jsonl") == ["a.jsonl"]


def test_names_with_wildcards_blanks_and_chinese_are_files_like_others(tmp_path):
    put(tmp_path / "科技 1.jsonl", {"text": "甲"})
    put(tmp_path / "a[1].jsonl", {"text": "乙"})
    put(tmp_path / "50%41 #?.jsonl", {"text": "丙"})
    assert names(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]
    assert [row["text"] for row in rows(config(f"file://{tmp_path}/科技*"))] == ["甲"]
    assert [row["text"] for row in rows(config(f"file://{tmp_path}"))] == ["丙", "乙", "甲"]


def test_loops_of_links_end_and_a_file_reached_twice_counts_once(tmp_path):
    put(tmp_path / "real/x.jsonl", {})
    (tmp_path / "real/again").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "real/x.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert names(tmp_path) == ["real/x.jsonl"]
    assert names(tmp_path / "a*") == ["a.jsonl"]
    assert names(tmp_path / "alias") == ["x.jsonl"]


def test_what_matches_nothing_is_named(tmp_path):
    put(tmp_path / "notes.txt", {})
    for pattern in (
        tmp_path,
        f"{tmp_path}/*.jsonl",
        f"{tmp_path}/none",
        f"{tmp_path}/none/*.jsonl",
        f"{tmp_path}/notes.txt/*",
    ):
        with pytest.raises(KunError) as error:
            list_files(config(pattern))
        assert str(pattern) in str(error.value)
    with pytest.raises(KunError, match="nosuch://x"):
        list_files(config("nosuch://x/y"))


def test_two_files_of_one_name_are_refused(tmp_path):
    put(tmp_path / "a/x.jsonl", {"text": "1"})
    put(tmp_path / "b/x.jsonl", {"text": "1"})
    with pytest.raises(KunError, match=r"a/x\.jsonl .*b/x\.jsonl"):
        list_files(CorpusConfig("c", "jsonl", [str(tmp_path / "a"), str(tmp_path / "b")]))
    assert names(f"{tmp_path}/*/x.jsonl") == ["a/x.jsonl", "b/x.jsonl"]
    with pytest.raises(KunError, match="its own name"):
        list_corpora([config(tmp_path / "a"), config(tmp_path / "b")])


def test_ids_survive_a_move_and_depend_on_the_source(tmp_path):
    put(tmp_path / "old/b/x.jsonl", {"text": "一"}, {"text": "一"}, {"no": "text"})
    before = [row["doc_id"] for row in rows(config(tmp_path / "old"))]
    (tmp_path / "old").rename(tmp_path / "new")
    assert [row["doc_id"] for row in rows(config(f"{tmp_path}/new/*/x.jsonl"))] == before
    assert before[0] == schema.doc_id("c", "b/x.jsonl", 0, "一") and len(set(before)) == 3
    other = CorpusConfig("other", "jsonl", [str(tmp_path / "new")])
    assert not {row["doc_id"] for row in rows(other)} & set(before)


def test_ids_are_those_of_earlier_versions():
    """A run that was begun with one version goes on with the next."""
    assert schema.doc_id("wudao", "part-2021.json", 1234567, "正文。") == "bc139a7d3f79b61e726f1964c0c691e3"
    assert schema.doc_ids("", "", [0, 0], [b"", b""]) == ["6cfcc144334ec8da5641bb25df71a123"] * 2


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": " c"},
        {"format": "csv"},
        {"paths": []},
        {"paths": [""]},
        {"text_field": ""},
        {"meta_fields": ["file"]},
    ],
)
def test_wrong_configurations_are_refused(fields):
    with pytest.raises(ConfigError):
        CorpusConfig(**{"name": "c", "format": "jsonl", "paths": ["x"], **fields})


def test_files_are_grouped_by_size(tmp_path):
    for index, size in enumerate([900, 500, 400, 10, 10, 10]):
        (tmp_path / f"{index}.jsonl").write_bytes(b" " * size)
    source = CorporaDatasource(list_corpora([config(tmp_path)]))
    groups = [{os.path.basename(path) for path in task.metadata.input_files} for task in source.get_read_tasks(2)]
    assert sorted(sum(int(name[0]) < 3 for name in group) for group in groups) == [1, 2]
    assert sorted(name for group in groups for name in group) == [f"{index}.jsonl" for index in range(6)]
    assert len(source.get_read_tasks(100)) == 6
    assert len(pickle.dumps(list_files(config(tmp_path)))) < 2000
