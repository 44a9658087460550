"""The container files agree with each other and with the server; docker/test_image.sh runs them."""

import ast
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from infuse.adapters.registry import RegistryStats
from infuse.server.engine import EngineStats
from infuse.server.engine.model_files import DEFAULT_MODEL
from infuse.server.keys.key_file import read_keys
from infuse.server.observability.metrics import Metrics, build_info
from infuse.server.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
CUDA = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DASHBOARD = json.loads((ROOT / "deploy" / "monitoring" / "dashboard.json").read_text())
SCRIPTS = runpy.run_path(str(DOCKER / "make_keys.py"), run_name="make_keys")

NOT_SETTINGS = {"INFUSE_CACHE_DIR", "INFUSE_URL", "INFUSE_API_KEY"}
"""Read by the model's conversion, and by `infuse adapters`."""


def instructions(name: str, text: str = DOCKERFILE) -> list[str]:
    """The arguments of each `name` in the Dockerfile, in order, on one line each."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [found.group(1).strip() for found in re.finditer(rf"(?m)^{name} (.*)$", joined)]


def last_stage() -> str:
    return DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]


def image_environment() -> dict[str, str]:
    stage = last_stage()
    defaults = dict(each.split("=", 1) for each in instructions("ARG", stage))
    pairs = " ".join(instructions("ENV", stage)).split()
    given = (Template(pair).safe_substitute(defaults) for pair in pairs)
    return dict(pair.split("=", 1) for pair in given)


def mounts(service: str) -> list[list[str]]:
    """Source, target and perhaps "ro" of each of its volumes."""
    return [volume.split(":") for volume in SERVICES[service].get("volumes", [])]


@pytest.fixture(scope="module")
def metric_names() -> set[str]:
    """Every sample that the server exposes once a request has ended."""
    required = [field.name for field in fields(EngineStats) if field.default is MISSING]
    engine = EngineStats(**dict.fromkeys(required, 1))
    registry = RegistryStats(**{field.name: 1 for field in fields(RegistryStats)})
    metrics = Metrics(lambda: engine, lambda: registry, build_info("native"))
    request = metrics.generation.request_started("sentiment")
    metrics.http.requests.labels("GET", "/v1/models", "200").inc()
    metrics.http.seconds.labels("/v1/models").observe(0)
    request.started(0.0)
    request.token(1)
    request.token(1)
    request.finished("stop", 1, 2)
    families = text_string_to_metric_families(metrics.expose().decode())
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize(
    "file",
    sorted([*(ROOT / "deploy" / "monitoring").iterdir(), *(DOCKER / "prometheus").iterdir()]),
    ids=lambda file: file.name,
)
def test_dashboards_and_prometheus_ask_only_for_metrics_that_the_server_has(
    file: Path, metric_names: set[str]
) -> None:
    named = set(re.findall(r"\binfuse_[a-z_]+", file.read_text()))

    assert named <= metric_names
    assert named or file.name == "prometheus.yaml"


def test_every_panel_asks_the_chosen_data_source_and_says_what_it_shows() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert all(panel["description"] and panel["targets"] for panel in panels)
    assert max(Counter(panel["id"] for panel in DASHBOARD["panels"]).values()) == 1


@pytest.mark.parametrize(
    "file",
    [
        "Dockerfile",
        "docker/README.md",
        "docker/compose.yaml",
        "docker/compose.cuda.yaml",
        "docker/engines/docker.sh",
        "docker/engines/buildah.sh",
    ],
)
def test_every_infuse_variable_is_a_setting(file: str) -> None:
    named = set(re.findall(r"\bINFUSE_[A-Z_]+\b", (ROOT / file).read_text()))

    assert named - NOT_SETTINGS <= {f"INFUSE_{field.upper()}" for field in Settings.model_fields}


def test_the_image_starts_with_keys_or_an_explicit_choice_and_not_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in image_environment().items():
        if name.startswith("INFUSE_"):
            monkeypatch.setenv(name, value)

    with pytest.raises(ValidationError, match="--allow-anonymous"):
        Settings()
    monkeypatch.setenv("INFUSE_ALLOW_ANONYMOUS", "true")
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert instructions("EXPOSE") == [str(settings.port)]
    assert [str(settings.adapters_dir.parent)] == instructions("VOLUME")


def test_every_stage_stands_on_the_base_image_or_on_an_earlier_stage() -> None:
    assert DOCKERFILE.index("ARG BASE_IMAGE=") < DOCKERFILE.index("\nFROM ")
    stages: set[str] = set()
    for line in instructions("FROM"):
        source, *named = line.split(" AS ")
        assert source == "${BASE_IMAGE}" or source in stages
        stages.update(named)


def test_the_image_runs_as_an_ordinary_user() -> None:
    assert instructions("USER", last_stage()) == ["10001:10001"]
    assert "useradd --uid 10001 --gid app" in last_stage()
    assert SCRIPTS["Owners"]().infuse == 10001


def test_the_image_checks_its_own_health_with_python() -> None:
    (check,) = instructions("HEALTHCHECK", last_stage())

    command = json.loads(check[check.index("CMD ") + 4 :])
    assert command[:2] == ["python", "-c"]
    assert "/health/live" in command[2]
    ast.parse(command[2])


def test_only_an_image_with_vllm_takes_packages_from_apt() -> None:
    with_apt = [command for command in instructions("RUN") if re.search(r"\bapt(-get)?\b", command)]

    assert with_apt
    assert all(command.startswith('if [ "$ENGINE" = vllm ]; then') for command in with_apt)


def test_the_image_has_the_default_model_of_the_makefile() -> None:
    (wanted,) = re.findall(r"^DEFAULT_MODEL := (\S+)$", (ROOT / "Makefile").read_text(), re.M)

    assert f"--no-deps {wanted}\n" in DOCKERFILE


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in requirements}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-vllm.txt"])
def test_what_the_image_installs_is_pinned_for_either_engine(file: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen = re.findall(r"extras\['(\w+)'\]", DOCKERFILE)
    wanted = [*project["dependencies"], *(line for name in chosen for line in extras[name])]
    pinned = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]

    assert chosen == ["otlp", "signing"]
    assert names_of(wanted) <= names_of(pinned)


def test_the_code_that_converts_the_model_needs_no_more_than_is_copied_for_it(
    tmp_path: Path,
) -> None:
    """Up to the conversion: the model is there already."""
    stage = DOCKERFILE.partition(" AS model\n")[2].partition("\nFROM ")[0]
    for line in instructions("COPY", stage):
        *sources, target = line.split()
        for source in map(ROOT.joinpath, sources):
            if source.is_dir():
                shutil.copytree(source, tmp_path / target, symlinks=True)
            else:
                (tmp_path / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, tmp_path / target)
    model = tmp_path / "cache" / DEFAULT_MODEL
    model.mkdir(parents=True)
    (model / "generation_config.json").write_text("{}")
    (code,) = re.findall(r'"(from infuse.*)"', stage)
    own = {"PYTHONPATH": str(tmp_path), "INFUSE_CACHE_DIR": str(model.parent)}
    subprocess.run([sys.executable, "-c", code], env=os.environ | own, cwd=tmp_path, check=True)

    assert (model / "chat_template.jinja").exists()


def test_all_that_the_image_copies_exists_and_reaches_the_builder() -> None:
    let_in = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for line in instructions("COPY"):
        if not line.startswith("--from="):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists()
                assert any(source == path or source.startswith(f"{path}/") for path in let_in)


def test_what_compose_mounts_exists() -> None:
    for service in SERVICES:
        for source, *_ in mounts(service):
            if source.startswith("."):
                assert (DOCKER / source).is_file()
            else:
                assert source in COMPOSE["volumes"]
    used = {source for service in SERVICES for source, *_ in mounts(service)}
    assert set(COMPOSE["volumes"]) <= used


def test_compose_pins_each_image_and_publishes_on_loopback_only() -> None:
    for service in SERVICES.values():
        assert re.fullmatch(r"[a-z/]+:(cpu|v?\d+(\.\d+)+(-slim)?)", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_each_service_sees_its_own_keys_only_and_cannot_change_them() -> None:
    for service in set(SERVICES) - {"keys"}:
        keys = [mount for mount in mounts(service) if mount[0].endswith("-keys")]
        assert keys == [[f"{service}-keys", "/keys", "ro"]]
        assert [f"{service}-keys", f"/secrets/{service}"] in mounts("keys")


def test_prometheus_asks_the_server_with_the_key_that_was_made_for_it() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text())

    (job,) = config["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "/keys/key"}
    assert job["static_configs"] == [{"targets": ["infuse:8000"]}]


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    sources = yaml.safe_load((DOCKER / "grafana" / "datasource.yaml").read_text())
    providers = yaml.safe_load((DOCKER / "grafana" / "dashboards.yaml").read_text())
    targets = {target for _, target, *_ in mounts("grafana")}

    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    folder = providers["providers"][0]["options"]["path"]
    dashboard = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert dashboard in targets
    assert str(Path(dashboard).parent) == folder


def test_cuda_changes_what_differs_and_nothing_else() -> None:
    assert set(CUDA["services"]) == {"infuse"}
    args = CUDA["services"]["infuse"]["build"]["args"]
    assert set(args) <= {line.split("=")[0] for line in instructions("ARG")}


def test_keys_are_made_once_for_their_owners_only(tmp_path: Path) -> None:
    me = os.getuid()
    owners = SCRIPTS["Owners"](infuse=me, prometheus=me, grafana=me)

    SCRIPTS["make_keys"](tmp_path, owners)
    first = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    SCRIPTS["make_keys"](tmp_path, owners)

    assert first == {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(first) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in first} == {0o400}


def test_the_server_reads_the_keys_and_prometheus_cannot_administer(tmp_path: Path) -> None:
    me = os.getuid()
    SCRIPTS["make_keys"](tmp_path, SCRIPTS["Owners"](infuse=me, prometheus=me, grafana=me))

    admin, prometheus = read_keys(tmp_path / "infuse" / "keys.json")

    assert (admin.name, prometheus.name) == ("admin", "prometheus")
    assert admin.roles == {"generate", "admin"}
    assert prometheus.roles == {"metrics"}
    assert prometheus.key.get_secret_value() == (tmp_path / "prometheus" / "key").read_text()
