"""SGLang as the engine. Its server has an environment of its own (``agent-r1 engine install
sglang``), and needs a GPU.

Written for SGLang 0.5.23 by its published interface: ``/generate`` takes and gives tokens, with the
version of the weights behind each. A request's seed holds with deterministic inference alone.
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
    ServerFaultError,
    Wire,
    load_adapter,
)

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy

ADAPTERS = "--enable-lora --max-lora-rank RANK --lora-target-modules all"


class SGLangWire:
    """See ``wire.Wire``."""

    cures: Mapping[str, str] = {
        "logprobs": "without the environment variable SGLANG_RETURN_ORIGINAL_LOGPROB",
        "truncation": "--sampling-defaults openai",
        "dtype": "--dtype",
        "longest": "--context-length",
        "model": "--model-path",
        "sampling": "its version, at least 0.5.23",
        "seed": "--enable-deterministic-inference",
        "version": "its version, at least 0.5.23",
    }

    async def generate(
        self, caller: Caller, prefix: Sequence[int], sampling: Sampling, seed: int, *, session: str
    ) -> Answer:
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "sampling_seed": seed & 0x7FFFFFFF,  # 32 bits with a sign
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "stop": list(sampling.stop_strings),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "ignore_eos": True,  # only what we name ends an action
        }
        name = caller.model
        body = {"input_ids": list(prefix), "sampling_params": parameters, "return_logprob": True}
        if name != MODEL:
            body["lora_path"] = name
        said = await caller.sample("/generate", body, session=session)
        told = said["meta_info"]
        spans = told.get("weight_versions")
        if name != MODEL:  # these are of the model below it, which stays; an adapter samples on
            spans = [{"version": name, "start": 0, "end": len(said["output_ids"])}]
        if spans is None:
            raise ServerFaultError("it does not tell which weights sampled a token")
        entries = told["output_token_logprobs"]
        if [entry[1] for entry in entries] != said["output_ids"]:
            raise ServerFaultError("its log-probabilities are of other tokens")
        return Answer(
            tuple(said["output_ids"]),
            tuple(entry[0] for entry in entries),
            tuple((span["version"], span["start"], span["end"]) for span in spans),
            told["finish_reason"]["type"],
        )

    async def load(self, caller: Caller, folder: Path, version: str) -> None:
        if (folder / "adapter_config.json").exists():
            return await load_adapter(caller, "", folder, version, cure=ADAPTERS)

        async def say(path: str, body: Any, seconds: float = CONTROL_SECONDS) -> Any:
            return await caller.post(path, body, seconds=seconds)

        # Running requests go back to the queue, so that what is cached of them is forgotten, too.
        await say("/pause_generation", {"mode": "retract"})
        # Should the next call fail, nobody takes what is sampled for known weights.
        await say("/update_weight_version", {"new_version": f"{version}, not loaded"})
        update = {"model_path": str(folder), "weight_version": version, "flush_cache": True}
        said = await say("/update_weights_from_disk", update, LOAD_SECONDS)
        if not said["success"]:
            raise ServerFaultError(f"{NOT_LOADED} {said.get('message')}")
        await say("/continue_generation", {})

    async def facts(self, caller: Caller) -> Facts:
        said = await caller.get("/get_server_info", seconds=CONTROL_SECONDS)
        dtype = said.get("dtype")
        return Facts(said.get("context_length"), None if dtype == "auto" else dtype)


class SGLangEngine(RemoteEngine):
    """See the module's docstring."""

    class Settings(RemoteSettings):
        name: str = "sglang"

    wire: ClassVar[Wire] = SGLangWire()
    memory_option = "--mem-fraction-static"
    packages = Packages("sglang", gpu=("sglang[all]==0.5.23",))

    @classmethod
    def command(
        cls, python: str, folder: Path, *, port: int, longest: int | None, like: Policy
    ) -> list[str]:
        more = [] if longest is None else ["--context-length", str(longest)]
        dtype = str(like.base.dtype).removeprefix("torch.")
        if like.has_adapter:
            config: Any = like.model.peft_config["default"]
            more += ["--enable-lora", "--max-lora-rank", str(config.r)]
            more += ["--lora-target-modules", "all", "--max-loras-per-batch", "2"]
        return [
            *(python, "-m", "sglang.launch_server", "--model-path", str(folder)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, *more),
            *("--sampling-defaults", "openai", "--enable-deterministic-inference"),
        ]

    @classmethod
    def environment(cls) -> dict[str, str]:
        return {**os.environ, "HF_HUB_OFFLINE": "1"}
