"""How kernels mark what they are compiled for: Triton looks for the name `constexpr`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    constexpr = Any  # of which type checkers know no attributes, though it has those of its value
else:
    from triton.language import constexpr

__all__ = ["constexpr"]
