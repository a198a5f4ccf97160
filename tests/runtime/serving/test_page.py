"""The page in a real browser: from the request, through the question, to the picture; by keyboard; nothing from elsewhere."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install 'personalq[dev]'")
SECONDS = 60_000  # milliseconds, as Playwright counts


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, served: Any) -> Iterator[Any]:
    """A fresh page; fails at its end when it asked another server for anything, or a script failed."""
    opened = browser.new_page(viewport={"width": 1280, "height": 860})
    opened.set_default_timeout(SECONDS)
    wrong: list[str] = []
    opened.on("request", lambda request: wrong.append(request.url) if not _is_ours(request.url, served.url) else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(served.url)
    yield opened
    assert not wrong
    opened.close()


def _is_ours(url: str, server: str) -> bool:
    return url.startswith((server, "data:", "blob:"))


def test_a_request_becomes_a_picture_through_a_question_by_keyboard_alone(page: Any) -> None:
    page.wait_for_selector("#model option[value=rex]", state="attached")
    page.focus("#request")
    page.keyboard.type("my dog on the beach")
    page.keyboard.press("Enter")
    page.wait_for_selector("#question:not([hidden])")
    assert page.inner_text("#question-text") == "Which dog do you mean?"
    assert page.locator("#options button b").all_inner_texts() == ["luna", "rex"]
    assert page.evaluate("document.activeElement.innerText").startswith("luna")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#caption:not([hidden])")
    assert page.get_attribute("#image", "src").startswith("data:image/png;base64,")
    assert page.get_attribute("#image", "alt") == "my dog on the beach"
    assert page.inner_text("#status") == "Done."
    assert page.inner_text("#candidates .is-chosen b").startswith("rex")
    assert page.inner_text("#prompt mark") == "sks"
    assert "onnxruntime" in page.inner_text("#facts")
    assert page.evaluate("document.getElementById('image').naturalWidth") == 16


def test_the_picture_is_compared_with_the_unquantised_one(page: Any) -> None:
    page.fill("#request", "my green mug with moss")
    page.keyboard.press("Enter")
    page.wait_for_selector("#caption:not([hidden])")
    page.click("#compare")
    page.wait_for_selector("#reveal-box:not([hidden])")
    assert page.inner_text("#label-image").startswith("taq w8a8") and page.inner_text("#label-other").startswith("fp32")
    page.focus("#reveal")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.getElementById('other').style.clipPath") == "inset(0px 0px 0px 51%)"


def test_a_refusal_is_said_aloud_with_the_nearest_checkpoints(page: Any) -> None:
    page.fill("#request", "a cathedral at night")
    page.click("button.main")
    page.wait_for_selector("#status.is-bad")
    assert page.inner_text("#status").startswith("no checkpoint fits this prompt")
    assert page.get_attribute("#status", "aria-live") == "polite"


def test_the_repository_is_searched_and_draws_contact_sheets(page: Any) -> None:
    page.click("nav [data-view=repository]")
    page.wait_for_selector("#cards li")
    assert page.title() == "Repository - PersonalQ"
    names = page.locator("#cards button").evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
    assert len(set(names)) == len(names) == 6  # each says of which checkpoint
    assert page.inner_text("#count") == "3 of 3 checkpoints"
    page.fill("#find", "black dog")
    assert page.locator("#cards > li h2").all_inner_texts() == ["rex"]
    page.click("#cards .sheet button")
    page.wait_for_selector(".sheet.is-four")
    assert page.locator(".sheet img").count() == 4
    page.click("#cards .body button")
    assert page.input_value("#model") == "rex" and page.is_visible("#request")


def test_the_engines_in_memory_are_shown(page: Any, served: Any) -> None:
    served.draw(steps=1)
    page.click("nav [data-view=engines]")
    page.wait_for_selector("#resident tr")
    assert "moss-mug" in page.inner_text("#resident")
    assert page.inner_text("#memory-text").endswith("engines")


def test_the_interface_is_documented_without_a_foreign_script(page: Any, served: Any) -> None:
    page.goto(f"{served.url}/docs")
    page.wait_for_selector("#routes h2")
    assert "POST /v1/images/generations" in page.inner_text("#routes") and "partial_images" in page.inner_text(
        "#routes"
    )


@pytest.mark.parametrize("view", ["draw", "repository", "engines"])
def test_every_control_has_a_name_for_screen_readers(page: Any, view: str) -> None:
    page.click(f"nav [data-view={view}]")
    page.wait_for_timeout(300)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, button, a, progress, meter, img')]
        .filter((e) => e.checkVisibility() && !(e.labels?.length || e.innerText?.trim() || e.hasAttribute('alt')
          || e.getAttribute('aria-label'))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_a_narrow_screen_has_no_sideways_scroll(browser: Any, served: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(served.url)
    for view in ("draw", "repository", "engines"):
        page.click(f"nav [data-view={view}]")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


@pytest.fixture
def site(browser: Any, elsewhere: str) -> Iterator[Any]:
    """A page of another site, which may use the `locked` server."""
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(elsewhere)
    yield page
    page.close()


DRAW_ELSEWHERE = """async ([url, key, more]) => {
  const headers = { "Content-Type": "application/json", "X-Stainless-OS": "Unknown", Authorization: `bearer ${key}` };
  const body = JSON.stringify({ prompt: "sks mug", model: "moss-mug", steps: 1, n: null, ...more });
  const answer = await fetch(`${url}/v1/images/generations`, { method: "POST", headers, body });
  return [answer.status, await answer.json(), answer.headers.get("x-request-id")];
}"""


def test_a_page_of_an_allowed_site_draws_and_shows_the_picture_in_an_img(site: Any, locked: Any) -> None:
    status, answer, request = site.evaluate(DRAW_ELSEWHERE, [locked.url, locked.key, {"response_format": "url"}])
    assert status == 200 and len(request) == 16
    show = """(src) => new Promise((done) => {
      const image = document.body.appendChild(document.createElement("img"));
      image.onload = () => done(image.naturalWidth);
      image.onerror = () => done(0);
      image.src = src;
    })"""
    assert site.evaluate(show, answer["data"][0]["url"]) == 16  # an <img> sends no key
    assert site.evaluate(show, f"{locked.url}/v1/models/rex/sheet") == 0


def test_a_page_of_an_allowed_site_can_read_why_it_is_refused(site: Any, locked: Any) -> None:
    status, answer, _ = site.evaluate(DRAW_ELSEWHERE, [locked.url, "wrong", {}])
    assert status == 401 and answer["error"]["code"] == "invalid_api_key"


def test_a_page_of_another_site_cannot_ask(site: Any, served: Any) -> None:
    before = served.service.drawing.outstanding
    tried = "async (told) => { try { await (%s)(told); return 'asked'; } catch (error) { return error.name; } }"
    assert site.evaluate(tried % DRAW_ELSEWHERE, [served.url, "none", {}]) == "TypeError"
    assert served.service.drawing.outstanding == before


def test_what_did_not_fit_is_said_beside_the_picture(page: Any) -> None:
    page.wait_for_selector("#model option[value=moss-mug]", state="attached")
    page.click("details.more summary")
    page.select_option("#model", "moss-mug")
    page.fill("#request", "sks mug " + " ".join(f"w{i}" for i in range(300)))
    page.keyboard.press("Enter")
    page.wait_for_selector("#caption:not([hidden])")
    assert page.inner_text("#status").startswith("Done. prompt: only ")
