"""Draws the pictures of docs/chat.md: the chat in a terminal, and the page in a browser.

    python -m gpt_jax.serve RUN &  then  python scripts/pictures.py RUN [http://127.0.0.1:8000]

Needs pyte, playwright and a chromium.
"""

import html
import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from terminal import Terminal  # noqa: E402

QUESTIONS = ["What does it mean to live well?", "Who's there?"]
FRAME = (
    "<body style='margin:0;padding:16px;background:#16171a;color:#e8e6e1;width:max-content'>"
    "<pre style='margin:0;font:15px/1.4 monospace'>"
)


def terminal(run: str) -> str:
    """The screen of a chat, as HTML."""
    command = [sys.executable, "-m", "gpt_jax.chat", run, "--backend=xla"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with Terminal(command, cwd=Path.cwd(), env=env, columns=100, lines=24) as chat:
        for line in ("/max 24", QUESTIONS[0], "/retry", "/temp 0.4", QUESTIONS[1]):
            chat.wait_for(lambda text: text.endswith("you>"))
            chat.type(f"{line}\r")
            chat.wait_for(lambda text: not text.endswith("you>"))
        text = chat.wait_for(lambda text: text.endswith("you>"))
        chat.type("\x04")
    return FRAME + html.escape(text[text.index("you>") :])  # the lines before name a folder of this machine


def screen(browser: Browser, content: str, file: Path) -> None:
    page = browser.new_page(viewport={"width": 100, "height": 100}, device_scale_factor=1.5)
    page.set_content(content)
    page.locator("body").screenshot(path=file)
    page.close()


def page(browser: Browser, url: str, scheme: str, size: tuple[int, int], file: Path, *, with_settings: bool) -> None:
    """The page after a question, with the probabilities of a token shown."""
    shown = browser.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, device_scale_factor=1.5
    )
    shown.goto(url)
    shown.wait_for_selector("#temperature-value:not(:empty)", state="attached")
    for question in QUESTIONS:
        shown.locator("#text").fill(question)
        shown.keyboard.press("Enter")
        shown.wait_for_selector(".assistant[aria-busy=true]")
        shown.wait_for_selector("#retry", timeout=120_000)
    if with_settings:
        shown.locator("#settings").click()
        shown.locator("#tint").check()
    shown.locator(".assistant").last.focus()
    for _ in range(3):
        shown.keyboard.press("ArrowRight")
    shown.screenshot(path=file)
    shown.close()


def main() -> None:
    run, url = sys.argv[1], (sys.argv[2:] or ["http://127.0.0.1:8000"])[0]
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    docs = ROOT / "docs"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"], timeout=120_000)
        screen(browser, terminal(run), docs / "chat.png")
        page(browser, url, "dark", (1100, 700), docs / "page_dark.png", with_settings=True)
        page(browser, url, "light", (390, 720), docs / "page_phone.png", with_settings=False)


if __name__ == "__main__":
    main()
