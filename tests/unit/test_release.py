"""Publishing: what leaves, what is refused before it does, the verified copy, and the hub's own client against a server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_release import exported, tree
from pyarrow import fs

from kun_ray import store
from kun_ray.card import SourceConfig
from kun_ray.config import ConfigError, KunError
from kun_ray.release import PublishConfig, publish

REPO = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return exported(tmp_path)


@pytest.fixture
def model(tmp_path: Path, model_folder: Callable[..., str]) -> Path:
    """A finished training's folder, its digests made by the trainer's own function."""
    from kun_ray.train.publish import digests

    run = tmp_path / "train"
    folder = Path(model_folder("train/model"))
    (folder / "model.safetensors").write_bytes(b"\x08weights" * 1000)
    described = {
        "kun_ray": "0.1.0",
        "base": "/shared/base/Yi-6B",
        "kind": "model",
        "dtype": "bfloat16",
        "probes": [1, 2],
    }
    (folder / "kun_ray.json").write_text(json.dumps({**described, "files": digests(folder)}))
    for name in ("checkpoints", "data"):
        (run / name).mkdir()
        (run / name / "x").write_text("x")
    counts = {"samples": 90, "supervised_tokens": 4567}
    losses = {"steps": 7, "loss": 1.5, "valid_loss_before": 3.0, "valid_loss": 2.0}
    store.Folder(str(run)).finish({"stage": "train", **losses, "data": {"train": counts}})
    return run


def check(folder: Path) -> None:
    """`sha256sum -c` itself, over every file but its own."""
    ran = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(": OK") == len(tree(folder)) - 1


def test_a_dry_run_says_what_would_leave_and_changes_nothing(data: Path, tmp_path: Path, capsys: Any) -> None:
    before = tree(tmp_path)
    capsys.readouterr()
    publish(PublishConfig(str(data), str(tmp_path / "shared")))
    assert tree(tmp_path) == before
    said = capsys.readouterr().out
    assert f"dataset {data} → {tmp_path}/shared" in said and "licence: cc-by-4.0" in said
    assert "source wudao: Web pages of ours; ours" in said and "warning" not in said
    assert "stays here: _SUCCESS, manifest.json, summary.json" in said
    assert f"{(data / 'alpaca/train.jsonl').stat().st_size:,}  alpaca/train.jsonl" in said
    assert said.splitlines()[-1] == f"  python jobs/publish.py {data} --to {tmp_path}/shared push=true"


def test_the_printed_command_publishes(data: Path, tmp_path: Path, capsys: Any) -> None:
    publish(PublishConfig(str(data), str(tmp_path / "shared")))
    words = capsys.readouterr().out.splitlines()[-1].split()
    ran = subprocess.run([sys.executable, *words[1:]], cwd=REPO, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    check(tmp_path / "shared")


def test_a_copy_holds_the_data_and_its_documents_alone(data: Path, tmp_path: Path, capsys: Any) -> None:
    (data / "LICENSE").write_text("do as you like")
    (data / "alpaca/notes.txt").write_text("mine")
    target = tmp_path / "shared"
    publish(PublishConfig(str(data), str(target), push=True))
    names = {"README.md", "dataset_info.json", "SHA256SUMS", "LICENSE"}
    names |= {"alpaca/train.jsonl", "sharegpt/train.jsonl", "parquet/train.parquet"}
    assert set(tree(target)) == names
    check(target)
    capsys.readouterr()
    publish(PublishConfig(str(data), str(target), push=True))
    assert "holds exactly this already" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"generate", "export", "shared"}, "nothing temporary stays"


def test_an_export_checks_itself(data: Path) -> None:
    ran = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=data, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.count(": OK") == 5, ran.stdout + ran.stderr


def test_a_target_that_holds_something_else_is_left_alone(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    target.mkdir()
    (target / "theirs").write_text("theirs")
    with pytest.raises(KunError, match=r"holds something else \(theirs"):
        publish(PublishConfig(str(data), str(target), push=True))
    assert tree(target) == {"theirs": b"theirs"}


def test_a_copy_that_was_changed_is_noticed(data: Path, tmp_path: Path) -> None:
    publish(PublishConfig(str(data), str(tmp_path / "shared"), push=True))
    with (tmp_path / "shared/alpaca/train.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(KunError, match="alpaca/train.jsonl has changed"):
        publish(PublishConfig(str(data), str(tmp_path / "shared"), push=True))


def test_a_copy_that_differs_is_never_renamed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kun_ray import release

    def half(source: str, target: str, *_: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:-1])

    monkeypatch.setattr(release.fs, "copy_files", half)
    with pytest.raises(KunError, match="the copy is not the same"):
        publish(PublishConfig(str(data), str(tmp_path / "shared"), push=True))
    assert {path.name for path in tmp_path.iterdir()} == {"generate", "export"}


def test_a_store_that_cannot_rename_is_written_in_place(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that is not called local stands for an object store, as target and as input."""
    real, bucket = store.resolve, fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    monkeypatch.setattr(
        store, "resolve", lambda uri: (bucket, uri.removeprefix("s3://")) if uri.startswith("s3://") else real(uri)
    )
    (tmp_path / "bucket").mkdir()
    publish(PublishConfig(str(data), "s3://kun/shared", push=True))
    check(tmp_path / "bucket/kun/shared")
    assert [path.name for path in (tmp_path / "bucket/kun").iterdir()] == ["shared"]
    data.rename(tmp_path / "bucket/export")
    publish(PublishConfig("s3://export", str(tmp_path / "copy"), push=True))
    assert tree(tmp_path / "copy") == tree(tmp_path / "bucket/kun/shared")
    publish(PublishConfig("s3://export", "me/kun"))


