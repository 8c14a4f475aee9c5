"""The page of `ttt-cache serve` in a headless Chromium whose microphone hears a file."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from serving_support import run, served

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if path is None]
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --use-fake-ui-for-media-stream --use-fake-device-for-media-stream"
)
PATIENCE = 20.0  # seconds; a busy machine starts a browser's sound in two
INSECURE = "page.test"  # a host that is here, and to a browser neither https nor localhost


@contextmanager
def chromium(profile: Path, speech: Path) -> Iterator[Page]:
    """A browser with a new profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(PROGRAMS["chromium"])
    for argument in (
        *QUIET.split(),
        f"--use-file-for-fake-audio-capture={speech}",
        f"--user-data-dir={profile}",
        f"--host-resolver-rules=MAP {INSECURE} 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Or Selenium would look for a driver elsewhere.
    driver = webdriver.Chrome(options, Service(str(PROGRAMS["chromedriver"])))
    try:
        yield Page(driver)
    finally:
        driver.quit()


class Page:
    """What a person does with the page, and sees. Its methods wait: call them in a thread."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Afresh, and until the page has asked the server."""
        self.driver.get(url)
        self.until(lambda: self.status != "Loading …")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.find(name).text

    def number(self, name: str) -> float:
        """Of a line below "Sound", which is closed."""
        return float(self.find(name).get_attribute("textContent").split()[0])

    def level(self, name: str) -> int:
        return int(self.find(name).get_attribute("aria-valuenow"))

    @property
    def status(self) -> str:
        return self.text("status")

    @property
    def state(self) -> str:
        return self.run("return document.body.dataset.state")

    @property
    def last(self) -> Any:
        """The conversation that the browser keeps: session and frames."""
        return self.run("return JSON.parse(localStorage.getItem('ttt-cache-last'))")

    def press(self) -> None:
        self.find("talk").click()

    def talk(self, seconds: float = 1) -> None:
        """Press Talk, and hear so much of the answer."""
        self.press()
        self.hear(seconds)

    def hear(self, seconds: float = 1) -> None:
        """Until so much more was played."""
        end = self.number("played") + seconds
        self.until(lambda: self.state == "talking" and self.number("played") > end)

    def until(self, condition: Callable[[], Any]) -> None:
        try:
            WebDriverWait(self.driver, PATIENCE, 0.1).until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(f"the page says: {self.status}; {self.errors()}") from None

    def errors(self) -> list[str]:
        """What the browser has complained of since it was last asked."""
        log = self.driver.get_log("browser")  # type: ignore[attr-defined]
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


async def there(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do something with the browser while this thread serves it."""
    return await asyncio.to_thread(work, *arguments)


def with_page(page: Page, models: Any, check: Callable[[], Any]) -> None:
    """Do something in the page while it is served."""

    async def test() -> None:
        async with served(models, 1) as server:
            await there(page.open, server.url("/"))
            await there(check)
            assert page.errors() == []

    run(test())
