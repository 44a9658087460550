"""OpenAI's Agents SDK, unmodified, runs its agents on adapters: it speaks the Responses API."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError

from tests.api.conftest import RunningServer
from tests.api.test_responses import ASKED, Weather, ending
from tests.api.test_responses import server as server

pytestmark = [pytest.mark.full, pytest.mark.anyio]
SETTINGS: dict[str, Any] = {"temperature": 0, "extra_body": ending(5)}
"""Five tokens and an end, or a call."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def agents(server: RunningServer) -> AsyncIterator[Any]:
    """The package, with the server as its default."""
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    url = f"{server.base_url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        agents.set_default_openai_client(client)
        yield agents


def agent_of(agents: Any, settings: dict[str, Any] = SETTINGS, **fields: Any) -> Any:
    model_settings = agents.ModelSettings(**settings)
    return agents.Agent(name="shop", model="default", model_settings=model_settings, **fields)


async def test_an_agent_answers(agents: Any) -> None:
    result = await agents.Runner.run(agent_of(agents, instructions="Be brief."), "Is it warm?")

    assert result.final_output
    [response] = result.raw_responses
    assert response.usage.output_tokens == 5


async def test_an_agent_streams_the_same(agents: Any) -> None:
    whole = await agents.Runner.run(agent_of(agents), "Is it warm?")
    streamed = agents.Runner.run_streamed(agent_of(agents), "Is it warm?")
    raw = [event.data async for event in streamed.stream_events() if hasattr(event, "data")]

    deltas = [event.delta for event in raw if event.type == "response.output_text.delta"]
    assert "".join(deltas) == streamed.final_output == whole.final_output
    assert raw[-1].type == "response.completed"


async def test_an_agent_runs_its_tools_and_goes_on(agents: Any) -> None:
    asked: list[str] = []

    @agents.function_tool  # type: ignore[untyped-decorator]
    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "18 degrees"

    settings = SETTINGS | {"tool_choice": "required", "parallel_tool_calls": False}
    agent = agent_of(agents, settings, tools=[get_weather])
    result = await agents.Runner.run(agent, "Is it warm?")

    assert len(asked) == 1
    assert result.final_output
    assert [item.type for item in result.new_items] == [
        "tool_call_item",
        "tool_call_output_item",
        "message_output_item",
    ]


async def test_an_agents_output_has_its_type(agents: Any) -> None:
    settings = {"temperature": 0}
    result = await agents.Runner.run(agent_of(agents, settings, output_type=Weather), ASKED)

    assert isinstance(result.final_output, Weather)


async def test_a_session_keeps_the_conversation_at_the_client(agents: Any) -> None:
    session = agents.SQLiteSession("one")
    for _ in range(2):
        result = await agents.Runner.run(agent_of(agents), "Is it warm?", session=session)

    roles = [item["role"] for item in await session.get_items()]
    assert roles == ["user", "assistant"] * 2
    assert json.dumps(result.to_input_list())


async def test_what_would_be_stored_is_refused(agents: Any) -> None:
    with pytest.raises(BadRequestError, match="nothing is stored here"):
        await agents.Runner.run(agent_of(agents), "And now?", previous_response_id="resp_1")
