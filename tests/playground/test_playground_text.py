"""The playground in a headless browser: against planted events, and against the real server."""

import json

import pytest
from pages import BINS, HOSTILE, SEED, data, run, summary, token
from playwright.sync_api import expect
from serving import HANG_S, serving, until

from gpt2core import GPT2


def test_the_text_arrives_whole_and_each_token_has_the_colour_of_its_probability(planted, page):
    texts = [" one", " two", "\n", HOSTILE, " five"]
    events = [token(text, p) for text, (p, _) in zip(texts, BINS, strict=True)]
    planted.chunks = [data(*events, summary("".join(texts), 5), "[DONE]")]
    run(page)
    expect(page.locator("#status")).to_have_text("Done: as many tokens as were asked for.")
    assert page.locator("#output").evaluate("e => e.textContent") == "Hello" + "".join(texts)
    assert page.locator(".token").evaluate_all("all => all.map(e => e.dataset.p)") == [b for _, b in BINS]
    assert page.locator("#output img").count() == 0
    expect(page.locator("#figures")).to_contain_text("5 tokens in 0.50 s at the server, 10 tok/s")
    expect(page.locator("#figures")).to_contain_text("planted on none")


def test_events_may_be_cut_between_any_two_bytes(planted, page):
    whole = data(token("ü"), token("\U0001f600 \u2028"), summary("ü\U0001f600 \u2028", 2), "[DONE]")
    whole = whole.replace(b"\\u00fc", "ü".encode()).replace(b"\n\ndata", b"\r\n\r\ndata")
    planted.chunks = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    run(page)
    expect(page.locator("#status")).to_contain_text("Done")
    assert page.locator("#output").evaluate("e => e.textContent") == "Helloü\U0001f600 \u2028"


def test_tokens_whose_text_is_held_back_are_shown_with_the_text_that_they_gave(planted, page):
    events = [token("", 0.5, name="\ufffd"), token("é", 0.5, name="\ufffd"), token("", 0.9, name="<end>")]
    planted.chunks = [data(*events, summary("é", 3, "stop"), "[DONE]")]
    run(page)
    expect(page.locator("#status")).to_have_text("Done: the text came to its end.")
    assert page.locator(".token").all_text_contents() == ["é"]
    assert page.locator(".token").get_attribute("data-p") == "2"  # 0.5 * 0.5
    page.locator(".token").hover()
    assert page.locator("#tip caption").count() == 2


def test_alternatives_are_told_on_hover_and_on_keyboard_focus(planted, page):
    events = [token(" cat", 0.25, top=[(" dog", 0.5), (HOSTILE, 0.125)]), token("\n", 0.001), token(" c")]
    planted.chunks = [data(*events, summary(" cat\n c", 3), "[DONE]")]
    run(page)
    expect(page.locator("#status")).to_contain_text("Done")
    tip = page.locator("#tip")
    expect(tip).to_be_hidden()
    page.locator(".token").first.hover()
    expect(tip.locator("caption")).to_have_text("␣cat had 25.0 %")
    rows = [[cell.strip() for cell in row.split("\t")[:2]] for row in tip.locator("tr").all_inner_texts()]
    assert rows == [["␣dog", "50.0 %"], ["␣cat", "25.0 %"], [HOSTILE.replace(" ", "␣"), "12.5 %"]]
    assert tip.locator("tr.drawn td").first.inner_text() == "␣cat"
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()

    page.locator("#logprobs").focus()
    for _ in range(4):  # stop strings, API key, the button that copies, tokens
        page.keyboard.press("Tab")
    expect(page.locator(".token").first).to_be_focused()
    expect(tip.locator("caption")).to_have_text("␣cat had 25.0 %")
    assert page.locator(".token").first.get_attribute("aria-describedby") == "tip"
    page.keyboard.press("ArrowRight")
    expect(tip.locator("caption")).to_have_text("↵ had 0.1 %")
    page.keyboard.press("End")
    expect(page.locator(".token").nth(2)).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator(".token").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.keyboard.press("Tab")
    expect(page.locator("#seed-used")).to_be_focused()  # one stop for all tokens


