"""The page in Debian's chromium, headless, on a real daemon. WebDriver is JSON over HTTP: no library is needed to speak it."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import httpx
import pytest

from harness import DaemonProcess

pytestmark = pytest.mark.browser

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
START_S, SEEN_S = 60.0, 30.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which WebDriver hands out elements
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)

Photo = Callable[..., bytes]


class Browser:
    """One chromium, driven through chromedriver. Elements are found by CSS."""

    def __init__(self, profile: Path) -> None:
        assert CHROMEDRIVER is not None, "the fixture skips without it"
        self._driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, universal_newlines=True)
        assert self._driver.stdout is not None
        ports = (re.search(r"started successfully on port (\d+)", line) for line in self._driver.stdout)
        port = next(found.group(1) for found in ports if found)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=START_S)
        options = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        timeouts = {"script": round(2000 * SEEN_S)}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}, "timeouts": timeouts}
        session = self._call("POST", "/session", capabilities={"alwaysMatch": wanted})
        self._session = f"/session/{session['sessionId']}"

    def close(self) -> None:
        try:
            self._call("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(START_S)
            assert self._driver.stdout is not None
            self._driver.stdout.close()
            self._http.close()

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", url=url)

    def script(self, body: str, *arguments: Any) -> Any:
        return self._call("POST", f"{self._session}/execute/sync", script=body, args=list(arguments))

    def until(self, condition: str, *arguments: Any) -> Any:
        """The first true value of a JavaScript expression, looked at in every frame; what the page shows when it never comes."""
        wait = (
            "const done = arguments[arguments.length - 1], end = performance.now() + arguments[0], given = [...arguments].slice(1, -1);"
            f"const look = () => {{ const found = ((...given) => {condition})(...given);"
            "if (found || performance.now() > end) done(found || null); else setTimeout(look, 20); }; look();"
        )
        found = self._call("POST", f"{self._session}/execute/async", script=wait, args=[1000 * SEEN_S, *arguments])
        assert found, f"never true: {condition}\nthe page shows:\n{self.script('return document.body.innerText')}"
        return found

    def type(self, css: str, text: str) -> None:
        """Types into a field, or names files for a file field (one a line)."""
        element = self._call("POST", f"{self._session}/element", using="css selector", value=css)[ELEMENT]
        self._call("POST", f"{self._session}/element/{element}/value", text=text)

    def drop(self, css: str, path: str) -> None:
        """Lets go of a file over an element."""
        body = (
            "const data = new DataTransfer(), bytes = Uint8Array.from(atob(arguments[1]), (char) => char.charCodeAt(0));"
            "data.items.add(new File([bytes], arguments[2], { type: 'image/jpeg' }));"
            "for (const name of ['dragover', 'drop']) document.querySelector(arguments[0]).dispatchEvent("
            "new DragEvent(name, { dataTransfer: data, bubbles: true, cancelable: true }))"
        )
        self.script(body, css, base64.b64encode(Path(path).read_bytes()).decode("ascii"), Path(path).name)

    def press(self, keys: str) -> None:
        """Types into whatever has the focus."""
        element = self._call("GET", f"{self._session}/element/active")[ELEMENT]
        self._call("POST", f"{self._session}/element/{element}/value", text=keys)

    def click(self, css: str) -> None:
        element = self._call("POST", f"{self._session}/element", using="css selector", value=css)[ELEMENT]
        self._call("POST", f"{self._session}/element/{element}/click")

    def complaints(self) -> List[str]:
        """What the console says: forbidden by the policy, failed to load, uncaught."""
        return [entry["message"] for entry in self._call("POST", f"{self._session}/se/log", type="browser")]

    def prefer(self, scheme: str, width: int) -> None:
        """Shows the page as to somebody who prefers "dark" or "light", on a screen so wide."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        for command, params in (("setEmulatedMedia", media), ("setDeviceMetricsOverride", screen)):
            self._call("POST", f"{self._session}/goog/cdp/execute", cmd=f"Emulation.{command}", params=params)

    def _call(self, method: str, path: str, **body: Any) -> Any:
        answer: Dict[str, Any] = self._http.request(method, path, json=body if method == "POST" else None).json()
        value = answer["value"]
        assert not (isinstance(value, dict) and "error" in value), f"{path}: {value['message']}"
        return value


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    missing: Optional[str] = None if CHROMIUM and CHROMEDRIVER else "chromium and chromedriver are not installed"
    if missing:
        pytest.skip(missing)
    made = Browser(tmp_path / "profile")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def daemon(daemon_process: Callable[..., DaemonProcess]) -> DaemonProcess:
    return daemon_process()


@pytest.fixture
def pictures(photo: Photo, tmp_path: Path) -> Callable[[str, int], List[str]]:
    """pictures("rings", 3) -> the paths of three new photographs."""
    made = iter(range(1000))

    def write(motif: str, count: int) -> List[str]:
        paths = []
        for _ in range(count):
            seed = next(made)
            path = tmp_path / f"{motif}-{seed}.jpg"
            path.write_bytes(photo(seed, motif))
            paths.append(str(path))
        return paths

    return write


ANSWERS = "[...document.querySelectorAll('.card:not(.busy) .answer')].map((answer) => answer.firstChild.textContent)"
SAID = "[...document.querySelectorAll('.said')].map((said) => said.textContent)"


