"""The testbed's text tokenizer: a SentencePiece model with one piece for each word."""

from __future__ import annotations

import io

from sentencepiece import SentencePieceTrainer

from . import vocabulary as v

SPACE = "\u2581"  # which begins a piece that begins a word, as in Moshi's tokenizer


def tokenizer_model() -> bytes:
    """The file: unknown, begin, end and padding as in Moshi's, then `vocabulary.text_pieces()`.

    SentencePiece wants letters beside the given words: one more piece follows, which no
    conversation uses. All fit into `vocabulary.TEXT_CARD`.
    """
    words = [SPACE + word for word in v.text_pieces()]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a"]),
        model_writer=model,
        model_type="word",
        vocab_size=v.FIRST_VALUE_TEXT + len(words) + 1,
        user_defined_symbols=words,
        pad_id=v.PADDING,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()
