"""An environment of one's own: a shop whose prices the agent must look up and add.

Check it, then train:  agent-r1 check examples/my_env.toml && agent-r1 train examples/my_env.toml
"""

import random

from agent_r1 import Task, ToolEnv, tool


class Shop(ToolEnv):
    system = "Look up each price, then answer with the sum alone."

    @classmethod
    def tasks(cls, settings, split):
        pairs = [(a, b) for a in "ABCDEFGHIJ" for b in "KLMNOPQRST"]
        part = {"train": pairs[:80], "validation": pairs[80:90], "test": pairs[90:]}[split]
        return [Task(f"{a}{b}", f"What do {a} and {b} cost together?") for a, b in part]

    def start(self):
        self.prices = {
            item: random.Random(self.seed + ord(item)).randint(1, 9) for item in self.task.id
        }

    @tool
    def price(self, item: str) -> int:
        """The price of an item."""
        return self.prices[item]

    def score(self, answer):
        return float(answer == str(sum(self.prices.values())))

    def gold(self):
        return [str(sum(self.prices.values()))]
