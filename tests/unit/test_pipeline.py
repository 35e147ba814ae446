"""The graph of the Kun loop and what would run of it: no Ray, no models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kun_ray import store
from kun_ray.config import ConfigError, KunError, load
from kun_ray.graph import JOBS, Graph, PipelineConfig, Stage
from kun_ray.pipeline import pipeline, run_stages, verdict
from kun_ray.stage_process import Progress

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _from_the_projects_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def demo(*more: str, base: str = "conf/pipeline/demo.yaml") -> dict[str, Stage]:
    return Graph(load(PipelineConfig, [base, *more])).stages


def test_the_demos_graph() -> None:
    stages = demo()
    assert {name: stage.needs for name, stage in stages.items()} == {
        "prepare": (),
        "train_label": (),
        "label": ("prepare", "train_label"),
        "train_chat": (),
        "curate": ("label", "train_chat"),
        "export": ("curate",),
        "train_final": ("export",),
    }
    assert stages["label"].config.pools["label"].model == "runs/demo/train_label/model"
    assert stages["curate"].config.pools["chat"].model == "runs/demo/train_chat/model"
    assert stages["curate"].config.input == "runs/demo/label"
    final = stages["train_final"].config
    assert [entry.path for entry in final.data] == ["runs/demo/export", "runs/demo/inputs/seeds.jsonl"]
    assert [(entry.path, entry.task) for entry in stages["train_label"].config.valid] == [
        ("runs/demo/inputs/held_out.jsonl", "label")
    ]
    # What the pipeline shows as a stage's command is that stage's configuration.
    for stage in stages.values():
        assert stage.command[:2] == ["python", f"jobs/{stage.job}.py"]
        assert load(JOBS[stage.job].schema, stage.command[2:]) == stage.config


def test_models_in_place_of_training() -> None:
    given = ["models.label=a/l", "models.score=a/s", "models.polish=a/p"]
    with pytest.raises(ConfigError, match="pool `chat` runs score and polish, which have different models"):
        demo(*given)
    two = "stages.curate=[conf/curate.yaml, 'pools.chat.steps=[score]', 'pools.polish.steps=[polish]']"
    stages = demo(*given, two)
    assert list(stages) == ["prepare", "label", "curate", "export", "train_final"]
    assert {name: pool.model for name, pool in stages["curate"].config.pools.items()} == {
        "chat": "a/s",
        "polish": "a/p",
    }
    assert stages["prepare"].config.tokenizer == "a/l"
    # Only the label model is given: the chat model is trained, and does both.
    stages = demo("models.label=a/l")
    assert "train_label" not in stages and stages["curate"].needs == ("label", "train_chat")


def test_documents_that_are_there_are_not_prepared() -> None:
    stages = demo("documents=runs/other/prepare")
    assert "prepare" not in stages and stages["label"].config.input == "runs/other/prepare"
    corpora = '[{name: mine, format: jsonl, paths: ["/data/今天 的.jsonl"]}]'
    assert demo(f"corpora={corpora}")["prepare"].config.corpora[0].paths == ["/data/今天 的.jsonl"]


def test_iterations_curate_with_the_newer_model() -> None:
    stages = demo("iterations=3")
    assert list(stages)[-6:] == ["curate-2", "export-2", "train_final-2", "curate-3", "export-3", "train_final-3"]
    assert stages["curate-3"].config.pools["chat"].model == "runs/demo/train_final-2/model"
    assert stages["curate-3"].needs == ("label", "train_final-2")
    assert stages["train_final-3"].config.model == "runs/demo/inputs/base"


def test_adapters_share_one_base() -> None:
    lora = "[conf/train/{0}.yaml, conf/train/demo.yaml, 'lora={{rank: 4, merge: {1}}}']"
    stages = demo(
        f"stages.train_label={lora.format('label', 'false')}", f"stages.train_chat={lora.format('chat', 'true')}"
    )
    label, curate = stages["label"].config, stages["curate"].config
    assert label.pools["label"].model == "runs/demo/inputs/base"
    assert label.steps.label.adapter == "runs/demo/train_label/model"
    assert curate.pools["chat"].model == "runs/demo/train_chat/model"
    assert curate.steps.score.adapter is None and curate.steps.polish.adapter is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stages.polish=[conf/polish.yaml]"], "there is no stage `polish`; stages are prepare"),
        (["models.base=null"], "models.base is not given: train_label has nothing to train from"),
        (["seeds=null"], "seeds is not given: train_label learns from seed pairs"),
        (["stages.label=[conf/nothing.yaml]"], "stages.label: no configuration file conf/nothing.yaml"),
        (["stages.label=[conf/label.yaml, rows_per_fil=3]"], "stages.label: unknown key `rows_per_fil`"),
        (["iterations=0"], "iterations must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        demo(*more)
    assert message in str(found.value)


def test_missing_models_and_files_are_named(tmp_path: Path) -> None:
    config = load(PipelineConfig, ["conf/pipeline/demo.yaml", f"output={tmp_path}/run", f"models.base={tmp_path}/none"])
    with pytest.raises(ConfigError, match=r"models.base: there is no folder .*/none"):
        pipeline(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["demo", "smoke-gpu", "smoke-model", "yi-34b"])
def test_shipped_pipelines_load(name: str) -> None:
    given = {
        "smoke-model": [f"models.{role}=some/model" for role in ("label", "score", "polish")],
        "yi-34b": ["output=/shared/run", "seeds=/shared/seeds.jsonl"],
    }
    stages = demo(*given.get(name, []), base=f"conf/pipeline/{name}.yaml")
    assert list(stages)[-1] == ("export" if name == "smoke-model" else "train_final")


@pytest.fixture
def export(tmp_path: Path) -> Any:
    """A finished curate stage and the export stage that reads it, finished when called."""
    source = store.open_stage(str(tmp_path / "curate"), {"steps": 1}, {})
    store_row(source)
    source.finish({"rows": 1})
    config = load(JOBS["export"].schema, [f"input={source.uri}", f"output={tmp_path}/export"])
    stage = Stage("export", "export", [], ("curate",), config)

    def finish() -> Stage:
        folder = store.open_stage(config.output, JOBS["export"].fingerprint(config), {})
        folder.finish({"rows": 1})
        return stage

    return stage, finish


def store_row(folder: store.Folder, name: str = "part-0.parquet") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"doc_id": [name]}), folder.child(name))


def test_a_stage_runs_once(export: Any) -> None:
    stage, finish = export
    assert verdict(stage, set()) == ("run", "not there yet")
    store.open_stage(stage.config.output, JOBS["export"].fingerprint(stage.config), {})
    assert verdict(stage, set())[0] == "continue"
    finish()
    assert verdict(stage, set()) == ("skip", "complete, unchanged")


def test_a_stage_runs_anew_when_its_input_or_settings_change(export: Any) -> None:
    stage, finish = export
    finish()
    assert verdict(stage, {"curate"}) == ("redo", "curate runs anew")
    assert verdict(stage, {"prepare"})[0] == "skip"
    other = load(JOBS["export"].schema, [f"input={stage.config.input}", f"output={stage.config.output}", "reply=text"])
    what, why = verdict(Stage("export", "export", [], ("curate",), other), set())
    assert what == "redo" and why == 'reply: was "answer", now "text"'
    store_row(store.Folder(stage.config.input), "part-1.parquet")
    assert verdict(stage, set())[0] == "redo"


def test_a_new_version_of_a_library_unmakes_nothing(export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, finish = export
    store.open_stage(stage.config.output, JOBS["export"].fingerprint(stage.config), {})
    monkeypatch.setattr("kun_ray.store._versions", lambda: {"ray": "9.9"})
    assert verdict(stage, set())[0] == "redo"  # an unfinished stage would be half of each
    monkeypatch.undo()
    finish()
    monkeypatch.setattr("kun_ray.store._versions", lambda: {"ray": "9.9"})
    assert verdict(stage, set())[0] == "skip"


def test_dry_run_says_what_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipeline(load(PipelineConfig, ["conf/pipeline/demo.yaml", "dry_run=true", f"output={tmp_path}"]))
    shown = capsys.readouterr().out
    assert "train_final" in shown and "not there yet" in shown
    assert f"python jobs/export.py conf/demo/export.yaml input={tmp_path}/curate output={tmp_path}/export" in shown
    assert not list(tmp_path.iterdir())


def test_an_input_that_cannot_be_read_is_an_error(export: Any) -> None:
    stage, finish = export
    finish()
    (Path(stage.config.input) / store.SUCCESS).unlink()
    with pytest.raises(KunError, match="is not complete"):
        verdict(stage, set())
    assert json.loads((Path(stage.config.output) / store.SUMMARY).read_text())


def test_a_failed_stage_is_named_and_what_needs_it_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes: one export whose input is not there, and one that would read its output."""

    def stage(name: str, source: str, needs: tuple[str, ...]) -> Stage:
        args = [f"input={tmp_path}/{source}", f"output={tmp_path}/{name}"]
        return Stage(name, "export", args, needs, load(JOBS["export"].schema, args))

    runs = [Progress(stage("one", "none", ())), Progress(stage("two", "one", ("one",)))]
    config = load(PipelineConfig, [f"output={tmp_path}", "ray.address=not-used-by-export"])
    with pytest.raises(KunError, match=rf"one failed; .*\n  python jobs/export.py input={tmp_path}/none") as found:
        run_stages(config, runs)
    assert [run.state for run in runs] == ["failed", "waiting"] and "two" not in str(found.value)
    message = f"error: there is no folder {tmp_path}/none"
    assert f"one | {message}" in capsys.readouterr().out
    log = (tmp_path / "logs/one.log").read_text()
    assert log.startswith(message), "and no configuration before it"
