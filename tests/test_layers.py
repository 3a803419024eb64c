"""A file imports from rows above its own only, and the upper rows do without torch."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "agent_r1"
ROWS = [
    {"types", "tree", "isolated", "run_async", "blocked", "text", "waiting",
     "durable"},
    {"config", "sections", "portable"},
    {"cached", "checkpoint", "trust"},
    {"failure", "noise"},
    {"tools", "cassette", "dispatch", "mcp_tools", "render",
     "render.encoding", "render.calls", "render.hermes", "render.chatml", "render.gemma3",
     "render.llama3", "render.template"},
    {"env", "recall", "users", "search", "search.corpus", "search.store",
     "search.batching", "search.bm25", "search.dense", "search.http"},
    {"env_check", "tasks", "tasks.hopworld", "tasks.hopworld_user", "tasks.shops",
     "tasks.lazy", "tasks.answers", "tasks.splits", "tasks.qa_data", "tasks.qa_convert",
     "tasks.qa_scores", "tasks.rows",
     "tasks.database", "tasks.gym", "tasks.openenv", "tasks.verifiers",
     "tasks.multihop", "tasks.naive_rag", "tasks.tools"},
    {"kernels", "attention", "logprobs"},
    {"policy"},
    {"memory"},
    {"rollout", "rollout.native", "rollout.batch", "rollout.cache", "rollout.tick",
     "rollout.sampling", "rollout.padded", "rollout.episode", "rollout.episodes"},
    {"model_user"},
    {"algorithms", "algorithms.base", "algorithms.advantages", "algorithms.losses",
     "algorithms.kl", "algorithms.credit", "algorithms.grpo", "algorithms.dr_grpo",
     "algorithms.dapo", "algorithms.gspo", "algorithms.cispo", "algorithms.rloo",
     "algorithms.reinforce_pp", "algorithms.gigpo", "algorithms.ppo", "algorithms.step_gae",
     "algorithms.sft"},
    {"assign", "masks"},
    {"batch", "pack", "rows", "optimizer", "learner"},
    {"recipe", "run"},
    {"advice", "evaluate", "progress", "explain", "metrics", "demonstrations"},
    {"trainer", "report"},
    {"api", "dry_run"},
    {"bench", "bench.experiment", "bench.worker", "bench.statistics", "bench.tables",
     "bench.figures", "bench.schedule"},
    {"cli"},
]  # fmt: skip
ALGORITHMS = {module for row in ROWS for module in row if module.startswith("algorithms")}
WITHOUT_TORCH = (
    {module for row in ROWS[:7] for module in row}
    | ALGORITHMS - {"algorithms.losses"}
    | {
        "rollout",
        "rollout.native",
        "rollout.padded",
        "rollout.episode",
        "rollout.episodes",
        "assign",
        "masks",
        "recipe",
        "run",
        "explain",
        "bench",
        "bench.experiment",
        "bench.worker",
        "bench.statistics",
        "bench.tables",
        "bench.figures",
        "bench.schedule",
        "cli",
    }
)


def modules():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imports(tree):
    """Modules of ours imported on load; not those under TYPE_CHECKING or in functions."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agent_r1."):
            yield node.module.removeprefix("agent_r1.")


def test_every_file_has_a_row_and_imports_from_above():
    row_of = {module: index for index, row in enumerate(ROWS) for module in row}
    for name, tree in modules():
        if name == "__init__":
            continue
        assert name in row_of, f"{name} has no row"
        for imported in imports(tree):
            assert row_of[imported] <= row_of[name], f"{name} imports {imported} from below"


def test_upper_rows_import_without_torch():
    names = ", ".join(f"agent_r1.{name}" for name in sorted(WITHOUT_TORCH))
    code = f"import agent_r1, {names}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_exist():
    import agent_r1

    for name in agent_r1.__all__:
        assert getattr(agent_r1, name) is not None
    assert set(agent_r1.__all__) <= set(dir(agent_r1))
