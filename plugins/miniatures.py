"""A small model of the same kind as one on the Hub or in a directory: its config made small, its tokenizer and other
files as they are, its weights made up, in the same file format, dtype and quantization, in several files where it has
several."""

from __future__ import annotations

import glob
from dataclasses import dataclass, replace
from pathlib import Path

from bigpipe.bigmodel.architecture import describe_architecture, shrunk
from bigpipe.bigmodel.checkpoint import (
    FileFormat,
    ModelDescription,
    adapter_weights,
    describe_checkpoint,
    is_index,
    open_checkpoint,
)
from bigpipe.bigmodel.formats import BUILT_IN, format_of, known_modules, plain_dtype
from bigpipe.bigmodel.hub import Brought, Choice, DirectorySource, HubSource, Source, Watch, describe_repository
from bigpipe.bigmodel.quantization import Settings, quantize_described, understand
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import SyntheticModel, Traffic, planned_bytes
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.orchestrator.stage import Forecast
from bigpipe.passing import NOBODY
from bigpipe.sizes import format_transfer

LARGEST = 512 * 2**20
"""Bytes of weights of a model that was made small: more is none."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
ELSEWHERE = "try the recipe with another model, or run it as it is"


@dataclass(frozen=True, slots=True)
class Miniature:
    """What is made, and of what."""

    source: Source
    model: SyntheticModel
    settings: Settings | None
    """How the weights are packed."""
    sources: Sources

    @property
    def description(self) -> ModelDescription:
        if self.settings is None:
            return self.model.description
        found = understand(
            self.model.description, self.settings, architecture=self.model.architecture, sources=self.sources
        )
        return found[1]

    def forecast(self, commit: str | None) -> Forecast:
        """What making it costs, beside the files that stay as they are."""
        size = sum(planned_bytes([plan]) for plan in self.model.plans)
        return Forecast(
            vram={},
            download_bytes=0,
            write_bytes=size,
            metrics={"commit": commit},
            output=self.description,
            summary=f"a small model of the kind, {format_transfer(size)} made up",
        )

    def bring(self, out: Path, scratch: Path, watch: Watch) -> Brought:
        """Write it into `out`. scratch: where what is packed lies before."""
        beside = _beside(self.source)
        found = Brought({})
        if beside:
            choice = Choice(include=tuple(map(glob.escape, beside)))
            found = replace(self.source, choice=choice).bring(out, watch)
        plain = out if self.settings is None else scratch / "plain"
        outlet = watch.outlet if self.settings is None else NOBODY
        traffic = Traffic(lambda done, total: watch.report(done, total, "write"), outlet)
        made = dict(self.model.write(plain, journal=scratch / "finished", traffic=traffic).files)
        if self.settings is not None:
            packed = quantize_described(
                open_checkpoint(plain), out, self.settings, architecture=self.model.architecture, sources=self.sources,
                max_shard_size=int(self.model.max_shard_size),
            )  # fmt: skip
            made = packed.files
        return replace(found, files={**found.files, **made})


def miniature(source: Source, sources: Sources) -> Miniature:
    """Return what is made of a model that is described by its files' heads. Raise UsageError, naming it, for what no
    small one is made of; and as the source where it cannot be asked."""
    name, described, several = _describe(source)
    if described.config is None:
        raise UsageError(f"{name} has no config.json, which a small model would be made from", ELSEWHERE)
    settings, whole = _settings(name, described), describe_architecture(described.config, sources=sources)
    config = shrunk(described.config, whole.config)
    try:
        architecture = describe_architecture(config, sources=sources)
    except (UsageError, InvalidCheckpoint) as error:
        raise UsageError(f"{name}: no small model of its class can be built: {error.cause}", ELSEWHERE) from error
    form: FileFormat = "bin" if described.format == "bin" else "safetensors"
    if settings is not None:
        settings = replace(settings, skip_modules=known_modules(settings.skip_modules, architecture))
    model = SyntheticModel(config, architecture, dtype=_dtype(described), format=form)
    size = model.description.nbytes or 0
    if size > LARGEST:
        cause = (
            f"{name} ({architecture.class_name}) has {format_transfer(size)} of weights when its config is made small"
        )
        raise UsageError(cause, f"nothing known in it says its size; {ELSEWHERE}")
    if several:
        model = replace(model, max_shard_size=max(size // 2, 1))
    return Miniature(source, model, settings, sources)


def _describe(source: Source) -> tuple[str, ModelDescription, bool]:
    """(What it is called, what its headers say, whether it has several weight files)."""
    files = [file.path for file in source.chosen()]
    name = source.repo if isinstance(source, HubSource) else str(source.folder)
    if adapter_weights(files):
        cause = f"{name} is an adapter, whose weights belong to a model of full size"
        raise UsageError(cause, f"no small one is made of it; {ELSEWHERE}")
    if "model_index.json" in files:
        cause = f"{name} is a pipeline of diffusers, several models that depend on each other's sizes"
        raise UsageError(cause, f"no small one is made of it; {ELSEWHERE}")
    if isinstance(source, DirectorySource):
        described = describe_checkpoint(source.folder, among=files)
    else:
        found = describe_repository(
            source.repo, source.revision, hub=source.hub, choice=source.choice, subfolder=source.subfolder
        )
        described = found.description
        if found.library != "transformers":
            raise UsageError(f"{name} is a model of {found.library}, of which no small one is made", ELSEWHERE)
    return name, described, sum(_is_weight(file) for file in files) > 1


def _is_weight(name: str) -> bool:
    return Path(name).suffix in WEIGHTS


def _beside(source: Source) -> list[str]:
    """The files that stay as they are: all but weights, their index and the config."""
    files = [file.path for file in source.chosen()]
    return [name for name in files if not (_is_weight(name) or is_index(name) or name == "config.json")]


def _settings(name: str, described: ModelDescription) -> Settings | None:
    """How its weights are packed."""
    found, told = format_of(described), described.quantization or {}
    if not told and found.packing is None:
        return None
    if found.name not in BUILT_IN:
        cause = f"{name} is stored in {found.title}, which is not written here"
        raise UsageError(cause, f"no small one is made of it ({', '.join(BUILT_IN)} are); {ELSEWHERE}")
    return Settings(
        scheme=found.name,
        bnb_4bit_use_double_quant=bool(found.name != "int8" and told.get("bnb_4bit_use_double_quant")),
        skip_modules=told.get("llm_int8_skip_modules"),
        dtype=plain_dtype(described),
    )


def _dtype(described: ModelDescription) -> str:
    """What most of its plain weights are stored as."""
    stored = described.tensors and not described.quantization
    return plain_dtype(replace(described, config=None) if stored else described)
