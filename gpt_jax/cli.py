"""The start and the failures of every command of the package."""

import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from gpt_jax.errors import UserError
from gpt_jax.output import flushed_output, open_streams
from gpt_jax.signals import resend_swallowed
from gpt_jax.storage.files import StorageError, explain

BAD_INPUT = UserError.exit_code


def run_main(
    main: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str] = (),
    more: str = "",
    define: Callable[[flags.FlagValues], None] = lambda _: None,
) -> None:
    """`absl.app.run(main)`, with a bad flag, a `UserError` or a failing file turned into one line on stderr.

    Args:
      main: takes the program's name and its arguments, returns the exit code; None is 0.
      arguments: names of the arguments that must stand beside the flags.
      more: the name of any number of arguments after these; empty: there are none.
      define: defines the flags, all of which --help shows.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        imports_done()
        logging.set_verbosity(logging.WARNING)  # the libraries' chatter is not the program's output
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resend_swallowed()
        try:
            if len(argv) - 1 > len(arguments) and not more:
                raise UserError(f"unexpected argument {argv[-1]!r}: every option is written --name=value")
            if len(argv) - 1 < len(arguments):
                raise UserError(f"missing argument: {arguments[len(argv) - 1]}")
            return main(argv)
        except UserError as error:
            return _refuse(error, error.exit_code)
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            return 128 + getattr(error, "number", signal.SIGINT)
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # standard output's
                raise
            if error.filename is None:
                sys.stdout.flush()  # if it fails, standard output did; what it dropped is not known
            where = error.filename or "standard output or a file without a name cannot be written or read"
            return _refuse(f"{where}: {explain(error)}", StorageError.exit_code)

    open_streams()
    with flushed_output():
        try:
            define_flags_of_command(define)
        except (flags.Error, UserError) as error:  # a --flagfile is read already, and the config of a run
            sys.exit(_refuse(in_plain_words(error)))
        app.run(guarded, flags_parser=_parse_or_exit)


def define_flags_of_command(
    define: Callable[[flags.FlagValues], None], flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines flags, and has --help show them: by itself it shows those alone that the program's own file defines."""
    before = {*flag_values}
    define(flag_values)
    for name in {*flag_values} - before:
        if not name.startswith("config."):  # settings, which gpt_jax/config.py explains
            flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])


def require_jax() -> None:
    """Imports JAX, or ends the process in one line if that cannot be for the value of one of its variables.

    Garbage is not collected from here until `imports_done`: imports make none, and looking for it takes a sixth of
    their time.
    """
    gc.disable()
    try:
        import jax  # noqa: F401
    except ValueError as error:
        found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("JAX_")]
        sys.exit(_refuse(f"JAX does not start: {error}; set or unset the variable (there are {', '.join(found)})"))


def imports_done() -> None:
    """Collects garbage again."""
    gc.enable()


def _parse_or_exit(argv: Sequence[str]) -> list[str]:
    try:
        return parse_flags(argv)
    except UserError as error:
        sys.exit(_refuse(error))


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Takes the values of all flags from a command line; returns the program's name and the other arguments.

    Raises:
      UserError: a flag is unknown, or its value is none that it can have.
    """
    try:
        return flag_values(argv)
    except flags.UnrecognizedFlagError as error:
        if "config" in flag_values and error.flagname.startswith("config."):
            raise UserError(f"--{error.flagname} changes a config: give --config=FILE before it") from None
        if "config" in flag_values and hasattr(flag_values["config"].value, error.flagname):
            raise UserError(
                f"there is no flag --{error.flagname}; a config's value is --config.{error.flagname}"
            ) from None
        raise UserError(str(error)) from None
    except flags.Error as error:
        if left_out := _LEFT_OUT.match(str(error)):
            help_text = flag_values[left_out[1]].help
            raise UserError(f"missing --{left_out[1]}=...: {help_text[:1].lower()}{help_text[1:]}") from None
        raise UserError(in_plain_words(error)) from None


_LEFT_OUT = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None")


def in_plain_words(error: Exception) -> str:
    """The message of an error of a flag; absl puts "flag --NAME=VALUE" before what a parser said."""
    inner = error.__context__
    if isinstance(inner, UserError):
        return str(inner)
    return re.sub(r"\('Non-boolean argument to boolean flag', .*\)", "must be true or false", str(error))


def _refuse(error: object, exit_code: int = BAD_INPUT) -> int:
    """Prints why a command ends, in one line, and returns its exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return exit_code
