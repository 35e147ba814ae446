"""A run for the tests of the report: corpora on disk, read by the real readers, with the fate of each document set by hand.

Not a stage's real work, but real folders: real offsets, real ids, manifests, a real export.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.corpora import CorpusConfig, list_files, read_file
from kun_ray.counts import prove_counts
from kun_ray.export import ExportConfig, export
from kun_ray.schema import DOCUMENT, to_table, with_steps
from kun_ray.store import Folder, input_fingerprint, open_stage

HOSTILE = """</script><script>document.title='owned'</script><img src=x onerror="document.title='owned'">'";<!--"""
"""In text, title, meta, instruction, answer and the name of a source: none of it may ever be markup."""
STEPS = ["label", "score", "polish"]
Row = dict[str, Any]

WEB = [
    "泡一壶好茶，水温很要紧。绿茶用八十度左右的水，水太烫会把茶叶烫熟，茶汤发黄发苦。红茶和乌龙茶可以用刚烧开的水。",
    "猫总爱钻纸箱，是因为狭小的空间让它觉得安全。在野外，四面有遮挡的地方不容易被天敌发现。",
    "晒被子不必晒一整天，上午十点到下午两点之间晒两三个小时就够了，收回来以后轻轻拍一拍即可。",
    f"这一段里混进了网页代码：{HOSTILE}，不过正文讲的是怎样给自行车链条上油。",
    "太短。",
    "泡一壶好茶，水温很要紧。",
    "大家好大家好大家好大家好大家好大家好大家好大家好大家好大家好。",
    "山里的雾多在清晨出现，太阳出来以后地面变暖，雾气就慢慢散了，这时候最适合出门拍照。",
    "学骑自行车的人常常低头看轮子，其实眼睛应该望着前方，身体自然就会保持平衡。",
    "做面包的时候，面团发到两倍大就可以排气整形，手指戳一个洞不回缩就是发好了。",
]
FATES: list[Row] = [
    {"instruction": "介绍一下泡茶时怎样掌握水温。", "verdict": "好", "score": 0.91,
     "answer": "泡一壶好茶，水温很要紧。绿茶用八十度左右的水，太烫会把茶叶烫熟。红茶和乌龙茶可以用刚烧开的水，泡之前先温一温壶。"},
    {"instruction": "那个东西怎么弄？", "verdict": "差", "score": 0.12, "status": "rejected", "reason": "verdict_bad"},
    {"instruction": "说明晒被子要注意什么。", "verdict": "好", "score": 0.7, "answer": "晒两小时。", "status": "rejected", "reason": "answer_short"},
    {"instruction": f"写一段给自行车链条上油的说明。{HOSTILE}", "verdict": "好", "score": 0.66, "answer": f"先擦干净链条，再滴油。{HOSTILE}"},
    {"status": "rejected", "reason": "too_short"},
    {"status": "rejected", "reason": "near_duplicate"},
    {"status": "rejected", "reason": "repetition"},
    {"instruction": "为什么山里的雾多在清晨？", "verdict": "好", "score": 0.83, "answer": "雾雾雾雾雾雾雾雾雾雾", "status": "rejected", "reason": "repetition"},
    {"instruction": "怎样学骑自行车？", "verdict": "好", "score": 0.77, "status": "failed", "reason": "engine_error"},
    {"instruction": "请写一篇关于做面包的短文。", "verdict": "好", "score": 0.58, "answer": "面团发到两倍大就可以排气整形，手指戳一个洞不回缩就是发好了。"},
]  # fmt: skip


def make_run(folder: Path, corpora: Path | None = None, threshold: float = 0.5, exported: bool = True) -> Path:
    """prepare, generate and export below `folder`; `corpora` is where the raw files are made, or found if they are there.

    Rows that score below `threshold` are rejected for it.
    """
    configs = make_corpora(corpora or folder / "corpora")
    rows = [
        row
        for config in configs
        for file in list_files(config)
        for t in read_file(config, file)
        for row in t.to_pylist()
    ]
    web, others = (
        [r for r in rows if r["source"].startswith("web")],
        [r for r in rows if not r["source"].startswith("web")],
    )
    assert [row["text"] for row in web] == [*WEB, None]  # the last record is broken
    prepared = [_prepared(row, fate) for row, fate in zip(web, [*FATES, {}], strict=True)] + [
        {**row, "text": None, "status": "rejected", "reason": "not_chinese"} for row in others
    ]
    prepare = write_stage(
        folder / "prepare", prepared, DOCUMENT, {"corpora": {config.name: {"format": config.format} for config in configs}},
        {"corpora": [dataclasses.asdict(config) for config in configs]},
    )  # fmt: skip
    fates = [*FATES, *({} for _ in range(len(prepared) - len(FATES)))]
    done = [_generated(row, fate, threshold) for row, fate in zip(prepared, fates, strict=True)]
    fingerprint = {
        "input": input_fingerprint(prepare),
        "pools": {
            "label": {"model": "label", "steps": ["label"]},
            "chat": {"model": "chat", "steps": ["score", "polish"]},
        },
        "steps": {"score": {"threshold": threshold}},
    }
    generate = write_stage(
        folder / "generate", done, with_steps(DOCUMENT, STEPS), fingerprint, {"input": str(folder / "prepare")}
    )
    write_metrics(generate, [[0, 4, 8], [8, len(done)]])
    if exported:
        export(ExportConfig(input=generate.uri, output=str(folder / "export"), formats=["alpaca"]))
    return folder


