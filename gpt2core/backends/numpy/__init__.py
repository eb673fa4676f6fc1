"""The NumPy backend: `kernels` and `products` compute, `backend` runs them."""

from gpt2core.backends.numpy.backend import NumpyBackend as NumpyBackend
