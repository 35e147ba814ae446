"""The scripts under jobs/ and the files under conf/: what a job prints, how it ends, and that what is shipped loads."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from example_config import GENERATE, REPO, write

from kun_ray.config import _known_keys, _without_dashes, load, to_dict
from kun_ray.export import ExportConfig
from kun_ray.generate import GenerateConfig
from kun_ray.plan import GeneratePlan

INTERRUPT = "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)"
"""Ctrl-C, also where the tests run in the background of a shell, which lets its children ignore it."""


def job(folder: Path, main: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """A script like those under jobs/, whose `main` is one statement."""
    script = write(
        folder / "job.py",
        "import dataclasses, os, signal\nfrom omegaconf import MISSING\n"
        "from kun_ray.config import ConfigError, KunError, run_job, show_config\n"
        "@dataclasses.dataclass\nclass C:\n    name: str = MISSING\n    'Its name.'\n"
        f"def main(config):\n    {main}\n"
        "run_job(C, main, 'A job.')\n",
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=environment, timeout=60)


def test_job_prints_its_configuration_once_and_exits_0(tmp_path: Path) -> None:
    main = "show_config(); show_config(); print('main ran', config.name)"
    done = job(tmp_path, main, "name=名字 s3://key:SECRET@bucket/x")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "# name: 名字 s3://bucket/x",
        "main ran 名字 s3://key:SECRET@bucket/x",
    ], "printed without credentials, used with them"


@pytest.mark.parametrize(
    ("main", "argv", "status", "said"),
    [
        ("raise KunError('disk full')", ["name=a"], 1, "error: disk full"),
        ("raise ConfigError('no such model')", ["name=a"], 2, "configuration error: no such model"),
        ("print('ran')", [], 2, "configuration error: `name` has no value"),
        ("print('ran')", ["nam=a"], 2, "did you mean `name`?"),
        ("print('ran')", ["--name"], 2, "--name has no value: write --name <value>, or name=<value>"),
        (INTERRUPT, ["name=a"], 130, "run the same command again"),
    ],
)
def test_job_exit_status(main: str, argv: list[str], status: int, said: str, tmp_path: Path) -> None:
    done = job(tmp_path, main, *argv)
    assert done.returncode == status
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "", "an error that comes before the work stands alone"


@pytest.mark.parametrize("argv", [["--name", "me/x=1"], ["--name=me/x=1"], ["name=me/x=1"]])
def test_settings_may_be_written_with_dashes(argv: list[str], tmp_path: Path) -> None:
    done = job(tmp_path, "print('main ran', config.name)", *argv)
    assert done.stdout.splitlines()[-1] == "main ran me/x=1", done.stderr


@pytest.mark.parametrize(
    ("arg", "found"),
    [
        ("--price-per-gpu-hour=my-2", ["price_per_gpu_hour=my-2"]),
        ("--ray.log-every-s=2", ["ray.log_every_s=2"]),
        ("--pools.my-pool.replicas=2", ["pools.my-pool.replicas=2"]),  # a name of the user's
        ("ray.log-every-s=2", ["ray.log-every-s=2"]),
    ],
)
def test_dashes_in_an_option_stand_for_underscores(arg: str, found: list[str]) -> None:
    known = list(_known_keys(GeneratePlan))
    assert _without_dashes([arg], known) == found
    assert _without_dashes(arg.split("=") if arg.startswith("--") else [arg], known) == found


def test_job_keeps_the_traceback_of_a_bug(tmp_path: Path) -> None:
    done = job(tmp_path, "1 / 0", "name=a")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def test_shipped_script_refuses_a_wrong_key() -> None:
    done = subprocess.run(
        [sys.executable, "jobs/generate.py", "conf/generate.yaml", "pools.label.replica=2"],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=120,
    )
    assert done.returncode == 2 and "did you mean `pools.label.replicas`?" in done.stderr


SHIPPED: dict[str, tuple[type, list[str]]] = {
    "generate.yaml": (GenerateConfig, GENERATE[1:]),
    "label.yaml": (GenerateConfig, GENERATE[1:4]),
    "score.yaml": (GenerateConfig, [*GENERATE[1:3], GENERATE[4]]),
    "polish.yaml": (GenerateConfig, [*GENERATE[1:3], GENERATE[4]]),
    "demo/generate.yaml": (GenerateConfig, GENERATE[1:3]),
    "answer.yaml": (GenerateConfig, [*GENERATE[1:3], GENERATE[4]]),
    "demo/answer.yaml": (GenerateConfig, [GENERATE[2], GENERATE[4]]),
    "export.yaml": (ExportConfig, GENERATE[1:3]),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load(name: str) -> None:
    schema, argv = SHIPPED[name]
    config: Any = load(schema, [str(REPO / "conf" / name), *argv])
    json.dumps(to_dict(config))
    for pool in getattr(config, "pools", {}).values():
        assert all(step == "perplexity" or getattr(config.steps, step) is not None for step in pool.steps)


def test_shipped_limits_are_kuns() -> None:
    config = load(GenerateConfig, GENERATE)
    assert config.steps.label is not None and config.steps.score is not None and config.steps.polish is not None
    assert config.steps.label.reject_words == [
        "新闻",
        "材料",
        "图片",
        "链接",
        "网址",
        "根据",
        "简历",
        "简介",
        "文章",
        "摘要",
        "文本",
        "提取",
        "关键词",
        "网站",
    ]
    assert config.steps.polish.reject_words == ["作为", "根据", "知识库", "2023", "抱歉"]
    sampling = config.steps.polish.sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty, sampling.max_tokens) == (
        0.5,
        0.95,
        1.2,
        1024,
    )
    assert "{text}" not in config.steps.score.prompt.user


def test_an_installation_has_every_file_of_the_package() -> None:
    """Not only an editable one, as all tests have."""
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    patterns = {package: globs.replace(",", " ").split() for package, globs in setup["options.package_data"].items()}
    listed = subprocess.run(["git", "ls-files", "kun_ray"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    files = [Path(name) for name in listed.splitlines() if not name.endswith(".py")]
    left_out = [
        str(file) for file in files if not any(file.match(p) for p in patterns.get(".".join(file.parent.parts), []))
    ]
    assert files and not left_out
