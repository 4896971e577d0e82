"""A chat with a trained model in the terminal: `python -m gpt_jax.chat RUN`.

RUN is a run's folder, latest or best, and RUN@STEP another of its checkpoints; see `gpt_jax.runs.find`. Answers come as
they are made. /help lists the commands, Ctrl-C ends an answer, Ctrl-D the chat. In a pipe, each line is a question or a
command; answers go to standard output, all else to standard error.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from gpt_jax.cli import require_jax, run_main

if __name__ == "__main__":
    require_jax()  # before it is imported below

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from gpt_jax.backend import print_device_error
from gpt_jax.config import BACKENDS, text_problem
from gpt_jax.errors import UserError
from gpt_jax.inference.chat_session import COMMANDS, ChatSession, read_chat, split_command
from gpt_jax.inference.engine import EngineFailed
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.inference.sampling_flags import define_sampling_flags, options_of_flags
from gpt_jax.inference.served_run import open_run

FLAGS = flags.FLAGS
_OPTIONS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("max_tokens", "seed"),
)


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    flags.DEFINE_enum("backend", None, BACKENDS, "Instead of the config's.", **here)
    flags.DEFINE_string("system", "", "Text that the conversation begins with.", **here)
    flags.DEFINE_string("load", None, "File of a conversation to go on with.", **here)
    define_sampling_flags(flag_values, _OPTIONS, seed="Of the draws; without it, another one each time.")


def main(argv: Sequence[str]) -> int:
    options_of_flags(FLAGS, SamplingOptions())  # first: a typo costs no loading
    if problem := text_problem(FLAGS.system):
        raise UserError(f"--system {problem}")
    loaded = None if FLAGS.load is None else read_chat(Path(FLAGS.load), SamplingOptions())[:2]
    with contextlib.ExitStack() as stack:
        try:
            run = open_run(argv[1], stack, backend=FLAGS.backend or "")
        except (RuntimeError, MemoryError) as error:
            return print_device_error(error)
        session = ChatSession(run, options_of_flags(FLAGS, run.defaults), FLAGS.system)
        if loaded is not None:
            session.go_on(FLAGS.system or loaded[0], loaded[1])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        tell(f"{run.description}; {run.backend}")
        if in_terminal:
            tell("/help lists the commands, Ctrl-C ends an answer, Ctrl-D the chat")
        return chat(session, typed_lines() if in_terminal else piped_lines(), show=in_terminal)


def chat(session: ChatSession, lines: Iterator[str], *, show: bool) -> int:
    """Answers line after line; returns the exit code.

    Args:
      show: whether a person reads along: answers have a mark before them then, and a mistake is mended by going on;
        without, the exit code tells of it.
    """
    code = 0
    for line in lines:
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, argument = split_command(line)
                if name == "quit":
                    break
                if name != "retry":
                    tell(session.command(line))
                    continue
                if argument:
                    raise UserError(f"/retry takes no argument, found {argument!r}")
                answer = session.retry()
                tell(f"(seed {session.seed})")
            else:
                answer = session.ask(line.removeprefix("/") if line.startswith("//") else line)
            if session.notice:
                tell(f"({session.notice})")
            print_answer(answer, "gpt> " if show else "")
        except UserError as error:
            tell(f"error: {' '.join(str(error).split())}")
            code = code if show else error.exit_code
        except KeyboardInterrupt:  # while nothing is being answered: a checkpoint is read, say
            if not show:
                raise
            tell("^C")
        except EngineFailed as error:
            tell(f"error: {error}")
            return 1
    return code


def print_answer(pieces: Iterator[str], mark: str) -> None:
    """Prints an answer as it comes. Ctrl-C ends it, and the chat goes on."""
    is_first = True
    print(mark, end="", flush=True)
    try:
        with contextlib.closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                piece = printable(piece.lstrip() if is_first else piece)
                is_first = is_first and not piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print("^C", end="")
    finally:
        print(flush=True)


def printable(text: str) -> str:
    """A text that moves no cursor and colours nothing: a model may say any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def tell(line: str) -> None:
    """Prints what is no answer."""
    print(printable(line), file=sys.stderr, flush=True)


def typed_lines() -> Iterator[str]:
    """Lines that are typed in a terminal, with history, editing and completion of the commands."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    words = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(
        "you> ", completer=words, complete_while_typing=False, key_bindings=keys
    )
    while True:
        try:
            line = session.prompt()
        except KeyboardInterrupt:  # what was typed so far is dropped, as in a shell
            continue
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def piped_lines() -> Iterator[str]:
    """Lines of standard input, less empty ones.

    Raises:
      UserError: it is not text in UTF-8.
    """
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError:
        raise UserError("standard input is not text in UTF-8") from None


if __name__ == "__main__":
    run_main(main, arguments=["RUN"], define=define_flags)
