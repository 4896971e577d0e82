"""The chat in a terminal: what is typed, edited, found again and interrupted."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyte")
if sys.platform == "win32":
    pytest.skip("there is no pseudo-terminal", allow_module_level=True)

from terminal import Terminal

ROOT = Path(__file__).parents[2]
# The chat of the package over a run without a model. A long answer stops after some words, until Ctrl-C ends it.
CHAT = """
import time
from stub_run import DEFAULTS, stub_run
from gpt_jax.chat import chat, typed_lines
from gpt_jax.cli import run_main
from gpt_jax.inference.chat_session import ChatSession

long = []  # the chunks of a long answer

def say(prompt, options):
    question = prompt.split("<|user|>")[-1].removesuffix("<|assistant|>")
    long[:] = [0] if question == "long" else []
    return "word " * 60 if long else f"you said {question}"

def main(argv):
    def pace(number):
        if long:
            long.append(number)
            while len(long) > 8 and not all(each.cancelled for each in run.engine._running.values()):
                time.sleep(0.01)

    with stub_run(say, pace=pace) as (run, _):
        return chat(ChatSession(run, DEFAULTS), typed_lines(), show=True)

run_main(main)
"""
UP, LEFT, CTRL_C, CTRL_D, TAB = "\x1b[A", "\x1b[D", "\x03", "\x04", "\t"


@pytest.mark.slow
def test_a_chat_in_a_terminal():
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with Terminal([sys.executable, "-c", CHAT], cwd=ROOT, env=env) as terminal:
        terminal.wait_for("you>")
        terminal.type("hellp" + "\x7f" + "o\r")
        terminal.wait_for(lambda text: "gpt> you said hello\n" in text and text.endswith("you>"))
        terminal.type(UP + LEFT + "!\r")  # the line before, edited
        terminal.wait_for(lambda text: "gpt> you said hell!o\n" in text and text.endswith("you>"))
        terminal.type("long\r")
        terminal.wait_for("gpt> word word")
        terminal.type(CTRL_C)
        text = terminal.wait_for(lambda text: "^C" in text and text.endswith("you>"))
        assert 0 < text.count("word ") < 12
        terminal.type("/re" + TAB + TAB)
        terminal.wait_for(lambda text: "/reset" in text or "/retry" in text or "/repeat" in text)
        terminal.type(CTRL_C)
        terminal.wait_for(lambda text: text.endswith("you>"))
        terminal.type("/retry\r")
        terminal.wait_for("(seed ")
        terminal.type(CTRL_C)
        terminal.wait_for(lambda text: text.count("^C") >= 2 and text.endswith("you>"))
        terminal.type("/top_q 1\r")
        error = "error: there is no command /top_q: did you mean /top_p?"
        terminal.wait_for(lambda text: error in text and text.endswith("you>"))
        terminal.type("still here\r")
        terminal.wait_for(lambda text: "you said still here\n" in text and text.endswith("you>"))
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
