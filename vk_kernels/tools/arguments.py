"""How the tools of this package take their arguments and fail: a mistake costs one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from vk_kernels.errors import SettingError, VulkanError

BAD_INPUT = 2  # exit code for a mistake that the user can mend
_INTERRUPTED = 130
_CLOSED_PIPE = 141


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with one line for a mistake instead of the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {' '.join(message.split())} (--help lists the arguments)\n")


def run_tool(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main`, or with one line for what Vulkan or the user stopped it by.

    Quietly, as SIGPIPE does, where nobody reads on.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _CLOSED_PIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not written yet
    except VulkanError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = BAD_INPUT if isinstance(error, SettingError) else 1
    except KeyboardInterrupt:
        code = _INTERRUPTED
    sys.exit(code)
