"""Budgets: their units, which choice keeps them, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import architectures
import pytest

from effcli.cli import main
from effcli.errors import DataError, NumericsError, RecipeError, SelectionError
from effcli.exporters.c import C
from effcli.graphs.network import GraphNetwork
from effcli.reports.report import Report, Speed
from effcli.reports.sensitivity import LayerCosts, Option, Sensitivity
from effcli.run import detect, pipeline
from effcli.run import recipe as recipes
from effcli.run.network import Measured
from effcli.run.recipe import PassStep
from effcli.search import stage as stages
from effcli.search.budget import QUANTITIES, Budget, Figure, Quantity
from effcli.search.values import choose_values

BITS = (2, 3, 4, 8)
COSTS = {2: 16.0, 3: 4.0, 4: 1.0, 8: 0.01}


def sensitivity(layers: int = 3) -> Sensitivity:
    """Layers of 100 (k + 1) weights whose cost falls with their bits; the later the layer, the dearer."""

    def costs(k: int) -> LayerCosts:
        options = tuple(
            Option(value=bits, format=f"int{bits}", nbytes=100 * (k + 1) * bits, output_error=0.1, cost=(k + 1) * cost)
            for bits, cost in COSTS.items()
        )
        return LayerCosts(name=f"layer{k}", kind="linear", shape=(10, 10 * (k + 1)), options=options)

    found = tuple(costs(k) for k in range(layers))
    return Sensitivity(
        model="m", step="linear", option="bits", way="gram", unit="nats", inputs=1, layers=found, seconds=0
    )


class Network:
    """An evaluator whose figures follow from the bytes of a choice. measured: every choice that was carried out."""

    name = "auto"
    quality: Figure = "perplexity"
    fixed_bytes = 1000

    def __init__(self, figure: Callable[[int], float], original: float = 100.0) -> None:
        self.figure = figure
        self.begin = original
        self.measured: list[dict[str, float]] = []

    def say(self, text: str) -> None: ...

    def original(self) -> float:
        return self.begin

    def measure(self, figure: Figure, values: Mapping[str, float]) -> float:
        self.measured.append(dict(values))
        return self.figure(nbytes(values))


def nbytes(values: Mapping[str, float]) -> int:
    return sum(100 * (int(name[-1]) + 1) * int(own) for name, own in values.items())


def cheapest(keeps: Callable[[int], bool]) -> float:
    """The least cost of all choices whose bytes keep a budget, by trying all of them."""
    choices = (dict(zip(("layer0", "layer1", "layer2"), own, strict=True)) for own in product(BITS, repeat=3))
    return min(
        sum((int(name[-1]) + 1) * COSTS[own] for name, own in bits.items()) for bits in choices if keeps(nbytes(bits))
    )


@pytest.mark.parametrize("limit", [2200, 2900, 3600, 5799, 5800])
def test_a_size_is_kept_at_the_least_cost(limit: int) -> None:
    network = Network(lambda nbytes: 0.0)
    found = choose_values(sensitivity(), Budget(quantity="size", limit=limit), network)
    assert nbytes(found.values) == found.chosen.nbytes <= limit - 1000
    assert found.chosen.cost == pytest.approx(cheapest(lambda nbytes: nbytes <= limit - 1000))
    assert network.measured == [] and found.limited == ""


@pytest.mark.parametrize("quantity", ["latency", "flash", "ram"])
@pytest.mark.parametrize("limit", [130.0, 200.0, 333.0, 480.0, 1000.0])
def test_a_measured_figure_is_kept_at_the_least_cost_on_the_front(quantity: Quantity, limit: float) -> None:
    network = Network(lambda nbytes: nbytes / 10)
    found = choose_values(sensitivity(), Budget(quantity=quantity, limit=limit), network)
    assert found.chosen.limited is not None and found.chosen.limited <= limit
    assert found.chosen.limited == nbytes(found.values) / 10
    larger = [point for point in found.front if point.nbytes > found.chosen.nbytes]
    assert all(point.nbytes / 10 > limit for point in larger)
    # Both ends, and the bisection between them; each choice once.
    assert len(network.measured) <= 2 + 6
    assert len({tuple(bits.values()) for bits in network.measured}) == len(network.measured)
    assert found.limited == f"{quantity}, {'ms' if quantity == 'latency' else 'bytes'}"
    assert found.measure == "" and found.chosen.measured is None


@pytest.mark.parametrize("limit", [0.12, 0.2, 0.5])
def test_the_smallest_choice_that_keeps_the_quality(limit: float) -> None:
    network = Network(lambda nbytes: 100 + 50_000 / nbytes)
    found = choose_values(sensitivity(), Budget(quantity="perplexity_increase", limit=limit), network)
    assert found.chosen.measured is not None and found.chosen.measured <= 100 * (1 + limit)
    smaller = [point for point in found.front if point.nbytes < found.chosen.nbytes]
    assert all(100 + 50_000 / point.nbytes > 100 * (1 + limit) for point in smaller)
    assert found.measure == "perplexity" and found.limited == ""


def test_quality_is_measured_beside_another_budget() -> None:
    network = Network(lambda nbytes: nbytes / 10)
    found = choose_values(sensitivity(), Budget(quantity="flash", limit=300), network, measured=2)
    assert found.measure == "perplexity" and found.chosen.measured == found.chosen.limited


def test_a_figure_that_falls_with_the_bytes() -> None:
    """Fewer bits can take more memory, for weights that are unpacked before they are used."""
    network = Network(lambda nbytes: 700 - nbytes / 100)
    found = choose_values(sensitivity(), Budget(quantity="ram", limit=660), network)
    assert set(found.values.values()) == {8}
    with pytest.raises(SelectionError, match="it is 688 B with the fewest and 652 B with the most bits"):
        choose_values(sensitivity(), Budget(quantity="ram", limit=600), network)


@pytest.mark.parametrize(
    ("quantity", "figure", "message"),
    [
        ("ram", lambda nbytes: 500, "auto.ram: bits do not change it here: it is 500 B with the fewest and 500 B with"),
        ("latency", lambda nbytes: 5 + nbytes / 1e6, r"auto.latency: bits do not change it here: it is 5.00 ms with"),
        ("flash", lambda nbytes: 1000 + nbytes, r"the budget is 900 B of flash, and it is 2.20 kB with the fewest and"),
        ("macs", lambda nbytes: nbytes, "auto.macs: bits do not change the macs"),
    ],
)
def test_what_no_choice_keeps(quantity: Quantity, figure: Callable[[int], float], message: str) -> None:
    with pytest.raises((SelectionError, RecipeError), match=message):
        choose_values(sensitivity(), Budget(quantity=quantity, limit=900), Network(figure))


@pytest.mark.parametrize(
    ("quantity", "given", "limit", "text"),
    [
        ("size", "40MB", 40_000_000, "40.0 MB of weight files"),
        ("ram", "64KiB", 65536, "65.5 kB of RAM"),
        ("flash", 262144, 262144, "262 kB of flash"),
        ("latency", "12.5ms", 12.5, "12.5 ms"),
        ("latency", 3, 3.0, "3 ms"),
        ("macs", 1000, 1000, "1,000 multiplications"),
        ("average_bits", 3.5, 3.5, "3.5 bits on average"),
        ("perplexity_increase", "5%", 0.05, "perplexity up by at most 5%"),
        ("accuracy_drop", 0.01, 0.01, "accuracy down by at most 1 point"),
    ],
)
def test_units(quantity: Quantity, given: Any, limit: float, text: str) -> None:
    config: Any = PassStep.model_validate({"auto": {quantity: given}}).config
    assert config.budget == Budget(quantity=quantity, limit=limit)
    assert str(config.budget) == text


def test_every_quantity_is_an_option_of_its_own() -> None:
    using = {"average_sparsity": "magnitude", "average_ratio": "channels"}
    for quantity in QUANTITIES:
        limit = 0.5 if quantity in ("accuracy_drop", *using) else 2
        step = {"auto": {quantity: limit, "using": using.get(quantity, "linear")}}
        config: Any = PassStep.model_validate(step).config
        assert config.budget.quantity == quantity


@pytest.mark.parametrize(("before", "drop", "after"), [(0.8, 0.1, 0.7), (0.93, 0.02, 0.91), (0.3, 0.2, 0.1)])
def test_a_drop_of_just_the_budget_is_kept(before: float, drop: float, after: float) -> None:
    budget = Budget(quantity="accuracy_drop", limit=drop)
    assert budget.keeps(after, before) and not budget.keeps(after - 1e-4, before)


def test_bytes_are_rounded_and_not_cut_off() -> None:
    for text, nbytes in (("1.005kB", 1005), ("16.1kB", 16100), ("0.3 MB", 300_000)):
        assert PassStep.model_validate({"auto": {"size": text}}).config.size == nbytes  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("auto:latency=5s", "latency"),
        ("auto:latency=0", "greater than 0"),
        ("auto:flash=4Q", "'4Q' is no size"),
        ("auto:ram=-1", "greater than 0"),
        ("auto:size=" + "9" * 400 + "MB", "more bytes than any file has"),
        ("auto:latency=inf", "finite"),
        ("auto:perplexity_increase=inf", "finite"),
        ("auto:ram=1,flash=2", "not ram and flash"),
    ],
)
def test_mistakes(step: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.from_arguments("sample:lm", passes=[step])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make("llama", tmp_path_factory.mktemp("models") / "llama")


def graph_run(net: Path, output: Path, *steps: str, **keys: Any) -> Report:
    small = ["calibration.samples=16", *([] if keys.get("no_eval") else ["evaluate.latency=false"])]
    recipe = recipes.from_arguments(str(net), passes=steps, output=str(output), overrides=small, **keys)
    return pipeline.run(recipe)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_layer_that_breaks_the_outputs_is_named_and_not_free(
    net: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: float
) -> None:
    monkeypatch.setattr("effcli.graphs.sensitivity._divergence", lambda original, other, classifier: broken)
    said = "^0 alone changed by linear to 2 bits makes outputs NaN or infinite\n`ignore` the layer"
    with pytest.raises(NumericsError, match=said):
        graph_run(net, tmp_path / "graph", "auto:using=linear,by=loss,size=4600", no_eval=True)
    monkeypatch.setattr("effcli.language.sensitivity.kl", lambda original, other: broken)
    small = ["calibration.samples=2", "calibration.length=16"]
    step = "auto:using=linear,group_size=32,by=loss,average_bits=4"
    given = recipes.from_arguments(
        str(llama), passes=[step], output=str(tmp_path / "text"), overrides=small, no_eval=True
    )
    with pytest.raises(NumericsError, match=r"q_proj alone changed by linear to 2 bits makes outputs NaN or infinite"):
        pipeline.run(given)


def test_flash_is_that_of_the_c_code(net: Path, tmp_path: Path) -> None:
    step = "auto:using=linear,by=gram,symmetric=true,flash=3900"
    report = graph_run(net, tmp_path / "out", "fold", step, "int8", export=["c"])
    found = report.stages[2].search
    assert found is not None and found.chosen.limited is not None
    footprint = C().footprint(tmp_path / "out")
    assert footprint.flash == found.chosen.limited <= 3900
    assert f"flash about {footprint.flash:,} bytes" in report.exports[0].remarks[1]
    tried = [point for point in found.front if point.limited is not None]
    assert any(point.limited > 3900 for point in tried if point.limited is not None)
    assert len(set(found.values.values())) > 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["auto:using=linear,flash=64KiB"], "auto.flash: no later pass makes the network integer"),
        (["auto:using=linear,ram=64KiB", "fold"], "auto.ram: no later pass makes the network integer"),
        (["auto:using=linear,ram=64KiB", "auto:size=1kB", "int8"], "auto follows, whose choice is not known yet"),
        (["fold", "auto:using=linear,macs=100"], "bits do not change how many multiplications .* 8,016 here"),
        (["auto:using=linear,latency=1"], "multiplied as floating-point numbers, which takes as long whatever"),
        (["auto:using=linear,perplexity_increase=1%"], "accuracy is measured, not perplexity"),
    ],
)
def test_what_a_graph_cannot_be_limited_by(net: Path, tmp_path: Path, steps: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        graph_run(net, tmp_path / "out", *steps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", ["accuracy_drop=5%", "average_bits=4,measured=2"])
def test_what_is_not_measured_is_said_before_any_pass(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setattr(GraphNetwork, "sweep", lambda *given: pytest.fail("a pass is carried out"))
    recipe = recipes.from_arguments(
        str(net), passes=["fold", f"auto:using=linear,{options}"], output=str(tmp_path / "out"), no_eval=True
    )
    with pytest.raises(DataError, match="auto: accuracy is not measured"):
        pipeline.run(recipe)


def refused(net: Path, *steps: Any) -> str:
    """What a plan says of a budget that no choice keeps."""
    recipe = recipes.from_arguments(str(net), passes=steps)
    with pytest.raises(SelectionError) as error:
        stages.plan(detect.of_run(recipe))
    return error.value.cause


def test_a_size_or_an_average_that_no_choice_keeps_is_refused_with_the_plan(net: Path) -> None:
    few = {"using": "linear", "bits": [2, 4]}
    outside = "auto.average_bits: {} is outside of the bits to choose from, 2 to 4"
    # Bits of its own leave a layer out of the choice.
    own = {**few, "layers": {"0": {"bits": 8}}}
    assert refused(net, "fold", {"auto": {**own, "average_bits": 6}}, "int8") == outside.format(6)
    # Where all have their own, there is nothing else to have.
    fixed = {**few, "layers": {"*": {"bits": 8}}}
    assert refused(net, {"auto": {**fixed, "average_bits": 3}}) == outside.replace("2 to 4", "8 to 8").format(3)
    for steps in ((), ("int8",)):
        assert "the most bits everywhere take only" in refused(net, "fold", {"auto": {**few, "size": "10MB"}}, *steps)
        assert "the fewest bits everywhere take" in refused(net, "fold", {"auto": {**few, "size": "1kB"}}, *steps)


@pytest.mark.parametrize(
    ("layers", "low", "high"),
    [
        # The layers have 36, 288, 2,048 and 64 weights.
        ({"6": {"sparsity": 0.9}}, 2048 * 0.9 / 2436, (2048 * 0.9 + 388 * 0.5) / 2436),
        ({"*": {"sparsity": 0}, "6": {"sparsity": "90%"}}, 2048 * 0.9 / 2436, 2048 * 0.9 / 2436),
        ({"6": {"sparsity": 0.9}, "3": {"compare": "row"}}, 2048 * 0.9 / 2436, (2048 * 0.9 + 388 * 0.5) / 2436),
        ({"6": {"sparsity": 0.9}, "*": {"sparsity": 0.25}}, 0.25, 0.25),
    ],
)
def test_a_share_out_of_reach_of_layers_with_their_own_is_refused_with_the_plan(
    net: Path, layers: dict[str, Any], low: float, high: float
) -> None:
    auto = {"using": "magnitude", "sparsity": [0, 0.5], "layers": layers}
    for average in (low - 0.002, high + 0.002):
        said = refused(net, {"auto": {**auto, "average_sparsity": average}})
        assert said.startswith(f"auto.average_sparsity: {average:g} is outside of ")
        assert f"{low:.4g} to {high:.4g}" in said
    for average in (low + 0.001, high - 0.001) if low < high else ():
        recipe = recipes.from_arguments(str(net), passes=[{"auto": {**auto, "average_sparsity": average}}])
        assert "it chooses sparsity 0, 0.5" in stages.plan(detect.of_run(recipe)).remarks[-1]


@pytest.mark.parametrize("own", [{}, {"layers": {"3": {"ratio": 0.5}}}])
def test_an_average_of_ratios_is_refused_before_a_run(net: Path, own: dict[str, Any]) -> None:
    step = {"auto": {"using": "channels", "average_ratio": 0.6, "ratio": [0, 0.25], **own}}
    with pytest.raises((RecipeError, SelectionError), match=r"0.6 is outside of the ratio to choose from, 0 to 0"):
        stages.plan(detect.of_run(recipes.from_arguments(str(net), passes=[step])))


@pytest.mark.parametrize("bits", [[8], [2, 8]])
def test_what_a_choice_keeps_is_planned(net: Path, bits: list[int]) -> None:
    for more in ({"average_bits": 8}, {"average_bits": 5, "layers": {"*": {"bits": 5}}}):
        recipe = recipes.from_arguments(str(net), passes=[{"auto": {"using": "linear", "bits": bits, **more}}])
        assert "it chooses bits" in stages.plan(detect.of_run(recipe)).remarks[-1]


def test_the_plan_and_the_search_refuse_the_same_sizes(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[int, int]] = []

    def check(name: str, option: str, limit: int, smallest: int, largest: int) -> None:
        ends.append((smallest, largest))

    for place in ("effcli.search.stage.check_size", "effcli.search.values.check_size"):
        monkeypatch.setattr(place, check)
    graph_run(net, tmp_path / "out", "auto:using=linear,by=gram,size=4600", no_eval=True)
    assert len(ends) == 2 and ends[0] == ends[1]
    assert ends[0][0] < 4600 < ends[0][1]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("macs=100", "auto.macs: .* bits do not change how many multiplications"),
        ("ram=64KiB", "auto.ram: .* no C code is made of a language model"),
        ("flash=64KiB", "auto.flash: .* no C code is made of a language model"),
        ("accuracy_drop=1%", "auto.accuracy_drop: .* perplexity is measured, not accuracy"),
        ("latency=5,by=gram", "auto.latency: latency is not measured"),
        ("size=10kB", "the fewest bits everywhere take"),
    ],
)
def test_what_a_language_model_cannot_be_limited_by(
    llama: Path, budget: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(llama), "--pass", f"auto:using=linear,group_size=32,{budget}", "--set", "evaluate=false"]
    with pytest.raises((RecipeError, DataError, SelectionError), match=message):
        pipeline.run(recipes.from_arguments(arguments[0], passes=[arguments[2]], output=f"{llama}-out", no_eval=True))
    assert main(["plan", *arguments]) == 1
    assert capsys.readouterr().err.startswith("error: auto")


def test_latency_is_measured_of_what_was_carried_out(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is the test's own: it counts the bytes of the weight files that are to be timed."""
    from effcli.language import latency

    def timed(checkpoint: str, **options: Any) -> Speed:
        rate = 1e6 / sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
        return Speed(
            kernel="k",
            prefill_tokens=1,
            prefill_tokens_per_second=1,
            decode_tokens_per_second=rate,
            threads=1,
            device="",
        )

    monkeypatch.setattr(latency, "measure", timed)
    small = ["calibration.samples=4", "calibration.length=32", "evaluate.perplexity=false"]

    def run(*steps: str) -> Report:
        recipe = recipes.from_arguments(str(llama), passes=steps, output=str(tmp_path / "out"), overrides=small)
        return pipeline.run(recipe, overwrite=True)

    ends = [run(f"linear:bits={bits},group_size=32").stages[-1] for bits in (2, 8)]
    times = [Measured(speed=stage.speed).milliseconds for stage in ends]
    assert times[0] is not None and times[1] is not None and times[0] < times[1]
    limit = (times[0] + times[1]) / 2
    report = run(f"auto:using=linear,group_size=32,by=gram,latency={limit}ms")
    found = report.stages[-1].search
    assert found is not None and found.limited == "latency, ms"
    measured = Measured(speed=report.stages[-1].speed).milliseconds
    assert found.chosen.limited == pytest.approx(measured) and measured is not None
    assert times[0] < measured <= limit
    assert measured > 0.9 * limit
