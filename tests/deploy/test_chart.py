"""The Helm chart: what helm renders is valid for Kubernetes, and the server starts with it."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from infuse.server.keys.key_file import read_keys
from infuse.server.settings import Settings
from tests.docs.blocks import GUIDE, blocks

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "infuse"
ALERTS = (ROOT / "deploy" / "monitoring" / "alerts.yaml").read_text()
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
BUCKET = {"store": {"bucket": "s3://my-bucket/adapters", "credentialsSecret": "bucket"}}
SHARED_VOLUME = {"store": {"accessMode": "ReadWriteMany", "storageClassName": "nfs"}}
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "bucket": BUCKET | {"serviceAccountAnnotations": {"eks.amazonaws.com/role-arn": "arn:aws:1"}},
    "replicas-on-a-bucket": BUCKET | {"replicas": 3},
    "replicas-on-a-volume": SHARED_VOLUME | {"replicas": 2, "drainSeconds": 300},
    "hpa": BUCKET | {"autoscaling": {"kind": "hpa", "maxReplicas": 9}},
    "keda": BUCKET | {"autoscaling": {"kind": "keda"}},
    "monitored": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    "alerts": {"prometheusRule": {"rules": ALERTS, "labels": {"release": "prometheus"}}},
    "anonymous": {"keys": {"anonymous": True}, "serviceMonitor": {"enabled": True}},
    "admin-port": {
        "service": {"type": "LoadBalancer", "adminPort": 9000},
        "networkPolicy": {"adminFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]},
        "serviceMonitor": {"enabled": True},
    },
    "own-secrets": {"keys": {"secret": "mine"}, "imagePullSecrets": [{"name": "registry"}]},
    "own-claims": {"modelClaim": "llama", "store": {"existingClaim": "adapters"}},
    "gpu": {
        "engine": "vllm",
        "gpus": 2,
        "scheduling": {
            "nodeSelector": {"gpu": "h200"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    },
    "set": {
        "settings": {
            "model": "my-org/my-model",
            "max-upload-bytes": 123456789,
            "send-timeout": 1.5,
            "speculation": True,
        },
        "service": {"type": "LoadBalancer", "port": 80},
        "networkPolicy": {"enabled": False},
    },
}
VALUES |= {
    f"{page.stem}-{block.line}": yaml.safe_load(block.text)
    for page in GUIDE
    for block in blocks(page)
    if block.language == "yaml"
}
CUSTOM = {"PrometheusRule", "ScaledObject", "ServiceMonitor"}
"""Kinds that operators define, not Kubernetes."""

helm = pytest.importorskip("helm_python", reason="needs helm: pip install helm-python-sdk")
EVERY_VALUES = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)


def render(values: dict[str, Any], release: str = "infuse") -> dict[str, dict[str, Any]]:
    """Kind -> the object that helm renders of it; that of administration is `AdminService`."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files: dict[str, str] = chart.render(values, name=release, namespace="models")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each]
    named = {_name(each): each for each in objects}
    assert len(named) == len(objects)
    return named


def _name(rendered: dict[str, Any]) -> str:
    is_admins = rendered["metadata"]["name"].endswith("-admin")
    return f"{'Admin' if is_admins else ''}{rendered['kind']}"


def pod_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return pod


def container_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    [container] = pod_of(objects)["containers"]
    found: dict[str, Any] = container
    return found


@EVERY_VALUES
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_what_helm_renders_is_valid_for_kubernetes(values: dict[str, Any], version: str) -> None:
    for each in render(values).values():
        assert each["metadata"]["name"]
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


def test_helm_finds_nothing_to_warn_of() -> None:
    report = helm.lint(CHART, strict=True)

    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


