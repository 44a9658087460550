"""The bodies and answers of the admin API."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infuse.adapters.derive.combine import SPARSE, Method, Recipe
from infuse.adapters.storage.names import NAME_PATTERN
from infuse.adapters.storage.revision import Details, Revision
from infuse.server.api.model_schemas import AdapterWeight
from infuse.server.caller import Caller
from infuse.server.services import Services

MAX_COMBINED = 64
MAX_TAGS = 64
MAX_TAG_LENGTH = 128
MAX_DESCRIPTION = 4096
MAX_SOURCE = 2048


class AdminBody(BaseModel):
    """Refuses unknown fields, so that no typo passes for a change, and texts that are not valid
    Unicode, which no answer could repeat."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _texts_are_whole(cls, values: Any) -> Any:
        try:
            json.dumps(values, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise ValueError(
                f"a text has half of a surrogate pair, {half!r}; write whole characters"
            ) from None
        except RecursionError:
            # No valid body is so deep; it is refused for that next.
            return values
        return values


class AdapterRevision(BaseModel):
    """One content of a name."""

    object: Literal["adapter.revision"] = Field(
        "adapter.revision", description="Kind.", examples=["adapter.revision"]
    )
    revision: int = Field(description="Counts the contents of this name.", examples=[3])
    digest: str = Field(description="SHA-256 of its files.", examples=["9f86d081884c7d65..."])
    size: int = Field(description="Bytes of its files.", examples=[230912])
    created: datetime = Field(
        description="When this revision was made.", examples=["2026-11-23T20:00:00Z"]
    )
    source: str = Field(description="Where it came from.", examples=["upload"])
    by: str | None = Field(
        description="The key that made it; null where that is another tenant's.", examples=["ops"]
    )
    signer: str | None = Field(
        description="Who has signed it, as `--trusted-signers` names them; null where the server "
        "did not ask for a signature.",
        examples=["release"],
    )
    recipe: dict[str, Any] | None = Field(
        description="How it was combined out of others; null where the key may not see them all.",
        examples=[{"method": "ties", "adapters": [{"name": "a@1", "weight": 1.0}]}],
    )
    damaged: bool = Field(
        description="Whether its stored files were found to be damaged: it is not served then, "
        "until they are uploaded again.",
        examples=[False],
    )


class Adapter(AdapterRevision):
    """A name with its current revision."""

    object: Literal["adapter"] = Field("adapter", description="Kind.", examples=["adapter"])  # type: ignore[assignment]
    name: str = Field(description="What requests name as their model.", examples=["support-de"])
    parent: str = Field(description="The base model.", examples=["smollm2-135m-instruct"])
    description: str = Field(description="Free text.", examples=["German support"])
    tags: list[str] = Field(description="Free words.", examples=[["support", "de"]])
    pinned: bool = Field(description="Whether it is kept on the device.", examples=[False])
    enabled: bool = Field(description="Whether requests may name it.", examples=[True])
    warnings: list[str] = Field(
        default=[], description="Not wrong, but worth a look; only after a change.", examples=[[]]
    )
    unchanged: bool = Field(
        default=False,
        description="After PUT or rollback: the content was the same already.",
        examples=[False],
    )


class AdapterList(BaseModel):
    object: Literal["list"] = Field("list", description="Kind.", examples=["list"])
    data: list[Adapter] = Field(description="In order of names.", examples=[[]])
    next: str | None = Field(
        description="Give this as `after` for the next page.", examples=["support-de"]
    )


class RevisionList(BaseModel):
    object: Literal["list"] = Field("list", description="Kind.", examples=["list"])
    data: list[AdapterRevision] = Field(description="Newest first.", examples=[[]])


class CheckedUpload(BaseModel):
    """A dry run found no fault."""

    object: Literal["adapter.check"] = Field(
        "adapter.check", description="Kind.", examples=["adapter.check"]
    )
    targets: int = Field(description="How many modules it rescales.", examples=[90])
    nbytes: int = Field(description="Bytes of its vectors in memory.", examples=[230400])
    warnings: list[str] = Field(description="Not wrong, but worth a look.", examples=[[]])


class DetailsBody(AdminBody):
    """Only what is given changes."""

    description: str | None = Field(
        None, max_length=MAX_DESCRIPTION, description="Free text.", examples=["German support"]
    )
    tags: list[str] | None = Field(
        None, max_length=MAX_TAGS, description="Free words.", examples=[["support", "de"]]
    )
    pinned: bool | None = Field(
        None, description="Keep it on the device, used or not.", examples=[True]
    )
    enabled: bool | None = Field(
        None, description="Whether requests may name it; 403 if not.", examples=[False]
    )

    @model_validator(mode="after")
    def _tags_are_short(self) -> Self:
        if any(len(tag) > MAX_TAG_LENGTH for tag in self.tags or []):
            raise ValueError(f"a tag is longer than {MAX_TAG_LENGTH} characters")
        return self


class SourceBody(AdminBody):
    source: str = Field(
        max_length=MAX_SOURCE,
        description="Where to fetch the adapter: hf://org/name@revision/folder, "
        "s3://bucket/folder, gs://bucket/folder, az://container/folder or file:///folder.",
        examples=["hf://my-org/support-de@main"],
    )


class NamedSourceBody(SourceBody):
    name: str | None = Field(
        None,
        description="The new adapter's name; a dry run needs none.",
        examples=["support-de"],
    )


class RollbackBody(AdminBody):
    revision: int = Field(ge=1, description="The revision to go back to.", examples=[2])


class RecipeBody(AdminBody):
    """How adapters are combined. With d = l - 1, what an adapter's vector l changes:
    `linear` is sum(w * l), `product` prod(1 + w * d), `task_arithmetic` 1 + sum(w * d); TIES and
    DARE drop some of the d first."""

    adapters: list[AdapterWeight] = Field(
        min_length=1,
        max_length=MAX_COMBINED,
        description="The adapters, with their weights.",
        examples=[[{"name": "support-de", "weight": 0.5}, {"name": "support-fr@2", "weight": 0.5}]],
    )
    method: Method = Field(description="How to combine them.", examples=["task_arithmetic"])
    missing: Literal["identity", "zero"] = Field(
        "identity",
        description="What `linear` takes for a module that an adapter does not target: `zero` is "
        "PEFT's choice.",
        examples=["identity"],
    )
    density: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The share of differences that TIES and DARE keep.",
        examples=[0.5],
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Which ones DARE drops.", examples=[0])

    @model_validator(mode="after")
    def _options_belong_to_the_method(self) -> Self:
        if self.missing == "zero" and self.method != "linear":
            raise ValueError("missing: zero is for the method linear")
        if self.density != 1 and self.method not in SPARSE:
            raise ValueError(f"density is for the methods {', '.join(SPARSE)}")
        return self

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            method=self.method,
            weights=tuple(part.weight for part in self.adapters),
            missing=self.missing,
            density=self.density,
            seed=self.seed,
        )


