"""A pass that trains an adapter, carried out on a language model: the checkpoint as it was, the adapter beside it.

Layers that are compressed run packed, everything else in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effcli.errors import UnsupportedError
from effcli.files.checkpoint import copy_checkpoint
from effcli.files.layout import ADAPTER
from effcli.language import peft_modules
from effcli.language.ledger import other_rows
from effcli.language.open_block import held
from effcli.language.training import TokenExamples, TokenNetwork, TrainingRequest, and_more
from effcli.language.weights import Weights, open_weights
from effcli.layers.attaching import told
from effcli.layers.contract import AdapterPass, Beside, Needs
from effcli.layers.layer import LayerSite
from effcli.layers.learning import Learning
from effcli.layers.result import PassResult
from effcli.layers.selection import Choice, choose
from effcli.reports.report import LedgerRow
from effcli.training import loop


def taken(step: str, choices: Mapping[str, Choice]) -> dict[str, AdapterPass]:
    """The layers that get an adapter, and their options; `UserError` for options that a layer cannot have.

    Experts in stacks get none.
    """
    found = {}
    for name, choice in choices.items():
        if choice.config is not None and choice.site.index is None:
            assert isinstance(choice.config, AdapterPass)
            choice.config.numbers(name, choice.site.shape)
            found[name] = choice.config
    if not found:
        raise UnsupportedError(f"{step} would train beside experts in stacks alone", "take in other layers")
    return found


def train_adapter(request: TrainingRequest) -> PassResult:
    """Carry out a step that trains an adapter; see `effcli.language.training.train_language`.

    Raises `UnfinishedError` for a snapshot that is damaged.
    """
    options = request.seeded()
    assert isinstance(options, AdapterPass)
    weights = open_weights(request.source, request.trust_remote_code)
    choices = choose(weights.skeleton, request.step)
    layers = taken(request.step.name, choices)
    data, remarks = TokenExamples.of(request.windows, options.learns_answers)
    network: Any = request.load(request.source, packed=True)
    with loop.seeded(options.seed or 0), peft_modules.quiet():
        config = options.adapter(layers)
        _note_storage(config, [choices[name].site for name in layers], weights)
        model = peft_modules.attach(network, config)
    before = None
    if Needs.ORIGINAL in options.needs:
        before = open_weights(request.original, request.trust_remote_code, "float32")
    beside = {
        name: _beside(choices[name].site, own, peft_modules.module_of(model, name), name in weights.stored, before)
        for name, own in layers.items()
    }
    with torch.no_grad():
        options.begin(beside)
    teachers = {}
    if Needs.ORIGINAL in options.needs and Needs.LABELS not in options.needs:
        teachers["original"] = TokenNetwork(request.load(request.original))

    def set_training(training: bool) -> None:
        for one in beside.values():
            one.module.train(training)

    learning = Learning(TokenNetwork(model), options, teachers, set_training)
    parameters = {name: [own for own in one.module.parameters() if own.requires_grad] for name, one in beside.items()}
    objective = learning.objective(options.optimizer(parameters))
    with request.recomputing(network, weights):
        training = loop.train(objective, data, options, **request.how(data))
    with torch.no_grad(), peft_modules.quiet():
        config, tensors = options.finish(beside, config)
        _note_storage(config, [choices[name].site for name in layers], weights)
    copy_checkpoint(request.source, request.target)
    peft_modules.save(model, config, tensors, request.target / ADAPTER)
    trained = sum(own.numbers(name, choices[name].site.shape) for name, own in layers.items())
    result = PassResult(ledger=[*_rows(weights, choices, layers), *other_rows(weights)], training=training)
    stacked = [name for name, own in choices.items() if own.config is not None and name not in layers]
    if stacked:
        remarks.append(f"{stacked[0]}{and_more(stacked, 'expert')} of stacks have no adapter")
    share = trained / weights.skeleton.weights()
    result.remarks = [
        *remarks,
        f"trained {trained:,} numbers beside the weights, {share:.2%} of them; `merge` adds them to the weights",
        told(training, options, changed=training.kept > 0, what="the adapter's numbers"),
    ]
    return result


def _note_storage(config: Any, sites: list[LayerSite], weights: Weights) -> None:
    """Tell PEFT of weights that are stored (in, out), which packed ones never are."""
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = all(site.transposed and site.name not in weights.stored for site in sites)


def _beside(site: LayerSite, options: AdapterPass, module: Any, packed: bool, before: Weights | None) -> Beside:
    base = module.get_base_layer()

    def weight() -> Tensor:
        value: Tensor = base.weight.detach()
        return value if packed else site.view(value)

    def original() -> Tensor:
        assert before is not None
        stored = before.packed(site.name)
        if stored is not None:
            return stored.effective(torch.float32)
        return site.view(before.parameter(site.parameter)).float()

    return Beside(module, options, packed, weight, original)


def _rows(weights: Weights, choices: Mapping[str, Choice], layers: Mapping[str, AdapterPass]) -> list[LedgerRow]:
    """The layers as they stay, with what is trained beside them."""
    rows = []
    for name, choice in choices.items():
        reason, notes = choice.reason, {}
        if name in layers:
            reason = "an adapter stands beside it"
            notes = {"trained": layers[name].numbers(name, choice.site.shape)}
        rows.append(held(weights, choice.site).row(choice.site, "kept", reason=reason, notes=notes))
    return rows


__all__ = ["taken", "train_adapter"]
