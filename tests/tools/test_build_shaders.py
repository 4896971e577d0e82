"""The shader build: what ships matches its sources, is what the manifest says, and a mismatch is found."""

import hashlib
import json
import shutil
import struct

import pytest

from vk_kernels.runtime import features
from vk_kernels.runtime.features import CAPABILITIES
from vk_kernels.spirv.reflect import Reflection, reflect
from vk_kernels.tools import build_shaders as build_module
from vk_kernels.tools.build_shaders import (
    PACKAGE,
    BuildError,
    build,
    find_targets,
    find_tool,
    main,
    out_of_date,
    read_manifest,
)


def compiler_missing() -> str:
    try:
        for tool in ("slangc", "spirv-opt", "spirv-val"):
            find_tool(tool)
    except BuildError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing())


@pytest.fixture
def package(tmp_path):
    """A copy of two shaders and their binaries, to change at will."""
    for folder, names in (
        ("shaders/memory", ("fill", "copy")),
        ("shaders/binaries", ("fill", "copy.f16", "copy.f32")),
    ):
        (tmp_path / folder).mkdir(parents=True)
        suffix = ".slang" if folder == "shaders/memory" else ".spv"
        for name in names:
            shutil.copy(PACKAGE / folder / f"{name}{suffix}", tmp_path / folder)
    kernels = {
        name: record for name, record in read_manifest(PACKAGE / "shaders" / "binaries").items() if name in names
    }
    (tmp_path / "shaders" / "binaries" / "manifest.json").write_text(json.dumps({"kernels": kernels}))
    return tmp_path


def test_what_ships_matches_its_sources():
    assert out_of_date(PACKAGE / "shaders", PACKAGE / "shaders" / "binaries") == {}


def test_the_manifest_says_what_the_binaries_are():
    for name, record in read_manifest(PACKAGE / "shaders" / "binaries").items():
        reflection = reflect((PACKAGE / "shaders" / "binaries" / f"{name}.spv").read_bytes())
        assert Reflection.from_json(record) == reflection
        assert set(reflection.capabilities) <= set(CAPABILITIES)


def test_every_feature_that_is_enabled_is_used():
    kernels = {c for record in read_manifest(PACKAGE / "shaders" / "binaries").values() for c in record["capabilities"]}
    generated = {"Shader", "StorageBuffer16BitAccess", "StorageBuffer8BitAccess"}  # what `builder` declares
    used = {CAPABILITIES[c] for c in kernels | generated} - {None, *features._SUBGROUP_OPERATIONS}
    used |= {"timelineSemaphore", "maintenance4", "subgroupSizeControl", "computeFullSubgroups"}  # by the runtime
    used |= {"cooperativeMatrixWorkgroupScope", "cooperativeMatrixFlexibleDimensions"}  # have no capability
    enabled = features.ALL_FEATURES - {*features._PLAIN_EXTENSIONS, *features._SUBGROUP_OPERATIONS}
    assert enabled == used


def test_a_changed_source_without_its_binary_fails_the_check(package, capsys):
    assert main(["--check"], package) == 0
    source = package / "shaders" / "memory" / "copy.slang"
    source.write_text(source.read_text() + "\n")
    assert main(["--check"], package) == 1
    said = capsys.readouterr().err
    assert "copy.f32: copy.slang or what it imports changed" in said
    assert "copy.f16" in said
    assert "fill" not in said


def test_a_changed_import_fails_the_check(package):
    module = package / "shaders" / "common" / "words.slang"
    module.parent.mkdir()
    module.write_text("public uint word() { return 1; }\n")
    source = package / "shaders" / "memory" / "fill.slang"
    source.write_text("import words;\n" + source.read_text())
    targets = {target.name: target for target in find_targets(package / "shaders")}
    before = build_module.source_hash(targets["fill"])
    untouched = build_module.source_hash(targets["copy.f32"])
    module.write_text("public uint word() { return 2; }\n")
    assert build_module.source_hash(targets["fill"]) != before
    assert build_module.source_hash(targets["copy.f32"]) == untouched


