"""The commands that list, show, compare, tag and remove runs, and what of a run they believe."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from absl import flags

import gpt_jax.runs.__main__ as runs_command
from gpt_jax.cli import parse_flags
from gpt_jax.errors import UserError
from gpt_jax.runs import registry
from gpt_jax.runs.find import find_run
from gpt_jax.runs.follow import FollowedRun
from gpt_jax.runs.info import RunInfo, write_json
from gpt_jax.runs.load import load_run
from gpt_jax.runs.metrics import MetricsWriter, read_lines
from gpt_jax.runs.registry import INDEX_FILE, list_runs
from gpt_jax.runs.status import read_status
from gpt_jax.runs.summary import last_step
from gpt_jax.runs.where import parse_condition
from gpt_jax.storage.checkpoint_files import write_record
from gpt_jax.storage.lock import is_held, lock

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from gpt_jax.storage.lock import lock
with lock(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


def make_run(folder: Path, status: str = "completed", *, name: str = "chat", steps: int = 3, **losses: float) -> Path:
    """A run of so many steps, the loss of the last one 1; losses: of validation, by step as `at_2=0.5`."""
    config = {"name": name, "num_steps": 3, "seed": steps, "model": {"num_layers": 2, "embed_dim": 8}}
    info = {"run_id": f"id-{folder.name}", "name": name, "status": status, "elapsed_seconds": 65.0}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "run.json", {**info, "started": "2026-11-29T10:00:00+00:00", "command": "train it"})
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = float(steps - step + 1)
            file.write(json.dumps({"step": step, "split": "train", "loss": loss, "tokens_per_second": 1234.0}) + "\n")
    for step, loss in losses.items():
        checkpoint = folder / "checkpoints" / step.removeprefix("at_")
        checkpoint.mkdir(parents=True)
        write_record(checkpoint, {"validation_loss": loss, "files": {}, "leaves": {}})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four runs, `d` written last."""
    root = tmp_path / "runs"
    make_run(root / "a", at_1=3.5, at_3=3.0)
    make_run(root / "b", "failed", name="other", steps=2, at_2=4.5)
    make_run(root / "c", "running", steps=1)
    make_run(root / "d", "interrupted", steps=0)
    for age, name in enumerate("dcba"):
        os.utime(root / name / ("metrics.jsonl"), (1e9 - age, 1e9 - age))
    (root / "no run").mkdir()
    return root


@pytest.fixture
def command(monkeypatch, capsys, runs):
    """Runs a command on the runs; returns what it printed."""

    def run(*arguments: str) -> str:
        values = flags.FlagValues()
        runs_command.define_flags(values)
        monkeypatch.setattr(runs_command, "FLAGS", values)
        runs_command.main(parse_flags(["runs", *arguments, f"--runs={runs}"], values))
        return capsys.readouterr().out

    return run


def listed(command, *arguments: str) -> list[str]:
    return [run["run"] for run in json.loads(command("list", "--json", *arguments))]


# ---- status


def test_a_run_is_running_as_long_as_its_process_and_no_longer(tmp_path):
    folder = make_run(tmp_path / "run", "running")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder / "run.lock"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        assert read_status(folder)[0] == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / "run.lock").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert read_status(folder)[0] == "crashed"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert load_run(folder).info["status"] == "crashed"
    with lock(folder / "run.lock", print):
        assert load_run(folder).info["status"] == "running"


