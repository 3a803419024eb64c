"""Whatever goes wrong on the command line is one message and an exit code."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from agent_r1.cli import main
from tests.commands import Command
from torture.common import ENV, cli, forked, project


def run(tmp_path, *words, env=ENV):
    recipe = project(tmp_path / "p", env)
    command = Command(words[0], recipe, *words[1:], cwd=tmp_path)
    return command.wait(), *command.printed


def with_tasks(body):
    hook = f"    @classmethod\n    def tasks(cls, settings, split):\n        {body}\n"
    return ENV + hook


@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "raise GeneratorExit('x')"])
def test_what_wants_to_end_the_program_is_an_error(tmp_path, body):
    code, _, told = run(tmp_path, "check", env=with_tasks(body))
    assert code == 2
    assert told.startswith("agent-r1: Tiny.tasks(settings, 'train'): ")
    assert "tiny.py, line" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("words", [[], ["--debug"]])
def test_a_fault_of_ours_is_a_line_and_debug_shows_where(tmp_path, words):
    """Forced: what is none of the errors that are known."""
    recipe = project(tmp_path / "p")

    def work():
        from agent_r1.analysis import check_recipe as dry_run
        from agent_r1.cli import boundary as cli

        def fails(recipe, tell):
            raise KeyError("an oversight")

        dry_run.dry_run = fails
        return cli.main(["check", str(recipe), *words])

    ended = forked(work)
    assert ended.code == 1
    assert ended.text.rstrip().endswith("(--debug shows more)")
    assert "agent-r1: KeyError: 'an oversight'" in ended.text
    assert ("Traceback" in ended.text) == bool(words)


def test_a_message_fits_a_screen(tmp_path):
    code, _, told = run(tmp_path, "check", "--seed", "'" + "y" * 100_000 + "'")
    assert code == 2
    assert len(told) < 3200
    assert "more characters)" in told


def test_json_stands_alone_whatever_prints(tmp_path):
    noisy = ENV.replace('self.said = ""', 'self.said = ""; print("loud")')
    code, out, told = run(tmp_path, "check", "--json", env=noisy)
    assert code == 0, told
    assert json.loads(out)["notes"]
    small = ["--train.iterations", "1", "--json", "--run", tmp_path / "run"]
    code, out, told = run(tmp_path, "train", *small, env=noisy)
    assert code == 0, told
    assert json.loads(out)["last"]["iteration"] == 1
    assert "loud" in told
    raw = "import os; os.write(1, b'raw'); os.system('echo child'); print("
    code, out, told = run(tmp_path, "check", "--json", env=noisy.replace("print(", raw))
    assert code == 0, told
    assert json.loads(out)["notes"]
    assert "child" in told


def test_a_call_of_main_leaves_signals_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["explain", "/nonexistent"]) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_who_is_stopped_says_how_to_go_on(tmp_path, number, code):
    recipe = project(tmp_path / "p")
    command = Command("train", recipe, "--run", tmp_path / "run", "--train.iterations", 500)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints" / "000002").exists():
        assert command.poll() is None, command.printed
        assert time.monotonic() < deadline
        time.sleep(0.02)
    command.send_signal(number)
    assert command.wait(60) == code
    assert f"`agent-r1 train --resume {tmp_path / 'run'}` goes on" in command.printed[1]
    assert "Traceback" not in command.printed[1]


def test_nobody_who_reads_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "agent_r1.cli", "check", str(project(tmp_path / "p")), "--debug"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode in (2, 141), done.stderr


@pytest.mark.parametrize("kilobytes", [1, 30, 200])
def test_a_full_disk_is_a_line(tmp_path, kilobytes):
    """Files that may not grow further fail as they do on a full disk, each sort at its own size."""
    recipe = project(tmp_path / "p")
    command = f"ulimit -f {kilobytes}; exec {sys.executable} -m agent_r1.cli train {recipe}"
    command += f" --run {tmp_path / 'run'} --train.tasks 30"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr or "is the disk full" in done.stderr
    assert ("--resume" in done.stderr) == (tmp_path / "run" / "checkpoints").exists()
    assert "Traceback" not in done.stderr
    assert "--debug" not in done.stderr


def test_code_that_nothing_can_interrupt_is_named_and_ends_the_command(tmp_path):
    body = (
        "    async def score(self, answer):\n"
        "        import time\n"
        "        while True:\n"
        "            try:\n"
        "                time.sleep(0.05)\n"
        "            except BaseException:\n"
        "                pass\n"
    )
    ended = cli("check", project(tmp_path / "p", ENV + body))
    assert ended.code == 1
    assert "Tiny.score() (tiny.py" in ended.text
    assert "swallowed 3 interruptions" in ended.text
