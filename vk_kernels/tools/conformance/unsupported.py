"""The primitives of JAX that `vk_kernels.jit` refuses, and why: public ones, and those that public functions make."""

from vk_kernels.compiler import refusals

_REASONS = {
    "a factorization or a solution of equations": (
        *("cholesky", "cholesky_update", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product", "lu"),
        *("lu_pivots_to_permutation", "ormqr", "qr", "schur", "svd", "symmetric_product", "triangular_solve"),
        *("tridiagonal", "tridiagonal_solve", "custom_linear_solve"),
    ),
    "complex numbers": ("complex", "conj", "imag", "real", "fft"),
    "products of another kind": ("ragged_dot_general", "scaled_dot", "scaled_matmul_wrapper"),
    "more than one device, outside of `jax.vmap`": tuple(refusals.DEVICES),
    "as many turns of a loop as the data ask for": (
        *("igamma", "igamma_grad_a", "igammac", "random_gamma", "regularized_incomplete_beta"),
    ),
    "a rare special function": ("bessel_i0e", "bessel_i1e", "polygamma", "zeta"),
    "bits of another generator than threefry": tuple(refusals.GENERATORS),
    "state: a function must be pure": tuple(refusals.STATE),
    "the host: callbacks, prints, calls of other libraries": tuple(refusals.HOST),
    "errors as effects: `checkify.checkify` makes results of them": tuple(refusals.ERRORS),
    "for JAX itself, or no longer used": (
        *("custom_lin", "custom_partitioning", "dce_sink", "remat_opt", "select_and_scatter"),
    ),
}
UNSUPPORTED = {name: reason for reason, names in _REASONS.items() for name in names}
# dtypes of JAX that no kernel is generated for: an argument, a constant or a result of one is an error.
UNSUPPORTED_DTYPES = {
    "complex64, complex128": "complex numbers",
    "int64, uint64, float64": "64 bits: JAX_ENABLE_X64 stays off",
    "int2, int4, uint2, uint4": "less than a byte",
    "float8_*, float4_e2m1fn": "less than 16 bits",
    "extended dtypes but PRNG keys": "rules of their own",
}
