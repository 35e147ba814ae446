"""What a record of each corpus becomes, and what becomes of records and files that cannot be read."""

import gzip
import json
import os
import subprocess
import sys
import textwrap

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kun_ray import documents, parquet, records, schema
from kun_ray.contents import Content, render_exam, wanjuan_subset, without_title
from kun_ray.corpora import CorpusConfig, list_files, read_file


def config(path, format="jsonl", **fields) -> CorpusConfig:
    return CorpusConfig(name="c", format=format, paths=[str(path)], **fields)


def rows(corpus: CorpusConfig) -> list[dict]:
    tables = [table for file in list_files(corpus) for table in read_file(corpus, file)]
    assert all(table.schema == schema.DOCUMENT for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def put(path, *records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")


def test_wudao(tmp_path):
    record = {
        "id": 7,
        "uniqueKey": "u",
        "titleUkey": "t",
        "dataType": "科技",
        "title": "人工智能的未来",
        "content": "人工智能的未来 正文。",
    }
    (tmp_path / "part-2021.json").write_text(
        "\n" + json.dumps([record, {**record, "content": None}], ensure_ascii=False)
    )
    (tmp_path / "lines.json").write_text("\ufeff" + json.dumps(record))
    in_lines, good, bad = rows(config(tmp_path, "wudao"))
    assert in_lines["text"] == "正文。"
    assert (good["text"], good["title"], good["status"], good["reason"]) == ("正文。", "人工智能的未来", "ok", None)
    expected = {"id": 7, "uniqueKey": "u", "titleUkey": "t", "dataType": "科技", "file": "part-2021.json", "offset": 2}
    assert json.loads(good["meta"]) == expected
    assert (bad["text"], bad["status"], bad["reason"]) == (None, "failed", "missing_field")
    assert "content" in json.loads(bad["meta"])["error"]
    assert (good["tokens"], good["perplexity"]) == (None, None)


def test_a_wudao_file_that_lost_its_beginning_is_read_from_the_next_record(tmp_path):
    records = json.dumps([{"content": f"文{i}"} for i in range(5)], ensure_ascii=False)
    (tmp_path / "x.json").write_text(records[8:])
    assert [row["text"] for row in rows(config(tmp_path, "wudao"))] == [None, "文1", "文2", "文3", "文4"]


@pytest.mark.parametrize(
    ("text", "title", "expected"),
    [
        ("标题 正文", "标题", "正文"),
        ("\u3000标题\u3000正文", " 标题 ", "正文"),
        ("标题。正文", "标题", "正文"),
        ("怎么做？先洗手", "怎么做？", "先洗手"),
        ("二〇二一年度招生简章公布各省考生注意", "二〇二一年度招生简章公布", "各省考生注意"),
        ("北京大学位于北京", "北京大学", "北京大学位于北京"),
        ("中华人民共和国国务院的组织", "中华人民共和国国务院", "中华人民共和国国务院的组织"),
        ("标题", "标题", "标题"),
        ("标题 ", "标题", "标题 "),
        ("正文 标题", "标题", "正文 标题"),
        ("正文", "", "正文"),
    ],
)
def test_a_repeated_title_is_cut_and_a_sentence_is_not(text, title, expected):
    assert without_title(text, title) == expected


def test_wanjuan_subsets_come_from_the_record_or_the_path(tmp_path):
    put(
        tmp_path / "raw/nlp/CN/Law-cn/part-0.jsonl",
        {"id": "a", "content": "法"},
        {"content": "网", "subset": "WebText-cn"},
    )
    assert [json.loads(row["meta"])["subset"] for row in rows(config(tmp_path / "raw/nlp/CN/Law-cn", "wanjuan"))] == [
        "Law-cn",
        "WebText-cn",
    ]
    assert wanjuan_subset("/WebText-cn/x.tar.gz!Patent-cn/y.jsonl") == "Patent-cn"
    assert wanjuan_subset("/data/chinanews-CN/y") == "ChinaNews-cn"
    assert wanjuan_subset("/data/y") is None


def test_exam_questions_become_text(tmp_path):
    question = {
        "id": "e",
        "q_type": None,
        "q_main": "1+1=?",
        "option_a": "1",
        "option_b": "2",
        "option_c": "",
        "option_d": None,
    }
    answer = {
        "std_ans": "B",
        "answer": "x",
        "answer_detail": "相加。",
        "grade": "小学",
        "major": "数学",
        "keypoint": "加法",
    }
    put(
        tmp_path / "Exam-cn/p.jsonl",
        {**question, **answer},
        {**question, "q_main": None},
        {"q_main": "何为道？", "answer": ["无", "名"]},
    )
    full, missing, short = rows(config(tmp_path, "wanjuan"))
    assert full["text"] == "题目：1+1=?\n选项：\nA. 1\nB. 2\n答案：B\n解析：相加。"
    meta = json.loads(full["meta"])
    assert [meta[key] for key in ("id", "subset", "grade", "major", "keypoint")] == [
        "e",
        "Exam-cn",
        "小学",
        "数学",
        "加法",
    ]
    assert missing["reason"] == "missing_field" and short["text"] == "题目：何为道？\n答案：无；名"
    assert render_exam({"q_main": "问", "std_ans": None, "answer": 3}) == "题目：问\n答案：3"


def test_named_fields(tmp_path):
    put(
        tmp_path / "x.jsonl",
        {"body": "正文", "head": "题", "url": "u", "tags": [1], "n": None},
        {"text": "x"},
        {"body": 3},
        {"body": ""},
    )
    found = rows(config(tmp_path, text_field="body", title_field="head", meta_fields=["url", "tags", "n"]))
    assert [(row["text"], row["status"], row["reason"]) for row in found] == [
        ("正文", "ok", None),
        (None, "failed", "missing_field"),
        (None, "failed", "missing_field"),
        ("", "ok", None),  # the length filter rejects it
    ]
    assert found[0]["title"] == "题" and found[0]["source"] == "c"
    assert json.loads(found[0]["meta"]) == {"url": "u", "tags": [1], "file": "x.jsonl", "offset": 0}


def test_skypile_reads_lines_gzip_and_parquet_alike(tmp_path):
    texts = [f"天空 {i}" for i in range(2500)]
    put(tmp_path / "2020-40_zh_head_0000.jsonl", *({"text": text} for text in texts))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "2020-40_zh_head_0000.jsonl").read_bytes()))
    pq.write_table(pa.table({"text": texts, "url": texts}), tmp_path / "c.parquet", row_group_size=700)
    corpus = config(tmp_path, "skypile", meta_fields=["url"])
    found = rows(corpus)
    assert [row["text"] for row in found] == texts * 3 and len({row["doc_id"] for row in found}) == 7500
    assert json.loads(found[-1]["meta"]) == {"url": "天空 2499", "file": "c.parquet", "offset": 2499}
    sizes = [table.num_rows for table in read_file(corpus, list_files(corpus)[2])]
    assert sum(sizes) == 2500 and 1300 < sizes[0] <= 2000, "row groups of 700: two to a table"


