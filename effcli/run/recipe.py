"""The recipe: what to compress, with which passes, and how to measure it. Checked whole before a weight is read.

A recipe comes from a YAML file (`load`) or from the command line (`from_arguments`); both end in `check`, which
reports every mistake at once with its key path. `dump` writes it back with all defaults filled in, so that a resolved
recipe does the same thing under a later version whose defaults differ.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import Field, SerializeAsAny, field_validator, model_validator
from pydantic import model_serializer as serializer

from effcli import exporters, passes
from effcli.errors import RecipeError, UserError, did_you_mean
from effcli.files.exporter import Exporter
from effcli.inputs import jsonl, tables
from effcli.inputs.options import Calibration, Evaluate
from effcli.inputs.preprocess import Preprocess
from effcli.layers.contract import (
    AdapterPass,
    Change,
    CutPass,
    LayerPass,
    Needs,
    NetworkPass,
    ParameterPass,
    Pass,
    SearchPass,
    TrainPass,
)
from effcli.options import Options
from effcli.platform.registry import Registry
from effcli.reports.sensitivity import Varied
from effcli.run import yaml_files as yamls
from effcli.run.overrides import apply_overrides, parse_pass, plain, set_on_only_step
from effcli.run.validation import Mistakes, Typed, join, shown, validated
from effcli.search.space import SPACES, VARIED, varies
from effcli.training.options import TrainingOptions

# What a pass's `layers` may not override: these say which layers are taken, not how.
NOT_PER_LAYER = frozenset({"ignore", "layers", "lm_head"})


def not_per_layer(kind: type[Options]) -> frozenset[str]:
    """The options of `kind` that `layers` may not override: there is one training, and one adapter, of all together."""
    if issubclass(kind, ParameterPass):
        return frozenset(kind.model_fields)
    return NOT_PER_LAYER | (TrainingOptions.model_fields.keys() if issubclass(kind, TrainPass) else frozenset())


# What reads no text needs more samples than windows of hundreds of tokens, and takes more of them at once.
_GRAPH_SAMPLES = 512
_GRAPH_BATCH = 64
_GRAPH_TESTED = 2000
# Keys that say something to one kind of network alone.
_FOR_TEXT = {
    "calibration": ("length",),
    "evaluate": ("choices", "limit", "length", "prefill", "decode"),
}
_FOR_GRAPHS = ("weights", "shape", "preprocess")


class RecipeStep(Options, ABC):
    """Something by name with its options. In YAML `name` or `{name: {option: value}}`."""

    noun: ClassVar[str]
    registry: ClassVar[Registry[Any]]

    name: str
    config: SerializeAsAny[Options]

    @property
    def package(self) -> str:
        """The package that offers what is named, empty for effcli's own."""
        entry = self.registry.find(self.name)
        return "" if entry is None else entry.package

    @property
    def clash(self) -> str:
        """A line on other packages that have something of this name, too; empty where none has."""
        return self.registry.clashes().get(self.name, "")

    @classmethod
    def check(cls, item: Any, path: str, mistakes: Mistakes) -> Self | None:
        """A step from `name`, `{name: {options}}` or a step; None when it holds a mistake, which is then noted."""
        if isinstance(item, cls):
            return item
        named = _named(item, path, cls.noun, mistakes)
        config = None if named is None else cls.configured(*named, path, mistakes)
        return None if named is None or config is None else cls(name=named[0], config=config)

    @classmethod
    def configured(cls, name: str, options: Mapping[str, Any], path: str, mistakes: Mistakes) -> Options | None:
        """The checked options of what is called `name`; None when they hold a mistake, which is then noted."""
        kind = cls._kind(name, path, mistakes)
        return None if kind is None else validated(kind, options, path, mistakes, owner=name)

    @staticmethod
    @abstractmethod
    def load(name: str) -> type[Any]:
        """The class that is called `name`; a `UserError` when there is none."""

    @classmethod
    def _kind(cls, name: str, path: str, mistakes: Mistakes) -> type[Any] | None:
        """The class that is called `name`; None when there is none, which is then noted."""
        try:
            return cls.load(name)
        except UserError as error:
            mistakes.add(path, f"{error.cause}; {error.remedy}" if error.remedy else error.cause)
            return None

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and {"name", "config"} == set(data):
            if isinstance(data["config"], Options):
                return data
            data = {data["name"]: data["config"]}
        mistakes = Mistakes()
        step = cls.check(data, "", mistakes)
        mistakes.raise_if_any("this step")
        assert step is not None
        return {"name": step.name, "config": step.config}

    @serializer(mode="wrap")
    def _to_yaml(self, handler: Any) -> dict[str, Any]:
        return {self.name: handler(self)["config"]}


