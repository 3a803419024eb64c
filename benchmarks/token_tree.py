"""What the token tree saves: engine and learner on SmolLM2-135M, with memory beside each figure.

    python benchmarks/token_tree.py --data FOLDER --out benchmarks/results/token_tree.json

``FOLDER`` holds HotpotQA as ``multihop-smollm2`` wants it. Each part runs in a process of its own,
so that its peak of memory is its own; seconds depend on the machine, which the file names, so
compare ratios.

iteration   one iteration of 2 tasks x 8 attempts on multi-hop questions, by ``agent-r1 train``
learner     the same workload's update: tokens with and without the tree, share of the matmul peak
decode      1, 16 and 64 long-tailed episodes, against a loop of Hugging Face's ``generate``
tick        where the time of one pass goes, for the tiny base and for SmolLM2
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
SMOLLM2 = "smollm2-135m"


def clock(function: Any, *, runs: int = 3) -> float:
    """Fewest seconds of several calls."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def load(name: str) -> Any:
    from agent_r1.model.load import load_policy
    from agent_r1.model.settings import ModelSettings

    return load_policy(ModelSettings(path=name, device="cpu"))


# iteration ----------------------------------------------------------------------------------------


def iteration(data: Path) -> dict[str, Any]:
    """By the command line, so that another checkout can be measured in the same way."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "agent_r1.cli", "train", "multihop-smollm2"]
        options = {
            "env.path": data.resolve(),
            "train.tasks": 2,
            "train.iterations": 1,
            "evaluation.every": 0,
            "threads": os.cpu_count(),
        }
        arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        subprocess.run([*command, "--run", str(run), *arguments], check=True)
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    seconds, figures = row["seconds"], row["figures"]
    return {
        "rollout_seconds": seconds["rollout"],
        "learner_seconds": seconds["learner"],
        "tokens_per_second": row["tokens_per_second"],
        "engine": row.get("engine"),
        "logprob_error": figures["logprob_error"],
        "turns": figures["turns"],
    }


# A workload: who says how much, in how many turns -------------------------------------------------


def workload(num_episodes: int, vocabulary: int) -> list[list[tuple[list[int], int]]]:
    """Episodes as turns of (new tokens before the action, length of the action).

    Groups of 8 share their prompt, all share the system prompt; turns and lengths have long tails.
    """
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(100, vocabulary) for _ in range(count)]

    system = ids(300)
    episodes = []
    for number in range(num_episodes):
        if number % 8 == 0:
            question = ids(rng.randint(20, 50))
        turns = 1 + min(5, int(rng.expovariate(1 / 1.4)))
        before = [system + question, *(ids(rng.randint(40, 160)) for _ in range(turns - 1))]
        lengths = [min(256, 8 + int(rng.lognormvariate(3.5, 0.9))) for _ in range(turns)]
        episodes.append(list(zip(before, lengths, strict=True)))
    return episodes


def groups_of(episodes: Any) -> Any:
    """The workload as scored groups with an advantage for each attempt, for the learner."""
    from agent_r1.types import (
        Action,
        Estimates,
        Group,
        Message,
        Outcome,
        Step,
        StopReason,
        Task,
        Trajectory,
    )

    rng = random.Random(1)
    groups, known = [], Estimates()
    for start in range(0, len(episodes), 8):
        trajectories: list[Trajectory] = []
        advantages: list[float] = []
        for attempt, turns in enumerate(episodes[start : start + 8]):
            advantage, steps = rng.uniform(-1, 1), []
            for index, (_, length) in enumerate(turns):
                ids = tuple(rng.randrange(100, 40_000) for _ in range(length))
                action = Action(ids, (-10.0,) * length, (1.0,) * length, (), "stop")
                observation = tuple(turns[index + 1][0]) if index + 1 < len(turns) else ()
                steps.append(Step(action, Message("assistant", ""), observation_ids=observation))
            advantages.append(advantage)
            prompt = tuple(turns[0][0])
            outcome = Outcome(0.0, False)
            trajectories.append(
                Trajectory("t", "", attempt, (), prompt, steps, StopReason.DONE, outcome)
            )
        group = Group(Task("t", "?"), trajectories, len(groups))
        for key, step in group.steps():
            known.advantages[key] = (advantages[key.attempt],) * len(step.action.token_ids)
        groups.append(group)
    return groups, known


# learner ------------------------------------------------------------------------------------------


def learner(path: str) -> dict[str, Any]:
    """One update of 32 long-tailed episodes: packed trees, or padded rows."""
    import torch

    from agent_r1.algorithms.grpo import GRPO
    from agent_r1.learner.learner import Learner
    from agent_r1.learner.packed_trees import packs
    from agent_r1.learner.padded_rows import rows
    from agent_r1.learner.settings import LearnerSettings

    policy = load(SMOLLM2)
    groups, known = groups_of(workload(32, policy.base.config.vocab_size))
    algorithm = GRPO(GRPO.Settings())
    learner = Learner(policy, algorithm, LearnerSettings(), temperature=1.0)
    learner.cut = packs if path == "packed" else rows
    if path == "padded":
        learner.policy.unpackable = "measured as if it were"
        learner.micro_batch_tokens = 2048
    update = None

    def once() -> None:
        nonlocal update
        update = learner.update(groups, known, lr=1e-9, seed=0)

    seconds = clock(once, runs=2)
    trajectories = [t for g in groups for t in g.trajectories]
    cut = list(learner.cut(groups, max_tokens=learner.micro_batch_tokens, device=policy.device))
    result: dict[str, Any] = {
        "seconds": seconds,
        "episodes": len(trajectories),
        "turns": sum(len(t.steps) for t in trajectories),
        "action_tokens": sum(t.num_action_tokens for t in trajectories),
        "tokens_as_separate_sequences": sum(t.num_tokens for t in trajectories),
        "tokens_run": update.num_tokens,
        "micro_batches": len(cut),
        "grad_norm": update.grad_norm,
    }
    if path == "padded":
        result["tokens_run_with_padding"] = sum(part.token_ids.numel() for part in cut)
        return result
    flops = sum(pack_flops(policy.base.config, pack) for pack in cut)
    tokens = [pack.num_tokens for pack in cut]
    peak = matmul_peak(policy.base, max(tokens), max(len(p.predictors) for p in cut))
    result |= {
        "useful_tera_flop": flops / 1e12,
        "giga_flop_per_second": flops / seconds / 1e9,
        "matmul_peak_giga_flop_per_second": peak / 1e9,
        "share_of_peak": flops / seconds / peak,
        "threads": torch.get_num_threads(),
    }
    return result


def linear_shapes(model: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of each linear layer below the output layer."""
    import torch

    layers = model.get_decoder().modules()
    return [(m.in_features, m.out_features) for m in layers if isinstance(m, torch.nn.Linear)]


