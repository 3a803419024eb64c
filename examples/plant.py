"""An environment for real: a plant's spare parts, behind an API that takes its time.

Which courier brings the part of a machine? Machine → part → site that has it in stock → courier:
three calls, each needing what the one before said. `docs/environments/own.md` goes through it.
"""

import asyncio
import random

import agent_r1
from agent_r1 import CallError, FailurePolicy, Outcome, Task, ToolCall, ToolEnv, tool

SITES = ["Lyon", "Turin", "Graz", "Brno", "Gent", "Porto"]
COURIERS = ["Adler", "Bruno", "Costa", "Dubois", "Egger", "Fabre"]


class Warehouse:
    """The API; yours would keep an HTTP client here."""

    def __init__(self):
        numbers = random.Random(0)
        self.parts = {f"M{n}": f"P{numbers.randrange(100, 1000)}" for n in range(10, 250)}
        self.stocks = {
            part: dict(zip(numbers.sample(SITES, 2), numbers.sample([0, 7], 2), strict=True))
            for part in self.parts.values()
        }
        self.couriers = dict(zip(SITES, numbers.sample(COURIERS, 6), strict=True))

    async def get(self, table, key):
        await asyncio.sleep(0.02)
        return getattr(self, table)[key]


class Plant(ToolEnv):
    system = (
        "Find the machine's part, a site with stock of it, and that site's courier. "
        "Answer with the courier's name alone."
    )
    reward_parts = ("found",)  # the process rewards there are; `check` names others

    class Settings(ToolEnv.Settings):
        name: str = "plant"
        found: float = 0.2  # what each fact of the way is worth, in reward

    @classmethod
    def tasks(cls, settings, split):
        warehouse, tasks = Warehouse(), []
        for machine, part in warehouse.parts.items():
            (site,) = [site for site, pieces in warehouse.stocks[part].items() if pieces]
            question = f"Who brings the part of machine {machine}?"
            way = [part, site, warehouse.couriers[site]]
            tasks.append(Task(machine, question, way[-1], data={"way": way}))
        first, last = {"train": (0, 160), "validation": (160, 200), "test": (200, 240)}[split]
        return tasks[first:last]

    def start(self):
        self.api = agent_r1.shared("warehouse", Warehouse)  # one for all episodes of the run
        part, site, _ = self.task.data["way"]
        self.way = [("part_of", self.task.id), ("stock_of", part), ("courier_of", site)]
        self.found = set()

    @tool(timeout=5, failure=FailurePolicy(retries=2))
    async def part_of(self, machine: str) -> str:
        """The part that a machine needs.

        Args:
            machine: Its number, as M42.
        """
        return await self.look_up("parts", machine)

    @tool(timeout=5, failure=FailurePolicy(retries=2))
    async def stock_of(self, part: str) -> dict[str, int]:
        """Pieces of a part at each site.

        Args:
            part: Its number, as P123.
        """
        return await self.look_up("stocks", part)

    @tool(timeout=5, failure=FailurePolicy(retries=2))
    async def courier_of(self, site: str) -> str:
        """The courier of a site."""
        return await self.look_up("couriers", site)

    async def look_up(self, table, key):
        try:
            return await self.api.get(table, key)
        except KeyError:  # the agent's mistake; whatever else is raised is the API's fault
            raise CallError(f"there is no {key!r} among the {table}") from None

    def interpret(self, results):
        """What the results of a turn mean: a fact of the way, found for the first time, earns."""
        asked = {(r.call.name, *r.call.arguments.values()) for r in results if r.error is None}
        new = (asked & set(self.way)) - self.found
        self.found |= new
        return self.show(results, found=self.settings.found * len(new))

    def score(self, answer):
        """The outcome; `answer` is None where a limit came before there was one."""
        right = answer is not None and answer.strip() == self.task.answer
        return Outcome(float(right), success=right, metrics={"facts": len(self.found)})

    def gold(self):
        """A solution: `check` plays it, `agent-r1 sft` imitates it."""
        (_, machine), (_, part), (_, site) = self.way
        yield ToolCall("part_of", {"machine": machine})
        yield ToolCall("stock_of", {"part": part})
        yield ToolCall("courier_of", {"site": site})
        yield self.task.answer
