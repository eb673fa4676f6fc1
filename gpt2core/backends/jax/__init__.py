"""The JAX backend: `module` is the Flax model, `step` is compiled, `runs` cuts batches, `backend` runs."""

from gpt2core.backends.jax.backend import JaxBackend, JaxCache
from gpt2core.backends.jax.module import Gpt2Module

__all__ = ["Gpt2Module", "JaxBackend", "JaxCache"]
