"""Features and limits of a Vulkan device, by the names that Vulkan gives them.

`_FEATURE_STRUCTS` serves twice: to ask a physical device what it has, and to enable just that when it is opened. It has
what a kernel or the runtime uses and nothing else: some drivers are slower with a feature that nobody needs.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from vk_kernels.runtime import vulkan
from vk_kernels.runtime.vulkan import ffi, vk


class _Row(NamedTuple):
    struct: str | int  # the struct's name, or its sType where the package lacks it
    members: tuple[str, ...]  # the members that we want; all of them, in order, for a struct given by its sType
    extension: str | None  # that brings it
    core: tuple[int, int] | None  # the Vulkan version that took it in


_FEATURE_STRUCTS = (
    _Row(
        "VkPhysicalDeviceVulkan11Features",
        ("storageBuffer16BitAccess",),
        None,
        (1, 2),
    ),
    _Row(
        "VkPhysicalDeviceVulkan12Features",
        (
            "storageBuffer8BitAccess",
            "shaderFloat16",
            "timelineSemaphore",
            "vulkanMemoryModel",
            "vulkanMemoryModelDeviceScope",
        ),
        None,
        (1, 2),
    ),
    _Row(
        "VkPhysicalDeviceSubgroupSizeControlFeatures",
        ("subgroupSizeControl", "computeFullSubgroups"),
        "VK_EXT_subgroup_size_control",
        (1, 3),
    ),
    _Row("VkPhysicalDeviceMaintenance4Features", ("maintenance4",), "VK_KHR_maintenance4", (1, 3)),
    _Row("VkPhysicalDeviceCooperativeMatrixFeaturesKHR", ("cooperativeMatrix",), "VK_KHR_cooperative_matrix", None),
    _Row(
        1000141000,  # VkPhysicalDeviceShaderBfloat16FeaturesKHR
        ("shaderBFloat16Type", "shaderBFloat16DotProduct", "shaderBFloat16CooperativeMatrix"),
        "VK_KHR_shader_bfloat16",
        None,
    ),
    _Row(
        1000593000,  # VkPhysicalDeviceCooperativeMatrix2FeaturesNV
        (
            "cooperativeMatrixWorkgroupScope",
            "cooperativeMatrixFlexibleDimensions",
            "cooperativeMatrixReductions",
            "cooperativeMatrixConversions",
            "cooperativeMatrixPerElementOperations",
            "cooperativeMatrixTensorAddressing",
            "cooperativeMatrixBlockLoads",
        ),
        "VK_NV_cooperative_matrix2",
        None,
    ),
)
# Members of structs that have to be given whole.
_LEFT_OFF = frozenset({"shaderBFloat16DotProduct", "cooperativeMatrixBlockLoads"})
_BASE_FEATURES = ("shaderInt16", "shaderInt64")
# Validation on the GPU writes down what it finds from any stage, so it wants these two on.
_GPU_VALIDATION_FEATURES = ("fragmentStoresAndAtomics", "vertexPipelineStoresAndAtomics")

# Extensions without a feature bit of their own. A portability subset must be enabled where it is offered (MoltenVK).
_PLAIN_EXTENSIONS = (
    "VK_KHR_push_descriptor",
    "VK_EXT_external_memory_host",
    "VK_EXT_memory_budget",
    "VK_KHR_portability_subset",
)

_SUBGROUP_OPERATIONS = {
    "subgroupBasic": 0x1,
    "subgroupVote": 0x2,
    "subgroupArithmetic": 0x4,
    "subgroupBallot": 0x8,
    "subgroupShuffle": 0x10,
    "subgroupShuffleRelative": 0x20,
    "subgroupClustered": 0x40,
    "subgroupQuad": 0x80,
}

ALL_FEATURES = frozenset(
    [
        *_BASE_FEATURES,
        *_PLAIN_EXTENSIONS,
        *_SUBGROUP_OPERATIONS,
        *(member for row in _FEATURE_STRUCTS for member in row.members if member not in _LEFT_OFF),
    ]
)

# SPIR-V capability -> the feature that allows it. A kernel that declares any other capability does not build.
CAPABILITIES = {
    "Shader": None,
    "Int16": "shaderInt16",
    "Int64": "shaderInt64",
    "Float16": "shaderFloat16",
    "StorageBuffer8BitAccess": "storageBuffer8BitAccess",
    "StorageBuffer16BitAccess": "storageBuffer16BitAccess",
    "VulkanMemoryModel": "vulkanMemoryModel",
    "VulkanMemoryModelDeviceScope": "vulkanMemoryModelDeviceScope",
    "GroupNonUniform": "subgroupBasic",
    "GroupNonUniformVote": "subgroupVote",
    "GroupNonUniformArithmetic": "subgroupArithmetic",
    "GroupNonUniformBallot": "subgroupBallot",
    "GroupNonUniformShuffle": "subgroupShuffle",
    "GroupNonUniformShuffleRelative": "subgroupShuffleRelative",
    "GroupNonUniformClustered": "subgroupClustered",
    "GroupNonUniformQuad": "subgroupQuad",
    "CooperativeMatrixKHR": "cooperativeMatrix",
    "BFloat16TypeKHR": "shaderBFloat16Type",
    "BFloat16CooperativeMatrixKHR": "shaderBFloat16CooperativeMatrix",
    "TensorAddressingNV": "cooperativeMatrixTensorAddressing",
    "CooperativeMatrixReductionsNV": "cooperativeMatrixReductions",
    "CooperativeMatrixConversionsNV": "cooperativeMatrixConversions",
    "CooperativeMatrixPerElementOperationsNV": "cooperativeMatrixPerElementOperations",
    "CooperativeMatrixTensorAddressingNV": "cooperativeMatrixTensorAddressing",
}

_COMPONENT_TYPES = {
    0: "f16",
    1: "f32",
    2: "f64",
    3: "s8",
    4: "s16",
    5: "s32",
    6: "s64",
    7: "u8",
    8: "u16",
    9: "u32",
    10: "u64",
    1000141000: "bf16",
    1000491002: "f8e4m3",
    1000491003: "f8e5m2",
}
_SCOPES = {1: "device", 2: "workgroup", 3: "subgroup", 5: "queue family"}


@dataclass(frozen=True)
class CooperativeMatrix:
    """A supported product: (m, k) of type a times (k, n) of type b onto (m, n) of type c, by one `scope`.

    In a row of VK_NV_cooperative_matrix2, m, n and k are granularities, and `workgroup_invocations` is the size of
    workgroup the row holds for (0 in rows of VK_KHR_cooperative_matrix).
    """

    m: int
    n: int
    k: int
    a: str
    b: str
    c: str
    result: str
    scope: str
    workgroup_invocations: int = 0


@dataclass(frozen=True)
class Features:
    """`"shaderFloat16" in features`; the names are those of ALL_FEATURES: Vulkan's feature bits and extensions."""

    names: frozenset[str]
    cooperative_matrices: tuple[CooperativeMatrix, ...] = field(default=(), repr=False)
    cooperative_matrices2: tuple[CooperativeMatrix, ...] = field(default=(), repr=False)

    def __contains__(self, name: str) -> bool:
        if name not in ALL_FEATURES:
            raise KeyError(f"no feature is called {name!r}")
        return name in self.names

    def missing(self, capabilities) -> list[str]:
        """The features that a kernel with these SPIR-V capabilities needs and this device lacks."""
        needed = {CAPABILITIES[capability] for capability in capabilities} - {None}
        return sorted(needed - self.names)


