"""A text's answer is that of the text alone, also by models, heads and arguments that make something of padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import SPECIAL, save_model, tiny_tokenizer

from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task

TEXTS = ["Hello", "a much longer prompt than the others", "x", "two words"]
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 264, "pad_token_id": 0}
RWKV = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 264, "context_length": 128}
WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 264,
    "max_position_embeddings": 128,
}  # fmt: skip


def make(folder: Path, prefix: str, head: str, **config: Any) -> Path:
    """A saved tiny model of a class that `support.models` does not list."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}{head}")(getattr(transformers, f"{prefix}Config")(**config))
        for parameter in model.parameters():
            if parameter.ndim > 1:  # norms that nearly vanish would hide what they are given
                torch.nn.init.normal_(parameter, std=0.2)
    save_model(model.eval(), folder, tokenizer=False)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def answers(task: str, path: Path, new: int = 6, **arguments: Any) -> tuple[list[Any], list[Any]]:
    """What a task gives for all texts together, and for each alone."""
    options = TaskOptions(arguments=arguments, max_new_tokens=new)
    bound = find_task(task, Sources()).bind(load(path), path, options, Sources())
    rows = [Row(index, text, {"prompt": text, "continuation": " it"}) for index, text in enumerate(TEXTS)]
    return [answer.payload for answer in bound(rows)], [bound([row])[0].payload for row in rows]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prefix", "head", "config"),
    [("XLNet", "LMHeadModel", XLNET), ("Rwkv", "ForCausalLM", RWKV)],
    ids=["xlnet", "rwkv"],
)
def test_a_model_that_drops_the_mask_reads_texts_of_one_length(
    tmp_path: Path, prefix: str, head: str, config: dict[str, Any]
) -> None:
    together, alone = answers("text-generation", make(tmp_path, prefix, head, **config))
    assert together == alone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prefix", "config"),
    [("XLNet", XLNET), ("FNet", WIDTHS), ("ConvBert", {**WIDTHS, "embedding_size": 32, "head_ratio": 2})],
    ids=["xlnet", "fnet", "convbert"],
)
def test_a_head_that_reads_padding_reads_texts_of_one_length(
    tmp_path: Path, prefix: str, config: dict[str, Any]
) -> None:
    path = make(tmp_path, prefix, "ForSequenceClassification", **config)
    for task in ("text-classification", "feature-extraction"):
        together, alone = answers(task, path)
        for one, other in zip(together, alone, strict=True):
            assert (
                one == pytest.approx(other, abs=1e-5)
                if "label" in one
                else one["features"] == pytest.approx(other["features"], abs=1e-5)
            )


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("where", ["argument", "file"])
@pytest.mark.parametrize("arguments", [{"min_length": 9}, {"no_repeat_ngram_size": 1}], ids=str)
def test_arguments_that_count_what_stands_before_count_no_padding(
    tmp_path: Path, arguments: dict[str, Any], where: str
) -> None:
    from support.models import make_checkpoint

    path = make_checkpoint(tmp_path, "llama", eos_token_id=[token for token in range(4, 264) if token % 3])
    own = json.loads((path / "generation_config.json").read_bytes())
    more = arguments if where == "file" else {}
    (path / "generation_config.json").write_text(json.dumps({**own, "pad_token_id": 5, **more}))
    together, alone = answers("text-generation", path, **({"pad_token_id": 5} | ({} if more else arguments)))
    assert together == alone


@pytest.mark.filterwarnings("ignore")
def test_features_are_those_of_the_kinds_of_tokens_that_a_tokenizer_tells(tmp_path: Path) -> None:
    """XLNet and Funnel have one for the token that stands for the whole."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModel, PreTrainedTokenizerFast

    path, read, ends = make(tmp_path, "XLNet", "Model", **XLNET), tiny_tokenizer().backend_tokenizer, [("</s>", 2)]
    read.post_processor = TemplateProcessing(single="$A:0 </s>:2", special_tokens=ends)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=read, model_input_names=names, **SPECIAL)
    tokenizer.save_pretrained(path)
    given, wanted = tokenizer(TEXTS[0], return_tensors="pt"), AutoModel.from_pretrained(path)
    assert given["token_type_ids"].max() == 2
    with torch.no_grad():
        plain = wanted(**given).last_hidden_state[0].mean(0).tolist()
    assert answers("feature-extraction", path)[0][0]["features"] == pytest.approx(plain, abs=1e-5)
