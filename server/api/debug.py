"""`GET /debug/batch`: what runs and what waits now, for who operates the server."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from adapters.residency import SlotUse
from server.engine.request import InFlight
from server.services import Services, get_services

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
    running: list[RequestNow] = Field(
        description="The longest in flight first; on vLLM, what vLLM has.", examples=[[]]
    )
    waiting: list[RequestNow] = Field(description="The longest in flight first.", examples=[[]])
    kv_tokens_used: int = Field(description="Tokens that running ones reserve.", examples=[512])
    kv_tokens_limit: int = Field(description="The size of the KV cache.", examples=[65536])
    slots_limit: int = Field(description="Adapters that the device holds.", examples=[256])
    slots: list[SlotNow] = Field(description="The next to be evicted first.", examples=[[]])


@router.get("/debug/batch", summary="Show what runs and waits now")
async def show_batch(services: Annotated[Services, Depends(get_services)]) -> Batch:
    """The requests in flight with where their time goes, and the bank's slots."""
    now = time.perf_counter()
    stats = services.engine.stats()
    in_flight = sorted(services.engine.in_flight(), key=lambda each: each.request.submitted)
    return Batch(
        batch_rows=stats.most_running,
        running=[RequestNow.of(each, now) for each in in_flight if each.is_running],
        waiting=[RequestNow.of(each, now) for each in in_flight if not each.is_running],
        kv_tokens_used=stats.kv_tokens_used,
        kv_tokens_limit=stats.kv_tokens_total,
        slots_limit=services.registry.residency.capacity,
        slots=[SlotNow.of(each) for each in services.registry.residency.slots()],
    )
