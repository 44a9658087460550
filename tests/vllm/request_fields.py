"""The fields of vLLM's request types, as its package defines them.

`python -m tests.vllm.request_fields` writes them to the list that tests without vLLM read.
"""

import json
from pathlib import Path

LIST = Path(__file__).parents[1] / "api" / "vllm_fields.json"


def request_fields() -> dict[str, list[str]]:
    """Path -> the fields that vLLM reads there."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

    types = {
        "/v1/chat/completions": ChatCompletionRequest,
        "/v1/completions": CompletionRequest,
        "/v1/responses": ResponsesRequest,
        "/tokenize": TokenizeChatRequest,
    }
    return {path: sorted(kind.model_fields) for path, kind in types.items()}


if __name__ == "__main__":
    LIST.write_text(json.dumps(request_fields(), indent=1) + "\n")
