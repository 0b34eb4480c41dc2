"""The learning step that never waits for the host: static buffers, and on CUDA one replayed graph.

See docs/step.md for the life of a step.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from ..edges.api import stream_key
from ..errors import InputError, check
from ..host_reads import HostReadError, NoHostReads

if TYPE_CHECKING:
    from .inversion import Learner

Terms = dict[str, torch.Tensor]
# Eager steps before a capture: they compile kernels and let libraries allocate what they keep.
_WARM_UP = 2
_LARGEST_INT32 = 2**31 - 1


class NotCapturableError(RuntimeError):
    """The learning step of these settings or this teacher waits for the host somewhere; the message says where."""


def room_for(edges: int) -> int:
    """Capacity for samples of about so many entries."""
    return edges + edges // 4 + 256


class StaticStep:
    """Learning steps over buffers that stay where they are; on CUDA captured once and replayed.

    Seed, step number, temperature and step sizes are device tensors, edges have a fixed capacity, and nothing is
    read until :meth:`advance` ends. A draw that does not fit stops the run on the device: it and the steps after
    it change nothing, not even the step number, until the host has seen it, made larger buffers and gone on from
    there. Bits therefore do not depend on the capacity. They are those of ``Learner.advance``, except where that keeps
    sparse gradients (large problems on the CPU), whose Adam rounds elsewhere.

    Args:
        learner: what is advanced; between two calls it can be saved, loaded and stepped as ever.
        capacity: entries of the edge buffers at first; default a quarter above what one draw needs.
        graph: capture a CUDA graph; default where the logits are on CUDA. Without one every step is run
            eagerly, by the same code.

    Raises:
        NotCapturableError: a step that waits for the host: estimator "arm", or a teacher that reads the device.
        InputError: a capacity that is no number of edges.
    """

    def __init__(self, learner: Learner, *, capacity: int | None = None, graph: bool | None = None) -> None:
        self.learner = learner
        pseudo, settings = learner.pseudo_graphs, learner.settings
        device = pseudo.logits.device
        if settings.estimator == "arm":
            raise NotCapturableError("estimator 'arm' moves the structure by forward passes, one draw after the other")
        self._most = min(pseudo.layout.num_pairs * (1 if pseudo.layout.directed else 2), _LARGEST_INT32)
        check(capacity is None or capacity >= 0, "capacity", "None or a number of edges", capacity)
        self._graph_wanted = captures_by_default(device) if graph is None else graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured_for: tuple[int, ...] = ()
        steps = range(settings.steps)
        self._temperatures = torch.tensor(
            [settings.temperature_at(step) for step in steps], dtype=torch.float64, device=device
        )
        self._rates = torch.tensor([settings.rates_at(step) for step in steps], dtype=torch.float32, device=device)
        self._rng = stream_key(learner.seed, learner.step, device)
        self._temperature = torch.ones(1, dtype=torch.float64, device=device)
        self._rate = torch.ones(1, 2, dtype=torch.float32, device=device)
        # A draw of more entries stops the run; -1 stops it in any case.
        self._limit = torch.full((), -1, dtype=torch.int64, device=device)
        self._stopped = torch.zeros((), dtype=torch.float32, device=device)
        self._terms: Terms = {}
        self._needed = torch.zeros(1, dtype=torch.int64, device=device)
        self._capacity = self._first_capacity() if capacity is None else min(capacity, self._most)
        with self._on_device():
            self._prepare()

    @property
    def capacity(self) -> int:
        """Entries of the edge buffers at present."""
        return self._capacity

    def advance(self, steps: int) -> Terms:
        """So many optimiser steps, then one read of the device.

        Returns:
            The detached terms of the last step's loss.

        Raises:
            InputError: no step, or more than the settings have left.
        """
        learner = self.learner
        left = learner.settings.steps - learner.step
        check(1 <= steps <= left, "steps", f"1..{left} (what the settings have left)", steps)
        target = learner.step + steps
        with self._on_device():
            self._rng.copy_(stream_key(learner.seed, learner.step, self._rng.device))
            while learner.step < target:
                self._run(target - learner.step)
                learner.step, needed = torch.stack([self._rng[1], self._needed[0]]).tolist()
                if learner.step < target:
                    self._capacity = min(room_for(needed), self._most)
                    self._prepare()
        return {name: term.clone() for name, term in self._terms.items()}

    def _run(self, steps: int) -> None:
        if self._graph is None:
            with self._optimizer_on_device():
                for _ in range(steps):
                    self._step()
            return
        if self._captured_for != self._addresses():
            self._prepare()
        for _ in range(steps):
            self._graph.replay()

    def _step(self) -> None:
        """One step; every line of it is launched without a look at any result."""
        learner, now = self.learner, self._rng[1:]
        torch.index_select(self._temperatures, 0, now, out=self._temperature)
        torch.index_select(self._rates, 0, now, out=self._rate)
        self._terms, edges = learner.backward(
            seed=self._rng[0], step=self._rng[1], temperature=self._temperature, capacity=self._capacity
        )
        assert edges.needed is not None
        self._needed = edges.needed
        torch.gt(edges.needed[0], self._limit, out=self._stopped)
        learner.optimizer.step()
        # A stopped run stays at its step, so that all further draws are the one that did not fit.
        self._rng[1].add_(edges.needed[0] <= self._limit)

    def _prepare(self) -> None:
        """Warm up by steps that are stopped before they change anything, then capture."""
        self._graph = None
        self._limit.fill_(-1)
        try:
            with self._optimizer_on_device():
                with self._side_stream(), _refuse_synchronisation(self._rng.device):
                    with NoHostReads():
                        self._step()
                    for _ in range(_WARM_UP if self._graph_wanted else 0):
                        self._step()
                if self._graph_wanted:
                    self._graph = self._capture()
        except HostReadError as error:
            raise NotCapturableError(str(error)) from error
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self._graph_wanted:
                raise
            raise NotCapturableError(str(error).strip().splitlines()[0][:200]) from error
        finally:
            self._limit.fill_(self._capacity)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), _refuse_synchronisation(self._rng.device):
            self._step()
        self._captured_for = self._addresses()
        return graph

    def _addresses(self) -> tuple[int, ...]:
        """Where the tensors are that a replay writes to and that loading a state may exchange."""
        optimizer = self.learner.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        return tuple(t.data_ptr() for t in (*parameters, *states, self.learner.pseudo_graphs.features))

    def _first_capacity(self) -> int:
        learner = self.learner
        step = min(learner.step, max(learner.settings.steps - 1, 0))
        with torch.no_grad():
            sample = learner.pseudo_graphs.sample(
                seed=learner.seed,
                step=step,
                temperature=learner.settings.temperature_at(step),
                estimator=learner.settings.estimator,
            )
        return min(room_for(sample.num_edges), self._most)

    @contextlib.contextmanager
    def _optimizer_on_device(self) -> Iterator[None]:
        """Adam with its step sizes in device memory, and a flag there that makes its step change nothing.

        Outside, its groups hold plain numbers, as a saved state should.
        """
        optimizer = self.learner.optimizer
        before = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self._rate[0], strict=False):
            group.update(lr=rate, capturable=True)
        # The protocol of gradient scaling: fused optimisers skip a step whose found_inf is 1.
        optimizer.found_inf = self._stopped  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
            for group, (lr, capturable) in zip(optimizer.param_groups, before, strict=True):
                group.update(lr=lr, capturable=capturable)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        device = self._rng.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    @contextlib.contextmanager
    def _side_stream(self) -> Iterator[None]:
        """A stream of its own on CUDA, where work that precedes a capture has to run."""
        if self._rng.device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


@contextlib.contextmanager
def _refuse_synchronisation(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captures_by_default(device: torch.device) -> bool:
    return device.type == "cuda"


def stepper(learner: Learner, capture: bool | None = None) -> Callable[[int], Terms]:
    """How to advance a learner by some steps, as fast as it can be.

    Args:
        learner: what is advanced.
        capture: True for :class:`StaticStep` on any device, False for ``Learner.advance``, None for
            StaticStep on CUDA, where a step that cannot be captured is run plainly, after one notice.

    Returns:
        A function from a number of steps to the terms of the last one's loss.

    Raises:
        InputError: `capture` is True and the step cannot be captured; the message says why.
    """

    def plain(steps: int) -> Terms:
        terms: Terms = {}
        for _ in range(steps):
            terms = learner.advance()
        return terms

    device = learner.pseudo_graphs.logits.device
    if not (captures_by_default(device) if capture is None else capture):
        return plain
    try:
        return StaticStep(learner).advance
    except NotCapturableError as error:
        if capture:
            raise InputError(
                f"capture: expected a step that never waits for the host, got one that does: {error}"
            ) from error
        warnings.warn(
            f"acgkd_fast learns without a CUDA graph, slower and with the same results: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return plain
