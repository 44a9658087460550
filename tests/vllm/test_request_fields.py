"""The list of vLLM's fields, against which the API is tested, is that of the installed vLLM."""

import json

import pytest

from tests.vllm.request_fields import LIST, request_fields

pytest.importorskip("vllm", reason="vLLM has an environment of its own: constraints-vllm.txt")


def test_the_list_of_vllms_fields_is_that_of_the_installed_vllm() -> None:
    assert json.loads(LIST.read_text()) == request_fields(), (
        "run python -m tests.vllm.request_fields, and serve or refuse what is new"
    )
