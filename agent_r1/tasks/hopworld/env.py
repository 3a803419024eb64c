"""HopWorld as an environment, and its gold actions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from agent_r1.envs.base import Transition
from agent_r1.envs.gold import Gold
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.hopworld.world import NUM_TASKS, World, build_world, make_task, search_facts
from agent_r1.tasks.lazy import LazyTasks
from agent_r1.tools.base import ToolResult
from agent_r1.tools.function_tool import tool
from agent_r1.types import Message, Task, ToolCall

Hops = Annotated[int, Field(ge=1, le=4)]


Family = Literal["people", "namesakes"]


class HopWorld(ToolEnv):
    """One search per hop; reward 1 for the right name between answer tags.

    Process rewards, each summing to at most 1 over an episode, so that more calls than the
    question needs earn nothing: ``format``, a well-formed call; ``reached``, the fact of the next
    hop was found; ``answered``, the episode was ended with an answer between tags, right or wrong.
    """

    class Settings(ToolEnv.Settings):
        """Which worlds and questions.

        Attributes:
            train_hops, validation_hops, test_hops: Numbers of hops that the questions of a split
                cycle through.
            families: Kinds of worlds: ``people``, or ``namesakes``, where one name is several
                people's.
            seed: Seed of all worlds.
        """

        name: str = "hopworld"
        train_hops: tuple[Hops, ...] = Field((1, 2, 2), min_length=1)
        validation_hops: tuple[Hops, ...] = Field((1, 2), min_length=1)
        test_hops: tuple[Hops, ...] = Field((1, 2, 3), min_length=1)
        families: tuple[Family, ...] = Field(("people",), min_length=1)
        seed: int = 0

    system = (
        "Answer the question about people. Search for one fact at a time. "
        "End with the name: <answer> name </answer>"
    )
    reward_parts: ClassVar[tuple[str, ...]] = ("format", "reached", "answered")

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        hops = getattr(settings, f"{split}_hops")
        make = functools.partial(make_task, settings.seed, split, hops, settings.families)
        return LazyTasks(NUM_TASKS, make)

    def start(self) -> None:
        data = self.task.data
        self.world = build_world(data["seed"], data["hops"], data["family"])
        self._num_well_formed = 0
        self.num_reached = 0

    @tool(parallel=True)
    async def search(self, query: str) -> list[str]:
        """Search the facts.

        Args:
            query: words to look for
        """
        return [fact.text for fact in search_facts(self.world.facts, query)]

    def interpret(self, results: Sequence[ToolResult]) -> Transition:
        num_hops = len(self.world.chain)
        well_formed = sum(not result.by_agent for result in results)
        well_formed = min(well_formed, num_hops - self._num_well_formed)
        self._num_well_formed += well_formed
        before = self.num_reached
        seen = {text for result in results if result.error is None for text in result.value}
        while self.num_reached < num_hops and self.world.chain[self.num_reached].text in seen:
            self.num_reached += 1
        reached = (self.num_reached - before) / num_hops
        transition = self.show(results, format=well_formed / num_hops, reached=reached)
        return Transition(
            transition.messages,
            transition.rewards,
            state_key=f"reached-{self.num_reached}",
        )

    def reply(self, message: Message) -> Any:
        answered = float(answer_in(message.content) is not None)
        return Transition(done=True, rewards={"answered": answered})

    def score(self, answer: str | None) -> Any:
        return float(answer_in(answer or "") == self.task.answer)

    def gold(self) -> Iterable[Gold]:
        return gold_actions(self.world)


def gold_actions(world: World) -> list[Gold]:
    """Actions of a perfect agent: restate the fact found and the remaining question, then search
    or answer.
    """
    actions: list[Gold] = []
    for hop in range(len(world.chain)):
        found = (
            f"{world.chain[hop - 1].text} So {world.remaining(hop)}."
            if hop
            else f"So {world.remaining(hop)}."
        )
        fact = world.chain[hop]
        call = ToolCall("search", {"query": f"{fact.relation} of {fact.subject}"})
        actions.append(Message("assistant", found, (call,)))
    return [*actions, f"{world.chain[-1].text} <answer> {world.answer} </answer>"]
