"""The pictures of the window in README and docs, of a run's folder:

    python scripts/screenshots.py RUNS [--out docs/view] [--run NAME]

Needs playwright and a Chromium of the system.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Page, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def chromium() -> str:
    """The system's browser."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        sys.exit("no Chromium; for example: apt-get install chromium")
    return found


@contextlib.contextmanager
def window(*folders: Path):
    """The address of ``agent-r1 view`` on these folders."""
    command = [sys.executable, "-m", "agent_r1.cli", "view", "--no-browser", "--port", "0"]
    with subprocess.Popen([*command, *folders], stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            while "http://" not in line and server.poll() is None:
                line = server.stdout.readline()
            yield "http://" + line.partition("http://")[2].partition("/")[0] + "/"
        finally:
            server.terminate()


@contextlib.contextmanager
def browser_page(theme: str = "light", width: int = 1280, height: int = 900):
    """A page of a fresh browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            context = browser.new_context(
                color_scheme=theme, viewport={"width": width, "height": height}
            )
            yield context.new_page()
        finally:
            browser.close()


def shoot(page: Page, address: str, place: str, file: Path, *, whole: bool = False) -> None:
    page.goto("about:blank")
    page.goto(f"{address}#/{place}")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(400)  # charts are drawn
    page.screenshot(path=file, full_page=whole)
    print(file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--run", help="the run to look into (default: the first)")
    parser.add_argument("--episode", default="", help="ITERATION/GROUP/ATTEMPT")
    parser.add_argument("--out", type=Path, default=Path("docs/view"))
    parser.add_argument("--all", action="store_true", help="dark and narrow, too")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with window(given.runs) as address, browser_page() as page:
        page.goto(address)
        page.wait_for_selector("tbody a")
        names = page.locator("tbody th a").all_inner_texts()
        run = quote(given.run or names[0], safe="")
        both = "&".join(f"with={quote(name)}" for name in names)
        episode = given.episode or "last"
        if episode == "last":
            page.goto(f"{address}#/run/{run}/episodes?tool_calls=2..")
            page.wait_for_selector("tbody a")
            page.wait_for_timeout(1500)
            episode = page.locator("tbody th a").first.inner_text()
        group = episode.rpartition("/")[0]
        views = (
            ("runs", f"?{both}", False),
            ("run", f"run/{run}", False),
            ("episodes", f"run/{run}/episodes", False),
            ("group", f"run/{run}/group/{group}", False),
            ("episode", f"run/{run}/episode/{episode}", False),
            ("diagnosis", f"run/{run}/diagnosis", False),
        )
        looks = (
            (("light", 1280), ("dark", 1280), ("light", 420)) if given.all else (("light", 1280),)
        )
        for theme, wide in looks:
            mark = "" if not given.all else f"-{theme}{'' if wide == 1280 else '-narrow'}"
            page.emulate_media(color_scheme=theme)
            page.set_viewport_size({"width": wide, "height": 900})
            for name, place, whole in views:
                shoot(page, address, place, given.out / f"{name}{mark}.png", whole=whole)


if __name__ == "__main__":
    main()
