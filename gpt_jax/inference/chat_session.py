"""A conversation with a run: what was said, how answers are drawn, and the commands that change both.

Nothing here knows of a terminal: `gpt_jax.chat` reads and prints.
"""

import dataclasses
import difflib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.backend import describe, is_device_error
from gpt_jax.config import text_problem
from gpt_jax.config_file import NUMBER, WHOLE
from gpt_jax.data.dialogue import Turn
from gpt_jax.errors import UserError
from gpt_jax.inference.engine import EngineFailed
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.inference.served_run import ServedRun
from gpt_jax.storage.files import explain, replacing


class ChatCommand(NamedTuple):
    """A line that begins with a slash.

    argument: its name in the help; in brackets where it may be left out. run: None for those that answer or end, which
    are the terminal's.
    """

    argument: str
    meaning: str
    run: Callable[["ChatSession", str], str] | None


class ChatSession:
    """One conversation. `ask` and `retry` answer, `command` does the rest and returns what to tell.

    Args:
      run: what answers.
      options: how; without a seed each answer has another one.
      system: what the conversation begins with.
    """

    def __init__(self, run: ServedRun, options: SamplingOptions, system: str = "") -> None:
        self.run, self.options, self.system = run, options, system
        self.turns: list[Turn] = []
        self._asked: list[Turn] = []  # up to the last question, whether it has an answer or not
        self.seed: int | None = None  # of the last answer
        self.notice = ""  # what was left out of the last prompt, as a line
        self._own_files: set[Path] = set()  # written or read here, so that they may be written again

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a text, in pieces. If it ends early, what there is of it is the answer.

        Raises:
          UserError: the text is none, or too long; then nothing was said.
          EngineFailed: there will be no answer.
        """
        if problem := text_problem(text):
            raise UserError(f"what was typed {problem}")
        if not text.strip():
            raise UserError("what was typed is empty")
        turns = [*self.turns, Turn("user", text.strip())]
        seed = secrets.randbits(32) if self.options.seed is None else self.options.seed
        return self._answer(turns, seed)

    def retry(self) -> Iterator[str]:
        """Another answer to the last question, by another seed.

        Raises:
          UserError: nothing was asked yet.
          EngineFailed: as `ask`.
        """
        if not self._asked:
            raise UserError("there is no question to answer again")
        return self._answer(self._asked, secrets.randbits(32))

    def go_on(self, system: str, turns: list[Turn]) -> None:
        """Takes another conversation in place of this one."""
        self.system, self.turns, self._asked = system, turns, turns[:-1]
        self.seed, self.notice = None, ""

    def _answer(self, turns: list[Turn], seed: int) -> Iterator[str]:
        options = dataclasses.replace(self.options, seed=seed)
        request, fitted = self.run.request(turns, self.system, options)  # before the first piece is asked for
        self._asked, self.seed, self.notice = turns, seed, fitted.told()

        def pieces() -> Iterator[str]:
            answer = ""
            try:
                for event in self.run.engine.stream(request):
                    if event.error is not None:
                        raise EngineFailed(event.error)
                    answer += event.text
                    if event.text:
                        yield event.text
            finally:
                if answer.strip():
                    self.turns = [*turns, Turn("assistant", answer.strip())]

        return pieces()

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says; returns what to tell.

        Raises:
          UserError: there is no such command, or its argument means nothing.
        """
        name, argument = split_command(line)
        run = COMMANDS[name].run
        return run(self, argument) if run else ""

    def _reset(self, argument: str) -> str:
        _no_argument("reset", argument)
        self.go_on(self.system, [])
        return "a new conversation" + (", with the same system prompt" if self.system else "")

    def _undo(self, argument: str) -> str:
        _no_argument("undo", argument)
        if not self.turns:
            raise UserError("there is nothing to take back")
        question = self.turns[-2].text
        self.go_on(self.system, self.turns[:-2])
        return f"taken back: {question}"

    def _set_system(self, argument: str) -> str:
        if not argument:
            return f"system prompt: {self.system}" if self.system else "there is no system prompt"
        if problem := text_problem(argument):
            raise UserError(f"/system {problem}")
        self.system = "" if argument == "-" else argument
        return "system prompt set" if self.system else "system prompt removed"

    def _save(self, argument: str) -> str:
        path = _path("save", argument)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [{"role": turn.role, "content": turn.text} for turn in self.turns]
        drawn = {name: value for name, value in vars(self.options).items() if name != "logprobs"}
        try:
            if path not in self._own_files and path.exists():
                raise UserError(f"/save: {path} exists: give another name")
            with replacing(path) as file:
                json.dump({"messages": messages, "sampling": drawn}, file, indent=2, ensure_ascii=False)
                file.write("\n")
        except OSError as error:
            raise UserError(f"/save: {path} cannot be written: {explain(error)}") from None
        self._own_files.add(path)
        return f"saved {len(self.turns)} turns to {path}"

    def _load(self, argument: str) -> str:
        path = _path("load", argument)
        system, turns, options = read_chat(path, self.options)
        self.go_on(system, turns)
        self.options = options
        self._own_files.add(path)
        return f"{len(turns)} turns from {path}"

    def _step(self, argument: str) -> str:
        try:
            if argument:
                self.run.load_step(argument)
        except (RuntimeError, MemoryError) as error:
            if not is_device_error(error):
                raise
            raise UserError(f"/step: {describe(error)}; {self.run.description} stays") from None
        return self.run.description

    def _help(self, argument: str) -> str:
        _no_argument("help", argument)
        rows = [(f"/{name} {command.argument}".rstrip(), command.meaning) for name, command in COMMANDS.items()]
        width = max(len(usage) for usage, _ in rows)
        return "\n".join(f"{usage:<{width}}  {meaning}" for usage, meaning in rows)


