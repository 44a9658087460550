"""The bodies and answers of the routes that show adapters' vectors."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.derive.summary import VectorSummary, summarize
from infuse.server.api.adapter_schemas import MAX_COMBINED, AdminBody, RecipeBody
from infuse.server.api.model_schemas import AdapterWeight

MAX_COLUMNS = 1024
COLUMNS = "How many means over neighbouring features to show of each vector; 0: none."


class CombinedVectorsBody(RecipeBody):
    """A combination whose vectors are shown. Nothing is stored."""

    columns: int = Field(0, ge=0, le=MAX_COLUMNS, description=COLUMNS, examples=[64])


class SimilarityBody(AdminBody):
    adapters: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        min_length=1,
        max_length=MAX_COMBINED,
        description="Adapters, each by its name or `name@revision`.",
        examples=[["support-de", "support-fr@2"]],
    )


class ModuleVector(BaseModel):
    """One vector in numbers. Its values multiply features: above 1 they amplify, below 1 they
    inhibit, and 1 leaves the base as it is."""

    module: str = Field(
        description="The module of the base.", examples=["model.layers.0.self_attn.k_proj"]
    )
    layer: int | None = Field(description="Its layer, where it is in one.", examples=[0])
    kind: str = Field(
        description="The module with a star for its layer.",
        examples=["model.layers.*.self_attn.k_proj"],
    )
    side: Literal["input", "output"] = Field(
        description="Which side of the module is multiplied.", examples=["output"]
    )
    size: int = Field(description="How many values it has.", examples=[192])
    min: float = Field(description="The smallest value.", examples=[0.61])
    max: float = Field(description="The largest value.", examples=[1.48])
    mean: float = Field(description="Their mean.", examples=[0.99])
    norm: float = Field(
        description="The length of what it changes: of the vector minus 1.", examples=[2.4]
    )
    amplified: float = Field(description="The share of values above 1.", examples=[0.45])
    inhibited: float = Field(description="The share of values below 1.", examples=[0.55])
    histogram: list[int] = Field(
        description="How many values lie between each two of `bounds`.", examples=[[96, 96]]
    )
    columns: list[float] = Field(
        description="Means over neighbouring features of the vector minus 1, in the features' "
        "order; as many as were asked for, or as there are features.",
        examples=[[-0.12, 0.3]],
    )

    @classmethod
    def of(cls, each: VectorSummary) -> Self:
        return cls(
            module=each.target.module,
            layer=each.layer,
            kind=each.kind,
            side=each.target.side.value,
            size=each.size,
            min=each.min,
            max=each.max,
            mean=each.mean,
            norm=each.norm,
            amplified=each.amplified,
            inhibited=each.inhibited,
            histogram=list(each.histogram),
            columns=list(each.columns),
        )


class Vectors(BaseModel):
    """What an adapter, or a combination, does to the base."""

    object: Literal["adapter.vectors"] = Field(
        "adapter.vectors", description="Kind.", examples=["adapter.vectors"]
    )
    adapters: list[AdapterWeight] = Field(
        description="What is shown: one adapter with weight 1, or what is combined.",
        examples=[[{"name": "support-de@3", "weight": 1.0}]],
    )
    bounds: list[float] = Field(
        description="The bounds of all histograms, one more than each has counts.",
        examples=[[0.5, 1.0, 1.5]],
    )
    modules: list[ModuleVector] = Field(description="In order of layers.", examples=[[]])
    whole_modules: list[str] = Field(
        description="Modules that the adapter replaces (`modules_to_save`).", examples=[[]]
    )

    @classmethod
    def of(cls, vectors: AdapterVectors, adapters: list[AdapterWeight], columns: int) -> Self:
        summary = summarize(vectors, columns)
        return cls(
            adapters=adapters,
            bounds=list(summary.bounds),
            modules=[ModuleVector.of(each) for each in summary.vectors],
            whole_modules=sorted(vectors.saved),
        )


class Similarity(BaseModel):
    """How alike adapters are."""

    object: Literal["adapter.similarity"] = Field(
        "adapter.similarity", description="Kind.", examples=["adapter.similarity"]
    )
    adapters: list[str] = Field(
        description="With their revisions, as asked for.", examples=[["a@1", "b@2"]]
    )
    similarity: Sequence[Sequence[float | None]] = Field(
        description="The cosine between what each two change: 1 for the same direction, 0 for "
        "nothing in common, -1 for the opposite; null where one changes nothing.",
        examples=[[[1.0, 0.3], [0.3, 1.0]]],
    )
