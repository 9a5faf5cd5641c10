"""What training leaves in a checkpoint next to the weights: averages, losses, optimizer states."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from sdconv.checkpoint.assemble import averaged
from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.identify.infer import Identified
from sdconv.checkpoint.identify.other_names import EMA_PART
from sdconv.checkpoint.open import SourceView
from sdconv.errors import WeightsMismatchError

_LOSS = re.compile(r"(?:(?:first_stage_model|vae)\.)?(?:loss\..+|logvar)")
_OPTIMIZER = re.compile(
    r"(?:optimizers?|optimizer_states?|optim|opt_state|lr_schedulers?|grad_scaler|scaler|callbacks"
    r"|loops)\..+",
    re.IGNORECASE,
)


def take_averages(networks: Sequence[tuple[SourceView, Identified]], where: str) -> tuple[str, ...]:
    """Puts running averages in the place of the weights of the networks that have them.

    Returns:
        The components of those networks.

    Raises:
        UnknownNetworkError: none has. WeightsMismatchError: some are missing, or of another shape.
    """
    having = [pair for pair in networks if pair[1].found.ema] or networks[:1]
    for view, network in having:
        averages = averaged(network, where).found.names
        pairs = {weight: averages[own] for own, weight in network.found.names.items()}
        for weight, average in pairs.items():
            if view.shapes[weight] != view.shapes[average]:
                raise WeightsMismatchError(
                    "a running average has another shape than its weight",
                    where=where,
                    expected=f"{weight} {view.shapes[weight]}",
                    got=f"{average} {view.shapes[average]}",
                )
        view.substitute({weight: view.home(average) for weight, average in pairs.items()})
    return tuple(network.component for _, network in having)


def leave_out(
    view: SourceView, networks: Sequence[DetectedNetwork], *, averages: bool, training: bool
) -> Counter[str]:
    """Leaves tensors out of a checkpoint that its networks do not need.

    Args:
        view: the tensors.
        networks: those in it.
        averages: whether running averages are left out.
        training: whether losses and optimizers' states are.

    Returns:
        The number of tensors by the first word of their names.
    """
    names: set[str] = set()
    if averages:
        names |= _averages_in(view.shapes, networks)
    if training:
        names |= _training_state_in(view.shapes, networks)
    view.leave_out(names)
    return Counter(name.partition(".")[0] if "." in name else "" for name in sorted(names))


def _averages_in(names: Iterable[str], networks: Sequence[DetectedNetwork]) -> set[str]:
    """The names of running averages, and of their counters (``model_ema.decay``).

    Args:
        names: every tensor's.
        networks: those that were found; what is one of their weights is not an average, as in a
            file of nothing but averages.
    """
    weights = {name for one in networks for name in one.names.values()}
    known = {name for one in networks for name in one.ema.values()}
    return {name for name in names if name in known or EMA_PART.search(name)} - weights


def _training_state_in(names: Iterable[str], networks: Sequence[DetectedNetwork]) -> set[str]:
    """The names of losses and of optimizers' states; ``networks``: as for ``_averages_in``."""
    weights = {name for one in networks for name in one.names.values()}
    losses = {name for one in networks for name in one.dropped}
    return {
        name
        for name in names
        if name in losses or _LOSS.fullmatch(name) or _OPTIMIZER.fullmatch(name)
    } - weights
