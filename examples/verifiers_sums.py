"""A taskset as verifiers (v1) has them: sums, with a calculator.

pip install 'agent-r1[verifiers]'
agent-r1 check examples/verifiers_sums.toml && agent-r1 train examples/verifiers_sums.toml
"""

import verifiers.v1 as vf


class Calculator(vf.Toolset[vf.ToolsetConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b


class SumData(vf.TaskData):
    total: int


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, task, trace) -> float:
        return float(str(task.total) in trace.last_reply.split())

    @vf.metric
    async def turns(self, task, trace) -> float:
        return float(trace.num_turns)

    @classmethod
    def toolsets(cls, config):
        return [Calculator(vf.ToolsetConfig())]


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        for a in range(2, 22):
            for b in range(2, 12):
                prompt = f"What is {a} + {b}? Answer with the number alone."
                yield SumTask(SumData(prompt=prompt, total=a + b), self.config.task)


__all__ = ["Sums"]