def test_one_that_ends_between_two_looks_has_not_crashed(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", "running")

    def ends_meanwhile(path: Path) -> bool:
        write_json(folder / "run.json", {"status": "completed"})
        return is_held(path)

    monkeypatch.setattr("gpt_jax.runs.status.is_held", ends_meanwhile)
    assert read_status(folder) == ("completed", {"status": "completed"})


@pytest.mark.parametrize(("age", "status"), [(10, "running"), (10_000, "crashed")])
def test_without_locks_it_runs_while_it_writes(age, status, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", "running")
    for name in ("run.json", "metrics.jsonl"):
        written = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (written, written))
    monkeypatch.setattr("gpt_jax.runs.status.is_held", lambda path: None)
    assert read_status(folder)[0] == status


def test_a_look_at_a_lock_neither_takes_it_nor_keeps_another_from_it(tmp_path):
    path = tmp_path / "lock"
    assert is_held(path) is False
    assert not path.exists()
    path.write_text("left by a kill")
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_held(path)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with lock(path, print):
                assert is_held(path) is True
            path.write_text("left by a kill")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# ---- list


def test_a_list_shows_how_each_run_stands(command, runs):
    lines = command("list").splitlines()
    cells = [line.split() for line in lines[2:]]
    assert [line[:3] for line in cells] == [
        ["d", "chat", "interrupted"],
        ["c", "chat", "crashed"],
        ["b", "other", "failed"],
        ["a", "chat", "completed"],
    ]
    assert cells[3][3:] == ["3/3", "1.0000", "3.0000", "3", "1,234", "1.1", "min", "2026-11-29T10:00:00"]
    assert cells[0][3:6] == ["-/3", "-", "-"]
    with lock(runs / "c" / "run.lock", print):
        assert json.loads(command("list", "--json"))[1]["status"] == "running"


def test_a_list_is_filtered_sorted_and_cut(command):
    assert listed(command, "--where=validation_loss < 4") == ["a"]
    assert listed(command, "--where", "step >= 1", "--where=status != 'failed'") == ["c", "a"]
    assert listed(command, "--sort=step") == ["c", "b", "a", "d"]
    assert listed(command, "--sort=-step", "--limit=2") == ["a", "b"]
    assert listed(command, "--sort=config.seed") == ["d", "c", "b", "a"]
    assert command("list", "--where=step > 99") == "no runs\n"


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("validation_loss < 4", "a"),
        ("validation_loss == None", "cd"),
        ("not validation_loss < 4", "bcd"),
        ("2 <= step <= 3", "ab"),
        ("step > -1 and (run == 'a' or run == 'c')", "ac"),
        ("status in ('failed', 'crashed')", "bc"),
        ("'good' in tags", "a"),
        ("tags", "a"),
        ("config.model.num_layers == 2 and config.seed != 3", "bcd"),
        ("name < 5", ""),
        ("config.num_steps == 3", "abcd"),
    ],
)
def test_a_condition_selects(condition, found, command, runs):
    command("tag", "a", "good")
    holds = parse_condition(condition)
    assert "".join(sorted(run.run for run in list_runs(runs) if holds(run))) == found


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("", "is no condition"),
        ("step = 3", "two are equal by =="),
        ("los < 3", "a run has no 'los': did you mean loss?"),
        ("num_layers < 3", "did you mean config.model.num_layers?"),
        ("config < 3", "a run has no 'config'"),
        ("__import__('os').system('true')", "neither a name, a number nor a text"),
        ("run.__class__ == 3", "a run has no 'run.__class__'"),
        ("[run for run in tags]", "neither a name"),
        ("step is 3", "write == or !="),
        ("step + 1 < 3", "neither a name"),
        ("f'{run}' == 'a'", "neither a name"),
        ("(" * 300 + "step" + ")" * 300, "is no condition"),
        ("not " * 240 + "step", ""),
        ("step < 3 or " * 100 + "step", "is 1204 characters long"),
        ("step < '\\ud800'", ""),
    ],
)
def test_what_is_no_condition_costs_one_line_and_is_never_executed(condition, message, runs):
    if not message:
        assert parse_condition(condition)(list_runs(runs)[0]) in (True, False)
        return
    with pytest.raises(UserError) as caught:
        parse_condition(condition)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_index_spares_reading_and_what_changes_is_read_again(command, runs, monkeypatch):
    everything = list_runs(runs)
    read = []
    real = registry.summarise
    monkeypatch.setattr(registry, "summarise", lambda folder: read.append(folder.name) or real(folder))
    assert list_runs(runs) == everything
    assert read == []
    with lock(runs / "a" / "run.lock", print):
        list_runs(runs)
    assert read == ["a"]
    list_runs(runs)  # by now it is in the index again
    read.clear()
    command("tag", "b", "good")
    with (runs / "c" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "split": "train", "loss": "NaN"}\n')
    found = {run.run: run for run in list_runs(runs)}
    assert read == ["b", "c"]
    assert found["b"].tags == ("good",)
    assert (found["c"].step, found["c"].loss) == (2, None)
    for damage in (b"", b"[]", b'{"format_version": 1, "runs": {"a": {"state": [], "summary": {}}}}', b"\xff" * 99):
        (runs / INDEX_FILE).write_bytes(damage)
        assert {run.run: run for run in list_runs(runs)} == found
    (runs / INDEX_FILE).unlink()
    (runs / INDEX_FILE).mkdir()  # where none can be written, there is none
    assert {run.run: run for run in list_runs(runs)} == found
    assert [path.name for path in runs.iterdir() if path.name.startswith(f"{INDEX_FILE}.")] == []


