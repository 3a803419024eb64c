"""``check_env`` finds what authors get wrong."""

import random

import pytest

from agent_r1 import Task, ToolEnv, check_env, tool


class Good(ToolEnv):
    reward_parts = ("asked",)

    @classmethod
    def tasks(cls, settings, split):
        return [Task(f"{split}-{n}", f"What is {n}?", str(n)) for n in range(3)]

    @tool
    def ask(self) -> str:
        """Ask."""
        return "no"

    def interpret(self, results):
        return self.show(results, asked=1.0)

    def score(self, answer):
        return float(answer == self.task.answer)


def test_a_good_one_passes():
    notes = check_env(Good)
    assert "train: 3 tasks" in notes
    assert any("9 of 9" in note for note in notes)


def broken(name, **methods):
    return type(name, (Good,), methods)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            broken("Random", interpret=lambda self, r: self.show(r, asked=random.random())),
            "two episodes with the same seed differ",
        ),
        (broken("Harsh", score=lambda self, answer: 0.0), "does not accept the gold answer"),
        (broken("Lax", score=lambda self, answer: 1.0), "without any answer counts as success"),
        (broken("Extra", interpret=lambda self, r: self.show(r, other=1.0)), "'other' is not in"),
        (
            broken("Crash", interpret=lambda self, r: r[0].value.upper()),
            "AttributeError after",
        ),
        (
            broken("Twice", tasks=classmethod(lambda cls, s, split: [Task("a", "?", "1")])),
            "stands in split 'train' and again in 'validation'",
        ),
        (
            broken("Empty", tasks=classmethod(lambda cls, s, split: [])),
            "split 'train' has no tasks",
        ),
    ],
)
def test_what_is_wrong_is_said(env, message):
    with pytest.raises(ValueError, match=env.__name__) as error:
        check_env(env)
    assert message in str(error.value)
