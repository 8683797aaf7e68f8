"""The page, in a real browser, on the real server."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'instil[serve]')")

from .conftest import serving

STATIC = resources.files("instil.serving") / "static"


def test_what_others_wrote_is_as_published():
    rows = re.findall(r"^\| `([^`]+)` .*`(\w{64})` \|$", (STATIC / "vendor/README.md").read_text("utf-8"), re.MULTILINE)
    sums = {name: hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() for name, _ in rows}
    assert sums == dict(rows)
    scripts = {each.name for each in (STATIC / "vendor").iterdir() if each.name.endswith("js")}
    assert scripts == set(sums)


def test_the_page_holds_nothing_that_the_policy_forbids_and_names_no_other_host():
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.seen = []

        def handle_starttag(self, tag, attributes):
            self.seen.append((tag, dict(attributes)))

    tags = Tags()
    tags.feed((STATIC / "index.html").read_text("utf-8"))
    assert not [tag for tag, attributes in tags.seen if any(re.match("on|style$", name) for name in attributes)]
    assert all("src" in attributes for tag, attributes in tags.seen if tag == "script")
    assert not [tag for tag, _ in tags.seen if tag in ("style", "iframe", "base")]
    loaded = [attributes.get("src") or attributes["href"] for tag, attributes in tags.seen if tag in ("script", "link")]
    assert loaded
    assert all((STATIC / address.removeprefix("/static/")).is_file() for address in loaded)
    for own in (each for each in STATIC.iterdir() if each.name.endswith((".js", ".css"))):
        text = own.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text), own.name


# What follows needs a browser.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
    )
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    arguments = [
        "--no-sandbox",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def guarded(tuned):
    """A server that wants a key, records nothing, and gives one answer at a time."""
    with serving(tuned, "--max-batch", 1, "--max-waiting", 0, INSTIL_API_KEY="sesame") as found:
        yield found


def instil(*arguments):
    command = [sys.executable, "-m", "instil", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Notes, while an answer is being written, how long its text is.
WATCH = """
window.lengths = [];
new MutationObserver(() => {
  const text = document.querySelector("#messages > li:last-child .text");
  if (text && !document.getElementById("stop").hidden) lengths.push(text.textContent.length);
}).observe(document, { subtree: true, childList: true });
"""


@pytest.fixture
def visit(browser):
    """Open the page in a fresh profile; at the end, whatever no view may ever do is looked for."""
    contexts, asked, errors = [], [], []

    def visit(server, **options):
        url = f"{server.url}/"
        context = browser.new_context(
            **{"viewport": {"width": 1200, "height": 850}, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        context.set_default_timeout(30_000)
        context.add_init_script(WATCH)
        context.route(lambda address: not address.startswith((url, "data:", "blob:")), lambda route: route.abort())
        context.on("request", lambda request: asked.append((url, request.url)))
        page = context.new_page()
        # The browser logs a refusal too; the tests that call for one look for what the page says.
        page.on("console", lambda line: errors.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert asked
    assert [address for url, address in asked if not address.startswith((url, "data:", "blob:"))] == []
    assert [error for error in errors if not error.startswith("Failed to load resource: ")] == []


@pytest.fixture
def page(visit, served):
    page = visit(served)
    page.wait_for_selector("body.ready")
    return page


def box(page):
    return page.get_by_label("Message", exact=True)


def finished(page):
    page.wait_for_selector("#send:not([hidden])")


def send(page, text):
    box(page).fill(text)
    box(page).press("Enter")
    finished(page)


def press(page, name, at=-1):
    page.get_by_role("button", name=name, exact=True).nth(at).click()


def settings(page, **values):
    press(page, re.compile("^Settings"))
    dialog = page.get_by_role("dialog", name="How answers are drawn")
    for label, value in values.items():
        dialog.get_by_label(label.replace("_", " "), exact=True).fill(str(value))
    press(page, "Done")


def keep(page):
    page.get_by_role("switch", name="Let this conversation be kept for training").check()


def shown(page):
    return [text.strip() for text in page.locator("#messages .text").all_inner_texts()]


def test_an_answer_grows_while_it_is_written_and_is_there_after_a_reload(page):
    settings(page, Temperature=2, Max_tokens=48, Seed=1)
    send(page, "Who are you?")
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3
    question, answer = shown(page)
    assert question == "Who are you?"
    with page.expect_download() as file:
        press(page, "Export")
    kept = json.loads(file.value.path().read_text("utf-8"))
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    # Read out once it is there, whole.
    assert page.locator("#announce").text_content() == f"tuned: {kept['messages'][1]['content']}"
    page.reload()
    page.wait_for_selector("body.ready")
    assert shown(page) == [question, answer]
    assert page.get_by_role("heading", name="Who are you?").is_visible()


def test_escape_stops_an_answer_and_what_was_said_stays(page):
    settings(page, Temperature=2, Max_tokens=400, Seed=1)
    box(page).fill("Tell me a long story.")
    box(page).press("Enter")
    page.locator("#messages > li:last-child .text", has_text=re.compile(r"\S.{5}", re.DOTALL)).wait_for()
    page.keyboard.press("Escape")
    finished(page)
    _, answer = shown(page)
    assert answer.endswith("Stopped.")
    assert len(answer) > len("Stopped.") + 5
    # The next message is answered as if nothing had been.
    settings(page, Max_tokens=4)
    send(page, "Go on.")
    before = shown(page)
    assert len(before) == 4
    # A reload ends an answer too.
    settings(page, Max_tokens=400)
    box(page).fill("Another long story.")
    box(page).press("Enter")
    page.locator("#messages > li:last-child .text", has_text=re.compile(r"\S.{5}", re.DOTALL)).wait_for()
    page.reload()
    page.wait_for_selector("body.ready")
    assert shown(page) == [*before, "Another long story."]
    settings(page, Max_tokens=4)
    press(page, "Answer this")
    finished(page)
    assert len(shown(page)) == 6
    # The button that was pressed has gone meanwhile; the focus has not.
    box(page).fill("And then?")
    page.get_by_role("button", name="Send", exact=True).press("Enter")
    finished(page)
    assert page.evaluate("document.activeElement.id") == "send"


def test_an_answer_is_asked_for_again_and_a_message_edited_and_both_versions_stay(page):
    settings(page, Temperature=2, Max_tokens=24, Seed=1)
    send(page, "Name a colour.")
    (_, first) = shown(page)
    settings(page, Seed=2)
    press(page, "Retry")
    finished(page)
    (_, second) = shown(page)
    assert second != first
    assert page.get_by_role("group", name="Versions").inner_text() == "2 of 2"
    press(page, "Previous version")
    assert shown(page)[1] == first

    press(page, "Edit", 0)
    page.get_by_role("textbox", name="Your message").fill("Name an animal.")
    press(page, "Send")
    finished(page)
    assert shown(page)[0] == "Name an animal."
    press(page, "Previous version", 0)
    assert shown(page) == ["Name a colour.", first]


def test_conversations_are_kept_renamed_and_deleted(page):
    settings(page, Max_tokens=4)
    send(page, "First of two")
    first = shown(page)
    press(page, "New conversation")
    assert shown(page) == []
    box(page).fill("typed, not sent")
    kept = page.get_by_role("complementary", name="Conversations").get_by_role("listitem")
    assert kept.all_inner_texts() == ["First of two"]
    page.reload()
    page.wait_for_selector("body.ready")
    assert box(page).input_value() == "typed, not sent"
    send(page, "Second of two")
    kept.nth(1).wait_for()
    assert kept.all_inner_texts() == ["Second of two", "First of two"]
    kept.nth(1).get_by_role("button").click()
    page.get_by_role("heading", name="First of two").wait_for()
    assert shown(page) == first
    press(page, "Rename")
    page.get_by_role("textbox", name="Name").fill("Called by me")
    page.keyboard.press("Enter")
    kept.get_by_text("Called by me").wait_for()
    press(page, "Delete", 0)
    press(page, "Delete")
    kept.get_by_text("Called by me").wait_for(state="hidden")
    page.reload()
    page.wait_for_selector("body.ready")
    assert kept.all_inner_texts() == ["Second of two"]


def test_the_token_view_shows_the_ids_that_were_served(page, served):
    settings(page, Temperature=0, Max_tokens=8)
    page.get_by_text("System message").first.click()
    page.get_by_role("textbox", name="System message").first.fill("Be brief.")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "Who are you?")
    press(page, "Tokens")
    dialog = page.get_by_role("dialog", name="Tokens")
    dialog.get_by_text("These are the ids that were served.").wait_for()
    given = dialog.get_by_role("listbox", name="What the model sees").get_by_role("option")
    messages = sent.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["system", "user"]
    tokens = served.client.post("/tokenize", json={"messages": messages}).json()
    assert [int(re.search(r"token (\d+)", name)[1]) for name in labels(given)] == tokens["tokens"]
    special = dialog.locator("#tokens-given .special").all_inner_texts()
    assert special == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]

    generated = dialog.get_by_role("listbox", name="What it generated").get_by_role("option")
    assert 0 < generated.count() <= 9
    generated.first.focus()
    likely = dialog.get_by_role("table").locator("tr")
    assert likely.count() >= 5
    assert "%" in likely.first.inner_text()
    # One stop for the Tab key, arrow keys from there.
    page.keyboard.press("End")
    assert generated.last.evaluate("element => element === document.activeElement")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def labels(options):
    return [option.get_attribute("aria-label") for option in options.all()]


def test_the_keyboard_reaches_everything_and_is_nowhere_caught(page):
    settings(page, Max_tokens=4)
    keep(page)
    send(page, "Hello")
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        name = page.evaluate("""() => {
          const at = document.activeElement;
          const ringed = at.id === "message" || getComputedStyle(at).outlineStyle !== "none";
          return at === document.body ? null : [ringed, at.id || at.dataset.key || at.tagName + at.textContent.trim()];
        }""")
        if name in reached:
            break
        if name is not None:
            reached.append(name)
    assert all(ringed for ringed, _ in reached)
    wanted = page.locator("button:visible, a:visible, input:visible, select:visible, textarea:visible, summary:visible")
    names = wanted.evaluate_all("""all => all.filter((each) => !each.disabled && !each.closest("dialog"))
      .map((each) => each.id || each.dataset.key || each.tagName + each.textContent.trim())""")
    assert len(names) > 15
    assert set(names) <= {name for _, name in reached}


HOSTILE = """
<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"><svg onload="window.hacked = 3">
<iframe srcdoc="<script>parent.hacked = 4</script>"></iframe><style>body { display: none }</style>

