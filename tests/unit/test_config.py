"""Configuration: what wins, what is refused with which words, and what --help says."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from example_config import GENERATE, write
from omegaconf import MISSING

from kun_ray.config import ConfigError, load, run_job, to_dict, without_credentials
from kun_ray.export import ExportConfig
from kun_ray.generate import GenerateConfig
from kun_ray.helptext import describe
from kun_ray.prepare import PrepareConfig


@dataclasses.dataclass
class Leaf:
    size: int = 1
    """How big it is."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError("size must not be negative")


@dataclasses.dataclass
class Base:
    colour: str = "red"
    """Inherited colour,
    on two lines."""


@dataclasses.dataclass
class Tree(Base):
    """A small configuration."""

    name: str = MISSING
    """What it is called."""
    leaf: Leaf = dataclasses.field(default_factory=Leaf)
    """The one leaf."""
    leaves: dict[str, Leaf] = dataclasses.field(default_factory=dict)
    """More of them."""
    maybe: float | None = None
    """Left out by default."""
    tags: list[str] = dataclasses.field(default_factory=list)
    """Words."""


def refused(schema: type, *argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(schema, list(argv))
    return str(caught.value)


def test_later_arguments_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "name: a\nleaf: {size: 2}\ntags: [x, y]\nmaybe: 1.5\n")
    second = write(tmp_path / "b.yaml", "name: b\nleaves: {oak: {size: 4}}\n")
    config = load(Tree, [first, second, "leaf.size=3", "leaves.elm.size=5", "maybe=null"])
    assert (config.name, config.leaf.size, config.tags, config.maybe) == ("b", 3, ["x", "y"], None)
    assert config.leaves == {"oak": Leaf(4), "elm": Leaf(5)}
    assert config.colour == "red", "what nobody names keeps the dataclass's default"
    assert isinstance(config, Tree) and isinstance(config.leaf, Leaf) and type(config.tags) is list


def test_lists_are_replaced_not_joined(tmp_path: Path) -> None:
    assert load(Tree, [write(tmp_path / "a.yaml", "name: a\ntags: [x, y]\n"), "tags=[z]"]).tags == ["z"]


def test_extends_is_relative_and_weaker(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: base\ncolour: blue\nleaf: {size: 7}\n")
    write(tmp_path / "more/other.yaml", "colour: green\ntags: [o]\n")
    top = write(tmp_path / "more/top.yaml", "extends: [../base.yaml, other.yaml]\nname: top\n")
    config = load(Tree, [top])
    assert (config.name, config.colour, config.leaf.size, config.tags) == ("top", "green", 7, ["o"])


def test_extends_takes_one_name_and_chains(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "name: a\ncolour: blue\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\nname: b\n")
    config = load(Tree, [write(tmp_path / "c.yaml", "extends: [b.yaml]\ntags: [c]\n")])
    assert (config.name, config.colour, config.tags) == ("b", "blue", ["c"])


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: [b.yaml]\n")
    assert "extends itself" in refused(Tree, write(tmp_path / "b.yaml", "extends: [a.yaml]\n"))


def test_extends_names_a_missing_file(tmp_path: Path) -> None:
    assert "gone.yaml" in refused(Tree, write(tmp_path / "a.yaml", "extends: [gone.yaml]\nname: a\n"))


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("pools.label.replica=4", "pools.label.replicas"),
        ("pools.label.tensor_parallel=4", "pools.label.tensor_parallel_size"),
        ("pool.label.replicas=4", "pools"),
        ("steps.label.samplng.top_p=1", "steps.label.sampling"),
        ("steps.score.thresold=0.5", "steps.score.threshold"),
        ("rows_per_fil=3", "rows_per_file"),
        ("ray.adress=auto", "ray.address"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    message = refused(GenerateConfig, *GENERATE, override)
    assert f"did you mean `{nearest}`?" in message
    assert override.partition("=")[0].startswith(message.split("`")[1]), "the wrong key itself is named"


def test_unknown_key_in_a_file_names_key_and_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "pools: {label: {replica: 4}}\n")
    message = refused(GenerateConfig, path)
    assert "`pools.label.replica`" in message and path in message and "`pools.label.replicas`" in message


def test_unknown_key_in_a_list_entry() -> None:
    assert "did you mean `corpora.paths`?" in refused(PrepareConfig, "output=o", "corpora=[{name: x, path: [a]}]")


def test_unknown_key_unlike_any_lists_the_valid_ones() -> None:
    assert "valid keys: colour, leaf, leaves, maybe, name, tags" in refused(Tree, "zzzzzz=1")


@pytest.mark.parametrize(
    ("override", "key"),
    [("leaf.size=four", "leaf.size"), ("leaf.size=1.5", "leaf.size"), ("tags=x", "tags")],
)
def test_wrong_type_names_the_key(override: str, key: str) -> None:
    assert f"`{key}`" in refused(Tree, "name=a", override)


@pytest.mark.parametrize(
    ("argv", "key"), [([], "name"), (["name=a", "leaves.oak=null"], "leaves.oak"), (["leaf.size=2"], "name")]
)
def test_missing_value_names_the_key(argv: list[str], key: str) -> None:
    assert key in refused(Tree, *argv)


def test_value_in_place_of_a_section_is_refused() -> None:
    assert "leaf=3" in refused(Tree, "name=a", "leaf=3")


def test_missing_value_in_a_nested_dict_names_the_whole_key() -> None:
    assert "`pools.chat.model` has no value" in refused(GenerateConfig, *GENERATE[:-1])


def test_post_init_error_arrives_as_config_error() -> None:
    assert refused(Tree, "name=a", "leaf.size=-1") == "size must not be negative"
    assert refused(Tree, "name=a", "leaves.oak.size=-1") == "size must not be negative"
    assert "there is no step `labl`" in refused(GenerateConfig, *GENERATE, "pools.label.steps=[labl]")


@pytest.mark.parametrize(
    ("content", "words"),
    [("name: [unclosed\n", "not valid YAML"), ("- a\n- b\n", "mapping"), ("a: 1\na: 2\n", "not valid YAML")],
)
def test_unreadable_file(tmp_path: Path, content: str, words: str) -> None:
    path = write(tmp_path / "bad.yaml", content)
    message = refused(Tree, path)
    assert words in message and path in message


def test_missing_file_explains_overrides() -> None:
    message = refused(Tree, "conf/none.yaml")
    assert "conf/none.yaml" in message and "key=value" in message


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(Tree, [write(tmp_path / "empty.yaml", ""), "name=a"]) == Tree(name="a")


def test_yaml_tags_cannot_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / "evil.yaml", f"name: !!python/object/apply:os.system ['touch {mark}']\n")
    assert "not valid YAML" in refused(Tree, path)
    assert not mark.exists()


