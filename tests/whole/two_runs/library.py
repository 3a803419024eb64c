"""An environment that uses all that episodes can share, whatever the agent says."""

from pathlib import Path

import httpx

from agent_r1 import Task, ToolCall, ToolEnv, open_search, shared, tool
from agent_r1.search import SEARCHES


class Client(httpx.AsyncClient):
    """Has an open connection to nowhere, and is closed at the end."""

    async def close(self):
        await self.aclose()


@tool(isolated=True)
def apart() -> str:
    """Run in a process."""
    return "y"


class Library(ToolEnv):
    tools = (apart,)

    @classmethod
    def tasks(cls, settings, split):
        return [Task(f"{split}{n}", f"What of {n}?", str(n)) for n in range(4)]

    def start(self):
        self.client = shared("client", Client)
        corpus = Path(self.settings.cassette.path).with_name("corpus.jsonl")
        self.searcher = open_search(SEARCHES.section("bm25"), [corpus])

    @tool
    async def search(self, query: str) -> str:
        """Search."""
        return str(len(await self.searcher.search(query, 2)))

    @tool
    def plain(self) -> str:
        """Run in a thread."""
        return "x"

    async def score(self, answer):
        calls = [
            ToolCall("search", {"query": "one"}),
            ToolCall("plain", {}),
            ToolCall("apart", {}),
            ToolCall("add", {"a": 1, "b": 2}),
        ]
        for result in await self.run_tools(calls):
            if result.error is not None:
                raise RuntimeError(result.detail)
        if self.client.is_closed:
            raise RuntimeError("closed while the run goes on")
        return float(len(answer or "") % 2)
