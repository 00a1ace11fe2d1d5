"""The page's own files, as they are read by a browser that obeys the Content-Security-Policy and has no network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any, Dict, List, Tuple

import pytest

from latentd.service.routes import page
from latentd.service.security import CONTENT_SECURITY_POLICY
from service.fakes import World

FILES = {name: file.content.decode("utf-8") for name, file in page.load(page.FOLDER).items()}
VOID = {"img", "input", "link", "meta", "br"}


class Reader(HTMLParser):
    """Every tag with its attributes, and the text inside <script> and <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: List[Tuple[str, Dict[str, Any]]] = []
        self.open: List[str] = []
        self.inline = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.inline += data


INDEX = Reader(FILES["index.html"])


def test_the_page_is_small_and_whole() -> None:
    assert set(FILES) == {"index.html", "style.css", "app.js"}
    assert sum(len(content.encode("utf-8")) for content in FILES.values()) < 30_000
    assert INDEX.open == []


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_of_the_page_names_another_host(name: str) -> None:
    assert (
        re.findall(r"(?:https?:|wss?:)?//[a-z0-9]", re.sub(r"^\s*// .*|\s// .*", "", FILES[name], flags=re.MULTILINE), re.IGNORECASE) == []
    )
    assert "@import" not in FILES[name]


def test_nothing_is_inline_that_the_policy_forbids() -> None:
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert INDEX.inline.strip() == ""
    assert [tag for tag, _ in INDEX.tags if tag in ("style", "iframe", "object", "embed", "base")] == []
    for tag, attributes in INDEX.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], f"<{tag}> has inline code"


def test_every_file_that_the_page_names_is_served(world: World) -> None:
    named = [attributes.get("src") or attributes.get("href") for tag, attributes in INDEX.tags if tag in ("script", "link")]
    assert {"/page/app.js", "/page/style.css"} <= set(named)
    for path in named:
        if path != "data:,":
            assert world.call("GET", str(path)).status_code == 200


def test_names_of_people_never_become_markup_or_code() -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setAttribute\(\"style\"|setTimeout\(\s*[\"'`]"
    )
    assert re.findall(forbidden, FILES["app.js"]) == []


def test_every_id_that_the_script_or_a_label_means_exists_once() -> None:
    ids = [attributes["id"] for _, attributes in INDEX.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    meant = set(re.findall(r'\$\("([\w-]+)"\)', FILES["app.js"]))
    meant |= {attributes[name] for _, attributes in INDEX.tags for name in ("for", "list", "aria-labelledby") if name in attributes}
    assert meant - set(ids) == set()


def test_every_field_has_a_name_for_screen_readers() -> None:
    labelled = {attributes["for"] for tag, attributes in INDEX.tags if tag == "label"}
    fields = [attributes for tag, attributes in INDEX.tags if tag == "input"]
    unnamed = [field for field in fields if field.get("id") not in labelled and "aria-label" not in field]
    assert [field.get("placeholder") for field in unnamed] == ["It is something else…"], "app.js names the field of a card after its file"
    assert 'card.input.setAttribute("aria-label"' in FILES["app.js"]
    assert dict(INDEX.tags)["html"]["lang"] == "en"


def test_the_page_has_a_dark_and_a_light_side_with_the_same_colours_named() -> None:
    def colours(block: str) -> List[str]:
        return re.findall(r"(--[\w-]+): #", block)

    light, dark = FILES["style.css"].split("@media (prefers-color-scheme: dark)")
    assert colours(light) == colours(dark.split("}")[0])


def test_every_address_that_the_script_calls_exists(world: World) -> None:
    called = set(re.findall(r'"(/v1/[a-z]+)', FILES["app.js"]))
    assert called == {"/v1/classify", "/v1/learn", "/v1/status", "/v1/classes", "/v1/info"}
    assert called <= set(world.app.openapi()["paths"])
