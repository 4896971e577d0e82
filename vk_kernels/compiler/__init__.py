"""The compiler: from a jaxpr to a program of dispatches for the Vulkan runtime."""
