"""Whatever is sent, the server answers in time, does not fail, and keeps to its OpenAPI document.

schemathesis makes the requests out of the document: some fit it, some do not. Many begin here as an
ordinary request with a few of the generated fields, name adapters that there are and carry a real
one's files: what is made up whole seldom comes further than the first check.

Cases are the same in every run; `--hypothesis-seed` takes others.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.generation.overrides import Override
from schemathesis.generation.stateful import run_state_machine_as_test
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from infuse.server.settings import MEBIBYTE
from tests.api.archives import form_of, read_adapter, tar_of, zip_of
from tests.api.conftest import RunningServer, ServeAdapters
from tests.api.test_auth import KEYS, bearer, keys_file
from tests.api.test_deadlines import HEADER
from tests.api.test_openapi import STATUSES

SECONDS = 5
"""A request that takes more seconds hangs. Those in which a thread of the server was ready to run
and had no processor are not counted: a busy machine is no hang."""
PATIENCE = 120
VARIATIONS = 7
"""Ordinary requests with something of one that is made up, if that has a body."""
FEW = 4
MANY = {"get": 225, "delete": 225, "post": 480, "put": 480, "patch": 480}
"""Made up requests of an operation: with their variations some 35,000."""


def no_failure_of_the_server(context: Any, answer: Any, case: Case) -> bool | None:
    """The time that a request itself allows may be over."""
    if answer.status_code == 504 and HEADER in case.headers:
        assert "time is over" in answer.text
        return None
    return not_a_server_error(context, answer, case)


CHECKS = [
    no_failure_of_the_server,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
WITH_BODIES = [each for each in STATUSES if each[0] in ("post", "put", "patch")]
CALLERS = ["everything"] * 8 + ["generate", "admin", "metrics", "nobody", "unknown"]
"""The key of a request: a name of KEYS, no key, or one that the server does not know."""
NAMES = ["default", "queries", "mlp", "tiny", "default@1", "mlp@2", "new", "org/new"]
"""The base, the adapters, and some that come and go."""
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "Once upon"},
    "/v1/chat/completions": {"model": "mlp", "messages": [{"role": "user", "content": "Hi."}]},
    "/v1/responses": {"model": "mlp", "input": "Hi."},
    "/v1/messages": {"model": "mlp", "messages": [{"role": "user", "content": "Hi."}]}
    | {"max_tokens": 8},
    "/v1/messages/count_tokens": {"model": "mlp", "messages": [{"role": "user", "content": "Hi."}]},
    "/api/chat": {"model": "mlp", "messages": [{"role": "user", "content": "Hi."}]},
    "/api/generate": {"model": "mlp", "prompt": "Once upon"},
    "/api/show": {"model": "mlp"},
    "/v1/rank": {"model": "mlp", "inputs": [{"prompt": "Two", "choices": [" plus", " and"]}]},
    "/v1/adapters/combine": {
        "name": "new",
        "adapters": [{"name": "default", "weight": 0.5}, {"name": "mlp"}],
        "method": "ties",
    },
    "/v1/adapters/{name}": {},
    "/v1/adapters/{name}/rollback": {"revision": 1},
    "/v1/merges": {"adapter": "default"},
    "/v1/adapters": {"name": "new"},
    "/v1/adapters/vectors": {"adapters": [{"name": "default", "weight": 0.5}, {"name": "mlp"}]},
    "/v1/adapters/similarity": {"adapters": ["default", "mlp"]},
    "/v1/embeddings": {"input": "A text"},
    "/tokenize": {"model": "mlp", "prompt": "Once upon"},
    "/detokenize": {"model": "mlp", "tokens": [5, 6]},
}
HALF = "\ud800"
"""Half a surrogate pair: JSON can carry it, UTF-8 cannot."""
OLLAMAS = ("/api/chat", "/api/generate")
LIMITS = {
    "/v1/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
"""The fields that bound an answer's length."""
LONGEST = 8
"""Tokens of an answer, so that 20,000 take minutes. Nothing else of a case is held back."""


