"""Imports of packages without what they import only because it is installed."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def absent(*names: str) -> Iterator[None]:
    """Imports within find none of these packages, but those that are imported already.

    For packages that go without them, and import them, which may take seconds, for users who want more than we do.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None there is a package that is not found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
