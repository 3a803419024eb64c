"""The forced workload's rollout alone by a real vLLM server on the CPU; prints one line of JSON.

    python benchmarks/peers/vllm_side.py --model FOLDER --shape long-tailed --vllm-venv FOLDER

Prefix cache on, all episodes at once. A server cannot be told which tokens to draw, so it draws as
many as the workload has (``ignore_eos``), and the workload's stand in the next turn's context.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import workload

START_SECONDS = 300
SCHEMA = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the document collection and return the best passages.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look for."}},
            "required": ["query"],
        },
    },
}
OPEN = "<|im_start|>assistant\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def served(venv: Path, model: str, dtype: str, log: Any) -> Iterator[str]:
    """A server's address, as soon as it answers."""
    port = free_port()
    command = [
        *(str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", "policy", "--generation-config", "vllm"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", dtype),
        *("--max-model-len", "4096", "--enable-scale-out", "--enforce-eager"),
        *("--logprobs-mode", "processed_logprobs"),
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "WARNING"}
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(START_SECONDS):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                if server.poll() is not None:
                    break
                time.sleep(1)
        if server.poll() is not None:
            raise RuntimeError("the server ended")
        yield address
    finally:
        server.terminate()
        server.wait(60)


def sampled(address: str, context: list[int], count: int, seed: int) -> int:
    """How many tokens the server sampled after a context."""
    sampling = {"temperature": 1.0, "seed": seed, "max_tokens": count, "logprobs": 0}
    sampling |= {"ignore_eos": True, "detokenize": False}
    asked = {"model": "policy", "token_ids": context, "sampling_params": sampling}
    request = urllib.request.Request(
        f"{address}/inference/v1/generate",
        json.dumps(asked).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=3600) as answer:
        return len(json.load(answer)["choices"][0]["token_ids"])


def rollout(address: str, tokenizer: Any, work: workload.Workload) -> int:
    """Plays all episodes at once; the number of tokens sampled."""

    def play(key: tuple[int, int]) -> int:
        system, user = (message["content"] for message in work.prompts[key[0]])
        context = workload.encode(
            tokenizer,
            f"<|im_start|>system\n{system}\n{json.dumps(SCHEMA)}<|im_end|>\n"
            f"<|im_start|>user\n{user}<|im_end|>\n{OPEN}",
        )
        count = 0
        for action, answer in work.episodes[key]:
            count += sampled(address, context, len(action), 100 * key[0] + key[1])
            context = context + action
            if answer is not None:
                shown = f"<tool_response>\n{answer}\n</tool_response>"
                context += workload.encode(
                    tokenizer, f"\n<|im_start|>user\n{shown}<|im_end|>\n{OPEN}"
                )
        return count

    with concurrent.futures.ThreadPoolExecutor(len(work.episodes)) as pool:
        return sum(pool.map(play, work.episodes))


def measure(model: str, shape: str, venv: Path, dtype: str, log: Any) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    work = workload.make(tokenizer, workload.SHAPES[shape])
    asked = (  # the build for the CPU has a name of its own
        "from importlib.metadata import distributions as d; "
        "print(*{x.version for x in d() if x.name in ('vllm', 'vllm-cpu')})"
    )
    version = subprocess.check_output([venv / "bin" / "python", "-c", asked], text=True)
    with served(venv, model, dtype, log) as address:
        sampled(address, workload.encode(tokenizer, "warm up " * 30), 8, 0)
        start = time.perf_counter()
        count = rollout(address, tokenizer, work)
        seconds = time.perf_counter() - start
    counts = work.counts()
    if count != counts["action_tokens"]:
        raise RuntimeError(f"{count} tokens sampled, not {counts['action_tokens']}")
    return {
        "workload": counts,
        "seconds": {"rollout": seconds},
        "versions": {"vllm": version.strip()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--shape", choices=workload.SHAPES, default="long-tailed")
    parser.add_argument("--vllm-venv", type=Path, required=True, help="an environment with vLLM")
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()
    dtype = "bfloat16" if given.bf16 else "float32"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    with tempfile.TemporaryFile("w+") as log:
        try:
            result = measure(given.model, given.shape, given.vllm_venv, dtype, log)
        except Exception as error:
            log.seek(0)
            raise SystemExit(f"{log.read()[-3000:]}\n{error!r}") from error
    print(json.dumps(result))


if __name__ == "__main__":
    main()
