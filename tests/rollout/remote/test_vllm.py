"""The engine ``vllm`` with a real vLLM server on the CPU (`agent-r1 engine install vllm --cpu`)."""

import asyncio
import json
import os
import signal
import subprocess

import psutil
import pytest

from agent_r1.cli import main
from agent_r1.errors import ConfigError
from agent_r1.model.load import load_tokenizer
from agent_r1.model.settings import ModelSettings
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.remote.server import free_port
from agent_r1.rollout.remote.vllm import VLLMEngine
from agent_r1.run.trajectories import read_groups
from tests.rollout.remote.conftest import wait_for
from tests.rollout.remote.policies import adapted, changed, check, played, sampled_by_each

pytestmark = pytest.mark.integration
PROMPT = list(range(5, 60))
SHORT = Sampling(40, (), temperature=0.8)
LONG = Sampling(1200, (), temperature=0.8)


def test_weights_change_and_the_server_is_killed_while_it_samples(base_policy):
    """What was cached of the prompt with old weights is not used either."""
    policies = [base_policy, changed(1.02), changed(0.98)]
    engine = VLLMEngine(VLLMEngine.Settings(), base_policy)

    async def scenario(engine):
        session, (server,) = engine.session(), engine._started.result()[0].servers
        found = [await session.generate(PROMPT, SHORT, 7)]
        running = [asyncio.ensure_future(session.generate(PROMPT, LONG, seed)) for seed in (8, 9)]
        await asyncio.sleep(1.0)
        await engine.sync(policies[1], 1)
        found += await asyncio.gather(*running)
        found.append(await session.generate(PROMPT, SHORT, 7))
        running = [asyncio.ensure_future(session.generate(PROMPT, LONG, seed)) for seed in (8, 9)]
        await asyncio.sleep(1.0)
        for child in psutil.Process(server.process._keeper.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        await engine.sync(policies[2], 2)
        found += await asyncio.gather(*running)
        keeper = psutil.Process(server.process._keeper.pid)
        return found, engine.report(), [keeper, *keeper.children(recursive=True)]

    found, figures, processes = played(engine, scenario, 2048)
    for action in found:
        check(policies, PROMPT, action, 0.8)
    versions = [[span.version for span in action.versions] for action in found]
    assert versions == [[0], [0, 1], [0, 1], [1], [2], [2]]
    assert figures["repairs"] == 1 and figures["repeated"] >= 2
    assert len(processes) >= 3 and psutil.wait_procs(processes, timeout=20)[1] == []


def test_every_version_of_an_adapter_has_a_name_of_its_own():
    """So that nothing that was cached with an old one is used."""
    policies = adapted(4)
    found, figures, num_adapters = played(
        VLLMEngine(VLLMEngine.Settings(), policies[0]), sampled_by_each(policies), 2048
    )
    for action in found:
        check(policies, PROMPT, action, 0.8)
    assert [a.versions[0].version for a in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({action.token_ids for action in found}) > 1
    assert figures["repeated"] == 0 and num_adapters == 2


def test_more_prompts_at_once_than_one_pass_computes(base_policy):
    """Computed in parts, they would end the server's process on a CPU."""

    async def scenario(engine):
        prompts = [[*PROMPT, *(5 + (i * k) % 700 for k in range(1, 300))] for i in range(1, 65)]
        found = await asyncio.gather(
            *(engine.session(i).generate(p, SHORT, i) for i, p in enumerate(prompts))
        )
        return [*zip(prompts, found, strict=True)], engine.report()

    engine = VLLMEngine(VLLMEngine.Settings(), base_policy)
    found, figures = played(engine, scenario, 1024)
    for prompt, action in found:
        check([base_policy], prompt, action, 0.8)
    assert figures["repeated"] == figures["repairs"] == 0


def test_a_run_with_vllm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--train.tasks", "4", "--train.attempts", "4", "--evaluation.tasks", "4"]
    more = ["--evaluation.test_tasks", "0", "--train.iterations", "2", "--engine.name", "vllm"]
    assert main(["train", "hopworld", *small, *more, "--run", "r"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    for iteration, row in enumerate(rows[1:]):
        assert row["figures"]["logprob_error"] < 1e-4
        file = tmp_path / "r/trajectories" / f"{iteration + 1:06d}.jsonl.gz"
        steps = [step for group, _ in read_groups(file) for _, step in group.steps()]
        assert {span.version for s in steps for span in s.action.versions} == {iteration}


@pytest.fixture
def started(base_policy, tmp_path):
    """Starts a server as somebody might who has not read how; the right options, then ``more``."""
    processes = []

    def start(*more, model=None, without=(), environment=None):
        policy_folder = tmp_path / "model"
        base_policy.save(policy_folder)
        python, port = VLLMEngine._python(VLLMEngine.Settings()), free_port()
        command = VLLMEngine.command(
            python, model or policy_folder, port=port, longest=2048, like=base_policy
        )
        for option in without:
            at = command.index(option)
            del command[at : at + 2]
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                [*command, *more],
                env={**VLLMEngine.environment(), **(environment or {})},
                stdout=log,
                stderr=log,
            )
        processes.append(process)
        wait_for(f"http://127.0.0.1:{port}", process, 300)
        return VLLMEngine(VLLMEngine.Settings(urls=(f"http://127.0.0.1:{port}",)), base_policy)

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)


def other_model(folder):
    """A model of another shape, with the same vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = load_tokenizer(ModelSettings())
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=2048,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SET_UPS = {
    "raw log-probabilities": (
        {"more": ["--logprobs-mode", "raw_logprobs"]},
        "--logprobs-mode processed_logprobs",
    ),
    "short context": ({"more": ["--max-model-len", "512"]}, "--max-model-len 2048"),
    "another number format": ({"more": ["--dtype", "bfloat16"]}, "--dtype float32"),
    "no control routes": ({"environment": {"VLLM_SERVER_DEV_MODE": "0"}}, "VLLM_SERVER_DEV_MODE=1"),
    "another model": ({"model": other_model}, "--model"),
}


@pytest.mark.parametrize("name", SET_UPS)
def test_a_wrong_set_up_is_refused_by_the_name_of_its_option(started, tmp_path, name):
    options, cure = SET_UPS[name]
    options = dict(options)
    if make := options.pop("model", None):
        options["model"] = make(tmp_path / "other")
    engine = started(*options.pop("more", ()), **options)
    with pytest.raises(ConfigError) as caught:
        played(engine, lambda engine: asyncio.sleep(0), 2048)
    assert cure in str(caught.value)
    assert os.environ.get("VLLM_SERVER_DEV_MODE") is None
