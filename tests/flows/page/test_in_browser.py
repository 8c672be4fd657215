"""The page in headless Chromium, at desktop and phone width, light and dark: no error, no request, and a reader's steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser
from page_store import HOSTILE, add_run

from flows.page.build import page

pytestmark = pytest.mark.slow
DRAWN = """[...document.querySelectorAll('canvas')].filter(
    (each) => each.getContext('2d').getImageData(0, 0, each.width, each.height).data.some(Boolean)).length"""
SECOND = """(() => {
    const box = document.querySelectorAll('.tokens span')[1].getBoundingClientRect();
    return [box.x + 2, box.y + 8]; })()"""
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs with hostile texts."""
    folder = tmp_path_factory.mktemp("browser")
    add_run(folder / "store", with_judge=True)
    add_run(folder / "store", "other")
    (folder / "page.html").write_bytes(page(folder / "store", ["hostile", "other"]).html)
    return folder / "page.html"


@pytest.fixture(scope="module")
def tab(file: Path) -> Iterator[Browser]:
    with browser(file.parent) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_drawn_without_an_error_or_a_request(tab: Browser, file: Path, size: str, dark: bool) -> None:
    tab.problems.clear()
    tab.requests.clear()
    tab.open(file, *SIZES[size], dark)
    tab.ask("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    tab.frames()
    assert tab.ask(DRAWN) == tab.ask("document.querySelectorAll('figure').length") >= 8
    assert tab.ask("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert tab.ask("typeof window.broken") == "undefined"
    background = tab.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgb()").split(","))) < 384) == dark
    assert tab.problems == [] and tab.requests == [file.as_uri()]


def test_colours_follow_the_system_without_a_reload(tab: Browser, file: Path) -> None:
    tab.open(file, *SIZES["desktop"], dark=False)
    pixels = "document.querySelector('canvas').toDataURL()"
    before = tab.ask(pixels)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    tab.frames()
    assert tab.ask(pixels) != before and tab.problems == []


def test_a_token_is_explained_when_pointed_at_and_by_keys(tab: Browser, file: Path) -> None:
    tab.open(file, *SIZES["desktop"], dark=False)
    tab.ask("document.getElementById('list').scrollIntoView()")
    tab.hover(*tab.ask(SECOND))
    shown = tab.ask("document.getElementById('detail').innerText")
    assert "1 of 8" in shown and "student's likeliest" in shown and HOSTILE in shown.replace("␣", " ")
    tab.ask("document.querySelector('.tokens span').focus()")
    for _ in range(3):
        tab.press("ArrowRight")
    assert "3 of 8" in tab.ask("document.getElementById('detail').innerText")
    tab.ask("document.querySelector('.tokens .masked').click()")
    assert "special token: a special token" in tab.ask("document.getElementById('detail').innerText")
    assert "left out of the loss" in tab.ask("document.getElementById('detail').innerText")
    assert tab.problems == []


def test_filters_narrow_what_is_shown(tab: Browser, file: Path) -> None:
    tab.open(file, *SIZES["desktop"], dark=False)

    def count(**values: str) -> int:
        for name, value in values.items():
            tab.ask(f"document.getElementById('filters').elements.{name}.value = '{value}'")
        tab.ask("document.getElementById('filters').dispatchEvent(new Event('input'))")
        return int(tab.ask("document.getElementById('found').textContent").split()[0])

    assert count() == 120  # two rounds of one run, the last of the other
    assert count(group="other, round 2|") == 40
    assert count(token="é") == 40 and tab.ask("document.querySelectorAll('.tokens .hit').length") >= 10
    assert count(token="no such token") == 0
    assert count(token="", reason="special token") == 40 and count(reason="truncated") == 0
    assert count(reason="", prompt="train 7 ") == 2 and count(prompt="train7/2/1") == 1
    assert count(prompt="", group="hostile, round 2|1") == 40
    assert count(group="hostile, round 2|", verdict="right") == 14 and count(verdict="none") == 13
    assert count(verdict="", least="0.5") == 14 and count(least="", most="0.5") == 13
    assert tab.ask("document.querySelector('.judged').innerText").startswith("wrong, reward 0")
    assert count(most="", group="other, round 2|", verdict="wrong") == 0  # nothing judged that run
    assert count(verdict="", group="hostile, round 2|1") == 40
    shown = tab.ask("document.querySelectorAll('.completion').length")
    tab.ask("document.getElementById('more').click()")
    assert tab.ask("document.querySelectorAll('.completion').length") == 2 * shown
