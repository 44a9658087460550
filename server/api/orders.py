"""Turns the prompts of one HTTP request into requests to the engine."""

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from infuse.adapters.residency import Lease
from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server import request_id
from infuse.server.api.deadlines import Deadline
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.schemas import INT64
from infuse.server.caller import Caller
from infuse.server.engine.request import GenerationRequest, SamplingParams
from infuse.server.services import Services


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of an order as token ids, and how its first choice is sampled."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    target: tuple[int, ...] = ()
    """For an encoder-decoder: the tokens that the answer begins with."""
    prediction: tuple[int, ...] = ()
    """What the answer is expected to be."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The requests to the engine that answer one HTTP request. They own their leases until they are
    submitted.

    `requests` are in the order of the prompts: choice i of prompt p is number `p * choices + i`.
    """

    id: str
    caller: Caller
    created: int
    """Unix time in seconds."""
    model: str
    adapter: str | None
    """`name@revision`, how several adapters are mixed, or None for the base model."""
    fingerprint: str
    vocabulary: Vocabulary
    deadline: Deadline
    choices: int
    """How many choices each prompt has."""
    requests: tuple[GenerationRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts; a prompt with several choices counts once."""
        return sum(len(request.prompt) for request in self.requests[:: self.choices])

    @property
    def head(self) -> dict[str, Any]:
        """The fields that an answer and each of its chunks begin with."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.adapter is None else {"Infuse-Adapter": self.adapter}


def place_order(
    services: Services,
    body: ModelBody,
    caller: Caller,
    prefix: str,
    prompts: Sequence[Prompt],
    lease: Lease | None,
    vocabulary: Vocabulary,
    deadline: Deadline,
    *,
    speculation: bool | None = None,
) -> Order:
    """Make an order on what is leased. Each of its requests has a lease of its own.

    A key's requests have one fair share of the model. The order's id begins with `prefix`. Raises
    ApiError 400 where the key's scope allows no prompt, or no answer, of this length.
    """
    prompts = [_within_scope(caller, body, prompt) for prompt in prompts]
    order_id = f"{prefix}{uuid.uuid4().hex}"
    choices = body.choices_per_prompt
    salt = json.dumps([services.cache_scope(caller.name), body.cache_salt])
    with ExitStack() as undo:
        requests = tuple(
            GenerationRequest(
                id=f"{order_id}-{number}",
                prompt=prompt.token_ids,
                target=prompt.target,
                params=params_of_choice(prompt.params, number % choices),
                lease=None if lease is None else undo.enter_context(lease.again()),
                adapter_name="" if body.model == services.model_name else body.model,
                tenant=caller.name or "",
                weight=caller.weight,
                guaranteed=caller.guaranteed,
                priority=body.priority or 0,
                speculation=speculation,
                http_id=request_id.current.get() or "",
                prediction=prompt.prediction,
                order=order_id,
                cache_salt=salt,
                patience=deadline.seconds_left,
            )
            for number, prompt in enumerate(each for each in prompts for _ in range(choices))
        )
        undo.pop_all()
    adapter = None if lease is None else lease.label
    return Order(
        id=order_id,
        caller=caller,
        created=int(time.time()),
        model=body.model,
        adapter=adapter,
        fingerprint=adapter or services.model_name,
        vocabulary=vocabulary,
        deadline=deadline,
        choices=choices,
        requests=requests,
    )


def _within_scope(caller: Caller, body: ModelBody, prompt: Prompt) -> Prompt:
    """The prompt, with an answer no longer than the key's scope allows. Raises ApiError 400."""
    caller.check_prompt(len(prompt.token_ids) + len(prompt.target))
    field, asked = body.token_limit
    wanted = prompt.params.max_tokens
    allowed = caller.answer_tokens(wanted, field, asked is not None)
    return replace(prompt, params=replace(prompt.params, max_tokens=allowed))


def params_of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of a prompt's choice number `choice`: each is drawn with a seed of its own."""
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + choice) % INT64)
