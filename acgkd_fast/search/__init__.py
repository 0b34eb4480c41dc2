"""Many steps of the search over hard graphs in one operator call, for teachers of this package's own blocks."""

from .api import search_steps, why_unsupported
from .packing import PackedTeacher, pack_teacher

__all__ = ["PackedTeacher", "pack_teacher", "search_steps", "why_unsupported"]
