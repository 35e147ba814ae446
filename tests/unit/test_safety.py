"""Safe by default: the package runs no code that it is handed, unpickles nothing, and shows no credentials."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import neighbour
from pyarrow import fs
from transformers import PreTrainedTokenizerFast

from kun_ray import prepare as prepare_module
from kun_ray import store
from kun_ray.config import ConfigError, KunError
from kun_ray.corpora import CorpusConfig, list_files
from kun_ray.export import ExportConfig
from kun_ray.generate import GenerateConfig
from kun_ray.prepare import PrepareConfig
from kun_ray.prompts import load_tokenizer

REPO = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("kun_ray", "jobs", "bench") for path in (REPO / folder).rglob("*.py"))
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load", "marshal.loads",
    "shelve.open", "joblib.load", "torch.load", "OmegaConf.register_new_resolver", "subprocess.getoutput",
}  # fmt: skip
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def faults(source: str) -> list[str]:
    """What a piece of code must not do, by line."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {argument.arg: ast.unparse(argument.value) for argument in node.keywords}
            if name in FORBIDDEN:
                found.append(f"{node.lineno}: {name}")
            if arguments.get("shell", "False") != "False":
                found.append(f"{node.lineno}: shell={arguments['shell']}")
            if arguments.get("trust_remote_code") == "True" or arguments.get("weights_only") == "False":
                found.append(f"{node.lineno}: {name} trusts what it loads")
            if arguments.get("allow_pickle", "False") != "False":
                found.append(f"{node.lineno}: {name} unpickles")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found += [f"{node.lineno}: imports {module}" for module in modules if module.split(".")[0] in UNPICKLERS]
    return found


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    assert len(SOURCES) > 30
    assert {str(path): found for path in SOURCES if (found := faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "eval(x)", "exec(x)", "torch.load(p)", "yaml.load(s)", "os.system(s)",
        "subprocess.run(s, shell=True)", "subprocess.run(s, shell=flag)", "f(trust_remote_code=True)", "np.load(p, allow_pickle=True)",
        "OmegaConf.register_new_resolver('eval', eval)",
    ],
)  # fmt: skip
def test_the_scan_finds_what_it_is_for(code: str) -> None:
    assert faults(code)
    assert not faults(
        "run.engine.eval(); re.compile(x); yaml.safe_load(s); f(trust_remote_code=config.trust_remote_code)"
    )


def config_schemas(schema: type, seen: set[type]) -> set[type]:
    """All dataclasses that a job's configuration is made of."""
    seen.add(schema)
    for hint in typing.get_type_hints(schema).values():
        for part in (hint, *typing.get_args(hint)):
            if inspect.isclass(part) and dataclasses.is_dataclass(part) and part not in seen:
                config_schemas(part, seen)
    return seen


def test_code_of_models_is_trusted_by_no_default_and_no_shipped_file() -> None:
    schemas = {found for job in (PrepareConfig, GenerateConfig, ExportConfig) for found in config_schemas(job, set())}
    fields = [field for schema in schemas for field in dataclasses.fields(schema) if field.name == "trust_remote_code"]
    assert fields and all(field.default is False for field in fields)
    for path in (REPO / "conf").rglob("*.yaml"):
        assert "trust_remote_code: true" not in path.read_text().lower(), path


