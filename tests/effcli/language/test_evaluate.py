from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli import runtime
from effcli.errors import DataError, NumericsError
from effcli.files import locate as samples
from effcli.inputs import text
from effcli.inputs.tokens import Reader
from effcli.language import evaluate, forward
from effcli.language.evaluate import Evaluation
from effcli.language.sweep import sweep
from effcli.run.overrides import parse_pass
from effcli.run.recipe import Evaluate, PassStep

SAMPLE = samples.SAMPLES["sample:lm"]
NETWORKS = ["sample:lm", "lm_gpt2_1m_mini", "lm_opt_1m_mini", "lm_gptneox_1m_mini"]


def compress(source: Path, target: Path, step: str) -> Path:
    target.mkdir()
    sweep(source, target, PassStep.model_validate(parse_pass(step)), None, target.parent / "work")
    return target


def tiny(folder: Path, vocabulary: int = 1024, change: Callable[[Any], None] | None = None) -> Path:
    """A random Llama of two blocks in float32 with the sample's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes))
    if change is not None:
        change(network)
    network.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLE / name, folder / name)
    return folder


def small(**keys: Any) -> Evaluate:
    keys = {"perplexity": str(samples.EVALUATION_TEXT), "samples": 3, "length": 32, "latency": False} | keys
    return Evaluate(**keys)


@torch.inference_mode()
def plain(network: Any, windows: torch.Tensor, original: Any = None) -> tuple[float, float]:
    """Perplexity and KL in the plainest way: all logits at once, position by position."""
    nll, divergence, count = 0.0, 0.0, 0
    # In one batch, as effcli takes them: with other shapes a processor's bfloat16 products round otherwise.
    found = network(input_ids=windows).logits[:, :-1].float()
    before = None if original is None else original(input_ids=windows).logits[:, :-1].double()
    for number, window in enumerate(windows):
        logits = found[number]
        for position in range(len(window) - 1):
            nll -= torch.log_softmax(logits[position], -1)[window[position + 1]].item()
            count += 1
        if before is not None:
            p = torch.softmax(before[number], -1)
            q = torch.softmax(logits.double(), -1)
            divergence += (p * (p.log() - q.log())).sum().item()
    return math.exp(nll / count), divergence / count


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_a_plain_loop(name: str, asset: Callable[[str], Path], tmp_path: Path) -> None:
    """The original, and what two passes made of it, against transformers alone: to 0.1 %."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = SAMPLE if name == "sample:lm" else asset(name)
    options = small(samples=4, length=64)
    content = samples.EVALUATION_TEXT.read_text(encoding="utf-8")
    windows = torch.tensor(AutoTokenizer.from_pretrained(source)(content, verbose=False).input_ids[: 4 * 64])
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    evaluation = Evaluation(source, options, tmp_path)
    told: list[tuple[int, int]] = []
    measured = evaluation.measure(source, lambda *at: told.append(at))
    assert told == [(done, told[0][1]) for done in range(told[0][1] + 1)] and len(told) > 2
    expected, _ = plain(original, windows.view(4, 64))
    assert measured.perplexity == pytest.approx(expected, rel=1e-3)
    assert measured.kl == 0.0
    assert measured.tokens == 4 * 63
    for bits in (3, 8):
        output = compress(source, tmp_path / f"int{bits}", f"linear:bits={bits},group_size=32")
        measured = evaluation.measure(output)
        # GPT-2 is written in effcli's own layout, which only effcli loads.
        own = "gpt2" in name
        network = runtime.load(output, packed=False) if own else AutoModelForCausalLM.from_pretrained(output)
        expected, divergence = plain(network.eval(), windows.view(4, 64), original)
        assert measured.perplexity == pytest.approx(expected, rel=1e-3)
        assert measured.kl == pytest.approx(divergence, rel=0.03)
    # On its own: the tokenizer is found in effcli's own layout too.
    assert evaluate.evaluate(str(output), options).perplexity == measured.perplexity