@EVERY_VALUES
def test_the_server_takes_the_settings_that_are_rendered(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = render(values)["ConfigMap"]["data"]
    assert variables.keys() <= {f"INFUSE_{f.upper()}" for f in Settings.model_fields}
    (tmp_path / "keys.json").touch()
    for name, value in variables.items():
        is_keys = name == "INFUSE_KEYS_FILE"
        monkeypatch.setenv(name, str(tmp_path / "keys.json") if is_keys else value)
    monkeypatch.setenv("INFUSE_HOST", "0.0.0.0")

    settings = Settings()

    for name, value in values.get("settings", {}).items():
        assert getattr(settings, name.replace("-", "_")) == value
    assert settings.drain_timeout == values.get("drainSeconds", 30)
    assert (settings.keys_file is None) == settings.allow_anonymous


def test_a_mistyped_value_or_setting_is_refused_by_name() -> None:
    for values in ({"replica": 2}, {"settings": {"max-batch-row": 2}}, {"engine": "tgi"}):
        [wrong] = re.findall(r"replica|max-batch-row|engine", json.dumps(values))
        with pytest.raises(helm.HelmError, match=wrong):
            render(values)


def test_the_schema_knows_every_setting_that_is_of_use_and_not_the_charts_own() -> None:
    known = set(SCHEMA["properties"]["settings"]["propertyNames"]["enum"])
    made = {
        "adapters-dir",
        "admin-port",
        "allow-anonymous",
        "config",
        "drain-timeout",
        "engine",
        "host",
        "keys-file",
        "merges-dir",
        "port",
        "shared-store",
        "usage-dir",
    }
    # TLS ends at the ingress, which speaks to a port.
    foreign = {"uds", "ssl-certfile", "ssl-keyfile", "ssl-keyfile-password", "ssl-ca-certs"}

    assert known == {name.replace("_", "-") for name in Settings.model_fields} - made - foreign


def test_every_value_is_in_the_schema_and_in_a_template() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    templates = templates.replace("$scaling.", ".Values.autoscaling.")

    for path in _paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert f".Values.{path}" in templates, path
        at = SCHEMA
        for name in path.split("."):
            at = at["properties"][name]


def _paths(values: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value and before + name != "resources":
            yield from _paths(value, f"{before}{name}.")
        else:
            yield before + name


@pytest.mark.parametrize(
    "values", [{"replicas": 2}, {"autoscaling": {"kind": "hpa"}}, {"autoscaling": {"kind": "keda"}}]
)
def test_more_than_one_replica_needs_a_store_that_can_be_shared(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError, match=r"store\.bucket, or store\.accessMode"):
        render(values)


@EVERY_VALUES
def test_replicas_share_the_store_and_a_single_server_is_replaced_by_the_next(
    values: dict[str, Any],
) -> None:
    objects = render(values)
    several = values.get("replicas", 1) > 1 or "autoscaling" in values

    assert ("INFUSE_SHARED_STORE" in objects["ConfigMap"]["data"]) == several
    assert ("PodDisruptionBudget" in objects) == several
    strategy = objects["Deployment"]["spec"]["strategy"]["type"]
    assert strategy == ("RollingUpdate" if several else "Recreate")
    scaled = objects.keys() & {"HorizontalPodAutoscaler", "ScaledObject"}
    assert ("replicas" in objects["Deployment"]["spec"]) == (not scaled)


def test_adapters_lie_at_one_place_of_a_volume_whoever_mounts_it() -> None:
    """So that a single server's adapters are there when more replicas come."""
    for values in (VALUES["default"], VALUES["replicas-on-a-volume"]):
        objects = render(values)
        folder = Path(objects["ConfigMap"]["data"]["INFUSE_ADAPTERS_DIR"])
        mounts = {m["name"]: m["mountPath"] for m in container_of(objects)["volumeMounts"]}
        assert folder == Path(mounts["store"]) / "adapters"
        assert "/data" in mounts.values(), "the home of the image's user can be written"


@EVERY_VALUES
def test_the_pod_runs_with_the_least_rights(values: dict[str, Any]) -> None:
    pod = pod_of(render(values))

    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_pod_runs_as_the_user_of_the_image() -> None:
    [user] = re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    assert pod_of(render({}))["securityContext"]["runAsUser"] == int(user)


def test_a_service_named_infuse_changes_no_setting() -> None:
    """Kubernetes would set INFUSE_PORT=tcp://… for it."""
    objects = render({}, release="infuse")

    assert objects["Service"]["metadata"]["name"] == "infuse"
    assert pod_of(objects)["enableServiceLinks"] is False


@EVERY_VALUES
def test_a_pod_has_time_to_leave_the_service_and_to_drain(values: dict[str, Any]) -> None:
    objects = render(values)
    sleep = container_of(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(objects["ConfigMap"]["data"]["INFUSE_DRAIN_TIMEOUT"])

    assert pod_of(objects)["terminationGracePeriodSeconds"] > sleep + drain


def test_probes_restart_by_liveness_and_route_by_readiness() -> None:
    objects = render({})
    container = container_of(objects)

    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "startup")}
    assert set(paths.values()) == {"/health/live"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    [port] = container["ports"]
    assert port == {"name": "http", "containerPort": 8000}


def test_the_keys_that_are_made_work_and_are_others_each_time(tmp_path: Path) -> None:
    made = []
    for number in range(2):
        secret = render({})["Secret"]["stringData"]
        file = tmp_path / f"{number}.json"
        file.write_text(secret["keys.json"])
        admin, prometheus = read_keys(file)
        assert admin.roles == {"generate", "admin"}
        assert prometheus.roles == {"metrics"}
        assert admin.key.get_secret_value() == secret["admin-key"]
        assert prometheus.key.get_secret_value() == secret["metrics-key"]
        made += [secret["admin-key"], secret["metrics-key"]]
    assert len(set(made)) == 4


@pytest.mark.parametrize("name", ["anonymous", "own-secrets"])
def test_no_keys_are_made_where_none_are_needed(name: str) -> None:
    assert "Secret" not in render(VALUES[name])


def test_a_server_without_keys_is_guarded_by_its_network_policy() -> None:
    with pytest.raises(helm.HelmError, match="networkPolicy"):
        render({"keys": {"anonymous": True}, "networkPolicy": {"enabled": False}})


def test_administration_has_a_service_that_only_pods_reach_and_prometheus_asks_there() -> None:
    values = VALUES["admin-port"]
    objects = render(values)
    public, admin = objects["Service"]["spec"], objects["AdminService"]["spec"]

    assert public["type"] == "LoadBalancer"
    assert [each["targetPort"] for each in public["ports"]] == ["http"]
    assert admin.get("type", "ClusterIP") == "ClusterIP"
    [port] = admin["ports"]
    assert (port["port"], port["targetPort"]) == (9000, "admin")
    ports = {each["name"]: each["containerPort"] for each in container_of(objects)["ports"]}
    assert str(ports["admin"]) == objects["ConfigMap"]["data"]["INFUSE_ADMIN_PORT"]
    [endpoint] = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == port["name"]
    rules = {each["ports"][0]["port"]: each for each in objects["NetworkPolicy"]["spec"]["ingress"]}
    assert rules["admin"]["from"] == values["networkPolicy"]["adminFrom"]
    assert "AdminService" not in render({})


def test_gpus_are_limits_of_the_container() -> None:
    objects = render(VALUES["gpu"])

    assert container_of(objects)["resources"]["limits"] == {"nvidia.com/gpu": 2, "memory": "4Gi"}
    assert objects["ConfigMap"]["data"]["INFUSE_ENGINE"] == "vllm"
    with pytest.raises(helm.HelmError, match="gpus"):
        render({"engine": "vllm"})


@pytest.mark.parametrize("name", ["hpa", "keda"])
def test_replicas_follow_a_metric_that_the_server_has(name: str) -> None:
    objects = render(VALUES[name])
    scaler = objects["HorizontalPodAutoscaler" if name == "hpa" else "ScaledObject"]

    [metric] = set(re.findall(r"infuse_[a-z_]+", json.dumps(scaler["spec"])))
    assert f"`{metric}`" in (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert scaler["spec"]["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]


def test_prometheus_reads_the_metrics_with_its_own_key() -> None:
    objects = render(VALUES["monitored"])
    [endpoint] = objects["ServiceMonitor"]["spec"]["endpoints"]

    [port] = objects["Service"]["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["name"] == objects["Secret"]["metadata"]["name"]
    assert credentials["key"] in objects["Secret"]["stringData"]
    assert objects["ServiceMonitor"]["metadata"]["labels"]["release"] == "prometheus"
    matched = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert matched.items() <= objects["Service"]["metadata"]["labels"].items()


def test_the_rules_of_a_file_are_given_to_prometheus_as_they_are() -> None:
    rule = render(VALUES["alerts"])["PrometheusRule"]

    assert rule["spec"] == yaml.safe_load(ALERTS)
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_the_chart_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["appVersion"] == project["version"]
    assert chart["description"] == project["description"]
