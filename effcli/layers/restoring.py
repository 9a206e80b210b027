"""What is left of a layer's inputs makes up for those that were removed: least squares under their Gram matrix.

With K the columns that stay, R those that go and G = X Xᵀ / n the layer's Gram matrix, the weight that stays becomes

    W'_K = W_K + W_R G_RK (G_KK + λ·I)⁻¹,

which minimizes ‖W X - W'_K X_K‖² / n + λ ‖W'_K - W_K‖². With λ = 0 it is the least squares of He et al.
(arXiv:1707.06168, equation 4), W G_:K G_KK⁻¹. The damping draws it to the weight as it was, so that the error never
passes that of removing the columns alone. A layer with a bias takes the mean of what is lost into it; G is then that of
the centred inputs.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effcli.errors import NumericsError
from effcli.layers.contract import Layer, LayerPass, Needs, Outcome, Statistics
from effcli.layers.coupling import Coupled, Cut, staying
from effcli.layers.cutting import Offered, columns_of
from effcli.layers.layer import LayerSite
from effcli.layers.result import ratio
from effcli.options import Options

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep

# The first damping to try where the factorization fails, as a share of the mean diagonal.
_LEAST_DAMPING = 1e-8


class Removal(Options):
    """The columns that a layer loses, ascending, and how much its least squares are damped; None fits nothing."""

    columns: tuple[int, ...]
    damping: float | None


class Restoring(LayerPass):
    """What is left of layers once columns are removed from them. removed: by layer."""

    removed: dict[str, Removal]

    @property
    def needs(self) -> Needs:
        fits = any(removal.damping is not None for removal in self.removed.values())
        return Needs.GRAM | Needs.MEANS if fits else Needs.NOTHING

    def apply(self, layer: Layer, seen: Statistics) -> Outcome:
        removal = self.removed[layer.name]
        kept = torch.ones(layer.weight.shape[1], dtype=torch.bool)
        kept[list(removal.columns)] = False
        kept = kept.to(layer.weight.device)
        plain = layer.weight * kept
        if removal.damping is None or not removal.columns or not seen.tokens:
            return Outcome(plain)
        weight, gram = layer.weight.double(), seen.matrix.double() / seen.tokens
        mean = seen.mean.double() if layer.biased else torch.zeros_like(seen.mean).double()
        gram -= torch.outer(mean, mean)
        fitted, damping = restored(weight, gram, kept, removal.damping, layer.name)
        if layer.mask is not None:
            fitted *= layer.mask.kept
        # Rounding, or a mask, may leave a row worse off than without.
        bound = _errors(weight - plain, gram)
        better = _errors(weight - fitted, gram) < bound
        fitted = torch.where(better.unsqueeze(1), fitted, plain)
        # Of what removing the columns alone costs, the mean is a part.
        lost = (bound + ((weight - plain) @ mean).square()).sum()
        whole = (_errors(weight, gram) + (weight @ mean).square()).sum()
        return Outcome(
            fitted.float(),
            {"unrestored_error": ratio(float(lost), float(whole)), "damping": damping},
            shift=((weight - fitted) @ mean).float() if layer.biased else None,
        )


def restored(weight: Tensor, gram: Tensor, kept: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """The weight (out, in), 0 in the columns that go, and elsewhere what makes up for them; and the damping it took.

    gram: float64 (in, in), a mean over tokens; kept: bool (in,); damping: λ as a share of the mean diagonal of what
    stays. Raises what `damped_factor` raises.
    """
    made = weight * kept
    own = gram[kept][:, kept]
    size = own.diagonal().mean() if len(own) else gram.new_zeros(())
    if float(size) == 0:
        return made, damping
    missed = weight[:, ~kept] @ gram[~kept][:, kept]
    lower, damping = damped_factor(own, damping, float(size), name)
    made[:, kept] += torch.cholesky_solve(missed.T, lower).T
    return made, damping


def damped_factor(gram: Tensor, damping: float, size: float, name: str) -> tuple[Tensor, float]:
    """The Cholesky factor of G + λ·size·I, and the λ it took; gram: G, float64 (in, in), whose diagonal is overwritten.

    damping: λ, raised tenfold where the matrix has no factor. Raises `NumericsError` that names the layer where no
    damping up to one is enough.
    """
    diagonal = gram.diagonal().clone()
    while True:
        gram.diagonal().copy_(diagonal + damping * size)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not int(failed):
            return lower, damping
        if damping >= 1:
            break
        damping = min(max(10 * damping, _LEAST_DAMPING), 1.0)
    raise NumericsError(
        f"the Gram matrix of the inputs of {name} has no Cholesky factor",
        "give more calibration data, or neither restore nor rank by inputs: restore=false, criterion=magnitude",
    )


def _errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d G dᵀ of each row of a difference (out, in): float64 (out,)."""
    return ((difference @ gram) * difference).sum(1)


def restoring(step: PassStep, sites: Iterable[LayerSite], offered: Offered, cuts: Iterable[Cut]) -> PassStep | None:
    """The step that restores the layers behind `cuts`; None where the pass wants none restored.

    sites: all layers of the network.
    """
    cuts = list(cuts)
    groups = [one.coupled for one in cuts if offered.chosen[one.coupled.name].restoring is not None]
    return removing(step, sites, offered, cuts, groups) if any(map(offered.readers, groups)) else None


def removing(
    step: PassStep, sites: Iterable[LayerSite], offered: Offered, cuts: Iterable[Cut], groups: Iterable[Coupled]
) -> PassStep:
    """The step that leaves zeros where `cuts` take columns of the layers that read `groups`.

    What is left of these layers is restored where the pass wants that of any group that they lose columns of, with the
    largest damping among these. sites: all layers of the network.
    """
    cuts = list(cuts)
    stay = staying(cuts)
    dampings: dict[str, float] = {}
    for one in cuts:
        damping = offered.chosen[one.coupled.name].restoring
        if damping is None:
            continue
        for _, site in offered.readers(one.coupled):
            dampings[site.name] = max(damping, dampings.get(site.name, 0.0))
    removed: dict[str, Removal] = {}
    for group in groups:
        for _, site in offered.readers(group):
            own = stay.get((site.parameter, site.column_axis))
            gone = () if own is None else tuple(columns_of(site, ~own).nonzero().flatten().tolist())
            removed[site.name] = Removal(columns=gone, damping=dampings.get(site.name))
    others = tuple(glob.escape(site.name) for site in sites if site.name not in removed)
    return step.model_copy(update={"config": Restoring(removed=removed, ignore=others)})


__all__ = ["Removal", "Restoring", "damped_factor", "removing", "restored", "restoring"]
