"""The playground's form in a headless browser: focus, limits, what is told before a run, phones, axe-core."""

import json

import pytest
from axe_playwright_python.sync_playwright import Axe
from pages import BINS, data, run, summary, token
from playwright.sync_api import expect
from serving import until

PHONE = {"viewport": {"width": 390, "height": 700}, "has_touch": True, "is_mobile": True}


def write(planted, *texts):
    planted.chunks = [data(*map(token, texts), summary("".join(texts), len(texts)), "[DONE]")]


def output_of(page):
    return page.locator("#output").evaluate("e => e.textContent")


def test_the_focus_stays_where_it_was_after_run_and_stop(planted, page):
    planted.chunks, planted.hold = [data(token(" one"))], True
    page.locator("#run").click()
    expect(page.locator("#status")).to_have_text("Writing…")
    expect(page.locator("#run")).to_be_focused()
    expect(page.locator("#run")).to_be_disabled()
    page.keyboard.press("Enter")  # it runs already
    page.keyboard.press("Tab")
    expect(page.locator("#stop-button")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Stopped after 1 token.")
    expect(page.locator("#stop-button")).to_be_focused()
    expect(page.locator("#stop-button")).to_be_disabled()
    assert len(planted.bodies) == 1

    planted.hold = False
    write(planted, " two")
    page.locator("#prompt").focus()
    page.locator("#prompt").evaluate("e => e.setSelectionRange(2, 5)")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#prompt")).to_be_focused()
    assert page.locator("#prompt").evaluate("e => [e.selectionStart, e.selectionEnd]") == [2, 5]


def test_a_text_that_was_stopped_has_a_seed_that_can_be_used_again(planted, page):
    planted.chunks, planted.hold = [data(token(" one"))], True
    run(page)
    expect(page.locator(".token")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Stopped")
    seed = json.loads(planted.bodies[0])["seed"]
    expect(page.locator("#seed-used")).to_have_text(str(seed))
    page.locator("#seed-used").click()
    page.locator("#run").click()
    until(lambda: len(planted.bodies) == 2)
    assert json.loads(planted.bodies[1])["seed"] == seed
    page.locator("#seed").fill("")
    page.keyboard.press("Escape")
    page.locator("#run").click()
    until(lambda: len(planted.bodies) == 3)
    assert json.loads(planted.bodies[2])["seed"] != seed


@pytest.mark.parametrize(("most", "offered"), [(20, "5"), (5, "5"), (2, "2"), (0, "0")])
def test_alternatives_stay_within_the_limit_of_the_server(planted, open_page, most, offered):
    planted.forget()
    planted.about["max_logprobs"] = most
    write(planted, " one")
    page = open_page(planted.url)
    expect(page.locator("#logprobs")).to_have_attribute("max", str(most))
    expect(page.locator("#logprobs")).to_have_value(offered)
    run(page)
    expect(page.locator("#status")).to_contain_text("Done")
    assert json.loads(planted.bodies[0])["logprobs"] == int(offered)
    page.locator("#logprobs").fill(str(most + 1))
    run(page)
    expect(page.locator("#error")).to_have_text(f"Alternatives can be at most {most}.")
    expect(page.locator("#logprobs")).to_be_focused()
    assert len(planted.bodies) == 1


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("top_p", "2", "Top p can be at most 1."),
        ("temperature", "-1", "Temperature must be at least 0."),
        ("top_k", "1.5", "Top k must be a whole number."),
        ("max_new_tokens", "1e", "Max new tokens is not a number."),
        ("seed", "-3", "Seed must be a whole number from 0 to 9223372036854775807."),
        ("prompt", "", "Write a prompt first."),
    ],
)
def test_a_wrong_value_is_told_in_the_forms_words_before_anything_is_sent(planted, page, field, value, said):
    page.locator(f"#{field}").focus()
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    page.keyboard.type(value)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#error")).to_have_text(said)
    expect(page.locator(f"#{field}")).to_be_focused()
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    assert planted.bodies == []


def test_a_prompt_that_is_refused_is_not_printed_and_the_last_text_stays(planted, page):
    write(planted, " one")
    run(page)
    expect(page.locator("#status")).to_contain_text("Done")
    planted.refusal = (413, "the body is too large", None, {}, "body_too_large")
    run(page, "y" * 5000)
    expect(page.locator("#error")).to_be_visible()
    assert output_of(page) == "Hello one"
    assert "yyy" not in page.locator(".result").inner_text()