ODD = [
    {"text": "好"}, {"text": ""}, {"text": None}, {"text": 3}, {}, {"text": "有题", "title": "题"}, {"text": "题", "title": 4},
    {"text": "题目很好。 正文", "title": "题目很好。", "id": 7, "grade": None}, {"text": "有子集", "subset": "Law-cn", "major": ["法"]},
    {"q_main": "一加一？", "std_ans": "二", "q_type": "填空"}, {"text": "有网址", "url": "u"}, {"text": "大数", "url": 10**30}, {"text": "深", "url": [[[{"a": None}]]]}, {"text": "制表\x01"},
]  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*ODD, *[{"text": "如常"}] * 30, "{", "[1]", ""]), max_size=300),
    st.sampled_from(["jsonl", "wudao", "wanjuan", "parquet"]),
    st.sampled_from([3000, 16 << 20]),
)
def test_records_become_the_same_rows_together_and_one_by_one(tmp_path, records, format, most_bytes):
    path = tmp_path / f"x.{format}"
    if format == "parquet":
        found = [record for record in records if isinstance(record, dict) and record.get("text") != 3]
        columns = {name: [record.get(name) for record in found] for name in ("text", "title", "url")}
        urls = [None if url is None else str(url) for url in columns["url"]]
        titles = [None if title is None else str(title) for title in columns["title"]]
        pq.write_table(pa.table({"text": pa.array(columns["text"], pa.string()), "title": titles, "url": urls}), path)
    else:
        found = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        text = f"[{','.join(found)}]" if format == "wudao" else "\n".join(found)
        path.write_text(text if format == "jsonl" else text.replace("text", "content"))
    fields = {} if format in ("wudao", "wanjuan") else {"title_field": "title"}
    corpus = config(path, format, meta_fields=["url"], **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "MAX_BLOCK_BYTES", most_bytes)
        together = rows(corpus)
        patch.setattr(documents, "_rows", lambda *_: None)
        patch.setattr(documents, "as_columns", lambda *_: None)
        patch.setattr(parquet, "_columns", lambda *_: None)
        assert rows(corpus) == together


