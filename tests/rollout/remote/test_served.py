"""The engine ``vllm`` against `agent-r1 engine serve`: two real processes and a real model."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

import agent_r1
from agent_r1.cli import main
from agent_r1.model import load
from agent_r1.model.settings import ModelSettings
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.remote.vllm import VLLMEngine
from agent_r1.rollout.remote.weights import WeightFolders
from agent_r1.run.trajectories import read_groups
from agent_r1.types import VersionSpan
from tests.rollout.remote.policies import (
    adapted,
    changed,
    check,
    played,
    sampled_across,
    sampled_by_each,
)

PROMPT = list(range(5, 60))
SHORT = Sampling(40, (), temperature=0.8)
LONG = Sampling(600, (), temperature=0.8)


class OwnEngine(VLLMEngine):
    """Starts servers of the native engine, as the engine ``vllm`` starts those of vLLM."""

    @classmethod
    def command(cls, python, folder, *, port, longest, like):
        start = [python, "-m", "agent_r1.cli", "engine", "serve", str(folder)]
        return [*start, "--port", str(port)]

    @classmethod
    def environment(cls):
        return {**os.environ}


async def sampled_some(engine):
    """Waits until a server is at work."""
    await asyncio.sleep(0.3)


def test_weights_change_under_a_running_action(served, base_policy):
    engine = VLLMEngine(VLLMEngine.Settings(urls=(served,)), base_policy)

    async def scenario(engine):
        before = await engine.session().generate(PROMPT, SHORT, 7)
        session = engine.session()
        across, given = await sampled_across(engine, PROMPT, LONG, [base_policy, changed(1.02)])
        longer = [*PROMPT, *across.token_ids, 9, 10]
        after = await session.generate(longer, SHORT, 9)
        again = await session.generate(PROMPT, SHORT, 7)  # whose beginning was cached
        session.close()
        return [(PROMPT, before), (longer, after), (PROMPT, again)], given, engine.report()

    actions, given, report = played(engine, scenario)
    for prefix, action in actions:
        check(given, prefix, action, 0.8)
    newest = len(given) - 1
    assert [[s.version for s in a.versions] for _, a in actions] == [[0], [newest], [newest]]
    assert report["requests"] == 3 + newest and report["repeated"] == report["repairs"] == 0


def test_every_version_of_an_adapter_has_a_name_of_its_own(served):
    policies = adapted(4)
    engine = VLLMEngine(VLLMEngine.Settings(urls=(served,)), policies[0])
    found, figures, num_adapters = played(engine, sampled_by_each(policies))
    for action in found:
        check(policies, PROMPT, action, 0.8)
    assert [a.versions[0].version for a in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({action.token_ids for action in found}) == 4
    assert figures["repeated"] == 0 and num_adapters == 2


def test_an_action_ends_with_the_adapter_that_it_began_with(served):
    policies = adapted(2)
    engine = VLLMEngine(VLLMEngine.Settings(urls=(served,)), policies[0])

    async def scenario(engine):
        running = asyncio.ensure_future(engine.session().generate(PROMPT, LONG, 8))
        await asyncio.sleep(0.3)
        assert not running.done()
        await engine.sync(policies[1], 1)
        return await running, await engine.session().generate(PROMPT, SHORT, 9)

    old, new = played(engine, scenario)
    check(policies, PROMPT, old, 0.8)
    check(policies, PROMPT, new, 0.8)
    assert [old.versions, new.versions] == [(VersionSpan(0, 0, 600),), (VersionSpan(1, 0, 40),)]


def test_an_adapter_that_a_server_has_lost_is_given_again(served):
    """As when somebody started it again."""
    policies = adapted(1)
    engine = VLLMEngine(VLLMEngine.Settings(urls=(served,)), policies[0])

    async def scenario(engine):
        (server,) = engine._started.result()[0].servers
        lost = {"lora_name": server.adapters[0]}
        await server.post("/v1/unload_lora_adapter", lost, seconds=10)
        return await engine.session().generate(PROMPT, SHORT, 7), engine.report()

    action, figures = played(engine, scenario)
    check(policies, PROMPT, action, 0.8)
    assert figures["repairs"] == figures["repeated"] == 1


def test_one_seed_gives_one_action_and_stops_are_kept(served, base_policy):
    engine = VLLMEngine(VLLMEngine.Settings(urls=(served,)), base_policy)
    end = base_policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = base_policy.tokenizer.encode("Who is the mentor of Bana?", add_special_tokens=False)

    async def scenario(engine):
        ask = [engine.session().generate(text, Sampling(50, (end,)), seed) for seed in (3, 3, 4)]
        words = engine.session().generate(text, Sampling(50, (), stop_strings=("e",)), 5)
        return [*await asyncio.gather(*ask), await words]

    first, again, other, words = played(engine, scenario)
    assert first.token_ids == again.token_ids != other.token_ids
    for action in (first, again, other):
        assert (action.token_ids[-1] == end) == (action.stop == "stop")
        assert end not in action.token_ids[:-1]
    assert words.stop == "stop" and "e" in base_policy.tokenizer.decode(words.token_ids)


def test_a_run_of_its_own_is_as_with_the_native_engine(served, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small = ["--train.tasks", "4", "--train.attempts", "4", "--evaluation.tasks", "2"]
    more = ["--evaluation.every", "2", "--evaluation.test_tasks", "0", "--train.iterations", "2"]
    engine = ["--engine.name", "vllm", "--engine.urls", json.dumps([served])]
    assert main(["train", "hopworld", *small, *more, *engine, "--run", "r"]) == 0
    run = Path("r")
    assert json.loads((run / "recipe.json").read_text())["algorithm"]["importance_cap"] == 2.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for iteration, row in enumerate(rows[1:]):
        assert row["figures"]["logprob_error"] < 1e-4
        assert row["figures"]["entropy"] > 0.0
        assert row["figures"]["importance/outside"] == 0.0
        assert row["figures"]["importance/effective"] > 0.999
        assert row["engine"]["requests"] > 16 and row["engine"]["repeated"] == 0
        file = run / "trajectories" / f"{iteration + 1:06d}.jsonl.gz"
        steps = [s for group, _ in read_groups(file) for _, s in group.steps()]
        for step in steps:
            assert step.action.versions == (VersionSpan(iteration, 0, len(step.action.token_ids)),)
    assert [path.name for path in tmp_path.glob("agent-r1-engine-*")] == []
    # A run goes on with any server: it gets the run's weights, whatever it had.
    assert main(["train", "--resume", "r", "--train.iterations", "3"]) == 0


def test_weights_that_could_not_be_written_choose_no_best_checkpoint(
    served, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    write = WeightFolders.write

    async def full(folders, policy, version):
        if version == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        await write(folders, policy, version)

    monkeypatch.setattr(WeightFolders, "write", full)
    overrides = {
        "train": {"tasks": 2, "attempts": 2, "iterations": 2},
        "evaluation": {"tasks": 2, "every": 1, "test_tasks": 0},
        "engine": {"name": "vllm", "urls": [served]},
    }
    result = agent_r1.train("hopworld", run="r", overrides=overrides)
    first, second = result.metrics[1:]
    assert first["engine"]["failed_syncs"] >= 1
    assert "the engine had the weights of iteration 0 in this validation" in caplog.text
    assert "No space left on device" in caplog.text
    file = tmp_path / "r/trajectories/000002.jsonl.gz"
    steps = [step for group, _ in read_groups(file) for _, step in group.steps()]
    assert {span.version for s in steps for span in s.action.versions} == {0}
    assert second["figures"]["updates"] + second["figures"]["updates_skipped"] >= 0


def test_check_starts_the_engine_and_proves_it(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    engine = ["--engine.name", "vllm", "--engine.urls", json.dumps([served])]
    assert main(["check", "hopworld", *engine]) == 0
    assert "ok: engine 'vllm' samples what the learner computes" in capsys.readouterr().out
    assert main(["check", "hopworld", *engine, "--limits.tokens", "5000"]) == 2
    assert "--max-model-len 5000" in capsys.readouterr().err


def test_a_killed_server_is_started_again_and_its_actions_are_asked_for_again(base_policy):
    policies = [base_policy, changed(1.02)]
    engine = OwnEngine(OwnEngine.Settings(python=sys.executable, gpus=("", "")), base_policy)

    async def scenario(engine):
        fleet, folders = engine._started.result()
        ours = [server.process._keeper.pid for server in fleet.servers]
        await engine.sync(policies[1], 1)
        sessions = [engine.session(number) for number in range(4)]
        running = [
            asyncio.ensure_future(session.generate(PROMPT, LONG, seed))
            for seed, session in enumerate(sessions)
        ]
        await sampled_some(engine)
        assert [server.load for server in fleet.servers] == [2, 2]
        (child,) = psutil.Process(ours[0]).children()
        child.send_signal(signal.SIGKILL)
        actions = await asyncio.gather(*running)
        while fleet.num_repairs == 0:
            await engine.session().generate(PROMPT, Sampling(1, ()), 0)
        assert all(server.is_ready for server in fleet.servers)
        assert not child.is_running()
        fresh = await asyncio.gather(
            *(engine.session().generate(PROMPT, Sampling(20, ()), 1) for _ in range(2))
        )
        keepers = [psutil.Process(server.process._keeper.pid) for server in fleet.servers]
        left = [*keepers, *(child for keeper in keepers for child in keeper.children())]
        return actions, fresh, folders.folder, left

    actions, fresh, folder, processes = played(engine, scenario)
    for action in actions:
        check(policies, PROMPT, action, 0.8)
        assert [span.version for span in action.versions] == [1]
    for action in fresh:  # one of them by the new server, with the present weights
        check(policies, PROMPT, action)
        assert [span.version for span in action.versions] == [1]
    assert fresh[0].token_ids == fresh[1].token_ids
    assert not folder.exists()
    assert len(processes) == 4 and psutil.wait_procs(processes, timeout=10)[1] == []


def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    """Also when that one is killed and can do nothing any more."""
    code = """
