"""Small random-weight networks of every architecture that effcli is held against."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from effcli.files import locate as samples

VOCABULARY = 1024
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_ONE_HEAD_EACH = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


def config(name: str) -> PreTrainedConfig:
    """The config of architecture `name`, one of `NAMES`."""
    return _CONFIGS[name]()


_CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
    "mistral": lambda: MistralConfig(**_COMMON),
    "gemma2": lambda: Gemma2Config(**_COMMON, head_dim=16),
    "phi3": lambda: Phi3Config(**_COMMON),
    "gpt2": lambda: GPT2Config(**_SPECIAL, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "opt": lambda: OPTConfig(
        **_SPECIAL,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_ONE_HEAD_EACH),
    "falcon": lambda: FalconConfig(**_SPECIAL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "falcon_new": lambda: FalconConfig(
        **_SPECIAL,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "bloom": lambda: BloomConfig(**_SPECIAL, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4),
}
NAMES = tuple(_CONFIGS)


def make_multimodal(folder: Path, vision_depth: int = 2) -> Path:
    """Write a network of text and images, Qwen 3.5, whose blocks attend in two ways, into `folder`."""
    torch.manual_seed(0)
    text = dict(_COMMON, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2)
    text |= dict(linear_key_head_dim=16, linear_value_head_dim=16, num_hidden_layers=4)
    vision = dict(hidden_size=32, intermediate_size=64, depth=vision_depth, num_heads=2, out_hidden_size=64)
    images = dict(image_token_id=1020, video_token_id=1021, vision_start_token_id=1022, vision_end_token_id=1023)
    network = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=dict(vision, patch_size=14), **images)
    AutoModelForImageTextToText.from_config(network).save_pretrained(folder)
    return folder


def _joined(kind: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> PreTrainedConfig:
    images = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    images |= dict(image_size=28, patch_size=14)
    return AutoConfig.for_model(kind, text_config=_COMMON | text, vision_config=images | vision, **more)


# Networks of text and images whose config has no causal class, by what is special about them.
_FAMILIES: dict[str, Any] = {
    # In the files its parameters have other names than in the modules.
    "llava": lambda: _joined(
        "llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"}, image_token_index=1020
    ),
    # It attends in both directions.
    "paligemma": lambda: _joined(
        "paligemma",
        {"model_type": "gemma", "head_dim": 16},
        {"model_type": "siglip_vision_model", "projection_dim": 64},
        image_token_index=1020,
        projection_dim=64,
    ),
    # Its second block attends to images, and is passed over where there are none.
    "mllama": lambda: _joined(
        "mllama",
        {"cross_attention_layers": [1]},
        dict(num_global_layers=1, vision_output_dim=96, intermediate_layers_indices=[0, 1], attention_heads=2)
        | dict(max_num_tiles=1, supported_aspect_ratios=[[1, 1]]),
        image_token_index=1020,
    ),
}
FAMILIES = tuple(_FAMILIES)


def make_family(name: str, folder: Path) -> Path:
    """Write a network of text and images of one of `FAMILIES` with the sample's tokenizer into `folder`."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_FAMILIES[name]())
    for parameter in model.parameters():
        parameter.data = (parameter.ndim == 1) + 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    _copy_tokenizer(folder)
    return folder


def _bamba() -> PreTrainedConfig:
    mamba = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16)
    return AutoConfig.for_model("bamba", **_COMMON, **mamba, attn_layer_indices=[1])


def _gemma4() -> PreTrainedConfig:
    layers = dict(layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, sliding_window=8)
    heads = dict(head_dim=16, global_head_dim=16, hidden_size_per_layer_input=16)
    return AutoConfig.for_model("gemma4_text", **_COMMON, **layers, **heads, vocab_size_per_layer_input=VOCABULARY)


# Networks whose blocks are called, or answer, in ways of their own.
_SPECIAL_BLOCKS: dict[str, Any] = {
    # A pair, which the network unpacks.
    "bamba": _bamba,
    # A triple.
    "rwkv": lambda: AutoConfig.for_model(
        "rwkv", **_SPECIAL, hidden_size=64, num_hidden_layers=2, intermediate_size=128, attention_hidden_size=64
    ),
    # A list of one.
    "openai-gpt": lambda: AutoConfig.for_model(
        "openai-gpt", vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128
    ),
    # In a quantized checkpoint transformers puts another class in the place of its experts.
    "llama4_text": lambda: AutoConfig.for_model(
        "llama4_text", **_COMMON, head_dim=16, intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=1
    ),
    # Every block takes an embedding of its own of the token ids.
    "gemma4_text": _gemma4,
}
SPECIAL_BLOCKS = tuple(_SPECIAL_BLOCKS)
_CONFIGS |= _SPECIAL_BLOCKS


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a network of architecture `name` with the sample's tokenizer into `folder`; `changes` are of its config."""
    torch.manual_seed(0)
    network = config(name)
    for key, value in changes.items():
        setattr(network, key, value)
    model = AutoModelForCausalLM.from_config(network).eval()
    for parameter in model.parameters():
        # Norm weights start at 1 and biases at 0: moved off them, so that a fold which forgets one shows.
        parameter.data += (0.1 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    _copy_tokenizer(folder)
    return folder


def _copy_tokenizer(folder: Path) -> None:
    source = samples.resolve("sample:lm")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, folder / file)
