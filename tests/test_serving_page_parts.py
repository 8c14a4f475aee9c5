"""Parts of the page by themselves, in a browser: resampling, sound that waits, words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from page_support import Page, with_page

some = settings(max_examples=15, suppress_health_check=list(HealthCheck))
RESAMPLE = """
    const { Resampler } = await import("/page/resample.js");
    const sound = Float32Array.from({ length: cuts.at(-1) }, (_, n) => Math.sin(tone * n / from));
    const resampler = new Resampler(from, to), made = [];
    cuts.forEach((end, n) => made.push(...resampler.process(sound.slice(cuts[n - 1] ?? 0, end))));
    return made;"""
WAIT = """
    const { JitterBuffer } = await import("/page/jitter.js");
    const buffer = new JitterBuffer(rate), heard = [];
    let arrived = 0;
    for (const [arrives, count] of steps) {
      const samples = new Float32Array(count);
      if (arrives) buffer.push(samples.map(() => ++arrived));
      else buffer.take(samples);
      if (!arrives) heard.push([...samples]);
    }
    return { ...buffer, heard, arrived };"""


def script(page: Page, code: str, **values: Any) -> Any:
    """What an asynchronous piece of JavaScript returns."""
    return page.run(f"return (async ({', '.join(values)}) => {{{code}}})(...arguments)",
                    *values.values())  # fmt: skip


@pytest.mark.parametrize("rates", [(48000, 24000), (44100, 24000), (16000, 24000), (24000, 44100)])
def test_resampled_sound_is_the_same_sound(rates, page, models) -> None:
    """However it was cut: a tone is that tone, in time; one that does not fit is gone."""
    source, target = rates
    length = source // 10

    @some
    @given(st.lists(st.integers(0, length), max_size=5), st.integers(100, 7000))
    @example([], 11_500)
    @example([], 13_500)
    def check(cuts: list[int], tone: int) -> None:
        tone = min(tone, source * 6 // 13)
        pulse = 2 * np.pi * tone
        cuts = [*sorted(cuts), length]
        made = script(page, RESAMPLE, **{"from": source}, to=target, tone=pulse, cuts=cuts)
        assert 0 <= length * target / source - len(made) < 60
        right = np.sin(pulse * np.arange(len(made)) / target)
        if tone > min(rates) * 0.55:
            right *= 0
        if not min(rates) * 0.44 < tone < min(rates) * 0.55:  # the slope of the filter
            assert np.abs(made - right)[60:].max() < 0.01  # before, the tone has just begun

    with_page(page, models, check)


def test_sound_that_waits_is_played_in_order_or_left_out_and_counted(page, models) -> None:
    rate = 1000

    @some
    @given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=40))
    @example([(True, 160), (False, 200), (True, 160), (False, 1), (True, 80), (False, 300)])
    @example([(True, 100)] * 20 + [(False, 500)])
    def check(steps: list[tuple[bool, int]]) -> None:
        done = script(page, WAIT, rate=rate, steps=steps)
        heard = [sample for part in done["heard"] for sample in part if sample]
        assert heard == sorted(set(heard)), "in order, none twice"
        assert len(heard) == done["played"]
        assert done["arrived"] == done["played"] + done["waiting"] + done["dropped"]
        assert done["waiting"] <= (0.48 + 0.6) * rate, "however much comes at once"
        if not done["dropped"]:
            assert heard == list(range(1, len(heard) + 1))
        gaps = [part for part in done["heard"] if part[0] and not part[-1]]
        assert done["gaps"] >= len(gaps)
        assert abs(done["target"] - min(0.48, 0.16 + 0.08 * done["gaps"])) < 1e-9

    with_page(page, models, check)


def test_words(page, models) -> None:
    def check() -> None:
        said = script(page, """
            const { duration, size, closed, goneOn } = await import("/page/words.js");
            return [[0, 12, 13, 750, 45000, 90013].map(duration),
                    [831, 831000, 72.4e6, 1.57e9].map(size),
                    closed(1008, "no sound came for too long", true), closed(4321, "", false),
                    goneOn(5), goneOn(100)];""")  # fmt: skip
        assert said == [
            ["0:00", "0:00", "0:01", "1:00", "1:00:00", "2:00:01"],
            ["0.8 kB", "831 kB", "72 MB", "1.6 GB"],
            "The server ended the conversation: no sound came for too long. Press Talk to go on.",
            "The server ended the conversation: code 4321. Press Talk to begin a new one.",
            "Going on where we were.",
            "Going on. The last 8 s were not saved; Moshi does not know of them.",
        ]

    with_page(page, models, check)


def test_text_makes_paragraphs_and_follows_unless_somebody_reads_further_up(page, models) -> None:
    code = """
        const { Transcript } = await import("/page/transcript.js");
        const text = document.getElementById("text"), transcript = new Transcript(text);
        const told = (count) => {
          for (let n = 0; n < count; n++) transcript.add(" word", (frame += n % 10 ? 5 : 30));
          return new Promise((done) => setTimeout(() => done([text.children.length, atEnd()]), 99));
        };
        const atEnd = () => text.scrollHeight - text.scrollTop - text.clientHeight < 2;
        let frame = 0;
        const results = [await told(20), await told(5000)];
        const first = text.firstChild.textContent;
        text.scrollTop = 0;
        await new Promise((done) => setTimeout(done, 100));
        return [...results, first, await told(20)];"""

    def check() -> None:
        words = " word" * 10
        assert script(page, code) == [[2, True], [300, True], words, [300, False]]

    with_page(page, models, check)
