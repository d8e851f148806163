"""`python -m tests.page.screenshot`: make the README's picture of a compare, docs/pictures/compare.png."""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

from PIL import Image

from tests.page.browser import chromium, missing, set_screen
from tests.page.pages import page

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "compare.png"
SIZE = (1000, 1228)  # from the verdict to the map of the difference


def main() -> int:
    """Make the page, photograph it, and keep the part that says most."""
    if lacking := missing():
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    # Within the folder, so that the picture names no folder of this machine.
    with tempfile.TemporaryDirectory() as folder, chdir(folder), chromium() as driver:
        driver.get(page(Path()).absolute().as_uri())
        set_screen(driver, *SIZE)
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    whole = Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")
    picture = whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    PICTURE.parent.mkdir(exist_ok=True)
    picture.save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