class CombineBody(RecipeBody):
    """A new adapter out of others."""

    name: str = Field(
        pattern=f"^{NAME_PATTERN}$", description="The new adapter's name.", examples=["support-all"]
    )


def revision_of(services: Services, caller: Caller, revision: Revision) -> AdapterRevision:
    return AdapterRevision(**_shown(services, caller, revision))


def adapter_of(
    services: Services,
    caller: Caller,
    revision: Revision,
    warnings: list[str] | None = None,
    unchanged: bool = False,
    details: Details | None = None,
) -> Adapter:
    """An adapter as the API shows it. `details`: its details, where they are not the current ones.

    The revision was read before the details, so that its ETag is never newer than they are. Raises
    UnknownAdapter where the adapter was deleted meanwhile.
    """
    if details is None:
        details = services.registry.stored.details(revision.name)
    return Adapter(
        **_shown(services, caller, revision),
        name=revision.name,
        parent=services.model_name,
        description=details.description,
        tags=list(details.tags),
        pinned=details.pinned,
        enabled=details.enabled,
        warnings=warnings or [],
        unchanged=unchanged,
    )


def _shown(services: Services, caller: Caller, revision: Revision) -> dict[str, Any]:
    by, recipe = revision.origin.by, revision.origin.recipe
    return {
        "revision": revision.number,
        "digest": revision.digest,
        "size": revision.size,
        "created": revision.created,
        "source": revision.origin.source,
        "by": by if caller.owns(by) else None,
        "signer": revision.origin.signer,
        "recipe": None if recipe is None or not _is_visible(recipe, caller) else dict(recipe),
        "damaged": services.registry.stored.is_damaged(revision),
    }


def _is_visible(recipe: Mapping[str, Any], caller: Caller) -> bool:
    return all(caller.sees(part["name"].partition("@")[0]) for part in recipe["adapters"])
