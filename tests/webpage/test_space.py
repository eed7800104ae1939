"""The Space: its header, and the function behind its fields."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml
from support.hub import LoopbackHub
from support.paging import QUICKSTART

import bigpipe
from bigpipe.sizes import format_size

SPACE = Path(__file__).parents[2] / "space"


def test_the_header_names_the_application():
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert header["sdk"] == "gradio"
    assert (SPACE / header["app_file"]).is_file()
    assert {"title", "emoji", "colorFrom", "colorTo", "license"} <= header.keys()


@pytest.mark.filterwarnings("ignore")
def test_the_space_gives_the_numbers_of_the_command(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location("app", SPACE / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    files = {path.name: path for path in QUICKSTART.iterdir() if path.suffix in (".json", ".safetensors")}
    with LoopbackHub() as hub:
        hub.create("org/model", files)
        for name, value in hub.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        rows, said, data = app.estimate("org/model", ["float32", "int8"], 4, 2048)
        made = bigpipe.estimate("org/model", dtypes=["float32", "int8"], batch_size=4)
        assert data["dtypes"] == made.as_json()["dtypes"]
        assert [row[0] for row in rows] == ["float32", "int8"]
        assert rows[0][2] == format_size(made["float32"].counts.total)
        assert rows[0][6] == format_size(made["float32"].inference)
        assert rows[0][7] == "RTX 3060"
        assert "4 × 256 tokens" in said
        assert app.demo() is not None
    rows, said, data = app.estimate(str(QUICKSTART), [], 1, 2048)
    assert rows == []
    assert "is not in a directory" in said
    assert data["exit_code"] == 2
