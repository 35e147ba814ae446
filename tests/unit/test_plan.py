"""The plan: memory of Yi-34B against the figures of facts that are known, counts from real files, what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_estimate import corpus

from kun_ray.capacity import CARDS, Traffic, capacity, smallest_change
from kun_ray.config import ConfigError, load, top_level_keys
from kun_ray.cost import cost_of, cost_of_files
from kun_ray.demo.layout import clean_texts
from kun_ray.plan import GeneratePlan, PipelinePlan, PreparePlan, TrainPlan, plan, schema_of, sizes_at
from kun_ray.pool import PoolConfig
from kun_ray.progress import duration
from kun_ray.train.config import LoraConfig
from kun_ray.workload import Work, traffic

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
    change = "pools.label.tensor_parallel_size=4 pools.label.replicas=2"
    assert small["label"].fits == f"no: {change}" and "–" in capsys.readouterr().out
    applied = [*argv, "card=A100-40", f"stages.label.2={change.split()[0]}"]
    mended = {line.stage: line for line in plan(load(PipelinePlan, applied))}
    assert mended["label"].runs, "the change can be given as the docs say"
    del argv[2:4]
    plan(load(PipelinePlan, argv))
    assert "10,000 pairs in seeds.jsonl, which is not there" in capsys.readouterr().out


def test_a_plan_for_cpus_says_nothing_of_gpus(tmp_path: Path, model_folder: Any, capsys: Any) -> None:
    sizes = f"model_config={model_folder()}/config.json"
    argv = ["output=/nowhere/demo", "seeds=/nowhere/s", "held_out=/nowhere/h", sizes, "price_per_gpu_hour=2"]
    argv += ["num_documents=300", "tokens_per_document=200"]
    lines = plan(load(PipelinePlan, [str(REPO / "conf/pipeline/demo.yaml"), *argv]))
    out = capsys.readouterr().out
    assert "on CPUs alone" in out and "two x86 cores' FLOPs" in out and "loading models" in out
    assert "GPU" not in out and "A100" not in out
    whats = {line.stage: line.what for line in lines}
    num_parameters = cost_of(sizes.partition("=")[2]).num_parameters
    assert 1e6 < num_parameters < 1e8, "what would be 0.0xB"
    assert f"{num_parameters / 1e6:.2f}M" in whats["train_label"]
    assert f"1 × {num_parameters / 1e6:.2f}M, {num_parameters * 4 / 1e6:.1f} MB weights" in whats["curate"]
    assert re.search(r"^ +\S+ rows at once, \S+ rows/s", out, re.MULTILINE), (
        "a line of its own, numbers beside their units"
    )


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


GENERATE = [str(REPO / "conf/generate.yaml"), "input=/nowhere", "output=/nowhere/out", f"model_config={YI}"]
GENERATE += ["pools.label.model=org/label", "pools.chat.model=org/chat", "num_documents=1e6", "tokens_per_document=300"]
GENERATE += ["pools.label.tensor_parallel_size=2", "pools.chat.tensor_parallel_size=2", "pools.chat.replicas=3"]


def test_pools_hold_their_gpus_until_the_slowest_ends(capsys: pytest.CaptureFixture[str]) -> None:
    label, chat = plan(load(GeneratePlan, [*GENERATE, "price_per_gpu_hour=2"]))
    assert (label.gpus, chat.gpus) == (2, 6) and label.seconds != chat.seconds
    longest = max(label.seconds, chat.seconds)
    held = 8 * longest / 3600
    out = capsys.readouterr().out
    assert label.gpu_hours + chat.gpu_hours == pytest.approx(held)
    assert (
        f"total: {duration(longest)} if" in out and f"{held:,.1f} GPU-hours" in out and f"{2 * held:,.0f} at 2" in out
    )
    slow, fast, name = (label, chat, "label") if label.seconds > chat.seconds else (chat, label, "chat")
    assert f"its slowest pool is {name}" in out and f"{duration(fast.seconds)} of {duration(longest)}" in out
    wanted = int(re.findall(r"with (\d+) replicas it would keep up", out)[0])
    more = {line.pool: line for line in plan(load(GeneratePlan, [*GENERATE, f"pools.{name}.replicas={wanted}"]))}
    assert more[slow.pool].seconds <= fast.seconds
    less = {line.pool: line for line in plan(load(GeneratePlan, [*GENERATE, f"pools.{name}.replicas={wanted - 1}"]))}
    assert less[slow.pool].seconds > fast.seconds


def test_what_is_left_out_of_the_total_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(load(GeneratePlan, [*GENERATE, "pools.label.tensor_parallel_size=1"]))
    out = capsys.readouterr().out
    assert "0.0 GPU-hours" in out and "without: generate (label does not fit)" in out
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"instruction": "问", "output": "答"}\n')
    argv = [
        f"data=[{{path: {seeds}}}]",
        "model=org/base",
        "output=/nowhere/out",
        f"model_config={YI}",
        "accelerator=gpu",
    ]
    plan(load(TrainPlan, argv))
    assert "without: train (does not fit)" in capsys.readouterr().out
    argv = [f"corpora=[{corpus(tmp_path, 's', ['好'])}]", f"output={tmp_path}/out"]
    assert plan(load(PreparePlan, [*argv, "num_documents=10", "tokens_per_document=10"])) == []
    said = "without: prepare (num_documents and tokens_per_document are given)"
    assert said in capsys.readouterr().out


def test_disk_holds_what_is_written(tmp_path: Path) -> None:
    text = clean_texts()[0]
    documents = corpus(tmp_path, "s", [f"{n}{text}" for n in range(500)])
    argv = [f"corpora=[{documents}]", f"output={tmp_path}/out"]
    both = [plan(load(PreparePlan, [*argv, f"dedup.near={near}"]))[0].disk_gb for near in ("false", "true")]
    num_bytes = 500 * len(text.encode())
    assert both[0] * 1e9 == pytest.approx(num_bytes, rel=0.1), "compressed twofold, and there twice until prepare ends"
    assert (both[1] - both[0]) * 1e9 > 500 * 100 * 4, "the copy has signatures"
    label, chat = plan(load(GeneratePlan, GENERATE))
    # text of accepted rows, all instructions, accepted answers; once for the stage
    assert label.disk_gb == 0 and chat.disk_gb == pytest.approx(1e6 * (150 + 60 + 175) * 4.5 / 2 / 1e9)
    one = [*GENERATE[1:5], "num_documents=1e6", "tokens_per_document=300", "pools.label.tensor_parallel_size=2"]
    (only,) = plan(load(GeneratePlan, [str(REPO / "conf/label.yaml"), *(a for a in one if "chat" not in a)]))
    assert only.disk_gb == pytest.approx(1e6 * (300 + 60) * 4.5 / 2 / 1e9), "label writes no answers"


def test_only_a_model_that_this_run_trains_has_the_sizes_of_its_base(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = model_folder("base"), model_folder("other")
    trained = str(tmp_path / "run/train_label/model")
    assert sizes_at(trained, None, base) == base
    assert sizes_at(other, None, base) == other, "a model that is there has its own sizes"
    assert sizes_at(other, YI) == YI
    with pytest.raises(ConfigError, match="there is no folder"):
        sizes_at(trained, None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = [
        str(REPO / "conf/pipeline/yi-34b.yaml"),
        f"output={tmp_path}/kun",
        "seeds=/nowhere/s.jsonl",
        "held_out=/nowhere/h",
    ]
    argv += [f"models.base={base}", "num_documents=10", "tokens_per_document=30", "card=A100-80"]
    assert all(line.runs for line in plan(load(PipelinePlan, argv)))
    with pytest.raises(ConfigError, match="there is no folder org/label-6b here"):
        plan(load(PipelinePlan, [*argv, "models.label=org/label-6b"]))


def test_float32_keeps_float32_keys() -> None:
    cost = cost_of(YI)
    tokens = {
        dtype: capacity(pool(engine=engine), cost, CARDS["H200"], ROW)
        for dtype, engine in (("half", {"dtype": "half"}), ("float32", {"dtype": "float32"}), ("fp8", {"dtype": "float32", "kv_cache_dtype": "fp8"}))
    }  # fmt: skip
    of_one = {dtype: found.kv_gb / found.kv_tokens for dtype, found in tokens.items()}
    assert of_one["float32"] == pytest.approx(2 * of_one["half"], rel=0.01)
    assert of_one["fp8"] == pytest.approx(of_one["half"] / 2, rel=0.01)


def test_no_context_is_advised_that_the_prompts_do_not_fit() -> None:
    cost, asked = dataclasses.replace(cost_of(YI), context=200_000), pool(max_model_len=65536)
    short, long = (dataclasses.replace(ROW, longest=longest) for longest in (32_000, 40_000))
    assert smallest_change(asked, cost, CARDS["L40S"], short) == "max_model_len=32768"
    assert not smallest_change(asked, cost, CARDS["L40S"], long).startswith("max_model_len")
    config = load(GeneratePlan, GENERATE)
    found = traffic(config.pools["label"], config, Work(10, 300, longest=500), 0.5)
    assert config.steps.label is not None
    assert 500 + config.steps.label.sampling.max_tokens < found.longest < 700 + config.steps.label.sampling.max_tokens


def test_a_pipelines_missing_model_is_named_by_the_pipelines_key(tmp_path: Path) -> None:
    documents = corpus(tmp_path, "s", [clean_texts()[0]])
    argv = [str(REPO / "conf/pipeline/yi-34b.yaml"), f"corpora=[{documents}]", f"output={tmp_path}/run"]
    argv += [f"models.base={tmp_path}/base", "seeds=/nowhere/s.jsonl", "held_out=/nowhere/h"]
    for more in ([], [f"model_config={YI}"]):  # sizes are given, but the sample takes the base model's tokenizer
        with pytest.raises(ConfigError, match=rf"models.base: there is no folder {tmp_path}/base"):
            plan(load(PipelinePlan, [*argv, *more]))
    counts = ["num_documents=10", "tokens_per_document=30", f"model_config={YI}"]
    assert plan(load(PipelinePlan, [*argv, *counts])), "needs neither sizes nor a tokenizer"
