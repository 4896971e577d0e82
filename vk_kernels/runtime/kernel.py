"""Kernels: compute pipelines made from the SPIR-V that ships, with a cache of compiled pipelines on disk."""

import functools
import hashlib
import json
import struct
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from typing import Any

from vk_kernels.errors import FeatureError
from vk_kernels.runtime import disk_cache, vulkan
from vk_kernels.runtime.logical_device import LogicalDevice
from vk_kernels.runtime.vulkan import ffi, vk
from vk_kernels.spirv.reflect import Reflection, SpecConstant, reflect

SPIRV = Path(__file__).parents[1] / "shaders" / "binaries"
MANIFEST = "manifest.json"  # there

_REQUIRE_FULL_SUBGROUPS = 0x2  # VK_PIPELINE_SHADER_STAGE_CREATE_..._BIT, which the package knows without its value

PACKING = {"uint32": "I", "int32": "i", "float32": "f", "bool": "I", "uint64": "Q", "int64": "q", "float64": "d"}

# (name, value) pairs that set specialization constants; sorted, so that it can be a cache key.
Spec = tuple[tuple[str, int | float | bool], ...]


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """Binary name -> what the build wrote down about it."""
    return json.loads((SPIRV / MANIFEST).read_text())["kernels"]


def reflection_of(name: str, variant: str = "") -> Reflection:
    """The manifest's reflection of a kernel that ships. Raises ValueError naming what there is."""
    record = manifest().get(binary_name(name, variant))
    if record is None:
        variants = sorted(r["variant"] for r in manifest().values() if r["entry"] == name)
        known = f"its variants are {variants}" if variants else f"there are {sorted(manifest())}"
        raise ValueError(f"no kernel is called {binary_name(name, variant)!r}; {known}")
    return Reflection.from_json(record)


def load(name: str, variant: str = "") -> tuple[bytes, Reflection]:
    """The SPIR-V of a kernel that ships, and its reflection. Raises ValueError naming what there is."""
    reflection = reflection_of(name, variant)
    return (SPIRV / f"{binary_name(name, variant)}.spv").read_bytes(), reflection


def binary_name(kernel: str, variant: str = "") -> str:
    return f"{kernel}.{variant}" if variant else kernel


