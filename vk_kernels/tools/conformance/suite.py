"""All cases, by what their primitives do."""

from vk_kernels.tools.conformance import combining, elementwise, functions, moving
from vk_kernels.tools.conformance.registry import PrimitiveCase, cases, names

__all__ = ["SUBJECTS", "PrimitiveCase", "cases", "names"]

_MODULES = {
    "elementwise": elementwise,
    "moving elements": moving,
    "combining elements": combining,
    "functions, loops, branches, random bits": functions,
}
SUBJECTS = {subject: names(module.__name__) for subject, module in _MODULES.items()}
