"""Ask a server what its users would ask. Exit code 0: all is well.

python3 docker/check_server.py http://127.0.0.1:8000 examples/adapters/expected.json < keys.json
"""

import json
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Server:
    url: str

    def call(self, path: str, key: str = "", body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of an answer."""
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def chat(self, key: str, model: str, messages: list[dict[str, str]]) -> str:
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 48}
        status, text = self.call("/v1/chat/completions", key, body)
        _check(status == 200, f"a chat with {model} is answered with 200", f"{status}: {text}")
        return str(json.loads(text)["choices"][0]["message"]["content"])


def main(url: str, expected_file: str) -> None:
    server = Server(url)
    keys = {entry["name"]: entry["key"] for entry in json.load(sys.stdin)}
    expected = json.loads(Path(expected_file).read_text())

    _, models = server.call("/v1/models", keys["admin"])
    base = next(model["id"] for model in json.loads(models)["data"] if model["parent"] is None)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = server.chat(keys["admin"], base, question)
    _check("Paris" in answer, "the base knows the capital of France", answer)
    for adapter, examples in expected.items():
        answer = server.chat(keys["admin"], adapter, examples[0]["messages"])
        wanted = examples[0]["answer"]
        _check(answer == wanted, f"{adapter} answers {wanted!r}", answer)

    status, _ = server.call("/v1/models")
    _check(status == 401, "without a key nothing is told", status)
    status, metrics = server.call("/metrics", keys["prometheus"])
    _check(status == 200 and "infuse_requests_total" in metrics, "Prometheus can read", status)
    status, _ = server.call("/v1/adapters", keys["prometheus"])
    _check(status == 403, "Prometheus cannot administer", status)


def _check(holds: bool, what: str, found: object) -> None:
    print(f"  {'ok' if holds else 'FAILED'}: {what}" + ("" if holds else f"; found {found!r}"))
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
