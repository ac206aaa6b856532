"""The explorers by keyboard: at each setting the numbers that the page shows are those of `companion`."""

import functools
import json
import math
import re
import sys
import urllib.parse
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import keras
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

import companion
from companion import figures, gradient_flow, merging
from tests.book.reading import CHAPTERS, ROOT, markdown, notebook

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from explorers import NAMES, compact, opening

FOLDER = ROOT / "book" / "_static" / "explorers"
# Name: a page that has it.
PAGES = {
    "scheduler": "05_the_soft_batch_bug",
    "ravine": "03_momentum_and_state",
    "shares": "14_merging_gradients",
    "stability": "10_runge_kutta",
    "which-loss": "13_what_euler_minimises",
    "drift": "15_local_sgd",
    "euler": "08_gradient_descent_is_euler",
}
# What is pressed, key by key: which control (the beginning of its name) has the focus, and the keys.
KEYS = {
    "ravine": [
        ("learning rate", "ArrowRight ArrowRight PageUp ArrowLeft Home PageUp PageUp PageDown"),
        ("momentum β", "ArrowRight PageUp PageUp End ArrowLeft Home PageUp ArrowLeft"),
        ("steepness", "ArrowRight ArrowRight End ArrowLeft Home"),
        ("Nesterov", "Space"),
        ("learning rate", "PageDown ArrowLeft End"),
    ],
    "shares": [
        ("devices", "End"),
        ("samples on device 1", "ArrowRight PageUp Home ArrowRight ArrowRight"),
        ("samples on device 5", "ArrowRight ArrowRight Home"),
        ("weighed", "Space"),
        ("samples on device 2", "PageUp ArrowLeft End"),
        ("devices", "Home ArrowRight ArrowRight"),
        ("mean of means", "Space"),
        ("samples on device 3", "Home ArrowRight PageUp PageUp PageUp PageUp"),
    ],
    "stability": [
        ("downhill, hλ", "ArrowRight PageUp PageUp End Home PageUp"),
        ("one gradient", "Space"),
        ("Euler", "Space ArrowRight ArrowRight"),
        ("downhill and rotation", "Space"),
        ("rotation, hω", "PageUp ArrowRight PageUp"),
        ("RK45", "Space ArrowRight ArrowRight"),
        ("stages", "ArrowRight ArrowRight PageUp End"),
        ("one step", "Space"),
        ("downhill, hλ", "PageUp End"),
    ],
    "which-loss": [
        ("learning rate", "ArrowRight ArrowRight End ArrowLeft PageDown Home PageUp PageUp"),
        ("start, weight a", "ArrowLeft PageDown Home PageUp PageUp ArrowRight"),
        ("start, weight b", "ArrowRight PageDown PageDown Home PageUp End"),
        ("learning rate", "End"),
    ],
    "drift": [
        ("steps k", "ArrowRight ArrowRight End ArrowLeft Home ArrowRight PageUp"),
        ("learning rate", "ArrowRight PageUp PageUp End Home PageUp"),
        ("bowls, steep : flat", "ArrowRight End ArrowLeft Home ArrowRight ArrowRight"),
        ("steps k", "End ArrowLeft ArrowLeft"),
    ],
    "euler": [
        ("learning rate", " ".join(["Home", *["ArrowRight"] * 11, "PageUp", *["ArrowRight"] * 6, "End", "ArrowLeft"]))
    ],
}


THEME = r"\[(PST|togglebutton)\]"  # what the theme's own scripts log on every page


