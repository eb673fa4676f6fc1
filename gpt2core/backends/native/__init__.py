"""GPT-2 in C: prebuilt libraries for each processor, or the user's own compiler; needs no framework."""

from gpt2core.backends.native.backend import NativeBackend as NativeBackend
