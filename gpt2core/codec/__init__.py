"""A lossless codec: a model's predictions and a range coder. docs/codec.md has the format and figures."""

from gpt2core.codec.compress import DEFAULT_LEVEL as DEFAULT_LEVEL
from gpt2core.codec.compress import compress as compress
from gpt2core.codec.compress import compress_stream as compress_stream
from gpt2core.codec.errors import CodecError as CodecError
from gpt2core.codec.expand import expand as expand
from gpt2core.codec.expand import expand_stream as expand_stream