def test_the_command_measures_the_same(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    output = compress(source, tmp_path / "int4", "linear:bits=4,group_size=16")
    expected = Evaluation(source, small(), tmp_path).measure(output)
    assert evaluate.evaluate(str(output), small(), reference=str(source)) == expected
    alone = evaluate.evaluate(str(output), small())
    assert alone.kl is None
    assert alone.perplexity == expected.perplexity


def test_uniform_logits_have_the_perplexity_of_their_number(tmp_path: Path) -> None:
    def flatten(network: Any) -> None:
        network.lm_head.weight.data.zero_()

    quality = evaluate.evaluate(str(tiny(tmp_path / "flat", 1500, flatten)), small())
    assert quality.perplexity == pytest.approx(1500, rel=1e-6)


def test_the_loss_of_every_window_and_the_standard_error_they_give(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    quality = evaluate.evaluate(str(source), small(samples=5))
    assert len(quality.losses) == 5
    assert math.exp(sum(quality.losses) / 5) == pytest.approx(quality.perplexity, rel=1e-9)
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(source).eval()
    windows = text.windows(samples.EVALUATION_TEXT, Reader.open(source), 5, 32).windows
    for window, loss in zip(windows, quality.losses, strict=True):
        assert math.exp(loss) == pytest.approx(plain(network, window.unsqueeze(0))[0], rel=1e-5)
    mean = sum(quality.losses) / 5
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in quality.losses) / 4)
    assert quality.perplexity_stderr == pytest.approx(quality.perplexity * deviation / math.sqrt(5), rel=1e-9)


@pytest.mark.parametrize("losses", [(), (1.5,), (1.0, math.inf)])
def test_no_standard_error_without_spread(losses: tuple[float, ...]) -> None:
    assert evaluate.stderr_of_exp(9.0, losses) is None


def test_a_copy_diverges_by_nothing(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    copy = shutil.copytree(source, tmp_path / "copy")
    quality = Evaluation(source, small(), tmp_path).measure(copy)
    assert quality.kl == 0.0


def test_kl_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    assert evaluate.kl(p.log(), q.log()) == pytest.approx(math.log(2))
    assert evaluate.kl(q.log(), torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]).log()) == pytest.approx(
        0.25 * math.log(0.5) + 0.5 * math.log(2)
    )


def test_the_size_of_the_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(tmp_path / "source")
    whole = evaluate.evaluate(str(source), small())
    monkeypatch.setattr(forward, "_LOGITS", 7 * 1024)
    parts = evaluate.evaluate(str(source), small())
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_the_original_runs_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(tmp_path / "source")
    outputs = [compress(source, tmp_path / f"int{bits}", f"linear:bits={bits},group_size=16") for bits in (3, 8)]
    work = tmp_path / "evaluation"
    work.mkdir()
    seen = []
    last_hidden = evaluate.last_hidden
    monkeypatch.setattr(
        evaluate, "last_hidden", lambda stream, *rest: seen.append(stream) or last_hidden(stream, *rest)
    )
    evaluation = Evaluation(source, small(), work)
    coarse, fine = (evaluation.measure(output) for output in outputs)
    assert [stream.weights.checkpoint.path for stream in seen] == [outputs[0], source, outputs[1]]
    assert coarse.kl is not None and fine.kl is not None
    assert coarse.kl > 10 * fine.kl > 0
    evaluation.close()
    assert list(work.iterdir()) == []


def test_nothing_asked_nothing_measured(tmp_path: Path) -> None:
    quality = Evaluation(tmp_path, Evaluate.nothing(), tmp_path).measure(tmp_path)
    assert quality.perplexity is None and quality.accuracy is None and quality.kl is None


def test_remarks_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "short.txt"
    text.write_text("It was the nightingale, and not the lark, that pierced the fearful hollow of thine ear. " * 4)
    with caplog.at_level(logging.WARNING, "effcli"):
        evaluate.evaluate(str(tiny(tmp_path / "source")), small(perplexity=str(text), samples=50))
    assert "of the 50 windows" in caplog.text


def test_nan_is_named(tmp_path: Path) -> None:
    def spoil(network: Any) -> None:
        network.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan

    with pytest.raises(NumericsError, match="NaN"):
        evaluate.evaluate(str(tiny(tmp_path / "nan", change=spoil)), small())


def test_a_reference_with_other_tokens_is_refused(tmp_path: Path) -> None:
    tiny(tmp_path / "a", 1024)
    tiny(tmp_path / "b", 1100)
    with pytest.raises(DataError, match="cannot be compared"):
        evaluate.evaluate(str(tmp_path / "a"), small(), reference=str(tmp_path / "b"))


def test_windows_beyond_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than the 64") as caught:
        evaluate.evaluate(str(tiny(tmp_path / "source")), small(length=65))
    assert "--set evaluate.length=64" in caught.value.remedy
