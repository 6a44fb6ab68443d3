"""The page at ``/``, and in a real browser: a clip, its answer, abstention, errors, keyboard, phone width."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import browsing
import pytest
import served_model as world

from vidreason.answering.loaded import LoadedModel
from vidreason.serving.engine import Answer, Job, Refused
from vidreason.serving.limits import MB
from vidreason.serving.service import Service

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

browser = browsing.browser
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title = 2</script></pre><b>bold</b>'
TOKEN = "0123456789abcdef"


def test_policy_names_the_only_script_and_style_by_hash(port: int):
    reply = world.call(port, "/")
    policy = reply.headers["content-security-policy"]
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", reply.body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert not re.search(r"https?://|\son\w+=|style=", reply.body)
    assert world.NAME not in reply.body  # a caller without a token learns nothing about the model


class Held:
    """Lets a service answer with hostile traces, and only while ``free`` is set."""

    def __init__(self, service: Service) -> None:
        self.free = threading.Event()
        self.free.set()
        self._answer = service.engine.answer
        service.engine.answer = self.answer  # type: ignore[method-assign]

    def answer(self, jobs: Sequence[Job]) -> list[Answer | Refused]:
        self.free.wait(60)
        return [self._spoil(found) for found in self._answer(jobs)]

    def _spoil(self, found: Answer | Refused) -> Answer | Refused:
        if isinstance(found, Refused) or found.own is None:
            return found
        traces = tuple(replace(trace, text=HOSTILE + "\n" + "long" * 200) for trace in found.own.traces)
        return replace(found, own=replace(found.own, traces=traces))


@pytest.fixture(scope="module")
def service(loaded: LoadedModel) -> Service:
    return world.make_service(replace(loaded, threshold=world.threshold(0.2)))


@pytest.fixture(scope="module")
def held(service: Service) -> Held:
    return Held(service)


@pytest.fixture(scope="module")
def address(service: Service, held: Held) -> Iterator[str]:
    with world.running(service) as port:
        yield f"http://127.0.0.1:{port}/"


def open_page(browser: Browser, address: str, width: int = 1440, scheme: str = "light") -> tuple[Page, list[str]]:
    """Opens the page and collects what must not happen: messages, errors, dialogs, requests of other addresses."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (problems.append("dialog"), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith(("data:", address)) else problems.append(f"loads {r.url}"))
    page.goto(address)
    return page, problems


def state(page: Page, ends: str) -> str:
    """Waits until the line of the state ends with a text; returns it."""
    line = page.locator("#state", has_text=re.compile(re.escape(ends) + "$"))
    line.wait_for()
    return line.inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_a_dropped_clip_is_answered(
    browser: Browser, address: str, clips: list[bytes], tmp_path: Path, width: int, scheme: str
):
    page, problems = open_page(browser, address, width, scheme)
    page.locator("#classes", has_text="dark, bright, grey").wait_for()
    page.screenshot(path=tmp_path / "before.png", full_page=True)
    data = page.evaluate_handle(
        """text => {
          const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0)), data = new DataTransfer();
          data.items.add(new File([bytes], "door.mp4", {type: "text/plain"}));
          return data;
        }""",
        base64.b64encode(clips[1]).decode(),
    )
    page.dispatch_event("h1", "drop", {"dataTransfer": data})  # beside the zone
    page.locator("#result").wait_for()
    reply = world.call(int(address.rstrip("/").rpartition(":")[2]), "/v1/classify", clips[1]).body
    assert page.locator("#choice").inner_text() == reply["choice"]
    assert state(page, f"{reply['choice']}.") == f"door.mp4: {reply['choice']}."
    shown = page.locator("#probs li").all_inner_texts()
    ordered = sorted(reply["probabilities"].items(), key=lambda pair: -pair[1])
    assert [text.split("\n")[0] for text in shown] == [name for name, _ in ordered]
    assert [text.split("\n")[-1] for text in shown] == [f"{100 * share:.1f} %" for _, share in ordered]
    track, bar, mark = (
        page.locator(f"#probs li:first-child .{name}").bounding_box() for name in ("track", "bar", "mark")
    )
    assert track
    assert bar
    assert mark
    assert bar["width"] / track["width"] == pytest.approx(ordered[0][1], abs=0.01)
    assert (mark["x"] - track["x"]) / track["width"] == pytest.approx(0.2, abs=0.02)
    assert "2 were wrong" in page.locator("#threshold").inner_text()
    assert "temperature 1.70" in page.locator("#calibration").inner_text()
    frames = page.locator("#strip img")
    assert frames.count() == reply["clip"]["frames"]
    assert all(frame.evaluate("image => image.naturalWidth") > 0 for frame in frames.all())
    assert page.locator("#traces pre").first.inner_text().startswith(HOSTILE)
    assert page.locator("#traces b, #traces img, #traces script").count() == 0
    assert page.title() == "vidreason: ask about a clip"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "answer.png", full_page=True)
    assert problems == []
    page.close()


