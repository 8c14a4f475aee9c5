"""From moshi-finetune's data format to batches: checked, tokenised once, streamed in file order."""

from .facts import LMFacts
from .prepare import prepare
from .sessions import Sessions, SessionSource
from .shards import TokenCache
from .stream import Batch, SegmentStream

__all__ = [
    "Batch",
    "LMFacts",
    "SegmentStream",
    "SessionSource",
    "Sessions",
    "TokenCache",
    "prepare",
]