def test_a_damaged_run_is_listed_and_told(command, runs, capsys):
    (runs / "b" / "run.json").write_text("{")
    assert listed(command, "--where=status == 'damaged'") == ["b"]
    runs_command.FLAGS.json = False
    runs_command.print_list([])
    assert f"b: {runs / 'b' / 'run.json'} is not valid JSON" in capsys.readouterr().err


def test_without_the_folder_that_is_said(command, runs):
    runs.rename(runs.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"there is no folder .*runs: train a run first"):
        command("list")


def test_the_last_step_is_found_at_the_end_of_a_long_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    train = json.dumps({"step": 7, "split": "train", "loss": 2.5})
    filler = json.dumps({"step": 8, "split": "diagnostics", "x": "y" * 90_000})
    for text, expected in (
        (f"{train}\n{filler}\n", {"step": 7, "loss": 2.5}),
        (f"{train}\n" + '{"step": 8, "split": "train", "lo', {"step": 7, "loss": 2.5}),
        (f"{train}\n[]\n1\nnull\n", {"step": 7, "loss": 2.5}),
        ("", {}),
        (train, {}),
    ):
        file.write_text(text)
        assert last_step(file) == expected


def test_four_runs_write_while_lists_and_a_watch_read(tmp_path):
    """No line is lost and no writer waits: readers take nothing that a writer wants."""
    runs, lines = tmp_path / "runs", 300
    failures: list[BaseException] = []

    def train(number: int) -> None:
        try:
            folder = runs / f"run_{number}"
            folder.mkdir(parents=True)
            with lock(folder / "run.lock", print), MetricsWriter(folder, tensorboard=False) as writer:
                device = {"platform": "cpu", "kind": "cpu", "count": 1}
                facts = {"name": "chat", "domain": "chat", "backend": "xla", "device": device}
                info = RunInfo(folder, **facts, peak_bytes=lambda: None)
                write_json(folder / "config.json", {"num_steps": lines})
                for step in range(1, lines + 1):
                    writer.write(step, "train", {"loss": 1.0 / step})
                    if step % 50 == 0:
                        info.update(last_checkpoint=step)
                info.finish("completed")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[str, list[int]] = {}
    watched = [FollowedRun(runs / f"run_{number}") for number in range(4)]
    while any(thread.is_alive() for thread in threads):
        for run in list_runs(runs):
            assert run.status in ("running", "completed", "unknown"), run.problem
            seen.setdefault(run.run, []).append(run.step or 0)
        for followed in watched:
            followed.read()
            assert followed.losses == [1.0 / step for step in range(1, followed.step + 1)]
    assert failures == []
    for number in range(4):
        assert [line["step"] for line in read_lines(runs / f"run_{number}" / "metrics.jsonl")] == [*range(1, lines + 1)]
        assert seen[f"run_{number}"] == sorted(seen[f"run_{number}"])
    assert {run.status for run in list_runs(runs)} == {"completed"}
    for followed in watched:
        followed.read()
        assert (followed.status, followed.step) == ("completed", lines)


# ---- names and tags


def test_a_run_is_called_by_id_tag_or_name(command, runs):
    assert find_run("id-b", runs).workdir == runs / "b"
    assert find_run("other", runs).workdir == runs / "b"
    command("tag", "a", "good", "v1.0")
    assert find_run("good@1", runs) == (runs / "a", runs / "a" / "checkpoints" / "1")
    with pytest.raises(UserError, match=r"3 runs below .* have the name chat: give one of d, c, a"):
        find_run("chat", runs)
    command("tag", "b", "good")
    with pytest.raises(UserError, match=r"2 runs below .* have the tag good: give one of b, a"):
        find_run("good", runs)
    (runs / "a" / "tags.json").write_text("[]")
    assert find_run("good", runs).workdir == runs / "b"