def pack_flops(config: Any, pack: Any) -> float:
    """Multiplications and additions of forward and backward that nothing could leave out: linear
    layers, computed logits, and attention to visible keys; nothing that is computed twice.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(a * b for a, b in linear_shapes(model))
    logits = len(pack.predictors) * config.vocab_size * config.hidden_size
    pairs = 0
    for part in pack.tree.parts(None):
        queries, keys = part.q1 - part.q0, part.k1 - part.k0
        pairs += queries * (queries + 1) // 2 if part.causal else queries * keys
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 2 * pairs * width * config.num_hidden_layers
    return 3.0 * 2 * (pack.num_tokens * weights + logits + attention)


def matmul_peak(model: Any, num_tokens: int, num_logits: int) -> float:
    """Operations per second of the model's own matrix products, forward and both gradients."""
    import torch

    shapes = [(num_tokens, *shape) for shape in linear_shapes(model)]
    head = model.get_output_embeddings()
    shapes.append((num_logits, head.in_features, head.out_features))
    times: dict[tuple[int, int, int], float] = {}
    for rows, inputs, outputs in set(shapes):
        x, w, g = (torch.randn(*s) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))

        def products(x: Any = x, w: Any = w, g: Any = g) -> None:
            torch.nn.functional.linear(x, w)
            g @ w
            g.t() @ x

        products()
        times[rows, inputs, outputs] = clock(products)
    operations = sum(6.0 * a * b * c for a, b, c in shapes)
    return operations / sum(times[shape] for shape in shapes)


