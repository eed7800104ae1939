"""Tokenizers of many classes of transformers, in the files that they are published with, each beside a tiny model.

`PUBLISHED["phobert"].make(folder)` gives a folder as a repository holds it: nothing in it was saved by transformers
unless that is how such tokenizers are published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .layouts.layout import change_config
from .models import make_checkpoint, tiny_tokenizer

WORDS = "hello world the model reads a file and writes it xin chào việt nam def return".split()  # noqa: SIM905
TEXTS = ["hello world", "the model reads a file", "xin chào việt nam", "def f(x): return x + 1"]
SIMPLE = [chr(code) for code in range(33, 127)]
ROBERTA = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    write: Callable[[Path], None]
    body: str = "roberta"
    """The tiny model it lies beside."""
    rows: int = 700
    """Of the model's embedding: more than the vocabulary has."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says besides."""

    def make(self, folder: Path) -> Path:
        make_checkpoint(
            folder, self.body, tokenizer=False, vocab_size=self.rows, **(ROBERTA if self.body == "roberta" else {})
        )
        (folder / "generation_config.json").unlink(missing_ok=True)
        change_config(folder, **self.config)
        self.write(folder)
        return folder


def _json(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _lines(folder: Path, name: str, lines: Iterable[str]) -> None:
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _settings(folder: Path, **settings: Any) -> None:
    _json(folder, "tokenizer_config.json", settings)


def _byte_level(*special: str) -> Callable[[Path], None]:
    """`vocab.json` and `merges.txt`, as GPT-2 was published."""

    def write(folder: Path) -> None:
        from tokenizers import ByteLevelBPETokenizer

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator([" ".join(WORDS), *TEXTS] * 3, vocab_size=400, special_tokens=list(special))
        trained.save_model(str(folder))

    return write


def _ends_of_words(*special: str) -> Callable[[Path], None]:
    """`vocab.json` and `merges.txt` over letters: the last one of a word is marked, or all others are."""

    def write(folder: Path) -> None:
        letters = [f"{letter}{mark}" for mark in ("", "</w>", "@@") for letter in SIMPLE]
        tokens = [*special, *letters, "he", "wo", "wor", "he@@", "wor@@"]
        _json(folder, "vocab.json", {token: number for number, token in enumerate(tokens)})
        _lines(folder, "merges.txt", ["#version: 0.2", "h e", "w o", "wo r"])

    return write


def _word_pieces(name: str = "vocab.txt", **settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[X_SEP]"]
        _lines(folder, name, [*special, *WORDS, *SIMPLE, *(f"##{letter}" for letter in SIMPLE)])
        if settings:
            _settings(folder, **settings)

    return write


def _codes(folder: Path) -> None:
    """`vocab.txt` and `bpe.codes`, both with counts, as fastBPE writes them."""
    ends = [f"{letter}@@" for letter in SIMPLE]
    _lines(folder, "vocab.txt", [f"{token} 1" for token in [*WORDS, *SIMPLE, *ends, "he@@", "wor@@"]])
    _lines(folder, "bpe.codes", ["h e 10", "w o 9", "wo r 8"])


def _settings_alone(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: _settings(folder, **settings)


def _unigram(folder: Path) -> None:
    """`tokenizer.json` alone, as those are published whose pieces come from sentencepiece."""
    from tokenizers import SentencePieceUnigramTokenizer

    trained = SentencePieceUnigramTokenizer()
    trained.train_from_iterator(
        [" ".join(WORDS), *TEXTS] * 5, vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    trained.save(str(folder / "tokenizer.json"))
    _settings(folder, tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _byte_fallback(folder: Path) -> None:
    """`tokenizer.json` of a BPE that spells unknown letters as bytes, as Llama's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [letter for letter in "▁helowrdtmasfi" if letter not in special]
    tokens = {token: number for number, token in enumerate([*special, *letters, "▁h", "he"])}
    made = Tokenizer(models.BPE(tokens, [("▁", "h"), ("h", "e")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _settings(folder, tokenizer_class="LlamaTokenizer", legacy=False, **names)
    _json(folder, "special_tokens_map.json", names)


def _added_tokens(folder: Path) -> None:
    """`added_tokens.json` and `special_tokens_map.json`, as transformers before 4.34 saved them."""
    _word_pieces()(folder)
    _json(folder, "added_tokens.json", {"hello world": 300, "<speaker>": 301})
    _json(folder, "special_tokens_map.json", {"cls_token": "[CLS]", "additional_special_tokens": ["<speaker>"]})
    _settings(folder, do_lower_case=True, tokenizer_class="BertTokenizer")


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def _with_template(put: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tiny_tokenizer().save_pretrained(folder)
        put(folder)

    return write


def _template_in_settings(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    _settings(folder, **settings, chat_template=TEMPLATE)


def _template_in_a_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _several_templates(folder: Path) -> None:
    _template_in_a_file(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(TEMPLATE.replace("<a>", "<tool>"))


def _own_code(folder: Path) -> None:
    """A class of the repository's own, with a file that only it knows."""
    (folder / "tokenization_letters.py").write_text(OWN_CODE)
    _lines(folder, "letters.txt", ["<pad>", "<unk>", *SIMPLE])
    _settings(
        folder,
        tokenizer_class="LettersTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_letters.LettersTokenizer", None]},
    )


OWN_CODE = """\
from transformers import PreTrainedTokenizer


class LettersTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"letters_file": "letters.txt"}

    def __init__(self, letters_file, pad_token="<pad>", unk_token="<unk>", **options):
        with open(letters_file, encoding="utf-8") as file:
            self.letters = file.read().split("\\n")[:-1]
        super().__init__(pad_token=pad_token, unk_token=unk_token, **options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: number for number, letter in enumerate(self.letters)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 1)

    def _convert_id_to_token(self, index):
        return self.letters[index]
"""


def _roc_bert(folder: Path) -> None:
    _word_pieces()(folder)
    letters = {letter: number for number, letter in enumerate(["[PAD]", "[UNK]", *SIMPLE])}
    _json(folder, "word_shape.json", letters)
    _json(folder, "word_pronunciation.json", letters)


def _japanese_neox(folder: Path) -> None:
    special = ["<|endoftext|>", "<|startoftext|>", "<SP>", "<BR>", "<TAB>"]
    _lines(
        folder,
        "vocab.txt",
        [*special, *(letter for letter in SIMPLE if letter != ","), *(f"<|byte{byte}|>" for byte in range(256))],
    )
    _json(folder, "emoji.json", {"emoji": {}, "emoji_inv": {}})


def _my_t5(folder: Path) -> None:
    _json(folder, "byte_maps.json", {"decompose_map": {}, "merge_map": {"68 65": "c0", "77 6f": "c1"}})


def _whisper(folder: Path) -> None:
    _byte_level("<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>")(folder)
    _json(folder, "normalizer.json", {"colour": "color"})


def _luke(folder: Path) -> None:
    _byte_level("<s>", "<pad>", "</s>", "<unk>", "<mask>")(folder)
    _json(folder, "entity_vocab.json", {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[MASK2]": 3})


def _letters_of_speech(folder: Path) -> None:
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *SIMPLE]
    _json(folder, "vocab.json", {token: number for number, token in enumerate(dict.fromkeys(tokens))})


_MARKED = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
PUBLISHED: dict[str, Published] = {
    "bert": Published(write=_word_pieces(), body="bert"),
    "bert cased": Published(write=_word_pieces(do_lower_case=False), body="bert"),
    "bert japanese by letters": Published(
        write=_word_pieces(
            tokenizer_class="BertJapaneseTokenizer", word_tokenizer_type="basic", subword_tokenizer_type="character"
        ),
        body="bert",
    ),
    "electra": Published(write=_word_pieces(tokenizer_class="ElectraTokenizer"), body="bert"),
    "mpnet": Published(write=_word_pieces(tokenizer_class="MPNetTokenizer")),
    "tokens added": Published(write=_added_tokens, body="bert"),
    "prophetnet": Published(
        write=_word_pieces("prophetnet.tokenizer"), body="bert", config={"tokenizer_class": "ProphetNetTokenizer"}
    ),
    "roc_bert": Published(write=_roc_bert, body="bert", config={"tokenizer_class": "RoCBertTokenizer"}),
    "roberta": Published(write=_byte_level(*_MARKED)),
    "gpt2": Published(write=_byte_level("<|endoftext|>"), body="gpt2"),
    "qwen2": Published(write=_byte_level("<|endoftext|>"), body="qwen2"),
    "deberta": Published(
        write=_byte_level("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"), config={"tokenizer_class": "DebertaTokenizer"}
    ),
    "luke": Published(write=_luke, config={"tokenizer_class": "LukeTokenizer"}),
    "whisper": Published(write=_whisper, body="opt", config={"tokenizer_class": "WhisperTokenizer"}),
    "clip": Published(
        write=_ends_of_words("<|startoftext|>", "<|endoftext|>"), config={"tokenizer_class": "CLIPTokenizer"}
    ),
    "openai-gpt": Published(write=_ends_of_words("<unk>"), config={"tokenizer_class": "OpenAIGPTTokenizer"}),
    "herbert": Published(write=_ends_of_words(*_MARKED), config={"tokenizer_class": "HerbertTokenizer"}),
    "ctrl": Published(write=_ends_of_words("<unk>"), config={"tokenizer_class": "CTRLTokenizer"}),
    "blenderbot-small": Published(
        write=_ends_of_words("__null__", "__start__", "__end__", "__unk__"), body="bart",
        config={"tokenizer_class": "BlenderbotSmallTokenizer"},
    ),
    "phobert": Published(write=_codes, config={"tokenizer_class": "PhobertTokenizer"}),
    "bertweet": Published(write=_codes, config={"tokenizer_class": "BertweetTokenizer"}),
    "esm": Published(
        write=lambda folder: _lines(folder, "vocab.txt", ["<cls>", "<pad>", "<eos>", "<unk>", *WORDS, "<mask>"]),
        config={"tokenizer_class": "EsmTokenizer"},
    ),
    "wav2vec2": Published(write=_letters_of_speech, config={"tokenizer_class": "Wav2Vec2CTCTokenizer"}),
    "gpt_neox_japanese": Published(
        write=_japanese_neox, body="gpt_neox", config={"tokenizer_class": "GPTNeoXJapaneseTokenizer"}
    ),
    "unigram": Published(write=_unigram, body="t5"),
    "llama": Published(write=_byte_fallback, body="llama"),
    "byt5": Published(write=_settings_alone(tokenizer_class="ByT5Tokenizer", extra_ids=125), body="t5", rows=384),
    "canine": Published(write=_settings_alone(tokenizer_class="CanineTokenizer"), rows=57400),
    "perceiver": Published(write=_settings_alone(tokenizer_class="PerceiverTokenizer")),
    "myt5": Published(write=_my_t5, body="t5", rows=384, config={"tokenizer_class": "MyT5Tokenizer"}),
    "chat template in the settings": Published(write=_with_template(_template_in_settings), body="llama"),
    "chat template in a file": Published(
        write=_with_template(_template_in_a_file), body="llama"
    ),
    "several chat templates": Published(write=_with_template(_several_templates), body="llama"),
    "code of its own": Published(write=_own_code),
}  # fmt: skip


def _changed_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tiny_tokenizer().save_pretrained(folder)
        file = folder / "tokenizer.json"
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    return write


def _changed_settings(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tiny_tokenizer().save_pretrained(folder)
        _settings(folder, **{**json.loads((folder / "tokenizer_config.json").read_bytes()), **changes})

    return write


def _one_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content))


def void(_: object) -> None:
    pass


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
BROKEN: dict[str, Callable[[Path], None]] = {
    "cut short": _changed_text(lambda text: text[:-50]),
    "without anything": _changed_text(lambda text: "{}"),
    "a pointer of git-lfs": _changed_text(lambda text: POINTER),
    "settings that are a list": _one_file("tokenizer_config.json", b"[]"),
    "a class that is a number": _changed_settings(tokenizer_class=3),
    "a token that is a number": _changed_settings(pad_token=5),
    "a side that is none": _changed_settings(padding_side="middle"),
    "tekken without a pattern": _one_file("tekken.json", b'{"config": {}, "vocab": []}'),
    "a vocabulary that is a list": lambda folder: void((_byte_level()(folder), _json(folder, "vocab.json", [1]))),
    "merges that are missing": lambda folder: void((_byte_level()(folder), (folder / "merges.txt").unlink())),
    "a library that is missing": _settings_alone(tokenizer_class="FSMTTokenizer", langs=["en", "de"]),
    "code that nobody trusts": _own_code,
}
"""What transformers refuses as well, with whatever it happens upon."""
