"""HopWorld's agent around each client. Tools and their words are the environment's own, so that the
episodes can be compared with those of the environment.
"""

import asyncio
import json
from typing import Any

import anthropic
import httpx
import openai

from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import MalformedCall, Message, ToolCall

SETTINGS = HopWorld.Settings()


def tasks(split):
    return HopWorld.tasks(SETTINGS, split)


async def opened(task):
    env = HopWorld(SETTINGS)
    return env, await env.reset(task, 0)


async def seen(env, content, calls, malformed):
    """What the environment answers to a turn as the client saw it; ``None`` at the end."""
    said: list[Any] = [
        ToolCall(call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in calls
    ]
    for broken in malformed:
        said.insert(broken["index"], MalformedCall(broken["text"], broken["reason"]))
        content = content.replace(broken["text"], "").strip()
    transition = await env.step(Message("assistant", content, tuple(said)))
    return None if transition.done else transition.messages


async def run(task, client):
    """Chat completions, as most scripts ask for them."""
    env, opening = await opened(task)
    messages = [{"role": message.role, "content": message.content} for message in opening]
    while True:
        reply = await client.chat.completions.create(
            model="policy", messages=messages, tools=env.schemas, temperature=0.2
        )
        said = reply.choices[0].message.model_dump(exclude_none=True)
        messages.append(said)
        calls = said.get("tool_calls", [])
        answer = await seen(env, said.get("content", ""), calls, said.get("malformed_calls", []))
        if answer is None:
            return (await env.outcome()).reward
        ids = [call["id"] for call in calls] + ["?"] * len(answer)
        messages += [
            {"role": "tool", "content": message.content, "tool_call_id": call_id}
            for message, call_id in zip(answer, ids, strict=False)
        ]


async def streamed(task, client):
    """The same, streamed and put together again."""
    env, opening = await opened(task)
    messages = [{"role": message.role, "content": message.content} for message in opening]
    while True:
        stream = await client.chat.completions.create(
            model="policy",
            messages=messages,
            tools=env.schemas,
            stream=True,
            stream_options={"include_usage": True},
        )
        said, malformed, usage = {"role": "assistant", "content": "", "tool_calls": []}, [], None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                said["content"] += choice.delta.content or ""
                malformed += getattr(choice.delta, "malformed_calls", None) or []
                said["tool_calls"] += [
                    {"id": call.id, "type": "function", "function": call.function.model_dump()}
                    for call in choice.delta.tool_calls or []
                ]
        assert usage is not None and usage.completion_tokens > 0
        messages.append(said)
        answer = await seen(env, said["content"], said["tool_calls"], malformed)
        if answer is None:
            return (await env.outcome()).reward
        messages += [
            {"role": "tool", "content": message.content, "tool_call_id": "x"} for message in answer
        ]


def posted(task, base_url, api_key):
    """A plain function that talks HTTP itself and posts its rewards."""
    with httpx.Client(headers={"authorization": f"Bearer {api_key}"}, trust_env=False) as http:
        body = {"messages": [{"role": "user", "content": task.question}], "max_tokens": 5}
        reply = http.post(f"{base_url}/chat/completions", json=body).json()
        assert reply["usage"]["completion_tokens"] <= 5
        for value in (0.25, 0.5):
            named = {"name": "effort", "reward": value}
            assert http.post(f"{base_url}/reward", json=named).json() == {"ok": True}
        wanted = {"reward": 2.5, "success": False, "metrics": {"f1": 0.5}}
        http.post(base_url.removesuffix("/v1") + "/reward", json=wanted).raise_for_status()


def broken(task, base_url):
    raise RuntimeError("the database is gone")


async def endless(task, client):
    """Asks until it is told that its turns are used up."""
    messages = [{"role": "user", "content": task.question}]
    while True:
        reply = await client.chat.completions.create(model="policy", messages=messages)
        said = reply.choices[0].message.content or ""
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "More."}]


