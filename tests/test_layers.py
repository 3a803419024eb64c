"""The rooms of the package are in order: each imports only from rooms listed before it, no modules
import one another in a circle, and the rooms that need no torch do without it.
"""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests import ROOT

PACKAGE = ROOT / "agent_r1"
ROOMS = (
    "errors", "types", "tree", "utils", "config", "tools", "search", "render", "model",
    "algorithms", "envs", "learner", "rollout", "tasks", "gateway", "run", "training", "analysis",
    "api", "bench", "cli",
)  # fmt: skip
"""From the ground up."""
WITH_TORCH = (
    "algorithms.losses",
    "analysis.check_recipe",
    "api",
    "learner.learner",
    "learner.memory_plan",
    "learner.micro_batch",
    "learner.optimizer",
    "learner.packed_trees",
    "learner.padded_rows",
    "learner.importance",
    "learner.sums",
    "model.adapter",
    "model.attention_kernels",
    "model.flex_tree",
    "model.load",
    "model.logprobs",
    "model.places",
    "model.policy",
    "model.products",
    "model.sampling_weights",
    "model.tree_attention",
    "rollout.model_user",
    "rollout.native.decode_graph",
    "rollout.native.forward_pass",
    "rollout.native.kv_cache",
    "rollout.native.scheduler",
    "rollout.native.slot_cache",
    "rollout.native.slot_pass",
    "rollout.remote.serve",
    "rollout.sampling",
    "training.build",
    "training.metrics",
    "training.preflight",
    "training.trainer",
)
"""Modules that import torch; all others are light, so that a recipe is checked in a moment."""


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module):
    """Modules of ours that a module imports, inside functions too; not those for types alone."""
    todo = [ast.parse(MODULES[module].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agent_r1"):
            home = node.module.removeprefix("agent_r1").removeprefix(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else home
        todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {""}))
def test_a_room_imports_from_rooms_before_it(module):
    room = module.partition(".")[0]
    for imported in imports_of(module):
        if imported:  # the version stands in the package itself
            below = ROOMS.index(imported.partition(".")[0])
            assert below <= ROOMS.index(room), f"{module} imports {imported}"


def test_no_circle():
    graph = {m: {i for i in imports_of(m) if i and i != m} for m in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names it


def test_what_needs_no_torch_imports_without_it():
    light = [f"agent_r1.{name}" for name in sorted(MODULES) if name and name not in WITH_TORCH]
    code = f"import agent_r1, {', '.join(light)}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", WITH_TORCH)
def test_what_is_said_to_need_torch_is_there(module):
    assert module in MODULES


def test_the_public_names_exist():
    import agent_r1

    for name in agent_r1.__all__:
        assert getattr(agent_r1, name) is not None
    assert set(agent_r1.__all__) <= set(dir(agent_r1))