@pytest.fixture(scope="module")
def visit(browser: Any, address: str) -> Any:
    """Opens a page and collects whatever it complains about; formulas are left alone, for speed."""
    contexts = []

    def open_page(where: str, **options: Any) -> tuple[Any, list[str]]:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page, complaints = context.new_page(), []

        def route(asked: Any) -> None:
            if "mathjax" in asked.request.url:
                asked.fulfill(body="", content_type="text/javascript")
            elif asked.request.url.startswith((address, "file://")):
                asked.continue_()
            else:
                complaints.append(asked.request.url)
                asked.abort()

        page.route("**/*", route)
        page.on("console", lambda message: re.match(THEME, message.text) or complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(where, wait_until="load")
        return page, complaints

    yield open_page
    for context in contexts:
        context.close()


def explorer(page: Any) -> Any:
    (found,) = page.query_selector_all("[data-explorer]")
    return found


def shown(page: Any) -> tuple[dict[str, Any], Any]:
    return tuple(page.evaluate("(({state, result}) => [state, result])(document.querySelector('[data-explorer]'))"))


def settings(page: Any, name: str) -> list[tuple[dict[str, Any], Any]]:
    """The state and the result after each key."""
    found = [shown(page)]
    for label, keys in KEYS[name]:
        control = page.locator("[data-explorer]").get_by_label(re.compile("^" + re.escape(label)))
        control.first.focus()
        for key in keys.split():
            page.keyboard.press(key)
            found.append(shown(page))
    return found


# What each explorer has to show. They take the state, and return a result or fail.


def momentum(state: dict[str, Any], steps: int) -> np.ndarray:
    """The rule of companion.Momentum in NumPy; Keras rounds the rate and β to float32."""
    h, beta = (float(np.float32(state[key])) for key in ("h", "beta"))
    curvature, x, velocity = np.array([1.0, state["kappa"]]), np.array([10, 1.5]), np.zeros(2)
    path = [x]
    for _ in range(steps):
        step = curvature * x * h
        velocity = velocity * beta - step
        x = x + (velocity * beta - step if state["rule"] == "nesterov" else velocity)
        path.append(x)
    return np.array(path)


def ravine(state: dict[str, Any], result: Any) -> None:
    path = momentum(state, 500)
    np.testing.assert_array_equal(path[:101], np.array(result["path"], float))
    with np.errstate(over="ignore"):
        losses = path**2 @ [0.5, state["kappa"] / 2]
    for name, bad in {"thousandth": losses >= losses[0] / 1000, "floor": np.abs(path[:, 1]) > 0.05}.items():
        last = int(np.flatnonzero(bad).max())
        assert result[name] == (None if last == 500 else last + 1)
    for found, curvature in zip(result["factors"], (1, state["kappa"]), strict=True):
        z, beta = state["h"] * curvature, state["beta"]
        trace, memory = ((1 + beta) * (1 - z), beta * (1 - z)) if state["rule"] == "nesterov" else (1 + beta - z, beta)
        assert found == pytest.approx(np.abs(np.roots([1, -trace, memory])).max(), abs=1e-6)  # double roots are soft


def shares(state: dict[str, Any], result: Any) -> None:
    sizes = [state[f"n{i + 1}"] for i in range(state["parts"])]
    means = np.zeros((len(sizes), len(sizes)))  # of each device, over its samples: of which device they are
    np.fill_diagonal(means, [float(n > 0) for n in sizes])
    rule = merging.mean if state["rule"] == "means" else merging.weighted_mean
    (of_device,) = rule([means], np.array(sizes, float))
    expected = [
        str(Fraction(float(share) / n).limit_denominator(1000)) if n else None
        for share, n in zip(of_device, sizes, strict=True)
    ]
    assert result == {"shares": expected, "sum": str(Fraction(float(sum(of_device))).limit_denominator(1000))}


def stability(state: dict[str, Any], result: Any) -> None:
    chebyshev = state["method"] == "chebyshev"
    method = gradient_flow.chebyshev(state["stages"]) if chebyshev else gradient_flow.tableau(state["method"])
    cost = len(method.stages())
    assert result["cost"] == cost
    share = cost if state["per"] == "gradient" else 1
    z = complex(-share * state["x"], share * state["y"] * (state["view"] == "plane"))
    # By the questions of a step, not by the coefficients of a polynomial, which cancel for many stages.
    end = gradient_flow.integrate(lambda theta: -z * theta, 1 + 0j, 1.0, 1, method)[-1]
    found = complex(*result["factor"])
    assert abs(found - end) <= 1e-9 * max(1, abs(end))  # other orders of operations
    assert result["limit"] == pytest.approx(limit(method), abs=1e-8)  # both are bisections
    ray = z if z else complex(-1)  # the longest step the way of this one neither grows nor shrinks
    ray *= result["longest"] / abs(ray)
    assert abs(gradient_flow.integrate(lambda theta: -ray * theta, 1 + 0j, 1.0, 1, method)[-1]) == pytest.approx(1)


@functools.cache
def limit(method: gradient_flow.ButcherTableau) -> float:
    return gradient_flow.stability_limit(method)


def ab_gradient(values: np.ndarray) -> np.ndarray:
    a, b = values
    return -(0.6 - a * b) * np.array([b, a])


def ab_hessian(values: np.ndarray) -> np.ndarray:
    a, b = values
    return np.array([[b**2, 2 * a * b - 0.6], [2 * a * b - 0.6, a**2]])


def which_loss(state: dict[str, Any], result: Any) -> None:
    h, start = state["h"], [state["a"], state["b"]]
    modified = gradient_flow.modified_gradient(ab_gradient, ab_hessian, h)
    with np.errstate(over="ignore", invalid="ignore"):
        euler = gradient_flow.integrate(ab_gradient, start, h, round(8 / h))
        flow = gradient_flow.integrate(ab_gradient, start, 0.01, 800, "rk4")
        other = gradient_flow.integrate(modified, start, 0.01, 800, "rk4")
        ends = [float(np.sum(path[-1] ** 2)) for path in (euler, flow, other)]
    assert result["ends"][:2] == [end if np.isfinite(end) else None for end in ends[:2]]
    assert result["ends"][2] == pytest.approx(ends[2], rel=1e-9)  # NumPy's matrix product may fuse two operations


def drift(state: dict[str, Any], result: Any) -> None:
    k, h, ratio = state["k"], state["h"], state["ratio"]
    minima, hessians = np.array([[-1, -0.5], [1, 1]]), np.array([[1, 1 / ratio], [1 / ratio, 1]])

    def after(theta: np.ndarray) -> np.ndarray:
        paths = np.array([theta, theta])
        for _ in range(k):
            paths = paths - h * (hessians * (paths - minima))
        return paths.mean(axis=0)

    middles = [np.array([1.2, -0.7])]
    for _ in range(max(9, math.ceil(180 / k))):
        middles.append(after(middles[-1]))
    np.testing.assert_array_equal(middles, result["middles"])
    np.testing.assert_allclose(after(np.array(result["rest"])), result["rest"], atol=1e-14)  # it stays where it rests
    lowest = (hessians * minima).sum(0) / hessians.sum(0)
    assert result["off"] == pytest.approx(np.linalg.norm(np.array(result["rest"]) - lowest), abs=1e-12)
    assert result["exchanges"] == 100 // k


def euler(state: dict[str, Any], result: Any) -> None:
    h, curvature = state["h"], np.array([1.0, 10.0])
    path = gradient_flow.integrate(lambda theta: curvature * theta, [3, 1], h, round(2 / h))
    np.testing.assert_array_equal(path, result["path"])


CHECKS: dict[str, Callable[..., None]] = {
    "ravine": ravine,
    "shares": shares,
    "stability": stability,
    "which-loss": which_loss,
    "drift": drift,
    "euler": euler,
}


def test_every_explorer_has_its_page_its_keys_and_its_check() -> None:
    assert set(PAGES) == set(NAMES), "PAGES must name every script of book/_static/explorers"
    assert set(CHECKS) == set(KEYS) == set(NAMES) - {"scheduler"}, "KEYS and CHECKS must, too; scheduler has its own"


@pytest.mark.parametrize("name", CHECKS)
def test_each_setting_shows_the_numbers_of_companion(visit: Any, address: str, name: str) -> None:
    page, complaints = visit(f"{address}/notebooks/{PAGES[name]}.html")
    found = settings(page, name)
    assert len({json.dumps(state) for state, _ in found}) >= 20
    for state, result in found:
        CHECKS[name](state, result)
    assert complaints == []
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    for link in page.locator(f"a[href^='#{name}?']").all():
        wanted = urllib.parse.parse_qsl((link.get_attribute("href") or "").partition("?")[2])
        link.press("Enter")
        state, result = shown(page)
        assert all(format(state[key]) == value for key, value in wanted)
        CHECKS[name](state, result)
    # The address follows, and is enough to restore the setting.
    page.evaluate("document.querySelector('[data-explorer]').change({})")
    page.wait_for_timeout(400)
    link, last = page.url, shown(page)
    assert f"#{name}?" in link
    again, complaints = visit("about:blank")
    again.goto(link, wait_until="load")
    assert shown(again) == last
    assert 0 <= again.evaluate("document.querySelector('.explorer').getBoundingClientRect().top") < 500  # in sight
    assert complaints == []
    if name == "shares":  # whose batch the reader has changed
        sizes = [last[0][f"n{i + 1}"] for i in range(last[0]["parts"])]
        assert f"on one device with {sum(sizes)} samples" in (again.text_content(".pictures") or "")


def test_a_link_counts_right_after_a_change_and_a_second_time(visit: Any, address: str) -> None:
    page, complaints = visit(f"{address}/notebooks/{PAGES['ravine']}.html")
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    link = page.locator("a[href='#ravine?beta=0.5']").first
    for pause in (280, 0, 0):  # the address follows a change after 300 ms
        page.evaluate("document.querySelector('[data-explorer]').change({ beta: 0.9, h: 0.01 })")
        page.wait_for_timeout(pause)
        link.press("Enter")
        assert (shown(page)[0]["beta"], shown(page)[0]["h"]) == (0.5, 0.075)
    page.wait_for_timeout(400)
    assert page.url.endswith("#ravine?beta=0.5")
    assert complaints == []


def printed(chapter: str, marker: str) -> str:
    """What the chapter's cell with that marker prints."""
    outputs = [cell.outputs for cell in notebook(chapter).cells if cell.cell_type == "code" and marker in cell.source]
    found = (output.get("text") or output.get("data", {}).get("text/plain", "") for cell in outputs for output in cell)
    return "\n".join(found)


def test_ravine_repeats_the_table_of_chapter_03(visit: Any, address: str) -> None:
    rows = re.findall(r"^(SGD|momentum) ?([\d.]*) +(h|h/2) +(\w+) +(\w+)$", printed("03", "on_floor"), re.M)
    pairs = re.findall(r"^(momentum|Nesterov) ([\d.]+) +[\d.]+ +(\w+) +(\w+)$", printed("03", "largest hλ"), re.M)
    assert (len(rows), len(pairs)) == (4, 4)
    rows += [
        (name, beta, rate, "", at) for name, beta, *both in pairs for rate, at in zip(("h", "h/2"), both, strict=True)
    ]
    page, _ = visit(f"{address}/notebooks/{PAGES['ravine']}.html")
    for name, beta, rate, floor, arrived in rows:
        rule = "nesterov" if name == "Nesterov" else "momentum"
        query = f"h={0.075 if rate == 'h' else 0.0375}&beta={beta or 0}&rule={rule}"
        page.evaluate(f"location.hash = '#ravine?{query}'")
        page.wait_for_function(f"document.querySelector('[data-explorer]').state.beta === {float(beta or 0)}")
        _, result = shown(page)
        assert str(result["thousandth"] or "never") == arrived
        assert str(result["floor"] or "never") == floor or not floor
    for rate, said in {0.075: False, 0.15: True}.items():  # what has another scale, or is not in sight
        page.evaluate(f"document.querySelector('[data-explorer]').change({{h: {rate}, beta: 0.5, rule: 'momentum'}})")
        words = page.text_content(".pictures") or ""
        assert ("goes on outside the picture" in words) == ("across: now up to ±8" in words) == said


def test_the_rule_in_numpy_is_that_of_companion() -> None:
    state = {"h": 0.03, "beta": 0.97, "kappa": 25, "rule": "nesterov"}
    optimizer = companion.Momentum(state["h"], momentum=state["beta"], nesterov=True)
    weight = keras.Variable([10.0, 1.5], dtype="float64")
    for _ in range(20):
        optimizer.apply([np.array([1.0, 25.0]) * weight.numpy()], [weight])
    np.testing.assert_array_equal(momentum(state, 20)[-1], weight.numpy())


def test_drift_repeats_the_tables_of_chapter_15(visit: Any, address: str) -> None:
    page, _ = visit(f"{address}/notebooks/{PAGES['drift']}.html")
    off = dict(re.findall(r"^ *(\d+) +([\d.]+) +[\d.]+$", printed("15", "# @title How far off"), re.M))
    sent = re.findall(r"^ *(\d+) +(\d+) +([\d,]+) +True$", printed("15", "# @title What the workers sent"), re.M)
    assert len(off) == 4
    assert len(sent) == 3
    for k, distance in off.items():
        page.evaluate(f"document.querySelector('[data-explorer]').change({{k: {k}}})")
        assert f"{shown(page)[1]['off']:.3f}" == distance
    for k, exchanges, bytes_sent in sent:
        page.evaluate(f"document.querySelector('[data-explorer]').change({{k: {k}}})")
        result = shown(page)[1]
        assert [str(result["exchanges"]), f"{result['bytes']:,}"] == [exchanges, bytes_sent]
        assert bytes_sent in page.inner_text("[data-explorer] .says")


def possible(variant: str) -> dict[str, int]:
    """By the appendix's own search through the graph, from the memory that the explorer begins with."""
    names: dict[str, Any] = {}
    setup, *others = (cell.source for cell in notebook("a2").cells if cell.cell_type == "code")
    search, backwards = (next(one for one in others if f"def {name}(" in one) for name in ("possible", "ancestors"))
    for source in (setup, backwards.split("\nNAMES = ")[0], search.split("\nVARIANTS = ")[0]):
        exec(source, names)
    results = names["possible"](variant, 0.0, 111.0, 3, 1000.0)
    return {",".join(f"{value:.0f}".replace("-0", "0") for value in memory): n for memory, n in results.items()}


def test_scheduler_allows_the_orders_of_the_graph(visit: Any, address: str) -> None:
    page, complaints = visit(f"{address}/notebooks/{PAGES['scheduler']}.html")
    for variant, label in {"published": "published", "masked": "repaired", "ordered": "ordered"}.items():
        page.get_by_label(label, exact=True).focus()
        page.keyboard.press("Space")
        expected, met = possible(variant), Counter()
        assert shown(page)[1]["results"] == expected
        for attempt in range(5 if variant == "published" else 2):
            if attempt:
                page.get_by_role("button", name="Start again").press("Enter")
            cards = page.locator("[data-explorer] .card")
            if variant == "masked":
                assert "waits for a, b, c, e" in (cards.nth(5).text_content() or "")
            while (ready := page.locator('[data-explorer] .card[aria-disabled="false"]')).count():
                ready.nth((7 * attempt + ready.count()) % ready.count()).press("Enter")
            state, result = shown(page)
            assert result["finished"]
            assert len(state["picks"].split(".")) == cards.count()
            met[",".join(map(str, result["memory"]))] += 1
        assert set(met) <= set(expected)
        assert f"{len(met)} of {len(expected)}" in page.inner_text("[data-explorer] .order")
        for memory in met:
            theta, s, _ = memory.split(",")
            assert f"−θ = {theta.strip('-')}, s = {s}" in page.inner_text("[data-explorer] .order")
    page.get_by_role("button", name="Take back").press("Enter")
    assert not shown(page)[1]["finished"]
    page.get_by_role("button", name="Reset").press("Enter")
    assert "seen: 0 of" in page.inner_text("[data-explorer] .order")
    page.get_by_role("button", name="Finish at random").press("Enter")
    result = shown(page)[1]
    assert result["finished"]
    assert ",".join(map(str, result["memory"])) in result["results"]
    assert "seen: 1 of" in page.inner_text("[data-explorer] .order")
    assert complaints == []


@pytest.mark.parametrize("name", PAGES)
def test_explorer_works_from_the_disk_on_a_phone_and_leaves_the_figure_to_paper(
    visit: Any, site: Any, name: str
) -> None:
    path = site / "notebooks" / f"{PAGES[name]}.html"
    page, complaints = visit(path.as_uri(), color_scheme="dark", reduced_motion="reduce")
    page.set_viewport_size({"width": 360, "height": 740})
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    beyond = (
        "[...document.querySelectorAll('.explorer :not(svg *)')].filter(it => it.getBoundingClientRect().right > 360)"
    )
    assert page.evaluate(f"{beyond}.length") == 0
    assert page.evaluate("document.querySelector('.explorer').getAnimations({subtree: true}).length") == 0
    assert len(page.inner_text("[data-explorer] .says")) > 40
    figure, frame = page.locator("[data-explorer] svg.drawing"), page.locator(".explorer")
    assert frame.is_visible()
    page.emulate_media(media="print")
    assert figure.is_visible()
    assert not frame.is_visible()
    # Alone on the page: axe takes long over the rest, which others look at.
    page.emulate_media(media="screen")
    page.evaluate("document.querySelector('main').replaceChildren(document.querySelector('[data-explorer]'))")
    page.evaluate("document.body.replaceChildren(document.querySelector('main'))")
    found = Axe().run(page, {"include": [["[data-explorer]"]]}).response["violations"]
    assert found == [], [violation["nodes"][0]["html"] for violation in found]


@pytest.mark.parametrize("name", ["scheduler", "drift"])  # one beside its figure, one instead of it
def test_without_javascript_the_figure_stays(visit: Any, address: str, name: str) -> None:
    page, _ = visit(f"{address}/notebooks/{PAGES[name]}.html", java_script_enabled=False)
    assert page.locator("[data-explorer] svg.drawing").is_visible()
    assert page.locator(".explorer").count() == 0


def test_a_made_up_address_does_no_harm(visit: Any, address: str) -> None:
    page, complaints = visit(f"{address}/notebooks/{PAGES['ravine']}.html#ravine?h=x&beta=7&kappa=3&rule=none&y=1")
    state, _ = shown(page)
    assert state == {"h": 0.075, "beta": 0.99, "kappa": 25, "rule": "momentum"}
    page.evaluate("location.hash = '#ravine?%'")
    assert shown(page)[0]["h"] == 0.075
    assert complaints == []


def test_a_pointer_drags_the_handle_that_it_grabs(visit: Any, address: str) -> None:
    page, _ = visit(f"{address}/notebooks/{PAGES['ravine']}.html")
    page.locator(".explorer svg").first.scroll_into_view_if_needed()

    def drag(handle: int, off: int, across: int, up: int) -> dict[str, Any]:
        """Grabs so far beside the left or the right end of the bar, and returns the state after a drag."""
        box = page.locator(".explorer svg circle.end").nth(handle).bounding_box()
        x, y = box["x"] + box["width"] / 2 + off, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + across, y - up)
        page.mouse.up()
        page.mouse.move(x, y)  # nobody holds it any more
        return shown(page)[0]

    assert drag(0, 30, 0, 0)["h"] == 0.075  # no jump, wherever it is grabbed
    state = drag(1, -30, 0, 40)
    assert state["h"] == 0.075
    assert state["beta"] > 0.6
    assert drag(1, 4, -20, 0)["h"] == pytest.approx(0.06, abs=0.006)  # the axis is that of the root
    assert drag(0, 0, 10, 0)["h"] > 0.07
    assert page.evaluate("getSelection().toString()") == ""


