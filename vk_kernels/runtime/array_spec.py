"""ArraySpec: what is known of an array before it has memory."""

import math
from typing import NamedTuple

import numpy as np


class ArraySpec(NamedTuple):
    """Shape and dtype of a dense array in row-major order. bf16 is `ml_dtypes.bfloat16`."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"