async def thinks(task, client):
    user = {"role": "user", "content": task.question}
    await client.chat.completions.create(model="policy", messages=[user])
    await asyncio.sleep(30)


def answered(task, base_url, api_key):
    return "42"


def score(task, answer):
    return float(answer == "42")


async def with_responses(task, base_url, api_key):
    """The Responses interface, whole conversations each time, as openai-agents does."""
    return await _responses(task, base_url, api_key, stream=False)


async def with_streamed_responses(task, base_url, api_key):
    return await _responses(task, base_url, api_key, stream=True)


async def with_named_responses(task, base_url, api_key):
    """Only what is new, after the name of the response before."""
    return await _responses(task, base_url, api_key, stream=False, by_name=True)


async def _responses(task, base_url, api_key, *, stream, by_name=False):
    env, opening = await opened(task)
    items = [{"role": message.role, "content": message.content} for message in opening]
    (function,) = (schema["function"] for schema in env.schemas)
    before = {}
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        while True:
            asked = {"model": "policy", "input": items, "tools": [{"type": "function", **function}]}
            if stream:
                async for event in await client.responses.create(**asked, stream=True):
                    if event.type in ("response.completed", "response.incomplete"):
                        reply = event.response
            else:
                reply = await client.responses.create(**asked, **before)
            calls = [
                {"id": item.call_id, "function": item.model_dump()}
                for item in reply.output
                if item.type == "function_call"
            ]
            broken = reply.model_dump()["agent_r1"]["malformed_calls"]
            answer = await seen(env, reply.output_text, calls, broken)
            if answer is None:
                return (await env.outcome()).reward
            ids = [call["id"] for call in calls] + ["?"] * len(answer)
            new = [
                {"type": "function_call_output", "call_id": call_id, "output": message.content}
                for message, call_id in zip(answer, ids, strict=False)
            ]
            said = [item.model_dump(exclude_none=True) for item in reply.output]
            items = new if by_name else [*items, *said, *new]
            before = {"previous_response_id": reply.id} if by_name else {}


async def with_messages(task, base_url, api_key):
    """The Messages interface."""
    return await _messages(task, base_url, api_key, stream=False)


async def with_streamed_messages(task, base_url, api_key):
    return await _messages(task, base_url, api_key, stream=True)


async def _messages(task, base_url, api_key, *, stream):
    env, (system, user) = await opened(task)
    messages = [{"role": "user", "content": user.content}]
    (function,) = (schema["function"] for schema in env.schemas)
    tool = {"name": function["name"], "description": function["description"]}
    asked = {
        "model": "policy",
        "max_tokens": 4096,
        "system": [
            {"type": "text", "text": system.content, "cache_control": {"type": "ephemeral"}}
        ],
        "tools": [{**tool, "input_schema": function["parameters"]}],
        "messages": messages,
    }
    base_url = base_url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key=api_key) as client:
        while True:
            counted = await client.messages.count_tokens(
                **{key: value for key, value in asked.items() if key != "max_tokens"}
            )
            if stream:
                async with client.messages.stream(**asked) as events:
                    reply = await events.get_final_message()
            else:
                reply = await client.messages.create(**asked)
            usage = reply.usage
            assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens
            words = "".join(block.text for block in reply.content if block.type == "text")
            calls = [
                {"id": b.id, "function": {"name": b.name, "arguments": json.dumps(b.input)}}
                for b in reply.content
                if b.type == "tool_use"
            ]
            broken = reply.model_dump()["agent_r1"]["malformed_calls"]
            answer = await seen(env, words, calls, broken)
            if answer is None:
                return (await env.outcome()).reward
            ids = [call["id"] for call in calls] + ["?"] * len(answer)
            messages += [
                {"role": "assistant", "content": reply.content},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": call_id, "content": message.content}
                        for message, call_id in zip(answer, ids, strict=False)
                    ],
                },
            ]