def test_a_changed_missing_or_left_over_binary_fails_the_check(package):
    spirv = package / "shaders" / "binaries"
    (spirv / "fill.spv").write_bytes((spirv / "fill.spv").read_bytes() + b"\0\0\0\0")
    (spirv / "copy.f16.spv").unlink()
    (spirv / "old.spv").write_bytes(b"")
    assert out_of_date(package / "shaders", spirv) == {
        "copy.f16": "not built",
        "fill": "the binary is not the one that was built",
        "old": "no source declares it",
    }


def test_flags_are_part_of_the_hash(package, monkeypatch):
    monkeypatch.setattr(build_module, "OPT_FLAGS", ("-Os",))
    assert set(out_of_date(package / "shaders", package / "shaders" / "binaries")) == {"fill", "copy.f16", "copy.f32"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("//! variants f32: T=float", "cannot read '//! variants f32: T=float'"),
        ("//! variant f32 (nothing): T=float", r"variant f32 names \['nothing'\], but the entry points are \['fill'\]"),
        ("import nowhere;", r"fill.slang: imports nowhere.slang, which is neither in memory/ nor in common/"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_named(package, text, message):
    source = package / "shaders" / "memory" / "fill.slang"
    source.write_text(text + "\n" + source.read_text())
    with pytest.raises(BuildError, match=message):
        out_of_date(package / "shaders", package / "shaders" / "binaries")


def test_one_name_for_two_kernels_is_refused(package):
    shutil.copy(package / "shaders" / "memory" / "fill.slang", package / "shaders" / "memory" / "second.slang")
    with pytest.raises(BuildError, match=r"fill: declared in fill.slang and second.slang"):
        find_targets(package / "shaders")


def test_variants_may_hold_for_some_entry_points(package):
    entry = '[shader("compute")]\n[numthreads(1, 1, 1)]\nvoid {}(uint3 id : SV_DispatchThreadID) {{}}\n'
    text = "//! variant f32: T=float\n//! variant fast (b): T=half FAST\n" + entry.format("a") + entry.format("b")
    (package / "shaders" / "memory" / "pair.slang").write_text(text)
    targets = {target.name: target.defines for target in find_targets(package / "shaders") if target.entry in "ab"}
    assert targets == {"a.f32": ("T=float",), "b.f32": ("T=float",), "b.fast": ("T=half", "FAST")}


def test_what_is_not_spirv_is_refused():
    with pytest.raises(ValueError, match=r"not SPIR-V"):
        reflect(b"hello, world, this is text")
    with pytest.raises(ValueError, match=r"0 compute entry points called 'other'"):
        reflect((PACKAGE / "shaders" / "binaries" / "fill.spv").read_bytes(), "other")


def test_an_unknown_name_lists_what_there_is(package, capsys):
    assert main(["matmul"], package) == 2
    assert "no kernel is called matmul; there are copy, copy.f16, copy.f32, fill" in capsys.readouterr().err


@pytest.mark.slow
@needs_compiler
def test_a_build_reproduces_the_binaries_to_the_bit(package):
    before = {file.name: file.read_bytes() for file in (package / "shaders" / "binaries").glob("*.spv")}
    assert build(package / "shaders", package / "shaders" / "binaries") == []
    assert build(package / "shaders", package / "shaders" / "binaries", ["fill", "copy"]) == [
        "copy.f32",
        "copy.f16",
        "fill",
    ]
    assert {file.name: file.read_bytes() for file in (package / "shaders" / "binaries").glob("*.spv")} == before


@needs_compiler
def test_a_build_mends_what_the_check_finds(package):
    source = package / "shaders" / "memory" / "fill.slang"
    source.write_text(source.read_text().replace("256", "128"))
    (package / "shaders" / "memory" / "copy.slang").unlink()
    assert build(package / "shaders", package / "shaders" / "binaries") == ["fill"]
    assert out_of_date(package / "shaders", package / "shaders" / "binaries") == {}
    assert sorted(read_manifest(package / "shaders" / "binaries")) == ["fill"]
    assert [file.name for file in (package / "shaders" / "binaries").glob("*.spv")] == ["fill.spv"]
    assert read_manifest(package / "shaders" / "binaries")["fill"]["spec_constants"][0]["default"] == 128


@needs_compiler
def test_a_shader_that_does_not_compile_shows_the_compilers_words(package, capsys):
    (package / "shaders" / "memory" / "fill.slang").write_text(
        '[shader("compute")]\n[numthreads(1, 1, 1)]\nvoid fill(uint3 id : SV_DispatchThreadID) { nothing(id); }\n'
    )
    assert main([], package) == 1
    said = capsys.readouterr().err
    assert "fill: slangc failed" in said
    assert "nothing" in said


SIZES = """
[[vk::constant_id(3)]] const uint TILE = 16;
[[vk::constant_id(7)]] const bool CAUSAL = true;
[[vk::constant_id(8)]] const float SCALE = 0.5;
[[vk::constant_id(9)]] const int SHIFT = -2;
struct Inner { uint counts[3]; uint last; };
struct Params { uint rows; float2 pair; uint64_t seed; Inner inner; };
[[vk::push_constant]] Params params;
[[vk::binding(0)]] StructuredBuffer<float> first;
[[vk::binding(2)]] RWStructuredBuffer<float4> third;
groupshared float tile[32][33];
groupshared uint total;

[shader("compute")]
[numthreads(TILE, 2, 1)]
void sizes(uint3 id : SV_DispatchThreadID, uint3 local : SV_GroupThreadID)
{
    tile[local.x][local.y] = first[id.x] * SCALE + params.pair.y + float(params.seed)
        + float(params.inner.counts[id.x % 3] + params.inner.last);
    if (id.x == 0) total = CAUSAL ? params.rows : uint(SHIFT);
    GroupMemoryBarrierWithGroupSync();
    third[id.x] = tile[local.y][local.x] + float(total) + WaveActiveSum(float(id.x));
}
"""


@needs_compiler
def test_reflection_reads_sizes_constants_and_bindings(package):
    (package / "shaders" / "memory" / "sizes.slang").write_text(SIZES)
    build(package / "shaders", package / "shaders" / "binaries", ["sizes"])
    code = (package / "shaders" / "binaries" / "sizes.spv").read_bytes()
    found = reflect(code)
    assert found.workgroup == ("TILE", 2, 1)
    assert [(c.id, c.name, c.type, c.default) for c in found.spec_constants] == [
        (3, "TILE", "uint32", 16),
        (7, "CAUSAL", "bool", True),
        (8, "SCALE", "float32", 0.5),
        (9, "SHIFT", "int32", -2),
    ]
    assert [(b.binding, b.name, b.writable, b.types) for b in found.bindings] == [
        (0, "first", False, ("float32",)),
        (2, "third", True, ("float32",)),
    ]
    assert [(c.name, c.type, c.offset, c.count) for c in found.push_constants] == [
        ("rows", "uint32", 0, 1),
        ("pair", "float32", 8, 2),
        ("seed", "uint64", 16, 1),
        ("inner.counts", "uint32", 24, 3),
        ("inner.last", "uint32", 36, 1),
    ]
    assert found.push_constant_bytes == 40  # 4, 4 of padding, 8, 8, 12, 4
    assert found.shared_bytes == 32 * 33 * 4 + 4
    assert {"Int64", "GroupNonUniformArithmetic"} <= set(found.capabilities)
    assert read_manifest(package / "shaders" / "binaries")["sizes"]["spirv_sha256"] == hashlib.sha256(code).hexdigest()


@needs_compiler
def test_a_kernel_may_take_nothing_but_storage_buffers(package):
    (package / "shaders" / "memory" / "image.slang").write_text(
        "Texture2D<float> image;\nRWStructuredBuffer<float> output;\n"
        '[shader("compute")]\n[numthreads(1, 1, 1)]\nvoid look(uint3 id : SV_DispatchThreadID)\n'
        "{ output[id.x] = image[id.xy]; }\n"
    )
    with pytest.raises(BuildError, match=r"look: 'image' is no storage buffer"):
        build(package / "shaders", package / "shaders" / "binaries", ["look"])


def test_spirv_of_no_known_capability_is_refused():
    code = bytearray((PACKAGE / "shaders" / "binaries" / "fill.spv").read_bytes())
    words = list(struct.unpack(f"<{len(code) // 4}I", code))
    assert words[5] == 2 << 16 | 17  # OpCapability
    words[6] = 999999
    with pytest.raises(ValueError, match=r"fill: unknown SPIR-V capabilities \[999999\]"):
        reflect(struct.pack(f"<{len(words)}I", *words))
