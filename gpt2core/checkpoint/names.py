"""Names of tensors as training code writes them: prefixes, causal masks, and heads of other tasks."""

import re
from collections.abc import Iterable
from typing import Final

MODEL: Final = "transformer."
HEAD: Final = "lm_head.weight"
_WRAPPERS: Final = ("module.", "_orig_mod.", "model.", "base_model.model.")
_MASK: Final = re.compile(rf"({re.escape(MODEL)})?h\.\d+\.attn\.(bias|masked_bias)")
_LAYER: Final = re.compile(rf"(?:{re.escape(MODEL)})?h\.(\d{{1,6}})\.")
_OTHER_HEAD: Final = re.compile(
    r"(multiple_choice_head|v_head|value_head|score|classifier|qa_outputs|summary)\..+"
)


def is_mask(name: str) -> bool:
    """Whether a tensor is a causal mask, which older versions of transformers saved with the weights."""
    return bool(_MASK.fullmatch(name))


def is_other_head(name: str) -> bool:
    """Whether a tensor belongs to a head for values, classes or choices, which generating does not use."""
    return bool(_OTHER_HEAD.fullmatch(name))


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, of a name without wrapping prefix."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def wrapping_prefix(names: Iterable[str]) -> str:
    """What DataParallel, torch.compile, Lightning or peft put before every name, or "".

    Several are taken together ("module._orig_mod."). Heads of other tasks may stand without it.
    """
    names = [name for name in names if not is_other_head(name)]
    prefix = ""
    while names:
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)), None)
        if wrapper is None:
            break
        prefix += wrapper
    return prefix
