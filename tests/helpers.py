"""What several test files use."""

import functools

import jax

# Programs of tests run a few times only: most of the time would go into optimising them.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
