"""Preflight of generate: a configuration that cannot work stops within seconds, with the fix in the message."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from example_config import REPO
from example_input import configured, finished, row

from kun_ray.config import ConfigError, load
from kun_ray.generate import GenerateConfig, fingerprint
from kun_ray.pool import PoolConfig
from kun_ray.preflight import preflight
from kun_ray.schema import DOCUMENT, with_steps
from kun_ray.store import Folder


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Folder]:
    return functools.partial(finished, tmp_path)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preflight takes no place on a cluster."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("preflight started Ray")

    monkeypatch.setattr(ray, "init", refuse)


def refusal(source: Folder, config: GenerateConfig) -> str:
    """The message of the ConfigError, which must come quickly."""
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        preflight(config, source)
    assert time.monotonic() - started < 10
    return str(caught.value)


def test_what_can_work_passes(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source = stage([row(0), row(1, status="rejected", tokens=99_999), row(2, tokens=None)])
    preflight(configured(source, model_folder(), "perplexity, label, score, polish"), source)


@pytest.mark.parametrize("step", ["label", "polish", "perplexity"])
def test_context_that_is_too_short(stage: Callable[..., Folder], model_folder: Callable[..., str], step: str) -> None:
    source = stage([row(0), row(1, tokens=1500)], with_steps(DOCUMENT, ["label"]))
    message = refusal(source, configured(source, model_folder(context=1500), step))
    assert (
        f"pools.p: `{step}` needs a context of" in message and "up to 1500 of text" in message and "has 1500" in message
    )
    assert "filters.max_tokens" in message and f"steps.{step}.sampling.max_tokens" in message


def test_context_counts_prompt_text_and_reply(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    """At the very limit it passes, one token less is refused."""
    source, path = stage([row(0, tokens=700)]), model_folder()
    needed = int(
        refusal(source, configured(source, path, "label", "pools.p.max_model_len=500"))
        .split("context of ")[1]
        .split()[0]
    )
    preflight(configured(source, path, "label", f"pools.p.max_model_len={needed}"), source)
    assert f"{needed} tokens" in refusal(
        source, configured(source, path, "label", f"pools.p.max_model_len={needed - 1}")
    )
    longer = refusal(
        source,
        configured(source, path, "label", f"pools.p.max_model_len={needed}", "steps.label.sampling.max_tokens=65"),
    )
    assert f"needs a context of {needed + 1} tokens" in longer and "65 of reply" in longer


def test_only_ok_rows_count_for_the_context(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source = stage([row(0, tokens=10), row(1, tokens=9000, status="rejected")])
    preflight(configured(source, model_folder(), "label"), source)


def test_max_model_len_beyond_the_model(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source = stage([row(0)])
    message = refusal(source, configured(source, model_folder(), "label", "pools.p.max_model_len=4096"))
    assert "lower pools.p.max_model_len=4096" in message and "context of 2048 tokens" in message


def test_the_demos_answers_fit_a_model_like_its_own(
    stage: Callable[..., Folder], model_folder: Callable[..., str]
) -> None:
    """conf/demo/answer.yaml reads the instructions of a labelled stage, whatever the length of their documents."""
    source = stage([row(0, tokens=5000, instruction="说说春天")], with_steps(DOCUMENT, ["label"]))
    own = ["output=out", f"pools.chat.model={model_folder(context=2048)}"]
    demo = load(GenerateConfig, [str(REPO / "conf/demo/answer.yaml"), f"input={source.uri}", *own])
    assert demo.pools["chat"].num_gpus() == 0
    preflight(demo, source)
    assert "lower pools.chat.max_model_len=4096" in refusal(
        source, load(GenerateConfig, [str(REPO / "conf/answer.yaml"), f"input={source.uri}", *own])
    )


@pytest.mark.parametrize("model", ["models/none/here", "./none", "/none", "file:///none"])
def test_missing_model_folder(stage: Callable[..., Folder], model: str) -> None:
    source = stage([row(0)])
    message = refusal(source, configured(source, model, "label"))
    assert message == f"pools.p.model: there is no folder {model}; give a folder with a model in it, or a hub id"


def test_folder_without_a_model(stage: Callable[..., Folder], tmp_path: Path) -> None:
    source = stage([row(0)])
    (tmp_path / "empty").mkdir()
    assert "no tokenizer can be loaded" in refusal(source, configured(source, str(tmp_path / "empty"), "label"))


def test_tokenizer_without_a_model_config(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source, path = stage([row(0)]), model_folder()
    (Path(path) / "config.json").write_text("{}")
    message = refusal(source, configured(source, path, "label"))
    assert path in message and "\n" not in message


def test_model_without_chat_template(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source, path = stage([row(0)]), model_folder(chat_template=None)
    assert "set chat_template: chatml" in refusal(source, configured(source, path, "label"))
    preflight(configured(source, path, "label", "pools.p.chat_template=chatml"), source)


@pytest.mark.parametrize(
    ("steps", "reads"),
    [("score", "instruction"), ("polish", "instruction"), ("score, label", "instruction")],
)
def test_step_before_the_one_it_needs(
    stage: Callable[..., Folder], model_folder: Callable[..., str], steps: str, reads: str
) -> None:
    source = stage([row(0)])
    message = refusal(source, configured(source, model_folder(), steps))
    assert f"pools.p runs `{steps.split(',')[0]}`, which reads {reads}: run the step that writes it first" in message


def test_pools_are_checked_in_their_order(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source, path = stage([row(0)]), model_folder()
    second = [f"pools.q.model={path}", "pools.q.steps=[label]"]
    assert "pools.p runs `score`" in refusal(source, configured(source, path, "score", *second))
    preflight(configured(source, path, "label", f"pools.q.model={path}", "pools.q.steps=[score]"), source)


def test_score_of_labelled_input_passes(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source = stage([row(0, instruction="写一首诗")], with_steps(DOCUMENT, ["label"]))
    preflight(configured(source, model_folder(), "score, polish"), source)


def test_input_without_ok_rows(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source = stage([row(0, status="rejected"), row(1, status="failed")])
    message = refusal(source, configured(source, model_folder(), "label"))
    assert f"{source.uri} has 2 rows, but none with status ok" in message


def test_unknown_vllm_argument(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    pytest.importorskip("vllm")
    source = stage([row(0)])
    config = configured(source, model_folder(), "label", "pools.p.engine.gpu_memory_utilisation=0.8")
    with pytest.raises(ConfigError, match="did you mean `gpu_memory_utilization`"):  # importing vLLM takes its seconds
        preflight(config, source)


@pytest.mark.parametrize("setting", ["revision=v1", "tokenizer_revision=v1", "hf_overrides={rope_theta: 5}"])
def test_files_that_only_the_engine_would_read(
    stage: Callable[..., Folder], model_folder: Callable[..., str], setting: str
) -> None:
    """Preflight and the prompts go by the model's own tokenizer and config.json: another one must not run unseen."""
    source = stage([row(0)])
    message = refusal(source, configured(source, model_folder(), "label", f"pools.p.engine.{setting}"))
    assert f"pools.p.engine.{setting.partition('=')[0]}: " in message and "give that folder as model" in message
    preflight(configured(source, model_folder(), "label", "pools.p.engine.revision=null"), source)


