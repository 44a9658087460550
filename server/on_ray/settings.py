"""The settings of `infuse deploy`: those of a server, and those of many."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from infuse.server.settings import Settings


class DeploySettings(Settings):
    """Serve with several replicas on Ray, each a server with the same settings on one store.

    Each flag is also an environment variable: --max-replicas is INFUSE_MAX_REPLICAS.

    Example: infuse deploy --adapters-dir s3://my-bucket/adapters --shared-store --replicas 3
    """

    model_config = SettingsConfigDict(cli_prog_name="infuse deploy")

    replicas: int = Field(
        1, ge=1, le=1000, description="Replicas to start with, and the fewest.", examples=[3]
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="The most replicas; more than --replicas are started by --queued-tokens. "
        "Default: as many as --replicas.",
        examples=[8],
    )
    queued_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens in the queue per replica, on average, from which on replicas are "
        "added.",
        examples=[4096],
    )
    replica_cpus: float | None = Field(
        None,
        gt=0,
        description="Cores of a replica. Default: an even share of the cluster's.",
        examples=[4],
    )
    replica_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of a replica. Default: 1 where the cluster has any.",
        examples=[1],
    )

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas

    @model_validator(mode="after")
    def _shares_its_store(self) -> Self:
        if not self.shared_store:
            raise ValueError(
                f"replicas share the adapters in {self.adapters_dir}: set --shared-store"
            )
        return self

    @model_validator(mode="after")
    def _has_one_port(self) -> Self:
        if self.admin_port is not None:
            raise ValueError("--admin-port is for infuse serve: Ray's proxy listens on one port")
        for name in ("uds", "ssl_certfile"):
            if getattr(self, name) is not None:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for infuse serve: put a proxy with it before Ray's")
        return self

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.most_replicas < self.replicas:
            raise ValueError(
                f"--max-replicas {self.max_replicas} is less than --replicas {self.replicas}"
            )
        return self

    def absolute(self) -> Self:
        """The same settings for a process in another folder of this machine."""
        paths: dict[str, Path | str] = {
            name: value.absolute()
            for name, value in self
            if isinstance(value, Path) and not value.is_absolute()
        }
        if self.model is not None and Path(self.model).is_dir():
            paths |= {"model": str(Path(self.model).absolute())}
        return self.model_copy(update=paths)
