"""What the GPU tests share. BIGPIPE_TEST_DEVICE=cpu runs them where there is no GPU, on the paths that both take."""

from __future__ import annotations

import os

import pytest
import torch

from bigpipe.bigmodel.placement import Device


@pytest.fixture
def device() -> str:
    """Where to compute, as torch calls it."""
    name = os.environ.get("BIGPIPE_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return name


@pytest.fixture
def home(device: str) -> Device:
    """The same, as a device map calls it."""
    return 0 if device == "cuda" else "cpu"