def test_candidates_that_share_their_tokens(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source = stage([row(0, instruction="写诗")], with_steps(DOCUMENT, ["label"]))
    config = configured(source, model_folder(), "score", "steps.score.candidates=[好, 好。]")
    assert "cannot be told apart by one token" in refusal(source, config)


def test_step_without_configuration(stage: Callable[..., Folder], model_folder: Callable[..., str]) -> None:
    source = stage([row(0)])
    assert "steps.label is not configured" in refusal(
        source, configured(source, model_folder(), "label", "steps.label=null")
    )


def test_fingerprint_follows_what_decides_the_output(
    stage: Callable[..., Folder], model_folder: Callable[..., str]
) -> None:
    source, path = stage([row(0)]), model_folder()
    first = fingerprint(configured(source, path, "label"), source)
    for same in (
        "pools.p.replicas=4",
        "pools.p.engine.gpu_memory_utilization=0.5",
        "steps.polish.min_chars=3",
        "rows_per_file=7",
    ):
        assert fingerprint(configured(source, path, "label", same), source) == first, same
    for other in (
        "pools.p.engine.dtype=float16",
        "steps.label.sampling.top_p=1.0",
        "steps.label.min_chars=3",
        "pools.p.chat_template=chatml",
    ):
        assert fingerprint(configured(source, path, "label", other), source) != first, other
    (Path(path) / "model.safetensors").write_bytes(b"weights")
    assert fingerprint(configured(source, path, "label"), source) != first


def test_the_queue_before_a_pool_holds_two_blocks_of_each_of_its_replicas() -> None:
    pools = {name: PoolConfig("m", steps=[step]) for name, step in (("label", "label"), ("chat", "score"))}
    assert pools["chat"].num_rows_per_block() == 128, "half of max_num_seqs"
    assert GenerateConfig("in", "out", pools).num_waiting_rows() == 1024
    pools["chat"].replicas = 16
    assert GenerateConfig("in", "out", pools).num_waiting_rows() == 2 * 128 * 16
    pools["chat"].rows_per_block = 2048
    with pytest.raises(ConfigError, match=r"max_waiting_rows \(1024\) must hold one block .* at least 2048"):
        GenerateConfig("in", "out", pools, max_waiting_rows=1024)
    assert GenerateConfig("in", "out", pools, max_waiting_rows=2048).num_waiting_rows() == 2048
