"""The explorer's pages in a browser: clicks, filters, keys, 400 % zoom, a quiet console, no network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mopsim
from mopsim.report.explore.page import Explorer, html
from tests.e2e.browser import complaints, requested, size, start
from tests.sim.explored import results

KINDS = ("simulate", "search", "compare", "size", "context", "validate")
pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = start(tmp_path_factory.mktemp("profile"))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, result in results().items():
        mopsim.explore(result, folder / f"{name}.html", timelines=1)
    return {name: folder / f"{name}.html" for name in KINDS}


def opened(driver: Any, page: Path, zoom: float = 1.0) -> Any:
    size(driver, 1280, 1024, zoom)
    complaints(driver), requested(driver)  # of what was before
    driver.get(page.as_uri())
    settle(driver)
    return driver


def settle(driver: Any) -> None:
    """Two frames: what was asked to be drawn or scrolled is."""
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def find(driver: Any, css: str) -> list[Any]:
    return list(driver.find_elements("css selector", css))


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def column(driver: Any, place: int) -> list[str]:
    """The cells of a column of the first table."""
    rows = "[...document.querySelectorAll('#view-1 tbody tr')]"
    return list(driver.execute_script(f"return {rows}.map(row => row.children[{place}].textContent)"))


def place_of(driver: Any, name: str) -> int:
    heads = [head.text for head in find(driver, "#view-1 thead th button")]
    return next(place for place, head in enumerate(heads) if head.startswith(name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zoom", [1.0, 4.0])
def test_a_page_is_drawn_quietly_and_fetches_nothing(
    driver: Any, pages: dict[str, Path], kind: str, zoom: float
) -> None:
    opened(driver, pages[kind], zoom)
    sections = find(driver, "main section")
    assert len(sections) == len(find(driver, "nav a")) > 1
    for section in sections:
        assert section.find_elements("css selector", "table, svg .point, svg .part, svg .span")
    wide = driver.execute_script(
        "const room = document.documentElement; return [room.scrollWidth, room.clientWidth]"
    )
    assert wide[0] <= wide[1]  # nothing is lost to the side: one way to scroll
    sizes = (
        "[...document.querySelectorAll('svg text')].map(one => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert driver.execute_script(f"return Math.min(11, ...{sizes})") == 11  # pixels of layout, at any zoom
    assert complaints(driver) == []
    assert all(address.startswith(("file:", "data:")) for address in requested(driver))


def test_a_line_ends_where_a_strategy_has_no_value(driver: Any, tmp_path: Path) -> None:
    """Of three lengths the middle one: what is left are two points without a line."""
    data = results()["compare"]
    data["sweep"]["results"]["mop"][1] = None
    mopsim.explore(data, tmp_path / "holed.html", timelines=0)
    opened(driver, tmp_path / "holed.html")
    assert len(find(driver, "path.line")) == 1  # FSDP2's
    says = " ".join(one.get_attribute("textContent") for one in find(driver, "p.says"))
    assert "cross: does not fit, or no legal strategy" in says


def test_memory_is_drawn_as_it_ends_where_a_peak_shares_its_pixel(driver: Any, tmp_path: Path) -> None:
    """A peak of a millionth of the step has its height for a pixel; what it leaves is drawn to the end."""
    times, sizes = [0.0, 0.5, 0.500001, 0.500002], [1, 2, 8, 1]
    view = {
        "kind": "timeline", "title": "Timeline", "note": "", "streams": ["compute"], "names": ["op"],
        "components": ["experts"], "phases": ["forward"], "spans": [[0, 0.0, 1.0, 0, 0, 0, 0, 0]], "end": 1.0,
        "limit": None, "memory": {"times": times, "categories": {"grads": [2**30 * one for one in sizes]}},
    }  # fmt: skip
    (tmp_path / "peak.html").write_text(html(Explorer("a step", "", [view])))
    opened(driver, tmp_path / "peak.html")
    corners = "return document.querySelector('path.area').getAttribute('d').match(/[-.0-9]+/g).map(Number)"
    numbers = driver.execute_script(corners)
    upper = list(zip(numbers[::2], numbers[1::2], strict=True))[: len(numbers) // 4]
    base = max(y for _, y in zip(numbers[::2], numbers[1::2], strict=True))
    heights = [base - y for _, y in upper]
    high = [x for x, y in upper if base - y == max(heights)]
    assert max(heights) == pytest.approx(8 * heights[0], abs=0.5)  # coordinates have a decimal
    assert 0 < high[-1] - high[0] <= 1
    assert heights[-1] == pytest.approx(heights[0])
    assert complaints(driver) == []


def test_the_policy_forbids_a_fetch(driver: Any, pages: dict[str, Path]) -> None:
    opened(driver, pages["simulate"])
    script = "fetch(arguments[0]).then(() => arguments[1]('fetched'), () => arguments[1]('refused'))"
    assert driver.execute_async_script(script, pages["search"].as_uri()) == "refused"
    assert any("Content Security Policy" in message for message in complaints(driver))


def test_a_head_sorts_up_down_and_not(driver: Any, pages: dict[str, Path]) -> None:
    opened(driver, pages["search"])
    place = place_of(driver, "memory")
    before, head = column(driver, place), find(driver, "#view-1 thead th")[place]
    button = head.find_element("css selector", "button")
    numbers = sorted(float(cell.replace(",", "")) for cell in before)
    button.click()
    assert [float(cell.replace(",", "")) for cell in column(driver, place)] == numbers
    assert head.get_attribute("aria-sort") == "ascending"
    driver.execute_script("arguments[0].focus()", button)
    press(driver, "\ue007")  # Enter
    assert [float(cell.replace(",", "")) for cell in column(driver, place)] == numbers[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    button.click()
    assert column(driver, place) == before
    assert head.get_attribute("aria-sort") == "none"


def test_filters_and_search_choose_rows(driver: Any, pages: dict[str, Path]) -> None:
    opened(driver, pages["search"])
    count = find(driver, "#view-1 .count")[0]
    total = len(column(driver, 0))
    assert count.text == f"{total} of {total} rows"
    place = place_of(driver, "step")
    cells = [float(cell) for cell in column(driver, place)]
    bound = sorted(cells)[len(cells) // 2]
    box = find(driver, "#view-1 .filters td")[place].find_element("css selector", "input")
    box.send_keys(f"> {bound}")
    assert all(float(cell) >= bound for cell in column(driver, place))
    assert 0 < len(column(driver, 0)) < total
    box.clear()
    box.send_keys("many")
    assert box.get_attribute("aria-invalid") == "true"
    assert len(column(driver, 0)) == total
    box.clear()
    find(driver, "#view-1 .search input")[0].send_keys("fsdp2")
    found = column(driver, place_of(driver, "strategy"))
    assert found
    assert all("fsdp2" in cell for cell in found)


@pytest.mark.parametrize("zoom", [1.0, 4.0])
def test_a_row_is_a_line_and_opens(driver: Any, pages: dict[str, Path], zoom: float) -> None:
    """Plans were of two to five lines."""
    opened(driver, pages["search"], zoom)
    plans = column(driver, place_of(driver, "strategy"))
    height = "return [...document.querySelectorAll('#view-1 tbody tr')].map(row => row.offsetHeight)"
    line = driver.execute_script(
        "return parseFloat(getComputedStyle(document.querySelector('td')).lineHeight)"
    )
    assert max(driver.execute_script(height)) < 2 * line
    buttons = find(driver, "#view-1 .more")
    assert len(buttons) == len(plans)
    driver.execute_script("arguments[0].focus()", buttons[1])
    press(driver, "\ue007")  # Enter
    assert buttons[1].get_attribute("aria-expanded") == "true"
    (detail,) = find(driver, "#view-1 .detail dl")
    assert plans[1] in [one.text for one in detail.find_elements("css selector", "dd")]
    box = detail.rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= driver.execute_script("return document.documentElement.clientWidth")
    heads = find(driver, "#view-1 thead th button")
    driver.execute_script("arguments[0].click(); arguments[0].click()", heads[0])  # the last comes first
    assert len(find(driver, "#view-1 .detail")) == 1
    (again,) = find(driver, "#view-1 .more[aria-expanded=true]")
    assert again.text == driver.execute_script(
        "return document.querySelector('#view-1 .detail').previousSibling.firstChild.textContent"
    )
    driver.execute_script("arguments[0].click()", again)
    assert not find(driver, "#view-1 .detail")
    assert complaints(driver) == []


def test_points_are_walked_by_keys_and_say_their_plan(driver: Any, pages: dict[str, Path]) -> None:
    opened(driver, pages["compare"])
    points = find(driver, "section.plot .points")[0].find_elements("css selector", ".point")
    assert [point.get_attribute("tabindex") for point in points] == ["0", *["-1"] * (len(points) - 1)]
    driver.execute_script("arguments[0].focus()", points[0])
    settle(driver)  # the focus scrolled the page to the point
    tip = find(driver, "#tip")[0]
    assert "plan" in tip.text
    press(driver, "\ue014")  # right
    assert driver.switch_to.active_element == points[1]
    press(driver, "\ue010")  # End
    assert driver.switch_to.active_element == points[-1]
    assert points[-1].get_attribute("aria-label")
    press(driver, "\ue00c")  # Escape
    assert not tip.is_displayed()


def test_hovering_shows_and_a_legend_hides(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    opened(driver, pages["validate"])
    point = find(driver, "section.plot .point")[0]
    ActionChains(driver).move_to_element(point).perform()  # scrolls there too, which hides a tip
    settle(driver)
    ActionChains(driver).move_by_offset(2, 0).perform()
    settle(driver)
    assert "measured" in find(driver, "#tip")[0].text
    section = find(driver, "section.plot")[0]
    before = len(section.find_elements("css selector", ".point"))
    button = section.find_elements("css selector", ".legend button")[0]
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert 0 < len(section.find_elements("css selector", ".point")) < before


def idle(page: Path, folder: Path) -> Path:
    """The page with a stream of ops that share pixels and are idle three quarters of the time."""
    before, start, rest = page.read_text("utf-8").partition('id="data">')
    data, stop, after = rest.partition("</script>")
    content = json.loads(data)
    view = content["views"][-1]
    span, step = view["spans"][0], view["end"] / 8000
    view["spans"] = [[span[0], place * step, (place + 0.25) * step, *span[3:]] for place in range(8000)]
    found = folder / "idle.html"
    found.write_text(before + start + json.dumps(content) + stop + after, "utf-8")
    return found


def test_ops_that_share_pixels_say_how_idle_they_are(
    driver: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    opened(driver, idle(pages["simulate"], tmp_path))
    (block,) = find(driver, ".span")
    assert float(block.get_attribute("fill-opacity")) == pytest.approx(0.25, abs=0.01)
    ActionChains(driver).move_to_element(block).perform()
    settle(driver)  # it is scrolled to
    ActionChains(driver).move_by_offset(2, 0).perform()
    said = find(driver, "#tip")[0].text
    assert "8000 side by side" in said
    assert "idle between them" in said


def test_a_timeline_zooms_and_is_walked(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    opened(driver, pages["simulate"])
    box = find(driver, ".chart.timeline")[0]

    def widest() -> float:
        widths = "[...document.querySelectorAll('.span')].map(one => +one.getAttribute('width'))"
        return float(driver.execute_script(f"return Math.max(...{widths})"))

    lanes = len(find(driver, ".lane"))
    labels = f"[...document.querySelectorAll('.timeline svg > .label')].slice(0, {lanes})"
    names = driver.execute_script(f"return Math.max(...{labels}.map(one => one.getBBox().width))")
    assert names <= float(find(driver, ".lane")[0].get_attribute("x")), "names of streams are not cut"
    whole = widest()
    find(driver, "section.timeline .controls button")[0].click()  # Zoom in
    assert widest() > whole
    driver.execute_script("arguments[0].focus()", box)
    press(driver, "\ue011")  # Home
    assert widest() == pytest.approx(whole)
    lane = find(driver, ".lane")[0]
    drag = ActionChains(driver).move_to_element_with_offset(lane, -100, 0).click_and_hold()
    drag.move_by_offset(60, 0).release().perform()
    settle(driver)
    assert widest() > whole
    assert not find(driver, ".range")
    press(driver, "\ue011")
    press(driver, "\ue014", "\ue014", "+")
    assert find(driver, ".chosen")
    said = find(driver, ".selected")[0].text
    assert all(word in said for word in ("op ", "stream compute", "layer ", "duration", "memory"))
    press(driver, "\ue015")  # down
    assert "stream compute" not in find(driver, ".selected")[0].text


def test_tab_reaches_everything_once(driver: Any, pages: dict[str, Path]) -> None:
    """Skip link, contents, tables' controls, one stop for the points of a plot, the timeline."""
    opened(driver, pages["compare"])
    seen: list[str] = []
    for _ in range(400):
        press(driver, "\ue004")  # Tab
        active = driver.switch_to.active_element
        name = active.get_attribute("class") or active.tag_name
        if name == "body" or (seen and active.tag_name == "a" and seen.count("skip") and "skip" in name):
            break
        seen.append(name)
    assert seen[0] == "skip"
    assert {"scroll", "point", "part", "chart timeline"} <= set(seen)
    assert seen.count("point") == len(find(driver, ".points"))
