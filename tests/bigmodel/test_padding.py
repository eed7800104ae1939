"""A text's answer is that of the text alone, also by models, heads and arguments that make something of padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.architectures import ALL, DEEPSEEK_V4
from support.models import SPECIAL, save_model, tiny_tokenizer

from bigpipe.bigmodel.architecture import together_limit
from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task

TEXTS = ["Hello", "a much longer prompt than the others", "x", "two words"]
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 264, "pad_token_id": 0}
RWKV = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 264, "context_length": 128}
WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 264,
    "max_position_embeddings": 128,
}  # fmt: skip
XLSTM = {"hidden_size": 256, "num_heads": 4, "num_blocks": 2, "vocab_size": 264}
MINIMAX = {
    **WIDTHS, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SEEN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
GIT = {**WIDTHS, "vision_config": SEEN}
DEEPSEEK_V32 = {**ALL["deepseek_v32"], "index_topk": 4}
FSMT = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 264,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "src_vocab_size": 264, "tgt_vocab_size": 264, "langs": ["en", "de"], "pad_token_id": 0,
}  # fmt: skip
MOBILEBERT = {**WIDTHS, "embedding_size": 32, "intra_bottleneck_size": 32}
DYNAMIC = {
    **WIDTHS, "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4},
}  # fmt: skip
LONGROPE = {
    **WIDTHS, "max_position_embeddings": 128, "original_max_position_embeddings": 16, "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
    },
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


def answers(
    task: str, path: Path, new: int = 6, texts: list[str] = TEXTS, **arguments: Any
) -> tuple[list[Any], list[Any]]:
    """What a task gives for all texts together, and for each alone."""
    options = TaskOptions(arguments=arguments, max_new_tokens=new)
    bound = find_task(task, Sources()).bind(load(path), path, options, Sources())
    rows = [Row(index, text, {"prompt": text, "continuation": " it"}) for index, text in enumerate(texts)]
    return [answer.payload for answer in bound(rows)], [bound([row])[0].payload for row in rows]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prefix", "head", "config"),
    [
        ("XLNet", "LMHeadModel", XLNET),
        ("Rwkv", "ForCausalLM", RWKV),
        ("xLSTM", "ForCausalLM", XLSTM),
        ("DeepseekV4", "ForCausalLM", {**DEEPSEEK_V4, "vocab_size": 264}),
        ("MiniMax", "ForCausalLM", MINIMAX),
        ("Git", "ForCausalLM", GIT),
        ("RoFormer", "ForCausalLM", {**WIDTHS, "is_decoder": True}),
        ("DeepseekV32", "ForCausalLM", {**DEEPSEEK_V32, "vocab_size": 264}),
    ],
    ids=["xlnet", "rwkv", "xlstm", "deepseek_v4", "minimax", "git", "roformer", "deepseek_v32"],
)
def test_a_model_that_drops_or_misplaces_the_mask_reads_texts_of_one_length(
    tmp_path: Path, prefix: str, head: str, config: dict[str, Any]
) -> None:
    together, alone = answers("text-generation", make(tmp_path, prefix, head, **config))
    assert together == alone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prefix", "config"),
    [
        ("XLNet", XLNET),
        ("FNet", WIDTHS),
        ("ConvBert", {**WIDTHS, "embedding_size": 32, "head_ratio": 2}),
        ("MobileBert", MOBILEBERT),
    ],
    ids=["xlnet", "fnet", "convbert", "mobilebert"],
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


MIDDLING = [*TEXTS, "a text of a middling length"]
"""The last one is longer than 16 tokens, and follows a longer one."""


@pytest.mark.parametrize(("prefix", "config"), [("Llama", DYNAMIC), ("Phi3", LONGROPE)], ids=["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_text_are_those_of_each_text_alone(
    tmp_path: Path, prefix: str, config: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModel

    path = make(tmp_path, prefix, "ForCausalLM", **config)
    tokenizer = tiny_tokenizer()
    for found in zip(*answers("feature-extraction", path, texts=MIDDLING), MIDDLING, strict=True):
        with torch.no_grad():  # a model that has read nothing before
            states = AutoModel.from_pretrained(path)(**tokenizer(found[2], return_tensors="pt")).last_hidden_state
        for each in found[:2]:
            assert each["features"] == pytest.approx(states[0].mean(0).tolist(), abs=1e-4)
    for one, other in zip(*answers("scoring", path, texts=MIDDLING), strict=True):
        assert one["scores"][0]["token_logprobs"] == pytest.approx(other["scores"][0]["token_logprobs"], abs=1e-4)
    together, alone = answers("text-generation", path, texts=MIDDLING)
    assert together == alone


def test_texts_below_the_length_at_which_positions_change_are_still_read_together(tmp_path: Path) -> None:
    path = make(tmp_path, "Llama", "ForCausalLM", **DYNAMIC)
    model, forwards = load(path), []
    model.register_forward_hook(lambda module, given, found: forwards.append(found.logits.shape[0]))
    scored = find_task("scoring", Sources()).bind(model, path, TaskOptions(), Sources())
    rows = [Row(index, "a" * tokens, {"continuation": "it"}) for index, tokens in enumerate((3, 14, 9, 15))]
    scored(rows[:3])
    scored(rows)
    assert forwards == [3, 1, 1, 1, 1]
    assert together_limit({"text_config": DYNAMIC}) == together_limit(LONGROPE) == 16
    layered = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    assert together_limit({"max_position_embeddings": 64, "rope_parameters": layered}) == 64
    assert together_limit(WIDTHS) is None
    assert together_limit({**DYNAMIC, "text_config": {"index_topk": 8}}) == 8


def test_a_model_that_changes_itself_for_short_texts_reads_long_ones_as_if_it_had_read_nothing(tmp_path: Path) -> None:
    """BigBird attends in full to texts of up to 28 tokens here, and to random blocks of longer ones."""
    import torch
    from transformers import AutoModel

    fields = {**WIDTHS, "block_size": 4, "num_random_blocks": 1}
    path, texts = make(tmp_path, "BigBird", "Model", **fields), ["Hello", "of seventy tokens " * 4, "x"]
    wanted = []
    for text in texts:
        with torch.no_grad():
            states = AutoModel.from_pretrained(path)(**tiny_tokenizer()(text, return_tensors="pt")).last_hidden_state
        wanted.append(pytest.approx(states[0].mean(0).tolist(), abs=1e-5))
    for found in answers("feature-extraction", path, texts=texts):
        assert [each["features"] for each in found] == wanted
    model, made = load(path, {"": "disk"}), {}
    task = find_task("feature-extraction", Sources()).bind(model, path, TaskOptions(), Sources())

    def work(number: int) -> None:
        made[number] = task([Row(number, texts[number], {})])[0].payload["features"]

    loaded(model).stream.together(model, work, [0, 1, 2], 1)
    assert [made[number] for number in range(3)] == wanted


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("where", ["argument", "file"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"min_length": 9},
        {"no_repeat_ngram_size": 1},
        {"forced_bos_token_id": 70},
        {"watermarking_config": {"context_width": 4, "seeding_scheme": "selfhash", "bias": 20.0}},
    ],
    ids=str,
)
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


@pytest.mark.parametrize(
    "matching", [{"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"bad_words_ids": [[0, 87, 0]]}], ids=str
)
def test_padding_with_a_letter_is_no_part_of_what_is_repeated(tmp_path: Path, matching: dict[str, Any]) -> None:
    """A tokenizer without special tokens pads with its first letter, which this model likes to write."""
    from support.models import make_checkpoint
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    read = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    read.pre_tokenizer, read.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    path = make_checkpoint(tmp_path, "llama", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    for file in path.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=read).save_pretrained(path)
    biased = {"sequence_bias": [[[0], 9.0]], **matching}
    together, alone = answers("text-generation", path, texts=["Hi!", "a much longer prompt", "x"], **biased)
    assert together == alone


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prefix", "head", "config"),
    [
        ("FSMT", "ForConditionalGeneration", FSMT),
        ("Canine", "Model", {**WIDTHS, "local_transformer_stride": 16, "num_hash_buckets": 64}),
    ],
    ids=["fsmt", "canine"],
)
def test_features_of_models_whose_parts_say_less_of_themselves(
    tmp_path: Path, prefix: str, head: str, config: dict[str, Any]
) -> None:
    path = make(tmp_path, prefix, head, **config)
    together, alone = answers("feature-extraction", path, texts=TEXTS[:2])
    for one, other in zip(together, alone, strict=True):
        assert one["features"] == pytest.approx(other["features"], abs=1e-4)


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
