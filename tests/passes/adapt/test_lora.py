"""`lora`: as a plain loop over PEFT's modules trains, beside dense and packed layers; PEFT loads what is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import architectures
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import effcli
from effcli import exporters
from effcli.errors import NumericsError, RecipeError, SelectionError, UnsupportedError, UserError
from effcli.inputs.text import Windows
from effcli.language.adapting import train_adapter
from effcli.language.beside import as_it_runs
from effcli.language.loading import load
from effcli.language.plan import inspect
from effcli.language.stream import Stream
from effcli.language.sweep import sweep
from effcli.language.training import recomputing, train_language, train_weights
from effcli.language.weights import open_weights
from effcli.layers.contract import Beside
from effcli.layers.result import PassResult
from effcli.passes.adapt.lora import Lora
from effcli.platform import installed
from effcli.run import plan
from effcli.run.detect import of_run
from effcli.run.recipe import PassStep, check
from effcli.training import loop, snapshot

Make = Callable[..., Path]
PLAIN: dict[str, Any] = {
    "shuffle": False,
    "keep_best": False,
    "schedule": "constant",
    "learning_rate": 1e-2,
    "seed": 5,
    "rank": 4,
}


def windows(count: int = 6, length: int = 12) -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows(list(torch.randint(architectures.VOCABULARY, (count, length), generator=generator).split(4)))


def trained(
    source: Path,
    target: Path,
    original: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> PassResult:
    target.mkdir(exist_ok=True)
    step = PassStep.model_validate({"lora": {"steps": 3, **options}})
    work = target.with_name(f"{target.name}-work")
    return train_language(
        train_adapter,
        source,
        target,
        step,
        windows(),
        batch_size=2,
        original=original or source,
        work=work,
        progress=progress,
    )


def compressed(source: Path, target: Path, step: Any) -> Path:
    target.mkdir()
    sweep(source, target, PassStep.model_validate(step), windows(), target.with_name(f"{target.name}-work"))
    return target


def by_peft(source: Path, config: LoraConfig, steps: int = 3) -> tuple[Any, list[float]]:
    """A model with an adapter after so many steps of a plain loop, and the loss of each."""
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for batch in torch.cat(windows().batches).split(2)[:steps]:
        logits = model(input_ids=batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


def targets(source: Path) -> list[str]:
    return [site.name for site in open_weights(source).skeleton.sites() if not site.name.startswith("lm_head")]


LIKE_PEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "conv1d and dora": ("gpt2", {"dora": True}, {"use_dora": True, "fan_in_fan_out": True}),
    "rank stabilized": ("qwen2", {"rank_stabilized": True}, {"use_rslora": True}),
    "biases": ("opt", {"alpha": 3}, {"lora_alpha": 3}),
    "pissa": ("llama", {"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa, dora, rank stabilized": (
        "llama",
        {"init": "pissa", "dora": True, "rank_stabilized": True},
        {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
    ),
}


@pytest.mark.parametrize("kind", LIKE_PEFT)
def test_three_steps_are_those_of_a_plain_loop(kind: str, network: Make, tmp_path: Path) -> None:
    name, options, config = LIKE_PEFT[kind]
    source = network(name)
    result = trained(source, tmp_path / "out", **PLAIN, **options)
    found = {"r": 4, "lora_alpha": 16, "target_modules": targets(source), **config}
    model, losses = by_peft(source, LoraConfig(**found))
    assert result.training is not None
    assert [loss for _, loss in result.training.curve] == pytest.approx(losses, rel=1e-5)
    expected = adapters.logits(model)
    assert_close(adapters.logits(load(tmp_path / "out", dtype="float32")), expected, rtol=1e-3, atol=1e-3)
    # PEFT alone reads it on the checkpoint beside it, which is the input as it was.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    assert_close(adapters.logits(again), expected, rtol=1e-3, atol=1e-3)
    # Merged, it is the same network.
    adapters.merged(tmp_path / "out", tmp_path / "merged")
    assert_close(adapters.logits(adapters.loaded(tmp_path / "merged")), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["qlora", "qdora"])
def test_beside_packed_layers_it_learns_what_it_learns_beside_their_weights(
    options: dict[str, Any], name: str, network: Make, tmp_path: Path
) -> None:
    source = network(name, torch.bfloat16)
    packed = compressed(source, tmp_path / "packed", {"nf4": {"block_size": 32, "double": True}})
    result = trained(packed, tmp_path / "out", **PLAIN, **options)
    dense = tmp_path / "dense"
    dense.mkdir()
    model = load(packed, packed=False, dtype="float32")
    model.save_pretrained(dense)
    again = trained(dense, tmp_path / "dense-out", **PLAIN, **options)
    assert result.training is not None and again.training is not None
    for (_, first), (_, second) in zip(result.training.curve, again.training.curve, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("out", "dense-out")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert_close(tensor, second[name], rtol=2e-2, atol=2e-3)
    for file in ("effcli.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (packed / file).read_bytes()


def test_what_is_evaluated_is_what_peft_runs(network: Make, tmp_path: Path) -> None:
    source = network("qwen2", torch.bfloat16)
    trained(source, tmp_path / "out", **{**PLAIN, "steps": 4}, dora=True, layers={"*.mlp.*": {"rank": 2, "alpha": 5}})
    expected = adapters.logits(load(tmp_path / "out", dtype="float32"))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and set(config["rank_pattern"].values()) == {2}
    assert set(config["alpha_pattern"].values()) == {5}
    weights = as_it_runs(tmp_path / "out")
    ids = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(1))
    with Stream(weights, with_head=True) as stream, torch.inference_mode():
        hidden, calls = stream.enter(ids)
        for k, block in enumerate(weights.skeleton.blocks):
            with weights.opened(block, f"{weights.skeleton.block_names[k]}.", weights.skeleton.block_parameters(k)):
                hidden = stream.through(k, hidden, calls[k])
        found = stream.leave(ids, hidden)
    assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_gradient_of_dora_leaves_the_norm_out(network: Make) -> None:
    """arXiv:2402.09353, section 4.3: ‖V‖ is a constant for the way back. In float64, by hand."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    options = Lora(rank=2, alpha=3, dora=True)
    module: Any = inject_adapter_in_model(options.adapter({"0": options}), base)[0]  # type: ignore[index]
    module.lora_B["default"].weight.data.normal_()
    x, wanted = torch.randn(7, 6), torch.randn(7, 5)
    functional.mse_loss(module(x), wanted).backward()
    w, a, b = (
        t.detach().double()
        for t in (module.base_layer.weight, module.lora_A["default"].weight, module.lora_B["default"].weight)
    )
    m = module.lora_magnitude_vector["default"].weight.detach().double()
    for one in (a, b, m):
        one.requires_grad_()
    v = w + 1.5 * b @ a
    y = x.double() @ (m[:, None] * v / v.norm(dim=1, keepdim=True).detach()).T
    functional.mse_loss(y, wanted.double()).backward()
    assert a.grad is not None and b.grad is not None and m.grad is not None
    assert_close(module.lora_A["default"].weight.grad.double(), a.grad, rtol=1e-4, atol=1e-6)
    assert_close(module.lora_B["default"].weight.grad.double(), b.grad, rtol=1e-4, atol=1e-6)
    assert_close(module.lora_magnitude_vector["default"].weight.grad.double(), m.grad, rtol=1e-4, atol=1e-6)