class Kernel:
    """A compute pipeline and how to bind its arguments. Made by `Device.kernel`; destroyed with its device.

    `workgroup`: threads (x, y, z) of a workgroup, specialization constants put in. `writable`: whether the kernel
    writes each of its buffers.
    """

    def __init__(
        self,
        device: LogicalDevice,
        compilers: Executor,
        label: str,
        code: bytes,
        reflection: Reflection,
        spec: dict[str, int | float | bool],
        subgroup_size: int | None = None,
    ):
        """compilers: run the driver's compiler. Raises FeatureError for what the device lacks, ValueError for arguments
        that the kernel does not have."""
        self.label = label
        self.push_constant_bytes = reflection.push_constant_bytes
        self._device, self._compilers = device, compilers
        values = _spec_values(label, reflection, spec)
        if spec:
            reflection = reflect(code, reflection.entry, spec)  # array lengths may depend on the constants
        self.workgroup = tuple(values[size] if isinstance(size, str) else size for size in reflection.workgroup)
        count = max((binding.binding + 1 for binding in reflection.bindings), default=0)
        self.writable = tuple(any(b.writable for b in reflection.bindings if b.binding == i) for i in range(count))
        self._check_device(reflection, subgroup_size)
        self._destroy = []
        self._compiled: Future | None = None
        try:
            self._create(code, reflection, spec, subgroup_size)
        except BaseException:
            self.destroy()
            raise

    @property
    def pipeline(self) -> Any:
        """Waits until it is compiled, beside other kernels. Raises what went wrong there; the next use tries again."""
        if self._compiled.done() and self._compiled.exception():
            self._compiled = self._compilers.submit(*self._compilation)
        return self._compiled.result()

    def _check_device(self, reflection: Reflection, subgroup_size: int | None) -> None:
        device, limits = self._device, self._device.limits
        missing = device.features.missing(reflection.capabilities)
        if reflection.local_size_id and "maintenance4" not in device.features:
            missing.append("maintenance4")
        if missing:
            raise FeatureError(f"kernel {self.label}: {device.info.name} lacks {', '.join(missing)}")
        x, y, z = self.workgroup
        if x * y * z > limits.workgroup_invocations or any(map(int.__gt__, self.workgroup, limits.workgroup_size)):
            raise FeatureError(
                f"kernel {self.label}: a workgroup of {x}x{y}x{z} threads, but {device.info.name} takes "
                f"{limits.workgroup_invocations} ({'x'.join(map(str, limits.workgroup_size))})"
            )
        for what, wanted, limit in (
            ("shared memory", reflection.shared_bytes, limits.shared_memory),
            ("push constants", reflection.push_constant_bytes, limits.push_constants),
        ):
            if wanted > limit:
                raise FeatureError(f"kernel {self.label}: {wanted} bytes of {what}, but {device.info.name} has {limit}")
        if len(self.writable) > limits.storage_buffers:
            raise FeatureError(
                f"kernel {self.label}: {len(self.writable)} buffers, but {device.info.name} binds "
                f"{limits.storage_buffers}"
            )
        smallest, largest = limits.subgroup_size_range
        fixed = smallest == largest == subgroup_size
        if subgroup_size is not None and not fixed:
            power_of_two = subgroup_size & (subgroup_size - 1) == 0
            if not (limits.subgroup_size_selectable and smallest <= subgroup_size <= largest and power_of_two):
                raise FeatureError(
                    f"kernel {self.label}: subgroups of {subgroup_size}, but {device.info.name} has {smallest} to "
                    f"{largest}{'' if limits.subgroup_size_selectable else ' and offers no choice'}"
                )

    def _create(self, code: bytes, reflection: Reflection, spec: dict, subgroup_size: int | None) -> None:
        device = self._device
        compute = vk.VK_SHADER_STAGE_COMPUTE_BIT
        count = len(self.writable)
        push = device.push_descriptors and count <= device.limits.push_descriptors
        self.push_descriptors = push

        storage = vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER
        bindings = ffi.new("VkDescriptorSetLayoutBinding[]", max(count, 1))
        for i in range(count):
            bindings[i] = {"binding": i, "descriptorType": storage, "descriptorCount": 1, "stageFlags": compute}
        self.set_layout = self._make(
            "DescriptorSetLayout",
            flags=vk.VK_DESCRIPTOR_SET_LAYOUT_CREATE_PUSH_DESCRIPTOR_BIT_KHR if push else 0,
            bindingCount=count,
            pBindings=bindings,
        )

        ranges = ffi.new("VkPushConstantRange*", {"stageFlags": compute, "size": self.push_constant_bytes})
        self.layout = self._make(
            "PipelineLayout",
            setLayoutCount=1,
            pSetLayouts=vulkan.array("VkDescriptorSetLayout", [self.set_layout]),
            pushConstantRangeCount=1 if self.push_constant_bytes else 0,
            pPushConstantRanges=ranges,
        )
        if count:
            self.template = self._make_template(count, push)
        module = self._make("ShaderModule", codeSize=len(code), pCode=ffi.from_buffer("uint32_t[]", code))
        self._compilation = self._make_pipeline, module, code, reflection, spec, subgroup_size
        self._compiled = self._compilers.submit(*self._compilation)
        if device.instance.validation:
            self._compiled.result()  # so that what the layer has said is of this kernel

    def _make(self, kind: str, **fields) -> Any:
        """Creates a Vk`kind` that is destroyed with the kernel."""
        info = vulkan.struct(f"Vk{kind}CreateInfo", **fields)
        handle = ffi.new(f"Vk{kind}*")
        create = getattr(self._device.fn, f"vkCreate{kind}")
        vulkan.check(create(self._device.handle, info, ffi.NULL, handle), f"creating kernel {self.label}")
        self._destroy.append((f"vkDestroy{kind}", handle[0]))
        return handle[0]

    def _make_template(self, count: int, push: bool) -> Any:
        """How to take `count` descriptors from an array of (buffer, offset, range), 64 bits each."""
        entries = ffi.new("VkDescriptorUpdateTemplateEntry[]", count)
        for i in range(count):
            entries[i] = {
                "dstBinding": i,
                "descriptorCount": 1,
                "descriptorType": vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                "offset": 24 * i,
                "stride": 24,
            }
        pushed = vk.VK_DESCRIPTOR_UPDATE_TEMPLATE_TYPE_PUSH_DESCRIPTORS_KHR
        return self._make(
            "DescriptorUpdateTemplate",
            descriptorUpdateEntryCount=count,
            pDescriptorUpdateEntries=entries,
            templateType=pushed if push else vk.VK_DESCRIPTOR_UPDATE_TEMPLATE_TYPE_DESCRIPTOR_SET,
            descriptorSetLayout=self.set_layout,
            pipelineBindPoint=vk.VK_PIPELINE_BIND_POINT_COMPUTE,
            pipelineLayout=self.layout,
        )

    def _make_pipeline(self, module: Any, code: bytes, reflection: Reflection, spec: dict, subgroup_size) -> Any:
        device = self._device
        required = ffi.NULL
        if subgroup_size is not None and device.limits.subgroup_size_selectable:
            required = vulkan.struct(
                "VkPipelineShaderStageRequiredSubgroupSizeCreateInfo", requiredSubgroupSize=subgroup_size
            )
        # Without lanes that idle, a subgroup's number and a lane's together number the threads.
        sharing = any(capability.startswith("GroupNonUniform") for capability in reflection.capabilities)
        even = self.workgroup[0] % (subgroup_size or device.limits.subgroup_size_range[1]) == 0
        full = sharing and even and "computeFullSubgroups" in device.features
        stage = vulkan.struct(
            "VkPipelineShaderStageCreateInfo",
            flags=_REQUIRE_FULL_SUBGROUPS if full else 0,
            stage=vk.VK_SHADER_STAGE_COMPUTE_BIT,
            module=module,
            pName=reflection.entry,
            pSpecializationInfo=_specialization(reflection, spec),
            pNext=required,
        )
        info = vulkan.struct("VkComputePipelineCreateInfo", stage=stage[0], layout=self.layout)
        key = json.dumps(
            [hashlib.sha256(code).hexdigest(), sorted(spec.items()), subgroup_size, device.instance.validation]
        )
        handle = ffi.new("VkPipeline*")
        with _DiskCache(device, key) as cache:
            result = device.fn.vkCreateComputePipelines(device.handle, cache, 1, info, ffi.NULL, handle)
            vulkan.check(result, f"compiling kernel {self.label}")
        self._destroy.append(("vkDestroyPipeline", handle[0]))
        device.check_validation(self.label)
        return handle[0]

    def destroy(self) -> None:
        """Destroys the pipeline and all that came with it; no submission may be using it."""
        if self._compiled is not None:
            wait([self._compiled])
        for function, handle in reversed(self._destroy):
            getattr(self._device.fn, function)(self._device.handle, handle, ffi.NULL)
        self._destroy.clear()

    def __repr__(self) -> str:
        return f"Kernel({self.label})"