def test_a_tokenizer_that_brings_code_does_not_run_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    )
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    try:
        load_tokenizer(str(tmp_path), "chatml")
    except ConfigError as error:
        assert "trust_remote_code" in str(error) or "tokenizer" in str(error)
    assert not mark.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for x in range(10**9) %}{{ x }}{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_is_sandboxed(attack: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A template comes with a model, like its weights: it may render turns and nothing else."""
    from kun_ray.prompts import PromptConfig, build_prompt

    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="chat template"):
        build_prompt(load_tokenizer(str(tmp_path), attack), PromptConfig(user="{text}"))


# Credentials -----------------------------------------------------------------------------------------------------------

SECRET = "s3://AKIASECRET:hush/hush@bucket"
HIDDEN = re.compile("AKIASECRET|hush|s3cr3t")


@pytest.mark.parametrize(
    "message",
    [f"{SECRET}/x is gone", "abfs://c@a/x?sig=s3cr3t&se=1", f"{SECRET}/a and {SECRET}/b?session_token=s3cr3t"],
)
def test_no_error_for_people_shows_credentials(message: str) -> None:
    for error in (KunError(message), ConfigError(message)):
        assert not HIDDEN.search(str(error)) and not HIDDEN.search(repr(error))
        assert "bucket" in str(error) or "c@a/x" in str(error)


def test_prepare_shows_and_keeps_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished stage, a refused one and a missing corpus, all given as URIs with a key in them."""

    def local(uri: str) -> tuple[fs.FileSystem, str]:
        return fs.LocalFileSystem(), str(tmp_path / uri.partition("bucket/")[2].partition("?")[0])

    for module in ("store", "sources", "listing"):
        monkeypatch.setattr(f"kun_ray.{module}.resolve", local)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.jsonl").write_bytes(neighbour())
    config = PrepareConfig(
        corpora=[CorpusConfig("c", "jsonl", [f"{SECRET}/in"])], output=f"{SECRET}/out?session_token=s3cr3t"
    )
    fingerprint = prepare_module.fingerprint(config, prepare_module.list_corpora(config.corpora))
    folder = store.open_stage(config.output, fingerprint, prepare_module.to_dict(config))
    folder.finish({"rows": 1})
    assert prepare_module.prepare(config) == {"rows": 1}
    shown = "".join(capsys.readouterr())
    with pytest.raises(KunError) as other:
        prepare_module.prepare(
            dataclasses.replace(config, tokenizer=None, filters=dataclasses.replace(config.filters, min_chars=3))
        )
    with pytest.raises(KunError) as missing:
        list_files(CorpusConfig("c", "jsonl", [f"{SECRET}/none"]))
    kept = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    for text in (shown, str(other.value), str(missing.value), kept):
        assert "bucket" in text and not HIDDEN.search(text)


def test_environment_variables_keep_keys_out_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """`${oc.env:…}` is the only resolver with a source outside the file, and what it gives passes the same sieve."""
    from kun_ray.config import load

    monkeypatch.setenv("BUCKET_URI", f"{SECRET}/run")
    config = load(ExportConfig, ["input=${oc.env:BUCKET_URI}", "output=x"])
    assert config.input == f"{SECRET}/run" and not HIDDEN.search(json.dumps(store._plain({"input": config.input})))


# Clusters --------------------------------------------------------------------------------------------------------------


def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPO / "cluster.yaml").read_text())
    return loaded


def test_cluster_yaml_fits_rays_own_schema_and_validator() -> None:
    """What `ray up` does before it asks for a machine: no account is needed, nothing is started."""
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster(), schema)
    prepared = prepare_config(cluster())
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster(), "max_wokers": 8}, schema)


def test_the_cluster_has_a100_nodes_and_closed_ports() -> None:
    config = cluster()
    kinds = config["available_node_types"]
    assert kinds["gpu"]["node_config"]["InstanceType"] in ("p4d.24xlarge", "p4de.24xlarge")
    head, workers = "\n".join(config["head_start_ray_commands"]), "\n".join(config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in workers
    assert "--ray-client-server-port" not in head and "0.0.0.0" not in head
    setup = "\n".join(config["setup_commands"])
    assert "[gpu,train]" in setup and "/shared" in setup
    assert "type: local" in (REPO / "cluster.yaml").read_text(), "the on-premises variant is there, commented"


def test_the_on_premises_variant_fits_the_schema_too() -> None:
    import jsonschema
    import ray.autoscaler

    text = (REPO / "cluster.yaml").read_text()
    start = text.index("# provider:\n#   type: local")
    commented = text[start : text.index("\n#\n", start)]
    local = yaml.safe_load("\n".join(line.removeprefix("# ").removeprefix("#") for line in commented.splitlines()))
    dropped = ("available_node_types", "head_node_type", "provider", "auth")
    config = {**{key: value for key, value in cluster().items() if key not in dropped}, **local}
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["provider"]["type"] == "local" and config["max_workers"] == len(config["provider"]["worker_ips"])


def test_kuberay_manifest_has_what_the_operator_reads() -> None:
    (job,) = (
        document
        for document in yaml.safe_load_all((REPO / "docs/kuberay.yaml").read_text())
        if document["kind"] == "RayJob"
    )
    assert job["apiVersion"] == "ray.io/v1"
    spec, ray_cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["entrypoint"].startswith("python jobs/") and spec["shutdownAfterJobFinishes"] is True
    head, workers = (
        ray_cluster["headGroupSpec"],
        {group["groupName"]: group for group in ray_cluster["workerGroupSpecs"]},
    )
    assert head["rayStartParams"]["num-cpus"] == "0" and head["rayStartParams"]["dashboard-host"] in (
        "127.0.0.1",
        "0.0.0.0",
    )
    gpu = workers["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpu == 8 and workers["gpu"]["minReplicas"] <= workers["gpu"]["replicas"] <= workers["gpu"]["maxReplicas"]
    for group in (head, *workers.values()):
        pod = group["template"]["spec"]
        assert pod["containers"][0]["image"] == head["template"]["spec"]["containers"][0]["image"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["shared"] == "/shared" and mounts["shm"] == "/dev/shm"
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert ray_cluster["rayVersion"] == "2.60.0"
