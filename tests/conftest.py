"""Fixtures that several rooms share."""

from __future__ import annotations

import pytest
from support.workshop import Workshop, environment


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    for name in ("PYTHONPATH", "BIGPIPE_HOME"):
        monkeypatch.setenv(name, environment(tmp_path)[name])
    return Workshop(tmp_path)