def beside(weight: Tensor, original: Tensor, options: Lora, packed: bool) -> Beside:
    base = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    base[0].weight.data = weight
    module: Any = inject_adapter_in_model(options.adapter({"0": options}), base)[0]  # type: ignore[index]
    return Beside(module, options, packed, lambda: weight, lambda: original)


def product(one: Beside) -> Tensor:
    module = one.module
    return one.options.scaling * module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()


def test_pissa_takes_the_largest_singular_values_out() -> None:
    torch.manual_seed(1)
    weight = torch.randn(12, 9)
    before = weight.clone()
    options = Lora(rank=3, alpha=5, init="pissa", rank_stabilized=True)
    one = beside(weight, before, options, packed=False)
    with torch.no_grad():
        options.begin({"0": one})
    u, s, v = torch.linalg.svd(before.double(), full_matrices=False)
    assert_close(product(one).double(), (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4, atol=1e-5)
    assert_close(weight.double(), (u[:, 3:] * s[3:]) @ v[3:], rtol=1e-4, atol=1e-5)
    # Untrained, the adapter of twice the rank adds nothing to the weights as they were.
    config, tensors = options.finish({"0": one}, None)
    assert config.r == 6 and config.use_rslora
    scaling = config.lora_alpha / 6**0.5
    assert_close(scaling * tensors["0"]["lora_B"] @ tensors["0"]["lora_A"], torch.zeros(12, 9), rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedError, match="and 0 is compressed"):
        options.begin({"0": beside(weight, before, options, packed=True)})


def test_loftq_begins_with_what_compression_lost() -> None:
    """By hand: what is lost is one outer product, which rank 1 restores whole."""
    quantized = torch.eye(4)
    original = quantized + torch.tensor([1.0, 2.0, 0.0, -1.0])[:, None] * torch.tensor([0.5, 0.0, 1.0, 0.0])
    options = Lora(rank=1, alpha=4, init="loftq", dora=True)
    one = beside(quantized.clone(), original, options, packed=True)
    with torch.no_grad():
        options.begin({"0": one})
    assert_close(quantized + product(one), original, rtol=1e-5, atol=1e-6)
    assert_close(one.module.lora_magnitude_vector["default"].weight.detach(), original.norm(dim=1))


def test_loftq_is_nearer_to_the_original(network: Make, tmp_path: Path) -> None:
    source = network("llama", torch.float32)
    packed = compressed(source, tmp_path / "packed", {"linear": {"bits": 3, "group_size": 32}})
    errors = [
        trained(packed, tmp_path / init, source, **PLAIN, init=init, towards="original").training.errors[0][1]  # type: ignore[union-attr]
        for init in ("zero", "loftq")
    ]
    assert errors[1] < errors[0]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("searches", [False, True])
def test_killed_and_run_again_it_writes_the_same_bytes(
    searches: bool, network: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    source = compressed(network("llama", torch.bfloat16), tmp_path / "packed", "nf4")
    results = []
    searching = {"fast_forward": 1, "hold_out": 0.3} if searches else {}
    for number, stops in enumerate([(), (1, 2)]):
        for stop in (*stops, None):

            def progress(done: int, total: int, stop: int | None = stop) -> None:
                if done == stop:
                    raise _Killed

            options = {"steps": 4, "learning_rate": 1e-2, "dropout": 0.2, "dora": True, **searching}
            try:
                results.append(trained(source, tmp_path / str(number), progress=progress, **options))
            except _Killed:
                assert stop is not None
    whole, again = results
    assert whole.training == again.training
    assert whole.training is not None and len(whole.training.searched) == (4 if searches else 0)
    assert any("4 line searches took" in remark for remark in whole.remarks) == searches
    first, second = (tmp_path / str(number) / "adapter" / "adapter_model.safetensors" for number in (0, 1))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_measures_it_and_merges_it(tmp_path: Path) -> None:
    evaluate = {"samples": 2, "length": 64, "latency": False}
    steps = [{"lora": {"steps": 2, "batch_size": 2, "learning_rate": 0.005}}, "merge"]
    calibration = {"samples": 4, "length": 64}
    report = effcli.compress("sample:lm", steps, tmp_path / "out", evaluate=evaluate, calibration=calibration)
    _, alone, merged = report.stages
    assert alone.quality is not None and merged.quality is not None
    assert alone.quality.perplexity == pytest.approx(merged.quality.perplexity, rel=2e-3)
    assert alone.quality.perplexity != report.stages[0].quality.perplexity  # type: ignore[union-attr]
    assert not (tmp_path / "out" / "adapter").exists()
    assert {row.status for row in alone.ledger} == {"kept"}
    assert {row.notes.get("trained") for row in alone.ledger} > {None}
    assert any(remark.startswith("trained 196,608 numbers beside the weights") for remark in alone.remarks)


def test_a_checkpoint_with_its_adapter(tmp_path: Path) -> None:
    evaluate = {"samples": 2, "length": 64, "latency": False}
    lora = {"lora": {"steps": 1, "batch_size": 2}}
    calibration = {"samples": 2, "length": 64}
    out = tmp_path / "out"
    report = effcli.compress("sample:lm", lora, out, evaluate=evaluate, calibration=calibration)
    files = [out / "model.safetensors", out / "adapter" / "adapter_model.safetensors"]
    assert report.stages[-1].nbytes == sum(file.stat().st_size for file in files)
    assert report.loader == "effcli.load" and report.layout == "standard"
    assert "PeftModel.from_pretrained(model, " in (out / "README.md").read_text()
    assert any("PEFT loads the adapter" in found.text and found.passed for found in report.checks)
    assert any(".lora_A." in name for name, _ in effcli.load(out).named_parameters())
    assert any("an adapter stands beside the weights" in remark for remark in inspect("out", out).remarks)
    for step in ("linear", lora, {"merge": {"adapter": str(out / "adapter")}}):
        with pytest.raises(UnsupportedError, match="holds an adapter beside its weights"):
            effcli.compress(out, step, tmp_path / "no", evaluate=False)
    for target in ("safetensors", "bitsandbytes"):
        with pytest.raises(UnsupportedError, match="holds an adapter beside its weights"):
            exporters.load(target)().export(out, tmp_path / "export")
    merged = effcli.compress(out, "merge", tmp_path / "merged", evaluate=evaluate)
    before, after = (stage.quality.perplexity for stage in merged.stages if stage.quality is not None)
    assert before == pytest.approx(after, rel=2e-3)
    with pytest.raises(UserError, match="names no adapter, and none stands beside the weights"):
        effcli.compress("sample:lm", "merge", tmp_path / "none", evaluate=False)


def test_a_plan_knows_the_bytes(network: Make, tmp_path: Path) -> None:
    source = network("llama", torch.bfloat16)
    steps: list[Any] = ["nf4", {"lora": {"rank": 4, "dora": True}}]
    found = [_plan(source, steps[:1]), _plan(source, steps), _plan(source, [*steps, "merge"])]
    (tmp_path / "out").mkdir()
    trained(compressed(source, tmp_path / "packed", "nf4"), tmp_path / "out", **PLAIN, dora=True)
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert found[1].output_bytes - found[0].output_bytes == 4 * numbers
    assert found[2].output_bytes == _plan(source, [{"linear": {"bits": 8}}]).input_bytes
    assert {row.status for row in found[1].rows if row.step.endswith("lora") and row.kind == "linear"} == {
        "adapt",
        "keep",
    }


def _plan(source: Path, passes: list[Any]) -> plan.Plan:
    return of_run(check({"model": str(source), "passes": passes, "output": "o", "calibration": {"samples": 2}})).plan()


def test_the_head_and_experts(network: Make, tmp_path: Path) -> None:
    tied = network("llama", torch.float32, tie_word_embeddings=True)
    trained(tied, tmp_path / "out", **PLAIN, lm_head=True)
    expected = adapters.logits(load(tmp_path / "out", dtype="float32"))
    adapters.merged(tmp_path / "out", tmp_path / "merged")
    assert_close(adapters.logits(adapters.loaded(tmp_path / "merged")), expected, rtol=1e-3, atol=1e-3)
    result = trained(network("mixtral"), tmp_path / "experts", **PLAIN)
    assert any("more experts) of stacks have no adapter" in remark for remark in result.remarks)


def test_a_rank_above_a_side_is_refused_in_the_plan(network: Make) -> None:
    source = network("llama")
    with pytest.raises(SelectionError, match="rank 4000 is above a side of") as found:
        _plan(source, [{"lora": {"rank": 4000}}])
    assert "take a rank of at most" in found.value.remedy
    _plan(source, [{"lora": {"layers": {"*.q_proj": {"rank": 2}}}}])
    with pytest.raises(RecipeError, match="layers are trained together: dropout is one for all"):
        check({"model": str(source), "passes": [{"lora": {"layers": {"*": {"dropout": 0.1}}}}]})


def test_what_may_follow_an_adapter() -> None:
    for passes, export, said in [
        (["lora", "linear"], None, "linear cannot follow lora, whose adapter is not in the weights yet"),
        (["lora", "lora", "merge"], None, "lora cannot follow lora"),
        (["linear", "merge"], None, "merge names no adapter, and linear trains none"),
        (["lora"], ["onnx"], "the adapter of lora is not in the weights"),
    ]:
        with pytest.raises(RecipeError, match=said):
            check({"model": "sample:lm", "passes": passes, "export": export or []})
    for passes in (["lora"], ["lora", "merge", "linear"], ["merge"]):
        check({"model": "sample:lm", "passes": passes})
    for step, said in (("lora", "trains beside the layers of language models"), ("merge", "merge names no adapter")):
        with pytest.raises(RecipeError, match=said):
            check({"model": "sample:cnn", "passes": [step]}).for_graph()


def test_a_loss_that_is_not_finite_ends_it(network: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Lora.loss
    monkeypatch.setattr(Lora, "loss", lambda self, step: found(self, step) * (float("nan") if step.progress else 1))
    with pytest.raises(NumericsError, match="the loss is NaN or infinite in step 2 of 3") as raised:
        trained(network("llama"), tmp_path / "out", **PLAIN)
    assert "smaller learning_rate" in raised.value.remedy
    options = {**PLAIN, "keep_best": True, "learning_rate": 1e-3}
    monkeypatch.setattr(
        Lora, "loss", lambda self, step: found(self, step) * (float("nan") if step.progress > 0.4 else 1)
    )
    result = trained(network("llama"), tmp_path / "out", **options, epochs=2, steps=6)
    assert result.training is not None and result.training.kept == 3
    assert any("it ended early with what it had at step 3: the loss is NaN" in remark for remark in result.remarks)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_peft_must_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="the package peft is not installed") as found:
        effcli.compress("sample:lm", "lora", tmp_path / "out", evaluate=False)
    assert found.value.remedy == "pip install 'effcli[train]'"


@pytest.mark.parametrize("name", ["finetune", "lora"])
def test_blocks_that_are_computed_again_learn_the_same(name: str, network: Make, tmp_path: Path) -> None:
    source = network("llama")
    options: dict[str, Any] = {key: value for key, value in PLAIN.items() if name == "lora" or key != "rank"}
    options |= {"dropout": 0.3} if name == "lora" else {}
    found = []
    for checkpointing in (False, True):
        step = PassStep.model_validate({name: {"steps": 3, **options, "checkpointing": checkpointing}})
        target = tmp_path / str(checkpointing)
        target.mkdir()
        how = train_adapter if name == "lora" else train_weights
        given = {"batch_size": 2, "original": source, "work": tmp_path / f"work-{checkpointing}"}
        result = train_language(how, source, target, step, windows(), **given)  # type: ignore[arg-type]
        assert result.training is not None
        found.append(result.training.curve)
    assert found[0] == found[1]


def test_blocks_keep_less_when_they_are_computed_again(network: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(network("llama"))
    ids = torch.cat(windows().batches)
    kept = []
    for again in (False, True):
        held: list[int] = []

        def pack(tensor: Tensor, held: list[int] = held) -> Tensor:
            held.append(tensor.numel())
            return tensor

        blocks = model.model.layers if again else ()
        with recomputing(blocks), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=ids)
        kept.append(sum(held))
    assert kept[1] < 0.5 * kept[0]
    assert "forward" not in model.model.layers[0].__dict__


def test_moments_in_8_bits(network: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SNAPSHOT_SECONDS", 0.0)
    # Of fewer than 4,096 numbers bitsandbytes keeps float32.
    source = network("llama")
    options: dict[str, Any] = {**PLAIN, "rank": 32, "steps": 5, "moments": "int8"}
    saved: list[torch.dtype] = []
    state = snapshot.optimizer_state

    def watched(optimizer: Any) -> Any:
        found = state(optimizer)
        saved.extend(tensor.dtype for name, tensor in found[0].items() if name.endswith("state1"))
        return found

    monkeypatch.setattr(snapshot, "optimizer_state", watched)
    whole = trained(source, tmp_path / "whole", **options)
    assert torch.uint8 in saved

    def progress(done: int, total: int) -> None:
        if done == 2:
            raise _Killed

    with pytest.raises(_Killed):
        trained(source, tmp_path / "again", progress=progress, **options)
    again = trained(source, tmp_path / "again", **options)
    assert again.training == whole.training
    first, second = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "again"))
    assert first.read_bytes() == second.read_bytes()
    other = trained(source, tmp_path / "other", **{**options, "moments": "float32"})
    assert whole.training is not None and other.training is not None
    for (_, one), (_, two) in zip(whole.training.curve, other.training.curve, strict=True):
        assert one == pytest.approx(two, rel=2e-2)


def test_fast_forward_needs_inputs_of_its_own_and_few_numbers() -> None:
    for step, said in [
        ({"lora": {"fast_forward": 6}}, "set hold_out, such as hold_out=10%"),
        ({"finetune": {"fast_forward": 6, "hold_out": 0.1}}, "gains nothing where whole weights are trained"),
    ]:
        with pytest.raises(RecipeError, match=said):
            check({"model": "sample:lm", "passes": [step]})
    check({"model": "sample:lm", "passes": [{"finetune": {"fast_forward": 6, "hold_out": "10%", "force": True}}]})
    with pytest.raises(RecipeError, match="`fast_forward` is of language models"):
        step = {"finetune": {"fast_forward": 6, "hold_out": "10%", "force": True}}
        check({"model": "sample:cnn", "passes": [step]}).for_graph()
