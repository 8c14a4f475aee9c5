"""The text stream against a frame-by-frame account of moshi-finetune's interleaver."""

from __future__ import annotations

from data_support import FACTS, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from ttt_cache.training.data.text import text_stream
from ttt_cache.training.data.transcript import Word

RATE = 12.5
PAD, END = FACTS.text_padding, FACTS.end_of_text_padding


def oracle(words: list[Word], frames: int) -> list[int]:
    """Frame by frame: the words that have begun queue up, a newer one clears the queue."""
    waiting = [w for w in words if w.speaker == "SPEAKER_MAIN" and w.end > w.start]
    queue: list[int] = []
    out: list[int] = []
    for frame in range(frames):
        while waiting and waiting[0].start * RATE < frame + 1:
            queue = list(tiny_tokenizer().encode(waiting.pop(0).text))
        if not queue:
            out.append(PAD)
            continue
        if out and out[-1] == PAD:
            out[-1] = END
        out.append(queue.pop(0))
    return out


@st.composite
def transcripts(draw: st.DrawFn) -> list[Word]:
    words = []
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.floats(-1, 5) | st.sampled_from([0.08, 0.16, 0.24, 0.0]))
        end = start + draw(st.sampled_from([0.0, 0.1, 0.5]))
        text = draw(st.sampled_from(["hello", "how", "my", "friend", "thank you", ""]))
        speaker = draw(st.sampled_from(["SPEAKER_MAIN", "SPEAKER_MAIN", "SPEAKER_01"]))
        words.append(Word(text, start, end, speaker))
    return sorted(words, key=lambda word: word.start)


@given(transcripts(), st.integers(1, 60))
def test_words_are_laid_as_moshi_finetune_lays_them(words: list[Word], frames: int) -> None:
    stream = text_stream(words, frames, RATE, tiny_tokenizer(), FACTS)
    assert stream.tolist() == oracle(words, frames)


def test_by_hand() -> None:
    hello, how = tiny_tokenizer().encode(["hello", "how"])
    assert len(hello) > 2 and PAD not in hello
    words = [
        Word("hello", 0.4, 0.9, "SPEAKER_MAIN"),
        Word("mm", 0.5, 0.9, "SPEAKER_OTHER"),
        Word("how", 0.4 + 0.16, 1.2, "SPEAKER_MAIN"),
    ]
    stream = text_stream(words, 20, RATE, tiny_tokenizer(), FACTS).tolist()
    assert stream[:5] == [PAD] * 4 + [END], "the frame before a word says that padding ends"
    assert stream[5:7] == hello[:2], "the next word cuts off the rest"
    assert stream[7 : 7 + len(how)] == how
    assert stream[7 + len(how) :] == [PAD] * (13 - len(how))


def test_line_ends_within_a_word_and_space_around_it() -> None:
    clean, split = (
        text_stream([Word(text, 0, 1, "SPEAKER_MAIN")], 40, RATE, tiny_tokenizer(), FACTS)
        for text in ("hello how", " hello\nhow \n")
    )
    pieces = [*tiny_tokenizer().encode("hello"), *tiny_tokenizer().encode("how")]
    assert split.tolist()[: len(pieces)] == pieces
    assert clean.tolist()[: len(pieces)] == tiny_tokenizer().encode("hello how")
