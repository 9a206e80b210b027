"""`adapter_config.json`: what an adapter says of itself, as far as it decides what is added to the network.

A key that is not known and says something may change what the tensors mean: it is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from effcli.errors import CheckpointError, UnsupportedError, did_you_mean
from effcli.files.documents import check_model, read_object, says

_FILE = "adapter_config.json"
_REMEDY = "save the adapter again with PEFT's `save_pretrained`, or copy it again"
# Keys that say how an adapter was or will be trained and change nothing of what it adds.
_NEUTRAL = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("bias", "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_dropout"),
        *("lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config", "velora_config"),
        *("decompose_both", "decompose_factor", "init_ia3_weights", "init_weights", "module_dropout", "rank_dropout"),
        *("rank_dropout_scale", "use_effective_conv2d"),
    }
)
# Initialisations that take the first product of the factors off the network's own weights.
_MUTATING = ("corda", "loftq", "lora_ga", "olora", "pissa")


class AdapterConfig(BaseModel):
    """What every adapter says."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: ClassVar[str]
    # What the kinds say whose products are not what effcli computes, by key.
    refused: ClassVar[tuple[str, ...]] = ()

    peft_type: str
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def targets(self, module: str, linear: bool) -> bool:
        """Whether the adapter says that it is on a module, as PEFT takes it; linear: whether it is one but the head.

        Raises `re.error` for a pattern that is none.
        """
        wanted = self.target_modules
        if wanted is None or _named(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or ()):
            return False
        if isinstance(wanted, str):
            return linear if wanted == "all-linear" else bool(re.fullmatch(wanted, module))
        return module in wanted or (any(module.endswith(f".{name}") for name in wanted) and self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        """Whether a module stands in one of the blocks that are to be transformed."""
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if not wanted:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns or (r"[^.]*",)]
        number = next((match[1] for match in found if match), None)
        return number is not None and int(number) in wanted


def _named(names: str | list[str] | None, module: str) -> bool:
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names or ())


class Ranked(AdapterConfig):
    """What adapters of low rank say."""

    r: int = Field(8, ge=1, strict=True)
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)

    @property
    def all_alpha(self) -> float:
        """The numerator of the scaling where no pattern says otherwise."""
        raise NotImplementedError

    def rank(self, module: str) -> int:
        return int(_matching(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """What the product of the factors is multiplied by."""
        return _matching(self.alpha_pattern, module, self.all_alpha) / self.rank(module)


def _matching(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """The value of the first pattern that names the end of a module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


class LoRA(Ranked):
    kind = "LoRA"
    refused = (
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config"),
        *("monteclora_config", "use_bdlora", "use_qalora"),
    )

    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @property
    def all_alpha(self) -> float:
        return self.lora_alpha

    def scaling(self, module: str) -> float:
        """alpha / r; alpha / √r where the rank is to change nothing of the step (rsLoRA, arXiv:2312.03732)."""
        scaling = super().scaling(module)
        return scaling * math.sqrt(self.rank(module)) if self.use_rslora else scaling

    @property
    def named(self) -> str:
        return "DoRA" if self.use_dora else "rsLoRA" if self.use_rslora else "LoRA"


class _Lycoris(Ranked):
    alpha: float = 8

    @property
    def all_alpha(self) -> float:
        return self.alpha


class LoHa(_Lycoris):
    kind = "LoHa"


class LoKr(_Lycoris):
    kind = "LoKr"


class IA3(AdapterConfig):
    kind = "(IA)³"

    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool = False

    def scales_inputs(self, module: str) -> bool:
        """Whether the vector multiplies what a module reads; it multiplies what the module returns otherwise."""
        return _named(self.feedforward_modules, module)


_KINDS: dict[str, type[AdapterConfig]] = {"LORA": LoRA, "LOHA": LoHa, "LOKR": LoKr, "IA3": IA3}


class _Kind(BaseModel):
    peft_type: str


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What the adapter in `folder` says of itself.

    Raises `CheckpointError` where the file is missing or damaged, and `UnsupportedError`, which names them, for a kind
    or for keys that effcli does not know, or whose product it does not compute.
    """
    file = folder / _FILE
    if not folder.is_dir():
        raise CheckpointError(f"the adapter {folder} is no directory", "give a PEFT adapter directory")
    if not file.exists():
        raise CheckpointError(f"the adapter {folder} holds no {_FILE}", "give a PEFT adapter directory")
    data = read_object(file, remedy=_REMEDY)
    named = check_model(_Kind, data, str(file), remedy=_REMEDY).peft_type
    if named not in _KINDS:
        near = did_you_mean(named, _KINDS)
        raise UnsupportedError(f"{file}: effcli merges no adapter of the kind {named}", f"merge it with PEFT; {near}")
    made = check_model(_KINDS[named], data, str(file), remedy=_REMEDY)
    _check_known(file, made)
    return made


def _check_known(file: Path, config: AdapterConfig) -> None:
    """Raise `UnsupportedError` for what an adapter says that effcli does not know or does not compute."""
    further = {key for key, value in (config.model_extra or {}).items() if says(value)}
    refused = sorted(further & set(config.refused))
    if refused:
        raise UnsupportedError(
            f"{file} sets {' and '.join(refused)}, and effcli does not compute what that adds",
            "merge it with PEFT, if PEFT merges it",
        )
    unknown = sorted(further - _NEUTRAL)
    if unknown:
        by = f", written by PEFT {config.peft_version}" if config.peft_version else ""
        raise UnsupportedError(
            f"{file}{by}: unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(unknown)}, which may change what "
            "the adapter adds",
            "take a newer effcli; or remove the keys if they say nothing of the weights",
        )
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_MUTATING):
        raise UnsupportedError(
            f"{file}: init_lora_weights is {start}, which changed the weights of the model that it was trained on",
            "save it with `path_initial_model_for_weight_conversion`, which makes it an adapter of the original model",
        )


__all__ = ["IA3", "AdapterConfig", "LoHa", "LoKr", "LoRA", "Ranked", "read_adapter_config"]
