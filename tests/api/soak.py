"""More load than a server can serve: arrivals that wait for nobody; beside them changes, clients
that leave and malformed requests. Answers are kept for the book, and compared with the OpenAPI
document.
"""

import asyncio
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.api.archives import CONFIG, WEIGHTS, tar_of, zip_of
from tests.api.documented import Document
from tests.api.soak_book import LONGEST, Asked, Book
from tests.api.soak_malformed import malformed
from tests.api.test_streaming import CHAT, COMPLETIONS

ADAPTERS, MERGES = "/v1/adapters", "/v1/merges"
BASE = "tiny"
TENANTS: dict[str, dict[str, Any]] = {
    "acme": {"weight": 2},
    "globex": {"max_queue_share": 0.5},
    "initech": {"requests_per_minute": 1200, "max_requests_at_once": 16},
}
"""Tenant -> the limits of its key, beside those that all have."""
OPS = "ops"
NAMES = 4
"""Adapters of a tenant that come, change and go."""
PROMPTS = ("The order arrived", "Dear customer, " * 7 + "we", "2 + 2 =")
QUESTIONS = ("Where is my order?", "Hi.")
TOKENS = (8, 24, LONGEST)
IN_CLOSED_LOOP = 16
"""Requests at once while it is measured how many the server can serve."""
WINDOW = 10.0
"""Seconds after which it is seen again how many are served."""
PAUSE = 0.5
"""Mean seconds between two changes of a tenant, and between two malformed requests."""
PATIENCE = 300
OVERLOAD = {
    429: ("queue_full", "wait_too_long", "rate_limited", "too_many_requests", "too_many_merges"),
    503: ("queue_timeout", "overloaded", "too_many_uploads", "sandbox_unavailable"),
    504: ("deadline_exceeded",),
}
"""Status -> the codes with which an overloaded server may refuse. No other 5xx may come."""
USES = ("running", "leases", "pinned")
"""What keeps an adapter in its slot."""
IN_USE = re.compile(
    r"infuse_(requests_running|requests_waiting|kv_tokens_used|adapters_pinned|adapter_leases"
    r"|adapters_registered|usage_requests_unwritten) (?!0\.0)"
    r"|infuse_http_requests_in_flight (?!1\.0)"
)
"""Gauges that are not what they are at rest. The request that reads them is in flight."""
LONG = 10.0
"""Seconds for which a merge of the tiny model is waited for."""


def key_of(name: str) -> str:
    return f"key-of-{name}-in-the-soak"


def write_keys(path: Path) -> Path:
    common = {"max_merges": 3, "max_adapters": 12}
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "key": key_of(name),
            "roles": ["generate", "admin"],
            "scope": {
                "adapters": {"use": [f"{name}/*"], "change": [f"{name}/*"]},
                **common,
                **limits,
            },
        }
        for name, limits in TENANTS.items()
    ]
    entries.append({"name": OPS, "key": key_of(OPS), "roles": ["generate", "admin"]})
    path.write_text(json.dumps(entries))
    return path