def test_the_request_holds_what_the_form_says_and_nothing_else(planted, page):
    planted.chunks = [data(summary("", 0), "[DONE]")]
    for name, value in {"top_k": "40", "min_p": "0.05", "repetition_penalty": "1.1", "top_p": ""}.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#stop").fill("\\n\\n\n The end\na\\\\n")
    page.locator("#api_key").fill("secret")
    page.locator("#seed").fill(str(SEED))
    run(page, 'a "quoted"\nprompt')
    expect(page.locator("#status")).to_contain_text("Done")
    assert json.loads(planted.bodies[0]) == {
        **{"prompt": 'a "quoted"\nprompt', "stream": True, "max_new_tokens": 100, "temperature": 0.8},
        **{"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "logprobs": 5, "seed": SEED},
        "stop": ["\n\n", " The end", "a\\n"],
    }
    assert planted.keys == ["Bearer secret"]
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.reload()
    assert page.locator("#api_key").input_value() == ""


def test_the_seed_is_shown_with_all_its_digits_and_can_be_used_again(planted, page):
    planted.chunks = [data(token(f' "seed":12 {SEED}'), summary(f' "seed":12 {SEED}', 1), "[DONE]")]
    run(page)
    expect(page.locator("#seed-used")).to_have_text(str(SEED))
    assert page.locator(".token").text_content() == f' "seed":12 {SEED}'
    page.locator("#seed-used").click()
    expect(page.locator("#seed")).to_have_value(str(SEED))
    page.locator("#run").click()
    until(lambda: len(planted.bodies) == 2)
    assert json.loads(planted.bodies[0])["seed"] < 2**63  # drawn by the page
    assert f'"seed":{SEED}' in planted.bodies[1]


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_ends_the_request_and_keeps_the_text(planted, page, way):
    planted.chunks, planted.hold = [data(token(" one"), token(" two"))], True
    run(page)
    expect(page.locator(".token")).to_have_count(2)
    expect(page.locator("#output")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#run")).to_be_disabled()
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.locator("#stop-button").click()
    expect(page.locator("#status")).to_have_text("Stopped after 2 tokens.")
    assert planted.gone.wait(HANG_S), "the server was not told"
    planted.hold = False
    expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#run")).to_be_enabled()
    assert page.locator("#output").evaluate("e => e.textContent") == "Hello one two"
    planted.chunks = [data(token(" new"), summary(" new", 1), "[DONE]")]
    run(page)
    expect(page.locator("#status")).to_contain_text("Done")
    assert page.locator("#output").evaluate("e => e.textContent") == "Hello new"


@pytest.mark.parametrize(
    ("refusal", "shown", "focused"),
    [
        (
            (429, "the queue of 64 texts is full; try again later", None, {"Retry-After": "7"}, "queue_full"),
            "The server is busy with other texts. Try again in 7 s.",
            None,
        ),
        (
            (429, "this client's requests hold 48 of the 48 places", None, {}, "client_queue_full"),
            "The server is still busy with your other texts.",
            None,
        ),
        ((429, "slow down", None, {"Retry-After": "soon"}), "The server is busy.", None),
        (
            (503, "the model is being loaded", None, {"Retry-After": "5"}, "loading"),
            "The model is still being loaded. Try again in 5 s.",
            None,
        ),
        (
            (503, "the engine has failed", None, {}, "engine_failed"),
            "The model has failed. Whoever runs the server has to start it again.",
            None,
        ),
        (
            (401, "send Authorization: Bearer KEY", None, {}, "invalid_api_key"),
            "The API key is missing or wrong. Enter it here.",
            "api_key",
        ),
        (
            (413, "the request's body has more than 9 bytes; send less", None, {}, "body_too_large"),
            "The prompt is too long for this server. Shorten it.",
            None,
        ),
        (
            (422, "top_p is too small; above 0 and at most 1", "top_p"),
            "Top p is too small. Above 0 and at most 1.",
            "top_p",
        ),
        (
            (
                422,
                "prompt has 4 tokens and max_new_tokens is 50, 54 in all; this model's context is 32; "
                "shorten the prompt or pass max_new_tokens=28 or less",
                *("prompt", {}, "context_length_exceeded"),
            ),
            "Prompt has 4 tokens and Max new tokens is 50, 54 in all. This model's context is 32. "
            "Shorten the prompt or set Max new tokens to 28 or less.",
            "prompt",
        ),
        ((500, HOSTILE), f"The server could not answer (status 500). {HOSTILE}.", None),
    ],
)
def test_a_refusal_is_told_readably(planted, page, refusal, shown, focused):
    planted.refusal = refusal
    run(page)
    expect(page.locator("#error")).to_have_text(shown)
    assert page.locator("#error img").count() == 0
    expect(page.locator("#run")).to_be_enabled()
    if focused:
        expect(page.locator(f"#{focused}")).to_be_focused()
        expect(page.locator(f"#{focused}")).to_have_attribute("aria-invalid", "true")
    planted.refusal = None
    planted.chunks = [data(summary("", 0), "[DONE]")]
    run(page)
    expect(page.locator("#error")).to_be_hidden()
    assert page.locator("[aria-invalid]").count() == 0


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        ([token(" a"), {"error": {"message": "it took longer than 120 s", "param": None}}], "120 s."),
        ([token(" a")], "The connection broke before the text was complete."),
        ([token(" a"), summary(" a", 1)], "The connection broke before the text was complete."),
    ],
)
def test_a_stream_that_breaks_off_is_never_taken_for_a_whole_text(planted, page, chunks, shown):
    planted.chunks = [data(*chunks)]
    run(page)
    expect(page.locator("#error")).to_contain_text(shown)
    assert "Done" not in page.locator("#status").text_content()
    assert page.locator("#output").evaluate("e => e.textContent") == "Hello a"


def test_a_seed_that_is_no_number_is_refused_before_anything_is_sent(planted, page):
    page.locator("#seed").fill("7}, {")
    run(page)
    expect(page.locator("#error")).to_contain_text("whole number")
    assert planted.bodies == []


