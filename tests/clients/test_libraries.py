"""Libraries by which programs talk to models, unmodified, against a real server."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.clients.conftest import ANSWER, MODEL, QUESTION

MESSAGES = [{"role": "user", "content": QUESTION}]


class Place(BaseModel):
    """The place that was asked for."""

    city: str


@pytest.mark.client("litellm", "chat, whole and streamed")
def test_litellm_chats(api: str) -> None:
    import litellm

    for provider in ("openai", "hosted_vllm"):
        ask = {"model": f"{provider}/{MODEL}", "api_base": api, "api_key": "none"}
        ask |= {"messages": MESSAGES, "temperature": 0}
        whole = litellm.completion(**ask)
        streamed = litellm.completion(**ask, stream=True)

        assert whole.choices[0].message.content == ANSWER
        assert "".join(each.choices[0].delta.content or "" for each in streamed) == ANSWER


@pytest.mark.client("litellm", "embeddings", refused="the models that are served generate text")
def test_litellm_is_told_why_there_are_no_embeddings(api: str) -> None:
    import litellm

    with pytest.raises(litellm.BadRequestError, match="No embeddings are served here"):
        litellm.embedding(f"openai/{MODEL}", ["a"], api_base=api, api_key="none")


@pytest.mark.client("langchain-openai", "chat, whole and streamed; structured output; tools")
def test_langchain_chats_structures_and_calls(api: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=api, api_key="none", temperature=0, max_tokens=64)
    called = chat.bind_tools([Place], tool_choice="Place").invoke(QUESTION)

    assert chat.invoke(QUESTION).content == ANSWER
    assert "".join(each.content for each in chat.stream(QUESTION)) == ANSWER
    assert chat.with_structured_output(Place).invoke(QUESTION) == Place(city="Paris")
    assert [call["name"] for call in called.tool_calls] == ["Place"]


@pytest.mark.client("llama-index-llms-openai-like", "chat, whole and streamed")
def test_llama_index_chats(api: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=MODEL, api_base=api, api_key="none", is_chat_model=True, temperature=0)
    messages = [ChatMessage(role="user", content=QUESTION)]

    assert llm.chat(messages).message.content == ANSWER
    assert "".join(each.delta or "" for each in llm.stream_chat(messages)) == ANSWER


@pytest.mark.client("instructor", "models by JSON schema and by tools")
def test_instructor_gets_its_model(api: str) -> None:
    import instructor
    from openai import OpenAI

    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(OpenAI(base_url=api, api_key="none"), mode=mode)
        place = client.chat.completions.create(
            model=MODEL, response_model=Place, messages=MESSAGES, temperature=0, max_tokens=64
        )

        assert isinstance(place, Place)
        assert place.city


@pytest.mark.client("pydantic-ai-slim", "agents with text, native output and tool output")
def test_pydantic_ais_agents_answer(api: str) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=api, api_key="none"))
    settings = {"temperature": 0.0, "max_tokens": 64}

    assert Agent(model, model_settings=settings).run_sync(QUESTION).output == ANSWER
    for form in (NativeOutput(Place), ToolOutput(Place)):
        agent = Agent(model, output_type=form, model_settings=settings)
        assert isinstance(agent.run_sync(QUESTION).output, Place)


@pytest.mark.client("dspy", "predictions")
def test_dspy_predicts(api: str) -> None:
    import dspy

    lm = dspy.LM(f"openai/{MODEL}", api_base=api, api_key="none", temperature=0, cache=False)

    assert lm(messages=MESSAGES) == [ANSWER]


@pytest.mark.client("llm", "prompts, whole and streamed")
def test_llm_prompts(api: str, tmp_path: Path) -> None:
    listed = {"model_id": "infuse", "model_name": MODEL, "api_base": api}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([listed]))
    command = [sys.executable, "-m", "llm", "-m", "infuse", QUESTION, "-o", "temperature", "0"]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}

    for more in ([], ["--no-stream"]):
        said = subprocess.run(
            [*command, *more], env=environment, capture_output=True, stdin=subprocess.DEVNULL
        )
        assert (said.returncode, said.stdout.decode().strip()) == (0, ANSWER)


@pytest.mark.client("openai-agents", "agents on chat completions, with a tool")
def test_openais_agents_answer_and_call(api: str) -> None:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    called = []

    @function_tool
    def find(city: str) -> str:
        """Find a city."""
        called.append(city)
        return city

    set_tracing_disabled(True)

    async def ask(choice: str | None, *tools: object) -> str:
        model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=api, api_key="none"))
        settings = ModelSettings(temperature=0, max_tokens=64, tool_choice=choice)
        agent = Agent(name="guide", model=model, model_settings=settings, tools=list(tools))
        return str((await Runner.run(agent, QUESTION)).final_output)

    assert asyncio.run(ask(None)) == ANSWER
    asyncio.run(ask("required", find))
    assert called


@pytest.mark.client("huggingface-hub", "InferenceClient: chat, whole and streamed; JSON by `value`")
def test_the_hubs_client_chats(url: str) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=url, api_key="none")
    form = {"type": "json_object", "value": Place.model_json_schema()}
    whole = client.chat_completion(MESSAGES, model=MODEL, temperature=0)
    streamed = client.chat_completion(MESSAGES, model=MODEL, temperature=0, stream=True)
    held = client.chat_completion(MESSAGES, model=MODEL, response_format=form, max_tokens=64)

    assert whole.choices[0].message.content == ANSWER
    assert "".join(each.choices[0].delta.content or "" for each in streamed) == ANSWER
    assert Place.model_validate_json(held.choices[0].message.content or "")


@pytest.mark.client("openai-agents", "agents on the Responses API, their default")
def test_openais_agents_answer_by_the_responses_api(api: str) -> None:
    from agents import (
        Agent,
        ModelSettings,
        OpenAIResponsesModel,
        Runner,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    model = OpenAIResponsesModel(MODEL, AsyncOpenAI(base_url=api, api_key="none"))
    agent = Agent(name="guide", model=model, model_settings=ModelSettings(temperature=0))

    assert Runner.run_sync(agent, QUESTION).final_output == ANSWER


@pytest.mark.client("anthropic", "messages, whole and streamed; tokens counted")
def test_anthropics_client_gets_messages(url: str) -> None:
    from anthropic import Anthropic

    client = Anthropic(base_url=url, api_key="none")
    asked = {"model": MODEL, "messages": MESSAGES}
    limits = {"max_tokens": 32, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked, **limits)
    with client.messages.stream(**asked, **limits) as stream:
        streamed = "".join(stream.text_stream)

    assert [block.text for block in whole.content] == [ANSWER]
    assert streamed == ANSWER
    used = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert client.messages.count_tokens(**asked).input_tokens == used


@pytest.mark.client("ollama", "chat, whole and streamed; adapters listed as models")
def test_ollamas_client_chats(url: str) -> None:
    from ollama import Client

    client = Client(host=url)
    greedy = {"temperature": 0}
    whole = client.chat(MODEL, messages=MESSAGES, options=greedy)
    streamed = client.chat(MODEL, messages=MESSAGES, options=greedy, stream=True)

    assert whole.message.content == ANSWER
    assert "".join(each.message.content or "" for each in streamed) == ANSWER
    assert any("sentiment" in str(each.model) for each in client.list().models)
