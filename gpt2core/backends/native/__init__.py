"""GPT-2 in C, compiled with the user's own compiler when first used; needs no framework."""

from gpt2core.backends.native.backend import NativeBackend as NativeBackend
