"""Arrays that live on a Vulkan device, without JAX, whose methods `bridge.array_methods` adds to them."""

import functools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.lifetime import DonationState
from vk_kernels.runtime.memory import Buffer

if TYPE_CHECKING:
    from vk_kernels.runtime.device import Device


class ArrayType(NamedTuple):
    """An array's shape and dtype. weak_type: JAX's mark of a type that came from a Python number."""

    shape: tuple[int, ...]
    dtype: np.dtype
    weak_type: bool

    @property
    def spec(self) -> ArraySpec:
        """The type without its weakness."""
        return ArraySpec(self.shape, self.dtype)

    def __str__(self) -> str:
        return str(self.spec)


# Interned, so that the types of arguments can be compared by identity.
array_type = functools.lru_cache(maxsize=65_536)(ArrayType)


class _ReprStyle(threading.local):
    """The style of `repr` in this thread: without contents it copies nothing from the device."""

    has_contents = True


repr_style = _ReprStyle()
_OWN = DonationState()  # of arrays that are donated one by one


class Array:
    """A dense array in device memory, row-major. It is never changed; a donated one is gone.

    A leaf of pytrees. numpy and JAX take it as they take any array, by a copy to the host, which waits for what
    computes it. It is no `jax.Array`, and `isinstance` says so, but has that class's operators and methods, which
    compute on the host. To JAX it lies where such copies do: that is its `sharding`; its `device` is the Vulkan device.
    Pickled, it is its contents, which are uploaded again to the device of `vk_kernels.use`, or else the process's.
    """

    __slots__ = ("__weakref__", "_buffer", "_donation", "type")
    __hash__ = None  # as of every array that compares by element
    __array_priority__ = 100  # numpy leaves what it has on the left to us

    def __init__(self, buffer: Buffer, type: ArrayType, donation: DonationState = _OWN):
        self._buffer: Buffer | None = buffer
        self.type = type
        self._donation = donation

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> np.dtype:
        return self.type.dtype

    __numpy_dtype__ = dtype

    @property
    def weak_type(self) -> bool:
        return self.type.weak_type

    @property
    def buffer(self) -> Buffer:
        """The array's memory. Raises RuntimeError where it was donated or deleted."""
        if self._buffer is None or self._donation.donated:
            raise RuntimeError(f"this array, {self.type}, was donated or deleted: use what the function gave back")
        return self._buffer

    @property
    def device(self) -> "Device":
        return self.buffer.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return self.type.spec.size

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.type.spec.nbytes

    def on_device_size_in_bytes(self) -> int:
        return self.buffer.size

    committed = False
    is_fully_addressable = True
    is_fully_replicated = True

    def numpy(self) -> np.ndarray:
        """A copy on the host, once it is computed."""
        while True:  # a call in another thread may move it meanwhile, and take its memory
            buffer = self.buffer
            found = buffer.read(self.dtype, self.shape)
            if self._buffer is buffer:
                return found

    def block_until_ready(self) -> "Array":
        """Returns when it is computed."""
        self.device.wait(self.buffer.owner.last_use)
        return self

    def is_ready(self) -> bool:
        """Whether it is computed."""
        return self.buffer.owner.last_use <= self.device.completed()

    def copy_to_host_async(self) -> None:
        """Nothing to begin: small results lie in memory that the host reads where it is. For loops written for JAX."""

    def is_deleted(self) -> bool:
        """Whether it was donated or deleted."""
        return self._buffer is None or self._donation.donated

    def delete(self) -> None:
        """Gives its memory back."""
        self._buffer = None
        self._donation.all_alive = False

    def move_to(self, buffer: Buffer) -> None:
        """Makes `buffer` its memory, where its content has been copied."""
        self._buffer = buffer

    def item(self) -> Any:
        """The only element, as a Python number."""
        return self.numpy().item()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on a Vulkan device is copied to the host: copy=False cannot be met")
        found = self.numpy()
        return found if dtype is None else found.astype(dtype)

    def _scalar(self) -> Any:
        if self.shape:
            raise TypeError(f"only an array without axes is a Python number; this is {self.type}")
        return self.item()

    def __float__(self) -> float:
        return float(self._scalar())

    def __int__(self) -> int:
        return int(self._scalar())

    def __index__(self) -> int:
        return self.numpy().__index__()

    def __bool__(self) -> bool:
        return bool(self.item() if self.size == 1 else self.numpy())  # numpy says what of several is ambiguous

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a scalar array")
        return self.shape[0]

    def copy(self) -> "Array":
        """A copy in memory of its own."""
        return Array(self.device.upload(self.numpy()), self.type)

    def __copy__(self) -> "Array":
        return self.copy()

    def __deepcopy__(self, memo: Any) -> "Array":
        return self.copy()

    def __repr__(self) -> str:
        if self.is_deleted():
            return f"Array({self.type}, deleted)"
        if not repr_style.has_contents:
            return f"Array({self.type})"
        return f"Array({self.numpy()}, {self.type})"