class PassStep(RecipeStep):
    """One step of a recipe: a pass with its options."""

    noun: ClassVar[str] = "a step"
    registry: ClassVar[Registry[Any]] = passes.REGISTRY

    config: SerializeAsAny[Pass]

    @staticmethod
    def load(name: str) -> type[Pass]:
        return passes.load(name)

    @classmethod
    def configured(cls, name: str, options: Mapping[str, Any], path: str, mistakes: Mistakes) -> Pass | None:
        kind: type[Pass] | None = cls._kind(name, path, mistakes)
        if kind is None:
            return None
        config = validated(kind, options, path, mistakes, owner=name)
        if config is None or cls._candidates(config, path, mistakes) is None:
            _check_layers(kind, options, path, name, mistakes)
        return config

    @classmethod
    def _candidates(cls, config: Pass, path: str, mistakes: Mistakes) -> tuple[PassStep, ...] | None:
        """For a step that searches, the pass that it searches for with each of its alternatives; None for any other.

        The least value first, in whichever order they were given. What cannot be carried out is noted, and then left
        out.
        """
        if not isinstance(config, SearchPass):
            return None
        name, options = config.base
        option = next((option for option in VARIED if config.space and set(config.space[0]) == {option}), None)
        strange = next((own for own in config.space if set(own) != {option}), None)
        if strange is not None or option is None:
            found = "nothing" if strange is None else shown(dict(strange))
            mistakes.add(
                path,
                f"a search chooses among values of bits, sparsity or ratio, and it offers {found}; "
                "let all alternatives be of one of them, such as {bits: n}",
            )
            return ()
        if passes.REGISTRY.find(name) is not None:
            reason = _unsearchable(name, passes.load(name), option, options)
            if reason:
                mistakes.add(path, reason)
                return ()
        made = []
        for own in config.space:
            step = cls.check({name: {**options, **own}}, path, mistakes)
            made += [] if step is None else [step]
        below = join(path, "layers")
        # What is wrong under `layers` makes no options.
        sound = not any(place.startswith(below) for place in mistakes.found)
        configs = [config for step in made for config in (step.configs if sound else (step.config,))]
        if any(isinstance(config, LayerPass) and config.surveys is not None for config in configs):
            mistakes.add(
                path,
                f"{name} is to divide its {option} among the layers itself, and so does the search; "
                "leave `allocation` out",
            )
        if any(isinstance(config, CutPass) and config.ranks_all for config in configs):
            mistakes.add(
                path,
                f"{name} is to rank all groups together, and a search gives each a {option} of its own; leave "
                "`ranking` out",
            )
        return tuple(sorted(made, key=lambda step: getattr(step.config, option)))

    @property
    def candidates(self) -> tuple[PassStep, ...]:
        """The steps among which a search chooses for every layer; empty for a step that is carried out as it is."""
        return self._candidates(self.config, "", Mistakes()) or ()

    @property
    def changes(self) -> Change:
        """What the step does to a network; one that searches does what those do among which it chooses."""
        candidates = self.candidates
        return candidates[0].config.changes if candidates else self.config.changes

    def for_graph(self) -> PassStep:
        """This step in a network read as a graph: defaults that differ there filled in."""
        return self.model_copy(update={"config": self.config.for_graph()})

    @property
    def needs(self) -> Needs:
        """What the pass must be given for all layers together, those with options of their own included.

        Of a search also what the steps need among which it chooses, for one of them is carried out.
        """
        needs = Needs.NOTHING
        for config in self.configs:
            needs |= config.gathers
        for step in self.candidates:
            needs |= step.needs
        return needs

    @property
    def configs(self) -> tuple[Pass, ...]:
        """The options of this step, and those that each entry of `layers` makes of them."""
        return (self.config, *map(self.for_layer, self.config.layers.values()))

    def for_layer(self, overrides: Mapping[str, Any]) -> Pass:
        """The options of this step with some replaced, as `layers` asks for the layers that match a pattern."""
        return type(self.config).model_validate(self.config.model_dump() | dict(overrides))


