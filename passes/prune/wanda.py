"""Wanda: a weight matters by its magnitude times the norm of its input (arXiv:2306.11695, equation 1)."""

from __future__ import annotations

from torch import Tensor

from effcli.layers.contract import Layer, Needs, Statistics
from effcli.passes.prune._pruning import ScoringPass, by_inputs


class Wanda(ScoringPass):
    """A `wanda` step. Weights of one output compete with each other."""

    @property
    def needs(self) -> Needs:
        return Needs.NORMS

    def scores(self, layer: Layer, seen: Statistics) -> Tensor:
        """|w_ij| · ‖x_j‖, the norm over all tokens, float32 (out, in)."""
        return by_inputs(layer, (seen,))
