"""Parts of the page by themselves, in a browser: resampling, sound that waits, words, and looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from page_support import Page, there
from selenium.webdriver.common.keys import Keys
from serving_support import run, served

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
# What every piece of text has to its ground, at least: WCAG 2's contrast, level AA.
CONTRAST = """
    const light = (color) => {
      const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
      const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const ground = (element) => {
      const color = getComputedStyle(element).backgroundColor;
      return color === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : color;
    };
    const texts = [...document.body.querySelectorAll("*")].filter((element) =>
      element.checkVisibility() && !element.disabled && element.tagName !== "INPUT" &&
      [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return texts.map((element) => {
      const both = [light(getComputedStyle(element).color), light(ground(element))];
      return [element.id || element.textContent, Math.max(...both) / Math.min(...both)];
    });"""


def with_page(page: Page, models: Any, check: Callable[[], None], **options: Any) -> None:
    """Do something in the page while it is served."""

    async def test() -> None:
        async with served(models, 1, **options) as server:
            await there(page.open, server.url("/"))
            await there(check)
            assert page.errors() == []

    run(test())


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


def test_it_can_be_read_and_used_by_everybody(page, models, tmp_path) -> None:
    """Small and large, light and dark, by keyboard; everything is shown that can be."""
    command = page.driver.execute_cdp_cmd

    def look(scheme: str, width: int) -> None:
        wishes = {"color-scheme": scheme, "reduced-motion": "reduce"}  # or colours would be midway
        features = [{"name": f"prefers-{name}", "value": wish} for name, wish in wishes.items()]
        command("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
        command("Emulation.setDeviceMetricsOverride", size)
        for element in ("document.documentElement", "document.getElementById('text')"):
            assert page.run(f"return {element}.scrollWidth - {element}.clientWidth") <= 0
        assert page.run("return document.documentElement.clientWidth") <= width
        texts = page.run(CONTRAST)
        assert len(texts) > 15 and all(ratio >= 4.5 for _, ratio in texts), texts
        small = page.run("return ['talk', 'token', 'again'].map((id) => "
                         "document.getElementById(id).getBoundingClientRect().height)")  # fmt: skip
        assert min(small) >= 44, "a finger hits it"

    def check() -> None:
        page.run("for (const each of document.querySelectorAll('[hidden]')) each.hidden = false;"
                 "document.querySelector('details').open = true;"
                 "document.getElementById('text').textContent = 'long'.repeat(99)")  # fmt: skip
        for state in ("idle", "talking"):
            for trouble in (False, True):
                page.run("document.body.dataset.state = arguments[0];"
                         "document.getElementById('status').className = arguments[1]",
                         state, "trouble" * trouble)  # fmt: skip
                for scheme in ("light", "dark"):
                    for width in (320, 1280):
                        look(scheme, width)

    def by_keyboard() -> None:
        for element in page.driver.find_elements("css selector", "button, input, [role]"):
            assert element.accessible_name or element.aria_role in ("status", "timer")
        names = []
        for _ in range(5):
            page.driver.switch_to.active_element.send_keys(Keys.TAB)
            at = page.driver.switch_to.active_element
            names.append(at.get_attribute("id") or at.tag_name)
            assert page.run("return getComputedStyle(arguments[0]).outlineStyle", at) != "none"
        assert names == ["talk", "token", "go-on", "summary", "text"]

    try:
        with_page(page, models, lambda: (check(), by_keyboard()))
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})
