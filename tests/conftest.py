"""Without a GPU the Triton kernels run in Triton's interpreter.

The variable must be set before anything imports triton.language, as bitsandbytes and PEFT do.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
