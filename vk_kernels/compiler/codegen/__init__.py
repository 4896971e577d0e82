"""Code generation: from a graph to SPIR-V kernels."""
