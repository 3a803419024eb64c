"""Agents as the frameworks' own documents write them, on HopWorld's tool."""

import json
import os

from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tasks.hopworld.world import build_world, search_facts

SYSTEM = (
    "Answer the question about people. Search for one fact at a time. "
    "End with the name: <answer> name </answer>"
)


def tasks(split):
    return HopWorld.tasks(HopWorld.Settings(), split)


def search_of(task):
    facts = build_world(task.data["seed"], task.data["hops"], task.data["family"]).facts

    def search(query: str) -> str:
        """Search the facts."""
        return "\n".join(fact.text for fact in search_facts(facts, query))

    return search


def score(task, answer):
    return float(answer_in(answer or "") == task.answer)


async def langgraph(task, base_url, api_key):
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    model = ChatOpenAI(model="policy", base_url=base_url, api_key=api_key)
    agent = create_react_agent(model, [search_of(task)], prompt=SYSTEM)
    state = await agent.ainvoke({"messages": [("user", task.question)]})
    return state["messages"][-1].content


async def streamed_langgraph(task, base_url, api_key):
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    model = ChatOpenAI(model="policy", base_url=base_url, api_key=api_key, streaming=True)
    agent = create_react_agent(model, [search_of(task)], prompt=SYSTEM)
    async for state in agent.astream({"messages": [("user", task.question)]}, stream_mode="values"):
        last = state["messages"][-1]
    return last.content


async def openai_agents(task, base_url, api_key):
    """By the Responses interface, its default."""
    return await _openai_agents(task, base_url, api_key)


async def openai_agents_streamed(task, base_url, api_key):
    return await _openai_agents(task, base_url, api_key, stream=True)


async def _openai_agents(task, base_url, api_key, *, stream=False):
    import openai
    from agents import Agent, OpenAIResponsesModel, RunConfig, Runner, function_tool

    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
    agent = Agent(
        name="searcher",
        instructions=SYSTEM,
        tools=[function_tool(search_of(task))],
        model=OpenAIResponsesModel("policy", client),
    )
    config = RunConfig(tracing_disabled=True)
    if not stream:
        return (await Runner.run(agent, task.question, run_config=config)).final_output
    run = Runner.run_streamed(agent, task.question, run_config=config)
    async for _ in run.stream_events():
        pass
    return run.final_output


def anthropic_loop(task, base_url, api_key):
    """The loop of the anthropic client's documents, with a thought that is dropped."""
    import anthropic

    client = anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key=api_key)
    search = search_of(task)
    tool = {
        "name": "search",
        "description": "Search the facts.",
        "input_schema": {"type": "object", "properties": {"query": {"type": "string"}}},
    }
    messages = [{"role": "user", "content": task.question}]
    while True:
        reply = client.messages.create(
            model="policy", max_tokens=1024, system=SYSTEM, tools=[tool], messages=messages
        )
        messages.append({"role": "assistant", "content": reply.content})
        if reply.stop_reason != "tool_use":
            return "".join(block.text for block in reply.content if block.type == "text")
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": search(str(block.input.get("query", ""))),
            }
            for block in reply.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})


CURL = """
curl --noproxy '*' -sS "$OPENAI_BASE_URL/chat/completions" -d "$BODY" \
  -H "authorization: Bearer $OPENAI_API_KEY" -H 'content-type: application/json'
"""


def body_of(question):
    return json.dumps({"messages": [{"role": "user", "content": question}]})


if __name__ == "__main__":  # an agent of two lines of shell
    os.environ["BODY"] = body_of(json.loads(os.environ["AGENT_R1_TASK"])["question"])
    os.execvp("sh", ["sh", "-c", CURL])
