"""What transformers makes of a checkpoint, and what this library says is wrong with one."""

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2core.checkpoint.open import (
    open_checkpoint,
)
from gpt2core.errors import CheckpointError
from gpt2core.reference import reference_logits

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
# Float32 arithmetic of transformers against the float64 reference, largest seen over these tests: 7e-7.
TOLERANCE = {"rtol": 0, "atol": 5e-6}


def transformers_logits(folder, **options):
    model = GPT2LMHeadModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, **options
    )
    with torch.inference_mode():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def assert_equals_transformers(folder):
    np.testing.assert_allclose(
        reference_logits(open_checkpoint(folder).weights, IDS), transformers_logits(folder), **TOLERANCE
    )


def faults_of(folder):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert message.isascii()
    assert message.isprintable()
    return message
