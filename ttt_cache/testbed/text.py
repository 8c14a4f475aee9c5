"""The testbed's text tokenizer: a SentencePiece model with one piece for each word."""

from __future__ import annotations

import io

from sentencepiece import SentencePieceTrainer

from . import vocabulary as v

SPACE = "\u2581"  # which begins a piece that begins a word, as in Moshi's tokenizer


def tokenizer_model() -> bytes:
    """The file: unknown, begin, end and padding as in Moshi's, then `vocabulary.text_pieces()`.

    Further pieces, which no conversation uses, fill it up to `vocabulary.TEXT_CARD`, so that
    whatever token a model chooses has a piece. SentencePiece wants one of them to be a letter.
    """
    words = [SPACE + word for word in v.text_pieces()]
    free = v.TEXT_CARD - v.FIRST_VALUE_TEXT - len(words) - 1
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a"]),
        model_writer=model,
        model_type="char",
        vocab_size=v.TEXT_CARD,
        user_defined_symbols=[*words, *(f"<free{number}>" for number in range(free))],
        pad_id=v.PADDING,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()
