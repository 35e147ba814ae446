"""What a plan takes from data that are there: tokens of documents, pairs of trainings, earlier runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kun_ray import store
from kun_ray.config import ConfigError, load
from kun_ray.plan import GeneratePlan, PipelinePlan, TrainPlan, plan
from kun_ray.schema import DOCUMENT, doc_id, to_table

REPO = Path(__file__).parents[2]
YI = str(REPO / "conf/shapes/yi-34b.json")


def part(stage: store.Folder, num_rows: int, tokens: int | None) -> None:
    """Gives a stage folder rows."""
    rows = [
        {"doc_id": doc_id("s", "f", n, ""), "source": "s", "text": "好", "meta": "{}", "tokens": tokens, "status": "ok"}
        for n in range(num_rows)
    ]
    pq.write_table(to_table(rows, DOCUMENT), stage.child("part-0.parquet"))


def prepared(folder: Path, num_rows: int, tokens: int | None) -> str:
    stage = store.open_stage(str(folder / "prepare"), {}, {})
    part(stage, num_rows, tokens)
    stage.finish({"rows": num_rows})
    return stage.uri


def measured_by(folder: Path, name: str, model: str, counters: dict[str, float]) -> str:
    """A finished generate stage of one pool on CPUs, with these counters in its summary."""
    pools = {"p": {"model": model, "steps": ["label"], "accelerator": "cpu"}}
    stage = store.open_stage(str(folder / name), {}, {"pools": pools})
    part(stage, 50, 40)
    stage.finish({"elapsed_s": 3000.0, "pools": {"p": counters}})
    return stage.uri


def test_uncounted_tokens_are_asked_for(tmp_path: Path, model_folder: Any) -> None:
    argv = [str(REPO / "conf/label.yaml"), f"input={prepared(tmp_path, 5, None)}", f"output={tmp_path}/out"]
    argv += [f"pools.label.model={model_folder()}"]
    with pytest.raises(ConfigError, match="without a tokenizer: give tokens_per_document="):
        plan(load(GeneratePlan, argv))
    (line,) = plan(load(GeneratePlan, [*argv, "tokens_per_document=40"]))
    assert line.seconds > 0


def training(model: str, *entries: str, **options: Any) -> Any:
    argv = [f"data=[{','.join(entries)}]", f"model={model}", "output=/nowhere/out", "epochs=2"]
    (line,) = plan(load(TrainPlan, [*argv, *(f"{key}={value}" for key, value in options.items())]))
    return line


def test_samples_of_a_training_are_those_of_all_its_data(tmp_path: Path, model_folder: Any, capsys: Any) -> None:
    model = model_folder()
    for name, count in (("a", 30), ("b", 70)):
        (tmp_path / f"{name}.jsonl").write_text('{"instruction": "如何学习？", "output": "多读书。"}\n' * count)
    a, b = f"path: {tmp_path}/a.jsonl", f"path: {tmp_path}/b.jsonl"
    both = training(model, f"{{{a}}}", f"{{{b}}}")
    assert both.what.startswith("100 samples × 2 epochs")
    assert training(model, f"{{{a}, weight: 2}}", f"{{{b}, max_samples: 10}}").what.startswith("70 samples")
    assert training(model, f"{{{a}}}", f"{{{b}}}", batch_size=10, max_steps=10).seconds == pytest.approx(
        both.seconds / 2
    )
    capsys.readouterr()
    assert training(model, f"{{{a}}}", "{path: /nowhere/c.jsonl, weight: 2}").what.startswith("20,030 samples")
    assert "assumed: 10,000 pairs in /nowhere/c.jsonl, which is not there" in capsys.readouterr().out


def test_an_export_that_is_there_counts_once(tmp_path: Path, model_folder: Any) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "问", "output": "答"}\n' * 30)
    model, run = model_folder(), tmp_path / "kun"
    argv = [
        str(REPO / "conf/pipeline/yi-34b.yaml"),
        f"output={run}",
        f"seeds={tmp_path}/seeds.jsonl",
        "held_out=/nowhere/h",
    ]
    argv += [
        "num_documents=1000",
        "tokens_per_document=30",
        f"models={{base: {model}, label: {model}, score: {model}, polish: {model}}}",
    ]
    for expected in ("530 samples", "50 samples"):  # half of the documents are accepted; the export holds 20
        final = {line.stage: line for line in plan(load(PipelinePlan, argv))}["train_final"]
        assert final.what.startswith(expected)
        (run / "export/sharegpt").mkdir(parents=True, exist_ok=True)
        turns = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
        (run / "export/sharegpt/train.jsonl").write_text((json.dumps({"conversations": turns}) + "\n") * 20)
        (run / "export/dataset_info.json").write_text("{}")


def test_a_measured_run_is_compared_with_its_own_model(tmp_path: Path, model_folder: Any) -> None:
    counters = {"answered": 50, "prompt_tokens": 5000, "cached_tokens": 0, "output_tokens": 1000, "busy_s": 100.0}
    done = measured_by(tmp_path, "done", model_folder(), counters)
    argv = [
        str(REPO / "conf/label.yaml"),
        "input=/nowhere",
        "output=/nowhere/out",
        f"pools.label.model={model_folder()}",
    ]
    argv += ["num_documents=100", "tokens_per_document=30", f"measured=['{done}']"]
    own, other = (plan(load(GeneratePlan, [*argv, *more]))[0] for more in ([], [f"model_config={YI}"]))
    plain = [plan(load(GeneratePlan, [*argv[:-1], *more]))[0].seconds for more in ([], [f"model_config={YI}"])]
    assert own.seconds / plain[0] == pytest.approx(other.seconds / plain[1])
    lost = measured_by(tmp_path, "lost", "/nowhere/model", counters)
    with pytest.raises(
        ConfigError, match="lost ran /nowhere/model, and must be compared with its sizes: there is no fol"
    ):
        plan(load(GeneratePlan, [*argv[:-1], f"measured=['{lost}']", f"model_config={YI}"]))


def test_a_finished_run_corrects_the_speed(tmp_path: Path, model_folder: Any, capsys: Any) -> None:
    source = prepared(tmp_path, 50, 40)
    argv = [str(REPO / "conf/prompts.yaml"), f"input={source}", f"output={tmp_path}/out", "pools.p.steps=[label]"]
    argv += [f"pools.p.model={model_folder()}", "pools.p.accelerator=cpu"]
    (before,) = plan(load(GeneratePlan, argv))
    counters = {"answered": 50, "prompt_tokens": 5000, "cached_tokens": 1000, "output_tokens": 1000}
    seconds = []
    for busy in (1000.0, 2000.0):
        done = measured_by(tmp_path, f"done-{busy}", model_folder(), {**counters, "busy_s": busy})
        seconds.append(plan(load(GeneratePlan, [*argv, f"measured=['{done}']"]))[0].seconds)
    assert "speeds corrected by 1 measured runs" in capsys.readouterr().out
    assert seconds[1] == pytest.approx(2 * seconds[0]) and seconds[0] != pytest.approx(before.seconds)
