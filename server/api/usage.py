"""`GET /v1/usage`: what keys have used of adapters, for billing."""

import csv
import io
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Response
from pydantic import AfterValidator, BaseModel, Field

from infuse.server.auth import CallerDep
from infuse.server.errors import ApiError
from infuse.server.observability import metering
from infuse.server.observability.metering import HOUR, BadUsageFile, Row
from infuse.server.openapi import errors
from infuse.server.services import Services, ServicesDep

router = APIRouter(tags=["operations"])

MOST_ROWS = 10_000
"""More would take Python's lock from the others for too long."""
_YEARS = range(2000, 2101)
_PERIODS = {
    "hour": "%Y-%m-%dT%H:00:00Z",
    "day": "%Y-%m-%dT00:00:00Z",
    "month": "%Y-%m-01T00:00:00Z",
}


def _in_utc(time: datetime) -> datetime:
    if time.year not in _YEARS:
        raise ValueError(f"is in no year from {_YEARS[0]} to {_YEARS[-1]}")
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


Time = Annotated[datetime, AfterValidator(_in_utc)]


class UsageRow(BaseModel):
    """What a key has used of an adapter within a period."""

    start: datetime = Field(
        description="When the period begins.", examples=["2026-11-01T00:00:00Z"]
    )
    machine: str = Field(description="Whose servers answered.", examples=["infuse-0"])
    key: str = Field(description="The key's name; empty without keys.", examples=["app"])
    adapter: str = Field(
        description="Its name; the base model's, or `mixture`.", examples=["sentiment"]
    )
    requests: int = Field(description="Answered requests.", examples=[120])
    prompt_tokens: int = Field(description="As in the answers' usage.", examples=[4800])
    cached_tokens: int = Field(description="Those of them that were cached.", examples=[1600])
    completion_tokens: int = Field(description="Tokens of answers.", examples=[9600])
    seconds: float = Field(
        description="For which choices ran, each for itself, without the queue.", examples=[84.2]
    )

    @classmethod
    def of(cls, machine: str, row: Row) -> "UsageRow":
        used = row.amount
        return cls(
            start=datetime.fromisoformat(row.start),
            machine=machine,
            key=row.key,
            adapter=row.adapter,
            requests=used.requests,
            prompt_tokens=used.prompt_tokens,
            cached_tokens=used.cached_tokens,
            completion_tokens=used.completion_tokens,
            seconds=used.microseconds / 1e6,
        )


class UsageReport(BaseModel):
    start: datetime = Field(
        description="The whole hour from which on requests count.",
        examples=["2026-11-01T00:00:00Z"],
    )
    end: datetime = Field(
        description="The whole hour up to which they count.", examples=["2026-12-01T00:00:00Z"]
    )
    machines: list[str] = Field(
        description="Whose servers' requests count: each machine knows its own.",
        examples=[["infuse-0"]],
    )
    data: list[UsageRow] = Field(
        description="In order of machine, time, key and adapter.", examples=[[]]
    )


@router.get(
    "/v1/usage",
    response_model=UsageReport,
    summary="Usage by period, key and adapter",
    responses=errors(500)
    | {200: {"content": {"text/csv": {}}, "description": "The rows; as CSV, they alone."}},
)
async def usage(
    services: ServicesDep,
    caller: CallerDep,
    start: Annotated[
        Time | None,
        Query(
            description="The first time, in UTC. Default: the beginning of this month.",
            examples=["2026-11-01T00:00:00Z"],
        ),
    ] = None,
    end: Annotated[
        Time | None,
        Query(description="The time after the last. Default: now.", examples=["2026-12-01"]),
    ] = None,
    period: Annotated[
        Literal["hour", "day", "month"],
        Query(description="What a row sums up, in UTC.", examples=["day"]),
    ] = "day",
    key: Annotated[
        str | None, Query(description="The name of one key alone.", examples=["app"])
    ] = None,
    adapter: Annotated[
        str | None, Query(description="The name of one adapter alone.", examples=["sentiment"])
    ] = None,
    format: Annotated[
        Literal["json", "csv"], Query(description="What is answered.", examples=["csv"])
    ] = "json",
) -> Response:
    """What keys have used of adapters. A key with a scope sees its own usage alone."""
    now = datetime.now(UTC)
    start = start or now.replace(day=1, hour=0, minute=0, second=0)
    end = end or now
    query = metering.Query(
        first_hour=int(start.timestamp() // HOUR),
        end_hour=-int(-end.timestamp() // HOUR),
        period=_PERIODS[period],
        key=caller.name if caller.scope.is_tenants else key,
        adapter=adapter,
        limit=MOST_ROWS + 1,
    )
    if query.first_hour >= query.end_hour:
        raise ApiError(400, "`start` is not before `end`.", code="invalid_request", param="start")
    found = await rows_of_all(services, query)
    return await to_thread.run_sync(_answer, query, found, key, format)


async def rows_of_all(services: Services, query: metering.Query) -> Mapping[str, Sequence[Row]]:
    """Machine -> its rows. Raises ApiError 500."""
    try:
        if services.ask_meters is not None:
            return await services.ask_meters(query)
        rows = await to_thread.run_sync(services.meter.rows, query, limiter=services.reading_usage)
    except BadUsageFile as error:
        problem = f"The usage cannot be read: {error}"
        raise ApiError(500, problem, code="usage_unreadable") from None
    return {socket.gethostname(): rows}


def _answer(
    query: metering.Query, found: Mapping[str, Sequence[Row]], key: str | None, form: str
) -> Response:
    """Raises ApiError 400."""
    if sum(map(len, found.values())) > MOST_ROWS:
        problem = f"There are more than {MOST_ROWS} rows: ask for a shorter time or longer periods."
        raise ApiError(400, problem, code="too_many_rows", param="period")
    rows = [
        UsageRow.of(machine, row)
        for machine in sorted(found)
        for row in found[machine]
        if key in (None, row.key)
    ]
    if form == "csv":
        return Response(_csv(rows), media_type="text/csv")
    report = UsageReport(
        start=datetime.fromtimestamp(query.first_hour * HOUR, UTC),
        end=datetime.fromtimestamp(query.end_hour * HOUR, UTC),
        machines=sorted(found),
        data=rows,
    )
    return Response(report.model_dump_json(), media_type="application/json")


def _csv(rows: Iterable[UsageRow]) -> str:
    """A table of the rows, with the fields' names above."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(UsageRow.model_fields))
    table.writeheader()
    table.writerows(row.model_dump(mode="json") for row in rows)
    return text.getvalue()
