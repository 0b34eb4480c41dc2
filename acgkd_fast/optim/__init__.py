"""Optimisers for edge logits."""

from .api import Adam

__all__ = ["Adam"]