# decode -------------------------------------------------------------------------------------------


def decode(num_episodes: int, engine: str) -> dict[str, Any]:
    """The whole workload, rollout alone: what a token costs, prefills included."""
    policy = load(SMOLLM2)
    episodes = workload(num_episodes, policy.base.config.vocab_size)
    actions = sum(length for turns in episodes for _, length in turns)
    play = _ours if engine == "ours" else _generate
    warm_up = [[(turns[0][0][:20], 2)] for turns in episodes[:2]]
    play(policy, warm_up)
    start = time.perf_counter()
    prefilled = play(policy, episodes)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "turns": sum(map(len, episodes)),
        "action_tokens": actions,
        "action_tokens_per_second": actions / seconds,
        "prefilled_tokens": prefilled,
    }


def _ours(policy: Any, episodes: Any) -> int:
    from agent_r1.rollout.engine import Sampling
    from agent_r1.rollout.native.engine import NativeEngine

    engine = NativeEngine(NativeEngine.Settings(), policy)

    async def episode(number: int, session: Any) -> None:
        prefix: list[int] = []
        for turn, (before, length) in enumerate(episodes[number]):
            sampling = Sampling(max_tokens=length, stop_token_ids=())
            action = await session.generate(prefix + before, sampling, 1000 * number + turn)
            prefix += [*before, *action.token_ids]
        session.close()

    async def everything() -> None:
        sessions = [engine.session(number) for number in range(len(episodes))]
        await asyncio.gather(*(episode(n, session) for n, session in enumerate(sessions)))

    asyncio.run(everything())
    return int(engine.report()["prefilled"])


def _generate(policy: Any, episodes: Any) -> int:
    """All episodes in one batch, turn by turn, padded on the left, as ``generate`` wants it."""
    import torch

    prefixes: list[list[int]] = [[] for _ in episodes]
    prefilled = 0
    for turn in range(max(map(len, episodes))):
        active = [n for n, turns in enumerate(episodes) if turn < len(turns)]
        for n in active:
            prefixes[n] += episodes[n][turn][0]
        longest = max(len(prefixes[n]) for n in active)
        ids = torch.zeros(len(active), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, n in enumerate(active):
            ids[row, longest - len(prefixes[n]) :] = torch.tensor(prefixes[n])
            mask[row, longest - len(prefixes[n]) :] = 1
        prefilled += ids.numel()
        with torch.inference_mode():
            out = policy.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(episodes[n][turn][1] for n in active),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )
        for row, n in enumerate(active):
            prefixes[n] += out[row, longest : longest + episodes[n][turn][1]].tolist()
    return prefilled


# tick ---------------------------------------------------------------------------------------------


