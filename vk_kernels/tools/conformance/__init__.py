"""Which JAX primitives `vk_kernels.jit` supports, with cases of each one that are compared with XLA.

python -m vk_kernels.tools.conformance [--device cpu] [--full] [--only PRIMITIVE,...]   runs the cases
python -m vk_kernels.tools.conformance --special [--device cpu] [--only PRIMITIVE]      with zeros, infinities, NaN
python -m vk_kernels.tools.conformance --table docs/primitives.md                       brings its table up to date
"""
