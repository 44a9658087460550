"""All settings: the flags of `infuse serve`, their environment variables, and their checks."""

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from infuse.server.config_file import ConfigFile
from infuse.server.setting_types import (
    QUOTABLE,
    Address,
    FolderOrBucket,
    IssuerUrl,
    JsonObject,
    Origins,
    PathPrefix,
    SourcePrefixes,
    check_certificate,
)

MEBIBYTE = 1 << 20


class Settings(BaseSettings):
    """Serve one base model and its IA3 adapters over HTTP.

    Each flag is also an environment variable: --max-model-len is INFUSE_MAX_MODEL_LEN.

    Example: infuse serve --model ./llama-3.2-3b --adapters-dir ./adapters --keys-file keys.json
    """

    model_config = SettingsConfigDict(
        env_prefix="INFUSE_",
        cli_prog_name="infuse serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        env_ignore_empty=True,
        extra="forbid",
    )

    config: Path | None = Field(
        None,
        description="A file of settings in TOML, for what neither flags nor variables set: "
        "max-model-len = 4096. Default: infuse.toml in the working folder, if it is there.",
        examples=["/etc/infuse/infuse.toml"],
    )
    model: str | None = Field(
        None,
        description="Hub id or folder of the base model. Default: SmolLM2-135M-Instruct.",
        examples=["meta-llama/Llama-3.2-3B"],
    )
    engine: Literal["native", "vllm"] = Field(
        "native",
        description="What computes: native for CPUs, notebooks and encoder-decoders; vllm for GPUs "
        "(docs/guide/vllm.md says how to install it).",
        examples=["vllm"],
    )
    ia3_targets: str = Field(
        "",
        description="With vllm: the modules that adapters may rescale, separated by commas; "
        "name:input for the input side. Default: PEFT's defaults for the model's family, and what "
        "the stored and preloaded adapters rescale.",
        examples=["q_proj,v_proj,down_proj:input"],
    )
    vllm_options: JsonObject = Field(
        "{}",
        description="With vllm: further arguments of its engine, by its names, as JSON.",
        examples=['{"tensor_parallel_size": 2}'],
    )
    served_model_name: str | None = Field(
        None, description="The base model's name in requests.", examples=["base"]
    )
    adapters_dir: FolderOrBucket = Field(
        Path("data/adapters"),
        description="Where adapters are kept: a folder, or s3://, gs:// or az:// with a bucket.",
        examples=["/data/adapters"],
    )
    adapters_cache_dir: Path | None = Field(
        None,
        description="Where copies of a bucket's adapters are kept. Default: your cache folder.",
        examples=["/data/cache"],
    )
    shared_store: bool = Field(
        False,
        description="Share the adapters folder or bucket with other servers that set this too.",
        examples=[True],
    )
    replica_lease: float = Field(
        10.0,
        ge=1,
        le=20,
        description="With --shared-store: seconds that this server answers for adapters without "
        "reaching the store, and that changes wait for a server that died.",
        examples=[10.0],
    )
    keep_revisions: int = Field(
        10, ge=1, le=10_000, description="Revisions that are kept of each adapter.", examples=[10]
    )
    keep_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="Days that a revision is kept after a newer one has replaced it. Default: as "
        "long as --keep-revisions allows.",
        examples=[90],
    )
    merges_dir: Path | None = Field(
        None,
        description="Where merged models are kept. Default: `merges` in the adapters folder.",
        examples=["/data/merges"],
    )
    usage_dir: Path | None = Field(
        None,
        description="Where the usage of keys is kept. Default: `usage` in the adapters folder.",
        examples=["/data/usage"],
    )
    preload_adapters: Path | None = Field(
        None,
        description="A folder of adapter folders; those that fit the model are added at start.",
        examples=["examples/adapters"],
    )
    host: Address = Field("127.0.0.1", description="Address to listen on.", examples=["0.0.0.0"])
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.", examples=[8000])
    admin_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="A port of its own for adapters, merges, usage, /metrics and /debug, which "
        "--port does not have then. Health and documentation are on both.",
        examples=[8001],
    )
    uds: Path | None = Field(
        None,
        description="A unix socket to listen on, in place of --host and --port.",
        examples=["/run/infuse/infuse.sock"],
    )
    root_path: PathPrefix = Field(
        "",
        description="The path under which a proxy has the server, whether or not it removes it.",
        examples=["/infuse"],
    )
    cors_origins: Origins = Field(
        "",
        description="The origins whose pages a browser lets call the server, separated by commas; "
        "*: all. Default: none but the server's own.",
        examples=["https://app.example.com,http://localhost:5173"],
    )
    ssl_certfile: Path | None = Field(
        None,
        description="Speak TLS with this certificate and those between it and its root, in PEM.",
        examples=["/etc/infuse/tls.crt"],
    )
    ssl_keyfile: Path | None = Field(
        None,
        description="The private key of --ssl-certfile, in PEM. Default: in the same file.",
        examples=["/etc/infuse/tls.key"],
    )
    ssl_keyfile_password: str | None = Field(
        None, description="The password of --ssl-keyfile.", examples=["secret"]
    )
    ssl_ca_certs: Path | None = Field(
        None,
        description="Take only clients with a certificate that one of these authorities, in PEM, "
        "has signed.",
        examples=["/etc/infuse/clients.crt"],
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto: the GPU if there is one.", examples=["cpu"]
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="The base model's number format; auto: the checkpoint's on a GPU; on a CPU "
        "float32, or a checkpoint's bfloat16 where this processor is faster in it.",
        examples=["bfloat16"],
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Round the base model's weights to 8 or 4 bits at start; a checkpoint that is "
        "quantised already needs none.",
        examples=["int8"],
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Longest prompt and answer together, in tokens. Default: the model's window.",
        examples=[4096],
    )
    max_batch_rows: int = Field(
        32, ge=1, le=4096, description="Requests in one batch.", examples=[32]
    )
    max_resident_adapters: int = Field(
        256, ge=1, le=1_000_000, description="Adapters on the device at once.", examples=[256]
    )
    max_host_adapter_bytes: int = Field(
        512 * MEBIBYTE,
        ge=0,
        description="Host memory for adapters that were evicted from the device, so that they are "
        "not read from the storage again.",
        examples=[536870912],
    )
    max_saved_module_bytes: int = Field(
        512 * MEBIBYTE,
        ge=0,
        description="Device memory for the whole modules (modules_to_save) that adapters bring.",
        examples=[536870912],
    )
    kv_cache_tokens: int | None = Field(
        None,
        ge=1,
        description="Size of the KV cache, in tokens. Default: what memory allows.",
        examples=[65536],
    )
    prefill_chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Prompt tokens in one step. Default: 512 on the CPU, 2048 on a GPU.",
        examples=[512],
    )
    prefix_cache: bool = Field(
        True,
        description="Keep the keys and values of prompts and answers, for requests that begin with "
        "the same tokens.",
        examples=[True],
    )
    keys_share_caches: bool = Field(
        False,
        description="Share the prefix cache and the compiled grammars among all keys. A key can "
        "then tell, by the time that an answer takes, what other keys have sent.",
        examples=[False],
    )
    max_queue: int = Field(
        256, ge=1, description="Queue capacity in requests; more are answered 429.", examples=[256]
    )
    max_queue_seconds: float = Field(
        300.0,
        gt=0,
        description="Longest wait in the queue: a request that would wait longer, by the server's "
        "estimate, is answered 429 at once, and one that has waited so long 503.",
        examples=[60.0],
    )
    max_request_seconds: float = Field(
        3600.0,
        gt=0,
        description="Longest time of a generation request, from its arrival to the end of its "
        "answer; then it ends with 504. A client asks for less with X-Request-Timeout.",
        examples=[600.0],
    )
    max_upload_bytes: int = Field(
        512 * MEBIBYTE, ge=1, description="Largest upload, also unpacked.", examples=[536870912]
    )
    max_uploads_bytes: int | None = Field(
        None,
        ge=1,
        description="What all uploads in progress may take together, packed and unpacked; more are "
        "answered 503. Those of one key leave room for one more. Default: four times "
        "--max-upload-bytes.",
        examples=[2147483648],
    )
    max_body_bytes: int = Field(
        4 * MEBIBYTE, ge=1, description="Largest JSON request.", examples=[4194304]
    )
    max_connections: int = Field(
        1000,
        ge=1,
        description="Open connections. At the limit, a new one replaces the one that has been idle "
        "longest. A key may have half as many requests at once.",
        examples=[1000],
    )
    receive_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds in which a request's headers must arrive, and then its body; a body "
        "has one second more for each 16 KiB. What is still sent of a refused request has as long.",
        examples=[30.0],
    )
    send_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds that a client may leave its answer unread before it is cancelled.",
        examples=[60.0],
    )
    source_prefixes: SourcePrefixes = Field(
        "",
        description="What the URLs of adapters to fetch may begin with, separated by commas: "
        "hf://, s3://, gs://, az:// or file://. Default: nothing is fetched.",
        examples=["hf://my-org/,s3://my-bucket/adapters/"],
    )
    trusted_signers: Path | None = Field(
        None,
        description="Take only adapters that one of these has signed: a PEM file, or a folder of "
        "them, with public keys or with certificates of authorities. Default: take unsigned ones.",
        examples=["/etc/infuse/signers"],
    )
    source_timeout: float = Field(
        60.0, gt=0, le=3600, description="Seconds that a fetch may take.", examples=[60.0]
    )
    keys_file: Path | None = Field(
        None,
        description="The keys that open the server: a file that `infuse keys create` writes. The "
        "server follows its changes.",
        examples=["keys.json"],
    )
    oidc_issuer: IssuerUrl | None = Field(
        None,
        description="Take tokens (JWT) of this OIDC issuer beside keys; entries of the keys file "
        "say by `claims` what each may do.",
        examples=["https://login.example.com/realms/acme"],
    )
    oidc_audience: str | None = Field(
        None,
        pattern=f"^{QUOTABLE}$",
        description="With --oidc-issuer: the audience (`aud`) that tokens must be for.",
        examples=["infuse"],
    )
    open_docs: bool = Field(
        True, description="Answer /docs and /openapi.json without a key.", examples=[False]
    )
    allow_anonymous: bool = Field(
        False,
        description="Listen beyond this machine without keys; something else guards the server.",
        examples=[False],
    )
    drain_timeout: float = Field(
        30.0,
        ge=0,
        description="Seconds that running requests have to finish at shutdown.",
        examples=[30.0],
    )
    hang_timeout: float = Field(
        300.0,
        ge=1,
        description="Seconds that a step of the model may take without being taken for a hang, "
        "which ends the server with status 1; or ten times what it should take by those before, "
        "where that is more.",
        examples=[300.0],
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="How much to log.", examples=["info"]
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="How each line of the log is written.", examples=["json"]
    )
    pack_linears: bool = Field(True, description="Pack linear layers on the CPU.", examples=[True])
    speculation: bool = Field(
        False,
        description="Draft tokens from the earlier text and verify several in one step, where that "
        "is faster; a request can turn this on or off.",
        examples=[True],
    )

    compile: bool = Field(
        False,
        description="Compile the step: on the CPU, kernels for linears and attention and the code "
        "between them. Needs a C++ compiler; `infuse warm` compiles ahead of the start.",
        examples=[False],
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, ConfigFile(settings_cls)

    @property
    def form_bytes(self) -> int:
        """Bytes that an upload may take as a form, which has some beside those of its files."""
        return self.max_upload_bytes + MEBIBYTE

    @property
    def uploads_bytes(self) -> int:
        """Bytes that all uploads in progress may take together."""
        return self.max_uploads_bytes or 4 * self.form_bytes

    @property
    def tenants_uploads_bytes(self) -> int:
        """Bytes that the uploads of one key may take together: where there is room for more than
        one upload, one more finds room beside them."""
        return max(self._one_upload, self.uploads_bytes - self._one_upload)

    @property
    def _one_upload(self) -> int:
        """Bytes that an upload takes, packed and unpacked. A form takes some room around them."""
        return 2 * self.max_upload_bytes + MEBIBYTE

    @model_validator(mode="after")
    def _holds_one_upload(self) -> Self:
        needed = self._one_upload
        if self.uploads_bytes < needed:
            raise ValueError(
                f"--max-uploads-bytes {self.uploads_bytes} is less than one upload of "
                f"--max-upload-bytes takes, packed and unpacked: set {needed} or more"
            )
        return self

    @model_validator(mode="after")
    def _has_two_ports(self) -> Self:
        if self.admin_port == self.port:
            raise ValueError(f"--admin-port and --port are both {self.port}: set another one")
        return self

    @model_validator(mode="after")
    def _can_speak_tls(self) -> Self:
        """Checked here: the server would find out after it has loaded the model."""
        if self.ssl_certfile is None:
            if self.ssl_keyfile or self.ssl_keyfile_password or self.ssl_ca_certs:
                raise ValueError("TLS needs a certificate: set --ssl-certfile")
            return self
        check_certificate(
            self.ssl_certfile, self.ssl_keyfile, self.ssl_keyfile_password, self.ssl_ca_certs
        )
        return self

    @model_validator(mode="after")
    def _knows_whose_tokens_it_takes(self) -> Self:
        if (self.oidc_issuer is None) is not (self.oidc_audience is None):
            raise ValueError("--oidc-issuer and --oidc-audience go together: set both, or neither")
        if self.oidc_issuer is not None and self.keys_file is None:
            raise ValueError(
                "--oidc-issuer needs --keys-file, whose entries say what tokens may do: "
                "`infuse keys create NAME --claim CLAIM=PATTERN` writes one"
            )
        return self

    @model_validator(mode="after")
    def _is_guarded(self) -> Self:
        if self.keys_file is not None and not self.keys_file.is_file():
            raise ValueError(f"there is no keys file at {self.keys_file}")
        loopback = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        is_local = loopback or (self.uds is not None and self.admin_port is None)
        if not is_local and self.keys_file is None and not self.allow_anonymous:
            raise ValueError(
                f"without keys the server listens on loopback only, not on {self.host}: set "
                "--keys-file, or --allow-anonymous if something else guards it"
            )
        return self
