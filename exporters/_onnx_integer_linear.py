"""A linear layer as an 8-bit integer product in ONNX, with inputs that become integers on the way in."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from effcli.formats import Affine, AffineWeight

REMEDY = "quantize with bits: 8, symmetric: true and one scale per channel, or leave activations as they are"


# What a scale of the inputs serves: all tokens of a run, taken as they come; each token; or it is fixed beforehand.
Inputs = Literal["run", "token", "tensor"]
_RAISED = 128


class IntegerLinear(nn.Module):
    """y = (s_x s_w) (q_x - z_x) q_wᵀ + b with inputs rounded to 8 bits; holds shapes alone, for tracing.

    weight_integers int8 (in, out), weight_scale (out,), input_factor (in,), bias (out,); input_scale (), and
    input_zero_point uint8 (), where they are fixed. Inputs become uint8, the checkpoint's int8 raised by 128: not all
    of onnxruntime's products take both operands as int8.
    """

    weight_integers: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_factor: Tensor | None
    bias: Tensor | None

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool, scaled: bool, inputs: Inputs = "run"
    ) -> None:
        super().__init__()
        self.rows, columns = shape
        self.inputs = inputs
        declare(self, "weight_integers", (columns, self.rows), torch.int8)
        declare(self, "weight_scale", (self.rows,), torch.float32)
        if inputs == "tensor":
            declare(self, "input_scale", (), torch.float32)
            declare(self, "input_zero_point", (), torch.uint8)
        declare_rest(self, self.rows, columns, dtype, bias, scaled)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        x = x if self.input_factor is None else x * self.input_factor
        levels, zero, scale = self._integers(x.float())
        total = torch.onnx.ops.symbolic(
            "::MatMulInteger",
            [levels, self.weight_integers, zero],
            dtype=torch.int32,
            shape=(*x.shape[:-1], self.rows),
        ).float()
        if self.inputs == "token":
            # One after the other: onnxruntime takes a product of scales for one scale of all inputs.
            y = (total * scale * self.weight_scale).to(x.dtype)
        else:
            y = (total * (scale * self.weight_scale)).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x float32 (..., in) as uint8, the zero point and the scale."""
        if self.inputs == "tensor":
            levels = quantize(x, self.input_scale, self.input_zero_point)
            return levels, self.input_zero_point, self.input_scale
        if self.inputs == "token":
            scale = x.abs().amax(-1, keepdim=True) / 127.5
            scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
            levels = (x / scale).clamp(-128, 127).round() + _RAISED
            return levels.to(torch.uint8), torch.tensor(_RAISED, dtype=torch.uint8), scale
        levels, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "::DynamicQuantizeLinear",
            [x],
            dtypes=[torch.uint8, torch.float32, torch.uint8],
            shapes=[x.shape, (), ()],
        )
        return levels, zero, scale

    @staticmethod
    def tensors(weight: AffineWeight) -> dict[str, Tensor]:
        """What stands behind the buffers, bias and input factor left out."""
        scale = weight.scale.reshape(-1).float().expand(weight.shape[0])
        return {"weight_integers": weight.signed.t().contiguous(), "weight_scale": scale, **input_range(weight)}


def quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x float32 as uint8 with one scale () and zero point ()."""
    levels: Tensor = torch.onnx.ops.symbolic("::QuantizeLinear", [x, scale, zero], dtype=torch.uint8, shape=x.shape)
    return levels


def input_range(weight: AffineWeight) -> dict[str, Tensor]:
    """The fixed scale, float32 (), and zero point, uint8 (), of a layer's inputs; empty where they have none."""
    if weight.activation_scale is None or weight.activation_zero is None:
        return {}
    return {
        "input_scale": weight.activation_scale.float().reshape(()),
        "input_zero_point": (weight.activation_zero.reshape(()).short() + _RAISED).to(torch.uint8),
    }


def inputs_of(format: Affine) -> Inputs:
    """What a scale of the inputs serves in a layer of this format that is multiplied in integers."""
    return "run" if format.activations == "none" else format.activations


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
