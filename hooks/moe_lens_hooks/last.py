"""Our hooks run after those of others: what they see is what the module gets.

torch calls hooks in the order in which they were attached, and a pre-hook that was attached after
ours may hand the experts other ids than we saw.
"""

from __future__ import annotations

from typing import Any


def make_last(handle: Any) -> None:
    """Move a hook behind all others of its kind on its module, if it is not the last.

    Args:
        handle: What torch returned when the hook was attached.
    """
    hooks = handle.hooks_dict_ref()  # weak: None once the module is gone
    if hooks and handle.id in hooks and next(reversed(hooks)) != handle.id:
        hooks.move_to_end(handle.id)
