"""HopWorld with a user: half of the questions name a person by the first name alone, which several
people have. Then asking once is right; asking when the question is clear, or twice, costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from agent_r1.envs.base import Transition
from agent_r1.envs.gold import Gold
from agent_r1.envs.user import UserEnv
from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.hopworld.env import Family, Hops, HopWorld
from agent_r1.tasks.lazy import LazyTasks
from agent_r1.types import Message, Outcome, Task, derive_seed


def _told(task: Task, share: float) -> Task:
    """The task in the user's words: in a ``share`` of tasks, chosen by a hash of the id, with
    only the first name.
    """
    ambiguous = derive_seed("ambiguous", task.id) / 2**63 < share
    question = task.question.rsplit(" ", 1)[0] + "?" if ambiguous else task.question
    data = {**task.data, "ambiguous": ambiguous, "meant": task.question}
    category = "ambiguous" if ambiguous else "clear"
    return dataclasses.replace(task, question=question, category=category, data=data)


class HopWorldUser(UserEnv, HopWorld):
    """Reward: 1 for the right name, less ``cost`` for each needless question. Process reward
    ``asked``: the first question about an ambiguous name.
    """

    class Settings(UserEnv.Settings, HopWorld.Settings):
        """``ambiguous``: share of ambiguous questions; ``cost``: reward that a needless question
        costs.
        """

        name: str = "hopworld-user"
        train_hops: tuple[Hops, ...] = Field((1,), min_length=1)
        validation_hops: tuple[Hops, ...] = Field((1,), min_length=1)
        test_hops: tuple[Hops, ...] = Field((1,), min_length=1)
        families: tuple[Family, ...] = Field(("namesakes",), min_length=1)
        ambiguous: float = Field(0.5, ge=0, le=1)
        cost: float = Field(0.3, ge=0, le=1)

    system = (
        "Answer the question about people. Search for one fact at a time. "
        "If it is not clear who is meant, ask. "
        "End with the name: <answer> name </answer>"
    )
    reward_parts = (*HopWorld.reward_parts, "asked")

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        tasks = super().tasks(settings, split)
        return LazyTasks(len(tasks), lambda index: _told(tasks[index], settings.ambiguous))

    @property
    def needless(self) -> int:
        """Questions that were not needed."""
        return max(0, self.num_questions - bool(self.task.data["ambiguous"]))

    def is_answer(self, message: Message) -> bool:
        return answer_in(message.content) is not None

    def scripted(self, message: Message) -> str:
        meant: str = self.task.data["meant"]
        return meant

    def brief(self) -> str:
        return f"You asked: {self.task.question} What you mean is: {self.task.data['meant']}"

    def question(self, message: Message) -> dict[str, float]:
        first = self.num_questions == 1 and self.task.data["ambiguous"]
        return {"asked": float(first)}

    def ending(self, message: Message) -> dict[str, float]:
        return {"answered": float(self.is_answer(message))}

    def interpret(self, results: Any) -> Transition:
        transition = super().interpret(results)
        return dataclasses.replace(transition, state_key=self.state_key())

    def state_key(self) -> str:
        return f"reached-{self.num_reached}, asked {self.num_questions}"

    def score(self, answer: str | None) -> Outcome:
        right = float(super().score(answer))
        metrics = {"questions": float(self.num_questions), "needless": float(self.needless)}
        reward = right * max(0.0, 1.0 - self.settings.cost * self.needless)
        return Outcome(reward, success=right == 1.0, metrics=metrics)

    def gold(self) -> list[Gold]:
        asks = ["Who do you mean?"] if self.task.data["ambiguous"] else []
        return [*asks, *super().gold()]
