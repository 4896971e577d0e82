"""The runs below a folder: `python -m gpt_jax.runs list`, `show RUN`, `compare RUN RUN`, `tag RUN TAG`, `rm RUN`.

`find.py` says what RUN may be, docs/runs.md what each command prints. Only `tag` and `rm` change a run's folder.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take time

import difflib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from gpt_jax.cli import run_main
from gpt_jax.config import leaves
from gpt_jax.config_file import WHOLE
from gpt_jax.errors import UserError
from gpt_jax.runs.find import RUNS, FoundRun, find_run, runs_folder
from gpt_jax.runs.formats import format_duration, format_number, format_size
from gpt_jax.runs.info import read_info
from gpt_jax.runs.registry import list_runs
from gpt_jax.runs.removal import plan_removal, remove_run
from gpt_jax.runs.summary import DAMAGED, Summary, summarise
from gpt_jax.runs.tags import change_tags
from gpt_jax.runs.where import check_name, parse_condition, value_of
from gpt_jax.tables import render

FLAGS = flags.FLAGS
_FLAGS_OF = {  # beside --runs and --json
    "list": ("where", "sort", "limit"),
    "show": (),
    "compare": (),
    "tag": ("remove",),
    "rm": ("yes",),
}
_NUMBERS = ("step", "loss", "validation", "at step", "tokens/s", "time")


def main(argv: Sequence[str]) -> None:
    command, *names = argv[1:]
    commands: Mapping[str, Callable[[Sequence[str]], None]] = {
        "list": print_list,
        "show": show,
        "compare": compare,
        "tag": tag,
        "rm": remove,
    }
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        raise UserError(f"there is no command {command!a}: {hint}")
    for name in set().union(*_FLAGS_OF.values()) - set(_FLAGS_OF[command]):
        if FLAGS[name].present:
            of = next(other for other, its in _FLAGS_OF.items() if name in its)
            raise UserError(f"--{name} is of {of}, and {command} has no such flag")
    commands[command](names)


# ---- list


def print_list(names: Sequence[str]) -> None:
    """Prints the runs that meet all conditions of --where, in the order of --sort."""
    if names:
        raise UserError(f"unexpected argument {names[0]!a}: list takes none, `show` tells of one run")
    conditions = [parse_condition(text) for text in FLAGS.where]
    key = FLAGS.sort.removeprefix("-")
    if FLAGS.sort:
        check_name(key)
    if FLAGS.limit is not None and FLAGS.limit < 1:
        raise UserError(f"--limit must be a whole number from 1, found {FLAGS.limit}")
    runs = runs_folder(FLAGS.runs)
    if not runs.is_dir():
        raise UserError(f"there is no folder {runs}: train a run first, or give --runs=FOLDER")
    found = [run for run in list_runs(runs) if all(condition(run) for condition in conditions)]
    if key:
        found = in_order(found, key, descending=FLAGS.sort.startswith("-"))
    found = found[: FLAGS.limit]
    if FLAGS.json:
        print_json([as_dict(run) for run in found])
        return
    for run in found:
        if run.status == DAMAGED:
            print(f"{run.run}: {run.problem}", file=sys.stderr)
    print(render(_COLUMNS, map(_row, found), _NUMBERS) if found else "no runs")


def in_order(found: Sequence[Summary], key: str, descending: bool) -> list[Summary]:
    """Runs by a field; those that lack it come last, equal ones stay as they are."""
    having = [run for run in found if value_of(run, key) is not None]
    lacking = [run for run in found if value_of(run, key) is None]
    return [*sorted(having, key=lambda run: value_of(run, key), reverse=descending), *lacking]


_COLUMNS = ("run", "name", "status", "step", "loss", "validation", "at step", "tokens/s", "time", "started", "tags")


def _row(run: Summary) -> Sequence[str]:
    step = "-" if run.step is None else f"{run.step:,}"
    return (
        run.run,
        run.name or "-",
        run.status,
        f"{step}/{run.num_steps:,}" if run.num_steps else step,
        format_number(run.loss),
        format_number(run.validation_loss),
        "-" if run.best_step is None else f"{run.best_step:,}",
        "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        format_duration(run.elapsed_seconds) or "-",
        (run.started or "-").partition("+")[0],
        " ".join(run.tags),
    )


# ---- show, compare


def show(names: Sequence[str]) -> None:
    """Prints all that is known of runs but their metrics."""
    for name in _required(names):
        folder = _find(name).workdir
        summary, info = summarise(folder.absolute()), read_info(folder)
        if FLAGS.json:
            print_json({**info, **as_dict(summary)})
            continue
        rows = [(key, _shown(key, value)) for key, value in {**as_dict(summary), **info}.items() if key not in _HIDDEN]
        rows += [(f"config.{key}", str(value)) for key, value in leaves(summary.config)]
        print(render(("", ""), [row for row in rows if row[1]]))


_HIDDEN = ("config", "run_id")  # told otherwise


def compare(names: Sequence[str]) -> None:
    """Prints what differs between runs: their figures, and the settings that are not the same."""
    if len(names) < 2:
        raise UserError("compare takes two runs or more")
    found = [summarise(_find(name).workdir.absolute()) for name in names]
    rows = compared(found)
    if FLAGS.json:
        print_json([dict(zip(("", *names), row, strict=True)) for row in rows])
        return
    cells = [[name, *(_shown(name, value) or "-" for value in values)] for name, *values in rows]
    titles = [each.run for each in found]  # of `best` and the like, too
    print(render(("", *titles), cells, titles))


def compared(found: Sequence[Summary]) -> list[list[Any]]:
    """Name and values: the figures of runs, then each setting in which they differ."""
    figures = ("status", "step", "loss", "validation_loss", "best_step", "parameters", "tokens_per_second")
    rows = [[name, *(getattr(run, name) for run in found)] for name in (*figures, "elapsed_seconds", "backend")]
    settings = [dict(leaves(run.config)) for run in found]
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(name) for each in settings]
        if any(value != values[0] for value in values):
            rows.append([f"config.{name}", *values])
    return rows


def _shown(name: str, value: Any) -> str:
    if value is None or value == "" or value == ():
        return ""
    if name == "elapsed_seconds":
        return format_duration(value) or ""
    if name == "written":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(key, inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else format_number(value)


# ---- tag, rm


def tag(names: Sequence[str]) -> None:
    """Adds tags to a run, or with --remove takes them away, and prints those that it has."""
    if len(names) < 2:
        raise UserError("tag takes a run and its tags")
    name, *tags = names
    folder = _find(name).workdir
    left = change_tags(folder, **{"remove" if FLAGS.remove else "add": tags})
    print_json({"run": folder.name, "tags": left}) if FLAGS.json else print(f"{folder}: {' '.join(left) or 'no tags'}")


def remove(names: Sequence[str]) -> None:
    """Removes runs: all that were named, or none where one of them cannot be; asks before, without --yes."""
    plans = [plan_removal(_find(name), name) for name in _required(names)]
    for plan in plans:
        others = f", among them {', '.join(plan.others)}, which no run writes" if plan.others else ""
        size = format_size(plan.size)
        print(f"{plan.folder}: {plan.files:,} files, {size}{others}", file=sys.stderr, flush=True)
    if not FLAGS.yes:
        if not sys.stdin.isatty():
            raise UserError("rm asks before it removes, and nobody can answer: give --yes")
        print("remove? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed", file=sys.stderr)
            return
    for plan in plans:
        remove_run(plan.folder)
    if FLAGS.json:
        print_json({"removed": [str(plan.folder) for plan in plans]})


# ---- what they share


def _find(name: str) -> FoundRun:
    return find_run(name, runs_folder(FLAGS.runs), saved=False)


def _required(names: Sequence[str]) -> Sequence[str]:
    if not names:
        raise UserError("missing argument: RUN")
    return names


def as_dict(run: Summary) -> dict[str, Any]:
    """A run for JSON."""
    return dict(vars(run))


def print_json(value: Any) -> None:
    """Prints JSON; what is not finite as the strings "NaN" and "Infinity"."""
    print(json.dumps(_spelled(value), indent=2, allow_nan=False))


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spelled(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    flags.DEFINE_string("runs", str(RUNS), "The folder that runs are in.", **here)
    flags.DEFINE_bool("json", False, "Whether to print JSON.", **here)
    where = "list: a condition, such as 'validation_loss < 4'; may be given again, then all must hold."
    flags.DEFINE_multi_string("where", [], where, **here)
    flags.DEFINE_string("sort", "", "list: the field to sort by, such as loss; -loss: the largest first.", **here)
    flags.DEFINE(WHOLE, "limit", None, "list: how many to print at most.", **here)
    flags.DEFINE_bool("remove", False, "tag: take the tags away.", **here)
    flags.DEFINE_bool("yes", False, "rm: do not ask.", **here)


if __name__ == "__main__":
    run_main(main, arguments=["COMMAND"], more="RUN", define=define_flags)
