"""A process beside process 0 runs the same loop, so that what stands in for files there takes all that it calls."""

import re
from pathlib import Path

from gpt_jax.training import follower

TRAINER = Path(follower.__file__).with_name("trainer.py")


def test_stand_ins_take_all_that_the_loop_calls():
    stand_ins = {
        "writer": follower.SilentWriter(),
        "info": follower.SilentInfo(),
        "checkpointer": follower.SilentCheckpointer(),
    }
    called = set(re.findall(r"self\.(writer|info|checkpointer)\.(\w+)", TRAINER.read_text()))
    assert len(called) > 10
    assert [f"{kind}.{name}" for kind, name in called if not hasattr(stand_ins[kind], name)] == []