def make_corpora(folder: Path) -> list[CorpusConfig]:
    """Raw files: JSON lines (one record broken), gzipped JSON lines, a WuDao array, Parquet, a tar."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": text, "title": HOSTILE if n == 3 else None, "url": HOSTILE}, ensure_ascii=False)
        for n, text in enumerate(WEB)
    ]
    (folder / "web.jsonl").write_text("\n".join([*lines, '{"text": "这一行没有写完']))
    secret = "My mail is someone@example.com, write me. " * 3
    english = [{"text": f"Not Chinese at all, number {n}. {secret}"} for n in range(3)]
    (folder / "english.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, english)).encode()))
    (folder / "wudao.json").write_text(
        json.dumps([{"id": n, "title": "", "content": f"WuDao in English, {n}."} for n in range(2)])
    )
    pq.write_table(
        pa.table({"text": [f"Parquet row {n} in English." for n in range(5)]}),
        folder / "rows.parquet",
        row_group_size=2,
    )
    return [
        CorpusConfig(f"web{HOSTILE}", "jsonl", [str(folder / "web.jsonl")], title_field="title", meta_fields=["url"]),
        CorpusConfig("english", "jsonl", [str(folder / "english.jsonl.gz")]),
        CorpusConfig("wudao", "wudao", [str(folder / "wudao.json")]),
        CorpusConfig("rows", "parquet", [str(folder / "rows.parquet")]),
    ]


def write_stage(
    folder: Path, rows: list[Row], schema: pa.Schema, fingerprint: Row, config: Row, complete: bool = True
) -> Folder:
    """A stage folder of two parts."""
    stage = open_stage(str(folder), fingerprint, config)
    half = (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(to_table(list(part), schema), stage.child(f"part-{number}.parquet"))
    if complete:
        stage.finish({"stage": folder.name, **prove_counts(stage, len(rows)), "elapsed_s": 60.0})
    return stage


def write_metrics(stage: Folder, attempts: list[list[int]]) -> None:
    """metrics.jsonl: for each attempt the rows done at its lines, 5 seconds apart; the first loses a replica on the way."""
    for number, done in enumerate(attempts):
        for line, rows_done in enumerate(done):
            replicas = 1 if number == 0 and line == len(done) - 1 else 2
            pools = {
                "label": {
                    "replicas": replicas,
                    "in_flight": 3,
                    "prompt_tokens_per_s": 100.0,
                    "output_tokens_per_s": 20.0,
                }
            }
            stage.append_metrics(
                {
                    "elapsed_s": 5.0 * (line + 1),
                    "rows_total": attempts[-1][-1],
                    "rows_done": rows_done,
                    "rows_per_s": 1.0,
                    "pools": pools,
                }
            )


def _prepared(row: Row, fate: Row) -> Row:
    if row["status"] != "ok":
        return row
    if fate.get("reason") and "instruction" not in fate:
        return {**row, "text": None, "status": fate["status"], "reason": fate["reason"]}
    return {**row, "tokens": len(row["text"]), "perplexity": 100.0 + len(row["text"])}


def _generated(row: Row, fate: Row, threshold: float) -> Row:
    if "instruction" not in fate:
        return row
    done = {**row, **fate}
    if fate["score"] < threshold and done["status"] == "ok":
        done |= {"status": "rejected", "reason": "below_threshold", "answer": None}
    reached = 3 if done.get("answer") else 2
    for step in STEPS[:reached]:
        done |= {f"{step}_prompt_tokens": 40, f"{step}_output_tokens": 9, f"{step}_finish_reason": "stop"}
    return done if done["status"] == "ok" else {**done, "text": None}
