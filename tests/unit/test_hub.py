"""Publishing to the hub: its own client against a server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from example_release import exported, tree
from hub_server import Hub

from kun_ray.config import ConfigError, KunError
from kun_ray.release import PublishConfig, publish


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return exported(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield made
    made.close()


def test_the_hub_gets_exactly_the_release(hub: Hub, data: Path, capsys: Any) -> None:
    publish(PublishConfig(str(data), "me/kun"))
    assert hub.private is None and not hub.requests, "a dry run asks nobody"
    for _ in range(2):  # again: the same repository
        publish(PublishConfig(str(data), "me/kun", push=True))
    assert hub.private is True
    kept = tree(data)
    assert hub.files == {name: kept[name] for name in kept if name not in ("_SUCCESS", "manifest.json", "summary.json")}
    assert f"published to {hub.url}/datasets/me/kun (private)" in capsys.readouterr().out
    hub.private = False
    with pytest.raises(ConfigError, match="is there already and is PUBLIC"):
        publish(PublishConfig(str(data), "me/kun", push=True))
    publish(PublishConfig(str(data), "me/kun", push=True, private=False))
    hub.private = True
    with pytest.raises(ConfigError, match="is there already and is private: make it public in its settings"):
        publish(PublishConfig(str(data), "me/kun", push=True, private=False))
    hub.private = False
    hub.files["other.bin"] = b""
    with pytest.raises(KunError, match=r"me/kun holds something else \(other.bin\)"):
        publish(PublishConfig(str(data), "me/kun", push=True, private=False))


def test_what_the_hub_refuses_is_said_in_one_line(
    hub: Hub, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = PublishConfig(str(data), "me/kun", push=True)

    def refusal() -> str:
        with pytest.raises(KunError) as caught:
            publish(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    hub.refuse = 403
    assert "the hub answers 403: the token may not write to me/kun" in refusal()
    hub.refuse = 418
    assert "the hub answers 418" in refusal()
    hub.refuse, hub.complaint = 0, '"license" must be one of'
    assert "the hub refuses this: Invalid metadata" in refusal() and not hub.files
    hub.complaint, hub.spoil = "", True
    assert "me/kun does not hold" in refusal()
    hub.close()
    assert f"{hub.url} cannot be reached" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "run `hf auth login`, or set HF_TOKEN" in refusal()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in refusal()


@pytest.mark.parametrize(
    ("to", "is_hub"),
    [
        ("me/kun", True),
        ("./me/kun", False),
        ("/a/b", False),
        ("s3://a/b", False),
        ("a/b/c", False),
        ("kun_ray/x", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(to: str, is_hub: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert PublishConfig("x", to).is_hub() is is_hub