def test_another_unit_keeps_the_step(visit: Any, address: str) -> None:
    page, _ = visit(f"{address}/notebooks/{PAGES['stability']}.html")
    before = shown(page)
    for label, x in {"one gradient": 0.375, "one step": 1.5}.items():
        page.get_by_label(label, exact=True).focus()
        page.keyboard.press("Space")
        assert shown(page)[0]["x"] == x
        assert shown(page)[1] == before[1]
    page.evaluate("document.querySelector('[data-explorer]').change({method: 'euler', x: 3.9})")
    assert "−2.90 ↓" in (page.text_content(".pictures") or "")  # the circle stays in sight, and says so


def test_captions_stay_below_explorers(visit: Any, address: str) -> None:
    page, _ = visit(f"{address}/notebooks/{PAGES['drift']}.html")
    caption = page.locator("[data-explorer] figcaption").bounding_box()
    frame = page.locator(".explorer").bounding_box()
    assert caption["y"] >= frame["y"] + frame["height"]
    assert not page.locator("[data-explorer] svg.drawing").is_visible()


def test_colours_are_those_of_the_figures() -> None:
    light = (FOLDER / "explorers.css").read_text().partition("\n.explorer {")[2]
    found = dict(re.findall(r"\.(\w+) \{ --look: (#\w{6});", light))
    assert {name: colour.upper() for name, colour in found.items() if name in figures.COLOURS} == {
        name: colour.upper() for name, colour in figures.COLOURS.items()
    }


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_words_in_drawings_can_be_read() -> None:
    """Axe cannot say what lies under the text of an SVG."""
    styles = (FOLDER / "explorers.css").read_text()
    start, dark, light = re.split(r"\n(?=\[data-theme|\.explorer \{)", styles)[:3]
    for paper, text in {"#ffffff": start + light, "#16181c": dark}.items():
        assert paper.replace("#ffffff", "#fff") in text
        looks = re.findall(r"\.\w+ \{ --look: (#\w{6});(?: --words: (#\w{6});)?", text)
        assert len(looks) >= 7
        for words in [look[1] or look[0] for look in looks] + re.findall(r"--soft: (#\w{6})", text):
            bright, deep = sorted([luminance(words), luminance(paper)], reverse=True)
            assert (bright + 0.05) / (deep + 0.05) >= 4.5, words


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_text_sets_explorers_of_its_page(chapter: str) -> None:
    outputs = [(cell.source, output) for cell in notebook(chapter).cells for output in cell.get("outputs", [])]
    offers = {o.metadata["explorer"]["name"]: source for source, o in outputs if "explorer" in o.get("metadata", {})}
    links = re.findall(r"\]\(#([a-z-]+)\?([^)]*)\)", markdown(chapter))
    assert {name for name, _ in links} == set(offers)
    assert all(f'explorer="{name}"' in source for name, source in offers.items())
    for name, query in links:
        source = (FOLDER / f"{name}.js").read_text()
        known = re.findall(r'panel\.(?:slider|choice)\(\s*"(\w+)"|controls\.(picks)', source)
        names = {"n1", "n2", "n3", "n4", "n5"} if name == "shares" else set()
        assert set(dict(urllib.parse.parse_qsl(query))) <= names | {key for keys in known for key in keys}, query


