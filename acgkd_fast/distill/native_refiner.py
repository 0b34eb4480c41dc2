"""The Refiner's steps by the search operator, many per call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..nn.models import GraphClassifier
from ..search import PackedTeacher, pack_teacher, search_steps, why_unsupported
from ..search.api import SearchState

if TYPE_CHECKING:
    from .refiner import Refiner

# Each call starts with one forward pass over the whole pool, and needs room for as many edges.
STEPS_PER_CALL = 256


def choose_native(refiner: Refiner) -> PackedTeacher | None:
    """The packed teacher where the native path is to run, None for the generic one.

    Raises:
        InputError: an engine or interval that this search cannot have.
    """
    settings = refiner.settings
    if settings.engine != "generic":
        reason = why_unsupported(refiner.teacher, refiner._x)
        if refiner._constraint is not None:
            reason = "a constraint is given, a Python function that compiled code cannot call"
        if reason is None:
            assert isinstance(refiner.teacher.module, GraphClassifier)
            return pack_teacher(refiner.teacher.module)
        if settings.engine == "native":
            raise InputError(f"engine: expected 'auto' or 'generic' for this search, got 'native', but {reason}")
    if settings.interval != 1:
        raise InputError(f"interval: expected 1 for the generic engine, got {settings.interval}")
    return None


def advance_native(refiner: Refiner, packed: PackedTeacher, steps: int) -> None:
    """Take `steps` steps rounded up to whole intervals, but no more than one call's."""
    settings, here = refiner.settings, refiner.step
    stop = here + min(steps, STEPS_PER_CALL)
    if settings.temperature > 0.0:
        # The lowest energy is looked for at multiples of this.
        stop = min(stop, (here // refiner.CHECK_EVERY + 1) * refiner.CHECK_EVERY)
    # Rounds that ended with the call would make the search depend on how it is called.
    steps = min(-(-stop // settings.interval) * settings.interval, settings.steps) - here
    labelled = refiner._num_labels > 1
    label = refiner._x.argmax(1) if labelled else torch.zeros_like(refiner._x[:, 0], dtype=torch.int64)
    level = torch.stack([refiner._excess, refiner._trace[-1]])
    state, trace, taken, accepted = search_steps(
        packed,
        refiner._energy,
        SearchState(refiner._lists, label, refiner._scores, refiner._total, level),
        refiner._x,
        refiner._y,
        refiner._ptr,
        refiner._ids,
        seed=refiner.seed,
        first_step=refiner.step,
        steps=steps,
        edited=refiner._edited,
        mix=refiner._mix,
        num_labels=refiner._num_labels,
        interval=settings.interval,
        temperature=settings.temperature,
        stop_k=None if refiner._unlabelled else settings.stop_k,
        min_steps=settings.min_steps,
        proposals=settings.proposals,
        limits=refiner._limits,
        weights=refiner._weights,
    )
    refiner._lists, refiner._scores, refiner._total = state.lists, state.scores, state.total
    refiner._excess = state.level[0]
    if labelled:
        refiner._x = refiner._label_rows[state.label]
    refiner._trace += trace.unbind()
    refiner.step += taken
    refiner.accepted += accepted