def test_interpolation_reads_the_environment_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """`${oc.env:NAME}` and `${other.key}` are allowed: they copy a string, and what they give is not interpreted again.

    OmegaConf's own resolvers evaluate nothing, and the package registers none.
    """
    monkeypatch.setenv("KUN_TEST", "${oc.env:HOME} $(touch /tmp/x) __import__('os')")
    config = load(Tree, ["name=${oc.env:KUN_TEST}", "colour=${name}"])
    assert config.name == config.colour == os.environ["KUN_TEST"]
    assert to_dict(config)["name"] == os.environ["KUN_TEST"]


@pytest.mark.parametrize("value", ["${oc.env:KUN_TEST_ABSENT}", "${nothing}", "${eval:1+1}", "${", "${oc.env:}"])
def test_interpolation_that_fails_names_the_key(value: str) -> None:
    assert "`name`" in refused(Tree, f"name={value}")


def test_escaped_interpolation_is_plain_text(tmp_path: Path) -> None:
    config = load(Tree, [write(tmp_path / "a.yaml", r"name: 写出 \${HOME} 的意思")])
    assert config.name == "写出 ${HOME} 的意思"
    assert to_dict(config)["name"] == config.name


def test_help_holds_every_field_with_its_sentence() -> None:
    lines = describe(Tree).splitlines()
    assert "colour (str = 'red')" in lines and "    Inherited colour, on two lines." in lines
    assert "name (str, required)" in lines and "    What it is called." in lines
    assert "leaf: The one leaf." in lines and "leaf.size (int = 1)" in lines
    assert "leaves.<name>.size (int = 1)" in lines
    assert "maybe (float | None = None)" in lines and "tags (list[str] = [])" in lines


@pytest.mark.parametrize("schema", [GenerateConfig, PrepareConfig, ExportConfig])
def test_help_of_every_job_explains_every_field(schema: type) -> None:
    lines = describe(schema).splitlines()
    silent = [
        line
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if not line.startswith("    ")
        and (not line.partition(": ")[2] if ": " in line else not following.startswith("    "))
    ]
    assert not silent
    for field in dataclasses.fields(schema):
        assert any(line.startswith(field.name) for line in lines)


def test_help_of_generate_holds_inherited_fields() -> None:
    lines = describe(GenerateConfig).splitlines()
    place = lines.index("pools.<name>.tensor_parallel_size (int = 1)")
    assert "GPUs that share each layer" in lines[place + 1]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_job_help_exits_0_without_running(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", "bad=1", flag])
    run_job(Tree, lambda config: pytest.fail("main ran"), "What this job does.")
    text = capsys.readouterr().out
    assert text.startswith("What this job does.") and "usage: python job.py" in text and "leaf.size (int = 1)" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("see s3://key:sec/ret@bucket/x now", "see s3://bucket/x now"),
        ('{"a": "s3://k:s@b", "b": "s3://k:s@c"}', '{"a": "s3://b", "b": "s3://c"}'),
        ("hdfs://user@host:9000/x", "hdfs://user@host:9000/x"),
        ("见 https://a.com，邮箱 me@b.com：好", "见 https://a.com，邮箱 me@b.com：好"),
        ("/local/path:with@signs", "/local/path:with@signs"),
    ],
)
def test_credentials_are_taken_out(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_an_item_that_a_list_does_not_have_is_named() -> None:
    from kun_ray.train.config import TrainConfig

    for argv, has in ((["valid.0.path=x"], "none"), (["data=[{path: a}]", "data.1.path=x"], "only 1")):
        with pytest.raises(ConfigError, match=rf"has no item \d, it has {has}.*write (valid|data)=\[\{{…\}}\]"):
            load(TrainConfig, argv)


def test_one_plain_argument_where_one_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    found: list[Tree] = []
    monkeypatch.setattr(sys, "argv", ["job.py", "runs/a", "tags=[t]"])
    run_job(Tree, found.append, "A job.", positional="name")
    assert (found[0].name, found[0].tags) == ("runs/a", ["t"])
    monkeypatch.setattr(sys, "argv", ["job.py", "runs/a", "runs/b"])
    with pytest.raises(SystemExit) as caught:
        run_job(Tree, found.append, "A job.", positional="name")
    assert caught.value.code == 2 and "one name is taken, but there are 2" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["job.py", "name=n", "a", "b"])
    run_job(Tree, found.append, "A job.", positional="tags")
    assert found[1].tags == ["a", "b"]
