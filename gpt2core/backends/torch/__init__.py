"""The PyTorch backend: `products`, `attention` and `trace` compute, `backend` runs them."""

from gpt2core.backends.torch.backend import TorchBackend as TorchBackend