VALUES = st.one_of(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['","', '说"好",', ',"', "\\", "\n", ",\n  ", "%d%b", "},{"]), min_size=3, max_size=3),
    st.lists(st.integers(-(2**63), 2**64 - 1) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    st.lists(st.none() | st.text("a文") | st.lists(st.integers(0, 9)), min_size=3, max_size=3),
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "网址", "a%b", 'quo"te', "back\\slash"]), VALUES))
def test_meta_is_the_same_json_field_by_field_and_row_by_row(meta):
    columns = records.Columns(range(0, 30, 10), ["文"] * 3, [None] * 3, meta, ["text"] * 3)
    place = documents._place("100%/x.jsonl")
    row_by_row = [
        documents._meta_line(orjson.dumps(row), place, offset)
        for row, offset in zip(columns.metas(), columns.offsets, strict=True)
    ]
    assert documents._meta_lines(columns, place) == row_by_row
    assert [json.loads(line) for line in row_by_row] == [
        {**row, "file": "100%/x.jsonl", "offset": offset}
        for row, offset in zip(columns.metas(), columns.offsets, strict=True)
    ]


def test_a_format_may_find_one_content_at_a_time(tmp_path):
    put(
        tmp_path / "a.jsonl",
        {"posts": ["首帖", "回帖"], "subject": "标题", "board": "水区"},
        {"posts": []},
        {"posts": [3]},
    )

    def extract(value, path):
        posts = value["posts"]
        return Content(posts[0] if posts else None, value.get("subject"), {"board": value.get("board")}, "posts")

    (file,) = list_files(config(tmp_path))
    found = [row for table in documents.read_documents(file, "forum", extract) for row in table.to_pylist()]
    assert [(row["text"], row["title"], row["reason"]) for row in found] == [
        ("首帖", "标题", None), (None, None, "missing_field"), (None, None, "missing_field")
    ]  # fmt: skip
    assert json.loads(found[0]["meta"]) == {"board": "水区", "file": "a.jsonl", "offset": 0}


def test_the_path_gives_the_subset_where_a_record_does_not(tmp_path):
    path = tmp_path / "WebText-cn/a.jsonl"
    put(path, {"content": "甲"}, {"content": "乙", "subset": "Law-cn"}, {"content": "丙", "subset": None})
    found = rows(config(path, "wanjuan", meta_fields=["subset"]))
    assert [json.loads(row["meta"])["subset"] for row in found] == ["WebText-cn", "Law-cn", "WebText-cn"]
    put(tmp_path / "b.jsonl", {"content": "甲"})
    assert json.loads(rows(config(tmp_path / "b.jsonl", "wanjuan"))[0]["meta"]) == {"file": "b.jsonl", "offset": 0}


def test_a_damaged_page_of_parquet_costs_what_lies_behind_it(tmp_path):
    texts = [f"{number:08d}" + "文" * 100 for number in range(3000)]
    path, page = tmp_path / "a.parquet", 2000
    pq.write_table(
        pa.table({"text": texts}),
        path,
        use_dictionary=False,
        compression="zstd",
        data_page_size=page,
        write_batch_size=10,
    )
    data = bytearray(path.read_bytes())
    place = len(data) * 6 // 10
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = rows(config(path, "parquet"))
    good = [row["text"] for row in found if row["reason"] is None]
    assert len(found) == 3000 and good == texts[: len(good)] and len(good) > 1500
    assert {row["reason"] for row in found[len(good) :]} == {"bad_parquet"}


