"""The launcher of the processes of one host: what it hands on, and what it says of those that ended."""

import os
import re
import signal
import subprocess

import pytest
from waiting import wait_for

from gpt_jax.distributed import launch as launcher
from gpt_jax.distributed.channel import SAVING, SILENCE


def run(script: str, count: int = 2) -> int:
    """Launches a shell script, in which $i is the number of the process; returns the run's exit code."""
    return launcher.launch(count, ["sh", "-c", f"i=${{0##*,}}; {script}"])


def test_a_run_is_good_when_all_of_its_processes_are(capfd):
    assert run('echo "$0 $GPT_JAX_LAUNCHER of $i"', 3) == 0
    out = capfd.readouterr().out
    assert out.startswith("--config.distributed=127.0.0.1:")
    assert out.endswith(f",3,0 {os.getpid()} of 0\n")  # the others are silent


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("[ $i = 0 ] || { echo a; echo b >&2; exit 3; }", 1, r"process 1 \(pid \d+\) ended by exit code 3; it said: b"),
        ("[ $i = 0 ] || kill -9 $$", 1, r"process 1 \(pid \d+\) ended by SIGKILL; it said: nothing"),
        ("[ $i = 1 ] || kill -9 $$", 137, r"process 0 \(pid \d+\) was ended by SIGKILL"),
        ("[ $i = 1 ] || { echo error: mine >&2; exit 2; }", 2, "mine"),
    ],
)
def test_who_ended_a_run_is_named_once(capfd, script, code, said):
    assert run(script) == code
    assert re.fullmatch(rf"error: {said}\n", capfd.readouterr().err)


def test_a_signal_that_comes_before_the_processes_do_stops_them_too(capfd, monkeypatch):
    popen, started = subprocess.Popen, []

    def signalled(*arguments, **options):
        if not started:
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", signalled)
    assert run("exec sleep 20") == 128 + signal.SIGTERM
    assert [child.returncode for child in started] == [-signal.SIGTERM] * 2
    assert re.fullmatch(r"error: process 0 \(pid \d+\) was ended by SIGTERM\n", capfd.readouterr().err)


def test_signals_reach_each_process_once_and_who_stays_is_ended(capfd, monkeypatch, tmp_path):
    wait = launcher._wait

    def signal_and_wait(children):
        wait_for(lambda: len(list(tmp_path.iterdir())) == len(children))  # all are ready for it
        os.kill(os.getpid(), signal.SIGUSR1)
        wait(children)

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_wait", signal_and_wait)
        ready = f"trap 'echo caught $i; exit 0' USR1; touch {tmp_path}/$i"
        assert run(f"{ready}; while :; do sleep 0.05; done") == 0
    assert capfd.readouterr().out == "caught 0\n"
    assert launcher._GRACE > SILENCE + SAVING  # process 0 saves, and is not ended meanwhile
    monkeypatch.setattr(launcher, "_GRACE", 0.2)
    assert run("[ $i = 0 ] && exit 5; trap '' TERM; while :; do sleep 0.05; done") == 5