@dataclass(frozen=True)
class DeviceLimits:
    """Sizes in bytes; `timestamp_period` in nanoseconds a tick, no timestamps where `timestamp_bits` is 0."""

    shared_memory: int
    workgroup_size: tuple[int, int, int]
    workgroup_invocations: int
    workgroup_count: tuple[int, int, int]
    storage_buffer_range: int
    storage_buffer_alignment: int
    buffer_size: int
    allocation_size: int
    push_constants: int
    push_descriptors: int
    host_import_alignment: int
    timestamp_period: float
    timestamp_bits: int
    subgroup_size: int
    subgroup_size_range: tuple[int, int]
    subgroup_size_selectable: bool  # a compute kernel may ask for any power of two in the range
    storage_buffers: int = 4  # that a kernel may bind; every device takes 4


def device_extensions(functions, physical) -> frozenset[str]:
    listed = vulkan.enumerate_all(
        functions.vkEnumerateDeviceExtensionProperties,
        "VkExtensionProperties",
        physical,
        ffi.NULL,
        doing="listing extensions",
    )
    return frozenset(ffi.string(extension.extensionName).decode() for extension in listed)


def device_properties(functions, physical):
    properties = ffi.new("VkPhysicalDeviceProperties*")
    functions.vkGetPhysicalDeviceProperties(physical, properties)
    return properties


