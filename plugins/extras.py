"""The extras of bigpipe that a stage needs for the files and addresses that it names, and the distributions of the
formats: their `Planning.extras`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.formats import distribution_of
from bigpipe.bigmodel.tasks import built_in, named_files
from bigpipe.errors import UsageError

if TYPE_CHECKING:
    from .distributed_infer import InferParams
    from .estimate import EstimateParams
    from .evaluate import EvaluateParams
    from .finetune import FinetuneParams
    from .quantize import QuantizeParams
    from .save import SaveParams

IN_S3 = ("s3", "s3a")
"""Protocols of fsspec that s3fs reads and writes."""


def of_inference(params: InferParams, base: Path) -> set[str]:
    """Of prompts, of results, and of what the task reads; of a task of the user's own nobody knows that."""
    endings = {*_endings(params.prompts, base)}
    found = _tables(endings) | ({"parquet"} if params.output_format == "parquet" else set())
    task = built_in(params.task)
    reads = () if task is None else task.reads
    if "picture" in reads:
        found.add("pictures")
    if isinstance(params.prompts, list):
        rows = (row.get(params.column) if isinstance(row, dict) else row for row in params.prompts)
        endings = {Path(row).suffix.lower() for row in rows if isinstance(row, str)}
    return found | (_sounds(endings) if "sound" in reads else set())


def of_training(params: FinetuneParams, base: Path) -> set[str]:
    """Of the rows, and of the sounds that they name."""
    from .finetuning import leads_to

    named = {path.suffix.lower() for path in leads_to(params, base)}
    return _tables({*_endings(params.data, base), *_endings(params.eval_data, base)}) | _sounds(named)


def of_evaluation(params: EvaluateParams, base: Path) -> set[str]:
    """Of the files of rows."""
    return _tables({*_endings(params.data, base)})


def of_destination(params: SaveParams, base: Path) -> set[str]:
    """Of the file system."""
    return {"s3" for scheme in params.schemes if scheme in IN_S3}


def of_quantization(params: QuantizeParams, base: Path) -> set[str]:
    """Of the format."""
    return _of_formats([params.scheme])


def of_estimate(params: EstimateParams, base: Path) -> set[str]:
    """Of the formats."""
    return _of_formats(params.dtypes)


def _of_formats(names: Iterable[str]) -> set[str]:
    return {found for name in names if (found := distribution_of(name))}


def _endings(named: Any, base: Path) -> Iterator[str]:
    """In small letters; of the name itself, where no file is there yet."""
    if isinstance(named, str):
        try:
            yield from (path.suffix.lower() for path in named_files(named, base))
        except UsageError:
            yield Path(named).suffix.lower()


def _tables(endings: Iterable[str]) -> set[str]:
    return {"parquet"} if ".parquet" in endings else set()


def _sounds(endings: Iterable[str]) -> set[str]:
    """.wav is read without a library."""
    return {"sounds"} if any(ending != ".wav" for ending in endings) else set()
