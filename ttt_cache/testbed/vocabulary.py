"""What the testbed's tokens mean: text in Moshi's places, and two codebooks for each speaker.

The first codebook says what is heard (semantic), the second in which voice (acoustic).
"""

from __future__ import annotations

KEYS, VALUES, WORDS, VOICES = 16, 32, 16, 8
SHADES = 8  # acoustic codes of one voice

# Text: 0 to 3 are as in Moshi's tokenizer, 3 is padding.
PADDING, FIRST_VALUE_TEXT = 3, 4
FIRST_WORD_TEXT = FIRST_VALUE_TEXT + VALUES
TEXT_CARD = 64

SILENCE, ASK, TURN, FIRST_KEY = 0, 1, 2, 3
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_WORD = FIRST_VALUE + VALUES
QUIET = VOICES * SHADES  # the acoustic code of silence
# A key sounds alike in every voice. Acoustic codes come a frame late (Moshi's delays), so a key's
# arrives together with the value that follows the key.
FIRST_SPELLED = QUIET + 1
CARD = FIRST_SPELLED + KEYS

# Channels of a frame: Moshi's text and two codebooks, then the user's; as in Moshi's own config.
TEXT, MOSHI, MOSHI_VOICE, USER, USER_VOICE = range(5)
DELAYS = [0, 0, 1, 0, 1]

_NAMES = """amber apple arrow basil cedar cloud coral daisy delta ember fable flint grape hazel
ivory jade lemon lilac mango maple ocean olive onyx pearl plum quartz raven ruby sage tulip umber
violet"""
_FILLERS = "and but so well then there here now when while with from about into over again"
_FACTS = "boat book bowl chair coat cup door flag hat house kite lamp ring shoe table wall"
NAMES, FILLERS, FACTS = _NAMES.split(), _FILLERS.split(), _FACTS.split()  # values, words, keys


def shade(semantic: int) -> int:
    """Which of a voice's acoustic codes goes with a semantic code."""
    return (semantic * 5 + 3) % SHADES


def text_pieces() -> list[str]:
    """The text tokens from `FIRST_VALUE_TEXT` on."""
    return [*NAMES, *FILLERS]
