"""The tensors of a folder of transformers: model.safetensors, or several such files and an index."""

import itertools
import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt_jax.errors import UserError
from gpt_jax.model.parameters import listing
from gpt_jax.storage.files import os_error_of, unreadable, writing
from gpt_jax.storage.json_file import read_object

MODEL_CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_READ = ("F32", "BF16", "F16")  # as the format calls them
_OTHERS = re.compile(r"(pytorch_model.*\.bin|.*\.pth?|tf_model\.h5|flax_model\.msgpack|.*\.gguf)(\.index\.json)?")


def read_tensors(folder: Path, ignored: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], str]:
    """All tensors of a folder but those whose names are `ignored`, in f32, and the types that they are stored in.

    Raises:
      UserError: there are none, or a file of them is missing, damaged or of integers.
      StorageError: a file cannot be read.
    """
    tensors: dict[str, np.ndarray] = {}
    kinds = set()
    for file, names in _files(folder).items():
        for name, kind, tensor in _read_file(folder / file, names, ignored):
            if name in tensors:
                raise UserError(f"{folder}: the tensor {name} is in two files, one of them {file}")
            tensors[name] = tensor
            kinds.add(kind)
    return tensors, " and ".join(sorted(kinds))


def _files(folder: Path) -> dict[str, list[str] | None]:
    """The files of a folder's tensors, and which of them each has; None: all that it has."""
    if (folder / WEIGHTS).exists():  # transformers prefers it to an index as well
        return {WEIGHTS: None}
    if (folder / INDEX).exists():
        index = read_object(folder / INDEX, known=None, types={"weight_map": dict})
        files: dict[str, list[str]] = {}
        for name, file in (index.get("weight_map") or {}).items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{folder / INDEX}: {name} is in {file!r}, which is no name of a file beside it")
            files.setdefault(file, []).append(name)
        if not files:
            raise UserError(f"{folder / INDEX} names no tensor: put back a good copy")
        return dict(files)
    if others := sorted(file.name for file in folder.iterdir() if _OTHERS.fullmatch(file.name)):
        raise UserError(
            f"{folder} has no {WEIGHTS} but {listing(others)}, which is not read here; convert it where torch and "
            'transformers are installed: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise UserError(f"{folder} has no {WEIGHTS}, nor {INDEX}: give the folder of a model")


def _read_file(
    path: Path, names: list[str] | None, ignored: Callable[[str], bool]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, stored type, f32 tensor) of those of `names`, or of all, in a file."""
    if not path.is_file():
        raise UserError(f"{path} is missing: put it back")
    try:
        with safe_open(path, framework="np") as file:
            there = set(file.keys())
            if missing := [name for name in names or () if name not in there]:
                raise UserError(f"{path} has no tensor {listing(missing)}, which {INDEX} says is in it")
            wanted = list(itertools.filterfalse(ignored, sorted(there)))
            if names is not None and (unnamed := [name for name in wanted if name not in names]):
                raise UserError(
                    f"{path} has {listing(unnamed)}, which {INDEX} does not name: put back a good copy of it"
                )
            for name in wanted:
                kind = file.get_slice(name).get_dtype()
                if kind not in _READ:
                    raise UserError(f"{path}: {name} is of type {kind}, and only {', '.join(_READ)} are read")
                yield name, kind, file.get_tensor(name).astype(np.float32)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; put back a good copy") from None


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], most: int) -> list[Path]:
    """Writes tensors into as many files as it takes for none to have more than `most` bytes, but for a single tensor.

    Raises:
      StorageError: the disk did not take them.
    """
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(names, parts, strict=True):
        save_tensors(folder / file, part)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part},
        }
        with writing(folder / INDEX):
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / file for file in names]


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file.

    The library writes a view in the order of its memory, so that all are made contiguous, and gives a file to its owner
    alone, so that it gets the mode of one that was made here.

    Raises:
      StorageError: the disk did not take it.
    """
    with writing(path):
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        try:
            whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
            save_file(whole, path, metadata={"format": "pt"})  # what transformers asks for
            path.chmod(mode)
        except SafetensorError as error:
            raise (os_error_of(error) or error) from None