def test_a_server_that_still_loads_is_told_and_looked_at_again(planted, open_page):
    planted.forget()
    planted.ready = [(503, "the model is being loaded", None, {}, "loading")]
    planted.about["backend"] = planted.about["context"] = None
    page = open_page(planted.url, expected=["Failed to load resource"])
    expect(page.locator("#status")).to_have_text("The model is still being loaded.")
    expect(page.locator("#model")).to_have_text("planted")
    planted.about |= {"backend": "none", "context": 32}
    expect(page.locator("#status")).to_have_text("")
    expect(page.locator("#model")).to_have_text("planted on none, context 32")


def test_everything_is_reached_by_tab_in_the_order_of_the_page(planted, page):
    page.locator("a").focus()
    seen = []
    for _ in range(15):
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert seen == [
        *("A", "prompt", "run", "stop-button", "SUMMARY", "max_new_tokens", "temperature", "top_k", "top_p"),
        *("min_p", "repetition_penalty", "seed", "logprobs", "stop", "api_key"),
    ]
    unnamed = "all => all.filter(e => !e.labels?.length && !e.textContent.trim()).map(e => e.id)"
    assert page.locator("input, textarea, button:visible").evaluate_all(unnamed) == []


LUMINANCE = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (...layers) => {
    for (const colour of layers) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(
      (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = getComputedStyle(document.body).backgroundColor;
  const texts = document.querySelectorAll(
    ".token, .prompt, .hint, label, a, summary, #model, #run, #error, #status");
  return [...texts].map((e) => {
    const around = [page];
    for (let one = e, found = []; one; one = one.parentElement) {
      found.unshift(getComputedStyle(one).backgroundColor);
      if (one === document.body) around.push(...found);
    }
    const [a, b] = [light(...around), light(...around, getComputedStyle(e).color)].sort();
    return [e.id || e.className || e.tagName, (b + 0.05) / (a + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_wcag_asks_for(planted, open_page, scheme):
    planted.forget()
    page = open_page(planted.url, color_scheme=scheme)
    planted.chunks = [data(*(token(" x", p) for p, _ in BINS), {"error": {"message": "m"}})]
    run(page)
    expect(page.locator("#error")).to_be_visible()
    ratios = page.evaluate(LUMINANCE)
    assert len(ratios) > 20
    assert {name: ratio for name, ratio in ratios if ratio < 4.5} == {}
    colours = page.locator(".token").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) == len(BINS)


def test_nothing_is_wider_than_a_small_screen(planted, open_page):
    planted.forget()
    page = open_page(planted.url, viewport={"width": 320, "height": 640})
    long = "x" * 400
    planted.chunks = [data(token(long, top=[(long, 0.05)]), summary(long, 1), "[DONE]")]
    run(page)
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#output")).to_be_in_viewport()
    page.locator(".token").focus()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 320


def test_against_the_real_server_the_page_shows_the_library_s_text_and_replays_it(open_page):
    with (
        serving(model="demo", backend="numpy") as server,
        GPT2.from_pretrained("demo", backend="numpy") as model,
    ):
        page = open_page(server.url + "/", expected=["status of 422"])
        page.locator("#max_new_tokens").fill("12")
        run(page, "Once upon a time")
        expect(page.locator("#status")).to_contain_text("Done")
        seed = int(page.locator("#seed-used").text_content())
        want = model.generate("Once upon a time", max_new_tokens=12, temperature=0.8, top_p=0.95, seed=seed)
        first = page.locator("#output").evaluate("e => e.textContent")
        assert first == "Once upon a time" + want.text
        page.locator(".token").nth(3).hover()
        assert page.locator("#tip tr").count() >= 5

        page.locator("#seed-used").click()
        page.locator("#run").click()
        expect(page.locator("#status")).to_contain_text("Done")
        assert page.locator("#output").evaluate("e => e.textContent") == first

        page.locator("#max_new_tokens").fill("5000")
        page.locator("#run").click()
        expect(page.locator("#error")).to_contain_text("context")


def test_the_real_server_asks_for_its_key_and_takes_it_from_the_page(open_page):
    with serving(model="demo", backend="numpy", api_key="k" * 8) as server:
        credentials = {"username": "", "password": "k" * 8}  # what a person types when the browser asks
        page = open_page(server.url + "/", expected=["status of 401"], http_credentials=credentials)
        page.locator("#max_new_tokens").fill("3")
        page.locator("#api_key").fill("wrong")
        run(page)
        expect(page.locator("#error")).to_contain_text("The API key is missing or wrong.")
        page.locator("#api_key").fill("k" * 8)
        run(page)
        expect(page.locator("#status")).to_contain_text("Done")
        page.close()  # else it asks the server for its tokens once more, which is gone


def test_the_playground_can_be_turned_off():
    with serving(model="demo", backend="numpy", playground=False) as server:
        assert server.client.get("/").status_code == 404
        assert server.client.get("/playground/app.js").status_code == 404
