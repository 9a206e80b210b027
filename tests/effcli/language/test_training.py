"""Training of language models: as a plain loop does it, zeros and compressed layers as they were, and after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from effcli.errors import DataError, NumericsError, RecipeError, UnsupportedError
from effcli.inputs.text import Windows
from effcli.language import editing
from effcli.language.sweep import sweep
from effcli.language.training import TokenExamples, train_language, train_weights
from effcli.language.weights import open_weights
from effcli.layers.input_rounding import InputRounding
from effcli.layers.result import PassResult
from effcli.run.recipe import PassStep, check
from effcli.training import loop

PLAIN: dict[str, Any] = {"shuffle": False, "keep_best": False, "schedule": "constant", "learning_rate": 1e-3}


def windows(count: int = 6, length: int = 12) -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows(list(torch.randint(architectures.VOCABULARY, (count, length), generator=generator).split(4)))


def trained(
    source: Path, target: Path, original: Path | None = None, work: Path | None = None, **options: Any
) -> PassResult:
    target.mkdir(exist_ok=True)
    work = work or target.parent / "work"
    step = PassStep.model_validate({"finetune": {"steps": 3, **options}})
    return train_language(
        train_weights, source, target, step, windows(), batch_size=2, original=original or source, work=work
    )


def carried_out(source: Path, target: Path, step: Any) -> Path:
    target.mkdir()
    sweep(source, target, PassStep.model_validate(step), windows(), target.with_name(f"{target.name}-work"))
    return target


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "opt"])
def test_three_steps_are_those_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    source = architectures.make(name, tmp_path / "model", torch.float32)
    result = trained(source, tmp_path / "out", **PLAIN, weight_decay=0.1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    sites = [site for site in open_weights(source).skeleton.sites() if not site.name.startswith("lm_head")]
    layers = [model.get_submodule(site.name) for site in sites]
    parameters = [parameter.requires_grad_() for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [own], "weight_decay": 0.1 if own.ndim > 1 else 0.0} for own in parameters], lr=1e-3
    )
    losses = []
    for batch in torch.cat(windows().batches).split(2):
        logits = model(input_ids=batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert result.training is not None
    assert [loss for _, loss in result.training.curve] == pytest.approx(losses, rel=1e-5)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for key, value in model.state_dict().items():
        assert_close(written.state_dict()[key], value, rtol=1e-4, atol=2e-5)
    before = load_file(source / "model.safetensors")
    changed = {key for key, value in load_file(tmp_path / "out" / "model.safetensors").items() if key in before}
    changed = {
        key for key in changed if not torch.equal(load_file(tmp_path / "out" / "model.safetensors")[key], before[key])
    }
    own = {f"{prefix}{key}" for prefix in ("", "transformer.", "model.") for key, value in model.named_parameters()}
    assert changed <= own and not any("norm" in key or "embed" in key or "wte" in key for key in changed)


def test_towards_the_original_begins_at_no_distance_and_repairs(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float32)
    same = trained(source, tmp_path / "same", **PLAIN, towards="original")
    assert same.training is not None and same.training.errors[0][1] == pytest.approx(0, abs=1e-6)
    rough = carried_out(source, tmp_path / "rough", {"magnitude": {"sparsity": 0.5}})
    options = {**PLAIN, "keep_best": True, "steps": 30, "towards": "original"}
    repaired = trained(rough, tmp_path / "repaired", original=source, **options)
    assert repaired.training is not None
    (_, first), *_, (_, last) = repaired.training.errors
    assert last < 0.5 * first
    for name, weight in open_weights(rough).stored.items():
        kept = open_weights(rough).mask(name)
        again = open_weights(tmp_path / "repaired").mask(name)
        assert kept is not None and again is not None and torch.equal(kept.kept, again.kept), weight


def test_compressed_layers_stay_as_they_are_and_the_others_are_trained(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16)
    some = {"linear": {"bits": 4, "group_size": 32, "ignore": ["*.mlp.*"]}}
    rough = carried_out(source, tmp_path / "rough", some)
    result = trained(rough, tmp_path / "out", **PLAIN)
    before, after = load_file(rough / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value) != (".mlp." in key), key
    said = "model.layers.0.self_attn.q_proj stays as it is: it has no floating weight (and 7 more layers)"
    assert said in result.remarks


def test_gradients_pass_where_compressed_layers_round_their_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float32)
    some = {"linear": {"activations": "int8", "ignore": ["*.self_attn.*"]}}
    rough = carried_out(source, tmp_path / "rough", some)
    found: list[bool] = []
    train = loop.train

    def watched(objective: Any, *given: Any, **named: Any) -> Any:
        hooks = [hook for module in objective.module.modules() for hook in module._forward_pre_hooks.values()]
        found.extend(hook.straight for hook in hooks if isinstance(hook, InputRounding))
        return train(objective, *given, **named)

    monkeypatch.setattr(loop, "train", watched)
    trained(rough, tmp_path / "out", **PLAIN)
    assert len(found) == 6 and all(found)


def test_experts_of_stacks_stay_and_are_told(tmp_path: Path) -> None:
    source = architectures.make("mixtral", tmp_path / "model", torch.float32)
    result = trained(source, tmp_path / "out", **PLAIN)
    assert any("more experts) of stacks stay as they are" in remark for remark in result.remarks)
    rows = {row.name: row.status for row in result.ledger}
    assert {status for name, status in rows.items() if ".experts." in name} == {"kept"}
    assert {status for name, status in rows.items() if name.endswith("_proj") and "experts" not in name} == {"changed"}


class _Killed(Exception):
    pass


def test_killed_and_run_again_it_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    source = architectures.make("llama", tmp_path / "model", torch.bfloat16)
    results = []
    for number, stops in enumerate([(), (1, 2)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for stop in (*stops, None):

            def progress(done: int, total: int, stop: int | None = stop) -> None:
                if done == stop:
                    raise _Killed

            (folder / "out").mkdir(exist_ok=True)
            step = PassStep.model_validate({"finetune": {"steps": 4, "learning_rate": 1e-2}})
            try:
                results.append(
                    train_language(
                        train_weights,
                        source,
                        folder / "out",
                        step,
                        windows(),
                        batch_size=2,
                        original=source,
                        work=folder / "work",
                        progress=progress,
                    )
                )
            except _Killed:
                assert stop is not None
    whole, again = results
    assert whole.training == again.training
    first, second = (tmp_path / str(number) / "out" / "model.safetensors" for number in (0, 1))
    assert first.read_bytes() == second.read_bytes()


def test_bad_input(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float32)
    step = PassStep.model_validate({"finetune": {"steps": 1}})
    with pytest.raises(DataError, match="finetune trains on text"):
        train_language(train_weights, source, tmp_path, step, None, batch_size=1, original=source, work=tmp_path / "w")
    tied = architectures.make("llama", tmp_path / "tied", torch.float32, tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="cannot train lm_head, whose weight is the input embedding's"):
        trained(tied, tmp_path / "tied-out", lm_head=True)
    with pytest.raises(NumericsError, match="NaN or infinite") as found:
        trained(source, tmp_path / "far", **{**PLAIN, "learning_rate": 1000, "weight_decay": 1, "steps": 30})
    assert "smaller learning_rate" in str(found.value.remedy)
    for name in ("gradual", "centroids"):
        recipe = check({"model": str(source), "passes": [name]})
        with pytest.raises(RecipeError, match="takes networks read as a graph"):
            recipe.for_language()


def test_answers_alone_are_learned(tmp_path: Path) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float32)
    given = windows(4)
    marks = torch.zeros(4, 12, dtype=torch.bool)
    marks[:3, 7:] = True
    marked = Windows(given.batches, answers=[marks])
    data, remarks = TokenExamples.of(marked, answers=True)
    assert len(data) == 3 and remarks == [
        "1 of 4 windows hold no token that answers: left out",
        "learned are the answers alone, 45% of the tokens: learned=all takes prompts, too",
    ]
    assert len(TokenExamples.of(marked, answers=False)[0]) == 4
    step = PassStep.model_validate({"finetune": {**PLAIN, "steps": 1}})
    (tmp_path / "out").mkdir()
    result = train_language(
        train_weights, source, tmp_path / "out", step, marked, batch_size=3, original=source, work=tmp_path / "work"
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    chosen = torch.cat(given.batches)[:3]
    with torch.no_grad():
        expected = functional.cross_entropy(model(chosen).logits[:, 6:-1].flatten(0, 1), chosen[:, 7:].flatten())
    assert result.training is not None
    assert result.training.curve[0][1] == pytest.approx(float(expected), rel=1e-5)
    assert result.training.errors[0][1] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(DataError, match="holds a token that answers"):
        TokenExamples.of(Windows(given.batches, answers=[torch.zeros_like(marks)]), answers=True)


def test_zeros_are_kept_where_a_mask_says_so_and_told_where_they_are_filled(tmp_path: Path) -> None:
    """A layer under a mask beside one whose zeros no mask tells of, as other tools leave them."""
    source = architectures.make("llama", tmp_path / "model", torch.float32)
    file = source / "model.safetensors"
    tensors = load_file(file)
    dense, masked = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    zeros = torch.rand(tensors[f"{dense}.weight"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors[f"{dense}.weight"][zeros] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    rough = carried_out(source, tmp_path / "rough", {"magnitude": {"sparsity": 0.5, "ignore": ["*self_attn*"]}})
    result = trained(rough, tmp_path / "out", **PLAIN)
    kept, again = (open_weights(path).mask(masked) for path in (rough, tmp_path / "out"))
    assert kept is not None and again is not None and torch.equal(kept.kept, again.kept)
    written = open_weights(tmp_path / "out").parameter(f"{dense}.weight")
    assert bool((written[zeros] != 0).float().mean() > 0.9)
    filled = int((written[zeros] != 0).sum())
    assert f"finetune filled {filled:,} weights of value zero, in {dense}" in result.remarks


def test_a_damaged_part_of_what_is_written_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = architectures.make("llama", tmp_path / "model", torch.float32)
    first = trained(source, tmp_path / "out", **PLAIN)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    begun: list[int] = []
    train, join = loop.train, editing.join

    def watched(*given: Any, **named: Any) -> Any:
        return train(*given, **{**named, "progress": lambda done, total: begun.append(done)})

    def killed(*given: Any) -> Any:
        raise _Killed

    work = tmp_path / "again-work"
    monkeypatch.setattr(editing, "join", killed)
    with pytest.raises(_Killed):
        trained(source, tmp_path / "again", work=work, **PLAIN)
    monkeypatch.setattr(editing, "join", join)
    monkeypatch.setattr(loop, "train", watched)
    (work / "written" / "journal.json").write_text("{")
    again = trained(source, tmp_path / "again", work=work, **PLAIN)
    assert begun == [3] and again.training == first.training
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