class Fuzzed:
    """The server that the requests go to, and its document."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.document = schemathesis.openapi.from_url(f"{server.base_url}/openapi.json")
        self.document.config.generation.with_security_parameters = False
        self.document.config.output.sanitization.enabled = False
        self.files = {name: read_adapter(path) for name, path in server.adapter_folders.items()}
        self.sent = 0
        self._session = requests.Session()
        self.client = httpx.Client(
            base_url=server.base_url, headers=bearer("everything"), timeout=PATIENCE
        )
        self._said = self._say()

    def restore(self) -> None:
        """Every adapter is there again."""
        for name, files in self.files.items():
            answer = self.client.put(f"/v1/adapters/{name}", files=form_of(files))
            if answer.status_code == 404:
                form = {"data": {"name": name}, "files": form_of(files)}
                answer = self.client.post("/v1/adapters", **form)
            answer.raise_for_status()
            as_new = {"enabled": True, "pinned": False}
            self.client.patch(f"/v1/adapters/{name}", json=as_new).raise_for_status()

    def send(self, case: Case, caller: str, *checks: Any) -> requests.Response:
        """Check an answer. Raises what is wrong with it."""
        case.headers.pop("Authorization", None)
        if caller != "nobody":
            case.headers.update(bearer(caller))
        begun, before = time.monotonic(), seconds_without_processor()
        answer = case.call(session=self._session, timeout=PATIENCE)
        self.sent += 1
        seconds = time.monotonic() - begun
        if seconds > SECONDS:
            children = psutil.Process().children(recursive=True)
            waited = seconds_without_processor(*(each.pid for each in children)) - before
            assert seconds - max(waited.values(), default=0) < SECONDS, case.as_curl_command()
        case.validate_response(answer, [*CHECKS, *checks])
        assert (answer.status_code == 401) == lacks_key(case.path, caller)
        return answer

    def check(self) -> None:
        """Check that nothing is left behind: no lease is held, and the base is unchanged."""
        deadline = time.monotonic() + PATIENCE
        while not self._is_idle():
            assert time.monotonic() < deadline, "something is held though nothing runs"
            time.sleep(0.01)
        assert self._say() == self._said

    def _is_idle(self) -> bool:
        engine, adapters = (
            self.server.services.engine.stats(),
            self.server.services.registry.stats(),
        )
        return not (engine.running or engine.waiting or adapters.leases or adapters.pinned)

    def _say(self) -> str:
        body = {"model": "tiny", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 16}
        answer = self.client.post("/v1/completions", json=body)
        return str(answer.json()["choices"][0]["text"])


def seconds_without_processor(*others: int) -> Counter[str]:
    """For how long each thread of this process and of others was ready to run, and did not."""
    waited: Counter[str] = Counter()
    for process in ("self", *others):
        with suppress(OSError):
            for thread in Path(f"/proc/{process}/task").iterdir():
                with suppress(OSError):
                    nanoseconds = (thread / "schedstat").read_text().split()[1]
                    waited[thread.name] = int(nanoseconds) / 1e9
    return waited


def lacks_key(path: str, caller: str) -> bool:
    return caller not in KEYS and not path.startswith("/health")


def shorten(case: Case) -> None:
    """Bound the answer's tokens; a limit beyond the window is left, as it is refused."""
    body, names = case.body, LIMITS.get(case.path)
    if isinstance(body, dict) and case.path in OLLAMAS:
        options = {} if body.get("options") is None else body["options"]
        if isinstance(options, dict) and options.get("num_predict") in (None, *range(-2, 256)):
            body["options"] = options | {"num_predict": LONGEST}
    if not isinstance(body, dict) or names is None:
        return
    limits = [name for name in names if body.get(name)]
    for name in limits:
        if isinstance(body[name], int) and LONGEST < body[name] < 256:
            body[name] = LONGEST
    # Messages need a limit, so that one without it is refused.
    if not limits and case.path != "/v1/messages":
        body[names[0]] = LONGEST


@st.composite
def requests_to(draw: DrawFn, fuzzed: Fuzzed, operation: Any) -> list[tuple[Case, str]]:
    """A made up request, then ordinary ones with something of it; and whose key goes with each."""
    made = draw(operation.as_strategy(generation_mode=draw(st.sampled_from(list(GenerationMode)))))
    several = VARIATIONS if made.path in PLAIN and isinstance(made.body, dict) else 1
    cases = [made, *(draw(variations(fuzzed, made)) for _ in range(several))]
    for case in cases:
        shorten(case)
    return [(case, draw(st.sampled_from(CALLERS))) for case in cases]


@st.composite
def variations(draw: DrawFn, fuzzed: Fuzzed, made: Case) -> Case:
    case = made.derive()
    for parameter in {"name", "model"} & case.path_parameters.keys():
        case.path_parameters[parameter] = draw(st.sampled_from(NAMES))
    if draw(st.booleans()):
        case.headers.pop("if-match", None)
    if isinstance(case.body, dict):
        is_form = case.media_type == "multipart/form-data"
        plain = PLAIN[case.path] | (draw(forms(fuzzed)) if is_form else {})
        some = (
            st.lists(st.sampled_from(sorted(case.body)), max_size=2) if case.body else st.just([])
        )
        case.body = plain | {name: case.body[name] for name in draw(some)}
        if "model" in plain and draw(st.booleans()):
            case.body["model"] = draw(st.sampled_from(NAMES))
        if "name" in plain and draw(st.booleans()):
            owner = draw(st.sampled_from(["", "org/"]))
            case.body["name"] = f"{owner}new-{draw(st.integers(0, 99_999))}"
    return case


def halved(value: Any) -> Iterator[Any]:
    """The value with half a surrogate pair in one of its texts or names, each in turn."""
    if isinstance(value, str):
        yield value + HALF
    if isinstance(value, dict):
        yield {**value, HALF: "x"}
        yield from ({**value, name: half} for name in value for half in halved(value[name]))
    if isinstance(value, list):
        for place, each in enumerate(value):
            yield from ([*value[:place], half, *value[place + 1 :]] for half in halved(each))


