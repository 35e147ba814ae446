"""Models on disk, in object stores and on the hub: what is there, what is copied, what identifies the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs

from kun_ray import models


def model(folder: Path, size: int = 3 << 20) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(size))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KUN_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, -(1 << 20), -1])
def test_model_digest_sees_both_ends_of_the_weights(tmp_path: Path, place: int) -> None:
    folder = model(tmp_path / "m")
    before = models.model_digest(str(folder))
    assert models.model_digest(f"file://{folder}") == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[place] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    assert models.model_digest(str(folder)) != before


def test_model_digest_sees_names_sizes_and_small_files(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", size=100)
    digests = [models.model_digest(str(folder))]
    (folder / "config.json").write_text("[]")
    digests.append(models.model_digest(str(folder)))
    (folder / "config.json").rename(folder / "config2.json")
    digests.append(models.model_digest(str(folder)))
    (folder / "model.safetensors").write_bytes(b"")
    digests.append(models.model_digest(str(folder)))
    assert len(set(digests)) == 4
    os.utime(folder / "config2.json", (0, 0))
    assert models.model_digest(str(folder)) == digests[-1], "when it was written does not matter"
    assert models.model_digest("01-ai/Yi-34B") == "01-ai/Yi-34B"


def test_fetch_model_copies_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "m")
    (folder / "more").mkdir()
    path = Path(models.fetch_model(f"file://{folder}"))
    assert path.parent == cache and sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    assert (path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(fs, "copy_files", lambda *args, **kwargs: pytest.fail("copied twice"))
    assert models.fetch_model(f"file://{folder}") == str(path)
    assert os.listdir(cache) == [path.name]


def test_fetch_model_without_weights_is_another_copy(tmp_path: Path, cache: Path) -> None:
    folder = model(tmp_path / "m")
    small, whole = (Path(models.fetch_model(f"file://{folder}", weights=weights)) for weights in (False, True))
    assert os.listdir(small) == ["config.json"] and "model.safetensors" in os.listdir(whole)


def test_fetch_model_copies_a_changed_model_anew(tmp_path: Path, cache: Path) -> None:
    folder = model(tmp_path / "m")
    first = models.fetch_model(f"file://{folder}")
    (folder / "config.json").write_text('{"changed": 1}')
    second = models.fetch_model(f"file://{folder}")
    assert first != second and (Path(second) / "config.json").read_text() == '{"changed": 1}'


def test_fetch_model_that_breaks_off_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "m")
    original = fs.copy_files

    def breaking(source: str, *args: Any, **kwargs: Any) -> None:
        if source.endswith("model.safetensors"):
            raise OSError("connection lost")
        original(source, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "copy_files", breaking)
        with pytest.raises(OSError, match="connection lost"):
            models.fetch_model(f"file://{folder}")
    assert os.listdir(cache) == [], "no half copy under the final name, and no leftovers that fill the disk"
    assert "model.safetensors" in os.listdir(models.fetch_model(f"file://{folder}"))


def test_fetch_model_when_another_replica_was_faster(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "m")
    rename = os.rename

    def slower(source: str, target: Path) -> None:
        Path(target).mkdir()
        (target / "config.json").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", slower)
    path = models.fetch_model(f"file://{folder}")
    assert (Path(path) / "config.json").read_text() == "theirs" and os.listdir(cache) == [Path(path).name]


def test_fetch_model_leaves_local_folders_and_hub_ids(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path / "m", size=1)
    monkeypatch.chdir(tmp_path)
    assert models.fetch_model("m") == models.fetch_model("./m") == str(tmp_path / "m")
    assert models.fetch_model("01-ai/Yi-34B") == "01-ai/Yi-34B"
    assert not cache.exists()


def test_is_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = ["a", "a/b", "./a", "~/a", str(tmp_path / "a"), f"file://{tmp_path}/a", "01-ai/Yi-34B"]
    missing = ["c", "./c", "../c", "~/c", "/c/d", "a/b/c", str(tmp_path / "c"), f"file://{tmp_path}/c", "./file"]
    assert [model for model in there if models.is_missing_folder(model)] == []
    assert [model for model in missing if not models.is_missing_folder(model)] == []
