"""How fast a network reads a prompt and writes text, with the kernels that will run for its user."""

from __future__ import annotations

import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcli.errors import DataError, UnsupportedError
from effcli.files import locate as samples
from effcli.inputs import text
from effcli.inputs.tokens import Reader, longest_sequence
from effcli.kernels.quantized_matmul import route_name
from effcli.language.caching import cache_name
from effcli.language.loading import load
from effcli.language.modules import QuantizedLinear
from effcli.language.skeleton import counting_blocks
from effcli.layers.result import Phases, Progress, unseen
from effcli.platform.machine import cpu_threads, device_name, pick_device
from effcli.platform.rehearsal import few, now
from effcli.reports.report import Speed

# Tokens of the prompt, and decoded after it, unless the user says how many.
PREFILL = 128
DECODE = 32
# A small network is timed as often as a few seconds allow, a large one at least this often.
_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 9
_SECONDS = 4.0
# Seconds of each round for which a rehearsal decodes.
_REHEARSED = 0.1


def measure(
    model: str | Path,
    *,
    prefill: int | None = None,
    decode: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    phases: Phases = unseen,
    afterwards: Callable[[Any], None] = lambda network: None,
) -> Speed:
    """Time the prefill of `prefill` tokens and the decoding of `decode` tokens, one sequence at a time.

    Without one it is what `lengths` says. Loaded as `effcli.load` does; each figure is the median over repetitions,
    after a warm-up. threads: CPU threads (default: torch's own); device: cpu, cuda, cuda:N or auto. torch's number of
    threads is restored afterwards. afterwards: called with the network before it is freed. `UnsupportedError` for a
    network that gives no cache back, with which the next token would be decoded.
    """
    target = pick_device(device)
    with cpu_threads(threads) as used:
        with phases("speed") as progress:
            network: Any = load(model, device=target, trust_remote_code=trust_remote_code)
            prefill, decode = lengths(prefill, decode, longest_sequence(network.config))
            ids = prompt(samples.resolve(str(model)), network.config, prefill, decode, trust_remote_code).to(target)
            with counting_blocks(network):
                read, written = _time(network, ids, decode, target, progress)
        with counting_blocks(network):
            afterwards(network)
    return Speed(
        kernel=kernel_name(network, 1),
        prefill_kernel=kernel_name(network, prefill),
        prefill_tokens=prefill,
        prefill_tokens_per_second=prefill / read,
        decode_tokens_per_second=1 / written,
        threads=used,
        device=device_name(target),
    )


def lengths(prefill: int | None, decode: int | None, longest: int | None) -> tuple[int, int]:
    """Tokens of the prompt and tokens decoded: as given, else 128 and 32, or fewer when the model takes fewer."""
    if longest is None:
        return prefill or PREFILL, decode or DECODE
    if decode is None:
        # A fifth of the sequence where it is short, as of the defaults.
        decode = max(1, min(DECODE, longest // 5 if prefill is None else longest - prefill))
    return prefill or max(1, min(PREFILL, longest - decode)), decode


def prompt(path: Path, config: Any, prefill: int, decode: int, trust_remote_code: bool = False) -> Tensor:
    """Token ids int64 (1, prefill): English text, or random ids for a checkpoint without a tokenizer."""
    longest = longest_sequence(config)
    if longest is not None and prefill + decode > longest:
        raise DataError(
            f"a prompt of {prefill} tokens and {decode} more do not fit the {longest} that the model takes",
            "ask for fewer: evaluate.prefill, evaluate.decode in a recipe, --prefill, --decode of `effcli bench`",
        )
    try:
        reader = Reader.open(path, trust_remote_code)
        return text.windows(samples.EVALUATION_TEXT, reader, 1, prefill).windows
    except DataError:
        # Speed does not depend on what the prompt says, save for the experts it is routed to.
        size = config.get_text_config().vocab_size
        return torch.randint(size, (1, prefill), generator=torch.Generator().manual_seed(0))


def kernel_name(network: nn.Module, rows: int) -> str:
    """The kernel that most layers inside `network` use for `rows` rows of activations.

    The output head is left out, and so is what an adapter has beside them.
    """
    from transformers.pytorch_utils import Conv1D

    outputs: Any = getattr(network, "get_output_embeddings", None)
    head = outputs() if callable(outputs) else None
    names: Counter[str] = Counter()
    for place, module in network.named_modules():
        if ".lora_" in place:
            continue
        if isinstance(module, QuantizedLinear):
            names[route_name(module.packed, rows, network.dtype)] += 1  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear | Conv1D) and module is not head:
            names[f"torch linear ({str(module.weight.dtype).removeprefix('torch.')})"] += 1
    return names.most_common(1)[0][0] if names else ""


def _time(
    network: Any, ids: Tensor, decode: int, device: torch.device, progress: Progress = lambda done, total: None
) -> tuple[float, float]:
    """Median seconds for the prompt, and for one token behind it; progress: told of each token."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        # What `generate` asks for: of a prompt only the last position's logits.
        options["logits_to_keep"] = 1
    cache = cache_name(network.forward)
    reads: list[float] = []
    writes: list[float] = []
    begin = now()
    done, total = 0, (1 + _FEWEST_ROUNDS) * decode
    with torch.inference_mode():
        # The first round is the warm-up.
        for number in range(1 + _MOST_ROUNDS):
            if number > _FEWEST_ROUNDS and now() - begin > _SECONDS:
                break
            read, out = _timed(device, network, input_ids=ids, **options)
            if not hasattr(out, cache):
                raise UnsupportedError(
                    f"{type(network).__name__} gives no key-value cache back, so one token cannot be timed",
                    "leave its speed out: --set evaluate.latency=false",
                )
            steps = []
            for _ in few(range(decode), lasting=_REHEARSED):
                token = out.logits[:, -1:].argmax(dim=-1)
                step, out = _timed(device, network, input_ids=token, **{cache: getattr(out, cache)}, **options)
                steps.append(step)
                done += 1
                # Rounds beyond the fewest are over in a moment.
                progress(min(done, total), total)
            if number:
                reads.append(read)
                writes += steps
    return statistics.median(reads), statistics.median(writes)


def _timed(device: torch.device, network: Any, **arguments: Any) -> tuple[float, Any]:
    _finish(device)
    start = time.perf_counter()
    out = network(**arguments)
    _finish(device)
    return time.perf_counter() - start, out


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
