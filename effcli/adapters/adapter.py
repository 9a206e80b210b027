"""A PEFT adapter directory, read as new values for the parameters of a network.

Every tensor must find its place, and every place that the config names must find its tensors: what does not fit is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effcli.adapters import formulas
from effcli.adapters.config import IA3, AdapterConfig, LoHa, LoKr, LoRA, Ranked, read_adapter_config
from effcli.adapters.tensors import DAMAGED, Tensors
from effcli.errors import CheckpointError, SelectionError, UnsupportedError
from effcli.layers.edits import Edit, Place, Rows, slices
from effcli.layers.result import check_tensor
from effcli.platform import rehearsal
from effcli.reports.units import count

# Before the names of the network's own modules.
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_\w+|lokr_\w+)"
    r"(?:\.(?:(?!bias$)\w+))*?(?P<bias>\.bias)?$"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.(?P<part>trainable_tokens_delta)(\.\w+)?$")
# What stands between the names of modules where PEFT wraps one.
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?|original_module)(?=\.)")
# The tensors of each kind of layer's adapter, where all must be there.
_LORA = ("lora_A", "lora_B")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")

# The tensors of one module, by what they are: their names in the file.
_Parts = Mapping[str, str]


@dataclass(frozen=True)
class Adapter:
    """An adapter in the directory `path`. Its tensors are read when an edit is opened."""

    path: Path
    config: AdapterConfig
    tensors: Tensors

    @staticmethod
    def open(path: Path) -> Adapter:
        """Read the config and the headers; raises what these raise where they are missing, damaged or unknown."""
        return Adapter(path, read_adapter_config(path), Tensors.open(path))

    def edits(self, places: Mapping[str, Place]) -> dict[str, Edit]:
        """What the adapter makes of the parameters of a network, by the names of `places`.

        Raises `SelectionError` where it has something for a place that the network does not have, nothing for one that
        its config names, or tensors whose shapes fit neither each other nor their place.
        """
        return _Reading(self, places).edits()


class _Reading:
    """One adapter on its way to the places of a network."""

    def __init__(self, adapter: Adapter, places: Mapping[str, Place]) -> None:
        self.adapter = adapter
        self.config = adapter.config
        self.places = places
        # The matrices of each stacked parameter.
        self.stacks: dict[str, dict[str, Place]] = {}
        for name, place in places.items():
            if place.kind == "expert":
                self.stacks.setdefault(name.rpartition(".")[0], {})[name] = place
        # The tensors of each module, by how many wrappers stand around it below its own.
        self.modules: dict[str, dict[int, dict[str, str]]] = {}
        # Parameters that were trained whole, or that the adapter brings with it.
        self.whole: dict[str, str] = {}
        # The factors of the stack of experts that was opened last, by the name of the first.
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for key, shape in adapter.tensors.shapes.items():
            # Counters of batch norms are no values.
            if shape:
                self._sort(key)

    def _sort(self, key: str) -> None:
        name = key.removeprefix(_PREFIX)
        found = _TOKENS.match(name) or _PART.match(name)
        if found is None:
            self.whole[_WRAPPERS.sub("", name)] = key
            return
        part = found["part"] + (found.groupdict().get("bias") or "")
        module, depth = re.subn(r"\.base_layer(?=\.|$)", "", found["module"])
        self.modules.setdefault(module, {}).setdefault(depth, {})[part] = key

    def edits(self) -> dict[str, Edit]:
        surplus: list[str] = []
        made: dict[str, Edit] = {}
        for name, key in self.whole.items():
            place = name.removesuffix(".weight") if name.removesuffix(".weight") in self.places else name
            if place in self.places:
                made[place] = self._replaced(place, key)
            else:
                surplus.append(name)
        for module, depths in self.modules.items():
            found = self._module(module, depths)
            if found is None:
                surplus.append(module)
                continue
            for place, edit in found.items():
                made[place] = _after(made[place], edit) if place in made else edit
        if rehearsal.ongoing() is None:
            # In a rehearsal most blocks are not there.
            self._check_surplus(surplus)
        self._check_missing(made)
        if not made:
            raise SelectionError(f"the adapter {self.adapter.path} holds nothing for this network", self._other_model)
        return made

    @property
    def _other_model(self) -> str:
        base = self.config.base_model_name_or_path
        return f"merge it into the model that it was trained on{f', {base}' if base else ''}"

    def _check_surplus(self, surplus: list[str]) -> None:
        if surplus:
            more = f" and for {count(len(surplus) - 1, 'further place')}" if len(surplus) > 1 else ""
            raise SelectionError(
                f"the adapter {self.adapter.path} has tensors for {surplus[0]}{more}, which the network does not have",
                self._other_model,
            )

    def _check_missing(self, made: Mapping[str, Edit]) -> None:
        try:
            missing = [
                name
                for name, place in self.places.items()
                if name not in made
                and place.kind in ("linear", "conv1d", "conv")
                and self.config.targets(name, not place.head)
            ]
        except re.error as error:
            raise CheckpointError(f"{self.adapter.path}: target_modules are no pattern: {error}", DAMAGED) from error
        if missing:
            more = f" and {count(len(missing) - 1, 'further layer')}" if len(missing) > 1 else ""
            raise SelectionError(
                f"the adapter {self.adapter.path} names {missing[0]}{more} as its target and holds no tensors for it",
                f"{self._other_model}; or save the whole adapter again",
            )

    def _module(self, module: str, depths: Mapping[int, _Parts]) -> dict[str, Edit] | None:
        """The edits of one module's places; None where the network has no such module."""
        stacks = self._stacks(module)
        if stacks:
            found: dict[str, Edit] = {}
            for depth, parts in depths.items():
                if depth >= len(stacks):
                    raise self._misfit(module, f"it has {len(depths)} products for {count(len(stacks), 'parameter')}")
                found |= self._experts(module, stacks[len(stacks) - 1 - depth], parts)
            return found
        (parts,) = depths.values() if len(depths) == 1 else ({},)
        if not parts:
            raise self._misfit(module, "it is wrapped several times")
        weight = f"{module}.weight"
        if module in self.places:
            return self._layer(module, self.places[module], parts)
        if weight in self.places:
            return self._embedding(module, weight, parts)
        return None

    def _stacks(self, module: str) -> list[str]:
        """The stacked parameters of a module of experts that the config names, in the module's order."""
        wanted = getattr(self.config, "target_parameters", None)
        if not wanted:
            return []
        found = [name for name in self.stacks if f"{name}.".startswith(f"{module}.")]
        return [name for name in found if any(name == one or name.endswith(f".{one}") for one in wanted)]

    def _layer(self, module: str, place: Place, parts: _Parts) -> dict[str, Edit]:
        config, rows, columns = self.config, place.shape[0], place.shape[1]
        if "trainable_tokens_delta" in parts:
            return {module: self._tokens(module, place, parts["trainable_tokens_delta"])}
        if isinstance(config, LoRA):
            return self._lora(module, place, parts)
        if isinstance(config, IA3):
            return self._ia3(module, place, parts)
        if isinstance(config, LoHa):
            return {module: self._loha(module, (rows, columns), parts)}
        assert isinstance(config, LoKr)
        return {module: self._lokr(module, (rows, columns), parts)}

    def _lora(self, module: str, place: Place, parts: _Parts) -> dict[str, Edit]:
        config = self.config
        assert isinstance(config, LoRA)
        self._expect(module, parts, (*_LORA, *(["lora_magnitude_vector"] if config.use_dora else [])))
        (rank, *inner), (rows, *_) = self._shape(parts["lora_A"]), self._shape(parts["lora_B"])
        columns = torch.Size(inner).numel()
        if self._shape(parts["lora_B"])[1:2] != (rank,):
            raise self._misfit(module, self._shapes(parts, *_LORA))
        self._check_rank(module, rank)
        self._check_shape(module, place, (rows, columns))
        scaling = config.scaling(module)

        def open(weight: Tensor) -> Rows:
            a, b = self._read(parts["lora_A"]).reshape(rank, -1), self._read(parts["lora_B"]).reshape(-1, rank)
            if not config.use_dora:
                return formulas.low_rank(a, b, scaling)
            magnitude = self._read(parts["lora_magnitude_vector"]).reshape(-1)
            return formulas.decomposed(a, b, scaling, magnitude)

        notes = {"adapter": config.named, "rank": rank, "scaling": scaling}
        found = {module: Edit(open, notes)}
        if "lora_B.bias" in parts:
            bias = f"{module}.bias"
            if bias not in self.places:
                raise self._misfit(module, "it adds to a bias, and the layer has none")
            self._check_shape(bias, self.places[bias], self._shape(parts["lora_B.bias"]))
            found[bias] = Edit(lambda _: formulas.sum_with(self._read(parts["lora_B.bias"]).float(), scaling), notes)
        return found

    def _embedding(self, module: str, weight: str, parts: _Parts) -> dict[str, Edit]:
        place = self.places[weight]
        if "trainable_tokens_delta" in parts:
            edit = self._tokens(module, place, parts["trainable_tokens_delta"])
            # A network whose head is tied learns its tokens for both.
            return dict.fromkeys([weight, *(name for name, own in self.places.items() if own.tied == weight)], edit)
        config = self.config
        if not isinstance(config, LoRA):
            raise UnsupportedError(
                f"{self.adapter.path}: {module} is no layer, and {config.kind} is of layers", self._other_model
            )
        self._expect(module, parts, (*_EMBEDDING, *(["lora_magnitude_vector"] if config.use_dora else [])))
        (rank, numbers), (width, other) = (self._shape(parts[name]) for name in _EMBEDDING)
        if rank != other:
            raise self._misfit(module, self._shapes(parts, *_EMBEDDING))
        self._check_rank(module, rank)
        self._check_shape(module, place, (numbers, width))
        scaling = config.scaling(module)

        def open(value: Tensor) -> Rows:
            a, b = (self._read(parts[name]) for name in _EMBEDDING)
            if not config.use_dora:
                return formulas.low_rank(b.t(), a.t(), scaling)
            return formulas.decomposed_embedding(value, a, b, scaling, self._read(parts["lora_magnitude_vector"]))

        return {weight: Edit(open, {"adapter": config.named, "rank": rank, "scaling": scaling})}

    def _experts(self, module: str, stack: str, parts: _Parts) -> dict[str, Edit]:
        """One product for each matrix of a stacked parameter: A (experts · r, in), B (out, r · experts)."""
        config = self.config
        assert isinstance(config, LoRA)
        self._expect(module, parts, _LORA)
        places = self.stacks[stack]
        experts = len(places)
        (ranks, columns), (rows, other) = (self._shape(parts[name]) for name in _LORA)
        if ranks != other or ranks % experts:
            raise self._misfit(stack, self._shapes(parts, *_LORA) + f" for {count(experts, 'expert')}")
        rank = ranks // experts
        self._check_rank(stack, rank)
        scaling = config.scaling(stack)

        def open_one(number: int) -> Callable[[Tensor], Rows]:
            def open(weight: Tensor) -> Rows:
                a, b = self._factors(parts, number == experts - 1)
                a, b = a.view(experts, rank, columns)[number], b.view(rows, rank, experts)[:, :, number]
                return formulas.low_rank(a, b, scaling)

            return open

        for name, place in places.items():
            self._check_shape(name, place, (rows, columns))
        notes = {"adapter": config.named, "rank": rank, "scaling": scaling}
        return {name: Edit(open_one(int(name.rpartition(".")[2])), notes) for name in places}

    def _factors(self, parts: _Parts, last: bool) -> tuple[Tensor, Tensor]:
        """A (experts · r, in) and B (out, r · experts), read once for all experts of a stack and held until the last.

        Those of one stack are held at a time.
        """
        key = parts["lora_A"]
        if key not in self.factors:
            self.factors.clear()
            self.factors[key] = self._read(key), self._read(parts["lora_B"])
        return self.factors.pop(key) if last else self.factors[key]

    def _ia3(self, module: str, place: Place, parts: _Parts) -> dict[str, Edit]:
        config, key = self.config, parts.get("ia3_l")
        assert isinstance(config, IA3)
        self._expect(module, parts, ("ia3_l",))
        assert key is not None
        found, inputs = torch.Size(self._shape(key)).numel(), config.scales_inputs(module)
        rows, columns = place.shape
        # Of a convolution every input channel has as many columns as the kernel has places.
        if (columns % found if inputs else rows - found) or not found:
            raise self._misfit(module, f"a vector of {found} for a layer {place.shape}")
        notes = {"adapter": config.kind, "scales": "inputs" if inputs else "outputs"}

        def factor() -> Tensor:
            return self._read(key).reshape(-1)

        if inputs:
            each = columns // found
            return {module: Edit(lambda _: formulas.scaled_inputs(factor().repeat_interleave(each)), notes)}
        edit = Edit(lambda _: formulas.scaled_outputs(factor()), notes)
        return dict.fromkeys([name for name in (module, f"{module}.bias") if name in self.places], edit)

    def _loha(self, module: str, shape: tuple[int, int], parts: _Parts) -> Edit:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        config, cores = self.config, ("hada_t1", "hada_t2")
        assert isinstance(config, LoHa)
        has_core = any(name in parts for name in cores)
        self._expect(module, parts, (*names, *(cores if has_core else ())))
        first, second = (self._shape(parts[name]) for name in names[:2])
        rank, rows = first if has_core else first[::-1]
        self._check_rank(module, rank)
        scaling = config.scaling(module)
        whole = (rows, second[1])
        if has_core:
            whole = (rows, second[1] * torch.Size(self._shape(parts["hada_t1"])[2:]).numel())
        if whole != shape:
            raise self._misfit(module, f"{self._shapes(parts, *names[:2])} for a layer {shape}")

        def open(weight: Tensor) -> Rows:
            b1, a1, b2, a2 = (self._read(parts[name]) for name in names)
            if not has_core:
                return formulas.hadamard((b1, a1, b2, a2), scaling)
            kernels = [
                formulas.tucker(self._read(parts[core]), left, right)
                for core, left, right in (("hada_t1", b1, a1), ("hada_t2", b2, a2))
            ]
            return formulas.sum_with((kernels[0] * kernels[1]).reshape(shape), scaling)

        return Edit(open, {"adapter": config.kind, "rank": rank, "scaling": scaling})

    def _lokr(self, module: str, shape: tuple[int, int], parts: _Parts) -> Edit:
        config = self.config
        assert isinstance(config, LoKr)
        first = ("lokr_w1",) if "lokr_w1" in parts else ("lokr_w1_a", "lokr_w1_b")
        second = ("lokr_w2",) if "lokr_w2" in parts else ("lokr_w2_a", "lokr_w2_b")
        core = ("lokr_t2",) if "lokr_t2" in parts else ()
        self._expect(module, parts, (*first, *second, *core))
        scaling = config.scaling(module)

        def made() -> Tensor:
            left, right = ([self._read(parts[name]).float() for name in names] for names in (first, second))
            one = left[0] if len(left) == 1 else left[0] @ left[1]
            if core:
                other = formulas.tucker(self._read(parts["lokr_t2"]), *right)
            else:
                other = right[0] if len(right) == 1 else right[0] @ right[1]
            return formulas.kronecker(one, other)

        rows, columns = self._kronecker_shape(parts, first, second, bool(core))
        if (rows, columns) != shape:
            raise self._misfit(module, f"a product ({rows}, {columns}) for a layer {shape}")
        return Edit(lambda _: formulas.sum_with(made(), scaling), {"adapter": config.kind, "scaling": scaling})

    def _kronecker_shape(
        self, parts: _Parts, first: tuple[str, ...], second: tuple[str, ...], core: bool
    ) -> tuple[int, int]:
        """The shape of a product as a matrix."""
        one, other = ([self._shape(parts[name]) for name in names] for names in (first, second))
        kernel = torch.Size(self._shape(parts["lokr_t2"])[2:]).numel() if core else 1
        rows = other[0][1] if core else other[0][0]
        columns = torch.Size(other[-1][1:]).numel() * kernel
        return one[0][0] * rows, one[-1][1] * columns

    def _tokens(self, module: str, place: Place, key: str) -> Edit:
        said = getattr(self.config, "trainable_token_indices", None)
        if isinstance(said, dict):
            said = next((own for name, own in said.items() if module == name or module.endswith(f".{name}")), None)
        shape = self._shape(key)
        if not said or shape != (len(said), place.shape[1]):
            raise self._misfit(module, f"trained tokens {shape}, and the config names {len(said or ())} of them")
        if min(said) < 0 or max(said) >= place.shape[0]:
            raise self._misfit(module, f"token {max(said)} of a vocabulary of {place.shape[0]}")
        numbers = torch.tensor(said)
        return Edit(
            lambda _: formulas.replaced_rows(numbers, self._read(key)), {"adapter": "tokens", "tokens": len(said)}
        )

    def _replaced(self, name: str, key: str) -> Edit:
        place = self.places[name]
        shape = self._shape(key)
        if place.kind == "conv1d":
            shape = shape[::-1]
        if place.kind == "conv":
            shape = (shape[0], torch.Size(shape[1:]).numel())
        self._check_shape(name, place, shape)

        def open(weight: Tensor) -> Rows:
            value = self._read(key)
            return formulas.replaced(value.t() if place.kind == "conv1d" else value.reshape(place.shape))

        return Edit(open, {"adapter": "trained whole"})

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.adapter.tensors.shapes[key]

    def _shapes(self, parts: _Parts, *names: str) -> str:
        return " and ".join(f"{name} {self._shape(parts[name])}" for name in names)

    def _read(self, key: str) -> Tensor:
        tensor = self.adapter.tensors.read(key)
        check_tensor(tensor, f"{self.adapter.path}: {key}", "train the adapter again")
        return tensor

    def _expect(self, module: str, parts: _Parts, names: Iterable[str]) -> None:
        """Raise where a module lacks one of the tensors `names`, or has others."""
        known = {*names, "lora_B.bias"}
        missing = [name for name in known if name not in parts and name != "lora_B.bias"]
        if missing:
            raise SelectionError(
                f"the adapter {self.adapter.path} holds no {missing[0]} for {module}", f"it is not whole: {DAMAGED}"
            )
        strange = [name for name in parts if name not in known]
        if strange:
            raise self._misfit(module, f"it holds {strange[0]}, which its config knows nothing of")

    def _check_rank(self, module: str, rank: int) -> None:
        config = self.config
        if isinstance(config, Ranked) and config.rank(module) != rank:
            raise self._misfit(module, f"its tensors have rank {rank}, its config says {config.rank(module)}")

    def _check_shape(self, name: str, place: Place, shape: tuple[int, ...]) -> None:
        if shape != place.shape:
            raise self._misfit(name, f"it is made for {shape}, and the network has {place.shape}")

    def _misfit(self, module: str, what: str) -> SelectionError:
        return SelectionError(f"the adapter {self.adapter.path} does not fit {module}: {what}", self._other_model)


def _after(first: Edit, second: Edit) -> Edit:
    """`second` on the weight that `first`, which needs only rows, makes: a base that was saved with its adapter."""

    def open(weight: Tensor) -> Rows:
        replace = first.open(weight)
        base = torch.cat([replace(weight[rows].float(), rows) for rows in slices(weight.shape)])
        new = second.open(base)
        return lambda values, rows: new(base[rows].clone(), rows)

    return Edit(open, second.notes)


__all__ = ["Adapter"]
