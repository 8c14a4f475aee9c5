"""Makes docs/pictures/page.png: a conversation in Chromium, with a small untrained Moshi.

    python tests/page_picture.py

The server, the page and the sound are the real ones. The words are those that the small model's
voice was made from, as its untrained choices have it.
"""

from __future__ import annotations

import asyncio
import itertools
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.image as images
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from launch_files import EXAMPLES, make_checkpoint
from page_support import Page, chromium, there
from serving_support import Models, served

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "page.png"
SIZES = {"light": (960, 740), "dark": (360, 740)}  # a desktop's window and a phone's
HEARD_S = 12.0


def pieces() -> Callable[[int], str]:
    """A word for every fourth token, which is how fast people speak; else nothing."""
    words = runpy.run_path(str(EXAMPLES / "make_small.py"))["WORDS"]
    number = itertools.count()
    return lambda token: "" if next(number) % 4 else f"▁{words[token % len(words)]}"


def take(url: str, folder: Path, speech: Path) -> None:
    with chromium(folder / "browser", speech) as page:
        page.open(url)
        page.press()
        page.until(lambda: page.number("played") > 1)
        time.sleep(HEARD_S)
        pictures = [picture(page, folder, scheme) for scheme in SIZES]
    height = max(each.shape[0] for each in pictures)
    images.imsave(PICTURE, np.concatenate([each[:height] for each in pictures], axis=1))


def picture(page: Page, folder: Path, scheme: str) -> np.ndarray:
    """Of the page as it is now, `[height, width, 4]`."""
    command, (width, height) = page.driver.execute_cdp_cmd, SIZES[scheme]
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    command("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1.5, "mobile": width < 500}
    command("Emulation.setDeviceMetricsOverride", size)
    page.until(lambda: page.level("you") > 30 and page.level("moshi") > 30)
    page.driver.save_screenshot(str(folder / f"{scheme}.png"))
    return images.imread(folder / f"{scheme}.png")


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder)
        models = Models.of(checkpoint)
        models.piece = pieces()
        async with served(models, 8, folder / "sessions") as server:
            await there(take, server.url("/"), folder, checkpoint.speech)


asyncio.run(main())
