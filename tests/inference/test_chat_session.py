"""The chat: questions, commands and files, over a run without a model."""

import io
import json
import re
import sys
import threading
from concurrent.futures import Future

import pytest
from fake_decoder import FakeDecoder, make_tokenizer
from stub_run import stub_run
from waiting import PATIENCE

from gpt_jax import chat as terminal
from gpt_jax.chat import chat, printable
from gpt_jax.errors import UserError
from gpt_jax.inference import served_run
from gpt_jax.inference.chat_session import COMMANDS, ChatSession
from gpt_jax.inference.sampling import SamplingOptions
from vk_kernels.errors import DeviceLostError, OutOfMemoryError

OPTIONS = SamplingOptions(temperature=0.5, max_tokens=60)


def echo(prompt, options):
    return f"{prompt}|{options.seed}|{options.temperature}"


@pytest.fixture
def session():
    with stub_run(echo) as (run, _):
        yield ChatSession(run, OPTIONS)


def say(session: ChatSession, text: str) -> str:
    return "".join(session.ask(text))


def short(answer: str, count: int = 40) -> str:
    return answer[:count]


def test_a_conversation_is_the_prompt_of_the_next_answer():
    with stub_run(lambda prompt, options: f"n{prompt.count('<|user|>')}") as (run, _):
        session = ChatSession(run, OPTIONS, system="Be brief.")
        assert [say(session, text) for text in ("one", " two ")] == ["n1", "n2"]
        assert [turn.text for turn in session.turns] == ["one", "n1", "two", "n2"]
        assert session.command("/undo") == "taken back: two"
        assert say(session, "two") == "n2"
        assert session.command("/reset") == "a new conversation, with the same system prompt"
        assert say(session, "three") == "n1"


def test_the_same_question_may_get_another_answer_and_retry_gives_one(session):
    first, second = say(session, "hello"), None
    session.command("/reset")
    second = say(session, "hello")
    assert first != second
    seed = session.seed
    third = "".join(session.retry())
    assert session.seed != seed
    assert third not in (first, second)
    assert len(session.turns) == 2
    session.command("/reset")
    session.command("/seed 5")
    again = [say(session, "hello") for _ in range(2) if session.command("/reset")]
    assert again[0] == again[1]
    assert "|5|" in again[0]


def test_an_answer_that_is_cut_short_is_kept_and_its_slot_is_free(session):
    pieces = session.ask("a question of some length")
    first = next(pieces)
    pieces.close()
    assert session.turns[-1].text == first.strip()
    assert say(session, "next")


def test_a_question_without_an_answer_can_be_tried_again():
    answers = iter(["", "now"])
    with stub_run(lambda prompt, options: next(answers)) as (run, _):
        session = ChatSession(run, OPTIONS)
        assert say(session, "hello") == ""
        assert session.turns == []
        assert "".join(session.retry()) == "now"
        assert [turn.text for turn in session.turns] == ["hello", "now"]


def test_what_does_not_fit_is_told_and_a_text_that_is_too_long_says_nothing(session):
    with pytest.raises(UserError, match="the message has 802 tokens with their markers, and the model sees 400"):
        session.ask("z" * 800)
    assert session.turns == []
    for i in range(4):
        say(session, f"{i} " + "z" * 90)
    assert re.fullmatch(r".*: the oldest \d+ turns were left out", session.notice)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/retri", r"there is no command /retri: did you mean /retry\?"),
        ("/", "there is no command /: /help lists them"),
        ("/undo", "there is nothing to take back"),
        ("/undo 3", "/undo takes no argument, found '3'"),
        ("/temp hot", "/temp must be a number, found 'hot'"),
        ("/temp -1", r"temperature must be a number in \[0, inf\), found -1.0"),
        ("/temp nan", r"temperature must be a number in \[0, inf\), found nan"),
        ("/top_p 0", r"top_p must be a number in \(0, 1\]"),
        ("/top_k 1.5", "/top_k must be a whole number, found '1.5'"),
        ("/max 0", "max_tokens must be a whole number from 1"),
        ("/seed -4", "seed must be a whole number from 0"),
        ("/system \ud800", "/system must be text in UTF-8"),
        ("/save", "/save needs the name of a file"),
        ("/save /nowhere/x.json", r"/save: /nowhere/x.json cannot be written: No such file"),
        (f"/save {'a' * 300}", "/save: .*a cannot be written: File name too long"),
        ("/save ~nobody-of-this-name/x", "/save: ~nobody-of-this-name/x is in the home folder of a user"),
        ("/load ~nobody-of-this-name/x", "/load: ~nobody-of-this-name/x is in the home folder of a user"),
        ("/load /nowhere/x.json", "/nowhere/x.json cannot be read: No such file"),
        ("/load /", "cannot be read: Is a directory"),
        ("/step 7", "nowhere has no checkpoint"),
    ],
)
def test_a_command_that_means_nothing_changes_nothing(line, message, session):
    with pytest.raises(UserError, match=message):
        session.command(line)
    assert (session.options, session.system, session.turns) == (OPTIONS, "", [])


