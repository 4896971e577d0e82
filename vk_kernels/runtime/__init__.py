"""The Vulkan runtime: devices, memory, kernels, command buffers, and programs of them. It knows no JAX."""
