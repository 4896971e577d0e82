"""The table of primitives in docs/primitives.md."""

from collections import Counter
from pathlib import Path

from vk_kernels.tools.conformance.suite import SUBJECTS, cases, names
from vk_kernels.tools.conformance.unsupported import UNSUPPORTED, UNSUPPORTED_DTYPES

BEGIN, END = "<!-- primitives -->", "<!-- /primitives -->"


def table() -> str:
    """Markdown table of primitives. The numbers are of the full set of cases, all of which pass, or a test fails."""
    counts = Counter({name: len(cases(name, full=True)) for name in names()})
    lines = [
        f"`vk_kernels.jit` has {len(counts)} primitives of JAX, each compared with XLA ({counts.total():,} cases over",
        "shapes, dtypes, axes and dimension numbers, forward and backward), in f32, bf16, f16, signed and unsigned",
        f"integers of 8, 16 and 32 bits and bool. {len(UNSUPPORTED)} others are an error that names them and the line.",
        "",
        "| supported | primitives (cases) |",
        "| --- | --- |",
    ]
    for subject, module_names in SUBJECTS.items():
        shown = ", ".join(f"`{name}` ({counts[name]})" for name in sorted(module_names))
        lines.append(f"| {subject} | {shown} |")
    lines += ["", "| not supported | what it would need |", "| --- | --- |"]
    for reason in dict.fromkeys(UNSUPPORTED.values()):
        shown = ", ".join(f"`{name}`" for name, its in sorted(UNSUPPORTED.items()) if its == reason)
        lines.append(f"| {shown} | {reason} |")
    lines += [f"| {dtypes} | {reason} |" for dtypes, reason in UNSUPPORTED_DTYPES.items()]
    return "\n".join(lines)


def with_table(page: str) -> str:
    """A page with the table as it is now, between its marks. Raises ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in the page: put them where the table is to be")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def write(path: str | Path) -> None:
    Path(path).write_text(with_table(Path(path).read_text()))
