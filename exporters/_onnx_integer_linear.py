"""A linear layer as an 8-bit integer product in ONNX, its inputs quantized in every run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effcli.formats import Affine, AffineWeight

REMEDY = "quantize with bits: 8, symmetric: true and one scale per channel, or leave activations as they are"


class IntegerLinear(nn.Module):
    """y = (s_x s_w) (q_x - z_x) q_wᵀ + b with activations quantized per run; holds shapes alone, for tracing.

    weight_integers int8 (in, out), weight_scale (out,), input_factor (in,), bias (out,).
    """

    weight_integers: Tensor
    weight_scale: Tensor
    input_factor: Tensor | None
    bias: Tensor | None

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool, scaled: bool) -> None:
        super().__init__()
        self.rows, columns = shape
        declare(self, "weight_integers", (columns, self.rows), torch.int8)
        declare(self, "weight_scale", (self.rows,), torch.float32)
        declare_rest(self, self.rows, columns, dtype, bias, scaled)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        x = x if self.input_factor is None else x * self.input_factor
        levels, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "::DynamicQuantizeLinear",
            [x.float()],
            dtypes=[torch.uint8, torch.float32, torch.uint8],
            shapes=[x.shape, (), ()],
        )
        total = torch.onnx.ops.symbolic(
            "::MatMulInteger",
            [levels, self.weight_integers, zero],
            dtype=torch.int32,
            shape=(*x.shape[:-1], self.rows),
        )
        y = (total.float() * (scale * self.weight_scale)).to(x.dtype)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def tensors(weight: AffineWeight) -> dict[str, Tensor]:
        """What stands behind the buffers, bias and input factor left out."""
        integers = (weight.codes.t().to(torch.int16) - weight.format.fixed_zero).to(torch.int8).contiguous()
        return {"weight_integers": integers, "weight_scale": weight.scale.reshape(-1).float().expand(weight.shape[0])}


def obstacle(format: Affine) -> str:
    """Why a linear layer of this format has no integer product, empty when it has one."""
    return str(format) if format.bits != 8 or not format.symmetric or format.strategy == "group" else ""


def input_factor(weight: AffineWeight) -> dict[str, Tensor]:
    """The reciprocal of an explicit input scale, float64 (in,), as the buffer `input_factor`; empty without one."""
    return {} if weight.input_scale is None else {"input_factor": weight.input_scale.double().reciprocal()}


def declare(module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A buffer that has a shape and no values yet."""
    module.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))


def declare_rest(module: nn.Module, rows: int, columns: int, dtype: torch.dtype, bias: bool, scaled: bool) -> None:
    """The buffers `bias` (out,) and `input_factor` (in,), None where the layer has none."""
    for name, size, present in (("bias", rows, bias), ("input_factor", columns, scaled)):
        if present:
            declare(module, name, (size,), dtype)
        else:
            module.register_buffer(name, None)
