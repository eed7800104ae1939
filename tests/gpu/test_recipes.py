"""The kinds on a GPU: what dispatch places is what it measures there, and both tasks give what they give elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bigpipe
from bigpipe.bigmodel.placement import Device

pytestmark = pytest.mark.gpu
QUICKSTART = Path(__file__).parents[2] / "models" / "quickstart"
RECIPE = """\
version: 1
name: placed
stages:
  download: {{uses: download, with: {{path: "{model}"}}}}
  quantize: {{uses: quantize, inputs: download, with: {{scheme: {scheme}}}}}
  dispatch:
    uses: dispatch
    inputs: {source}
    with: {{dtype: float16, batch_size: 2, sequence_length: 64, device_map: {device_map}}}
  generate:
    uses: distributed-infer
    inputs: {{model: {source}, placement: dispatch}}
    with:
      task: text-generation
      prompts: ["def open(path):", "Return the", "A list of"]
      batch_size: 1
      max_new_tokens: 8
  embed:
    uses: distributed-infer
    inputs: {{model: {source}, placement: dispatch}}
    with: {{task: feature-extraction, prompts: ["def open(path):", "Return the"], batch_size: 1}}
"""
Rows = dict[str, list[dict[str, object]]]


def ran(
    folder: Path, device: str, device_map: dict[str, Device], *, source: str = "download", scheme: str = "int8"
) -> tuple[bigpipe.RunResult, Rows]:
    folder.mkdir()
    text = RECIPE.format(model=QUICKSTART, device_map=json.dumps(device_map), source=source, scheme=scheme)
    (folder / "recipe.yaml").write_text(text)
    done = bigpipe.run(folder / "recipe.yaml", store=folder / "store", check=True)
    rows = {
        node: [json.loads(line) for line in (done.path(node) / "results.jsonl").read_text().splitlines()]
        for node in ("generate", "embed")
    }
    if device == "cuda":
        assert int(done.records["generate"].metrics["peak"]["0"]) > 0
    return done, rows


@pytest.mark.parametrize("away", ["cpu", "disk"])
def test_results_do_not_depend_on_what_is_away(tmp_path: Path, device: str, home: Device, away: Device) -> None:
    _, wanted = ran(tmp_path / "whole", device, {"": home})
    blocks = {f"model.decoder.layers.{number}": away for number in (1, 2)}
    some, rows = ran(tmp_path / "parts", device, {"": home, **blocks})
    assert rows == wanted
    found = some.records["dispatch"].metrics
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.01)
    assert found["measured"].keys() == {str(home), str(away)}


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantized(tmp_path: Path, device: str, home: Device, scheme: str) -> None:
    pytest.importorskip("bitsandbytes")
    _, rows = ran(tmp_path / "run", device, {"": home}, source="quantize", scheme=scheme)
    assert all(row["text"] for row in rows["generate"])
    assert all("error" not in row for rows_ in rows.values() for row in rows_)
