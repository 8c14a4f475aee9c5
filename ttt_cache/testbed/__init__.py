"""A small Moshi that was trained for this library, and the conversations that it was trained on.

`load()` gives the model, `stream` makes conversations, `adapter(name)` names a trained memory.
"""

from .files import FOLDER, adapter, checkpoint, load, tokenizer

__all__ = ["FOLDER", "adapter", "checkpoint", "load", "tokenizer"]
