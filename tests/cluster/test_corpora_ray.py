"""read_corpora on a real Ray: three layouts in one dataset, one row per record, ids out of the read."""

import gzip
import io
import json
import tarfile

import ray

from kun_ray import schema
from kun_ray.corpora import CorpusConfig, list_corpora, num_rows_read, read_corpora
from kun_ray.store import Folder


def test_three_layouts_are_read_as_one_dataset(cluster, tmp_path):
    for folder in ("wudao", "wanjuan/Law-cn", "skypile"):
        (tmp_path / folder).mkdir(parents=True)
    for part in range(3):
        records = [{"id": i, "title": "题", "content": f"悟道 {part} {i}"} for i in range(1000)]
        data = json.dumps(records, ensure_ascii=False).encode()
        (tmp_path / f"wudao/part-{part}.json").write_bytes(data if part else data[:-2])  # one is cut
    lines = b"\n".join(json.dumps({"id": str(i), "content": f"法 {i}"}).encode() for i in range(3000))
    with tarfile.open(tmp_path / "wanjuan/Law-cn/part-0.jsonl.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("part-0.jsonl")
        member.size = len(lines)
        archive.addfile(member, io.BytesIO(lines))
    text = b"\n".join(b'{"text": "%d"}' % (i % 10) for i in range(5000)) + b"\nrubbish"
    (tmp_path / "skypile/2020-40_zh_head_0000.jsonl").write_bytes(text)
    (tmp_path / "skypile/2020-40_zh_middle_0000.jsonl.gz").write_bytes(gzip.compress(text))

    layouts = ("wudao", "wanjuan", "skypile")
    corpora = [CorpusConfig(layout, layout, [str(tmp_path / layout)]) for layout in layouts]
    files, counts = list_corpora(corpora), Folder(str(tmp_path / "counts"))
    (tmp_path / "counts").mkdir()
    tables = ray.get(read_corpora(files, num_tasks=4, counts=counts).to_arrow_refs())
    rows = [row for table in tables for row in table.to_pylist()]

    assert all(table.schema.equals(schema.DOCUMENT) for table in tables if table.num_rows)
    assert len({row["doc_id"] for row in rows}) == len(rows) == 3000 + 3000 + 10_002
    assert num_rows_read(counts, len(files)) == len(rows)
    counts = {(source, reason): 0 for source in layouts for reason in (None, "bad_json")}
    for row in rows:
        counts[row["source"], row["reason"]] += 1
    assert counts == {
        ("wudao", None): 2999,
        ("wudao", "bad_json"): 1,
        ("wanjuan", None): 3000,
        ("wanjuan", "bad_json"): 0,
        ("skypile", None): 10_000,
        ("skypile", "bad_json"): 2,
    }
    again = read_corpora(files, num_tasks=1).select_columns(["doc_id"]).take_all()
    assert {row["doc_id"] for row in again} == {row["doc_id"] for row in rows}
