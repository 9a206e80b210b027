"""Run an exported language model: compare it with its reference, write text, take its time."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from effcli.errors import DataError
from effcli.language.verify import Agreement
from effcli.platform import onnx_session
from effcli.platform.huggingface import logits_of
from effcli.platform.machine import device_name
from effcli.reports.report import Speed

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = np.ndarray[Any, Any]
Past = dict[str, Array]

# Where the file says which operator multiplies most of its weights.
KERNEL = "effcli.kernel"

_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 9
_SECONDS = 4.0


def compare(session: InferenceSession, network: Any, ids: Tensor, tolerance: float) -> tuple[Agreement, Agreement]:
    """How the logits of a prompt, and of one token behind it from the cache, agree with `network`'s.

    ids: int64 (rows, length), length at least 2; network: a transformers model, run on all tokens at once.
    """
    with torch.inference_mode():
        expected = logits_of(network, ids).float()
    tokens = ids.numpy()
    prompt, past = forward(session, tokens[:, :-1], empty_past(session, len(tokens)))
    step, _ = forward(session, tokens[:, -1:], past)
    found = (torch.from_numpy(logits.astype(np.float32)) for logits in (prompt, step))
    wanted = (expected[:, :-1], expected[:, -1:])
    first, second = (Agreement.of(a, b, tolerance) for a, b in zip(found, wanted, strict=True))
    return first, second


def generate(model: InferenceSession | str | Path, ids: Array, new_tokens: int) -> Array:
    """Append to ids, int64 (batch, length), the likeliest token, `new_tokens` times: int64 (batch, length + new).

    model: an open session, or the folder of an export. No padding, and no stop at an end-of-text token.
    Raises `DataError` for a prompt without tokens.
    """
    session = onnx_session.open_session(model) if isinstance(model, str | Path) else model
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise DataError(f"a prompt has the shape (batch, length), length 1 or more, not {ids.shape}", "give tokens")
    past = empty_past(session, len(ids))
    unread, pieces = ids, [ids]
    for _ in range(new_tokens):
        logits, past = forward(session, unread, past)
        unread = logits[:, -1:].argmax(axis=-1).astype(np.int64)
        pieces.append(unread)
    return np.concatenate(pieces, axis=1)


def latency(folder: str | Path, prefill: int = 128, decode: int = 32, threads: int | None = None) -> Speed:
    """Time a prompt of `prefill` random tokens and `decode` tokens behind it, one sequence at a time.

    Each figure is the median over repetitions, after a warm-up. threads: default torch's number, so that the figures
    stand beside those of `effcli.language.latency`.
    """
    used = threads or torch.get_num_threads()
    session = onnx_session.open_session(folder, used)
    vocabulary = session.get_outputs()[0].shape[-1]
    ids = np.random.default_rng(0).integers(vocabulary, size=(1, prefill + decode))
    reads: list[float] = []
    writes: list[float] = []
    begin = time.perf_counter()
    # The first round is the warm-up.
    for number in range(1 + _MOST_ROUNDS):
        if number > _FEWEST_ROUNDS and time.perf_counter() - begin > _SECONDS:
            break
        past = empty_past(session, 1)
        seconds = []
        for tokens in (ids[:, :prefill], *np.split(ids[:, prefill:], decode, axis=1)):
            start = time.perf_counter()
            _, past = forward(session, tokens, past)
            seconds.append(time.perf_counter() - start)
        if number:
            reads.append(seconds[0])
            writes += seconds[1:]
    kernel = f"onnxruntime {session.get_modelmeta().custom_metadata_map.get(KERNEL, 'MatMul')}"
    return Speed(
        kernel=kernel,
        prefill_kernel=kernel,
        prefill_tokens=prefill,
        prefill_tokens_per_second=prefill / statistics.median(reads),
        decode_tokens_per_second=1 / statistics.median(writes),
        threads=used,
        device=device_name(torch.device("cpu")),
    )


def forward(session: InferenceSession, ids: Array, past: Past) -> tuple[Array, Past]:
    """Logits (batch, length, vocabulary) of ids, int64 (batch, length), behind `past`; and the longer past."""
    batch, length = ids.shape
    before = next(iter(past.values())).shape[2]
    given = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, before + length), np.int64),
        "position_ids": np.arange(before, before + length)[None].repeat(batch, axis=0),
        **past,
    }
    wanted = {item.name for item in session.get_inputs()}
    out = onnx_session.run(session, {name: value for name, value in given.items() if name in wanted})
    logits = out.pop("logits")
    return logits, {name.replace("present", "past_key_values", 1): value for name, value in out.items()}


def empty_past(session: InferenceSession, batch: int) -> Past:
    """Keys and values (batch, heads, 0, head size) of no token, by input name."""
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {}
    for item in session.get_inputs():
        if item.name.startswith("past_key_values."):
            _, heads, _, size = item.shape
            past[item.name] = np.zeros((batch, heads, 0, size), dtypes[item.type])
    return past