def half_bodies(fuzzed: Fuzzed, method: str, path: str) -> Iterator[Any]:
    """Ordinary bodies with one more field, as its example in the document, and halved."""
    document = fuzzed.document.raw_schema
    schema = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    yield from halved(PLAIN[path])
    for name, field in schema.get("properties", {}).items():
        for half in halved(field["examples"][0]):
            yield PLAIN[path] | {name: half}


@st.composite
def forms(draw: DrawFn, fuzzed: Fuzzed) -> dict[str, bytes]:
    """An adapter's files, packed in some way, with a few bytes changed or the end missing."""
    files = draw(st.sampled_from(list(fuzzed.files.values())))
    pack = draw(st.sampled_from([form_of, zip_of, tar_of]))
    packed = pack(files)
    parts = packed if isinstance(packed, dict) else {"archive": packed}
    for name in parts:
        data = bytearray(parts[name])
        for _ in range(draw(st.integers(0, 2))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        parts[name] = bytes(data[: draw(st.sampled_from([None, None, None, len(data) // 2]))])
    return parts


def edges(fuzzed: Fuzzed, operation: Any) -> Iterator[Case]:
    config = fuzzed.document.config.generation_for(operation=operation, phase="coverage")
    return iter(
        CoverageGenerator(
            operation=operation,
            generation_modes=list(GenerationMode),
            generation_config=config,
            auth_storage=None,
            override=Override(),
            feedback=FeedbackSources(),
        )
    )


@pytest.fixture(scope="module")
def fuzzed(
    serve_adapters: ServeAdapters, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fuzzed]:
    little_room = {
        "keys_file": keys_file(tmp_path_factory.mktemp("keys") / "keys.json"),
        "max_queue": 16,
        "max_resident_adapters": 4,
        "keep_revisions": 1000,
        "max_upload_bytes": MEBIBYTE,
    }
    with serve_adapters(**little_room) as server:
        yield Fuzzed(server)


@pytest.mark.parametrize(
    "many", [False, pytest.param(True, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize("operation", STATUSES, ids=" ".join)
def test_an_operation_answers_as_its_document_says(
    fuzzed: Fuzzed,
    operation: tuple[str, str],
    many: bool,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    method, path = operation
    fuzzed.restore()
    before = fuzzed.sent

    @hypothesis.settings(
        max_examples=MANY[method] if many else FEW,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.seed(pytestconfig.getoption("hypothesis_seed") or 0)
    @hypothesis.given(requests_to(fuzzed, fuzzed.document[path][method]))
    def fuzz(several: list[tuple[Case, str]]) -> None:
        for case, caller in several:
            fuzzed.send(case, caller)

    fuzz()
    fuzzed.check()
    record_property("cases", fuzzed.sent - before)


@pytest.mark.parametrize("operation", STATUSES, ids=" ".join)
def test_the_edges_of_every_field_are_answered(
    fuzzed: Fuzzed, operation: tuple[str, str], record_property: Callable[[str, object], None]
) -> None:
    """One field at a time: missing, null, of a wrong type, too small, too long, each refused; and
    methods that there are not."""
    method, path = operation
    fuzzed.restore()
    before = fuzzed.sent
    for case in edges(fuzzed, fuzzed.document[path][method]):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # A name that is too long is what the case is about.
            case.body["model"] = case.body["model"] if path == "/api/show" else "default"
        shorten(case)
        fuzzed.send(case, "everything", negative_data_rejection)
    fuzzed.check()
    record_property("cases", fuzzed.sent - before)


@pytest.mark.parametrize("operation", WITH_BODIES, ids=" ".join)
def test_half_a_character_is_refused_or_does_no_harm(
    fuzzed: Fuzzed, operation: tuple[str, str]
) -> None:
    """schemathesis sends none: its own client cannot."""
    method, path = operation
    fuzzed.restore()
    url = path.replace("{name}", "default")
    headers = {"Content-Type": "application/json"}
    for body in half_bodies(fuzzed, method, path):
        answer = fuzzed.client.request(method, url, content=json.dumps(body), headers=headers)
        assert answer.status_code < 500, (body, answer.text)
    fuzzed.check()


@pytest.mark.parametrize(
    "chains", [5, pytest.param(500, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_what_one_answer_names_the_next_request_may_use(
    fuzzed: Fuzzed, chains: int, record_property: Callable[[str, object], None]
) -> None:
    """Made here, looked up, changed and deleted there."""
    fuzzed.restore()
    before = fuzzed.sent

    class Chain(fuzzed.document.as_state_machine()):  # type: ignore[misc]
        def call(self, case: Case, **_: Any) -> requests.Response:
            shorten(case)
            return fuzzed.send(case, "everything")

        def validate_response(self, *_: Any, **__: Any) -> None:
            """`send` has checked the answer already."""

    settings = hypothesis.settings(
        max_examples=chains,
        stateful_step_count=8,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Chain, settings=settings)
    fuzzed.check()
    record_property("cases", fuzzed.sent - before)
