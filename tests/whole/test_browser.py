"""The window in a real browser, on real runs (make test-integrations)."""

import json
import os
import re
import subprocess
import sys
from urllib.parse import quote

import pytest

pytestmark = pytest.mark.integration
playwright = pytest.importorskip("playwright.sync_api", reason="make test-integrations installs it")

import agent_r1  # noqa: E402
from agent_r1.run.folder import RunFolder  # noqa: E402
from scripts.screenshots import browser_page, window  # noqa: E402
from tests.analysis.test_viewing import EVIL, a_step, a_trajectory, make_run, of  # noqa: E402

QUICK = {
    "train.tasks": 4,
    "train.attempts": 4,
    "evaluation.tasks": 8,
    "evaluation.test_tasks": 8,
    "threads": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe, more in (
        ("messy", "hopworld-noise", {}),
        ("plain", "hopworld", {"learner.lr": 1e-4}),
        ("recalled", "hopworld-memory", {}),
    ):
        agent_r1.train(recipe, run=folder / name, overrides=QUICK | {"train.iterations": 3} | more)
    return folder


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with window(runs) as found:
            yield found


class Watched:
    """A page whose errors and requests are noted."""

    def __init__(self, page, address):
        self.page, self.address, self.wrong, self.asked = page, address, [], []
        page.on("console", lambda said: said.type in ("error", "warning") and self._note(said.text))
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("dialog", lambda dialog: (self._note(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.asked.append(request.url))

    def _note(self, what):
        self.wrong.append(what)

    def go(self, place):
        self.page.goto("about:blank")
        self.page.goto(f"{self.address}#/{place}")
        self.page.wait_for_load_state("networkidle")

    def is_clean(self):
        assert self.wrong == []
        elsewhere = [
            url for url in self.asked if not url.startswith((self.address, "about:", "data:"))
        ]
        assert elsewhere == []


@pytest.fixture
def watched(address, request):
    theme, width = getattr(request, "param", ("light", 1280))
    with browser_page(theme, width) as page:
        found = Watched(page, address)
        yield found
        found.is_clean()


PLACES = {
    "?with=messy&with=plain": "Success",
    "run/messy": "Tokens a second",
    "run/messy/episodes": "of 48 episodes",
    "run/messy/diagnosis": "look at|Nothing",
    "run/messy/group/3/1": "attempts at one task",
    "run/messy/episode/3/1/1": "Why it was learned from as it was",
    "run/recalled/episode/3/1/1": "rewrote the history|Tokens",
}


@pytest.mark.parametrize(
    "watched",
    [("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)],
    indirect=True,
    ids=["light", "dark", "light, narrow", "dark, narrow"],
)
def test_every_view_in_light_and_dark_narrow_and_wide(watched):
    for place, words in PLACES.items():
        watched.go(place)
        watched.page.get_by_text(re.compile(words)).first.wait_for(timeout=10_000)
        wide = watched.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= watched.page.viewport_size["width"], place  # nothing sticks out
        if "with" in place or place == "run/messy":
            assert watched.page.locator("canvas").count() >= 8
            assert drawn(watched.page) > 50
        if "run/" in place:
            assert contrast(watched.page, "main .soft, main .role, main a") >= 4.5, place


def drawn(page):
    """Coloured pixels of the first chart: its lines were painted."""
    return page.evaluate(
        """() => { const canvas = document.querySelector("canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] > 0 && Math.max(data[i], data[i+1], data[i+2])
                - Math.min(data[i], data[i+1], data[i+2]) > 60) count++;
        return count; }"""
    )


def contrast(page, selector):
    """The least contrast of text with what lies behind it, by WCAG."""
    return page.evaluate(
        """(selector) => {
        const canvas = document.createElement("canvas");
        const probe = canvas.getContext("2d", {willReadFrequently: true});
        const rgb = (color) => { probe.fillStyle = color; probe.fillRect(0, 0, 1, 1);
            return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3); };
        const light = (color) => { const [r, g, b] = color.map((c) => { c /= 255;
            return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; });
            return .2126 * r + .7152 * g + .0722 * b; };
        const behind = (node) => { for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor;
            if (!/, 0\\)$/.test(color)) return rgb(color); } return [255, 255, 255]; };
        return Math.min(21, ...[...document.querySelectorAll(selector)].filter((n) => n.innerText)
            .map((node) => { const back = light(behind(node));
                const text = light(rgb(getComputedStyle(node).color));
                return (Math.max(back, text) + .05) / (Math.min(back, text) + .05); })); }""",
        selector,
    )


def test_filters(watched, runs):
    page = watched.page
    watched.go("run/messy/episodes")
    page.get_by_text("48 of 48 episodes").wait_for()
    page.get_by_label("Outcome").select_option("1")
    page.get_by_text(re.compile(r"\d+ of 48 episodes")).wait_for()
    page.wait_for_function("() => !document.body.innerText.includes('48 of 48')")
    solved = [
        t.outcome.success
        for n in (1, 2, 3)
        for group in RunFolder(runs / "messy").trajectories(n)
        for t in group.trajectories
    ]
    page.get_by_text(f"{sum(solved)} of 48 episodes").wait_for()
    page.get_by_label("Iteration", exact=True).fill("2..3")
    page.keyboard.press("Enter")
    late = sum(solved[16:])
    page.get_by_text(f"{late} of 48 episodes").wait_for()
    assert "iteration=2..3" in page.url and "success=1" in page.url  # the address says it all
    page.get_by_role("button", name=re.compile("^turns")).click()
    page.wait_for_function("() => document.querySelector('[aria-sort]')?.innerText.match('turns')")
    page.get_by_role("button", name="clear").click()
    page.get_by_text("48 of 48 episodes").wait_for()
    page.get_by_label("Reward format", exact=True).fill("nonsense")
    page.get_by_label("Reward format", exact=True).press("Enter")
    page.get_by_role("alert").get_by_text("no range").wait_for()
    watched.wrong = [said for said in watched.wrong if "400" not in said]  # the browser's own line


def test_back_and_links_lead_where_they_say(watched):
    page = watched.page
    watched.go("")
    page.get_by_role("link", name="messy").click()
    page.get_by_role("link", name="Episodes").click()
    page.locator("tbody th a").first.click()
    page.get_by_text("Why it was learned").wait_for()
    page.get_by_role("link", name="all attempts side by side").click()
    page.get_by_text("attempts at one task").wait_for()
    page.locator("svg.tree a").first.click()
    page.get_by_text("Why it was learned").wait_for()
    for _ in range(3):
        page.go_back()
    page.get_by_text("of 48 episodes").wait_for()


def test_the_keyboard_alone(watched):
    page = watched.page

    def tab_to(selector, most=80):
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached")

    watched.go("")
    page.get_by_role("link", name="messy").wait_for()
    tab_to(".skip", 3)
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    tab_to("tbody input[type=checkbox]")
    page.keyboard.press("Space")
    page.locator("canvas").first.wait_for()
    tab_to("tbody a")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("run/"))
    page.get_by_text("Tokens a second").wait_for()
    tab_to("nav a[href$=episodes]")
    page.keyboard.press("Enter")
    page.get_by_text("of 48 episodes").wait_for()
    tab_to("tbody th a")
    page.keyboard.press("Enter")
    page.get_by_text("Why it was learned").wait_for()
    before = page.url
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(url) => location.href !== url", arg=before)
    page.get_by_text("Why it was learned").wait_for()
    tab_to(".tokens")
    page.keyboard.press("End")
    page.get_by_text(re.compile(r"turn \d+ · log-probability")).wait_for()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_colours_of_tokens_and_copies(watched, runs):
    page = watched.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    used = ((g, known) for g, known in RunFolder(runs / "messy").estimated(3) if known.ratios)
    group, _ = next(used)
    watched.go(f"run/messy/episode/3/{group.number + 1}/1")
    page.get_by_text("Why it was learned").wait_for()
    for name in ("logprob", "entropy", "advantage", "ratio"):
        page.get_by_label("Colour by").select_option(name)
        page.wait_for_function("() => document.querySelector('.token[style*=background]')")
    trained = page.locator(".token.trained").count()
    trajectory = group.trajectories[0]
    assert trained == trajectory.num_action_tokens
    assert page.locator(".token").count() == trajectory.num_tokens
    page.get_by_role("button", name="copy as JSON").click()
    page.get_by_text("copied").wait_for()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["tokens"]["id"][: len(trajectory.prompt_ids)] == list(trajectory.prompt_ids)
    page.wait_for_timeout(2100)
    page.get_by_role("button", name="copy as Markdown").click()
    page.get_by_text("copied").wait_for()
    assert trajectory.steps[0].message.content in page.evaluate("navigator.clipboard.readText()")


def test_the_theme_is_kept(watched):
    page = watched.page
    watched.go("")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("Colours").select_option("dark")
    now = "getComputedStyle(document.body).backgroundColor"
    page.wait_for_function(f"light => {now} !== light", arg=light)
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_hostile_content_is_text_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evil = EVIL.replace("\ud83d", "") + "<a href=javascript:alert(1)>x</a>" + "y" * 1_000_000
    step = a_step(evil, result=evil, events=(f"mistake/{EVIL[:40]}",), rewards={EVIL[:30]: 1.0})
    episode = of(a_trajectory(0, [step], question=evil), a_trajectory(1, [step]))
    name = "<img src=x onerror=alert(1)>"
    run = make_run(tmp_path / "runs" / name, {1: [episode]})
    for number in (1, 2, 3):
        figures = {"success": 0.5, EVIL[:50]: 1.0, "entropy": 0.1}
        run.append_metrics({"iteration": number, "figures": figures, "advice": {EVIL[:20]: evil}})
    with window(tmp_path / "runs") as address, browser_page() as page:
        watched = Watched(page, address)
        base = f"run/{quote(name, safe='')}"
        for place in (
            *("", f"?with={quote(name)}", base, f"{base}/episodes", f"{base}/diagnosis"),
            *(f"{base}/group/1/1", f"{base}/episode/1/1/1"),
        ):
            watched.go(place)
            page.wait_for_timeout(300)
            assert page.locator("main img, main script, a[href^=javascript]").count() == 0, place
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280, place
        assert page.get_by_text("U+202E").count() >= 1  # what turns the writing around is named
        assert page.get_by_text("U+001B").count() >= 1
        page.get_by_role("button", name=re.compile("show all")).first.click()
        page.wait_for_timeout(300)
        watched.is_clean()


def test_a_run_in_progress_is_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = tmp_path / "runs"
    runs.mkdir()
    with window(runs) as address, browser_page() as page:
        watched = Watched(page, address)
        watched.go("")
        page.get_by_text("No runs in").wait_for()
        given = {**QUICK, "train.iterations": 6, "evaluation.test_tasks": 0}
        words = [f"--{key}={value}" for key, value in given.items()]
        command = [sys.executable, "-m", "agent_r1.cli", "train", "hopworld", "--run"]
        training = subprocess.Popen(
            [*command, runs / "live", *words], stdout=subprocess.DEVNULL, env={**os.environ}
        )
        try:
            page.get_by_role("link", name="live").click(timeout=120_000)
            page.get_by_text("running").first.wait_for(timeout=60_000)
            page.get_by_text(re.compile(r"iteration [1-5] of 6 · .* left")).wait_for(timeout=60_000)
            page.locator("canvas").first.wait_for()
            page.get_by_role("link", name="Episodes").click()
            page.get_by_text(re.compile(r"\d+ of (16|32|48|64|80) episodes")).wait_for()
            page.get_by_text("96 of 96 episodes").wait_for(timeout=120_000)
            page.get_by_text("finished").wait_for(timeout=60_000)
        finally:
            training.kill()
            training.wait()
        watched.is_clean()
