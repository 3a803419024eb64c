"""Naive RAG, the baseline without an agent: one retrieval with the question, then the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agent_r1.envs.base import Transition, run_plain
from agent_r1.envs.gold import Gold
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tasks.multihop.env import EXAMPLE, MultiHop
from agent_r1.types import Message, Task, ToolCall


class NaiveRAG(ToolEnv):
    """A mix-in before an environment with a ``search`` tool: the question is searched for before
    the model's turn, and the text that the model then writes is its answer.
    """

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        opening = await super().reset(task, seed)
        call = ToolCall("search", {"query": task.question})
        (result,) = await self.run_tools([call])
        noise = any(event.startswith("noise/") for event in result.events)
        if result.error is not None and not noise:
            raise RuntimeError(f"the retrieval failed: {result.detail}")
        shown = await run_plain(self.episode_thread, self.interpret, [result])
        return self.with_passages(opening, call, shown.messages)

    def with_passages(
        self, opening: Sequence[Message], call: ToolCall, found: Sequence[Message]
    ) -> Sequence[Message]:
        """The opening messages with the passages found, as if the model had searched."""
        return [*opening, Message("assistant", "", (call,)), *found]

    async def step(self, message: Message) -> Transition:
        self.answer = None if message.cut else message.content
        return Transition(done=True)

    def gold(self) -> Iterator[Gold]:
        yield from list(super().gold())[-1:]


class HopWorldRAG(NaiveRAG, HopWorld):
    """HopWorld without further searches."""

    class Settings(HopWorld.Settings):
        name: str = "hopworld-rag"


def _read_first(found: Sequence[Message], question: Message) -> Message:
    """Passages, then the question, as one message."""
    passages = "\n\n".join(message.content for message in found)
    return Message("user", f"{passages}\n\nQuestion: {question.content}")


class MultiHopRAG(NaiveRAG, MultiHop):
    """Multi-hop questions with the passages found for the question in the prompt; no tools."""

    class Settings(MultiHop.Settings):
        name: str = "multihop-rag"

    system = (
        "Answer the question from the passages. Write the answer between answer tags, as short as "
        "possible: <answer>the answer</answer>"
    )

    schemas = ()  # type: ignore[assignment]
    worked_example = (
        _read_first([m for m in EXAMPLE if m.role == "tool"], EXAMPLE[0]),
        EXAMPLE[-1],
    )

    def with_passages(
        self, opening: Sequence[Message], call: ToolCall, found: Sequence[Message]
    ) -> Sequence[Message]:
        *before, question = opening
        return [*before, _read_first(found, question)]
