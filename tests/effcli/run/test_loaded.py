"""Models that are loaded already are compressed as their files would be, and stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effcli
from effcli.cli import main
from effcli.errors import EffcliError, OutputError, RecipeError, UnsupportedError
from effcli.files.locate import SAMPLES
from effcli.run import pipeline

SAMPLE = SAMPLES["sample:lm"]
PASS = "linear:bits=4,group_size=32"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture(scope="module")
def sample() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SAMPLE).train()


def state(model: nn.Module) -> dict[str, Any]:
    """All that is to stay as it is."""
    config = getattr(model, "config", None)
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [each.training for each in model.modules()],
        "config": None if config is None else copy.deepcopy(config.__dict__),
    }


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["tensors"].keys() == two["tensors"].keys()
    assert all(torch.equal(value, two["tensors"][name]) for name, value in one["tensors"].items())
    assert one["modes"] == two["modes"] and one["config"] == two["config"]


def test_a_language_model_gives_what_its_files_give(sample: Any, tmp_path: Path) -> None:
    before = state(sample)
    report = effcli.compress(sample, PASS, tmp_path / "loaded", evaluate=False)
    assert_same(state(sample), before)
    effcli.compress("sample:lm", PASS, tmp_path / "files", evaluate=False)
    ids = torch.arange(32)[None]
    ours, theirs = (effcli.load(tmp_path / name)(input_ids=ids).logits for name in ("loaded", "files"))
    assert torch.equal(ours, theirs)
    assert (tmp_path / "loaded" / "tokenizer.json").is_file()
    assert Path(report.model).name == type(sample).__name__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "loaded"]


def test_a_module_gives_what_it_computes(net: Net, tmp_path: Path) -> None:
    before = state(net)
    example = torch.randn(4, 3, 8, 8)
    report = effcli.compress(net, "linear:bits=8", tmp_path / "out", example=example, evaluate=False)
    assert_same(state(net), before)
    assert report.stages[1].ledger[0].name == "conv"
    with torch.no_grad():
        found, wanted = effcli.load(tmp_path / "out")(example), net.eval()(example)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_recipe_of_a_model_that_no_file_holds(net: Net, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    report = effcli.compress(net, "linear:bits=8", out, shape=(3, 8, 8), evaluate=False)
    assert report.model == report.recipe["model"] == report.given["model"] == "python-object://Net"
    texts = {path: path.read_text() for path in out.iterdir() if path.suffix in (".json", ".yaml", ".md", ".html")}
    assert not [path for path, text in texts.items() if "effcli-input" in text], "the folder is gone"
    for command in ("run", "plan"):
        assert main([command, str(out / "recipe.yaml"), "--set", f"output={tmp_path}/again"]) == 1
        error = capsys.readouterr().err
        assert "the model was given in Python as a Net, and no file holds it" in error
        assert "--set model=FOLDER" in error
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(2, 3, 8, 8),)), tmp_path / "net.pt2")
    assert main(["plan", str(out / "recipe.yaml"), "--set", f"model={tmp_path}/net.pt2", "--set", "shape=null"]) == 0
    assert main(["verify", str(out)]) == 0
    assert "not compared with its input python-object://Net, which is not here" in capsys.readouterr().out


def test_the_same_weights_go_on_and_others_do_not(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: nn.Module, told: list[str]) -> None:
        from effcli.run.listener import Silent

        class Told(Silent):
            def say(self, text: str) -> None:
                told.append(text)

        effcli.compress(model, "linear:bits=8", tmp_path / "out", shape=(3, 8, 8), evaluate=False, listener=Told())

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline._Run, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(net, [])
    assert len(list(tmp_path.glob(".out.effcli-input-*"))) == 1
    again: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(pipeline._Run, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(copy.deepcopy(net), again)
    assert "going on from the last written block" in again
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] += 1
    other: list[str] = []
    run(net, other)
    assert "going on from the last written block" not in other
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refused(kind: type[EffcliError], tmp_path: Path, *arguments: Any, **keys: Any) -> str:
    with pytest.raises(kind) as found:
        effcli.compress(*arguments, tmp_path / "out", evaluate=False, **keys)
    assert list(tmp_path.iterdir()) == []
    return f"{found.value.cause} | {found.value.remedy}"


def test_what_cannot_be_taken_says_why(net: Net, tmp_path: Path) -> None:
    assert "shape=(3, 32, 32)" in refused(UnsupportedError, tmp_path, net, "linear:bits=8")
    assert "a dict is no model" in refused(RecipeError, tmp_path, {}, "linear:bits=8")
    assert "model.float()" in refused(UnsupportedError, tmp_path, Net().half(), "linear:bits=8", shape=(3, 8, 8))
    assert "is no model of transformers" in refused(RecipeError, tmp_path, net, "linear:bits=8", tokenizer=1)
    assert "leave it out" in refused(RecipeError, tmp_path, "sample:lm", "linear:bits=8", tokenizer=1)
    assert "int64" in refused(UnsupportedError, tmp_path, net, "linear", example=torch.zeros(1, 3, dtype=torch.int64))
    with torch.device("meta"):
        absent = Net()
    assert "the device meta" in refused(UnsupportedError, tmp_path, absent, "linear:bits=8", shape=(3, 8, 8))


def test_a_module_that_depends_on_values_stays_as_it_is(net: Net, tmp_path: Path) -> None:
    class Branching(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    told = refused(UnsupportedError, tmp_path, Branching().train(), "linear:bits=8", shape=(3, 8, 8))
    assert "torch.export cannot record" in told


def test_models_of_transformers_that_cannot_be_taken(sample: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=64, **small))
    assert "fill-in tasks" in refused(UnsupportedError, tmp_path, bert, PASS)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, **small))
    assert "tokenizer=tokenizer" in refused(UnsupportedError, tmp_path, llama, PASS)
    llama.hf_quantizer = object()
    assert "quantized already" in refused(UnsupportedError, tmp_path, llama, PASS)
    llama.hf_quantizer, llama._hf_peft_config_loaded = None, True
    assert "merge_and_unload" in refused(UnsupportedError, tmp_path, llama, PASS)


def test_an_output_that_exists_is_refused_before_anything_is_written(net: Net, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(OutputError):
        effcli.compress(net, "linear:bits=8", tmp_path / "out", shape=(3, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
