"""Measured choices of tiles, by product: what `benchmarks/tune_tiles.py` found on this device, kept on disk.

A product that is in the table is made as the table says; of any other, `gemm.choose_tile` estimates what is best. The
order in which a product's sums are added depends on the choice: with another table, last bits differ.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vk_kernels.runtime import disk_cache

if TYPE_CHECKING:
    from vk_kernels.runtime.physical_device import DeviceInfo


class Product(NamedTuple):
    """A product by all that its choice may depend on."""

    family: str  # of kernels
    types: str  # of its operands, and of C where that has another one
    m: int
    n: int
    k: int
    batch: int
    transpose_a: bool
    transpose_b: bool

    @property
    def k_inner(self) -> bool:
        """Whether the rows of both operands run along k."""
        return self.transpose_b and not self.transpose_a

    def __str__(self) -> str:
        """The key in a table: family, types, sizes, and how A and B lie (n: as they are, t: transposed)."""
        layout = "nt"[self.transpose_a] + "nt"[self.transpose_b]
        sizes = "x".join(map(str, (*((self.batch,) if self.batch > 1 else ()), self.m, self.n, self.k)))
        return f"{self.family} {self.types} {sizes} {layout}"


class Choice(NamedTuple):
    """The tile of a product, and into how many slices k is cut."""

    m: int
    n: int
    k: int
    splits: int


_asked: Callable[[Product], Choice | None] | None = None


def choice_for(info: "DeviceInfo", product: Product) -> Choice | None:
    """The choice of the device's table for a product; None: it has none."""
    if _asked is not None:
        return _asked(product)
    return _read(file_of(info)).get(str(product))


@contextlib.contextmanager
def answering(asked: Callable[[Product], Choice | None]) -> Iterator[None]:
    """Has `asked` say what the table would, for a search; plans that are cached stay as they are."""
    global _asked
    _asked, before = asked, _asked
    try:
        yield
    finally:
        _asked = before


def file_of(info: "DeviceInfo") -> Path:
    """The file of a device's table; whatever its driver is."""
    return disk_cache.root() / "tiles" / f"{info.vendor_id:04x}-{info.device_id:04x}.json"


def keep(info: "DeviceInfo", choices: Mapping[Product, Choice]) -> Path:
    """Adds choices to the device's table; returns its file. Raises OSError where it cannot be written."""
    file = file_of(info)
    products = {str(product): list(choice) for product, choice in {**_read(file), **choices}.items()}
    table = {"device": info.name, "driver": info.driver, "products": products}
    disk_cache.replace(file, json.dumps(table, indent=1).encode())
    _read.cache_clear()
    return file


@functools.cache
def _read(file: Path) -> dict[str, Choice]:
    """The choices of a table by their keys; none where there is no table, or, with a warning, a damaged one."""
    try:
        products = json.loads(file.read_text())["products"]
        return {str(key): Choice(*map(int, choice)) for key, choice in products.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"the table of tiles {file} is left out, it cannot be read: {error!r}", stacklevel=2)
        return {}
