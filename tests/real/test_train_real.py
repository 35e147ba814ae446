"""Real ZeRO-3 on two gloo ranks under Ray Train, against a plain PyTorch loop; kills, other numbers of ranks, publishing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import GREEDY, greedy, text_of
from nodes import three_nodes
from transformers import AutoModelForCausalLM

from kun_ray.config import KunError, load
from kun_ray.demo import tiny
from kun_ray.prompts import PromptConfig, build_prompt, stop_token_ids
from kun_ray.steps import Sampling
from kun_ray.store import Folder
from kun_ray.train import curve, packing
from kun_ray.train.admission import check_files
from kun_ray.train.batch import collate, learning_rate
from kun_ray.train.config import CARD, TrainConfig
from kun_ray.train.data import read_samples
from kun_ray.train.launch import train
from kun_ray.train.model import NextTokenLoss
from kun_ray.train.publish import digests

REPO = Path(__file__).parents[2]
STEPS = 20
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny base model and seed pairs of very unequal lengths."""
    folder = tmp_path_factory.mktemp("train")
    tiny.save(tiny.build_model(layers=2), tokenizer, folder / "base")
    for name, pairs in (("seeds", tiny.seeds()[:70]), ("valid", tiny.seeds()[70:80])):
        lines = [{**p, "output": p["output"] * (1 + n % 3)} for n, p in enumerate(pairs)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return folder


def arguments(workshop: Path, output: str, *more: str) -> list[str]:
    argv = [f"model={workshop}/base", f"output={workshop}/{output}", f"data=[{{path: {workshop}/seeds.jsonl}}]"]
    argv += [f"valid=[{{path: {workshop}/valid.jsonl}}]", "epochs=10", f"max_steps={STEPS}", "save_every_steps=5"]
    argv += ["accelerator=cpu", "num_workers=2", "cpus_per_worker=1", "dtype=float32", "batch_size=12", "lr=1e-3"]
    argv += [
        "max_tokens=1000",
        "tokens_per_micro_batch=1000",
        "keep_last=9",
        "publish.dtype=float32",
        "eval_every_steps=20",
    ]
    argv += [
        "zero.persist_elements=1000",
        "publish.admission=false",
        "publish.keep_checkpoints=true",
        "publish.max_shard_gb=0.001",
        "publish.num_probes=2",
    ]
    return [*argv, *more]


def configured(workshop: Path, output: str, *more: str) -> TrainConfig:
    return load(TrainConfig, arguments(workshop, output, *more))


def losses(workshop: Path, output: str) -> list[float]:
    found = curve.read_steps(Folder(f"{workshop}/{output}"))["loss"]
    return [found[step] for step in sorted(found)]


def reached(folder: Folder, step: int) -> bool:
    return any(line.get("step", 0) >= step and "loss" in line for line in curve.read_lines(folder))


def train_and_kill(config: TrainConfig) -> dict[str, Any]:
    """Trains; rank 0 is killed after step 7, between two checkpoints."""
    folder = Folder(config.output)

    def kill() -> None:
        while not reached(folder, 7):
            time.sleep(0.05)
        os.kill(curve.read_starts(folder)[0]["pid"], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    return train(config)


@pytest.fixture(scope="module")
def killed(workshop: Path, local_ray: None) -> Iterator[dict[str, Any]]:
    """A run on two ranks of which one is killed; 12 samples a step need several micro-batches."""
    yield train_and_kill(configured(workshop, "two"))


def test_zero3_equals_a_plain_loop_also_after_a_kill(workshop: Path, killed: dict[str, Any]) -> None:
    assert killed["restarts"] == 1
    config, folder = configured(workshop, "two"), Folder(f"{workshop}/two")
    samples = read_samples(folder, "train")
    network = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    loss_of = NextTokenLoss(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, betas=tuple(config.betas), weight_decay=0.0)
    orders = [packing.epoch_order(samples.data, [1.0], n, config.seed) for n in range(config.epochs)]
    batches = [batch for order in orders for batch in packing.steps_of(order, config.batch_size)][:STEPS]
    expected = []
    for step, batch in enumerate(batches):
        total = samples.num_supervised[batch].sum()
        nll = (
            torch.stack([loss_of(**collate(samples, [int(i)], True, torch.device("cpu"))) for i in batch]).sum() / total
        )
        nll.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(nll))
    np.testing.assert_allclose(losses(workshop, "two"), expected, atol=1e-4)
    assert killed["valid_loss"] < killed["valid_loss_before"] - 0.3  # it learns
    assert len(packing.micro_batches(batches[0], samples.lengths, 2, 1000, True)) > 1


def test_a_lost_node_is_survived(workshop: Path, killed: dict[str, Any]) -> None:
    """Two ranks on two of three nodes; one of the two is killed after step 7, and the third takes its place."""
    with three_nodes(num_cpus=3, resources={"rank": 1}) as nodes:
        more = ["resources={rank: 1}", f"ray.address={nodes.address}"]
        with (workshop / "nodes.log").open("w") as log:
            command = [sys.executable, str(REPO / "jobs/train.py"), *arguments(workshop, "nodes", *more)]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and not reached(Folder(f"{workshop}/nodes"), 7):
            time.sleep(0.05)
        for node in set(nodes.raylets) - {nodes.head}:
            if any("RayTrainWorker" in " ".join(worker.cmdline()) for worker in nodes.workers_of(node)):
                nodes.kill(node)
                break
        else:
            pytest.fail("no rank outside the head: " + (workshop / "nodes.log").read_text()[-2000:])
        assert process.wait(600) == 0, (workshop / "nodes.log").read_text()[-4000:]
    assert json.loads((workshop / "nodes/summary.json").read_text())["restarts"] == 1
    np.testing.assert_allclose(losses(workshop, "nodes"), losses(workshop, "two"), atol=1e-4)


def test_other_numbers_of_ranks_go_on_where_a_run_stopped(workshop: Path, killed: dict[str, Any]) -> None:
    wanted = losses(workshop, "two")
    for before, name, keep, more in (
        ("two", "one", 10, ["num_workers=1"]),
        ("one", "again", 15, ["num_workers=2", "packing=false", "publish.admission=true"]),
    ):
        shutil.copytree(workshop / before, workshop / name)
        for step in range(keep + 5, STEPS + 1, 5):
            shutil.rmtree(workshop / name / f"checkpoints/step-{step:07d}")
        shutil.rmtree(workshop / name / "model")
        for file in ("_SUCCESS", "metrics.jsonl"):
            (workshop / name / file).unlink()
        summary = train(configured(workshop, name, *more))
        assert curve.read_starts(Folder(f"{workshop}/{name}"))[0]["step"] == keep
        np.testing.assert_allclose(losses(workshop, name), wanted[keep:], atol=1e-4)
    assert summary["admission"]["mean_abs_diff"] < 0.02  # a vLLM engine agrees with the trainer


def test_packed_and_padded_agree_in_loss_and_gradient(workshop: Path, killed: dict[str, Any]) -> None:
    samples = read_samples(Folder(f"{workshop}/two"), "train")
    network = AutoModelForCausalLM.from_pretrained(workshop / "base", dtype=torch.float32)
    loss_of = NextTokenLoss(network)
    found = []
    for parts, packed in (([[0, 1, 2]], True), ([[0, 1, 2]], False), ([[0], [1], [2]], True)):
        network.zero_grad()
        total = sum(loss_of(**collate(samples, part, packed, torch.device("cpu"))) for part in parts)
        total.backward()
        found.append((float(total), torch.cat([p.grad.flatten() for p in network.parameters()])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-4)


def test_the_published_folder_is_what_the_trainer_had(workshop: Path, killed: dict[str, Any]) -> None:
    folder = workshop / "two" / "model"
    card = check_files(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for probe in card["probes"]:
        ids = torch.tensor([probe["ids"]])
        logprobs = torch.log_softmax(network(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
        np.testing.assert_allclose(logprobs.detach().numpy(), probe["logprobs"], atol=1e-3)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o644"}


def test_transformers_and_vllm_decode_the_published_folder_alike(
    workshop: Path, killed: dict[str, Any], serve: Any
) -> None:
    """Greedy tokens, in several shards' weights, after ZeRO-3, a kill and a resume."""
    folder = str(workshop / "two" / "model")
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    running = serve(folder)
    stop = {*stop_token_ids(running.tokenizer), network.config.eos_token_id}
    prompt = build_prompt(running.tokenizer, PromptConfig(user="{text}"))
    asked = [prompt.render({"text": pair["instruction"]}) for pair in tiny.seeds()[70:90]]
    expected = [(ids, tokens) for ids in asked if (tokens := greedy(network, ids, stop, 24))]
    assert sum(len(tokens) for _, tokens in expected) > 60
    replies = running(
        *(
            running.engine.generate(ids, Sampling(**GREEDY, repetition_penalty=1.0, max_tokens=len(tokens)))
            for ids, tokens in expected
        )
    )
    assert [reply.text for reply in replies] == [text_of(running, tokens) for _, tokens in expected]


def test_admission_names_the_fault(workshop: Path, killed: dict[str, Any], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(workshop / "two" / "model", tmp_path / name))

    swapped = copy("swapped")
    first, second = sorted(swapped.glob("*.safetensors"))[:2]
    first.rename(tmp_path / "x"), second.rename(first), (tmp_path / "x").rename(second)
    with pytest.raises(KunError, match=f"{first.name} is not what the trainer wrote"):
        check_files(swapped)

    lacking = copy("lacking")
    index = json.loads((lacking / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    card = json.loads((lacking / CARD).read_text())
    (lacking / CARD).write_text(json.dumps({**card, "files": digests(lacking)}))
    with pytest.raises(KunError, match=r"the tensor model\.norm\.weight is missing"):
        check_files(lacking)

    coarse = copy("coarse")
    (coarse / CARD).write_text(json.dumps({**card, "files": digests(coarse), "inv_freq_dtype": "bfloat16"}))
    with pytest.raises(KunError, match="inv_freq in bfloat16"):
        check_files(coarse)


def test_the_same_command_again_does_nothing(workshop: Path, killed: dict[str, Any], capsys: Any) -> None:
    assert train(configured(workshop, "two")) == json.loads((workshop / "two" / "summary.json").read_text())
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(KunError, match=r"training\.lr: was 0\.001, now 0\.002"):
        train(configured(workshop, "two", "lr=0.002"))


def test_an_adapter_survives_a_kill_and_is_served_beside_its_base(workshop: Path, local_ray: None) -> None:
    more = ["lora={rank: 4, alpha: 8}", "max_steps=10", "lr=1e-2", "publish.admission=true"]
    summary = train_and_kill(configured(workshop, "lora", *more))
    assert summary["restarts"] == 1 and [line["step"] for line in curve.read_starts(Folder(f"{workshop}/lora"))] == [
        0,
        5,
    ]
    assert summary["valid_loss"] < summary["valid_loss_before"] - 0.1
    assert summary["admission"]["mean_abs_diff"] < 0.02  # vLLM's LoRA kernels agree with peft's
    files = sorted(path.name for path in (workshop / "lora/model").iterdir())
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def test_a_loss_that_is_not_finite_ends_the_run_with_one_message(
    workshop: Path, tokenizer: Any, local_ray: None
) -> None:
    network = tiny.build_model(layers=1)
    with torch.no_grad():
        network.model.norm.weight[:] = 3e38
        network.lm_head.weight.mul_(1000)
    tiny.save(network, tokenizer, workshop / "spoilt")
    with pytest.raises(KunError, match=r"the loss of step 1 is (nan|inf): lower lr"):
        train(configured(workshop, "nan", f"model={workshop}/spoilt", "max_failures=2"))
