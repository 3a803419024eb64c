"""A search server that speaks MCP, and an agent that learns to use it.

    python examples/mcp_server.py questions > examples/mcp_questions.jsonl
    agent-r1 check examples/mcp.toml && agent-r1 train examples/mcp.toml

It serves the facts of one HopWorld, which the tiny base can speak about; the trainer knows nothing
of it but how to start it. By HTTP: `python examples/mcp_server.py streamable-http 8000`, and
`--env.mcp.facts.url http://127.0.0.1:8000/mcp` in place of the command.
"""

import json
import sys

from agent_r1.tasks.hopworld.world import RELATIONS, build_world, search_facts

WORLD = build_world(seed=1, num_hops=1)


def reward(task, answer):
    """Whether the name is right, between answer tags or alone; ``env.reward`` names this."""
    given = (answer or "").split("<answer>")[-1].partition("</answer>")[0]
    return float(given.strip() == task.answer)


def questions():
    """Every question of one or two hops about the world."""
    facts = {(fact.subject, fact.relation): fact.object for fact in WORLD.facts}
    for (subject, relation), found in facts.items():
        yield f"Who is the {relation} of {subject}?", found, "1"
        for second in RELATIONS:
            if facts[found, second] != subject:
                asked = f"Who is the {second} of the {relation} of {subject}?"
                yield asked, facts[found, second], "2"


def serve(transport, port=0):
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("facts", log_level="WARNING")

    @server.tool()
    def search(query: str) -> str:
        """Search the facts."""
        return "\n".join(fact.text for fact in search_facts(WORLD.facts, query))

    server.run(transport, **({"port": int(port)} if port else {}))


if __name__ == "__main__":
    if sys.argv[1:] == ["questions"]:
        for number, (question, answer, hops) in enumerate(questions()):
            row = {"id": str(number), "question": question, "answer": answer, "category": hops}
            print(json.dumps(row))
    else:
        serve(*(sys.argv[1:] or ["stdio"]))
