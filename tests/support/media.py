"""Small pictures and sounds, each another one."""

from __future__ import annotations

import math
import random
import struct
import wave
from pathlib import Path
from typing import Any


def write_picture(path: Path, seed: int = 0, width: int = 40, height: int = 30, mode: str = "RGB") -> Path:
    """A picture of coloured blocks, in the format that the ending names."""
    from PIL import Image

    dice = random.Random(seed)  # noqa: S311
    picture = Image.new("RGB", (4, 4))
    picture.putdata([(dice.randrange(256), dice.randrange(256), dice.randrange(256)) for _ in range(16)])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def tones(seconds: float, rate: int, seed: int = 0) -> list[float]:
    """Samples between -1 and 1 of a few sine waves below 4 kHz."""
    dice = random.Random(seed)  # noqa: S311
    waves = [(dice.uniform(100, 3500), dice.uniform(0, 6)) for _ in range(4)]
    return [sum(math.sin(6.283185 * f * n / rate + p) for f, p in waves) / 5 for n in range(int(seconds * rate))]


def write_wav(path: Path, samples: list[float], rate: int = 16_000, channels: int = 1) -> Path:
    """16-bit PCM; all channels alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(b"".join(struct.pack("<h", round(value * 32767)) * channels for value in samples))
    return path


def _fill(model: Any) -> None:
    """With weights that are large enough for another input to make another output."""
    import torch

    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.05 if parameter.ndim == 1 else 0.4)


def make_vit(folder: Path, **changes: Any) -> Path:
    """A tiny ViT that knows four kinds of pictures, with its processor."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from .models import make_with_head

    path = make_with_head(folder, "vit", "ForImageClassification", tokenizer=False, num_labels=4, **changes)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


TOLD = ("endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startofprev", "notimestamps")
"""Whisper's special tokens, between `<|` and `|>`."""


def make_whisper(folder: Path) -> Path:
    """A tiny Whisper of two languages, which makes 40 tokens at the most, with its tokenizer and processor."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        AddedToken,
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    folder.mkdir(parents=True, exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["hello world the cat sat"] * 3, vocab_size=270)
    trained.save_model(str(folder))
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    tokenizer = WhisperTokenizer(*files.values(), unk_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in TOLD])
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(1501)])
    tokenizer.save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in TOLD}
    end, start = ids["endoftext"], ids["startoftranscript"]
    few: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
    few |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 80}
    ends = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = WhisperConfig(
            vocab_size=len(tokenizer), suppress_tokens=None, begin_suppress_tokens=None, **few, **ends
        )
        model = WhisperForConditionalGeneration(config).eval()
        _fill(model)
        with torch.no_grad():  # so that it comes to an end
            model.model.decoder.layer_norm.bias.copy_(model.model.decoder.embed_tokens.weight[end])
    model.generation_config = GenerationConfig(
        is_multilingual=True, lang_to_id={"<|en|>": ids["en"], "<|de|>": ids["de"]}, max_length=40,
        task_to_id={name: ids[name] for name in ("transcribe", "translate")}, max_initial_timestamp_index=50,
        no_timestamps_token_id=ids["notimestamps"], return_timestamps=False, **ends,
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


def make_pipeline(folder: Path, **index: Any) -> Path:
    """A tiny Stable Diffusion, whose pictures have 32 × 32 pixels and whose prompts 16 tokens. index: what its
    `model_index.json` says besides."""
    import json

    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate([*letters, *(f"{each}</w>" for each in letters), *ends])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    begin, end = (vocabulary[each] for each in ends)
    blocks = {"block_out_channels": (16, 32), "norm_num_groups": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_attention_heads=2,
                num_hidden_layers=2, max_position_embeddings=16, bos_token_id=begin, eos_token_id=end, pad_token_id=end,
            )
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=16, layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **blocks,
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
        )
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    told = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**told, **index}))
    return folder


CHAT = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_llava(folder: Path, *, chats: bool = True, begins: bool = False) -> Path:
    """A tiny LLaVA of float32 that sees 16 × 16 pixels as four tokens, with its tokenizer and processor. begins: both
    tokenizer and template write the token that a text begins with."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from .models import tiny_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    bos = tokenizer.bos_token
    if begins:
        from tokenizers.processors import TemplateProcessing

        written = [(bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=written)
    few: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **few),
        text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, num_key_value_heads=2, **few),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = LlavaForConditionalGeneration(config).eval()
        _fill(model)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=(bos if begins else "") + CHAT if chats else None,
    ).save_pretrained(folder)  # fmt: skip
    return folder