@pytest.mark.slow
def test_keyboard_cancel_and_replacement(browser: Browser, address: str, held: Held, clips: list[bytes]):
    page, problems = open_page(browser, address)
    held.free.clear()
    try:
        with page.expect_file_chooser() as chooser:  # around all keys: it takes a while to begin
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == "drop"
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            page.keyboard.press("Enter")
        chooser.value.set_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": clips[0]})
        state(page, "looks at a.mp4 …")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "cancel"
        page.keyboard.press("Enter")
        state(page, "Cancelled.")
        assert page.evaluate("document.activeElement.id") == "drop"
        page.locator("#file").set_input_files({"name": "b.mp4", "mimeType": "video/mp4", "buffer": clips[1]})
        state(page, "looks at b.mp4 …")
        page.locator("#file").set_input_files({"name": "c.mp4", "mimeType": "video/mp4", "buffer": clips[2]})
        state(page, "looks at c.mp4 …")
    finally:
        held.free.set()
    page.locator("#result").wait_for()
    assert page.locator("#state").inner_text().startswith("c.mp4: ")
    assert page.evaluate("document.activeElement.id") == "drop"
    assert problems == []
    page.close()


@pytest.mark.slow
def test_errors_are_one_clear_line(browser: Browser, address: str, service: Service, clips: list[bytes]):
    page, problems = open_page(browser, address)
    page.locator("#classes", has_text="dark").wait_for()

    def choose(name: str, content: bytes) -> None:
        page.locator("#file").set_input_files({"name": name, "mimeType": "video/mp4", "buffer": content})

    choose("notes.mp4", b"no video at all")
    assert state(page, "(JPEG, PNG, WebP).").startswith("notes.mp4: neither a video")
    assert not page.locator("#again").is_visible()
    choose("cut.mp4", clips[0][: len(clips[0]) // 3])
    assert "cut.mp4: the clip cannot be read" in state(page, ".")
    choose("nothing.mp4", b"")
    state(page, "nothing.mp4 is empty.")
    service.active += service.options.waiting
    choose("a.mp4", clips[0])
    assert re.search(r"requests are waiting .* Try again in \d+ s\.$", state(page, " s."))
    service.active -= service.options.waiting
    page.context.set_offline(True)
    page.locator("#again").click()
    state(page, "Is it still running?")
    page.context.set_offline(False)
    page.locator("#again").click()
    page.locator("#result").wait_for()
    assert not page.locator("#state.error").is_visible()
    # Chromium itself writes a line about every answer that is an error
    assert [text for text in problems if "Failed to load resource" not in text] == []
    problems.clear()
    page.evaluate(f"ask(new File([new Uint8Array({64 * MB + 1})], 'film.mp4'))")
    assert state(page, "64 MiB.") == "film.mp4 has 64.0 MiB; the service takes at most 64 MiB."
    assert problems == []  # it was not sent
    page.close()


@pytest.mark.slow
def test_abstention_behind_a_token(browser: Browser, loaded: LoadedModel, clips: list[bytes], tmp_path: Path):
    service = world.make_service(replace(loaded, threshold=world.threshold(0.999)))
    with world.running(service, token=TOKEN) as port:
        page, problems = open_page(browser, f"http://127.0.0.1:{port}/", 390)
        page.locator("#token").fill("wrong")
        page.locator("#file").set_input_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": clips[0]})
        assert "token is missing or wrong" in state(page, "Bearer ...).")
        page.locator("#token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.locator("#result").wait_for()
        assert page.locator("#choice").inner_text() == "Below the threshold"
        assert re.fullmatch(
            r"Likeliest is \w+ with [\d.]+ %; a decision needs 99\.9 %\.", page.locator("#why").inner_text()
        )
        assert page.locator("#state").inner_text() == "a.mp4: no decision."
        assert page.locator("#classes").inner_text() == "One of: dark, bright, grey"
        page.screenshot(path=tmp_path / "abstains.png", full_page=True)
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        page.reload()
        assert page.locator("#token").input_value() == ""
        assert [text for text in problems if "401" not in text] == []
        page.close()