def test_options_and_system_prompt_are_shown_and_set(session):
    assert session.command("/temp 0.25") == session.command("/temp") == "temperature is 0.25"
    assert session.command("/top_k 7") == "top_k is 7"
    assert session.command("/seed") == "seed is another one each time"
    assert session.command("/system") == "there is no system prompt"
    session.command("/system Be kind.")
    assert session.command("/system") == "system prompt: Be kind."
    assert "Be kind.\n\nhello" in say(session, "hello")
    assert "|0.25" in session.turns[-1].text
    assert session.command("/system -") == "system prompt removed"


def test_the_help_names_every_command(session):
    told = session.command("/help").splitlines()
    assert [line.split()[0] for line in told] == [f"/{name}" for name in COMMANDS]


def test_a_saved_chat_comes_back_and_no_file_of_others_is_lost(tmp_path):
    with stub_run(lambda prompt, options: "an answer") as (run, _):
        session = ChatSession(run, OPTIONS, "Be brief.")
        say(session, "one")
        session.command("/temp 0.25")
        session.command(f"/save {tmp_path / 'chat.json'}")
        say(session, "two")
        session.command(f"/save {tmp_path / 'chat.json'}")
        other = ChatSession(run, OPTIONS)
        with pytest.raises(UserError, match=r"chat.json exists: give another name"):
            other.command(f"/save {tmp_path / 'chat.json'}")
        assert other.command(f"/load {tmp_path / 'chat.json'}").startswith("4 turns from ")
        assert (other.system, other.turns, other.options) == (session.system, session.turns, session.options)
        other.command(f"/save {tmp_path / 'chat.json'}")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no saved chat"),
        ("[" * 5000, "is no saved chat"),
        ("[]", "is no saved chat: it must be an object with a list 'messages'"),
        ('{"messages": [3]}', r"messages\[0\] has no text"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"messages\[0\] has no text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "is of 'assistant' where 'user' must speak"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the last message must be the assistant's"),
        ('{"messages": [], "sampling": {"temperature": -1}}', "temperature must be a number"),
        ('{"messages": [], "sampling": {"temperature": "x"}}', "temperature must be a number"),
        ('{"messages": [], "sampling": {"stop": 5}}', "stop must be a list of texts"),
        ('{"messages": [], "sampling": []}', "is no saved chat"),
    ],
)
def test_a_file_that_is_no_chat_is_a_line_and_changes_nothing(text, message, session, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        session.command(f"/load {tmp_path / 'x.json'}")
    assert (session.options, session.system, session.turns) == (OPTIONS, "", [])


def test_in_a_pipe_answers_alone_go_to_standard_output(capsys):
    with stub_run(lambda prompt, options: "an\x1b[31m answer") as (run, _):
        code = chat(
            ChatSession(run, OPTIONS),
            iter(["hello", "/temp 1", "//x", "/nope", "/retry", "/quit", "never"]),
            show=False,
        )
    out, err = capsys.readouterr()
    assert out == "an\ufffd[31m answer\n" * 3
    assert err.splitlines()[:2] == ["temperature is 1.0", "error: there is no command /nope: /help lists them"]
    assert err.splitlines()[2].startswith("(seed ")
    assert code == 2


def test_ctrl_c_ends_the_answer_and_keeps_the_chat(capsys, monkeypatch):
    with stub_run(lambda prompt, options: "word " * 50) as (run, _):
        session = ChatSession(run, OPTIONS)
        real, printed = print, []

        def interrupted_print(*texts, **options):
            printed.append(texts)
            if len(printed) == 4:
                raise KeyboardInterrupt
            real(*texts, **options)

        monkeypatch.setattr(terminal, "print", interrupted_print, raising=False)
        assert chat(session, iter(["one", "two"]), show=True) == 0
        assert [turn.role for turn in session.turns] == ["user", "assistant"] * 2
        assert len(session.turns[1].text) < len(session.turns[3].text)
    assert "^C\n" in capsys.readouterr().out


def test_ctrl_c_during_a_command_keeps_the_chat_and_ends_a_pipe(capsys, monkeypatch):
    def interrupted(session, step):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "step", COMMANDS["step"]._replace(run=interrupted))
    with stub_run(echo) as (run, _):
        session = ChatSession(run, OPTIONS)
        assert chat(session, iter(["one", "/step 2", "two"]), show=True) == 0
        assert [turn.role for turn in session.turns] == ["user", "assistant"] * 2
        with pytest.raises(KeyboardInterrupt):
            chat(session, iter(["/step 2"]), show=False)
    assert capsys.readouterr().err == "^C\n"


