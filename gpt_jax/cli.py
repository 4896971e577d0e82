"""How every command of the package starts and fails."""

import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from gpt_jax.config import UserError

BAD_INPUT = 2  # exit code for a mistake that the user can mend


def run_main(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] = ()) -> None:
    """`absl.app.run(main)`, with a bad flag or a `UserError` turned into one line on stderr and exit code 2.

    Args:
      main: takes the program's name and its arguments, returns the exit code; None is 0.
      arguments: names of the arguments that must stand beside the flags.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.WARNING)  # the libraries' chatter is not the program's output
        try:
            if len(argv) - 1 > len(arguments):
                raise UserError(f"unexpected argument {argv[-1]!r}: every option is written --name=value")
            if len(argv) - 1 < len(arguments):
                raise UserError(f"missing argument: {arguments[len(argv) - 1]}")
            return main(argv)
        except UserError as error:
            return _refuse(error)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, TypeError) as error:  # the last two: of a config's fields
        sys.exit(_refuse(error.args[0] if error.args else error))


def _refuse(error: object) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
