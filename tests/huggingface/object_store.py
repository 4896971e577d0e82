"""Exports to a server of S3's protocol. Run by scripts/object_store.sh, which starts the server.

object_store.py FOLDER SERVER'S_PROCESS
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import s3fs
from untrained_run import write_untrained_run

from gpt_jax.errors import UserError
from gpt_jax.export import export
from gpt_jax.huggingface.donor import read_donor
from gpt_jax.runs.find import find_run
from gpt_jax.storage.files import StorageError
from gpt_jax.storage.upload import SUMS, sha256

OPTIONS = {"dtype": "float32", "most": 20_000, "force": False}


def refused(kind: type[Exception], to: str, run: str, **options) -> str:
    try:
        export(find_run(run), to, **OPTIONS | options)
    except kind as error:
        text = str(error)
    else:
        raise SystemExit(f"{to}: was not refused")
    print(f"refused: {text}")
    assert "\n" not in text
    return text


@contextlib.contextmanager
def at_the_tokenizer(happens: Callable[[], None]) -> Iterator[None]:
    """Lets something happen when the store is to take the tokenizer, after some files and before others."""
    put = s3fs.S3FileSystem._put_file

    async def put_file(self, local, remote, **options):
        if remote.endswith("tokenizer.json"):
            happens()
        return await put(self, local, remote, **options)

    s3fs.S3FileSystem._put_file = put_file
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        s3fs.S3FileSystem._put_file = put
        s3fs.S3FileSystem.clear_instance_cache()


def deny() -> None:
    raise PermissionError("Access Denied")


def main(work: Path, server: int) -> None:
    run = str(write_untrained_run(work / "chat", model__soft_cap=0.0, model__embed_dim=64))
    files = s3fs.S3FileSystem()
    files.mkdir("models")
    url = "s3://models/chat/1"
    export(find_run(run), url, **OPTIONS)
    there = sorted(name.rpartition("/")[2] for name in files.find("models/chat/1"))
    print(len(there), "objects:", *there)
    files.get("models/chat/1/", str(work / "back"), recursive=True)
    for line in (work / "back" / SUMS).read_text().splitlines():
        expected, name = line.split("  ")
        assert sha256(work / "back" / name) == expected, name
        there.remove(name)
    assert there == [SUMS]
    print(read_donor(str(work / "back")).description)

    assert "is not empty" in refused(UserError, url, run)
    export(find_run(run), url, **OPTIONS | {"force": True, "most": 10**9})
    files.invalidate_cache()
    assert files.exists(f"{url}/model.safetensors")
    assert not files.exists(f"{url}/model.safetensors.index.json")

    assert "bucket does not exist" in refused(StorageError, "s3://no-such-bucket/chat", run)
    with at_the_tokenizer(deny):
        assert "Access Denied" in refused(StorageError, "s3://models/chat/half", run)
    files.invalidate_cache()
    assert files.find("models/chat/half") == []
    with at_the_tokenizer(lambda: os.kill(server, signal.SIGKILL)):
        refused(StorageError, "s3://models/chat/2", run)  # the server dies half way
    refused(StorageError, "s3://models/chat/3", run)  # it is gone


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
