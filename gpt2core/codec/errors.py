"""What goes wrong with compressed files."""

from gpt2core.errors import Gpt2CoreError


class CodecError(Gpt2CoreError):
    """The file is damaged, cut, of another model or of a later version; nothing wrong was written for it."""