def _spec_values(label: str, reflection: Reflection, spec: dict) -> dict[str, int | float | bool]:
    """Every specialization constant by name, with `spec` over the defaults."""
    values = {constant.name: constant.default for constant in reflection.spec_constants}
    unknown = sorted(set(spec) - set(values))
    if unknown:
        raise ValueError(f"kernel {label} has no specialization constant {', '.join(unknown)}; it has {sorted(values)}")
    return {**values, **spec}


def _specialization(reflection: Reflection, spec: dict) -> Any:
    chosen: list[SpecConstant] = [constant for constant in reflection.spec_constants if constant.name in spec]
    if not chosen:
        return ffi.NULL
    entries, data = ffi.new("VkSpecializationMapEntry[]", len(chosen)), b""
    for i, constant in enumerate(chosen):
        packed = struct.pack("<" + PACKING[constant.type], spec[constant.name])
        entries[i] = {"constantID": constant.id, "offset": len(data), "size": len(packed)}
        data += packed
    return vulkan.struct(
        "VkSpecializationInfo",
        mapEntryCount=len(chosen),
        pMapEntries=entries,
        dataSize=len(data),
        pData=ffi.new("uint8_t[]", data),
    )


class _DiskCache:
    """A VkPipelineCache for one pipeline, loaded from a file and, if it was not there or not whole, saved to it.

    One file a pipeline: threads and processes that compile at the same time never wait for or overwrite one another.
    """

    def __init__(self, device: LogicalDevice, key: str):
        self._device = device
        self._file = disk_cache.file_of(device.cache_dir, key)

    def __enter__(self) -> Any:
        self._loaded = disk_cache.load(self._file)
        data = ffi.from_buffer(self._loaded)
        info = vulkan.struct("VkPipelineCacheCreateInfo", initialDataSize=len(self._loaded), pInitialData=data)
        handle = ffi.new("VkPipelineCache*")
        fn = self._device.fn
        vulkan.check(fn.vkCreatePipelineCache(self._device.handle, info, ffi.NULL, handle), "creating a pipeline cache")
        self._cache = handle[0]
        return self._cache

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and not self._loaded:
                disk_cache.save(self._file, self._compiled())
        finally:
            self._device.fn.vkDestroyPipelineCache(self._device.handle, self._cache, ffi.NULL)

    def _compiled(self) -> bytes:
        fn, device = self._device.fn, self._device.handle
        size = ffi.new("size_t*")
        vulkan.check(fn.vkGetPipelineCacheData(device, self._cache, size, ffi.NULL), "reading a pipeline cache")
        data = ffi.new("uint8_t[]", size[0])
        vulkan.check(fn.vkGetPipelineCacheData(device, self._cache, size, data), "reading a pipeline cache")
        return bytes(ffi.buffer(data, size[0]))
