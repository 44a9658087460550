"""`GET /debug/…`: what runs and what waits now, and what was slow, for who operates the server."""

import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from infuse.adapters.residency import SlotUse
from infuse.server.engine.request import InFlight, WaitsFor
from infuse.server.observability.access import EndedRequest
from infuse.server.preparations import Awaits, Preparation
from infuse.server.services import ServicesDep

router = APIRouter(tags=["operations"])


class RequestNow(BaseModel):
    """A request that has not ended, and where its time goes."""

    id: str = Field(description="One choice of an answer.", examples=["chatcmpl-0123-0"])
    request_id: str = Field(description="The HTTP request's `X-Request-Id`.", examples=["4bf92f35"])
    key: str = Field(description="The key's name; empty without keys.", examples=["app"])
    adapter: str = Field(
        description="With its revision, or how several are mixed; empty for the base.",
        examples=["sentiment@1"],
    )
    prompt_tokens: int = Field(description="Tokens of the prompt.", examples=[12])
    completion_tokens: int = Field(description="Tokens of the answer so far.", examples=[3])
    queue_seconds: float = Field(description="Until it first ran, or so far.", examples=[0.2])
    prefill_seconds: float = Field(
        description="From there to its first token, or so far.", examples=[0.1]
    )
    decode_seconds: float = Field(description="Since its first token.", examples=[0.4])
    preempted: bool = Field(description="It waits to be computed again.", examples=[False])
    waits_for: WaitsFor | None = Field(
        description="Null while it runs. `turn`: others are before it; `row`: the batch is full; "
        "`slot`: no slot is free for its adapter; `blocks`: the KV cache has no room for its "
        "prompt; `prefix`: a running request computes how its prompt begins.",
        examples=["slot"],
    )

    @classmethod
    def of(cls, each: InFlight, now: float) -> "RequestNow":
        started = now if each.started is None else each.started
        first_token = now if each.first_token is None else each.first_token
        return cls(
            id=each.request.id,
            request_id=each.request.http_id,
            key=each.request.tenant,
            adapter=each.request.adapter,
            prompt_tokens=len(each.request.prompt),
            completion_tokens=each.answer_tokens,
            queue_seconds=round(started - each.request.submitted, 4),
            prefill_seconds=round(first_token - started, 4),
            decode_seconds=round(now - first_token, 4),
            preempted=each.started is not None and not each.is_running,
            waits_for=None if each.is_running else each.waits_for,
        )


class PreparedNow(BaseModel):
    """A request that the engine does not have yet."""

    request_id: str = Field(description="The HTTP request's `X-Request-Id`.", examples=["4bf92f35"])
    key: str = Field(description="The key's name; empty without keys.", examples=["app"])
    waits_for: Awaits | None = Field(
        description="Null: its prompt is made now. `turn`: others are prepared; `grammar`: its "
        "grammar is compiled; `files`: its adapter's own tokenizer or template is read or run.",
        examples=["grammar"],
    )
    seconds: float = Field(description="So far.", examples=[0.1])

    @classmethod
    def of(cls, each: Preparation, now: float) -> "PreparedNow":
        return cls(
            request_id=each.request_id,
            key=each.tenant,
            waits_for=each.awaits,
            seconds=round(now - each.began, 4),
        )


class SlotNow(BaseModel):
    """A slot of the bank that holds an adapter."""

    slot: int = Field(description="Its number; 0 is the base.", examples=[1])
    adapter: str = Field(
        description="What was last leased of it: equal adapters share a slot. Empty: it was "
        "pinned, and not asked for yet.",
        examples=["sentiment@1"],
    )
    running: int = Field(description="Running sequences that use it.", examples=[2])
    leases: int = Field(description="Requests that use it or wait for it.", examples=[3])
    pinned: bool = Field(description="An operator keeps it on the device.", examples=[False])

    @classmethod
    def of(cls, use: SlotUse) -> "SlotNow":
        return cls(
            slot=use.slot, adapter=use.label, running=use.pins, leases=use.leases, pinned=use.kept
        )


class Batch(BaseModel):
    batch_rows: int = Field(description="How many sequences may run at once.", examples=[32])
    running: list[RequestNow] = Field(description="The longest in flight first.", examples=[[]])
    waiting: list[RequestNow] = Field(description="The longest in flight first.", examples=[[]])
    preparing: list[PreparedNow] = Field(
        description="Those that the engine does not have yet.", examples=[[]]
    )
    kv_tokens_used: int = Field(description="Tokens that running ones reserve.", examples=[512])
    kv_tokens_limit: int = Field(description="The size of the KV cache.", examples=[65536])
    slots_limit: int = Field(description="Adapters that the device holds.", examples=[256])
    slots: list[SlotNow] = Field(description="The next to be evicted first.", examples=[[]])


