"""Where the operators are declared, and which kernels stand behind them.

Schemas, fakes and plain-torch kernels are registered from Python, so an operator exists whether or
not the native extension was built. The extension adds kernels for its devices; the dispatcher
prefers those, and runs the plain-torch one elsewhere, after one clear notice.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import _native

NAMESPACE = "acgkd_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
_references: dict[str, Callable[..., Any]] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Declare one operator.

    Args:
        schema: name and signature, without the namespace.
        reference: plain-torch implementation, run where no native kernel is registered.
        fake: shapes and dtypes only, for torch.compile and opcheck.

    Returns:
        The qualified name, ``acgkd_fast::name``.
    """
    name = schema.split("(", 1)[0].strip()
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(reference)
    def run_reference(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if device == "cuda" and name not in _native.TRITON_OPS:
            register_triton()
            if name in _native.TRITON_OPS:
                return getattr(getattr(torch.ops, NAMESPACE), name)(*args)
        _notice(device)
        return reference(*args)

    _library.impl(name, run_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake)
    _references[name] = reference
    return qualified


def differentiate(qualified: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach a gradient to an operator whose schema has no defaults and no lists.

    As ``torch.library.register_autograd`` does, which reads the schema anew in every call: 60 us a call on a slow core,
    a fifth of an inversion step on small graphs.

    Args:
        qualified: what :func:`define` returned.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs; see :func:`first_order`. The
            gradient of an output that nobody used is None.
        setup_context: (ctx, inputs, output), called after the operator ran.
    """
    name = qualified.removeprefix(f"{NAMESPACE}::")
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*args)
        # Outputs without a gradient, index tensors among them, would each get a tensor of zeros in every backward.
        ctx.set_materialize_grads(False)
        setup_context(ctx, args, output)
        return output

    def backward_if_used(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(first_order(backward_if_used))}
    function: Any = type(f"{name}_gradient", (torch.autograd.Function,), members)

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    _library.impl(name, run, "Autograd")


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a gradient formula refuse ``create_graph=True``, of which torch would make a warning and zeros."""

    @functools.wraps(backward)
    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{NAMESPACE}: second derivatives (create_graph=True) are not implemented")
        return backward(*args)

    return checked


def why_missing(device: str) -> str:
    """One sentence or two on why no kernel of ours serves a device type."""
    refusal = register_triton() if device == "cuda" else None
    return _native.why_missing(device) + (f" {refusal}" if refusal else "")


def register_triton() -> str | None:
    """Put the Triton kernels behind the operators on CUDA tensors; None, or why that cannot be done."""
    try:
        kernels = importlib.import_module("acgkd_fast.kernels")
    except ImportError as error:
        return f"acgkd_fast.kernels is not installed ({error})."
    refusal: str | None = kernels.register()
    return refusal


@functools.cache
def _notice(device: str) -> None:
    warnings.warn(
        f"acgkd_fast runs plain torch on {device} tensors: {why_missing(device)} Results are the same, slower. "
        "See `acgkd-fast doctor`.",
        RuntimeWarning,
        stacklevel=4,
    )


def backend(name: str, device: torch.device | str) -> str:
    """Which kernel the dispatcher runs for an operator: "native", "triton" or "reference"."""
    key = "CUDA" if torch.device(device).type == "cuda" else "CPU"
    if key == "CUDA":
        register_triton()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        return "reference"
    return "triton" if name in _native.TRITON_OPS and key == "CUDA" else "native"


def operators() -> list[str]:
    """Names of all operators declared so far."""
    return list(_references)


def reference(name: str) -> Callable[..., Any]:
    """The plain-torch implementation of an operator, the oracle of its other kernels."""
    return _references[name]


_native.load()