def tick(name: str, num_episodes: int) -> dict[str, Any]:
    """Milliseconds of a pass in which every episode samples a token, by what takes them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from agent_r1.rollout.engine import Sampling
    from agent_r1.rollout.native.engine import NativeEngine

    policy = load(name)
    num_passes = 60

    async def passes() -> None:
        engine = NativeEngine(NativeEngine.Settings(), policy)
        sessions = [engine.session(number) for number in range(num_episodes)]
        sampling = Sampling(max_tokens=num_passes, stop_token_ids=())
        prompt = [3 + i % 200 for i in range(150)]
        await asyncio.gather(*(s.generate(prompt, sampling, s.number) for s in sessions))

    asyncio.run(passes())
    plain = clock(lambda: asyncio.run(passes()))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        asyncio.run(passes())
    kinds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        kinds[_kind(event.key)] += event.self_cpu_time_total / 1e3 / num_passes
    in_kernels = sum(kinds.values())
    total = 1e3 * plain / num_passes
    kinds = {kind: round(value, 3) for kind, value in kinds.items()}
    return {
        "milliseconds": total,
        "tokens_per_second": 1e3 * num_episodes / total,
        **dict(kinds),
        "Python and dispatch": max(0.0, total - in_kernels),
        "threads": torch.get_num_threads(),
    }


def _kind(operation: str) -> str:
    if operation in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "matrix products"
    if "scaled_dot_product" in operation:
        return "attention kernels"
    if operation in ("aten::exp", "aten::logsumexp", "aten::cumsum", "aten::searchsorted"):
        return "sampling, in part"
    return "all other operations"


# All of it ----------------------------------------------------------------------------------------


def measured(part: str, *arguments: str, checkout: Path | None = None) -> dict[str, Any]:
    """A part in a process of its own, with its peak of memory."""
    print(f"{part} {' '.join(arguments)}", file=sys.stderr, flush=True)
    environment = {**os.environ, **({"PYTHONPATH": str(checkout)} if checkout else {})}
    with tempfile.NamedTemporaryFile("r") as out:
        command = [sys.executable, __file__, "--part", part, "--out", out.name, *arguments]
        process = subprocess.Popen(command, env=environment, cwd=checkout)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{part} {arguments} failed")
        result: dict[str, Any] = json.load(out)
    children = result.pop("peak_of_children_mib", 0.0)
    return {**result, "peak_memory_mib": max(usage.ru_maxrss / 1024, children)}


def everything(arguments: argparse.Namespace) -> None:
    """Measures the parts asked for; after each, the file holds what is known so far."""
    from first_light import machine

    out: Path = arguments.out
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    report["machine"] = machine()

    def note(part: str, key: str, result: Any) -> None:
        report.setdefault(part, {})[key] = result
        out.write_text(json.dumps(report, indent=2) + "\n")

    out.parent.mkdir(parents=True, exist_ok=True)
    if "iteration" in arguments.parts:
        if arguments.data is None:
            raise SystemExit("--data: a folder with HotpotQA is needed for the iteration")
        data = str(arguments.data.resolve())
        if arguments.before:
            old = arguments.before.resolve()
            note("iteration", "before", measured("iteration", "--data", data, checkout=old))
        note("iteration", "after", measured("iteration", "--data", data))
    if "learner" in arguments.parts:
        for path in ("packed", "padded"):
            note("learner", path, measured("learner", "--path", path))
    if "decode" in arguments.parts:
        for count in ("1", "16", "64"):
            both: dict[str, Any] = {}
            for engine in ("ours", "generate"):
                both[engine] = measured("decode", "--episodes", count, "--engine", engine)
            both["ratio"] = both["generate"]["seconds"] / both["ours"]["seconds"]
            note("decode", count, both)
    if "tick" in arguments.parts:
        for model in ("hopworld-base", SMOLLM2):
            for count in ("1", "64"):
                result = measured("tick", "--model", model, "--episodes", count)
                note("tick", f"{model}, {count} episodes", result)


PARTS = ("iteration", "learner", "decode", "tick")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with HotpotQA")
    parser.add_argument("--before", type=Path, help="an older checkout, for the iteration")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which to measure")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--path", default="packed")
    parser.add_argument("--engine", default="ours")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--model", default=SMOLLM2)
    arguments = parser.parse_args()
    result: dict[str, Any]
    if arguments.part == "iteration":
        import resource

        result = iteration(arguments.data)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result["peak_of_children_mib"] = peak / 1024
    elif arguments.part == "learner":
        result = learner(arguments.path)
    elif arguments.part == "decode":
        result = decode(arguments.episodes, arguments.engine)
    elif arguments.part == "tick":
        result = tick(arguments.model, arguments.episodes)
    else:
        everything(arguments)
        return
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