def teach_all(browser: Browser, paths: List[str], name: str) -> None:
    """Chooses pictures, names them all at once, takes them away again."""
    browser.type("#choose", "\n".join(paths))
    browser.until(f"{ANSWERS}.length === given[0]", len(paths))
    browser.type("#all-name", name)
    browser.click("#all button:not([type])")
    browser.until(f"{SAID}.filter((text) => text === given[0]).length === given[1]", f"Learned as {name}.", len(paths))
    browser.click("#clear")
    browser.until("!document.querySelector('.card')")


def test_a_person_teaches_two_classes_asks_corrects_and_watches(
    browser: Browser, daemon: DaemonProcess, pictures: Callable[[str, int], List[str]]
) -> None:
    browser.open(daemon.url)
    browser.until("document.querySelector('#pulse').textContent === 'Ready'")
    assert browser.script("return document.querySelector('#knows').textContent") == "Nothing yet. Drop a picture and name it."

    # Choose a picture: nothing is known. Name it with the keyboard alone: the answer changes.
    (first,) = pictures("rings", 1)
    browser.type("#choose", first)
    assert browser.until(f"{ANSWERS}.length && {ANSWERS}") == ["Nothing is taught yet"]
    browser.script("document.querySelector('.card .name input').focus()")
    browser.press("<b>rings</b>\ue007")
    assert browser.until(f"{ANSWERS}[0] !== 'Nothing is taught yet' && {ANSWERS}.length && {ANSWERS}") == ["<b>rings</b>"]
    assert browser.script(f"return {SAID}") == ["Learned as <b>rings</b>."]
    assert browser.script("return document.querySelectorAll('.card .bars li, #classes b').length") == 1
    browser.click(".card .close")

    # Several at once, then drop a picture that was never taught.
    teach_all(browser, pictures("rings", 5), "<b>rings</b>")
    teach_all(browser, pictures("stripes", 6), "stripes")
    (asked,) = pictures("stripes", 1)
    browser.drop("#drop", asked)
    assert browser.until(f"{ANSWERS}.length && {ANSWERS}") == ["stripes"]

    # One click says that it is something else, a second one takes that back; it stays one sample.
    browser.click('.card .bars button[title="Teach that it is <b>rings</b>"]')
    browser.until(f"{SAID}[0] === 'Learned as <b>rings</b>.'")
    browser.until("document.querySelector('.card:not(.busy) [aria-pressed=true]')?.title.endsWith('<b>rings</b>')")
    browser.click('.card .bars button[title="Teach that it is stripes"]')
    browser.until(f"{SAID}[0] === 'Learned as stripes.'")
    browser.until(f"{ANSWERS}[0] === 'stripes'")
    samples = httpx.get(f"{daemon.url}/v1/status", trust_env=False).json()["samples"]
    assert samples == 13

    # The status beside it keeps up.
    browser.until("document.querySelector('#knows').textContent === '2 classes from 13 pictures'")
    facts = browser.script("return document.querySelector('aside').innerText")
    assert "onnxruntime" in facts or "eager" in facts
    assert re.search(r"Energy\s+(unavailable\s+\S|[\d.]+ m?k?J)", facts), facts
    behind = {"state": "waiting", "lag_samples": 1200, "lag_s": 3.2}
    shown = [browser.script("return learner(arguments[0])[1]", {**behind, "reason": reason}) for reason in ("too warm", None)]
    assert shown == ["too warm; 1,200 waiting, 3 s behind", "1,200 waiting, 3 s behind"]
    assert browser.complaints() == []


def test_what_can_not_be_used_is_said_in_a_sentence_and_stops_nothing(
    browser: Browser, daemon: DaemonProcess, pictures: Callable[[str, int], List[str]], tmp_path: Path
) -> None:
    (tmp_path / "letter.jpg").write_text("Dear latentd, I am not a picture.")
    browser.open(daemon.url)
    browser.type("#choose", "\n".join([*pictures("discs", 1), str(tmp_path / "letter.jpg")]))
    said = browser.until("document.querySelector('.card.useless .said.bad')?.textContent")
    assert "not JPEG" in said
    assert "{" not in said
    browser.until(f"{ANSWERS}.includes('Nothing is taught yet')")
    browser.type("#all-name", "discs")
    browser.click("#all button:not([type])")
    browser.until(f"{SAID}.includes('Learned as discs.')")

    daemon.kill()
    assert "does not answer" in browser.until("document.querySelector('#pulse.bad')?.textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_phone_and_desk_by_day_and_by_night(
    browser: Browser, daemon: DaemonProcess, pictures: Callable[[str, int], List[str]], scheme: str, width: int
) -> None:
    browser.prefer(scheme, width)
    browser.open(daemon.url)
    browser.type("#choose", "\n".join(pictures("rings", 2)))
    browser.until(f"{ANSWERS}.length === 2")
    browser.until("document.querySelector('#doing dt')")
    wide = browser.script("return document.documentElement.scrollWidth")
    assert wide <= width
    ink, ground = (browser.script(f"return getComputedStyle(document.body).{part}") for part in ("color", "backgroundColor"))
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, ground)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    assert browser.complaints() == []