class ExportStep(RecipeStep):
    """A further format to write: a target with its options."""

    noun: ClassVar[str] = "an export"
    registry: ClassVar[Registry[Any]] = exporters.REGISTRY

    config: SerializeAsAny[Exporter]

    @staticmethod
    def load(name: str) -> type[Exporter]:
        return exporters.load(name)


class Recipe(Options):
    """A whole run. Relative paths are taken from the current directory, as on a command line."""

    model: str = Field(
        description="A directory, a .pt2 or .onnx file, `package.module:function`, a Hub id, `sample:lm` or "
        "`sample:cnn`."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    weights: str | None = Field(None, description="A safetensors file for a network that a Python function makes.")
    shape: tuple[int, ...] | None = Field(
        None, description="Shape of one input of a network that a Python function makes, without the batch."
    )
    preprocess: Preprocess | None = Field(
        None, description="From pixels to inputs, where the model does not say or something else is wanted."
    )
    output: str | None = Field(None, description="The directory to write.")
    calibration: Calibration = Calibration()
    evaluate: Evaluate = Evaluate()
    passes: tuple[PassStep, ...] = Field(min_length=1, description="The steps, in the order they are carried out.")
    export: tuple[ExportStep, ...] = Field((), description="Further formats to write below OUTPUT/exports.")
    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    device: str = Field("cpu", description="cpu, cuda, cuda:N or auto.")
    threads: int | None = Field(None, ge=1, description="CPU threads; without it, what torch takes.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @property
    def target(self) -> Path:
        """The directory to write; `RecipeError` when the recipe names none."""
        if self.output is None:
            raise RecipeError("output: missing", "say where to write: -o OUT, or `output:` in the recipe")
        return Path(self.output)

    @property
    def data(self) -> dict[str, Path]:
        """The files and folders of data, and those that passes read, by the names that the recipe gives them."""
        wanted = self.evaluate
        named = (self.calibration.data, wanted.perplexity, wanted.images, *wanted.questions)
        found = {}
        for name in named:
            if isinstance(name, str):
                path = Path(name).expanduser()
                # `DIR#split` names a part of a folder.
                found[name] = path if path.exists() or "#" not in name else Path(str(path).rpartition("#")[0])
        return found | {str(path): path for step in self.passes for path in step.config.files}

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What a run reads: the model, weights of their own, and data. A name on the Hub is no path that exists."""
        own = (Path(name).expanduser() for name in (self.model, self.weights) if name is not None)
        return (*own, *self.data.values())

    def for_graph(self) -> Recipe:
        """The recipe of a network read as a graph: what was not set takes the defaults of such networks.

        Raises `RecipeError` for a key that says something of language models alone.
        """
        for part, keys in _FOR_TEXT.items():
            options = getattr(self, part)
            for key in keys:
                if getattr(options, key) != type(options).model_fields[key].default:
                    raise RecipeError(f"{part}.{key}: {self.model} reads no text", "leave the key out")
        if isinstance(self.evaluate.perplexity, str):
            raise RecipeError(
                f"evaluate.perplexity: {self.model} reads no text", "give labelled images: evaluate.images or --eval"
            )
        for step in self.passes:
            if isinstance(step.config, AdapterPass):
                raise RecipeError(
                    f"{step.name} trains beside the layers of language models, and {self.model} is none",
                    "train the weights: finetune",
                )
            if isinstance(step.config, ParameterPass) and step.config.takes_adapter:
                raise RecipeError(f"{step.name} names no adapter", f"name one: {step.name}:adapter=DIR")
            if isinstance(step.config, ParameterPass) and step.config.checks:
                raise RecipeError(
                    f"{step.name}.check compares perplexities, and {self.model} reads no text", "leave check out"
                )
        return self.model_copy(
            update={
                "calibration": _filled(self.calibration, samples=_GRAPH_SAMPLES, batch_size=_GRAPH_BATCH),
                "evaluate": _filled(self.evaluate, samples=_GRAPH_TESTED),
                "passes": tuple(step.for_graph() for step in self.passes),
            }
        )

    def for_language(self) -> Recipe:
        """The recipe of a language model. Raises `RecipeError` for a key or a pass that is for other networks alone."""
        given = [key for key in _FOR_GRAPHS if getattr(self, key) is not None]
        given += ["evaluate.images"] if isinstance(self.evaluate.images, str) else []
        if given:
            raise RecipeError(f"{given[0]}: {self.model} is a language model", "leave the key out")
        for step in self.passes:
            if not _takes_language(type(step.config)):
                known = [name for name in passes.PASSES if _takes_language(passes.load(name))]
                raise RecipeError(
                    f"{step.name} takes networks read as a graph; {self.model} is a language model",
                    f"take {', '.join(known[:-1])} or {known[-1]}",
                )
        return self

    @field_validator("evaluate", mode="before", json_schema_input_type=Evaluate | bool | None)
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if value is None or value is False:
            return Evaluate.nothing()
        return Evaluate() if value is True else value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", value):
            raise ValueError(f"must be cpu, cuda, cuda:N or auto, not {value!r}")
        return value


def _takes_language(kind: type[Pass]) -> bool:
    """Whether passes of a kind take language models."""
    return not issubclass(kind, NetworkPass) and (not issubclass(kind, TrainPass) or kind.takes_language)


def check(data: Any, source: str = "recipe", typed: Typed | None = None) -> Recipe:
    """A recipe from plain data (as YAML gives it); all mistakes at once in one `RecipeError` that names `source`.

    typed: what of it was typed on a command line, which is then named in its place.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{source} is not a mapping of keys to values", "start with `model:` and `passes:`")
    mistakes = Mistakes()
    _check_values(data, "", mistakes)
    mistakes.raise_if_any(source, typed)
    given = data.get("passes", ())
    if given is not None and not isinstance(given, list | tuple):
        mistakes.add("passes", "must be a list; write each step as `- name: {option: value}`")
        given = ()
    steps: list[PassStep] = []
    for index, item in enumerate(given or ()):
        step = PassStep.check(item, f"passes.{index}", mistakes)
        if step is not None:
            steps.append(step)
    for index, (step, following) in enumerate(pairwise(steps), start=1):
        if Change.INTEGER in step.config.changes:
            why = f"{following.name} cannot follow {step.name}, which leaves no floating-point layer"
            mistakes.add(f"passes.{index}", f"{why}; make {step.name} the last step")
    for index, step in enumerate(steps):
        if Change.SHAPE in step.changes:
            before = next((own for own in steps[:index] if _fixes_shapes(own)), None)
            if before is not None:
                why = f"{step.name} removes channels, and {before.name} before it has compressed layers"
                mistakes.add(f"passes.{index}", f"{why}; put {step.name} first")
    _check_adapters(steps, bool(data.get("export")), mistakes)
    if not given and "passes" not in mistakes.found:
        mistakes.add("passes", f"name at least one pass; known: {', '.join(passes.PASSES)}")
    wanted = data.get("export", ())
    targets: list[ExportStep] = []
    for item in wanted if isinstance(wanted, list | tuple) else [wanted] if wanted is not None else []:
        target = ExportStep.check(item, "export", mistakes)
        if target is not None:
            targets.append(target)
    whole = {**data, "passes": tuple(steps), "export": tuple(targets)}
    recipe = validated(Recipe, whole, "", mistakes, skip="passes")
    mistakes.raise_if_any(source, typed)
    assert recipe is not None
    return recipe


def _check_adapters(steps: Sequence[PassStep], exports: bool, mistakes: Mistakes) -> None:
    """Note what cannot follow a step that trains an adapter: it stands beside the weights until it is merged."""
    beside: PassStep | None = None
    for index, step in enumerate(steps):
        takes = isinstance(step.config, ParameterPass) and step.config.takes_adapter
        if beside is not None and not takes:
            why = f"{step.name} cannot follow {beside.name}, whose adapter is not in the weights yet"
            mistakes.add(f"passes.{index}", f"{why}; put `merge` between them")
        if index and takes and beside is None:
            mistakes.add(f"passes.{index}", f"{step.name} names no adapter, and {steps[index - 1].name} trains none")
        beside = step if isinstance(step.config, AdapterPass) else None
    if beside is not None and exports:
        mistakes.add("export", f"the adapter of {beside.name} is not in the weights; put `merge` behind it")


def _fixes_shapes(step: PassStep) -> bool:
    """Whether channels can no longer be cut after a step: its layers are compressed or sparse."""
    searches = isinstance(step.config, SearchPass) and Change.SHAPE not in step.changes
    return step.config.result is not None or searches


def check_evaluate(data: Mapping[str, Any]) -> Evaluate:
    """The `evaluate` part alone, for commands that only measure."""
    mistakes = Mistakes()
    _check_values(data, "", mistakes)
    mistakes.raise_if_any("the request")
    options = validated(Evaluate, data, "", mistakes)
    mistakes.raise_if_any("the request")
    assert options is not None
    return options


class InputOptions(Options):
    """What can be said of a network's input in commands that only measure; see `Recipe`."""

    shape: tuple[int, ...] | None = None
    preprocess: Preprocess | None = None


def check_inputs(overrides: Iterable[str], keys: Iterable[str] = ("shape", "preprocess")) -> InputOptions:
    """Those of `keys` that are set in `shape=[...]` and `preprocess.KEY=VALUE`; `RecipeError` for any other key."""
    data, keys = apply_overrides({}, overrides), tuple(keys)
    mistakes = Mistakes()
    for key in data.keys() - set(keys):
        mistakes.add(key, f"only {' and '.join(keys)} can be set here")
    _check_values(data, "", mistakes)
    mistakes.raise_if_any("the request")
    options = validated(InputOptions, {key: data[key] for key in keys if key in data}, "", mistakes)
    mistakes.raise_if_any("the request")
    assert options is not None
    return options


def check_export(text: str, more: Mapping[str, Any]) -> ExportStep:
    """One export from chain syntax (`onnx:precision=float16`), with `more` options, for commands that only export."""
    ((target, options),) = parse_pass(text, "--to").items()
    mistakes = Mistakes()
    _check_values(options | dict(more), "", mistakes)
    mistakes.raise_if_any(f"--to {text}")
    step = ExportStep.check({target: options | dict(more)}, "", mistakes)
    mistakes.raise_if_any(f"--to {text}")
    assert step is not None
    return step


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from the YAML file `path`, with `KEY=VALUE` overrides (see `apply_overrides`)."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"{path} is not a file", "give a YAML file in UTF-8")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}", _near_recipes(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}", "give a YAML file in UTF-8") from None
    overrides, typed = tuple(overrides), Typed()
    data = apply_overrides(yamls.parse(text, str(path)) or {}, overrides)
    _type_overrides(typed, overrides)
    return check(data, str(path), typed)


def from_arguments(
    model: str,
    *,
    output: str | None = None,
    passes: Any = (),
    adapter: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    varied: tuple[str, Any] | None = None,
    calib: str | None = None,
    evals: Sequence[str] = (),
    no_eval: bool = False,
    export: Sequence[str] = (),
    overrides: Iterable[str] = (),
    **keys: Any,
) -> Recipe:
    """A recipe from the arguments of `effcli compress` or `effcli.compress`.

    passes: one or several, each in chain syntax, as `{name: {option: value}}`, or as a pass; adapter: of a first step
    that merges it. bits, group_size, varied: options of the only step, the last by its name; each has a flag. evals:
    text files for perplexity and `.jsonl` files of texts or of questions. keys: any other keys of the recipe; None is
    left out.
    """
    if isinstance(passes, str | Mapping | Pass | PassStep):
        passes = [passes]
    steps = [parse_pass(item) if isinstance(item, str) else _plain_step(item) for item in passes]
    overrides, typed = tuple(overrides), Typed()
    first = 0 if adapter is None else 1
    _type_passes(typed, passes, steps, first)
    for option, value in (("bits", bits), ("group_size", group_size), varied or ("", None)):
        if value is not None:
            flag = f"--{option.replace('_', '-')}"
            set_on_only_step(steps, option, flag, value)
            typed.add(f"passes.{first}.{option}", flag)
    if adapter is not None:
        steps = [{"merge": {"adapter": adapter}}, *steps]
        for path in ("passes.0", "passes.0.adapter", "passes.0.merge.adapter"):
            typed.add(path, "--adapter")
    data: dict[str, Any] = {"model": model, "passes": steps}
    data |= {key: value for key, value in keys.items() if value is not None}
    if output is not None:
        data["output"] = output
    if calib is not None:
        data["calibration"] = _nested(data, "calibration") | {"data": calib}
    if no_eval:
        if evals:
            raise RecipeError("--eval and --no-eval contradict each other", "leave one of them out")
        data["evaluate"] = False
    for path in evals:
        data["evaluate"] = _nested(data, "evaluate") | _measure(path, _nested(data, "evaluate"))
    if export:
        data["export"] = [parse_pass(item, "--export") for item in export]
        if len(export) == 1:
            typed.add("export", f"--export {next(iter(data['export'][0]))}")
    _type_overrides(typed, overrides)
    return check(apply_overrides(data, overrides), "the request", typed)


def _type_passes(typed: Typed, given: Sequence[Any], steps: Sequence[Mapping[str, Any]], first: int) -> None:
    """Note which passes were given in chain syntax; first: the number of the first of `steps` in the recipe."""
    names = [next(iter(step)) if isinstance(item, str) else "" for item, step in zip(given, steps, strict=True)]
    for number, (item, name) in enumerate(zip(given, names, strict=True)):
        if isinstance(item, str):
            which = f" (pass {first + number + 1})" if names.count(name) > 1 else ""
            typed.add(f"passes.{first + number}", f"--pass {name}{which}")
            # Where values are looked at before it is known what takes them, the name is a part of the path.
            typed.add(f"passes.{first + number}.{name}", f"--pass {name}{which}")


def _type_overrides(typed: Typed, overrides: Iterable[str]) -> None:
    """Note which keys were set by `KEY=VALUE`."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        typed.add(key, f"--set {key}")
        head, *rest = key.split(".")
        if head == "passes" and len(rest) > 2 and passes.REGISTRY.find(rest[1]) is not None:
            # The name of a pass may stand in a key, and is no part of a path.
            typed.add(".".join((head, rest[0], *rest[2:])), f"--set {key}")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, all defaults written out that do not follow the model; it loads back to an equal recipe."""
    sections = {"calibration": recipe.calibration, "evaluate": recipe.evaluate}
    unset = {name: {"length"} for name, options in sections.items() if "length" not in options.model_fields_set}
    return yamls.dump(recipe.model_dump(mode="json", exclude=unset))


def _check_values(value: Any, path: str, mistakes: Mistakes) -> None:
    """Note what no option can take: a zero byte, which no name can hold, and whole numbers of more than 64 bits."""
    if isinstance(value, str) and "\0" in value:
        mistakes.add(path, "holds a zero byte, which no name can hold; remove it")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        mistakes.add(path, "a whole number of more than 64 bits; give a smaller one")
    elif isinstance(value, Mapping):
        for key, below in value.items():
            if isinstance(key, str) and "\0" in key:
                mistakes.add(path, "a key holds a zero byte, which no name can hold; remove it")
            _check_values(below, join(path, str(key)), mistakes)
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            _check_values(below, join(path, str(number)), mistakes)


def _unsearchable(name: str, kind: type[Pass], option: Varied, options: Mapping[str, Any]) -> str:
    """Why no search can choose `option` of the pass `name`, whose other options are `options`; empty where one can."""
    space = SPACES[option]
    if not varies(kind, option):
        others = ", ".join(f"{own.passes} ({other})" for other, own in SPACES.items() if other != option)
        return f"{name} has no {option} to choose layer by layer; take {space.passes}, or to choose otherwise {others}"
    if option in options:
        is_chosen, them = ("are", "them") if space.many else ("is", "it")
        return f"the {option} {is_chosen} what is chosen; leave {them} out of the options of {name}"
    layers = options.get("layers")
    for pattern, own in layers.items() if isinstance(layers, Mapping) else ():
        if isinstance(own, Mapping) and option in own and own[option] is None:
            return f"{option} of {pattern!r} is null, which no search can price; give it a value, or `ignore` the layer"
    return ""


def _named(item: Any, path: str, what: str, mistakes: Mistakes) -> tuple[str, Mapping[str, Any]] | None:
    """Name and options of `name` or `{name: {option: value}}`; None when it is neither."""
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        hint = "more than one key; indent the options below the name" if isinstance(item, Mapping) and item else "empty"
        mistakes.add(path, f"{what} is a name or `name: {{option: value}}`, not {shown(item)} ({hint})")
        return None
    name, options = next(iter(item.items()))
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        mistakes.add(path, f"the options of {name} must be a mapping, not {shown(options)}")
        return None
    return str(name), options


def _check_layers(
    config_type: type[Pass], options: Mapping[str, Any], path: str, name: str, mistakes: Mistakes
) -> None:
    """Check each entry of `layers` against the pass's own options."""
    layers = options.get("layers")
    if not isinstance(layers, Mapping):
        return
    common = {key: value for key, value in options.items() if key in config_type.model_fields and key != "layers"}
    for pattern, override in layers.items():
        here = join(path, "layers", str(pattern))
        if not isinstance(override, Mapping):
            continue  # said by the type of `layers` itself
        whole = not_per_layer(config_type)
        allowed = [key for key in config_type.model_fields if key not in whole]
        for key in override:
            if key in whole:
                rest = f"; one layer can set {', '.join(allowed)}" if allowed else ", as all of its options do"
                mistakes.add(join(here, str(key)), f"belongs to the whole pass{rest}")
        own = {key: value for key, value in override.items() if key not in whole}
        found = Mistakes()
        validated(config_type, common | own, here, found, owner=name, known=allowed)
        # The pass's own mistakes were reported at their own place; here only those of this entry count.
        for place, messages in found.found.items():
            if place == here or place.removeprefix(here + ".").split(".")[0] in own:
                for message in messages:
                    if place != here or message not in mistakes.found.get(path, []):
                        mistakes.add(place, message)


def _plain_step(step: Any) -> Any:
    """A step given from Python as plain data, so that overrides reach its options."""
    if isinstance(step, Pass):
        place = f"{type(step).__module__}:{type(step).__qualname__}"
        name = next((name for name, entry in passes.REGISTRY.known().items() if entry.place == place), None)
        if name is None:
            raise RecipeError(
                f"the pass {place} has no name that a recipe could say",
                "offer it as an entry point of the group effcli.passes: see docs/extending.md",
            )
        return {name: step.model_dump(mode="json", exclude_unset=True)}
    return plain(step)


def _measure(path: str, sofar: Mapping[str, Any]) -> dict[str, Any]:
    file = Path(path).expanduser()
    suffix = Path(path.partition("#")[0]).suffix
    key = "choices" if jsonl.is_jsonl(file) and not jsonl.holds_documents(file) else "perplexity"
    if suffix == tables.SUFFIX and tables.holds_questions(file):
        key = "choices"
    elif suffix in (".npz", ".parquet") or Path(path.partition("#")[0]).expanduser().is_dir():
        key = "images"
    if key == "choices" and key in sofar:
        there = sofar[key]
        return {key: [*(there if isinstance(there, list) else [there]), path]}
    if key in sofar:
        raise RecipeError(
            f"--eval {path}: there is already {sofar[key]}", "give one file of each kind, or several of questions"
        )
    return {key: path}


Part = TypeVar("Part", bound=Options)


def _filled(options: Part, **defaults: Any) -> Part:
    """The options with other defaults for what was not set."""
    return options.model_copy(
        update={key: value for key, value in defaults.items() if key not in options.model_fields_set}
    )


def _nested(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = plain(data.get(key, {}))
    return value if isinstance(value, dict) else {}


def _near_recipes(path: Path) -> str:
    found = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    return did_you_mean(path.name, found) or "check the path"
