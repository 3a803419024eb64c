"""The comparison with peers (``make bench``): our side on a very small workload of forced tokens,
and the numbers and the print that the comparison makes of what the sides say.
"""

import importlib
import json
import subprocess
import sys

import pytest

from agent_r1.model.places import local_path
from tests import ROOT

PEERS = ROOT / "benchmarks" / "peers"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(PEERS)
    return importlib.import_module("compare")


@pytest.fixture
def workload(monkeypatch):
    monkeypatch.syspath_prepend(PEERS)
    return importlib.import_module("workload")


@pytest.fixture(scope="module")
def said():
    """What our side says of the smallest workload; it fails if other tokens were trained on."""
    script, model = PEERS / "ours_side.py", local_path("hopworld-base")
    command = [sys.executable, script, "--model", model, "--shape", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_our_side_trains_on_the_forced_tokens(said, workload, tokenizer):
    work = workload.make(tokenizer, workload.SHAPES["tiny"])
    counts = work.counts()
    assert said["workload"] == counts == {
        "tasks": 1, "attempts": 2, "turns": 4, "most_turns": 2, "action_tokens": 200,
    }  # fmt: skip
    assert said["trained"] == {"turns": counts["turns"], "action_tokens": counts["action_tokens"]}
    # Both prompts, the same to the last token, once; everything else of both episodes.
    assert counts["action_tokens"] < said["tokens"]["trained"] < 600


def test_the_forced_log_probabilities_are_those_of_the_model(said):
    assert said["logprob_error"] < 1e-3
    assert said["passes"] == 100  # the attempts side by side, two turns of 50 tokens
    assert said["seconds"]["step"] >= said["seconds"]["rollout"] + said["seconds"]["training"]


def test_other_tokens_are_found_out(said, monkeypatch, workload, tokenizer):
    monkeypatch.syspath_prepend(PEERS)
    side = importlib.import_module("ours_side")
    work = workload.make(tokenizer, workload.SHAPES["tiny"])

    class Run:
        def estimated(self, iteration):
            return iter(())

    with pytest.raises(RuntimeError, match="trained on 0 actions, 0 right"):
        side.trained(Run(), work)


def test_a_script_goes_on_where_the_context_ends(workload, tokenizer):
    work = workload.make(tokenizer, workload.SHAPES["tiny"])
    script = workload.Script(tokenizer, work)
    prompt = workload.encode(tokenizer, work.prompts[0][1]["content"])
    first, second = (script.action(prompt) for _ in range(2))
    assert (first, second) == (work.episodes[0, 0][0][0], work.episodes[0, 1][0][0])
    answer = workload.encode(tokenizer, work.search("q 0 1 0"))
    assert script.action(prompt + second + answer) == work.episodes[0, 1][1][0]
    assert script.action(prompt) == first  # the next step begins again


def said_by(step, memory, **more):
    rollout = {"step": step, "rollout": step / 4, "training": step / 2}
    counts = {"tasks": 1, "attempts": 8, "turns": 32, "action_tokens": 1920}
    result = {"workload": counts, "seconds": rollout, "peak_memory_mib": memory}
    return result | {"versions": {"trl": "1.16.0"}, "threads": 2} | more


OURS = [said_by(10.0, 1000.0), said_by(12.0, 1100.0), said_by(40.0, 1050.0)]
TRL = [said_by(30.0, 2000.0), said_by(24.0, 2100.0), said_by(20.0, 2310.0)]


def test_medians_are_of_figures_that_all_runs_have(compare):
    runs = [{"a": 1.0, "b": 1.0}, {"a": 5.0}, {"a": 2.0, "b": 3.0}]
    assert compare.medians(runs) == {"a": 2.0}


def test_ratios_are_of_medians_and_spread_over_neighbours(compare):
    entry = compare.summary({"ours": OURS, "trl": TRL})
    assert entry["sides"]["ours"]["median"]["step_seconds"] == 12.0
    assert entry["sides"]["trl"]["median"]["peak_memory_mib"] == 2100.0
    found = entry["ratios"]["trl"]
    assert found["step_seconds"] == {"ratio": 2.0, "lowest": 0.5, "highest": 3.0}
    assert found["peak_memory_mib"]["ratio"] == 2.0
    assert found.keys() == compare.FIGURES.keys()


def test_a_side_with_less_to_say_has_fewer_ratios(compare):
    vllm = {**said_by(0, 0), "seconds": {"rollout": 6.0}, "versions": {"vllm": "1"}}
    del vllm["peak_memory_mib"]
    entry = compare.summary({"ours": OURS, "vllm": [vllm] * 3})
    assert entry["ratios"]["vllm"].keys() == {"rollout_seconds"}
    assert entry["ratios"]["vllm"]["rollout_seconds"]["ratio"] == 2.0


def test_different_workloads_are_an_error(compare):
    other = said_by(1.0, 1.0, workload={"turns": 31})
    with pytest.raises(ValueError, match="different workloads"):
        compare.summary({"ours": OURS[:1], "trl": [other]})


def test_todays_ratios_stand_beside_the_committed_ones(compare):
    entry = compare.summary({"ours": OURS, "trl": TRL})
    old = {"trl": {"step_seconds": {"ratio": 2.345}}}
    committed = {"workloads": {"even": {"ratios": old}}}
    title, head, step, rollout, *_ = compare.lines("even", entry, committed)
    assert title == "even: 1 x 8 episodes, 32 turns, 1,920 action tokens"
    assert head.split() == ["trl", "1.16.0", "here", "ratio", "committed"]
    assert step.split() == ["seconds", "a", "step", "24.0", "12.0", "2.00", "2.35"]
    assert rollout.split() == ["rollout", "6.0", "3.0", "2.00", "-"]
    assert len(head) == len(step) == len(rollout)
    assert compare.machine_line("committed", {}) == "committed: nothing"
    machine = {"processor": "P", "instructions": "AVX2", "cores": 2}
    line = compare.machine_line("today", {"machine": machine, "commit": "abc"})
    assert line == "today: P, AVX2, 2 cores, commit abc"


def test_a_side_is_measured_with_its_memory_and_heard_when_it_fails(compare):
    """By a small process, as the driver is: what a parent has counts for a child that it forks."""
    words = 'import json; b = bytearray(200 << 20); print("noise"); print(json.dumps({"a": 1}))'
    driver = (
        "import compare, json, sys; "
        "print(json.dumps(compare.measured([sys.executable, '-c', sys.argv[1]])))"
    )
    found = subprocess.run(
        [sys.executable, "-c", driver, words],
        cwd=PEERS,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(found.stdout)
    assert result["a"] == 1
    assert 200 < result["peak_memory_mib"] < 600
    with pytest.raises(SystemExit, match="no such thing"):
        compare.measured([sys.executable, "-c", "raise ValueError('no such thing')"])
