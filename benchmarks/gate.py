"""A gate for the step's time: this tree and an older one by turns on the same device, against a table of ratios.

    python benchmarks/gate.py [--base REVISION or FOLDER] [--cases chat-bf16,124m-plain-b4] [--turns 3]
    python benchmarks/gate.py --write      keep what was measured as the table

gate.json holds the revision that is measured against, and for each case this tree's time over that one's as it was when
the table was made. A case that takes over 3 % more than that is named, and the exit code is 1. Only ratios are kept:
machines differ, and by turns on one device both sides have the same clocks.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from train_step import HERE, measure

TABLE = HERE / "gate.json"
SLACK = 1.03
ROW = "{:<16} {:>9} {:>9} {:>7} {:>7}  {}"


@contextlib.contextmanager
def tree_of(base: str) -> Iterator[Path]:
    """The folder of a tree: `base` itself, or the revision of that name, checked out beside this one for the while."""
    if Path(base).is_dir():
        yield Path(base).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        command = ["git", "-C", str(HERE.parent), "worktree"]
        done = subprocess.run([*command, "add", "--detach", str(tree), base], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"--base must be a folder or a revision of this repository, found {base!r}: {done.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*command, "remove", "--force", str(tree)], check=True, capture_output=True)


def times(name: str, trees: tuple[Path, Path], turns: int, steps: int) -> tuple[float, ...]:
    """Milliseconds a step of each tree: the median of its turns."""
    found: dict[Path, list[float]] = {tree: [] for tree in trees}
    with contextlib.ExitStack() as stack:
        caches = {tree: stack.enter_context(tempfile.TemporaryDirectory()) for tree in trees}
        for _ in range(turns):
            for tree in trees:
                one = measure(name, "vulkan", steps, False, caches[tree], tree=tree)
                if "error" in one:
                    sys.exit(f"{name} in {tree} failed: {one['error']}")
                found[tree].append(one["ms"])
    return tuple(map(statistics.median, found.values()))


def verdict(ratio: float, expected: float | None) -> str:
    """Says what a case's ratio of times means beside the one in the table."""
    if expected is None:
        return "not in the table"
    return "" if ratio <= expected * SLACK else f"slower by {100 * (ratio / expected - 1):.0f} %"


def main() -> int:
    table = json.loads(TABLE.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=table["base"], help="folder, or revision; default: the table's")
    parser.add_argument("--cases", default=",".join(table["ratios"]), help="as train_step.py names them")
    parser.add_argument("--turns", type=int, default=3, help="of each tree")
    parser.add_argument("--steps", type=int, default=100, help="of a turn")
    parser.add_argument("--write", action="store_true", help="make the table anew")
    options = parser.parse_args()
    slower, ratios = [], {}
    print(ROW.format("case", "base ms", "ms", "ratio", "table", ""))
    with tree_of(options.base) as base:
        for name in options.cases.split(","):
            before, now = times(name, (base, HERE.parent), options.turns, options.steps)
            ratios[name] = round(now / before, 3)
            expected = None if options.write else table["ratios"].get(name)
            said = verdict(ratios[name], expected)
            if said.startswith("slower"):
                slower.append(name)
            shown = "-" if expected is None else f"{expected:.3f}"
            print(ROW.format(name, f"{before:.3f}", f"{now:.3f}", f"{ratios[name]:.3f}", shown, said), flush=True)
    if options.write:
        TABLE.write_text(json.dumps({"base": options.base, "ratios": ratios}, indent=2) + "\n")
    if slower:
        print(f"slower than the table by more than {100 * (SLACK - 1):.0f} %: {', '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