def test_the_model_is_named_and_the_prompt_measured_before_the_first_run(planted, page):
    expect(page.locator("#model")).to_have_text("planted on none, context 32")
    expect(page.locator("#prompt-size")).to_have_text("4 of 32 tokens: 72 tokens too many with 100 new ones")
    page.locator("#max_new_tokens").fill("20")
    expect(page.locator("#prompt-size")).to_have_text("4 of 32 tokens")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+End")
    page.keyboard.type(" there was a king")
    expect(page.locator("#prompt-size")).to_have_text("8 of 32 tokens")
    assert planted.counted[-1] == "Once upon a time there was a king"
    assert len(planted.counted) < 10  # not one for each key
    page.locator("#max_new_tokens").fill("25")
    expect(page.locator("#prompt-size")).to_have_text("8 of 32 tokens: 1 token too many with 25 new ones")
    page.locator("#prompt").fill("")
    expect(page.locator("#prompt-size")).to_have_text("")
    assert planted.bodies == []


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_text_is_copied_also_where_the_page_has_no_clipboard(planted, open_page, clipboard):
    planted.forget()
    write(planted, " one", "\n", " two")
    page = open_page(planted.url, permissions=["clipboard-read", "clipboard-write"] if clipboard else [])
    if not clipboard:  # as by plain HTTP from another machine
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.locator("#copy").click(force=True)  # nothing is there yet
    expect(page.locator("#copy")).to_be_disabled()
    run(page)
    expect(page.locator("#status")).to_contain_text("Done")
    page.locator("#copy").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    expect(page.locator("#copy")).to_be_focused()
    page.locator("#prompt").fill("")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+V")
    expect(page.locator("#prompt")).to_have_value("Hello one\n two")


def test_on_a_phone_the_text_stands_first_and_sampling_is_folded(planted, open_page):
    planted.forget()
    page = open_page(planted.url, **PHONE)
    parts = ("#output", "#prompt", "#sampling", "#run")
    tops = [page.locator(part).bounding_box()["y"] for part in parts]
    assert tops == sorted(tops)
    for part in parts:
        expect(page.locator(part)).to_be_in_viewport()
    expect(page.locator("#temperature")).to_be_hidden()
    page.locator("summary").tap()
    expect(page.locator("#temperature")).to_be_visible()
    page.locator("#temperature").fill("-1")
    page.locator("summary").tap()
    page.locator("#run").tap()
    expect(page.locator("#temperature")).to_be_focused()  # unfolded again


def test_on_a_wide_screen_sampling_is_unfolded(page):
    expect(page.locator("#temperature")).to_be_visible()
    assert page.locator("#prompt").bounding_box()["x"] < page.locator("#output").bounding_box()["x"]


def test_on_a_phone_the_page_follows_the_text_until_its_reader_scrolls_away(planted, open_page):
    planted.forget()
    page = open_page(planted.url, **PHONE)
    planted.chunks, planted.hold = [data(*(token(f" word {i}\n") for i in range(60)))], True
    run(page)
    expect(page.locator(".token")).to_have_count(60)
    expect(page.locator(".token").last).to_be_in_viewport()
    expect(page.locator(".token").first).not_to_be_in_viewport()
    expect(page.locator("#stop-button")).to_be_in_viewport()
    covered = page.locator(".actions").bounding_box()["y"]
    assert page.locator("#figures").bounding_box()["y"] < covered
    page.locator("#stop-button").tap()

    first, *others = (data(*(token(f" {i}\n") for i in range(30))) for _ in range(3))
    planted.chunks, planted.hold, planted.wait = [first, *others], True, True
    run(page)
    expect(page.locator(".token")).to_have_count(30)
    page.evaluate("window.scrollTo(0, 0)")
    planted.wait = False
    expect(page.locator(".token")).to_have_count(90)
    assert page.evaluate("window.scrollY") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["wide", "phone"])
def test_axe_core_finds_nothing(planted, open_page, scheme, options):
    planted.forget()
    page = open_page(planted.url, color_scheme=scheme, expected=["Failed to load resource"], **options)
    expect(page.locator("#prompt-size")).not_to_have_text("")
    found = {"at first": findings(page)}
    planted.chunks, planted.hold = [data(*(token(" x", p, top=[(" y", 0.05)]) for p, _ in BINS))], True
    run(page)
    expect(page.locator(".token")).to_have_count(len(BINS))
    page.locator(".token").first.focus()
    expect(page.locator("#tip")).to_be_visible()
    found["while it writes"] = findings(page)
    page.keyboard.press("Escape")
    planted.hold, planted.refusal = False, (401, "m")
    run(page)
    expect(page.locator("#error")).to_be_visible()
    found["refused"] = findings(page)
    assert found == {state: [] for state in found}


def findings(page):
    violations = Axe().run(page).response["violations"]
    return [(rule["id"], [node["target"] for node in rule["nodes"]]) for rule in violations]
