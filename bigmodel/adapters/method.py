"""What an `adapter_config.json` of peft says that matters to weights, and what is refused by name.

Held against peft 0.21 (`tuners/lora/config.py`, `tuners/lora/model.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bigpipe.bigmodel.checkpoint import AdapterDescription
from bigpipe.errors import UsageError
from bigpipe.names import listed

Combination = Literal["cat", "linear"]
"""Of several adapters, as peft's `add_weighted_adapter` names it. cat: Σ weight · (B A · scaling), the sum of what each
would add; ranks may differ. linear: the weighted sums of all A and of all B, each by the square root of weight times
scaling, and their product, which has terms that mix adapters; ranks must be equal."""

OTHERS = {
    "layer_replication": "layers that stand in the model several times",
    "alora_invocation_tokens": "an adapter that is active behind certain tokens only",
    "arrow_config": "a router among adapters",
    "use_bdlora": "matrices in blocks",
    "use_qalora": "groups of inputs with one column",
    "velora_config": "compressed activations",
    "monteclora_config": "samples of weights",
    "kasa_config": "singular values beside the matrices",
    "megatron_config": "layers of Megatron",
}
"""Fields of LoRA's config that change what is computed → in words; none of them is merged here."""
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where peft changes the model's own weights before it adds an adapter."""
LONGEST_PATTERN = 200


@dataclass(frozen=True, slots=True)
class Lora:
    """The config of a LoRA adapter."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    tokens: Mapping[str, tuple[int, ...]]
    """Module → rows of its embedding that were trained; "" stands for the input embedding."""
    parameters: tuple[str, ...]
    """`target_parameters`: parameters, not modules, that have LoRA matrices."""

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def scaling(self, module: str) -> float:
        """Return what the product of a module's matrices is multiplied by."""
        alpha, rank = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rows(self, module: str, is_input: bool) -> tuple[int, ...]:
        """Return the rows of an embedding that were trained. is_input: is it the model's input embedding?"""
        by_name = (rows for name, rows in self.tokens.items() if name and f".{module}".endswith(f".{name}"))
        return next(by_name, self.tokens.get("", ()) if is_input else ())


def _matching(patterns: Mapping[str, Any], module: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_lora(adapter: AdapterDescription) -> Lora:
    """Return what the config of an adapter says. Raise UsageError, naming the field, for a method that is not LoRA, for
    what is not done here, and for values that mean nothing."""
    config, where = adapter.config, adapter.where
    method = config.get("peft_type")
    if method != "LORA":
        cause = f"{where}: its adapter_config.json has peft_type {method!r}, and LORA is what is added to weights here"
        raise UsageError(cause, "merge it with peft (`merge_and_unload`), and give the merged model")
    for field, meaning in OTHERS.items():
        if config.get(field):
            raise UsageError(f"{where}: {field}, {meaning}, is not done here", "merge it with peft, where peft can")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(REBASED):
        cause = (
            f"{where}: init_lora_weights is {init}, for which peft changes the model's weights before it adds to them"
        )
        raise UsageError(cause, "save it with peft's `path_initial_model_for_weight_conversion`, as plain LoRA")
    return Lora(
        r=_whole(where, "r", config.get("r", 8)),
        alpha=_number(where, "lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern={key: _whole(where, f"rank_pattern.{key}", n) for key, n in _patterns(adapter, "rank_pattern")},
        alpha_pattern={
            key: _number(where, f"alpha_pattern.{key}", n) for key, n in _patterns(adapter, "alpha_pattern")
        },
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        tokens=_tokens(adapter),
        parameters=tuple(map(str, config.get("target_parameters") or ())),
    )


def _number(where: str, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{where}: {field} is {value!r:.80}, and no number", "correct its adapter_config.json")
    return value


def _whole(where: str, field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{where}: {field} is {value!r:.80}, and no rank", "correct its adapter_config.json")
    return value


def _patterns(adapter: AdapterDescription, field: str) -> list[tuple[str, Any]]:
    found = adapter.config.get(field) or {}
    if not isinstance(found, Mapping):
        raise UsageError(f"{adapter.where}: {field} is {found!r:.80}, and no map", "correct its adapter_config.json")
    for key in found:
        # A repository's author writes these, and a repeated group can take forever
        if len(key) > LONGEST_PATTERN or re.search(r"\)[*+{?]", key) or not _compiles(key):
            cause = f"{adapter.where}: {field} has {key!r:.80}, which is no name of modules, nor a plain expression"
            raise UsageError(cause, "name the modules in its adapter_config.json")
    return list(found.items())


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _tokens(adapter: AdapterDescription) -> dict[str, tuple[int, ...]]:
    found = adapter.config.get("trainable_token_indices")
    named = {"": found} if isinstance(found, list) else found or {}
    rows = [row for each in named.values() for row in each] if isinstance(named, Mapping) else [None]
    if not all(type(row) is int and row >= 0 for row in rows):
        cause = f"{adapter.where}: trainable_token_indices is {found!r:.80}, and no list of rows"
        raise UsageError(cause, "correct its adapter_config.json")
    return {name: tuple(each) for name, each in named.items()}


def require_weights(weights: Sequence[float] | None, count: int, combination: str) -> tuple[float, ...]:
    """Return a weight for each of `count` adapters. Raise UsageError where there are more or fewer, where one is no
    number, and for a combination that there is not."""
    if combination not in ("cat", "linear"):
        raise UsageError(f"combination {combination!r} is not known", "choose cat or linear", field="combination")
    given = tuple(weights) if weights is not None else (1.0,) * count
    if len(given) != count:
        cause = f"{listed([str(weight) for weight in given]) or 'no weight'} for {count} adapters"
        raise UsageError(cause, "give one weight for each, in their order", field="weights")
    for number, weight in enumerate(given, 1):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            cause = f"weights: that of adapter {number} is {weight!r:.80}, and no number"
            raise UsageError(cause, "give a number for each adapter, such as 0.5", field="weights")
    return given