class Soak:
    """The clients of all tenants. Belongs to one event loop."""

    def __init__(self, url: str, document: dict[str, Any], book: Book, seed: int = 0) -> None:
        self.book = book
        self.asked: dict[str, Counter[str]] = defaultdict(Counter)
        """Tenant -> how its generation requests ended: a status, or who left."""
        self.others: dict[str, Counter[str]] = defaultdict(Counter)
        """Tenant -> statuses of changes and of what it looked at."""
        self.malformed: Counter[int] = Counter()
        self.changes: Counter[str] = Counter()
        """What was done, by its kind."""
        self.strays: list[str] = []
        """Answers that are not documented, or whose errors have another shape."""
        self.served = 0
        self._url = url
        self._document = Document(document)
        self._schemas = document
        self._choose = random.Random(seed)
        self._files = {
            kind: {file.name: file.read_bytes() for file in folder.iterdir()}
            for kind, folder in book.kinds.items()
        }
        # A server may close a connection that is kept just as the next request is sent on it.
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=0)
        self.clients = {
            name: httpx.AsyncClient(
                base_url=url,
                headers={"Authorization": f"Bearer {key_of(name)}"},
                timeout=PATIENCE,
                limits=limits,
            )
            for name in [*TENANTS, OPS]
        }

    async def close(self) -> None:
        for client in self.clients.values():
            await client.aclose()

    # Load

    async def prepare(self) -> None:
        """Give each tenant its adapters."""
        for tenant in TENANTS:
            for name in self._names(tenant):
                await self._upload(tenant, name, "POST")

    async def rate(self, seconds: float) -> float:
        """Measure how many requests a second are served to clients that wait for their answers."""
        until, before = time.monotonic() + seconds, self.served

        async def ask_on() -> None:
            while time.monotonic() < until:
                await self._ask(self._choose.choice(list(TENANTS)))

        await asyncio.gather(*(ask_on() for _ in range(IN_CLOSED_LOOP)))
        return (self.served - before) / (time.monotonic() - until + seconds)

    async def run(self, rate: float, seconds: float) -> None:
        """Send everything, and twice as many requests as are served, whether they are answered or
        not. `rate`: how many a second can be served at first."""
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for tenant in TENANTS:
                tasks.create_task(self._repeat(ended, self._change, tenant))
                tasks.create_task(self._repeat(ended, self._send_malformed, tenant))
                tasks.create_task(self._repeat(ended, self._merge, tenant))
            tasks.create_task(self._repeat(ended, self._operate, OPS))
            until = time.monotonic() + seconds
            while (begun := time.monotonic()) < until:
                before = self.served
                await self._arrive(tasks, 2 * rate, min(WINDOW, until - begun))
                # Other programs on the machine may take more of it, or less.
                rate = max(1.0, (self.served - before) / WINDOW)
            ended.set()

    async def _arrive(self, tasks: asyncio.TaskGroup, rate: float, seconds: float) -> None:
        due, until = time.monotonic(), time.monotonic() + seconds
        while due < until:
            await asyncio.sleep(due - time.monotonic())
            tasks.create_task(self._ask(self._choose.choice(list(TENANTS))))
            due += self._choose.expovariate(rate)

    async def tidy(self) -> None:
        """Delete all adapters and merges."""
        for path, field in ((ADAPTERS, "name"), (MERGES, "id")):
            while found := (await self._send(OPS, "GET", path)).json()["data"]:
                for each in found:
                    await self._send(OPS, "DELETE", f"{path}/{each[field]}")

    async def held(self) -> dict[str, Any]:
        """What the server still holds though nothing runs, once it has had time to let go."""
        until = time.monotonic() + PATIENCE
        while True:
            batch = (await self._send(OPS, "GET", "/debug/batch")).json()
            slots = [each for each in batch["slots"] if any(each[use] for use in USES)]
            fields = ("running", "waiting", "preparing", "kv_tokens_used")
            held = {name: batch[name] for name in fields if batch[name]}
            held |= {"slots": slots} if slots else {}
            metrics = (await self._send(OPS, "GET", "/metrics")).text.splitlines()
            held |= {line: "" for line in metrics if IN_USE.match(line)}
            if not held or time.monotonic() > until:
                return held
            await asyncio.sleep(0.1)

    async def _repeat(
        self, ended: asyncio.Event, do: Callable[[str], Awaitable[None]], tenant: str
    ) -> None:
        while not ended.is_set():
            await do(tenant)
            await asyncio.sleep(self._choose.expovariate(1 / PAUSE))

    # Requests to the model

    async def _ask(self, tenant: str) -> None:
        is_chat = self._choose.random() < 0.3
        text = self._choose.choice(QUESTIONS if is_chat else PROMPTS)
        asked = Asked(text, is_chat, self._choose.choice(TOKENS))
        how = self._choose.choices(["wait", "hurry", "stream", "leave"], [60, 2, 30, 8])[0]
        if how in ("stream", "leave"):
            await self._stream(tenant, asked, leaves=how == "leave")
            return
        headers = {"X-Request-Timeout": "0.05"} if how == "hurry" else {}
        path, body = self._request(tenant, asked)
        answer = await self.clients[tenant].post(path, json=body, headers=headers)
        if self._ended(tenant, answer):
            self.book.answered(_revision(answer), asked, self._text(answer.json()))

    def _request(self, tenant: str, asked: Asked) -> tuple[str, dict[str, Any]]:
        """The path and the body of a greedy request to the base, an adapter, or a mixture."""
        path = CHAT if asked.is_chat else COMPLETIONS
        messages = [{"role": "user", "content": asked.text}]
        body: dict[str, Any] = {"messages": messages} if asked.is_chat else {"prompt": asked.text}
        body |= {"temperature": 0, "ignore_eos": True, "max_tokens": asked.tokens}
        names = self._names(tenant)
        if self._choose.random() < 0.1:
            mixed = [{"name": name} for name in self._choose.sample(names, 2)]
            return path, body | {"model": BASE, "adapters": mixed}
        return path, body | {"model": self._choose.choice([BASE, f"{tenant}/mix", *names])}

    async def _stream(self, tenant: str, asked: Asked, leaves: bool) -> None:
        """Read a stream to its end, or leave it after its first event."""
        pieces: list[str] = []
        path, body = self._request(tenant, asked)
        body["stream"] = True
        async with self.clients[tenant].stream("POST", path, json=body) as answer:
            if not answer.is_success:
                await answer.aread()
            if not self._ended(tenant, answer):
                return
            async for event in _events(answer):
                if "error" in event:
                    self._refused_late(tenant, event["error"])
                    return
                if leaves:
                    self.asked[tenant]["left"] += 1
                    return
                pieces += [self._text(event)] if event["choices"] else []
        self.book.answered(_revision(answer), asked, "".join(pieces))

    def _ended(self, tenant: str, answer: httpx.Response) -> bool:
        self._look(answer)
        self.asked[tenant][str(answer.status_code)] += 1
        self.served += answer.is_success
        return answer.is_success

    def _refused_late(self, tenant: str, error: Mapping[str, Any]) -> None:
        """A stream had begun before its request was refused."""
        self.asked[tenant][f"200, then {error['code']}"] += 1
        if error["code"] not in [code for codes in OVERLOAD.values() for code in codes]:
            self.strays.append(f"a stream ended with {error}")

    @staticmethod
    def _text(answer: Mapping[str, Any]) -> str:
        [choice] = answer["choices"]
        if "text" in choice:
            return str(choice["text"])
        return str(choice.get("message", choice.get("delta")).get("content") or "")

    # Changes

    def _names(self, tenant: str) -> Sequence[str]:
        return [f"{tenant}/a{number}" for number in range(NAMES)]

    async def _change(self, tenant: str) -> None:
        name = self._choose.choice(self._names(tenant))
        path = f"{ADAPTERS}/{name}"
        kinds = ["replace", "delete", "describe", "roll back", "combine", "abandon", "look"]
        kind = self._choose.choices(kinds, [6, 2, 2, 2, 2, 2, 1])[0]
        self.changes[kind] += 1
        match kind:
            case "replace":
                await self._upload(tenant, name, "PUT")
            case "delete":
                await self._send(tenant, "DELETE", path)
                await asyncio.sleep(self._choose.uniform(0, PAUSE))
                await self._upload(tenant, name, "POST")
            case "describe":
                said = {"description": "x" * self._choose.randrange(50), "tags": ["a", "b"]}
                await self._send(tenant, "PATCH", path, json=said | {"enabled": False})
                await self._send(tenant, "PATCH", path, json={"enabled": True})
            case "roll back":
                known = await self._send(OPS, "GET", f"{path}/revisions")
                for each in known.json()["data"][-1:] if known.is_success else []:
                    body = {"revision": each["revision"]}
                    answer = await self._send(tenant, "POST", f"{path}/rollback", json=body)
                    self._learn(name, answer)
            case "combine":
                await self._combine(tenant)
            case "abandon":
                name = f"{tenant}/abandoned"
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._choose.uniform(0, 0.05)):
                        await self._upload(tenant, name, "POST")
                await self._send(tenant, "DELETE", f"{ADAPTERS}/{name}")
            case "look":
                files = (f"{path}/files/{file}" for file in (CONFIG, WEIGHTS))
                for where in (ADAPTERS, path, *files, "/v1/usage", "/v1/models"):
                    await self._send(tenant, "GET", where)

    async def _upload(self, tenant: str, name: str, method: str) -> None:
        files = self._files[self._choose.choice(list(self._files))]
        pack = self._choose.choice([zip_of, tar_of])
        parts = {"archive": pack(files)}
        if files.keys() == {CONFIG, WEIGHTS} and self._choose.random() < 0.5:
            parts = {"config": files[CONFIG], "weights": files[WEIGHTS]}
        if method == "PUT":
            answer = await self._send(tenant, "PUT", f"{ADAPTERS}/{name}", files=parts)
        else:
            answer = await self._send(tenant, "POST", ADAPTERS, data={"name": name}, files=parts)
        self._learn(name, answer)

    def _learn(self, name: str, answer: httpx.Response) -> None:
        if answer.is_success:
            self.book.learn(name, answer.json())

    async def _combine(self, tenant: str) -> None:
        """Make the product of two adapters, instead of the last one."""
        name = f"{tenant}/mix"
        await self._send(tenant, "DELETE", f"{ADAPTERS}/{name}")
        parts = [{"name": each} for each in self._choose.sample(self._names(tenant), 2)]
        body = {"name": name, "adapters": parts, "method": "product"}
        answer = await self._send(tenant, "POST", f"{ADAPTERS}/combine", json=body)
        self._learn(name, answer)

    async def _merge(self, tenant: str) -> None:
        """Merge, and cancel, or wait and fetch the model; leave nothing of it."""
        await asyncio.sleep(4 * PAUSE)
        name = self._choose.choice(self._names(tenant))
        answer = await self._send(tenant, "POST", MERGES, json={"adapter": name})
        if not answer.is_success:
            return
        path = answer.headers["location"]
        until = time.monotonic() + self._choose.choice([0, 0.1, LONG])
        state = "queued"
        while state in ("queued", "running") and time.monotonic() < until:
            await asyncio.sleep(0.1)
            state = (await self._send(OPS, "GET", path)).json()["state"]
        self.changes[f"merge {state}"] += 1
        if state == "succeeded":
            model = await self._send(OPS, "GET", f"{path}/archive")
            assert int(model.headers["content-length"]) == len(model.content)
        while (await self._send(OPS, "DELETE", path)).status_code != 404:
            await asyncio.sleep(0.1)

    async def _operate(self, _: str) -> None:
        """Pin an adapter for a while, and look at what an operator looks at."""
        path = f"{ADAPTERS}/{self._choose.choice(self._names(self._choose.choice(list(TENANTS))))}"
        await self._send(OPS, "PATCH", path, json={"pinned": True})
        for where in ("/metrics", "/debug/batch", "/debug/slowest", "/health/ready", "/v1/usage"):
            await self._send(OPS, "GET", where)
        await self._send(OPS, "PATCH", path, json={"pinned": False})

    async def _send_malformed(self, tenant: str) -> None:
        made = malformed(self._schemas, tenant, self._choose)
        client = self.clients[tenant]
        request = client.build_request(made.method, made.path, **made.sent)
        if made.key is not None:
            request.headers["Authorization"] = made.key
        answer = await client.send(request)
        self._look(answer)
        self.malformed[answer.status_code] += 1
        await self._send(tenant, "DELETE", f"{ADAPTERS}/{made.scratch}")

    async def _send(self, tenant: str, method: str, path: str, **sent: Any) -> httpx.Response:
        answer = await self.clients[tenant].request(method, path, **sent)
        self._look(answer)
        self.others[tenant][str(answer.status_code)] += 1
        return answer

    def _look(self, answer: httpx.Response) -> None:
        """Compare an answer with the document; of a stream that succeeds, the head."""
        method, path = answer.request.method, answer.request.url.path
        status, body = answer.status_code, answer.content if answer.is_closed else b""
        found = self._document.strays(method, path, status, answer.headers, body)
        if status >= 400:
            error = answer.json().get("error", {})
            if error.keys() != {"message", "type", "param", "code", "details"}:
                found.append(f"{method} {path}: {status} has no error: {body[:200]!r}")
            codes = OVERLOAD.get(status, () if status >= 500 else (error.get("code"),))
            if error.get("code") not in codes:
                found.append(f"{method} {path}: {status} {body[:200]!r}")
        self.strays += found


def _revision(answer: httpx.Response) -> str:
    """What answered; empty for the base."""
    return str(answer.headers.get("infuse-adapter", ""))


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