def _option(option: str, parser: Any, name: str) -> Callable[[ChatSession, str], str]:
    """A command that shows or sets one of the sampling options."""

    def run(session: ChatSession, argument: str) -> str:
        if argument:
            try:
                value = None if option == "seed" and argument == "-" else parser.parse(argument)
            except ValueError as error:
                raise UserError(f"/{name} {error}, found {argument!r}") from None
            options = dataclasses.replace(session.options, **{option: value})
            options.check(called="{}")
            session.options = options
        value = getattr(session.options, option)
        return f"{option} is {'another one each time' if value is None else value}"

    return run


def split_command(line: str) -> tuple[str, str]:
    """Name and argument of a line that begins with a slash.

    Raises:
      UserError: there is no such command.
    """
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise UserError(f"there is no command /{name}: {hint}")
    return name, argument.strip()


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise UserError(f"/{name} takes no argument, found {argument!r}")


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise UserError(f"/{name} needs the name of a file")
    if problem := text_problem(argument):
        raise UserError(f"/{name} {problem}")
    try:
        return Path(argument).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"/{name}: {argument} is in the home folder of a user that there is none of") from None


def read_chat(path: Path, options: SamplingOptions) -> tuple[str, list[Turn], SamplingOptions]:
    """The system text, the turns and the sampling options of a chat that was saved; what it lacks of these: `options`.

    Raises:
      UserError: there is no such file, or it is no chat.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no saved chat: {' '.join(str(error).split())}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    drawn = value.get("sampling", {}) if isinstance(value, dict) else None
    if not isinstance(messages, list) or not isinstance(drawn, dict):
        raise UserError(f"{path} is no saved chat: it must be an object with a list 'messages'")
    system, turns = "", []
    for i, message in enumerate(messages):
        role, text = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        expected = ("user", "assistant")[len(turns) % 2]
        if text_problem(text) or not text.strip():
            raise UserError(f"{path}: messages[{i}] has no text in 'content'")
        if role == "system" and i == 0:
            system = text
        elif role == expected:
            turns.append(Turn(role, text.strip()))
        else:
            raise UserError(f"{path}: messages[{i}] is of {role!r} where {expected!r} must speak")
    if len(turns) % 2:
        raise UserError(f"{path}: the last message must be the assistant's")
    known = {field.name for field in dataclasses.fields(SamplingOptions)} - {"logprobs"}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in drawn.items() if name in known}
    try:
        options = dataclasses.replace(options, **values)
        options.check(called=f"{path}: {{}}")
    except TypeError as error:  # of another type altogether
        raise UserError(f"{path}: sampling: {error}") from None
    return system, turns, options


COMMANDS: dict[str, ChatCommand] = {
    "help": ChatCommand("", "this list", ChatSession._help),
    "retry": ChatCommand("", "another answer to the last question", None),
    "undo": ChatCommand("", "takes the last question and its answer back", ChatSession._undo),
    "reset": ChatCommand("", "begins a new conversation", ChatSession._reset),
    "system": ChatCommand("[TEXT]", "shows or sets the system prompt; -: none", ChatSession._set_system),
    "temp": ChatCommand("[X]", "temperature; 0: the likeliest token", _option("temperature", NUMBER, "temp")),
    "top_p": ChatCommand("[X]", "share of the probability to draw from", _option("top_p", NUMBER, "top_p")),
    "top_k": ChatCommand("[N]", "likeliest tokens to draw from; 0: all", _option("top_k", WHOLE, "top_k")),
    "min_p": ChatCommand("[X]", "share of the largest probability needed", _option("min_p", NUMBER, "min_p")),
    "repeat": ChatCommand(
        "[X]", "penalty of tokens that were there; 1: none", _option("repetition_penalty", NUMBER, "repeat")
    ),
    "max": ChatCommand("[N]", "tokens of an answer at most", _option("max_tokens", WHOLE, "max")),
    "seed": ChatCommand("[N]", "of the draws; -: another one each time", _option("seed", WHOLE, "seed")),
    "save": ChatCommand("FILE", "writes the conversation", ChatSession._save),
    "load": ChatCommand("FILE", "goes on with one that was saved", ChatSession._load),
    "step": ChatCommand("[N]", "takes another checkpoint: a step, best or latest", ChatSession._step),
    "quit": ChatCommand("", "ends the chat, as Ctrl-D does", None),
}
