"""The JAX backend: `module` is the Flax model, `step` is compiled, `runs` cuts batches, `session` runs."""

from gpt2core.backends.jax_backend.module import Gpt2Module
from gpt2core.backends.jax_backend.session import JaxBackend, JaxCache

__all__ = ["Gpt2Module", "JaxBackend", "JaxCache"]
