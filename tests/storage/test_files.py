"""A file that is replaced in one go keeps what the user gave it: a link, a mode, a group."""

import contextlib
import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from gpt_jax.data import tokenizer
from gpt_jax.runs.info import write_json
from gpt_jax.runs.metrics import MetricsWriter
from gpt_jax.runs.report import write_report
from gpt_jax.storage import files
from gpt_jax.storage.files import StorageError, replacing, writing


def write(path: Path, text: str = "new") -> None:
    with writing(path), replacing(path) as file:
        file.write(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path, relative):
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    real, link, second = tmp_path / "other" / "report.md", tmp_path / "run" / "report.md", tmp_path / "run" / "again"
    real.write_text("old")
    link.symlink_to("../other/report.md" if relative else real)
    second.symlink_to("report.md")
    write(second)
    assert (second.readlink(), link.is_symlink(), real.is_symlink()) == (Path("report.md"), True, False)
    assert real.read_text() == second.read_text() == "new"
    assert sorted(tmp_path.rglob("*.tmp")) == []


def test_a_link_to_a_file_that_is_not_there_yet_makes_it(tmp_path):
    (tmp_path / "report.md").symlink_to(tmp_path / "other.md")
    write(tmp_path / "report.md")
    assert (tmp_path / "report.md").is_symlink()
    assert (tmp_path / "other.md").read_text() == "new"


def test_a_link_to_a_folder_that_is_gone_says_so_and_stays(tmp_path):
    (link := tmp_path / "report.md").symlink_to(tmp_path / "gone" / "report.md")
    with pytest.raises(StorageError, match=r"cannot write .*report\.md: .*check the path: it is not there"):
        write(link)
    assert link.is_symlink()


def test_a_link_to_itself_is_an_error_that_says_so(tmp_path):
    (link := tmp_path / "report.md").symlink_to("report.md")
    with pytest.raises(StorageError, match="the link leads to itself, remove it"):
        write(link)
    assert link.is_symlink()


@pytest.mark.parametrize("given", [0o600, 0o664, 0o755], ids=oct)
def test_the_mode_stays(tmp_path, given):
    (file := tmp_path / "report.md").write_text("old")
    file.chmod(given)
    write(file)
    assert (file.read_text(), mode(file)) == ("new", given)


def test_a_new_file_has_the_mode_that_any_new_file_has(tmp_path):
    (tmp_path / "other").touch()
    write(tmp_path / "report.md")
    assert mode(tmp_path / "report.md") == mode(tmp_path / "other")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_owner_and_group_stay(tmp_path):
    (file := tmp_path / "report.md").write_text("old")
    os.chown(file, 1234, 2345)
    file.chmod(0o640)
    write(file)
    assert (file.stat().st_uid, file.stat().st_gid, mode(file)) == (1234, 2345, 0o640)


def test_a_group_that_cannot_be_given_costs_nothing_else(tmp_path, monkeypatch):
    def refuse(path: Path, owner: int, group: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    (file := tmp_path / "report.md").write_text("old")
    file.chmod(0o604)
    monkeypatch.setattr(files.os, "chown", refuse)
    write(file)
    assert (file.read_text(), mode(file)) == ("new", 0o604)


def test_a_file_that_this_user_may_not_write_is_refused_and_stays(tmp_path, monkeypatch):
    (file := tmp_path / "report.md").write_text("old")
    file.chmod(0o444)
    monkeypatch.setattr(files.os, "access", lambda path, wanted: bool(mode(Path(path)) & 0o200))  # as root is let
    with pytest.raises(StorageError, match="Permission denied; give this user the right to write there"):
        write(file)
    assert (file.read_text(), list(tmp_path.iterdir())) == ("old", [file])


def test_what_is_no_file_is_written_to(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    (link := tmp_path / "report.md").symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(link)
    assert pipe.is_fifo()
    assert os.read(reader, 9) == b"new"
    os.close(reader)


def test_what_fails_half_way_leaves_the_old_file_and_its_mode(tmp_path):
    (file := tmp_path / "report.md").write_text("old")
    file.chmod(0o640)
    with contextlib.suppress(KeyboardInterrupt), replacing(file) as new:
        new.write("half")
        raise KeyboardInterrupt
    assert (file.read_text(), mode(file), list(tmp_path.iterdir())) == ("old", 0o640, [file])


def as_config(path: Path) -> None:
    write_json(path, {"num_steps": 2})


def as_tokenizer(path: Path) -> None:
    tokenizer.save(Tokenizer(BPE()), path)


def as_metrics(path: Path) -> None:
    MetricsWriter(path.parent, resume_step=3, tensorboard=False).close()


def as_report(path: Path) -> None:
    write_json(path.with_name("config.json"), {"num_steps": 2})
    write_report(path.parent)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("config.json", as_config),
        ("tokenizer.json", as_tokenizer),
        ("metrics.jsonl", as_metrics),
        ("samples.jsonl", as_metrics),
        ("report.md", as_report),
    ],
)
def test_files_of_a_run_keep_their_links_and_modes(tmp_path, name, write):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    real, link = tmp_path / "real", tmp_path / "run" / name
    real.write_text('{"step": 9}\n')
    real.chmod(0o600)
    link.unlink(missing_ok=True)
    link.symlink_to(real)
    write(link)
    assert link.is_symlink()
    assert real.read_text() != '{"step": 9}\n'
    assert mode(real) == 0o600


def test_each_of_several_writers_writes_a_whole_file(tmp_path):
    """As a report that is asked for while a run ends: they shared a file, and half of each came to stand there."""
    file, damaged, failed = tmp_path / "run.json", [], []

    def write_often(number: int) -> None:
        try:
            for _ in range(30):
                write(file, json.dumps({"number": number, "more": "x" * 40_000 * number}))
        except StorageError as error:
            failed.append(error)

    write_often(0)
    writers = [threading.Thread(target=write_often, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            damaged.append(error)
    assert (failed, damaged) == ([], [])
    assert [left.name for left in tmp_path.iterdir()] == ["run.json"]


def test_what_a_kill_left_goes_after_a_while_and_nothing_else(tmp_path):
    names = ["a.md.12-12.tmp", "a.md.13-14.tmp", "a.md.tmp", "a.md.old.tmp", "ba.md.12-12.tmp"]
    for name in names:
        (tmp_path / name).touch()
        if name != "a.md.13-14.tmp":  # being written
            os.utime(tmp_path / name, (0, 0))
    write(tmp_path / "a.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.md", *names[1:]])