import pathlib, sys, time
from agent_r1.rollout.remote.server import OwnProcess
command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
process = OwnProcess(command, {}, pathlib.Path("log"))
while "begun" not in process.tail():
    time.sleep(0.05)
print(process._keeper.pid, flush=True)
time.sleep(600)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    keeper = psutil.Process(int(holder.stdout.readline()))
    left = [keeper, *keeper.children()]
    assert len(left) == 2
    holder.kill()
    holder.wait()
    _, alive = psutil.wait_procs(left, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_server_that_does_not_start_says_why(base_policy):
    class Broken(OwnEngine):
        @classmethod
        def command(cls, python, folder, *, port, longest, like):
            return [python, "-c", "raise SystemExit('no such card')"]

    engine = Broken(Broken.Settings(python=sys.executable), base_policy)
    with pytest.raises(agent_r1.ConfigError, match=r"ended with code 1(.|\n)*no such card"):
        played(engine, sampled_some)


def test_what_must_be_there_is_asked_for_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(agent_r1.ConfigError, match="agent-r1 engine install vllm"):
        agent_r1.train("hopworld", run="r", overrides={"engine.name": "vllm"})
    slow = {"engine.name": "vllm", "engine.urls": ["http://127.0.0.1:1"], "engine.timeout": 300.0}
    with pytest.raises(agent_r1.ConfigError, match=r"limits\.seconds = 300"):
        agent_r1.train("hopworld", run="r", overrides=slow)


def test_a_server_beside_the_learner_must_be_told_its_share_of_the_gpu(monkeypatch):
    monkeypatch.setattr(load, "device_of", lambda model: torch.device("cuda"))
    alone = VLLMEngine.Settings(python=sys.executable)
    with pytest.raises(agent_r1.ConfigError, match="--gpu-memory-utilization"):
        VLLMEngine.must_serve(alone, ModelSettings())
    for more in ({"gpus": ("1",)}, {"options": ("--gpu-memory-utilization=0.4",)}):
        VLLMEngine.must_serve(alone.model_copy(update=more), ModelSettings())