def _version(properties) -> tuple[int, int]:
    return properties.apiVersion >> 22 & 0x7F, properties.apiVersion >> 12 & 0x3FF


def _feature_chain(version, extensions):
    """A zeroed VkPhysicalDeviceFeatures2 with every struct this device knows behind it: (head, [(row, struct)])."""
    head, filled = ffi.NULL, []
    for row in _FEATURE_STRUCTS:
        if (row.core is None or version < row.core) and row.extension not in extensions:
            continue
        new = vulkan.struct(row.struct) if isinstance(row.struct, str) else vulkan.RawStruct(row.struct, row.members)
        new.pNext = head
        head = new if isinstance(row.struct, str) else new.pointer
        filled.append((row, new))
    return vulkan.struct("VkPhysicalDeviceFeatures2", pNext=head), filled


def query_features(functions, physical, without: frozenset[str] = frozenset()) -> Features:
    """The features that `physical` has; the extensions in `without` count as absent."""
    version = _version(device_properties(functions, physical))
    extensions = device_extensions(functions, physical) - without
    head, filled = _feature_chain(version, extensions)
    functions.vkGetPhysicalDeviceFeatures2(physical, head)
    names = {member for member in _BASE_FEATURES if getattr(head.features, member)}
    names |= {member for row, struct in filled for member in row.members if getattr(struct, member)} - _LEFT_OFF
    names |= set(_PLAIN_EXTENSIONS) & extensions

    properties11 = vulkan.struct("VkPhysicalDeviceVulkan11Properties")
    functions.vkGetPhysicalDeviceProperties2(physical, vulkan.struct("VkPhysicalDeviceProperties2", pNext=properties11))
    if properties11.subgroupSupportedStages & vk.VK_SHADER_STAGE_COMPUTE_BIT:
        operations = properties11.subgroupSupportedOperations
        names |= {name for name, bit in _SUBGROUP_OPERATIONS.items() if operations & bit}

    matrices, matrices2 = (), ()
    if "cooperativeMatrix" in names:
        matrices = _cooperative_matrices(functions, physical)
    if "cooperativeMatrixFlexibleDimensions" in names:
        matrices2 = _cooperative_matrices2(functions, physical)
    return Features(frozenset(names), matrices, matrices2)


def enabling(functions, physical, features: Features, gpu_validation: bool):
    """(VkPhysicalDeviceFeatures2, what it points to, extension names) that turn on `features` and nothing else."""
    version = _version(device_properties(functions, physical))
    offered = device_extensions(functions, physical)
    extensions = [name for name in _PLAIN_EXTENSIONS if name in features.names]
    extensions += [
        row.extension
        for row in _FEATURE_STRUCTS
        if row.extension in offered
        and (row.core is None or version < row.core)
        and features.names.intersection(row.members)
    ]
    head, filled = _feature_chain(version, set(extensions))
    for row, struct in filled:
        for member in row.members:
            setattr(struct, member, member in features.names)
    for member in _BASE_FEATURES:
        setattr(head.features, member, member in features.names)
    if gpu_validation:
        for member in _GPU_VALIDATION_FEATURES:
            setattr(head.features, member, True)
    return head, filled, extensions


