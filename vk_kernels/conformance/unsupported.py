"""The public JAX primitives that `vk_kernels.jit` refuses, and why."""

_REASONS = {
    "a factorization or a solution of equations": (
        *("cholesky", "eig", "eigh", "hessenberg", "householder_product", "lu", "qr", "schur", "svd"),
        *("triangular_solve", "tridiagonal", "tridiagonal_solve", "custom_linear_solve"),
    ),
    "complex numbers": ("complex", "conj", "imag", "real", "fft"),
    "convolution": ("conv_general_dilated",),
    "more than one device": (
        *("all_gather", "all_to_all", "axis_index", "pmax", "pmin", "ppermute", "psum", "ragged_all_to_all"),
    ),
    "as many turns of a loop as the data ask for": (
        *("igamma", "igamma_grad_a", "igammac", "random_gamma", "regularized_incomplete_beta"),
    ),
    "a rare special function": ("bessel_i0e", "bessel_i1e", "polygamma", "zeta"),
    "bits of another generator than threefry": ("rng_bit_generator", "rng_uniform"),
    "state: a function must be pure": ("after_all", "create_token", "get", "swap"),
    "for JAX itself, or no longer used": ("custom_lin", "select_and_scatter"),
}
UNSUPPORTED = {name: reason for reason, names in _REASONS.items() for name in names}
