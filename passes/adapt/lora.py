"""LoRA and its kin: train a product of two small matrices beside each layer, which stays as it is (arXiv:2106.09685).

A layer W becomes W + s B A, A (r, in), B (out, r). Beside a layer that is stored in few bits this is QLoRA
(arXiv:2305.14314): what is trained stands on the weights that the codes stand for. DoRA also trains the norm of each
output's row (arXiv:2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from effcli.errors import SelectionError, UnsupportedError
from effcli.layers.contract import AdapterPass, Beside, Needs
from effcli.passes.train._tuning import LanguageTuning

# PEFT's name for the one adapter of a model.
_NAME = "default"


class Lora(LanguageTuning, AdapterPass):
    """A `lora` step."""

    per_layer: ClassVar[frozenset[str]] = frozenset({"rank", "alpha"})
    rare: ClassVar[tuple[str, ...]] = (*LanguageTuning.rare, "rank_stabilized")

    learning_rate: float = Field(2e-4, gt=0, le=1000, description="The highest one, of AdamW.")
    rank: int = Field(8, ge=1, description="Rows of A and columns of B.")
    alpha: float = Field(16.0, gt=0, le=1e6, description="The product is multiplied by alpha / rank.")
    rank_stabilized: bool = Field(
        False, description="Multiply by alpha / √rank, which lets high ranks learn (rsLoRA, arXiv:2312.03732)."
    )
    dora: bool = Field(
        False, description="Also train the norm of each output's row, and only the direction by B A (arXiv:2402.09353)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the inputs of A that are left out in each step.")
    init: Literal["zero", "pissa", "loftq"] = Field(
        "zero",
        description="Begin with B = 0; with the largest singular values of the weight (PiSSA, arXiv:2404.02948), of "
        "dense layers; or with those of what compression lost (LoftQ, arXiv:2310.08659, its first alternation).",
    )

    @property
    def needs(self) -> Needs:
        return super().needs | (Needs.ORIGINAL if self.init == "loftq" else Needs.NOTHING)

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def alive(self) -> float:
        # As measured: PEFT keeps what the norms scale.
        return 1.3 if self.dora else 0.0

    def numbers(self, name: str, shape: tuple[int, int]) -> int:
        if self.rank > min(shape):
            raise SelectionError(
                f"rank {self.rank} is above a side of {name}, which is {shape[0]} x {shape[1]}",
                f"take a rank of at most {min(shape)}, or give that layer its own under `layers`",
            )
        return self.rank * sum(shape) + shape[0] * self.dora

    def adapter(self, layers: Mapping[str, Self]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            use_dora=self.dora,
            target_modules=list(layers),
            rank_pattern={name: own.rank for name, own in layers.items() if own.rank != self.rank},
            alpha_pattern={name: own.alpha for name, own in layers.items() if own.alpha != self.alpha},
            task_type="CAUSAL_LM",
        )

    def begin(self, beside: Mapping[str, Beside]) -> None:
        if self.init == "zero":
            return
        for name, one in beside.items():
            scaling, rank = one.options.scaling, one.options.rank
            if self.init == "pissa":
                if one.packed:
                    raise UnsupportedError(
                        f"init=pissa takes the largest part out of the weight, and {name} is compressed",
                        "set init=loftq, or leave it out",
                    )
                weight = one.weight()
                a, b = _largest(weight, rank)
                # PEFT's modules are given what is left; A and B of the beginning are taken out again at the end.
                weight.addmm_(b, a, alpha=-1)
                one.module.register_buffer("first_a", a / math.sqrt(scaling), persistent=False)
                one.module.register_buffer("first_b", b / math.sqrt(scaling), persistent=False)
            else:
                a, b = _largest(one.original() - one.weight(), rank)
            one.module.lora_A[_NAME].weight.data.copy_(a / math.sqrt(scaling))
            one.module.lora_B[_NAME].weight.data.copy_(b / math.sqrt(scaling))
            if self.dora:
                one.module.lora_magnitude_vector[_NAME].weight.data.copy_((one.weight() + b @ a).norm(dim=1))

    def finish(self, beside: Mapping[str, Beside], config: Any) -> tuple[Any, Mapping[str, Mapping[str, Tensor]]]:
        """Of PiSSA an adapter of twice the rank, on the weights as they were: B A - B₀ A₀ = (B, -B₀) (A, A₀)."""
        if self.init != "pissa":
            return config, {}
        grown = self._grown()
        tensors = {}
        for name, one in beside.items():
            a, b = one.module.lora_A[_NAME].weight.detach(), one.module.lora_B[_NAME].weight.detach()
            tensors[name] = {
                "lora_A": torch.cat([a, one.module.first_a]),
                "lora_B": torch.cat([b, -one.module.first_b], dim=1),
            }
        return grown.adapter({name: one.options._grown() for name, one in beside.items()}), tensors

    def _grown(self) -> Self:
        """These options with twice the rank, and an alpha that leaves the scaling as it is."""
        more = math.sqrt(2) if self.rank_stabilized else 2
        return self.model_copy(update={"rank": 2 * self.rank, "alpha": self.alpha * more})


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A nearest to `matrix`: √S Vᵀ and U √S of its largest singular values."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * v[:rank], u[:, :rank] * roots


__all__ = ["Lora"]
