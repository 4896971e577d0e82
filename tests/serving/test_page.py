"""The page in a real browser, by the keyboard alone and on a phone's width. Skipped where there is no browser.

pip install playwright && apt-get install chromium && pytest tests/serving/test_page.py
"""

import json
import shutil
import threading

import pytest
from serving_stub import serve
from waiting import wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium"),
]
PHONE, DESK = {"width": 360, "height": 640}, {"width": 1200, "height": 800}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]
        yield playwright.chromium.launch(executable_path=BROWSER, args=options, timeout=60_000)


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; a test fails for what it logs as an error, and for what it asks of others."""
    problems, contexts = [], []

    def open_at(stub, viewport=DESK, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(stub.url) else problems.append(request.url))
        page.goto(stub.url)
        sync_api.expect(page).to_have_title("tiny")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert problems == []


def last_answer(page) -> str:
    page.wait_for_selector("#retry")
    return page.locator(".assistant").last.inner_text()


def test_a_conversation_by_the_keyboard_alone(open_page):
    seen = []

    def say(prompt, options):
        seen.append((prompt, options))
        return "an answer, näive"

    with serve(say) as stub:
        page = open_page(stub)
        page.keyboard.type("a question")
        page.keyboard.press("Enter")
        assert last_answer(page) == "an answer, näive"
        page.keyboard.type("another")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("question")
        page.keyboard.press("Enter")
        wait_for(lambda: page.locator(".assistant").count() == 2)
        assert last_answer(page) == "an answer, näive"
        assert seen[1][0].endswith("<|assistant|>an answer, näive<|user|>another\nquestion<|assistant|>")
        page.locator("#settings").focus()
        page.keyboard.press("Enter")
        page.locator("#temperature").focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.locator("#temperature-value").inner_text() == "0.65"
        page.locator("#system").focus()
        page.keyboard.type("Be brief.")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "settings"
        page.locator("#retry").focus()
        page.keyboard.press("Enter")
        wait_for(lambda: len(seen) == 3)
        last_answer(page)
        assert seen[2][0].startswith("<|user|>Be brief.\n\na question<|assistant|>")
        assert seen[2][1].temperature == pytest.approx(0.65)
        assert len({options.seed for _, options in seen}) == 3
        page.locator("#undo").focus()
        page.keyboard.press("Enter")
        assert page.locator("#text").input_value() == "another\nquestion"
        assert page.locator(".said").count() == 2


def test_probabilities_show_where_the_mouse_is_and_by_arrow_keys(open_page):
    with serve(lambda prompt, options: "an answer") as stub:
        page = open_page(stub)
        page.locator("#text").fill("a question")
        page.locator("#send").click()
        last_answer(page)
        page.locator(".token").first.hover()
        assert page.locator("#tip tr").first.inner_text().endswith("50.0 %")
        assert page.locator("#tip tr").count() == 3
        page.mouse.move(5, 5)
        assert page.locator("#tip").is_hidden()
        page.locator(".assistant").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        words = page.locator(".token").all_inner_texts()
        assert page.locator(".token.at").inner_text() == words[1]
        assert json.dumps(words[1]) in page.locator("#tip tr").first.inner_text()
        page.keyboard.press("Tab")
        assert page.locator("#tip").is_hidden()


def test_an_answer_comes_in_pieces_and_escape_ends_it(open_page):
    pace = threading.Semaphore(2)
    with serve(lambda prompt, options: "word " * 60, pace=lambda number: pace.acquire(timeout=30)) as stub:
        page = open_page(stub)
        page.locator("#text").fill("a question")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant[aria-busy=true] .token")
        assert page.locator("#stop").is_visible()
        page.keyboard.press("Escape")
        assert last_answer(page).startswith("word")
        pace.release(4)
        wait_for(lambda: stub.engine.running == 0)
        assert stub.decoder.chunks < 8


def test_chats_come_back_and_can_be_deleted(open_page):
    with serve(lambda prompt, options: "an answer") as stub:
        page = open_page(stub)
        for text in ("first chat", "second chat"):
            page.locator("#new").click()
            page.locator("#text").fill(text)
            page.keyboard.press("Enter")
            last_answer(page)
        page.reload()
        page.locator("#settings").click()
        assert page.locator("#chats li").count() == 2
        page.get_by_role("button", name="first chat", exact=True).click()
        assert page.locator(".user").inner_text() == "first chat"
        page.get_by_role("button", name="Delete first chat").click()
        assert page.locator("#chats li").count() == 1
        assert page.locator(".said").count() == 0


def test_a_failure_is_told_and_the_question_can_be_asked_again(open_page):
    with serve(lambda prompt, options: "yes") as stub:
        page = open_page(stub)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=FAILED))
        page.locator("#text").fill("a question")
        page.keyboard.press("Enter")
        assert page.get_by_role("alert").inner_text() == "the device was lost"
        page.unroute("**/v1/chat/completions")
        page.locator("#retry").click()
        wait_for(lambda: page.locator(".assistant").count() == 1)
        assert last_answer(page) == "yes"


FAILED = 'data: {"choices": []}\n\ndata: {"error": {"message": "the device was lost"}}\n\n'


def boxes(page, selector: str) -> list[dict]:
    return [node.bounding_box() for node in page.locator(selector).all()]


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page):
    with serve(lambda prompt, options: "word " * 30 + "w" * 90) as stub:
        page = open_page(stub, PHONE)
        page.locator("#text").fill("a question " * 12)
        page.locator("#send").click()
        last_answer(page)
        for button in ("#settings", "#close"):
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            assert page.evaluate(
                "[...document.querySelectorAll('.said')].every(x => x.getBoundingClientRect().right <= 360)"
            )
            page.locator(button).click()
        box = page.locator("#ask").bounding_box()
        assert box["y"] + box["height"] <= PHONE["height"] + 1


def test_a_key_is_asked_for(browser):
    with serve(lambda prompt, options: "yes", app={"api_key": "right"}) as stub:
        page = browser.new_page()
        page.goto(stub.url)
        page.wait_for_selector("[role=alert]")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("right")
        page.keyboard.press("Tab")
        sync_api.expect(page).to_have_title("tiny")
        page.locator("#text").fill("a question")
        page.keyboard.press("Enter")
        assert last_answer(page) == "yes"
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme, open_page):
    with serve(lambda prompt, options: "an answer") as stub:
        page = open_page(stub, color_scheme=scheme)
        page.locator("#text").fill("a question")
        page.keyboard.press("Enter")
        last_answer(page)
        page.locator("#settings").click()
        for selector in (".user", ".assistant", "#ask p", "#send", "aside .notice", "#new"):
            assert page.locator(selector).first.evaluate(CONTRAST) >= (3 if selector == "#ask p" else 4.5), selector


# Of text and what is behind it, by WCAG.
CONTRAST = """node => {
  const linear = x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const ink = light(numbers(getComputedStyle(node).color));
  while (numbers(getComputedStyle(node).backgroundColor)[3] === 0) node = node.parentElement;
  const paper = light(numbers(getComputedStyle(node).backgroundColor));
  return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
}"""
