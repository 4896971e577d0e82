"""SPIR-V: the module builder, and reflection."""