def test_compact_changes_nothing_that_a_browser_reads() -> None:
    source = 'const a = [1, "b  //  c"]; // why\nreturn (x) => a - -x + `${a ? "(x) =>" : 0.5} : ${x}`;\n'
    assert compact(source, ".js") == 'let a=[1,"b  //  c"];return(x)=>a- -x+`${a ? "(x) =>" : 0.5} : ${x}`;'
    source = "{\n  const own = 1;\n  const key = { own: own, set };\n  const { put } = key;\n  let it = key.all;\n"
    source += '  const [set, all, word, far] = "word";\n  let near = far;\n  function long(size, { seen }, put) {}\n'
    source += "  class Part {\n    draws(shape, room = near) {\n      for (const [edge] of shape) draws(edge, long);\n"
    source += "      if (near) return (shape, { all }) => ({ seen, set: [shape, room] });\n    }\n  }\n}\n"
    short = '{let own=1,_a={own:own,set},{put}=_a,it=_a.all,[set,all,word,_b]="word",_c=_b;function _d(_e,{seen},put){}'
    short += "class Part{draws(_f,_g=_c){for(let[_h]of _f)draws(_h,_d);"
    short += "if(_c)return(_f,{all})=>({seen,set:[_f,_g]})}}}"
    assert compact(source, ".js").strip() == short
    assert compact(compact(source, ".js"), ".js") == compact(source, ".js")  # a page that is built again
    source = 'const late = 1;\nconst quiet = `${late ? "quiet" : 2}`;\n'  # a word in what a template computes
    assert compact(source, ".js").strip() == 'let _a=1;let quiet=`${_a ? "quiet" : 2}`;'
    assert compact(".a > :not(.b) { top: 0.5rem; }\n", ".css") == ".a > :not(.b){top:.5rem}"
    with pytest.raises(ValueError, match="holds another"):
        compact("const a = `${b ? `c : ${d}` : e}`;", ".js")


def test_only_explorers_that_exist_are_offered() -> None:
    with pytest.raises(ValueError, match=r"`explorer` must be one of .*ravine.* Received: explorer='river'"):
        opening({"name": "river", "start": {}, "instead": True})
    tag = opening({"name": "ravine", "start": {"rule": '"'}, "instead": False})
    assert tag.endswith("""data-start="{&quot;rule&quot;: &quot;\\&quot;&quot;}" data-figure="stays">""")


def test_all_together_are_small(site: Any) -> None:
    shipped = list((site / "_static" / "explorers").iterdir())
    assert {path.stem for path in shipped} == {*PAGES, "arithmetic", "kit", "explorers"}
    assert sum(path.stat().st_size for path in shipped) <= 40 * 1024
