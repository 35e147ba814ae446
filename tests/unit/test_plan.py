"""The plan: memory of Yi-34B against the figures of facts that are known, counts from real files, what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kun_ray import store
from kun_ray.capacity import CARDS, Traffic, capacity, smallest_change
from kun_ray.config import ConfigError, load, top_level_keys
from kun_ray.cost import cost_of, cost_of_files
from kun_ray.demo.layout import clean_texts
from kun_ray.plan import GeneratePlan, PipelinePlan, PreparePlan, TrainPlan, plan, schema_of
from kun_ray.pool import PoolConfig
from kun_ray.schema import DOCUMENT, doc_id, to_table
from kun_ray.train.config import LoraConfig

REPO = Path(__file__).parents[2]
YI = str(REPO / "conf/shapes/yi-34b.json")
ROW = Traffic(prefill=330, output=60, context=600)


def pool(**changes: Any) -> PoolConfig:
    return PoolConfig(model="yi", steps=["label"], **{"tensor_parallel_size": 2, "max_model_len": 2048, **changes})


def test_yi_34b_on_two_a100_holds_half_its_weights_and_the_known_cache() -> None:
    found = capacity(pool(), cost_of(YI), CARDS["A100-80"], ROW)
    assert found.weights_gb == pytest.approx(34.39, abs=0.01)  # 68.8 GB in bf16 on two
    assert found.kv_gb / found.kv_tokens * 2 == pytest.approx(
        246e3 / 1e9, rel=0.01
    )  # 2 × 60 × 8 × 128 × 2 bytes a token
    assert found.fits and found.num_sequences == 256
    ideal = 2 * 312e12 * 0.5 / (2 * 33.93e9 * (ROW.prefill + ROW.output))
    assert 0.3 * ideal < found.rows_per_s < ideal  # a row costs at least its operations


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_read_from_files_are_those_of_the_model(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    for lora in (None, LoraConfig(rank=4)):
        assert cost_of_files(str(tmp_path), lora) == cost_of(str(tmp_path), lora)
    assert cost_of_files(str(tmp_path / "none")) is None


def test_more_of_anything_is_faster_and_longer_rows_are_slower() -> None:
    cost = cost_of(YI)
    rate = capacity(pool(), cost, CARDS["A100-80"], ROW).rows_per_s
    assert capacity(pool(), cost, CARDS["H200"], ROW).rows_per_s > 2 * rate
    assert capacity(pool(tensor_parallel_size=4), cost, CARDS["A100-80"], ROW).rows_per_s > 1.5 * rate
    for longer in ({"prefill": 660}, {"output": 120}, {"context": 6000}):
        assert capacity(pool(), cost, CARDS["A100-80"], dataclasses.replace(ROW, **longer)).rows_per_s < rate


@pytest.mark.parametrize(
    ("card", "changes", "advice"),
    [
        ("A100-40", {}, "tensor_parallel_size=4"),
        ("L40S", {"max_model_len": 65536}, "max_model_len=32768"),
        ("A100-80", {"tensor_parallel_size": 1}, "tensor_parallel_size=2"),
    ],
)
def test_what_does_not_fit_gets_the_smallest_change(card: str, changes: dict[str, Any], advice: str) -> None:
    cost = dataclasses.replace(cost_of(YI), context=200_000)
    asked = pool(**changes)
    assert not capacity(asked, cost, CARDS[card], ROW).fits
    assert smallest_change(asked, cost, CARDS[card], ROW) == advice
    key, value = advice.split("=")
    assert capacity(dataclasses.replace(asked, **{key: int(value)}), cost, CARDS[card], ROW).fits


def test_the_shipped_pipeline_is_planned_without_corpora_or_models(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        str(REPO / "conf/pipeline/yi-34b.yaml"),
        "output=/nowhere/kun",
        "seeds=/nowhere/seeds.jsonl",
        "held_out=/nowhere/held_out.jsonl",
        f"model_config={YI}",
    ]
    argv += ["num_documents=1e6", "tokens_per_document=300", "price_per_gpu_hour=2"]
    lines = {line.stage: line for line in plan(load(PipelinePlan, argv))}
    assert list(lines) == ["train_label", "label", "train_chat", "curate", "train_final"]
    assert all(line.runs and line.gpus == 8 for line in lines.values())
    # 10,000 pairs × 410+20 tokens × 6 epochs × ~204 GFLOP a token at 40 % of 8 × 312 TFLOP/s
    assert lines["train_label"].seconds == pytest.approx(10_000 * 430 * 6 * 204e9 / (0.4 * 8 * 312e12), rel=0.03)
    total = sum(line.gpu_hours for line in lines.values())
    assert f"{total:,.1f} GPU-hours on A100-80, {2 * total:,.0f} at 2 a GPU-hour" in capsys.readouterr().out
    small = {line.stage: line for line in plan(load(PipelinePlan, [*argv, "card=A100-40"]))}
    assert small["label"].fits == "no: tensor_parallel_size=4" and "–" in capsys.readouterr().out


def test_documents_are_counted_in_a_sample(tmp_path: Path, model_folder: Any, capsys: Any) -> None:
    texts = clean_texts()
    for part in range(3):
        rows = [{"text": texts[(n + part) % len(texts)]} for n in range(2000)]
        rows[::10] = [{"text": "短"} for _ in rows[::10]]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    argv = [f"corpora=[{{name: s, format: skypile, paths: ['{tmp_path}/*.jsonl']}}]", f"output={tmp_path}/out"]
    (line,) = plan(load(PreparePlan, [*argv, f"tokenizer={model_folder()}", "sample_records=300", "ray.num_cpus=2"]))
    records = float(line.what.split(" records")[0].replace(",", ""))
    assert records == pytest.approx(6000, rel=0.25) and line.seconds > 0
    assert re.search(r"(8[5-9]|90)% pass the filters", capsys.readouterr().out)  # a tenth is too short


def test_a_finished_run_corrects_the_speed(tmp_path: Path, model_folder: Any, capsys: Any) -> None:
    source = store.open_stage(str(tmp_path / "prepare"), {}, {})
    rows = [
        {"doc_id": doc_id("s", "f", n, ""), "source": "s", "text": "好", "meta": "{}", "tokens": 40, "status": "ok"}
        for n in range(50)
    ]
    pq.write_table(to_table(rows, DOCUMENT), source.child("part-0.parquet"))
    source.finish({"rows": 50})
    argv = [str(REPO / "conf/prompts.yaml"), f"input={source.uri}", f"output={tmp_path}/out", "pools.p.steps=[label]"]
    argv += [f"pools.p.model={model_folder()}", "pools.p.accelerator=cpu"]
    (before,) = plan(load(GeneratePlan, argv))
    done = store.open_stage(
        str(tmp_path / "done"),
        {},
        {"pools": {"p": {"model": model_folder(), "steps": ["label"], "accelerator": "cpu"}}},
    )
    pq.write_table(to_table(rows, DOCUMENT), done.child("part-0.parquet"))
    counters = {"answered": 50, "prompt_tokens": 5000, "cached_tokens": 1000, "output_tokens": 1000}
    seconds = []
    for busy in (1000.0, 2000.0):
        done.finish({"elapsed_s": 3000.0, "pools": {"p": {**counters, "busy_s": busy}}})
        seconds.append(plan(load(GeneratePlan, [*argv, f"measured=['{done.uri}']"]))[0].seconds)
    assert "speeds corrected by 1 measured runs" in capsys.readouterr().out
    assert seconds[1] == pytest.approx(2 * seconds[0]) and seconds[0] != pytest.approx(before.seconds)


def test_the_kind_of_configuration_is_found_by_its_keys() -> None:
    for name, kind in (
        ("pipeline/demo", PipelinePlan),
        ("generate", GeneratePlan),
        ("train/label", TrainPlan),
        ("prepare", PreparePlan),
    ):
        assert schema_of(top_level_keys([str(REPO / f"conf/{name}.yaml"), "output=x"])) is kind
    with pytest.raises(ConfigError, match="`card` is 'A10'"):
        plan(
            load(
                PreparePlan, [f"corpora=[{{name: s, format: skypile, paths: ['{REPO}/*.md']}}]", "output=x", "card=A10"]
            )
        )
    with pytest.raises(ConfigError, match="num_documents= and tokens_per_document="):
        plan(
            load(
                GeneratePlan, [str(REPO / "conf/label.yaml"), "input=/nowhere", "output=x", f"pools.label.model={REPO}"]
            )
        )