@pytest.mark.parametrize("name", ["alpaca/train.jsonl", "parquet/train.parquet", "README.md", "dataset_info.json"])
def test_a_file_that_was_changed_stays(data: Path, tmp_path: Path, name: str) -> None:
    content = bytearray((data / name).read_bytes())
    content[len(content) // 2] ^= 1
    (data / name).write_bytes(content)
    with pytest.raises(KunError, match=f"{name} has changed since it was written"):
        publish(PublishConfig(str(data), str(tmp_path / "shared")))


def test_checksums_that_were_changed_along_with_a_file_do_not_help(data: Path, tmp_path: Path) -> None:
    (data / "alpaca/train.jsonl").write_text("{}\n")
    made = subprocess.run(["sha256sum", *tree(data)], cwd=data, capture_output=True, text=True)
    (data / "SHA256SUMS").write_text("".join(line for line in made.stdout.splitlines(True) if "_SUCCESS" not in line))
    with pytest.raises(KunError, match="SHA256SUMS does not hold what summary.json does"):
        publish(PublishConfig(str(data), str(tmp_path / "shared")))


@pytest.mark.parametrize("name", ["_SUCCESS", "alpaca/train.jsonl"])
def test_an_unfinished_folder_stays(data: Path, tmp_path: Path, name: str) -> None:
    (data / name).unlink()
    with pytest.raises(KunError, match="not complete" if name == "_SUCCESS" else "cannot be read"):
        publish(PublishConfig(str(data), str(tmp_path / "shared")))


def test_folders_that_are_nothing_to_publish(tmp_path: Path, data: Path) -> None:
    with pytest.raises(KunError, match="neither an export nor a trained model"):
        publish(PublishConfig(str(data.parent / "generate"), "me/x"))


def test_what_a_public_dataset_must_say(tmp_path: Path, capsys: Any) -> None:
    folder = exported(tmp_path, licence="other", sources={"wudao": SourceConfig(licence="not stated: fill it in")})
    with pytest.raises(ConfigError) as caught:
        publish(PublishConfig(str(folder), "me/kun", private=False))
    assert "give licence=… to jobs/export.py" in str(caught.value)
    assert "sources.wudao.licence=…" in str(caught.value)
    publish(PublishConfig(str(folder), "me/kun"))
    assert capsys.readouterr().out.count("warning: give ") == 2


def test_credentials_stay(tmp_path: Path) -> None:
    folder = exported(tmp_path, answer="见 https://a:b@example.org，见 s3://KEY:SECRET@bucket/x")
    with pytest.raises(KunError, match="alpaca/train.jsonl holds what looks like credentials") as caught:
        publish(PublishConfig(str(folder), "me/kun"))
    assert "SECRET" not in str(caught.value)
    rows = exported(tmp_path / "rows", answer="见 s3://KEY:SECRET@bucket/x", formats=["parquet"])
    with pytest.raises(KunError, match=r"parquet/train.*\.parquet holds what looks like credentials"):
        publish(PublishConfig(str(rows), "me/kun"))
    web = exported(tmp_path / "web", answer="网页上写着 https://a:b@example.org")  # the web may say so
    publish(PublishConfig(str(web), "me/kun"))
    for token in ("hf_" + "abcdefghij" * 3 + "abcd", "hf_" + "aBcdefgh19" * 3 + "abc4"):
        (web / "LICENSE").write_text(f"ask {token}")
        with pytest.raises(KunError, match="LICENSE holds what looks like credentials"):
            publish(PublishConfig(str(web), "me/kun"))


def test_a_model_is_published_without_what_only_training_needs(model: Path, tmp_path: Path, capsys: Any) -> None:
    for given, target in ((model, "a"), (model / "model", "b")):
        publish(PublishConfig(str(given), str(tmp_path / target), push=True, licence="apache-2.0"))
        check(tmp_path / target)
        names = set(tree(tmp_path / target))
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
        assert not names & {"kun_ray.json", "checkpoints/x", "data/x", "summary.json"}
    readme = (tmp_path / "a/README.md").read_text()
    header = yaml.safe_load(readme.split("---\n")[1])
    assert header["license"] == "apache-2.0" and "base_model" not in header and "/shared" not in readme
    assert "# a\n" in readme and "trained from Yi-6B" in readme and "| train: supervised tokens | 4,567 |" in readme
    with pytest.raises(ConfigError, match="under which one this model is"):
        publish(PublishConfig(str(model), "me/model", private=False))


def test_a_models_card_names_its_data_and_the_terms_of_its_corpora(
    model: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    entries = [{"path": str(data)}, {"path": "/shared/seeds.jsonl"}]
    (model / "manifest.json").write_text(json.dumps({"fingerprint": {"training": {}, "data": entries}}))
    publish(PublishConfig(str(model), str(tmp_path / "x"), push=True, licence="apache-2.0"))
    said = capsys.readouterr().out
    assert said.count("warning: the corpora below") == 1 and "apache-2.0 agrees" in said
    readme = (tmp_path / "x/README.md").read_text().split("## Training data")[1]
    name = json.loads((data / "manifest.json").read_text())["fingerprint"]["dataset_name"]
    assert f"- {name}\n  - Web pages of ours: ours\n" in readme
    assert "- seeds.jsonl\n" in readme and "/shared" not in readme and str(tmp_path) not in readme


def test_a_model_that_was_changed_or_not_admitted_stays(model: Path, tmp_path: Path) -> None:
    (model / "model").rename(model / "model.tmp")
    with pytest.raises(KunError, match="neither an export nor a trained model"):
        publish(PublishConfig(str(model / "model.tmp"), str(tmp_path / "x")))
    (model / "model.tmp").rename(model / "model")
    with (model / "model/model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(KunError, match="model.safetensors has changed"):
        publish(PublishConfig(str(model), str(tmp_path / "x")))


def test_a_models_own_card_is_published(model: Path, tmp_path: Path) -> None:
    (model / "model/README.md").write_text("---\nlicense: mit\n---\nmine\n")
    publish(PublishConfig(str(model), str(tmp_path / "x"), push=True))
    assert (tmp_path / "x/README.md").read_text().endswith("mine\n")
    assert publish(PublishConfig(str(model), "me/x", private=False)).licence == "mit"


def test_a_file_in_the_place_of_the_copy_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(KunError, match="taken is a file: give a folder that is not there yet"):
        publish(PublishConfig(str(data), str(tmp_path / "taken"), push=True))
