"""Word error rate: what was heard against what was said."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence


def wer(said: Sequence[str], heard: Sequence[str]) -> float:
    """Errors per word said, over all texts together; case and punctuation do not count.

    By jiwer if that is installed, else by the edit distance of Wagner and Fischer (1974): it is the
    same figure. Texts in which nothing is said are left out.

    Args:
        said, heard: texts, pair by pair.

    Raises:
        ValueError: there are not as many of both, or nothing is said at all.
    """
    if len(said) != len(heard):
        raise ValueError(f"heard must have as many texts as said ({len(said)}), got {len(heard)}")
    pairs = [(words(one), words(other)) for one, other in zip(said, heard, strict=True)]
    pairs = [(one, other) for one, other in pairs if one]
    if not pairs:
        raise ValueError("said must hold at least one word, got none")
    if importlib.util.find_spec("jiwer"):
        import jiwer  # type: ignore[import-not-found]

        both = ([" ".join(text) for text in texts] for texts in zip(*pairs, strict=True))
        return float(jiwer.wer(*both))
    errors = sum(edits(one, other) for one, other in pairs)
    return errors / sum(len(one) for one, _ in pairs)


def words(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation."""
    return re.findall(r"\w+(?:['\u2019]\w+)*", text.lower())


def edits(first: Sequence[str], second: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (one != other))
    return row[-1]