def test_long_documents_of_parquet_fill_tables_together(tmp_path, monkeypatch):
    texts = ["文" * 3000 + str(number) for number in range(4000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    monkeypatch.setattr(documents, "one_by_one", None)
    tables = [*read_file(corpus := config(tmp_path, "parquet"), list_files(corpus)[0])]
    assert [text for table in tables for text in table["text"].to_pylist()] == texts
    assert max(table.nbytes for table in tables) < 20 << 20


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_only_the_columns_that_are_wanted_are_read_of_a_parquet_file(tmp_path, kind):
    path = tmp_path / "x.parquet"
    noise = [os.urandom(40).hex() for _ in range(600)]
    texts = pa.array([f"文{i}" for i in range(600)]).cast(pa.binary() if kind == pa.binary() else pa.string())
    table = pa.table({"text": texts.cast(kind), "noise": noise, "url": noise})
    pq.write_table(table, path, use_dictionary=["text"])
    place = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 200] = b"\xff" * 200
    path.write_bytes(data)
    found = rows(config(path, "parquet", meta_fields=["url", "absent"]))
    assert [(row["text"], json.loads(row["meta"])["url"]) for row in found] == [
        (f"文{i}", noise[i]) for i in range(600)
    ]
    assert {row["reason"] for row in rows(config(path, "wanjuan"))} == {"bad_parquet"}, (
        "that format looks at all columns"
    )


def test_parquet_that_is_not_as_it_should_be(tmp_path):
    nulls = pa.table({"text": pa.array(["好", None, "坏"]).dictionary_encode()})
    pq.write_table(nulls, tmp_path / "nulls.parquet")
    pq.write_table(pa.table({"other": ["x", "y"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": pa.array([b"\xe5\xa5\xbd", b"\xff"], pa.binary())}), tmp_path / "binary.parquet")
    lying = pa.StringArray.from_buffers(2, *pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers()[1:])
    pq.write_table(pa.table({"text": lying}), tmp_path / "lying.parquet")
    fixed = pa.array([b"ok", b"\xff\xff"], pa.binary(2))
    pq.write_table(pa.table({"text": fixed}), tmp_path / "fixed.parquet")
    pq.write_table(pa.table({"text": pa.array([1, 2])}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "zero.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "nulls.parquet").read_bytes()[:-20])
    (tmp_path / "rubbish.parquet").write_bytes(b"rubbish")
    found: dict[str, list] = {}
    for row in rows(config(tmp_path, "parquet")):
        found.setdefault(json.loads(row["meta"])["file"].split(".")[0], []).append(row["reason"] or row["text"])
    assert found == {
        "nulls": ["好", "missing_field", "坏"],
        "other": ["missing_field"] * 2,
        "binary": ["好", "bad_encoding"],
        "lying": ["ok", "bad_encoding"],
        "fixed": ["ok", "bad_encoding"],
        "numbers": ["missing_field"] * 2,
        "none": ["empty_file"],
        "zero": ["empty_file"],
        "cut": ["bad_parquet"],
        "rubbish": ["bad_parquet"],
    }


def test_a_text_that_a_dictionary_gives_to_all_rows_is_read_a_few_times_at_once(tmp_path):
    path = tmp_path / "x.parquet"
    text = "长" * 1_000_000  # 3 MB, of which the file needs some hundred bytes
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": repeated, "id": range(300)}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    code = """
        import resource, sys
        from kun_ray.corpora import CorpusConfig, list_files, read_file
        corpus = CorpusConfig("c", "parquet", [sys.argv[1]], meta_fields=["id"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        num_rows = sum(table.num_rows for file in list_files(corpus) for table in read_file(corpus, file))
        print(num_rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True)
    num_rows, grown_mb = map(int, ran.stdout.split())
    assert num_rows == 300
    assert grown_mb < 600, "all 256 rows that are read together would be 768 MB, and as much again as Python's values"


def test_a_damaged_row_group_fails_row_by_row_and_the_next_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": [os.urandom(50).hex() for _ in range(300)]}), path, row_group_size=100, use_dictionary=False
    )
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 200] = b"\xff" * 200
    path.write_bytes(data)
    found = rows(config(path, "parquet"))
    assert [row["reason"] for row in found] == [None] * 100 + ["bad_parquet"] * 100 + [None] * 100
    assert [json.loads(row["meta"])["offset"] for row in found] == list(range(300))

    monkeypatch.setattr(parquet, "MAX_LOST_ROWS", 99)  # a damaged file may claim any number of rows
    found = rows(config(path, "parquet"))
    assert [row["reason"] for row in found] == [None] * 100 + ["bad_parquet"] + [None] * 100
    assert json.loads(found[100]["meta"])["error"].startswith("100 rows: ")
    assert [json.loads(row["meta"])["offset"] for row in found] == [*range(101), *range(200, 300)]


def test_a_value_that_json_cannot_hold_leaves_the_others_of_its_meta_as_they_are(tmp_path):
    path = tmp_path / "x.jsonl"
    record = json.dumps({"text": "文X", "id": 7, "big": 10**30, "tags": ["a", None]})
    path.write_text(record.replace("X", "\t"))  # a bare tab is for Python's parser, whose integers have no end
    (found,) = rows(config(path, meta_fields=["id", "big", "tags", "absent"]))
    meta = {"id": 7, "big": str(10**30), "tags": ["a", None], "file": "x.jsonl", "offset": 0}
    assert json.loads(found["meta"]) == meta


def test_empty_and_unreadable_files_leave_one_failed_row(tmp_path):
    (tmp_path / "blank.jsonl").write_bytes(b"\xef\xbb\xbf \n\n")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "gone.jsonl").symlink_to("/nowhere")
    (tmp_path / "list.json").write_bytes(b"[ ]")
    found = rows(config(tmp_path))
    assert [(json.loads(row["meta"])["file"], row["status"], row["reason"]) for row in found] == [
        ("blank.jsonl", "failed", "empty_file"),
        ("empty.jsonl", "failed", "empty_file"),
        ("gone.jsonl", "failed", "unreadable_file"),
        ("list.json", "failed", "empty_file"),
    ]
    assert len({row["doc_id"] for row in found}) == 4


def test_a_failed_row_never_has_the_id_of_a_document(tmp_path):
    put(tmp_path / "x.jsonl", {"text": ""})
    empty_text = rows(config(tmp_path))[0]["doc_id"]
    (tmp_path / "x.jsonl").write_text("{")
    assert rows(config(tmp_path))[0]["doc_id"] != empty_text


def test_blocks_are_bounded_in_bytes(tmp_path):
    put(tmp_path / "x.jsonl", *({"text": "字" * 1_000_000} for _ in range(20)))
    corpus = config(tmp_path)
    assert max(table.nbytes for table in read_file(corpus, list_files(corpus)[0])) < 20 << 20


def test_meta_that_fast_json_cannot_write_is_kept(tmp_path):
    """Integers over 64 bits and deep nesting reach `meta` through the tolerant parser; they must not end the run."""
    deep = "[" * 300 + "]" * 300
    line = f'{{"id": {10**30}, "nested": {deep}, "text": "控制\x01字符"}}\n'
    (tmp_path / "a.jsonl").write_text(line + '{"id": 1, "nested": 2, "text": "好"}\n')
    odd, plain = rows(config(tmp_path / "a.jsonl", meta_fields=["id", "nested"]))
    assert json.loads(plain["meta"])["id"] == 1
    assert odd["status"] in ("ok", "failed") and json.loads(odd["meta"])["file"] == "a.jsonl"


def test_a_null_among_the_texts_of_a_parquet_file_says_which_field_it_is(tmp_path):
    pq.write_table(pa.table({"body": ["文", None]}), tmp_path / "x.parquet")
    good, bad = rows(config(tmp_path, "parquet", text_field="body"))
    assert (good["text"], bad["reason"]) == ("文", "missing_field")
    assert json.loads(bad["meta"])["error"] == "`body` is null or missing"


def test_a_text_may_be_kept_in_meta_too(tmp_path):
    pq.write_table(pa.table({"text": ["文"]}), tmp_path / "x.parquet")
    (row,) = rows(config(tmp_path, "parquet", meta_fields=["text"]))
    assert row["text"] == json.loads(row["meta"])["text"] == "文"


def test_blocks_are_bounded_in_bytes_of_meta_too(tmp_path):
    pq.write_table(pa.table({"text": ["文"] * 100, "html": ["<p>" * 300_000] * 100}), tmp_path / "x.parquet")
    corpus = config(tmp_path, "parquet", meta_fields=["html"])
    sizes = [table.nbytes for table in read_file(corpus, list_files(corpus)[0])]
    assert max(sizes) < 20 << 20 and len(sizes) >= 5


def test_blocks_are_bounded_in_bytes_of_titles_too(tmp_path):
    put(tmp_path / "x.jsonl", *({"text": "文", "title": "题" * 300_000} for _ in range(100)))
    corpus = config(tmp_path, title_field="title")
    sizes = [table.nbytes for table in read_file(corpus, list_files(corpus)[0])]
    assert max(sizes) < 20 << 20 and len(sizes) >= 5


def test_columns_of_a_parquet_file_may_have_the_same_name_or_one_that_is_no_text(tmp_path):
    twice = pa.table([pa.array(["文"]), pa.array([b"\xff\xff"], pa.binary(2))], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    pq.write_table(pa.table({"text": ["文"], "name": [1]}), tmp_path / "name.parquet")
    (tmp_path / "name.parquet").write_bytes((tmp_path / "name.parquet").read_bytes().replace(b"name", b"na\xff\xfe"))
    pq.write_table(pa.table({"text": ["文"], "more": [{"name": "a"}]}), tmp_path / "deep.parquet")
    (tmp_path / "deep.parquet").write_bytes((tmp_path / "deep.parquet").read_bytes().replace(b"name", b"na\xff\xfe"))
    reasons = {json.loads(row["meta"])["file"]: row["reason"] for row in rows(config(tmp_path, "parquet"))}
    assert reasons == {"twice.parquet": "bad_encoding", "name.parquet": "bad_parquet", "deep.parquet": "bad_parquet"}