def with_checkpoints(monkeypatch, load=lambda params: None):
    """Has the checkpoints of a stub's run be there; load: what the decoder does with one."""
    monkeypatch.setattr(served_run, "find_step", lambda workdir, step: step)
    monkeypatch.setattr(served_run, "load_for_sampling", lambda workdir, step: (None, step, None, f"checkpoint {step}"))
    monkeypatch.setattr(FakeDecoder, "load", lambda decoder, params: load(params), raising=False)


def test_step_tells_which_checkpoint_answers(session, monkeypatch):
    assert session.command("/step") == "a stub"
    with_checkpoints(monkeypatch)
    assert session.command("/step 2") == "checkpoint 2"
    assert session.command("/step") == "checkpoint 2"


@pytest.mark.parametrize("has_begun", [False, True])
def test_ctrl_c_during_step_leaves_the_name_of_the_parameters_that_answer(has_begun, monkeypatch):
    began, go_on, loaded = threading.Event(), threading.Event(), []

    def load(params):
        began.set()
        assert go_on.wait(PATIENCE)
        loaded.append(params)

    with_checkpoints(monkeypatch, load)
    with stub_run(echo) as (run, _):
        session = ChatSession(run, OPTIONS)
        if not has_begun:  # another task is before it
            other = threading.Thread(target=lambda: run.engine.run(lambda decoder: load("other")))
            other.start()
            assert began.wait(PATIENCE)
        wait = Future.result

        def interrupted(future, timeout=None):
            if threading.current_thread() is not threading.main_thread():
                return wait(future, timeout)
            assert began.wait(PATIENCE)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.command("/step 2")
        go_on.set()
        run.engine.run(lambda decoder: None)  # after all that was to be done
        assert ("2" in loaded) == has_begun
        assert session.command("/step") == ("checkpoint 2" if has_begun else "a stub")


def test_a_chat_that_an_editor_saved_with_a_mark_of_utf_8_comes_back(session, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text('{"messages": [{"role": "system", "content": "Be brief."}]}', encoding="utf-8-sig")
    session.command(f"/load {file}")
    assert session.system == "Be brief."


def test_a_device_that_fails_ends_the_chat_in_a_line(capsys):
    def fail(number):
        raise DeviceLostError("the device was lost")

    with stub_run(echo, pace=fail) as (run, _):
        assert chat(ChatSession(run, OPTIONS), iter(["one", "two"]), show=True) == 1
    assert capsys.readouterr().err == "error: the device was lost\n"


def test_a_device_that_fails_behind_an_answer_that_was_cut_short_ends_the_chat_in_a_line(capsys):
    def fail(number):
        if number:
            raise DeviceLostError("the device was lost")

    with stub_run(echo, pace=fail) as (run, _):
        session = ChatSession(run, OPTIONS)
        pieces = session.ask("a question of some length")
        next(pieces)
        run.engine._thread.join(20)
        pieces.close()
        assert chat(session, iter(["two"]), show=True) == 1
    assert capsys.readouterr().err == "error: the device was lost\n"


def test_a_checkpoint_for_which_there_is_no_room_leaves_the_one_that_answers(capsys, monkeypatch):
    def load(params):
        raise OutOfMemoryError("out of device memory")

    with_checkpoints(monkeypatch, load)
    with stub_run(echo) as (run, _):
        session = ChatSession(run, OPTIONS)
        assert chat(session, iter(["/step 2", "one"]), show=True) == 0
        assert [turn.role for turn in session.turns] == ["user", "assistant"]
    assert capsys.readouterr().err == "error: /step: out of device memory; a stub stays\n"


def test_a_pipe_that_is_no_text_is_a_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="standard input is not text in UTF-8"):
        list(terminal.piped_lines())


def test_nothing_that_a_model_says_moves_the_cursor():
    assert printable("a\tb\nc\r\x1b[2J\x9b\x07 ü真") == "a\tb\nc\ufffd\ufffd[2J\ufffd\ufffd ü真"
    assert make_tokenizer()
