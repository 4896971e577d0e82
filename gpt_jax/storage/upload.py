"""Files handed to an object store by fsspec; their checksums come last, and say that all are there."""

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.storage.files import StorageError

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
_PIECE = 2**20  # bytes


def is_url(name: str) -> bool:
    """Whether a target is the URL of a file system, and not a local folder."""
    return "://" in name


def open_target(url: str, *, replace: bool, ours: Collection[str]) -> "RemoteFolder":
    """The place that a URL means, `gs://`, `s3://`, `file://` or another of fsspec's.

    Args:
      replace: whether files of names `ours` may be there, which are replaced then.
      ours: names of files that may be replaced; `SUMS` is one anyway.

    Raises:
      UserError: the URL cannot be used, or files are there.
      StorageError: the store does not answer.
    """
    protocol, _, rest = url.partition("://")
    if not rest.strip("/"):
        raise UserError(f"{url} names no place: give {protocol}://BUCKET/FOLDER")
    options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
    try:
        import fsspec  # comes with orbax; the packages of single stores do not

        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(
            f"{url}: {protocol}:// needs a package that is not installed: {error} (uv pip install s3fs, for s3://; "
            "gcsfs, for gs://)"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None
    target = RemoteFolder(url, system, root.rstrip("/"))
    found = target.names()
    if found and not replace:
        raise UserError(f"{url} is not empty, it has {found[0]}: give another place, or --force to replace its model")
    if others := [name for name in found if name not in ours and name != SUMS]:  # upload removes what is not new
        raise UserError(f"{url} holds {others[0]}, which is no file of a model, and is not replaced: move it away")
    return target


class RemoteFolder:
    """A folder of a remote file system."""

    def __init__(self, url: str, system: Any, root: str) -> None:
        self._url, self._system, self._root = url, system, root

    def names(self) -> list[str]:
        """The files that are there, relative to the folder."""
        with self._telling("read"):
            self._system.invalidate_cache()
            found = self._system.find(self._root)
        return sorted(name.removeprefix(self._root).lstrip("/") for name in found)

    def upload(self, folder: Path) -> None:
        """Copies the files of a folder, then their checksums, `SUMS`: while these are missing, the copy is not whole.

        Raises:
          StorageError: the store refused one; those that were copied are removed again where it lets them.
        """
        files = sorted(file for file in folder.iterdir() if file.is_file())
        copied: list[str] = []
        try:
            with self._telling("written"):
                if self._system.exists(self._path(SUMS)):
                    self._system.rm_file(self._path(SUMS))
                for file in files:
                    copied.append(file.name)
                    self._system.put_file(str(file), self._path(file.name))
                for name in set(self.names()) - {file.name for file in files}:
                    self._system.rm_file(self._path(name))  # of the model that this one replaces
                sums = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
                copied.append(SUMS)
                self._system.pipe_file(self._path(SUMS), sums.encode())
        except BaseException:
            for name in reversed(copied):
                with contextlib.suppress(Exception):  # the store may be gone; without SUMS they are no copy
                    self._system.rm_file(self._path(name))
            raise

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turns what the library of a store raises, which has errors of its own, into one line."""
        try:
            yield
        except (StorageError, UserError):
            raise
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise StorageError(f"{self._url} cannot be {what}: {cause}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
