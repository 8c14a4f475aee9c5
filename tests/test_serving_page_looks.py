"""The page of `ttt-cache serve` for everybody: small, large, light, dark, by keyboard."""

from __future__ import annotations

from page_support import with_page
from selenium.webdriver.common.keys import Keys

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


def test_it_can_be_read_and_used_by_everybody(page, models, tmp_path) -> None:
    """Everything is shown that can be."""
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
