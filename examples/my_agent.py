"""An agent that exists already: a loop around the openai client. Nothing in it is about training;
only ``tasks`` tells the trainer what to ask, and ``run`` returns how well the agent did.

    agent-r1 check examples/my_agent.toml && agent-r1 train examples/my_agent.toml
"""

import json

from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tasks.hopworld.world import build_world, search_facts

SYSTEM = (
    "Answer the question about people. Search for one fact at a time. "
    "End with the name: <answer> name </answer>"
)
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the facts.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"description": "words to look for", "type": "string"}},
            "required": ["query"],
        },
    },
}


def tasks(split):
    """Questions about made-up people: yours would come from a file."""
    return HopWorld.tasks(HopWorld.Settings(train_hops=(1, 2, 2)), split)


async def run(task, client):
    facts = build_world(task.data["seed"], task.data["hops"], task.data["family"]).facts
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": task.question},
    ]
    while True:
        reply = await client.chat.completions.create(
            model="policy", messages=messages, tools=[SEARCH]
        )
        said = reply.choices[0].message
        messages.append(said.model_dump(exclude_none=True))
        # A young model writes calls that cannot be read: they come as content, with the reason.
        broken = getattr(said, "malformed_calls", None) or []
        results = [(call.id, look_up(facts, call.function)) for call in said.tool_calls or []]
        results += [("", f"Error: {call['reason']}") for call in broken]
        if not results:
            return float(answer_in(said.content or "") == task.answer)
        for call_id, text in results:
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})


def look_up(facts, function):
    if function.name != "search":
        return f"Error: there is no tool {function.name!r}; the tools are: search"
    query = json.loads(function.arguments).get("query")
    if not isinstance(query, str):
        return "Error: query: give a text"
    return "\n".join(fact.text for fact in search_facts(facts, query)) or "[]"
