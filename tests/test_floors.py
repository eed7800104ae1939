"""The floors drawn in ARCHITECTURE.md are those that import-linter holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
Floors = list[set[str]]


def drawn() -> dict[str, Floors]:
    """Contract → its floors from the top, as the blocks under "Floors" show them: names, two spaces, a remark."""
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Floors\n")[2].partition("\n## ")[0]
    found = {}
    for block in re.findall(r"```text\n(.*?)```", section, re.DOTALL):
        title, *lines = block.splitlines()
        found[title] = [set(re.split(r"\s{2,}", line.strip())[0].split(" | ")) for line in lines]
    return found


def held() -> dict[str, Floors]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {
        contract["name"]: [{name.strip() for name in layer.split("|")} for layer in contract["layers"]]
        for contract in contracts
        if contract["type"] == "layers"
    }


def test_the_drawn_floors_are_those_of_the_contracts():
    assert drawn() == held()


def test_every_room_and_file_of_a_container_stands_on_a_floor():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert all(contract["exhaustive"] for contract in contracts if contract["type"] == "layers")
