"""Train the model of the quickstart: a small OPT that writes like Python's documentation.

    python models/train_quickstart.py train   [--out DIR] [--steps N]    about 12 minutes on one core
    python models/train_quickstart.py measure [--out DIR]                held-out perplexity: fp16, int8, nf4

The checkpoint goes to DIR (models/quickstart), what was counted and measured to DIR.json beside it.

The text is the docstrings of the running interpreter's standard library, and the language topics that `pydoc` carries
(PSF licence). Whole modules are held out for the measurement; text that occurs twice is used once.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

QUICKSTART = Path(__file__).with_name("quickstart")
SEED = 20
VOCABULARY = 3072
LENGTH = 256
BATCH = 4  # at this size many small steps learn more per token than few large ones
STEPS = 4000
PEAK_RATE = 3e-3
WARM_UP = 150
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # in OPT's order: ids 0 to 3; every text starts with </s>
START = SPECIAL.index("</s>")


@dataclass(frozen=True)
class Text:
    """One docstring with the line that says whose it is (`json.dumps(obj, *, indent)`)."""

    header: str
    body: str


@dataclass(frozen=True)
class Corpus:
    training: tuple[Text, ...]
    held_out: tuple[Text, ...]


def library_modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module of the standard library, tests and installed packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"}.isdisjoint(parts):
            yield ".".join(parts).removesuffix(".__init__"), path


def docstrings(name: str, source: str) -> Iterator[Text]:
    def visit(node: ast.AST, prefix: str) -> Iterator[Text]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                prefix = f"{prefix}.{node.name}"
            if body := ast.get_docstring(node):
                called = not isinstance(node, ast.Module | ast.ClassDef)
                yield Text(f"{prefix}({ast.unparse(node.args)})" if called else prefix, body)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, prefix)

    yield from visit(ast.parse(source), name)


def language_topics() -> Iterator[tuple[str, Text]]:
    from pydoc_data.topics import topics

    for name, body in sorted(topics.items()):
        yield f"topic {name}", Text(f"help({name!r})", body.strip())


def gather() -> Corpus:
    """All texts, each once. One module in twenty, chosen by the hash of its name, is held out."""
    pairs = [(name, text) for name, path in library_modules() for text in read_module(name, path)]
    seen: set[str] = set()
    corpus: tuple[list[Text], list[Text]] = ([], [])
    for name, text in [*pairs, *language_topics()]:
        if text.body not in seen:
            seen.add(text.body)
            corpus[hashlib.sha256(name.encode()).digest()[0] % 20 == 0].append(text)
    return Corpus(tuple(corpus[0]), tuple(corpus[1]))


def read_module(name: str, path: Path) -> list[Text]:
    try:
        return list(docstrings(name, path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):  # lib2to3 and friends keep files that are wrong on purpose
        return []


def train_tokenizer(texts: tuple[Text, ...]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as OPT's: any text has a token sequence and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{text.header}\n{text.body}" for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", START)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=LENGTH,
    )


def windows(tokenizer: PreTrainedTokenizerFast, texts: tuple[Text, ...], epoch: int | None) -> torch.Tensor:
    """int64 [n, LENGTH]: the texts one after the other, each started by </s>, cut into equal pieces.

    `epoch` shuffles the texts and gives every second one its header; None keeps order and headers.
    """
    order = list(range(len(texts)))
    if epoch is not None:
        random.Random(SEED + epoch).shuffle(order)
    stream: list[int] = []
    for index in order:
        with_header = epoch is None or (epoch + index) % 2 == 0
        text = f"{texts[index].header}\n{texts[index].body}" if with_header else texts[index].body
        stream += tokenizer(text)["input_ids"]
    count = len(stream) // LENGTH
    return torch.tensor(stream[: count * LENGTH]).view(count, LENGTH)


def batches(tokenizer: PreTrainedTokenizerFast, texts: tuple[Text, ...], steps: int) -> Iterator[torch.Tensor]:
    epoch = step = 0
    while True:
        pieces = windows(tokenizer, texts, epoch)
        for start in torch.randperm(len(pieces)).split(BATCH):
            if step == steps:
                return
            if len(start) == BATCH:
                step += 1
                yield pieces[start]
        epoch += 1


def new_model() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,  # a multiple of 64: bitsandbytes' 4-bit blocks must not cross rows on a CPU
            word_embed_proj_dim=128,
            ffn_dim=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=START,
            eos_token_id=START,
            pad_token_id=SPECIAL.index("<pad>"),
            tie_word_embeddings=True,
            dropout=0.0,
        )
    )


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of each token but the first of each row, given those before it."""
    logits = model(input_ids=tokens).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: OPTForCausalLM) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def fit(model: OPTForCausalLM, stream: Iterator[torch.Tensor], steps: int) -> float:
    """The mean loss of the last 200 steps, in nats per token."""
    optimizer = optimizer_for(model)
    model.train()
    losses: list[float] = []
    for step, tokens in enumerate(stream):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step:5d}  loss {losses[-1]:.3f}", flush=True)
    return sum(losses[-200:]) / len(losses[-200:])


@torch.no_grad()
def perplexity(model: Any, pieces: torch.Tensor) -> float:
    model.eval()
    losses = [loss_of(model, batch) * len(batch) for batch in pieces.split(16)]
    return math.exp(float(torch.stack(losses).sum()) / len(pieces))


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older transformers know, too
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train(out: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    corpus = gather()
    tokenizer = train_tokenizer(corpus.training)
    model = new_model()
    pieces = windows(tokenizer, corpus.held_out, None)
    started = time.monotonic()
    loss = fit(model, batches(tokenizer, corpus.training, steps), steps)
    numbers = {
        "python": platform.python_version(),
        "texts": len(corpus.training),
        "characters": sum(len(text.body) for text in corpus.training),
        "held_out_tokens": pieces.numel(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "seconds": round(time.monotonic() - started),
        "training_loss": round(loss, 3),
        "perplexity": {"float32": round(perplexity(model, pieces), 3)},
    }
    save(model, tokenizer, out)
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    measure(out)


def measure(out: Path) -> None:
    """Add the held-out perplexities of the saved model as it is and quantized on load to the numbers."""
    numbers = json.loads(out.with_suffix(".json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    pieces = windows(tokenizer, gather().held_out, None)
    schemes: dict[str, BitsAndBytesConfig | None] = {
        "float16": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    for name, quantization in schemes.items():
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float16, device_map="cpu", quantization_config=quantization
        )
        numbers["perplexity"][name] = round(perplexity(model, pieces), 3)
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("action", choices=["train", "measure"])
    parser.add_argument("--out", type=Path, default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.action == "train":
        train(arguments.out, arguments.steps)
    else:
        measure(arguments.out)


if __name__ == "__main__":
    main()