x <a href="javascript:window.hacked = 5">one</a> <b onclick=window.hacked=14>bold</b>
[two](javascript:window.hacked=6) [three](JaVaScRiPt&colon;window.hacked=7)
[four](data:text/html,<script>opener.hacked=8</script>) [five](vbscript:x)
<form action=https://evil.example><input name=q></form>

![pixel](https://evil.example/pixel.png) ![x](x" onerror="window.hacked=9) <base href="https://evil.example/">
<math><mi//xlink:href="data:x,<script>window.hacked=10</script>">
[six](https://example.org "a \" onclick=window.hacked=11")
[![seven](https://evil.example/p.png)](https://example.org/seven)

```html" onmouseover="window.hacked=12
</code></pre><script>window.hacked = 13</script>
```

| <b onclick=window.hacked=16>cell</b> | `<img src=x onerror=window.hacked=15>` |
| --- | --- |
"""

DRAW = """async (text) => {
  const { markdown } = await import("/static/markdown.js");
  const part = document.createElement("div");
  part.id = "hostile";
  part.append(markdown(text));
  document.getElementById("messages").append(part);
  const all = [...part.querySelectorAll("*")];
  return {
    tags: [...new Set(all.map((each) => each.localName))],
    attributes: [...new Set(all.flatMap((each) => each.getAttributeNames()))],
    links: [...part.querySelectorAll("a")].map((each) => [each.getAttribute("href"), each.rel, each.target]),
    text: part.textContent,
  };
}"""


def test_a_hostile_answer_does_nothing(page):
    drawn = page.evaluate(DRAW, HOSTILE)
    # What stands around code blocks and tables is the page's own.
    own = {"div", "button", "svg", "use"}
    assert set(drawn["tags"]) - own <= {"p", "a", "br", "strong", "code", "pre", "table", "thead", "tbody", "tr", "th"}
    own = {"class", "type", "aria-label", "aria-hidden", "tabindex", "title"}
    assert set(drawn["attributes"]) <= {"href", "rel", "target", "align"} | own
    assert "<script>window.hacked = 1</script>" in drawn["text"]
    assert all(rel == "noopener noreferrer" and target == "_blank" for _, rel, target in drawn["links"])
    assert [href for href, _, _ in drawn["links"] if href] == [
        "https://evil.example/pixel.png",
        "https://example.org",
        "https://example.org/seven",
        "https://evil.example/p.png",
    ]
    for link in page.locator("#hostile a:not([href])").all():
        link.click(force=True)
    page.locator("#hostile button").first.click()
    page.locator("#hostile pre").hover()
    assert page.evaluate("window.hacked") is None
    assert page.locator("#composer").is_visible()


def test_markdown_is_drawn_as_it_is_meant(page):
    drawn = page.evaluate(
        """async (text) => {
      const { markdown } = await import("/static/markdown.js");
      const part = document.createElement("div");
      part.append(markdown(text));
      return part.innerHTML;
    }""",
        "**b** 1 < 2 & 3\n\n- x\n\n3. y\n\n| r |\n| --: |\n| 1 |\n\n[l](https://example.org/?a=1&b=2)",
    )
    assert "<strong>b</strong> 1 &lt; 2 &amp; 3" in drawn
    assert '<ol start="3">' in drawn
    assert '<td align="right">1</td>' in drawn
    assert '<a href="https://example.org/?a=1&amp;b=2" target="_blank" rel="noopener noreferrer">l</a>' in drawn


def test_events_are_read_however_the_bytes_are_cut(page):
    said = ['{"a": "é✓😀"}', "two\nlines", "[DONE]"]
    sent = ': hello\r\n\r\ndata: {"a": "é✓😀"}\n\ndata: two\r\ndata: lines\r\n\r\nevent: x\n\ndata:[DONE]\n\n'
    read = """async ([bytes, size]) => {
      const { events } = await import("/static/api.js");
      const body = new ReadableStream({ start(to) {
        for (let at = 0; at < bytes.length; at += size) to.enqueue(new Uint8Array(bytes.slice(at, at + size)));
        to.close();
      } });
      const found = [];
      for await (const data of events(new Response(body))) found.push(data);
      return found;
    }"""
    data = list(sent.encode())
    for size in [*range(1, 12), len(data)]:
        assert page.evaluate(read, [data, size]) == said, size


@pytest.mark.parametrize("piece", ["> ", "1. "])
def test_what_is_nested_too_deeply_is_shown_as_it_was_written(page, piece):
    """Small models write such things. Once kept, such a conversation must not keep the page from being opened."""
    text = piece * 20_000 + "end"
    assert page.evaluate(DRAW, text)["text"] == text


def test_two_tabs_lose_nothing_of_each_other(page, served):
    from playwright.sync_api import expect

    def conversations(tab):
        return tab.get_by_role("complementary", name="Conversations").get_by_role("listitem").get_by_role("button")

    settings(page, Max_tokens=4)
    send(page, "First")
    other = page.context.new_page()
    other.goto(served.url)
    other.wait_for_selector("body.ready")
    conversations(other).click()
    other.get_by_role("heading", name="First").wait_for()
    send(page, "Second, here")
    send(other, "Second, there")
    assert "both are kept" in other.locator("#note").inner_text()
    send(other, "Third, there")
    for tab in (page, other):
        before = shown(tab)
        tab.reload()
        tab.wait_for_selector("body.ready")
        assert shown(tab) == before
    assert conversations(page).count() == 2
    assert [text for text in shown(page) if text.startswith("Second")] == ["Second, here"]
    assert [text for text in shown(other) if re.match("Second|Third", text)] == ["Second, there", "Third, there"]

    for tab in (page, other):
        tab.get_by_role("link", name="Write").click()
    page.get_by_role("textbox", name="1. User").fill("Written here")
    expect(other.get_by_role("textbox", name="1. User")).to_have_value("Written here")
    press(other, "Add Assistant's turn")
    other.get_by_role("textbox", name="2. Assistant").fill("Written there")
    expect(page.get_by_role("textbox", name="2. Assistant")).to_have_value("Written there")
    assert page.get_by_role("textbox", name="1. User").input_value() == "Written here"


def test_answers_that_are_asked_for_at_once_can_all_be_stopped(page):
    settings(page, Temperature=2, Max_tokens=4, Seed=1)
    send(page, "Hello")
    settings(page, Max_tokens=400)
    box(page).fill("Tell me a long story.")
    box(page).press("Enter")
    page.locator("#messages > li:last-child .text", has_text=re.compile(r"\S.{5}", re.DOTALL)).wait_for()
    page.evaluate("""() => {
      const again = document.querySelector("#messages [data-key='1-retry']");
      again.click();
      again.click();
    }""")
    page.get_by_role("group", name="Versions").get_by_text(re.compile("of [23]")).wait_for()
    page.locator("#messages > li:last-child .text", has_text=re.compile(r"\S.{5}", re.DOTALL)).wait_for()
    page.keyboard.press("Escape")
    finished(page)
    with page.expect_download() as file:
        press(page, "Export")
    asked = json.loads(file.value.path().read_text("utf-8"))["conversation"]["next"][0]
    assert [each["ended"] for each in asked["next"] if each["ended"] is None] == []


def test_what_is_typed_stays_when_the_messages_are_drawn_anew(page):
    settings(page, Max_tokens=4)
    keep(page)
    send(page, "First")
    press(page, "Bad answer")
    page.get_by_role("textbox", name="Why").fill("It is not")
    send(page, "Second")
    assert page.get_by_role("textbox", name="Why").input_value() == "It is not"
    caret = """async () => {
      const { el, redraw } = await import("/static/dom.js");
      const field = () => { const made = el("textarea", { value: "abc" }); made.dataset.key = "k"; return made; };
      const part = el("div", {}, field());
      document.getElementById("messages").append(part);
      part.firstChild.focus();
      part.firstChild.setSelectionRange(1, 2);
      redraw(part, [field()], document.body);
      return [document.activeElement === part.firstChild, part.firstChild.selectionStart, part.firstChild.selectionEnd];
    }"""
    assert page.evaluate(caret) == [True, 1, 2]


def test_what_the_server_says_late_is_kept_where_it_belongs(page):
    settings(page, Max_tokens=4)
    keep(page)
    send(page, "Rated late")
    # The rating is under way when another conversation is opened.
    page.evaluate("""() => {
      document.querySelector("#messages [data-key='1-up']").click();
      document.getElementById("new").click();
    }""")
    page.get_by_text("Rated good.").wait_for()
    assert shown(page) == []
    page.get_by_role("listitem").get_by_role("button", name="Rated late").click()
    page.get_by_role("heading", name="Rated late").wait_for()
    assert page.get_by_role("button", name="Good answer").get_attribute("aria-pressed") == "true"

    # The tokens of one answer are not shown as those of another.
    told = page.evaluate("""async () => {
      const { showTokens } = await import("/static/tokens.js");
      const messages = [{ role: "user", content: "late ".repeat(90) }];
      const first = showTokens({ model: "tuned", tokens: [] }, messages);
      const second = showTokens({ model: "no-such-model", tokens: [] }, messages);
      await Promise.all([first, second]);
      return document.getElementById("tokens-given").textContent;
    }""")
    assert "there is no model 'no-such-model'" in told
    page.keyboard.press("Escape")

    # A dialogue that is changed while it is being saved is not saved as it stands.
    page.get_by_role("link", name="Write").click()
    page.get_by_role("textbox", name="1. User").fill("Saved late")
    press(page, "Add Assistant's turn")
    page.get_by_role("textbox", name="2. Assistant").fill("Yes")
    page.evaluate("""() => {
      document.getElementById("write-save").click();
      const turn = document.getElementById("turn-1");
      turn.value = "Yes, and more";
      turn.dispatchEvent(new Event("input"));
    }""")
    page.get_by_text("The dialogue was kept for training.").wait_for()
    assert page.locator("#write-state").inner_text() == "Ready to be saved."


# The least contrast that WCAG AA asks of text.
CONTRAST = """() => {
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (color) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = color;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility({ checkVisibilityCSS: true })) continue;
    if (element.closest(".unseen, .skip, :disabled, [aria-disabled=true], option")) continue;
    let ground = element;
    while (ground && parts(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(ground ?? document.body).backgroundColor]
      .map((color) => light(parts(color).slice(0, 3))).sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), texts.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.prove
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_every_view_is_readable_and_fits(visit, served, scheme, width):
    page = visit(served, color_scheme=scheme, viewport={"width": width, "height": 800})
    page.wait_for_selector("body.ready")
    seen = 0

    def look(view):
        nonlocal seen
        found = page.evaluate(CONTRAST)
        assert [(view, *each) for each in found if each[0] < 4.5] == []
        seen += len(found)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view

    look("empty")
    settings(page, Temperature=1, Max_tokens=16)
    keep(page)
    send(page, "Hello " + "verylongword" * 20)
    press(page, "Good answer")
    page.get_by_role("textbox", name="Why").wait_for()
    look("answer")
    page.evaluate(DRAW, "# A\n\n> b `c`\n\n```\n" + "wide " * 80 + "\n```\n\n| d |\n| - |\n| " + "e" * 200 + " |")
    look("markdown")
    press(page, "Tokens")
    page.locator("#tokens-given [role=option]").first.hover()
    page.evaluate("""() => { for (const n of [0, 1, 2, 3, 4]) {
      const token = document.querySelector("#tokens-generated [role=option]").cloneNode();
      token.className = `p${n} special`;
      token.textContent = "<|im_end|>";
      document.querySelector("#tokens-generated .tokens").append(token);
    } }""")
    look("tokens")
    page.keyboard.press("Escape")
    press(page, re.compile("^Settings"))
    look("settings")
    page.keyboard.press("Escape")
    page.locator("#answers").select_option("compare")
    send(page, "And you?")
    look("pair")
    if width < 800:
        press(page, "Conversations")
        look("list")
        page.keyboard.press("Escape")
    page.get_by_role("link", name="Write").click()
    look("write")
    press(page, "Light or dark")
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == other
    look(other)
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.evaluate("document.documentElement.dataset.theme") == other
    assert seen > 100


def exported(served, tmp_path, kind):
    target = tmp_path / f"{kind}.jsonl"
    instil("feedback", "export", "--record", served.record, "--output", target, "--kind", kind)
    return [json.loads(line) for line in target.read_text("utf-8").splitlines()]


@pytest.mark.prove
def test_what_a_person_does_becomes_rows_that_train(visit, served, tuned, tmp_path):
    page = visit(served)
    page.wait_for_selector("body.ready")
    settings(page, Temperature=1, Seed=3)
    # Not kept: nothing to rate, and it says why.
    send(page, "Not for training")
    thumb = page.get_by_role("button", name="Good answer")
    assert thumb.get_attribute("aria-disabled") == "true"
    thumb.press("Enter")
    assert "was not kept" in page.locator("#note").inner_text()

    press(page, "New conversation")
    keep(page)
    send(page, "First question of the page")
    press(page, "Good answer")
    page.get_by_role("textbox", name="Why").fill("It is right")
    press(page, "Send", 0)
    page.get_by_text("Your reason: It is right").wait_for()

    send(page, "Second question of the page")
    press(page, "Correct")
    page.get_by_role("textbox", name="The answer it should have given").fill("What I would have said")
    press(page, "Keep for training")
    page.get_by_role("heading", name="Written by you").wait_for()
    assert shown(page)[3] == "What I would have said"

    page.locator("#answers").select_option("twice")
    send(page, "Third question of the page")
    press(page, "This one is better")
    page.get_by_role("button", name="You chose this one").wait_for()
    # The corrected answer is what the conversation went on with.
    press(page, "Tokens")
    page.get_by_text("These are the ids that were served.").wait_for()
    assert "What·I·would·have·said" in page.locator("#tokens-given").inner_text()
    page.keyboard.press("Escape")

    page.locator("#answers").select_option("compare")
    send(page, "Fourth question of the page")
    models = page.locator(".pair h3").all_inner_texts()
    assert models == ["Answer A: tuned", "Answer B: model"]
    with page.expect_request("**/api/feedback") as chosen:
        press(page, "This one is better", 0)
    page.get_by_role("button", name="You chose this one").wait_for()

    with page.expect_download() as file:
        press(page, "Export")
    talk = json.loads(file.value.path().read_text("utf-8"))["conversation"]
    first, second, third, fourth = turns(talk)
    assert chosen.value.post_data_json == {
        "kind": "preference",
        "chosen": {"id": fourth["next"][0]["served"], "choice": 0},
        "rejected": {"id": fourth["next"][1]["served"], "choice": 0},
    }

    page.get_by_role("link", name="Write").click()
    page.get_by_label("Who asks", exact=True).fill("Ana")
    page.get_by_label("System message").last.fill("Be kind.")
    page.get_by_role("textbox", name="1. Ana").fill("Good morning, page")
    press(page, "Add Assistant's turn")
    with page.expect_request("**/v1/chat/completions") as proposed:
        press(page, "Propose")
    page.get_by_text("A draft was written.").wait_for()
    assert page.get_by_role("textbox", name="2. Assistant").input_value() != ""
    body = proposed.value.post_data_json
    assert not body["store"]
    assert [message["content"] for message in body["messages"]] == ["Be kind.", "Good morning, page"]
    mine = page.get_by_role("textbox", name="2. Assistant")
    mine.fill("Good morning, Ana")
    press(page, "Propose")
    press(page, "Take back the draft")
    assert mine.input_value() == "Good morning, Ana"
    press(page, "Save for training")
    page.get_by_text("Saved for training.").wait_for()
    with page.expect_download() as file:
        press(page, "Download")

    # The rows: what was rated good, corrected and written is trained, and nothing else.
    supervised = exported(served, tmp_path, "supervised")
    trained = {
        m["content"] for row in supervised for m in row["messages"] if m["role"] == "assistant" and m.get("weight") != 0
    }
    assert {first["next"][0]["content"], "What I would have said", "Good morning, Ana"} <= trained
    assert not {each["content"] for each in (second["next"][0], *third["next"], *fourth["next"])} & trained
    (written,) = [row for row in supervised if row["messages"][-1]["content"] == "Good morning, Ana"]
    (downloaded,) = map(json.loads, file.value.path().read_text("utf-8").splitlines())
    assert written["messages"] == downloaded["messages"]
    assert [message["role"] for message in written["messages"]] == ["system", "user", "assistant"]
    pairs = {
        row["prompt"][-1]["content"]: (row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in exported(served, tmp_path, "preference")
    }
    assert pairs["Second question of the page"] == ("What I would have said", second["next"][0]["content"])
    worse, better = third["next"]
    assert pairs["Third question of the page"] == (better["content"], worse["content"])

    chosen = ("--model", tuned, "--max-steps", 1, "--no-cache", "--output", tmp_path / "again")
    instil("train", *chosen, "--data", tmp_path / "supervised.jsonl")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def turns(conversation):
    """The messages of the user that were gone on with."""
    found, at = [], conversation
    while at["next"]:
        at = at["next"][at["active"]]
        found += [at] if at["role"] == "user" else []
    return found


@pytest.mark.prove
def test_a_server_with_a_key_asks_for_it_and_one_that_keeps_nothing_says_so(visit, guarded):
    page = visit(guarded)
    dialog = page.get_by_role("dialog", name="API key")
    dialog.wait_for()
    page.evaluate("""() => {
      window.second = import("/static/api.js").then(({ json }) => json("/v1/models"));
    }""")
    dialog.get_by_label("API key").fill("сезам")  # letters that are none of a header's
    page.keyboard.press("Enter")
    dialog.get_by_text("does not take this key").wait_for()
    dialog.get_by_label("API key").fill("sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("body.ready")
    assert page.evaluate("second.then(({ data }) => data.length)") == 1, "all that wanted it have it"
    assert page.get_by_role("switch").is_disabled()
    assert "started without --record" in page.locator("#keep-note").inner_text()
    settings(page, Max_tokens=4)
    send(page, "Hello")
    assert len(shown(page)) == 2
    page.get_by_role("button", name="Good answer").press("Enter")
    assert "started without --record" in page.locator("#note").inner_text()
    # One of two answers is refused, for the other is being given.
    settings(page, Max_tokens=96)
    page.locator("#answers").select_option("twice")
    send(page, "Twice?")
    assert len(shown(page)) == 4
    assert "too many requests" in page.locator("#note").inner_text()
    page.locator("#answers").select_option("once")
    settings(page, Max_tokens=4)
    # For this tab, not for the next.
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.evaluate("Object.values(localStorage)") == ['{"max_tokens":"4"}']

    # So is a server that cannot be reached.
    page.context.set_offline(True)
    send(page, "Are you there?")
    assert "cannot be reached" in page.get_by_role("alert").inner_text()
    page.context.set_offline(False)
    press(page, "Try again")
    finished(page)
    assert len(shown(page)) == 6

    # What the server refuses is said, and what was typed stays.
    send(page, "too long " * 2000)
    page.get_by_role("alert").wait_for()
    assert "512" in page.get_by_role("alert").inner_text()
    press(page, "Edit")
    assert page.get_by_role("textbox", name="Your message").input_value() == "too long " * 2000
    page.get_by_role("textbox", name="Your message").fill("Short")
    press(page, "Send")
    finished(page)
    assert shown(page)[-2] == "Short"
