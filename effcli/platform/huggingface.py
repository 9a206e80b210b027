"""Stock transformers: its configs read, its talk kept from the terminal."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effcli.errors import CheckpointError, UnsupportedError, first_line


def quiet_transformers() -> None:
    """Leave the terminal to effcli: transformers' progress bars and advice say nothing its user can act on."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


@contextmanager
def restoring_verbosity() -> Iterator[None]:
    """Give a Python caller transformers' logging and progress bars back as they were."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def language_loader(config: Any) -> Any:
    """The automatic class that builds the network which a config names, with its other inputs where it has them.

    A model of text and images may also have a causal class for the text alone, whose parameters have other names.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    named, kind = config.architectures or (), config.model_type
    if modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) not in named:
        if modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind) in named:
            return AutoModelForImageTextToText
        if modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind) in named:
            return AutoModelForMultimodalLM
    return AutoModelForCausalLM


# Far above any network: what loops and tables of transformers may be asked for. Keys by a part of their name.
_MOST = {"layer": 10_000, "expert": 100_000, "head": 1_000_000, "": 2**26}
_COUNTED = re.compile(r"(layers?|heads?|experts|size|dim|embd|d_model|n_positions)$")


def _check_numbers(path: Path, config: Any, within: str = "") -> None:
    """`CheckpointError` where the size or number of something is beyond every network."""
    for key, value in config.items():
        name = f"{within}{key}"
        if isinstance(value, dict):
            _check_numbers(path, value, f"{name}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not _COUNTED.search(str(key)):
            continue
        most = next(limit for part, limit in _MOST.items() if part in str(key))
        if value > most:
            raise CheckpointError(
                f"{path / 'config.json'} is damaged: {name} is {value:,}, more than the {most:,} that are read",
                "restore it from the original checkpoint",
            )


def replaced_class(network: Any) -> str | None:
    """The name of a class in `network` that transformers replaces when it loads compressed tensors; None without one.

    The other class has other parameters, so a file written for this network does not fit it.
    """
    from transformers.quantizers import base

    listed: Any = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    replaced = {name for name, entry in listed.items() if "compressed-tensors" in entry["quantization_methods"]}
    return next((name for module in network.modules() if (name := type(module).__name__) in replaced), None)


def load_network_config(path: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    """The transformers config object of a network's own `config`; remote code only when trusted."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    mapped = config.get("auto_map")
    model_type, code = config.get("model_type"), mapped.get("AutoConfig") if isinstance(mapped, dict) else None
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path / 'config.json'} has no model_type", "restore it from the original checkpoint")
    if code is not None and not trust_remote_code:
        raise UnsupportedError(
            f"{path} brings its own Python code ({model_type})",
            "read that code, then allow it with --trust-remote-code",
        )
    if code is None and model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"transformers does not know the model type {model_type!r}", "install a newer transformers"
        )
    _check_numbers(path, config)
    try:
        if code is not None:
            built = get_class_from_dynamic_module(code, str(path)).from_dict(config)
            built.name_or_path = str(path)
            return built
        with tempfile.TemporaryDirectory() as folder:
            # By way of a file: that route knows about older names and special cases, and this file holds the config
            # alone where a compressed checkpoint's says more.
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            return AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers says about it
        raise CheckpointError(
            f"{path / 'config.json'} does not describe a network: {first_line(error)}",
            "restore it from the original checkpoint",
        ) from error


def check_causal(path: Path, config: dict[str, Any]) -> None:
    """Raise `UnsupportedError` when a network's own `config` names an encoder, or a classifier of text."""
    from transformers.models.auto import modeling_auto as auto

    model_type = config.get("model_type")
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return
    if name in _classes(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return
    heads = {
        "answers fill-in tasks": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "classifies texts": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "classifies tokens": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "finds answers in a text": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    }
    what = next((what for what, mapping in heads.items() if name in _classes(mapping)), None)
    if what is None and model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        what = "is an encoder"
    if what is not None:
        raise UnsupportedError(
            f"{path} holds a {name}, which {what}; it is not a causal language model",
            "this version compresses causal language models; encoders and text classifiers are not supported",
        )


def check_decoder(path: Path, config: Any) -> None:
    """Raise `UnsupportedError` when a transformers config names a network whose decoder reads what an encoder wrote."""
    from transformers.models.auto import modeling_auto

    named = config.architectures or ()
    encodes = config.is_encoder_decoder or config.get_text_config().is_encoder_decoder
    if encodes and named and modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) not in named:
        raise UnsupportedError(
            f"{path} holds a {named[0]}, an encoder and a decoder; it is not a causal language model",
            "this version compresses causal language models; encoders with decoders are not supported",
        )


def logits_of(network: Any, ids: Any) -> Any:
    """Logits (batch, length, vocabulary) of token ids (batch, length), without a cache.

    Raises `UnsupportedError` for a class that does not run on text alone, as one that must be given an image.
    """
    try:
        return network(input_ids=ids, use_cache=False).logits
    except (AttributeError, KeyError, NotImplementedError, TypeError) as error:
        import transformers

        raise UnsupportedError(
            f"{type(network).__name__} of transformers {transformers.__version__} does not run on text alone: "
            f"{first_line(error)}",
            "calibration, evaluation and verification run it; a pass that needs no calibration takes it with --no-eval",
        ) from error


def _classes(mapping: Any) -> set[str]:
    """The class names of one of transformers' mappings, which holds a name or several for each model type."""
    return {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}
