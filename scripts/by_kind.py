"""Exact match of an experiment's arms by kind of question, comparison or another, and how often an
answer that was shown was given.

python scripts/by_kind.py experiments/multihop-smollm2.toml FOLDER    # after agent-r1 bench
"""

import sys
from pathlib import Path

from agent_r1.bench.experiment import load_experiment
from agent_r1.bench.tables import as_markdown, result_of
from agent_r1.tasks.multihop.data import load_questions


def main(experiment: str, folder: str, runs: str = "runs/bench") -> None:
    _, jobs = load_experiment(Path(experiment), overrides=[("env.path", folder)])
    rows = []
    for job in jobs:
        for test_set, recipe in job.sets:
            kinds = {
                task.id: "comparison" if "comparison" in task.data["type"] else "other"
                for dataset in recipe.env.datasets
                for task in load_questions(folder, dataset)
            }
            outcomes = result_of(job, test_set, Path(runs))["outcomes"]
            for kind in sorted(set(kinds.values())):
                asked = [outcome for task, outcome in outcomes.items() if kinds[task] == kind]
                shown = [outcome for outcome in asked if outcome["answer_shown"]]
                rows.append(
                    {
                        "method": job.arm,
                        "set": test_set.name,
                        "kind": kind,
                        "n": len(asked),
                        "em": _mean(asked, "em"),
                        "answer_shown": _mean(asked, "answer_shown"),
                        "em_where_shown": _mean(shown, "em"),
                    }
                )
    print(as_markdown(rows))


def _mean(outcomes: list[dict[str, float]], metric: str) -> str:
    return f"{sum(o[metric] for o in outcomes) / len(outcomes):.3f}" if outcomes else "-"


if __name__ == "__main__":
    main(*sys.argv[1:])
