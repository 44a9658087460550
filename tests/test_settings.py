"""Settings: flags, environment variables and defaults, and what is refused."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from infuse.server.settings import Settings
from tests.certificates import certificates

VALUES = {
    "config": os.devnull,
    "model": "folder",
    "engine": "vllm",
    "ia3_targets": "q_proj,down_proj:input",
    "vllm_options": '{"tensor_parallel_size": 2}',
    "served_model_name": "base",
    "adapters_dir": "/data",
    "adapters_cache_dir": "/cache",
    "shared_store": "true",
    "replica_lease": "4.5",
    "keep_revisions": "3",
    "keep_days": "90.5",
    "merges_dir": "/merges",
    "usage_dir": "/usage",
    "preload_adapters": "/examples",
    "host": "127.0.0.2",
    "port": "8123",
    "admin_port": "8124",
    "uds": "/run/infuse.sock",
    "root_path": "/team/infuse",
    "cors_origins": "https://app.example.com,http://localhost:5173",
    "device": "cpu",
    "dtype": "bfloat16",
    "quantization": "int8",
    "max_model_len": "512",
    "max_batch_rows": "4",
    "max_resident_adapters": "7",
    "max_host_adapter_bytes": "0",
    "max_saved_module_bytes": "0",
    "kv_cache_tokens": "4096",
    "prefill_chunk_tokens": "64",
    "prefix_cache": "false",
    "keys_share_caches": "true",
    "max_queue": "9",
    "max_upload_bytes": "1000",
    "max_uploads_bytes": "2000000",
    "max_body_bytes": "100",
    "max_connections": "50",
    "receive_timeout": "2.0",
    "send_timeout": "3.0",
    "source_prefixes": "hf://org/,s3://bucket/a",
    "trusted_signers": "/etc/signers",
    "source_timeout": "2.5",
    "keys_file": __file__,
    "oidc_issuer": "https://login.example.com/realms/acme",
    "oidc_audience": "infuse",
    "open_docs": "false",
    "allow_anonymous": "true",
    "drain_timeout": "1.5",
    "hang_timeout": "2.5",
    "max_queue_seconds": "3.5",
    "max_request_seconds": "4.5",
    "log_level": "debug",
    "log_format": "json",
    "pack_linears": "false",
    "speculation": "true",
    "compile": "true",
}


NEED_MORE = {"config", "host", "keys_file", "oidc_issuer", "oidc_audience"}
NEED_MORE |= {name for name in Settings.model_fields if name.startswith("ssl_")}
"""Settings that stand only beside others, or name a file that there must be."""


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"INFUSE_{name.upper()}", raising=False)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, str]:
    """Every setting, with a value that is not its default."""
    made = certificates(tmp_path)
    tls = {
        "ssl_certfile": str(made.server),
        "ssl_keyfile": str(made.server),
        "ssl_keyfile_password": "of no use",
        "ssl_ca_certs": str(made.authority),
    }
    return VALUES | tls


def as_text(settings: Settings) -> dict[str, str]:
    values = {name: str(value) for name, value in settings.model_dump().items()}
    return {
        name: value.lower() if value in ("True", "False") else value
        for name, value in values.items()
    }


def test_every_setting_is_an_environment_variable(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"INFUSE_{name.upper()}", value)

    assert as_text(Settings()) == values
    assert values.keys() == Settings.model_fields.keys()


def test_every_setting_is_a_flag(values: dict[str, str]) -> None:
    switches = {"true": "--", "false": "--no-"}
    flags = [
        f"{switches[value]}{flag}" if value in switches else f"--{flag}={value}"
        for flag, value in ((name.replace("_", "-"), value) for name, value in values.items())
    ]

    assert as_text(CliApp.run(Settings, cli_args=flags)) == values


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_PORT", "1")
    monkeypatch.setenv("INFUSE_MAX_QUEUE", "2")

    settings = CliApp.run(Settings, cli_args=["--port", "3"])

    assert (settings.port, settings.max_queue) == (3, 2)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_PORT", "")
    monkeypatch.setenv("INFUSE_KEYS_FILE", "")

    assert Settings() == Settings(port=8000, keys_file=None)


def test_a_switch_needs_no_value() -> None:
    settings = CliApp.run(Settings, cli_args=["--allow-anonymous", "--no-pack-linears"])

    assert (settings.allow_anonymous, settings.pack_linears) == (True, False)


def test_every_setting_is_described_with_an_example_that_fits() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        [example] = field.examples or [None]
        if name not in NEED_MORE:
            Settings(**{name: example})


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/a/b", "gs://b/a", "az://account/b"])
def test_adapters_may_be_in_a_bucket(url: str) -> None:
    assert Settings(adapters_dir=url).adapters_dir == url
    assert CliApp.run(Settings, cli_args=["--adapters-dir", url]).adapters_dir == url


@pytest.mark.parametrize("folder", ["data", "/data/s3", "./s3:/x"])
def test_anything_else_is_a_folder(folder: str) -> None:
    assert Settings(adapters_dir=folder).adapters_dir == Path(folder)


@pytest.mark.parametrize("url", ["http://bucket/x", "s3://", "s3:///x", "S3://bucket", "file:///x"])
def test_a_url_that_is_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="is no folder and no bucket: set a path, s3://"):
        Settings(adapters_dir=url)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.10"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert Settings(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "8.8.8.8", "::ffff:8.8.8.8"])
def test_the_world_needs_keys_or_a_word_that_it_is_guarded(host: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.touch()

    with pytest.raises(ValidationError, match="loopback only"):
        Settings(host=host)
    assert Settings(host=host, keys_file=keys).host == host
    assert Settings(host=host, allow_anonymous=True).host == host


def test_a_unix_socket_is_of_this_machine_and_a_port_beside_it_may_not_be(tmp_path: Path) -> None:
    assert Settings(host="0.0.0.0", uds=tmp_path / "socket").keys_file is None
    with pytest.raises(ValidationError, match="loopback only"):
        Settings(host="0.0.0.0", uds=tmp_path / "socket", admin_port=8001)


@pytest.mark.parametrize(("given", "taken"), [("/", ""), ("/a/", "/a"), ("/a/b", "/a/b")])
def test_a_path_of_a_proxy_ends_without_a_slash(given: str, taken: str) -> None:
    assert Settings(root_path=given).root_path == taken


@pytest.mark.parametrize(
    ("issuer", "problem"),
    [
        ("http://login.example.com", "begins with https://"),
        ("http://localhost.example.com", "begins with https://"),
        ("http://127.0.0.1@example.com", "begins with https://"),
        ("login.example.com", "begins with https://"),
        ('https://login.example.com/"', "begins with https://"),
        (None, "--oidc-issuer and --oidc-audience go together"),
    ],
)
def test_an_issuer_has_tls_and_an_audience(issuer: str | None, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Settings(oidc_issuer=issuer, oidc_audience="infuse", keys_file=Path(__file__))


@pytest.mark.parametrize(
    "issuer",
    [
        "https://login.example.com",
        "https://login.example.com/realms/acme/",
        "http://127.0.0.1:9000",
        "http://localhost/dex",
    ],
)
def test_an_issuer_needs_a_keys_file(issuer: str) -> None:
    Settings(oidc_issuer=issuer, oidc_audience="infuse", keys_file=Path(__file__))

    with pytest.raises(ValidationError, match="--oidc-issuer needs --keys-file"):
        Settings(oidc_issuer=issuer, oidc_audience="infuse")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("admin_port", 0),
        ("admin_port", 8000),
        ("host", "example.org"),
        ("device", "tpu"),
        ("dtype", "int8"),
        ("max_batch_rows", 0),
        ("max_resident_adapters", 0),
        ("max_model_len", 0),
        ("kv_cache_tokens", 0),
        ("max_queue", 0),
        ("drain_timeout", -1),
        ("hang_timeout", 0.5),
        ("max_queue_seconds", 0),
        ("max_request_seconds", 0),
        ("source_prefixes", "org/"),
        ("source_prefixes", "hf://org/, s3://bucket/../other"),
        ("source_timeout", 0),
        ("log_level", "loud"),
        ("keys_file", "/no/such/file"),
        ("ssl_keyfile", __file__),
        ("ssl_ca_certs", __file__),
        ("ssl_certfile", __file__),
        ("ssl_certfile", "/no/such/file"),
        ("root_path", "infuse"),
        ("root_path", "/in fuse"),
        ("root_path", "/a//b"),
        ("root_path", "/../v1"),
        ("cors_origins", "app.example.com"),
        ("cors_origins", "https://app.example.com/path"),
        ("cors_origins", "https://*.example.com"),
        ("modell", "x"),
    ],
)
def test_a_value_that_cannot_be_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Settings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", ["tensor_parallel_size=2", "[2]", "2"])
def test_options_for_vllm_are_a_json_object(options: str) -> None:
    with pytest.raises(ValidationError, match="is no JSON"):
        Settings(vllm_options=options)