def test_tags_are_kept_in_the_folder_and_taken_away(command, runs):
    assert command("tag", "a", "good", "b-2") == f"{runs / 'a'}: b-2 good\n"
    assert json.loads((runs / "a" / "tags.json").read_text())["tags"] == ["b-2", "good"]
    assert json.loads(command("tag", "a", "good", "--remove", "--json")) == {"run": "a", "tags": ["b-2"]}
    assert command("tag", "a", "b-2", "--remove") == f"{runs / 'a'}: no tags\n"
    with pytest.raises(UserError, match=r"has no tag 'good': it has none"):
        command("tag", "a", "good", "--remove")
    for bad in ("latest", "12", "a b", "a@1", "a/b", "-x", "x" * 65, "_"):
        with pytest.raises(UserError, match="is no tag: give a word"):
            runs_command.change_tags(runs / "a", add=[bad])


# ---- show and compare


def test_show_and_compare_tell_what_is_known_and_what_differs(command, runs):
    shown = command("show", "a")
    for line in ("id id-a", "status completed", "validation_loss 3.0000", "command train it", "config.seed 3"):
        assert line in [" ".join(each.split()) for each in shown.splitlines()]
    assert json.loads(command("show", "a", "--json"))["config"]["model"] == {"num_layers": 2, "embed_dim": 8}
    rows = [" ".join(line.split()) for line in command("compare", "a", "b").splitlines()]
    assert "loss 1.0000 1.0000" in rows
    assert "validation_loss 3.0000 4.5000" in rows
    assert "config.seed 3 2" in rows
    assert not any("num_layers" in row for row in rows)


# ---- rm


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rm_asks_and_removes_a_folder_whole(command, runs, monkeypatch, capsys):
    (runs / "a" / "mine.txt").write_text("notes")
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    command("rm", "a")
    assert (runs / "a" / "run.json").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="nobody can answer: give --yes"):
        command("rm", "a")
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    runs_command.remove(["a"])
    assert "among them mine.txt, which no run writes" in capsys.readouterr().err
    assert json.loads(command("rm", "b", "c", "--yes", "--json")) == {"removed": [str(runs / "b"), str(runs / "c")]}
    assert sorted(path.name for path in runs.iterdir() if path.name != INDEX_FILE) == ["d", "no run"]


def test_rm_refuses_what_is_used_or_no_run(command, runs):
    (runs / "link").symlink_to(runs / "b")
    (runs / "half").mkdir()
    (runs / "half" / "config.json").write_text("{}")
    make_run(runs / "outer")
    make_run(runs / "outer" / "inner")
    with lock(runs / "c" / "run.lock", print):
        for name, message in (
            ("c", "is in use: a process trains there"),
            ("no run", "is no run folder"),
            ("half", "is no run folder"),
            ("link", "is a link"),
            ("outer", r"holds other runs \(inner\)"),
            ("a@1", "is a checkpoint, and a run is removed whole"),
            ("nowhere", "there is no run nowhere"),
        ):
            with pytest.raises(UserError, match=message):
                command("rm", "d", name, "--yes")
        with pytest.raises(UserError, match="is in use by process"):
            runs_command.remove_run(runs / "c")
    assert {"a", "b", "c", "d", "half", "link", "no run", "outer"} <= {path.name for path in runs.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lst",), "there is no command 'lst': did you mean list?"),
        (("xyz",), "there are list, show, compare, tag, rm"),
        (("list", "a"), "unexpected argument 'a': list takes none"),
        (("list", "--sort=los"), "a run has no 'los': did you mean loss?"),
        (("list", "--sort=-"), "a run has no ''"),
        (("list", "--json=maybe"), "flag --json=maybe: must be true or false"),
        (("list", "--limit=0"), "--limit must be a whole number from 1, found 0"),
        (("show", "a", "--where=step"), "--where is of list, and show has no such flag"),
        (("show",), "missing argument: RUN"),
        (("compare", "a"), "compare takes two runs or more"),
        (("tag", "a"), "tag takes a run and its tags"),
        (("rm",), "missing argument: RUN"),
        (("list", "--yes"), "--yes is of rm, and list has no such flag"),
        (("show", "nowhere"), "there is no run nowhere"),
    ],
)
def test_a_mistake_costs_one_line(arguments, message, command):
    with pytest.raises(UserError) as caught:
        command(*arguments)
    assert message in str(caught.value)
