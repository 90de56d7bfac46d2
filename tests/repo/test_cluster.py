"""The Kubernetes job: fields that KubeRay knows, a command that exists, no key in the file."""

import copy
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cliper.jobs.cli import load
from cliper.pipeline.config import load_classes, load_config
from tests.conftest import ROOT

FILE = ROOT / "configs" / "cluster" / "rayjob.yaml"


def fields(required: str = "", **known: Any) -> dict[str, Any]:
    """An object with these fields and no others: a misspelt field is ignored by Kubernetes, not reported."""
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, YES_NO = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # numbers must be quoted
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^[0-9.]+(m|[KMGT]i?)?$"}}
FROM_SECRET = fields("secretKeyRef", secretKeyRef=fields("name key", name=TEXT, key=TEXT, optional=YES_NO))
CONTAINER = fields(
    "name image resources",
    name={"type": "string", "pattern": "^[a-z0-9-]+$"},
    image=TEXT,
    env=many(fields("name", name=TEXT, value=TEXT, valueFrom=FROM_SECRET)),
    ports=many(fields("containerPort", name=TEXT, containerPort=COUNT)),
    volumeMounts=many(fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly=YES_NO)),
    resources=fields("requests limits", requests=QUANTITIES, limits=QUANTITIES),
)
TOLERATION = fields(
    "operator",
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
CLAIM = fields("claimName", claimName=TEXT, readOnly=YES_NO)
POD = fields(
    "containers",
    containers=many(CONTAINER),
    nodeSelector=TEXTS,
    tolerations=many(TOLERATION),
    serviceAccountName=TEXT,
    securityContext=fields(runAsNonRoot=YES_NO, runAsUser=COUNT, fsGroup=COUNT),
    terminationGracePeriodSeconds=COUNT,
    volumes=many(fields("name", name=TEXT, persistentVolumeClaim=CLAIM)),
)
TEMPLATE = fields("spec", spec=POD)
WORKERS = fields(
    "groupName rayStartParams template minReplicas maxReplicas",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields("mode", mode=one_of("token", "disabled")),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=fields(idleTimeoutSeconds=COUNT),
    headGroupSpec=fields("rayStartParams template", rayStartParams=TEXTS, template=TEMPLATE),
    workerGroupSpecs=many(WORKERS),
)
RAY_JOB = fields(  # the fields of ray.io/v1 RayJob that we use, as its API reference has them
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=fields("name", name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),  # KubeRay's own limit
    spec=fields(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        preRunningDeadlineSeconds=COUNT,
        activeDeadlineSeconds=COUNT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
        submitterConfig=fields(backoffLimit=COUNT),
        shutdownAfterJobFinishes=YES_NO,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=CLUSTER,
    ),
)


def job() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return copy.deepcopy(content)  # anchors share objects


def problems(content: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(RAY_JOB).iter_errors(content)]


def test_the_job_has_only_fields_that_kuberay_knows() -> None:
    Draft202012Validator.check_schema(RAY_JOB)
    assert problems(job()) == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "shutdownAfterJobFinish"), True),
        (("spec", "submissionMode"), "K8sMode"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-gpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "tolerations", 0, "effect"), "No"),
    ],
)
def test_mistakes_in_the_job_are_found(where: tuple[Any, ...], value: object) -> None:
    content = target = job()
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    assert len(problems(content)) == 1


def test_its_command_exists() -> None:
    program, name, *words = shlex.split(job()["spec"]["entrypoint"])
    assert program == "cliper"
    command = load(name)
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert set(given) <= {option for parameter in command.params for option in parameter.opts}
    load_config(given["--config"])
    load_classes(given["--classes"])


def test_gpus_start_on_demand_and_keys_come_from_the_secret() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    [head_container], [worker] = head["template"]["spec"]["containers"], workers["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head_container["resources"]["requests"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == workers["rayStartParams"]["num-gpus"] == "1"
    assert cluster["enableInTreeAutoscaling"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 4)
    entrypoint = job()["spec"]["entrypoint"]
    assert "--actors 1:4" in entrypoint
    assert "--device cuda" in entrypoint  # with no node yet, it cannot be detected
    for container in (head_container, worker):
        secret = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v}
        keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"}
        assert set(secret) == keys
        assert all(ref == {"name": "cliper-s3", "key": name, "optional": True} for name, ref in secret.items())


CRD = os.environ.get("KUBERAY_RAYJOB_CRD")


@pytest.mark.skipif(CRD is None, reason="KUBERAY_RAYJOB_CRD is not the path of ray.io_rayjobs.yaml")
def test_the_job_is_valid_under_kuberays_own_definition() -> None:
    """Structural schemas drop unknown fields; here they are errors, wherever the definition lists its fields."""
    versions = yaml.safe_load(Path(CRD or "").read_text())["spec"]["versions"]
    [schema] = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    found = Draft202012Validator(closed(schema)).iter_errors(job())
    assert [f"{error.json_path}: {error.message}" for error in found] == []


def closed(schema: Any) -> Any:
    """The same schema without additional fields; int-or-string is Kubernetes' own extension."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema:
        changed["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        changed["properties"] |= (
            {} if "metadata" not in changed["properties"] else {"metadata": {"type": "object"}}
        )
    return changed


def test_the_versions_are_this_ones() -> None:
    from importlib.metadata import version

    import ray

    cluster = job()["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"].endswith(f":{version('cliper')}")
