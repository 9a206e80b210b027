"""A layer's inputs as the rows that its weight multiplies: patches of a convolution, features of a linear layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

# Bytes of patches at a time: they hold every input kernel height · kernel width times.
_BYTES = 64 << 20


def patches(module: nn.Module, inputs: Tensor, limit: int = _BYTES) -> Iterator[Tensor]:
    """What `module`, a Linear, Conv1d or Conv2d, multiplies its weight (out, in) with, some rows at a time.

    inputs: float32 (n, channels, length), (n, channels, height, width), or (n, ..., in) of a Linear. Yields float32
    (groups, tokens, in), a token being one position of one output; a yield stays below `limit` bytes unless one row of
    outputs alone is larger.
    """
    if isinstance(module, nn.Linear):
        yield inputs.reshape(1, -1, inputs.shape[-1])
        return
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if isinstance(module, nn.Conv1d):
        inputs = inputs.unsqueeze(2)
    kernel, stride, dilation = (_pair(getattr(module, key)) for key in ("kernel_size", "stride", "dilation"))
    padded = functional.pad(inputs, padding(module))
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    height, width = ((padded.shape[axis + 2] - reach[axis]) // stride[axis] + 1 for axis in (0, 1))
    columns = padded.shape[1] // module.groups * kernel[0] * kernel[1]
    row_bytes = module.groups * columns * width * 4
    images = max(1, limit // (row_bytes * height))
    rows = height if images > 1 else max(1, min(height, limit // row_bytes))
    for first in range(0, padded.shape[0], images):
        chunk = padded[first : first + images]
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            lines = chunk[:, :, start * stride[0] : (stop - 1) * stride[0] + reach[0]]
            found = functional.unfold(lines, kernel, dilation, 0, stride)
            grouped = found.view(found.shape[0], module.groups, columns, found.shape[2])
            yield grouped.permute(1, 0, 3, 2).reshape(module.groups, -1, columns)


def geometry(module: nn.Module) -> tuple[object, ...]:
    """What decides, besides the inputs, which patches a layer sees: layers with equal ones share their patches."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.kernel_size, module.stride, padding(module), module.dilation, module.groups
    return ()


def padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, int, int, int]:
    """Zeros left, right, above and below the inputs; none above and below a 1-D convolution's."""
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    if module.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2
    above, left = (0, 0) if isinstance(module.padding, str) else _pair(module.padding, alone=0)
    return left, left, above, above


def _pair(values: tuple[int, ...], alone: int = 1) -> tuple[int, int]:
    """(vertical, horizontal); a 1-D convolution lies along one line."""
    return (alone, values[0]) if len(values) == 1 else (values[0], values[1])
