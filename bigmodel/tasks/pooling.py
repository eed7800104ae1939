"""How the vectors of a text's tokens become one, and what the files of a sentence-transformers model say of it.

modules.json                        Transformer, Pooling, Normalize, in their order
1_Pooling/config.json               pooling_mode: "mean"; or pooling_mode_mean_tokens: true and the like
sentence_bert_config.json           max_seq_length, do_lower_case
config_sentence_transformers.json   prompts, default_prompt_name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigpipe.bigmodel.checkpoint import MAX_CONFIG, read_json, read_json_list
from bigpipe.errors import InvalidCheckpoint, UsageError

from .tokenizing import OWN_FUNCTION

if TYPE_CHECKING:
    import torch

MODULES, LENGTHS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
OLDER_LENGTHS = tuple(
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""What sentence-transformers called that file before, and still reads."""
Mode = Literal["mean", "last", "first", "max", "mean_sqrt_len", "weighted_mean"]


def _weighted_mean(states: torch.Tensor) -> torch.Tensor:
    """The n-th token counts n times (Muennighoff 2022, arXiv 2202.08904)."""
    import torch

    weights = torch.arange(1, len(states) + 1, dtype=states.dtype)
    return weights @ states / weights.sum()


POOLINGS: Mapping[Mode, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(0),
    "last": lambda states: states[-1],
    "first": lambda states: states[0],
    "max": lambda states: states.max(0).values,
    "mean_sqrt_len": lambda states: states.sum(0) / len(states) ** 0.5,
    "weighted_mean": _weighted_mean,
}
"""Of a text's token vectors, [tokens, width] → [width]."""
THEIRS: Mapping[str, tuple[str, Mode]] = {
    "cls": ("pooling_mode_cls_token", "first"),
    "max": ("pooling_mode_max_tokens", "max"),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "mean_sqrt_len_tokens": ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len"),
    "weightedmean": ("pooling_mode_weightedmean_tokens", "weighted_mean"),
    "lasttoken": ("pooling_mode_lasttoken", "last"),
}
"""What sentence-transformers calls a mode → its name in older files, and here; several are joined in this order."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """What a model says of its vectors; as it stands, what one that says nothing gets."""

    modes: tuple[Mode, ...] = ("mean",)
    """Several: their vectors are joined."""
    normalize: bool = False
    """To the length 1."""
    max_length: int | None = None
    """Tokens of a text at the most."""
    prefix: str = ""
    """Before every text."""
    strips: bool = False
    lowers: bool = False
    """Is a text read without the blanks around it, and in lower case?"""

    def text(self, given: str) -> str:
        """Return a text as the model reads it."""
        whole = self.prefix + given
        whole = whole.strip() if self.strips else whole
        return whole.lower() if self.lowers else whole

    def vector(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, width] → [width · modes]"""
        import torch

        joined = torch.cat([POOLINGS[mode](states) for mode in self.modes])
        return torch.nn.functional.normalize(joined, dim=-1) if self.normalize else joined


def pooling_of(path: Path) -> Pooling:
    """Return what the files in a checkpoint's directory say. Raise UsageError for a part that is not done here, and
    InvalidCheckpoint for files that are not as sentence-transformers writes them."""
    if not (path / MODULES).is_file():
        return Pooling()
    modules = read_json_list(path / MODULES, path, MAX_CONFIG)
    if not all(isinstance(each, Mapping) and isinstance(each.get("path"), str) for each in modules):
        raise InvalidCheckpoint(f"{path / MODULES} lists no modules", "download the model again")
    parts = [(str(each.get("type")).rpartition(".")[2], each["path"]) for each in modules]
    if odd := [f"{kind} ({place})" for kind, place in parts if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UsageError(f"the model makes its vectors with {odd[0]}, which is not done here", OWN_FUNCTION)
    places = [place for kind, place in parts if kind == "Pooling"]
    config = _config(path, f"{places[0]}/config.json") if places else {}
    modes, prefix = _modes(config, path) if config else Pooling().modes, _prefix(path)
    if prefix and config.get("include_prompt") is False:
        raise UsageError(
            "the model leaves the tokens of its prompt out of its vectors, which is not done here", OWN_FUNCTION
        )
    reading = next((found for name in (LENGTHS, *OLDER_LENGTHS) if (found := _config(path, name))), {})
    limit = reading.get("max_seq_length")
    return Pooling(
        modes, any(kind == "Normalize" for kind, _ in parts), limit if type(limit) is int else None, prefix,
        strips=True, lowers=bool(reading.get("do_lower_case")),
    )  # fmt: skip


def _modes(config: Mapping[str, Any], path: Path) -> tuple[Mode, ...]:
    named = config.get("pooling_mode")
    names = [named] if isinstance(named, str) else named
    if names is None:
        names = [name for name, (older, _) in THEIRS.items() if config.get(older)] or ["mean"]
    if not isinstance(names, list) or not names or not all(name in THEIRS for name in names):
        raise UsageError(
            f"{path}: the pooling mode {named!r:.60} is not known", f"{OWN_FUNCTION}; known are {', '.join(THEIRS)}"
        )
    return tuple(THEIRS[name][1] for name in names)


def _config(path: Path, name: str) -> Mapping[str, Any]:
    return read_json(path / name, path, MAX_CONFIG) if (path / name).is_file() else {}


def _prefix(path: Path) -> str:
    config = _config(path, PROMPTS)
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    return str(prompts.get(name, "")) if isinstance(prompts, Mapping) and name is not None else ""
