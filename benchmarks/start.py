"""A start of the trainer, from its process's begin to the end of step 1, by its parts; of several trees by turns.

    python benchmarks/start.py [--config configs/chat.py] [--set model.dtype=bfloat16] [--trees FOLDER ...] [--turns 3]
    python benchmarks/start.py --cold      the starts that fill the caches too, the first one's with none

Each start is `python -m gpt_jax.main ... --config.backend=vulkan` in a process of its own, which ends when the metrics
of step 1 are known. Its parts are taken around the functions that train.py calls, one after another: the times between
them count for the part that follows, and what a thread does beside them counts where it is waited for. Seconds are of
the wall; those of the processor, threads included, are beside them. All trees share a folder of caches (kernels, the
driver's, Python's bytecode, the corpus), which an untimed start of each fills.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600
PARTS = {  # of gpt_jax.training.train: what each is called here
    "enter_backend": "device",
    "check_start": "checks",
    "plan_programs": "trace, plan",
    "open_corpus": "corpus",
    "Checkpointer": "checkpointer",
    "initial_state": "state",
    "open_trackers": "folder",
    "MetricsWriter": "writer",
    "Trainer": "trainer",
}


# In the process that is timed. It imports nothing that the trainer does not import.


def run_and_stop(began: float, arguments: list[str]) -> None:
    """Runs main.py with clocks around its parts; prints the moments, and ends at the metrics of step 1."""
    moments: list[tuple[str, float, float]] = []

    def note(name: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        moments.append((name, time.time() - began, used.ru_utime + used.ru_stime))

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            note(name)
            return result

        return run

    note("python")
    import gpt_jax.main as main_module

    note("imports of main")
    take_part = main_module.imports_done

    def imports_done() -> None:
        take_part()
        train = sys.modules.get("gpt_jax.training.train")
        if train is None or hasattr(train, "clocked"):
            return
        train.clocked = True
        note("imports of train")
        for name, shown in PARTS.items():
            setattr(train, name, clocked(shown, getattr(train, name)))
        from gpt_jax.training import trainer

        kind = trainer.Trainer
        kind.evaluate = clocked("evaluation", kind.evaluate)
        kind.diagnose = clocked("diagnostics", kind.diagnose)
        kind.note_operations = clocked("call of step 1", kind.note_operations)
        say = kind.tell

        def tell(self: Any, alerts: Any) -> None:
            say(self, alerts)
            if self.step >= 1:
                note("step 1")
                print(json.dumps(moments), flush=True)
                os._exit(0)

        kind.tell = tell

    main_module.imports_done = imports_done
    sys.argv = ["gpt_jax.main", *arguments]
    main_module.run_main(main_module.main, define=main_module.define_flags)


# All starts.


def start(tree: Path, caches: Path, arguments: list[str]) -> list[tuple[str, float, float]]:
    """(part, seconds of the wall, of the processor) of one start, both since the process began."""
    environment = os.environ | {
        "PYTHONPATH": f"{tree}:{os.environ.get('PYTHONPATH', '')}",
        "VK_KERNELS_CACHE": str(caches / "vulkan"),
        "XDG_CACHE_HOME": str(caches / "home"),
        "__GL_SHADER_DISK_CACHE_PATH": str(caches / "nvidia"),
        "MESA_SHADER_CACHE_DIR": str(caches / "mesa"),
        "PYTHONPYCACHEPREFIX": str(caches / "python"),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    (caches / "nvidia").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        given = [*arguments, f"--workdir={folder}/run", "--config.backend=vulkan", "--config.num_steps=1"]
        given += [f"--config.data.cache_dir={caches}/data"]
        # -P: this folder does not come before the tree's.
        command = [sys.executable, "-P", __file__, "--from", str(time.time()), *given]
        done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, timeout=TIMEOUT)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("[["):
        sys.exit(f"a start in {tree} failed: {(done.stderr.strip().splitlines() or lines or ['no message'])[-1]}")
    return json.loads(lines[-1])


def parts_of(moments: list[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """(wall, processor) of each part."""
    found, before = {}, (0.0, 0.0)
    for name, wall, processor in moments:
        found[name] = (wall - before[0], processor - before[1])
        before = wall, processor
    return found | {"all": before}


def table(trees: list[Path], found: dict[Path, list[dict[str, tuple[float, float]]]]) -> str:
    """Medians by part, a column for each tree, and the least of the whole."""
    rows = [f"{'part':<18}" + "".join(f"{tree.name[-20:]:>22}" for tree in trees)]
    names = dict.fromkeys(name for tree in trees for turn in found[tree] for name in turn)
    for name in names:
        cells = []
        for tree in trees:
            pairs = [turn[name] for turn in found[tree] if name in turn]
            wall, processor = (statistics.median(each) for each in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
            cells.append(f"{wall:>10.3f} s ({processor:5.2f} s)")
        rows.append(f"{name:<18}" + "".join(f"{cell:>22}" for cell in cells))
    least = "".join(f"{min(turn['all'][0] for turn in found[tree]):>10.3f} s          " for tree in trees)
    return "\n".join([*rows, f"{'least of all':<18}{least}"])


def main() -> None:
    if sys.argv[1:2] == ["--from"]:
        return run_and_stop(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/chat.py")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of the config")
    parser.add_argument("--trees", nargs="+", type=Path, default=[ROOT], help="folders of trees, timed by turns")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--caches", type=Path, help="a folder of caches that stays; default: a new one")
    parser.add_argument("--cold", action="store_true", help="print the first starts, too")
    options = parser.parse_args()
    arguments = [f"--config={options.config}", *(f"--config.{each}" for each in options.set)]
    trees = [tree.resolve() for tree in options.trees]
    found: dict[Path, list[Any]] = {tree: [] for tree in trees}
    with contextlib.ExitStack() as stack:
        caches = options.caches or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for tree in trees:
            first = parts_of(start(tree, caches, arguments))
            if options.cold:
                print(f"the first start\n{table([tree], {tree: [first]})}\n", flush=True)
        for _ in range(options.turns):
            for tree in trees:
                found[tree].append(parts_of(start(tree, caches, arguments)))
    print(f"warm, medians of {options.turns} turns: seconds (of the processor)\n{table(trees, found)}")


if __name__ == "__main__":
    main()
