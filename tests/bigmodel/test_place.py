"""`bigpipe.place`: from a model where it lies to a placement that `bigpipe.load` takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bigpipe
from bigpipe.errors import DoesNotFit, UsageError

QUICKSTART = Path(__file__).parents[2] / "models" / "quickstart"


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_is_placed_is_what_is_loaded(dtype: str | None) -> None:
    from bigpipe.bigmodel.execution import loaded

    placement = bigpipe.place(QUICKSTART, max_memory={"cpu": "2MiB", "disk": "1GiB"}, dtype=dtype)
    assert placement.dtype == dtype
    assert set(placement.device_map.values()) == {"cpu", "disk"}
    assert placement.weights["cpu"] <= 2 * 2**20
    stored = sum(tensor.nbytes for tensor in bigpipe.open_checkpoint(QUICKSTART).tensors.values())
    assert sum(placement.weights.values()) == stored * (2 if dtype else 1)
    model = bigpipe.load(QUICKSTART, placement)
    if dtype:  # else a CPU computes in float32 what is stored in float16
        assert loaded(model).held["cpu"] == placement.weights["cpu"]


def test_quantized_weights_count_at_their_quantized_size(tmp_path: Path) -> None:
    bigpipe.quantize_checkpoint(QUICKSTART, tmp_path / "nf4", scheme="nf4")
    stored = sum(tensor.nbytes for tensor in bigpipe.open_checkpoint(tmp_path / "nf4").tensors.values())
    caps: dict[int | str, int | str] = {0: f"{stored}B", "cpu": "1GiB"}
    placement = bigpipe.place(tmp_path / "nf4", max_memory=caps, device_map="sequential")
    assert placement.weights == {0: stored}


def test_a_bare_config_is_placed_as_what_it_says() -> None:
    placement = bigpipe.place(QUICKSTART / "config.json", max_memory={"cpu": "1GiB"})
    assert placement.device_map == {"": "cpu"}
    assert placement.weights == bigpipe.place(QUICKSTART, max_memory={"cpu": "1GiB"}).weights


def test_errors_have_a_cure(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a path that exists nor the name of a repository"):
        bigpipe.place(tmp_path / "nothing")
    with pytest.raises(DoesNotFit, match="MiB"):
        bigpipe.place(QUICKSTART, max_memory={"cpu": "1MiB"})


def test_no_torch_is_imported() -> None:
    code = f"import sys, bigpipe; bigpipe.place({str(QUICKSTART)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