@router.get("/debug/batch", summary="Show what runs and waits now")
async def show_batch(services: ServicesDep) -> Batch:
    """The requests in flight with where their time goes, and the bank's slots."""
    now = time.perf_counter()
    stats = services.engine.stats()
    in_flight = sorted(services.engine.in_flight(), key=lambda each: each.request.submitted)
    return Batch(
        batch_rows=stats.most_running,
        running=[RequestNow.of(each, now) for each in in_flight if each.is_running],
        waiting=[RequestNow.of(each, now) for each in in_flight if not each.is_running],
        preparing=[PreparedNow.of(each, now) for each in services.preparations],
        kv_tokens_used=stats.kv_tokens_used,
        kv_tokens_limit=stats.kv_tokens_total,
        slots_limit=services.registry.residency.capacity,
        slots=[SlotNow.of(each) for each in services.registry.residency.slots()],
    )


class SlowAnswer(BaseModel):
    """An answer that has ended, and where its time went: the parts add up to `seconds`."""

    id: str = Field(description="Names the answer.", examples=["chatcmpl-0123"])
    request_id: str = Field(description="The HTTP request's `X-Request-Id`.", examples=["4bf92f35"])
    ended: datetime = Field(description="In UTC.", examples=["2026-11-24T06:15:00Z"])
    route: str = Field(description="What was asked.", examples=["/v1/chat/completions"])
    status: int = Field(description="The answer's.", examples=[200])
    key: str = Field(description="The key's name; empty without keys.", examples=["app"])
    adapter: str = Field(
        description="With its revision, or how several are mixed; empty for the base.",
        examples=["sentiment@1"],
    )
    finish: list[str] = Field(description="Why its choices ended.", examples=[["length"]])
    choices: int = Field(description="How many it had.", examples=[1])
    prompt_tokens: int = Field(description="Tokens of the prompt.", examples=[12])
    cached_tokens: int = Field(description="Those of them that were cached.", examples=[0])
    completion_tokens: int = Field(description="Tokens of the answer.", examples=[300])
    seconds: float = Field(
        description="From the request's head to the end of its answer.", examples=[4.2]
    )
    prepare_seconds: float = Field(description="Until the engine had it.", examples=[0.1])
    queue_seconds: float = Field(
        description="From there until the choice that ended last ran, or until it lacked a slot. "
        "With no first output: until its end.",
        examples=[2.0],
    )
    slot_seconds: float = Field(
        description="For which it was its turn, and no slot was free for its adapter.",
        examples=[0.0],
    )
    prefill_seconds: float = Field(description="From there to its first token.", examples=[0.1])
    decode_seconds: float = Field(description="From there to its end.", examples=[1.9])
    sending_seconds: float = Field(
        description="From there until the client had the rest of it.", examples=[0.1]
    )

    @classmethod
    def of(cls, request: EndedRequest, now: float) -> "SlowAnswer":
        answered = request.answered
        assert answered is not None, "the others are not kept"
        parts = dict.fromkeys(("queue", "slot", "prefill", "decode"), 0.0)
        for stage in answered.choices[-1].stages(answered.submitted) if answered.choices else ():
            parts[stage.name] = stage.end - stage.begin
        parts["prepare"] = answered.submitted - request.started
        parts["sending"] = request.ended - answered.ended
        return cls(
            id=answered.id,
            request_id=request.id,
            ended=datetime.now(UTC) - timedelta(seconds=now - request.ended),
            route=request.route,
            status=request.status,
            key=request.key or "",
            adapter=answered.adapter or "",
            finish=answered.finish_reasons,
            choices=len(answered.choices),
            prompt_tokens=answered.prompt_tokens,
            cached_tokens=answered.cached_tokens,
            completion_tokens=answered.completion_tokens,
            seconds=round(request.ended - request.started, 4),
            **{f"{name}_seconds": round(seconds, 4) for name, seconds in parts.items()},
        )


class Slowest(BaseModel):
    of: int = Field(description="How many of the latest answers were compared.", examples=[1000])
    data: list[SlowAnswer] = Field(description="The slowest first.", examples=[[]])


@router.get("/debug/slowest", summary="Show the slowest of the latest answers")
async def show_slowest(
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many.", examples=[20])] = 20,
) -> Slowest:
    """The slowest of the latest 1000 answers, with where their time went."""
    now = time.perf_counter()
    slowest = services.latest.slowest(limit)
    return Slowest(of=len(services.latest), data=[SlowAnswer.of(each, now) for each in slowest])
