"""How well a processor is used: passes of sampling, and products beside another busy program.

    python benchmarks/processor.py --out benchmarks/results/processor.json

decode      milliseconds of a pass of SmolLM2-135M with 1 to 64 sequences of 40 tokens, sampled from
            copies of the weights and from the weights themselves, in turn, and of its matrix
            products alone; reading all weights once
bf16        the same passes, the loss and gradients of 1,024 tokens, and a large product, with
            ``model.matmul = "bf16"`` and without, in turn; where the processor has units for it
neighbour   products of 16 rows with two threads, alone and beside a program that does the same with
            OpenMP's default, which spins while it waits; with threads that spin, and that sleep

Ten minutes on two cores (``--parts`` chooses). Let nothing else run. Seconds depend on the machine,
so compare ratios.
"""

import argparse
import asyncio
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
COUNTS = (1, 4, 8, 16, 32, 64)
POLICIES = ("default", "passive")
PRODUCTS = """
import sys, time, torch
weights, rows, end = [torch.randn(1536, 576) for _ in range(100)], torch.randn(16, 576), time.time()
end += float(sys.argv[1]); start = time.perf_counter(); number = 0
while time.time() < end:
    for weight in weights:
        torch.nn.functional.silu(torch.nn.functional.linear(rows, weight))
    number += 100
print((time.perf_counter() - start) / number * 1e6)
"""


def decode(runs: int) -> dict[str, Any]:
    """Medians of passes, and of the ratio of two neighbouring measurements."""
    import torch
    from token_tree import SMOLLM2, clock, load

    from agent_r1.model import sampling_weights

    policy, smallest = load(SMOLLM2), sampling_weights.MIN_BYTES
    weights = [parameter.detach() for parameter in policy.model.parameters()]
    found: dict[str, Any] = {
        "reading_the_weights_ms": 1e3 * clock(lambda: [w.sum() for w in weights]),
        "threads": torch.get_num_threads(),
        "milliseconds": {},
    }
    for count in COUNTS:
        times: dict[str, list[float]] = {"copies": [], "weights": []}
        for _ in range(runs):
            for name, least in (("copies", smallest), ("weights", 2**62)):
                sampling_weights.MIN_BYTES = least
                times[name].append(_pass(policy, count))
        sampling_weights.MIN_BYTES = smallest
        pairs = zip(times["copies"], times["weights"], strict=True)
        ratios = [with_copies / without for with_copies, without in pairs]
        found["milliseconds"][count] = {
            **{name: round(statistics.median(values), 1) for name, values in times.items()},
            "products alone": round(_products(policy, count), 1),
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
        }
    return found


def _pass(policy: Any, count: int) -> float:
    """Milliseconds of a pass with so many sequences, after a warm-up."""
    from agent_r1.rollout.engine import Sampling
    from agent_r1.rollout.native.engine import NativeEngine

    async def sample(tokens: int) -> dict[str, float]:
        engine = NativeEngine(NativeEngine.Settings(), policy)
        sessions = [engine.session(number) for number in range(count)]
        await asyncio.gather(
            *(
                session.generate([1, 5 + number, *range(100, 138)], Sampling(tokens, ()), number)
                for number, session in enumerate(sessions)
            )
        )
        figures = engine.report()
        for session in sessions:
            session.close()
        return figures

    asyncio.run(sample(3))
    begun, whole = asyncio.run(sample(1)), asyncio.run(sample(31))  # entering costs more
    seconds = whole["model_seconds"] - begun["model_seconds"]
    return 1e3 * seconds / (whole["passes"] - begun["passes"])


def _products(policy: Any, count: int) -> float:
    """Milliseconds of a pass's matrix products alone, with the copies."""
    import torch
    from token_tree import clock

    from agent_r1.model.sampling_weights import SamplingWeights

    copies = SamplingWeights(policy)
    assert copies._layers
    layers = [m for m in policy.model.modules() if isinstance(m, torch.nn.Linear)]
    rows = {m.in_features: torch.randn(count, m.in_features) for m in layers}
    with copies.used(), torch.inference_mode():
        return 1e3 * clock(lambda: [m(rows[m.in_features]) for m in layers])


def bf16(runs: int) -> dict[str, Any] | str:
    """Medians with exact and with rounded products."""
    import torch
    from token_tree import SMOLLM2, clock, load

    from agent_r1.model.products import are_of_use, set_products
    from agent_r1.model.settings import ModelSettings

    policy = load(SMOLLM2)
    if not are_of_use(policy.device):
        return "this processor has no matrix units for it"
    square, ids = torch.randn(2048, 2048), torch.arange(1024)[None]

    def update() -> None:
        policy.model.zero_grad()
        policy.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    measured = {
        "gflops": lambda: 2 * 2048**3 / clock(lambda: square @ square) / 1e9,
        "loss and gradients, seconds": lambda: clock(update),
        **{f"pass of {n}, ms": functools.partial(_pass, policy, n) for n in (1, 16, 64)},
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in measured}
    for _ in range(runs):
        for matmul in (None, "bf16"):
            set_products(ModelSettings(matmul=matmul), policy.device)
            for name, measure in measured.items():
                found[name].setdefault(matmul or "float32", []).append(measure())
    set_products(ModelSettings(), policy.device)
    return {
        name: {matmul: statistics.median(values) for matmul, values in by.items()}
        for name, by in found.items()
    }


def neighbour(runs: int) -> dict[str, Any]:
    """Microseconds of a product: medians."""

    def start(seconds: float, policy: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        if policy != "default":
            environment["OMP_WAIT_POLICY"] = policy
        command = [sys.executable, "-c", PRODUCTS, str(seconds)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    found: dict[str, list[float]] = {}
    for _ in range(runs):
        for policy in POLICIES:
            alone = start(4, policy)
            found.setdefault(f"{policy}, alone", []).append(float(alone.communicate()[0]))
            other = start(14, "default")
            time.sleep(5)
            beside = start(4, policy)
            found.setdefault(f"{policy}, beside", []).append(float(beside.communicate()[0]))
            other.communicate()
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    times = {p: round(medians[f"{p}, beside"] / medians[f"{p}, alone"], 2) for p in POLICIES}
    return {"microseconds": medians, "times_as_long_beside": times}


def main() -> None:
    import agent_r1  # noqa: F401  # sets how OpenMP waits, before torch is loaded

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parts = {part.__name__: part for part in (neighbour, decode, bf16)}
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts])
    arguments = parser.parse_args()
    from first_light import machine
    from peers.compare import commit

    out = arguments.out
    report = json.loads(out.read_text()) if out.exists() else {}  # other parts are kept
    report["machine"] = machine()
    for name in arguments.parts:
        report[name] = parts[name](arguments.runs)
        report.setdefault("commits", {})[name] = commit()
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