def query_limits(functions, physical, features: Features, timestamp_bits: int) -> DeviceLimits:
    properties11 = vulkan.struct("VkPhysicalDeviceVulkan11Properties")
    chain = [properties11]

    def ask(type_name, when):
        if not when:
            return None
        chain.append(vulkan.struct(type_name, pNext=chain[-1]))
        return chain[-1]

    maintenance4 = ask("VkPhysicalDeviceMaintenance4Properties", "maintenance4" in features)
    subgroups = ask("VkPhysicalDeviceSubgroupSizeControlProperties", "subgroupSizeControl" in features)
    push = ask("VkPhysicalDevicePushDescriptorPropertiesKHR", "VK_KHR_push_descriptor" in features)
    host = ask("VkPhysicalDeviceExternalMemoryHostPropertiesEXT", "VK_EXT_external_memory_host" in features)
    functions.vkGetPhysicalDeviceProperties2(physical, vulkan.struct("VkPhysicalDeviceProperties2", pNext=chain[-1]))
    properties = device_properties(functions, physical)
    limits = properties.limits  # a view: `properties` must outlive it

    subgroup_size = properties11.subgroupSize
    compute = vk.VK_SHADER_STAGE_COMPUTE_BIT
    return DeviceLimits(
        shared_memory=limits.maxComputeSharedMemorySize,
        workgroup_size=tuple(limits.maxComputeWorkGroupSize),
        workgroup_invocations=limits.maxComputeWorkGroupInvocations,
        workgroup_count=tuple(limits.maxComputeWorkGroupCount),
        storage_buffer_range=limits.maxStorageBufferRange,
        storage_buffer_alignment=limits.minStorageBufferOffsetAlignment,
        buffer_size=maintenance4.maxBufferSize if maintenance4 else properties11.maxMemoryAllocationSize,
        allocation_size=properties11.maxMemoryAllocationSize,
        push_constants=limits.maxPushConstantsSize,
        push_descriptors=push.maxPushDescriptors if push else 0,
        host_import_alignment=host.minImportedHostPointerAlignment if host else 0,
        timestamp_period=limits.timestampPeriod,
        timestamp_bits=timestamp_bits,
        subgroup_size=subgroup_size,
        subgroup_size_range=(
            (subgroups.minSubgroupSize, subgroups.maxSubgroupSize) if subgroups else (subgroup_size, subgroup_size)
        ),
        subgroup_size_selectable=bool(subgroups and subgroups.requiredSubgroupSizeStages & compute),
        storage_buffers=min(
            limits.maxPerStageDescriptorStorageBuffers,
            limits.maxDescriptorSetStorageBuffers,
            limits.maxPerStageResources,
        ),
    )


def _cooperative_matrices(functions, physical) -> tuple[CooperativeMatrix, ...]:
    listed = vulkan.enumerate_all(
        functions.vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR,
        "VkCooperativeMatrixPropertiesKHR",
        physical,
        doing="listing cooperative matrices",
    )
    return tuple(
        CooperativeMatrix(
            row.MSize,
            row.NSize,
            row.KSize,
            *map(_component, (row.AType, row.BType, row.CType, row.ResultType)),
            _scope(row.scope),
        )
        for row in listed
        if not row.saturatingAccumulation
    )


def _cooperative_matrices2(functions, physical) -> tuple[CooperativeMatrix, ...]:
    # VkCooperativeMatrixFlexibleDimensionsPropertiesNV, which the package lacks: a header and ten 32-bit members.
    members = ("m", "n", "k", "a", "b", "c", "result", "saturating", "scope", "invocations")
    function = ffi.cast(
        "VkResult(*)(VkPhysicalDevice, uint32_t*, void*)",
        functions.address("vkGetPhysicalDeviceCooperativeMatrixFlexibleDimensionsPropertiesNV"),
    )
    doing = "listing flexible cooperative matrices"
    count = ffi.new("uint32_t*")
    vulkan.check(function(physical, count, ffi.NULL), doing)
    stride = vulkan.raw_words(members)
    words = ffi.new("uint32_t[]", count[0] * stride)
    for i in range(count[0]):
        words[i * stride] = 1000593001
    vulkan.check(function(physical, count, words), doing)
    rows = []
    for i in range(count[0]):
        start = i * stride + vulkan.RawStruct.HEADER_WORDS
        row = dict(zip(members, words[start : start + len(members)], strict=True))
        if not row["saturating"]:
            types = (_component(row[name]) for name in ("a", "b", "c", "result"))
            rows.append(
                CooperativeMatrix(row["m"], row["n"], row["k"], *types, _scope(row["scope"]), row["invocations"])
            )
    return tuple(rows)


def _component(number: int) -> str:
    return _COMPONENT_TYPES.get(number, f"type {number}")


def _scope(number: int) -> str:
    return _SCOPES.get(number, f"scope {number}")
