"""The page as a reader meets it: what it holds, and in a real browser that its pictures, filters and links work."""

import colorsys
import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from samples import LADDER, entry, forecast, paired, run, seeds, stopped

from lightweight import record
from lightweight.report import drawing, figures, loss_figures, page, select, speed_figures, words, write

HOSTILE = [
    "<script>document.title='owned'</script>",
    "\"><img src=x onerror=document.title='owned'>",
    "</title></svg></style><script>document.title='owned'</script>",
    "$\\frac{a}{b}$ {{ 7 * 7 }} {% raw %} ${7*7}",
    "한국어 \u202eowned\x00\x1b[31m \ud800 ]]> --> &amp; '",
    "javascript:document.title='owned'",
]


def everything():
    """Two runs with every outcome, a ladder, a forecast, and a history."""
    lora = entry(method="lora", speedup=paired(1.7, 1.6, 1.8), peak_allocated_bytes=2 * 2**30)
    neo = "gpt-neo-1.3b"
    others = [
        stopped(model=neo, peak_allocated_bytes=13 * 2**30),
        entry(model=neo, method="qlora"),
        entry(model=neo, method="lora", outcome="diverged", steady_step_seconds=None, train_loss=(3.0, None)),
        entry(model=neo, target="native", planned_steps=1, train_loss=(3.0,), step_seconds=(0.1,)),
    ]
    others += seeds("baseline", 2.5, 2.7, model="smollm2-135m")
    others += seeds("qlora-captured-lr0.0002", 2.6, 2.7, model="smollm2-135m")
    others += seeds("lora", 2.9, 3.1, model="smollm2-135m")
    others += [stopped(model="smollm2-135m", method="qlora", seed=seed) for seed in range(2)]
    plan = [forecast(target="l4"), forecast(neo, target="l4", verdict="does_not_fit", gib=20)]
    old = run(entry(), stopped(method="lora"), *others, ended="2026-01-01T00:00:00", name="old.json")
    new = run(entry(), lora, *others, *LADDER, ended="2026-01-02T00:00:00", name="new.json", forecasts=plan)
    return [old, new]


class Tags(HTMLParser):
    """Every tag of a document with its attributes, and the ids and links among them."""

    def __init__(self, document):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        self.links = [attributes["href"] or "" for tag, attributes in self.tags if tag == "a"]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def document():
    return page.html(everything())


def test_the_page_needs_no_network_and_forbids_it(document):
    found = Tags(document)
    assert "default-src 'none'" in document
    assert not {"link", "script", "img", "iframe"} & {
        tag for tag, a in found.tags if str(a.get("src") or a.get("href", "data:"))[:5] != "data:" and tag != "script"
    }
    assert not [a["src"] for _, a in found.tags if "src" in a]
    assert set(re.findall(r"https?://[^\"' <]+", document)) <= {drawing.SVG}
    assert len(document.encode()) < 500_000


def test_every_id_is_there_once_and_every_link_leads_to_one(document):
    found = Tags(document)
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert all(link.startswith("#") for link in found.links)


def test_every_kind_of_picture_is_drawn_and_has_its_table(document):
    kinds = {picture.kind for picture in figures.pictures(everything())}
    assert kinds == {"loss", "no-worse", "memory", "speedup", "ladder", "frontier", "history"}
    assert document.count("<figure") == len(figures.pictures(everything()))
    assert document.count("The same as a table") == len({picture.table for picture in figures.pictures(everything())})


def test_a_cell_that_ran_out_of_memory_is_in_every_kind_of_picture():
    runs = [
        run(
            entry(),
            stopped(method="lora"),
            LADDER[0],
            stopped(method="lora", test=LADDER[1].test, shown_as="ladder", planned_steps=4),
        )
    ]
    runs += [run(stopped(method="lora"), ended="2026-01-03")]
    real = [stopped(method="lora", model="m", seed=seed) for seed in range(2)]
    runs += [run(*seeds("baseline", 2.5, 2.6, model="m"), *real, ended="2026-01-04")]
    for picture in figures.pictures(runs):
        if "lora" in picture.summary:
            assert "out of memory" in picture.summary
            assert "var(--fail)" in picture.svg, picture.key
    kinds = {p.kind for p in figures.pictures(runs) if "lora" in p.summary}
    assert kinds == {"loss", "no-worse", "memory", "speedup", "ladder", "frontier", "history"}


def test_intervals_are_drawn_with_the_margin_and_a_worse_method_is_a_cross():
    real = seeds("baseline", 2.5, 2.7) + seeds("lora", 2.51, 2.70) + seeds("qlora", 2.9, 3.1)
    over, forgotten = (p for p in figures.pictures([run(*real)]) if p.kind == "no-worse")
    assert "lora +0.005 [-0.027, +0.037], no worse; qlora +0.400 [+0.400, +0.400], worse" in over.summary
    assert "margin +0.05" in over.svg and "margin" not in forgotten.svg
    assert over.svg.count("✕") == 1 and "✕" not in forgotten.svg
    assert "baseline +0.250" in forgotten.summary and "baseline +" not in over.summary


def test_of_several_seeds_the_mean_is_drawn_with_a_band_and_whatever_failed():
    real = seeds("baseline", 2.5, 2.7) + seeds("lora", 2.51, 2.70) + [stopped(method="lora", seed=2)]
    drawn = [p for p in figures.pictures([run(*real)]) if p.kind == "loss"]
    assert [p.title.partition(": ")[2] for p in drawn] == ["lora over baseline", "lora, seed 2 over baseline"]
    assert "Mean of 2 seeds with its 95 % t-interval as a band" in drawn[0].summary
    assert "Mean of" not in drawn[1].summary
    (alone,) = (p for p in figures.pictures([run(entry(), entry(method="lora"))]) if p.kind == "loss")
    assert "band" not in alone.summary


def test_what_is_drawn_is_what_was_measured_and_not_two_digits_of_it():
    baseline = entry()
    steady, in_pairs = entry(method="lora", steady_step_seconds=0.0333), entry(method="qlora")
    in_pairs = replace(in_pairs, speedup=paired(1.23456, 1.12345, 1.34567))
    drawn = [speed_figures._Faster.of(cell, [cell], [baseline, cell]) for cell in (steady, in_pairs)]
    assert [row.ratio for row in drawn] == pytest.approx([0.1 / 0.0333, 1.23456], rel=1e-12)
    assert [row.ends for row in drawn] == [None, (1.12345, 1.34567)]
    trend = [(run(baseline, cell), cell) for cell in (steady, in_pairs)]
    values = {line.name: line.values for line in speed_figures._lines(trend)}
    assert values["times as fast"] == pytest.approx([0.1 / 0.0333, 1.23456], rel=1e-12)
    assert values["ms a step"] == pytest.approx([33.3, 100.0], rel=1e-12)


def test_a_band_is_as_wide_as_the_seeds_are_apart():
    flat = [entry(method="lora", seed=seed, train_loss=(2.0 + seed,) * 6) for seed in range(3)]
    curve = loss_figures._Curve.of(flat[0], "blue", flat)
    assert curve.losses == [3.0] * 6
    assert (curve.low[3], curve.high[3]) == pytest.approx((3 - 2.4841, 3 + 2.4841), abs=1e-3)  # t 4.3027 / sqrt(3)


def test_where_nothing_has_a_speedup_no_picture_says_so():
    alone = [entry(method="fp32"), entry(method="fp32-captured")]
    assert "speedup" not in {p.kind for p in figures.pictures([run(*alone)])}
    assert "speedup" in {p.kind for p in figures.pictures([run(*alone, stopped(method="lora"))])}


@pytest.mark.parametrize("theme", [0, 1])
def test_no_cause_of_memory_looks_like_a_failure(theme):
    def hue(colour):
        """In turns."""
        return colorsys.rgb_to_hsv(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))[0]

    fail = hue(drawing.COLOURS["fail"][theme])
    apart = [abs((hue(pair[theme]) - fail + 0.5) % 1 - 0.5) for pair in drawing.CAUSES.values()]
    assert min(apart) > 0.04


def test_where_no_cell_has_a_curve_each_still_has_its_cross():
    group = [stopped(), stopped(method="lora"), entry(method="qlora")]
    crossed = {
        p.title: len(re.findall(r"out of memory in forward</text>", p.svg)) for p in figures.pictures([run(*group)])
    }
    assert crossed["opt-350m on NVIDIA H200 as t4: lora over baseline"] == 2
    assert crossed["opt-350m on NVIDIA H200 as t4: qlora over baseline"] == 2  # the baseline's, above and below


def test_the_whole_record_of_every_cell_is_there(document):
    shown = html.unescape(document)
    for e in select.newest(everything()):
        assert f"<summary>{html.escape(words.headline(e), quote=False)}" in document
        assert json.dumps(e.train_loss) in shown
        assert e.corpus_digest in shown


@pytest.mark.parametrize("hostile", HOSTILE)
def test_whatever_a_record_holds_is_text(hostile):
    strange, plain = page.html(hostile_runs(hostile)), "".join(page.html(hostile_runs(x)) for x in ("x", "x " * 40))
    kinds, harmless = ({(tag, *sorted(a)) for tag, a in Tags(text).tags} for text in (strange, plain))
    assert kinds <= harmless, "no tag and no attribute that would not be there anyway"
    assert [tag for tag, _ in Tags(strange).tags].count("script") == 1
    assert all(link.startswith("#") for link in Tags(strange).links)
    strange.encode("utf-8")
    assert not set("\x00\x1b\u202e") & set(strange)


def hostile_runs(text):
    """Two runs whose every text is `text`, where a reader of records lets it be one."""
    strange = {"method": text, "reason": text, "device": text, "corpus_digest": text}
    entries = [
        entry(model=text, versions={"torch": text}, **strange),
        stopped(model=text, **strange | {"method": "baseline"}, phase=text, forecast_bytes_by_cause={text: 2**30}),
        entry(model="m", target=text, outcome=text, **strange),
    ]
    return [run(*entries, ended=text, name="a.json"), run(*entries, ended="2026", forecasts=[forecast(text, text)])]


def test_colours_are_names_that_both_themes_have(document):
    themes = re.findall(r"--([\w-]+): #", document)
    assert len(themes) == 2 * len(set(themes))
    assert set(re.findall(r"var\(--([\w-]+)\)", document)) <= set(themes)
    drawn = " ".join(picture.svg for picture in figures.pictures(everything()))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn), "a colour that no theme changes"


def contrast(one, other):
    """The WCAG's ratio of two colours' luminances."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("role", ["ink", "muted", "blue", "fail"])
@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read_in_both_themes(role, theme):
    assert contrast(drawing.COLOURS[role][theme], drawing.COLOURS["paper"][theme]) >= 4.5


def test_labels_of_curves_that_end_alike_do_not_collide():
    twin = entry(method="lora")
    (picture,) = (p for p in figures.pictures([run(entry(), twin)]) if p.table == "loss")
    heights = [float(y) for y in re.findall(r'translate\([\d.]+ ([\d.]+)\)">(?:lora|baseline)<', picture.svg)]
    assert len(heights) == 4  # a label a curve, above and below
    assert abs(heights[0] - heights[1]) >= 20 and abs(heights[2] - heights[3]) >= 20


def test_a_file_of_a_picture_stands_alone():
    picture = figures.pictures(everything())[0]
    alone = drawing.standalone(picture)
    assert alone.startswith('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360')
    assert 'width="360" height="350"' in alone
    assert "prefers-color-scheme: dark" in alone


@pytest.mark.parametrize(("folder", "name"), [("", "h200-t4"), ("captured", "h100-t4")])
def test_the_pages_pictures_show_what_the_committed_records_hold(folder, name):
    root = Path(__file__).parents[2]
    records = root / "experiments" / "records"
    runs = [record.load(records / f"{each}.json") for each in (name, "plan")]
    drawn = {picture.key: picture for picture in figures.pictures(runs)}
    text = re.compile(r"<text[^>]*>([^<]*)<")
    shown = sorted((root / "docs" / "figures" / folder).glob("*.svg"))
    assert shown
    for path in shown:
        assert text.findall(path.read_text("utf-8")) == text.findall(drawn[path.stem].svg)


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, playwright's own or the system's."""
    playwright = pytest.importorskip("playwright.sync_api", reason="not run: needs playwright (see CONTRIBUTING.md)")
    with playwright.sync_playwright() as engine:
        path = engine.chromium.executable_path
        names = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
        found = path if shutil.which(path) else next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip("not run: needs Chromium (see CONTRIBUTING.md)")
        chromium = engine.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(document, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write.write(path, document)
    return path


@pytest.fixture
def opened(browser):
    """Open a file as a person does; fails where the page says anything on its console or asks the network."""
    said, contexts = [], []

    def open_file(path, **context):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on(
            "request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        )
        tab.goto(path.as_uri())
        return tab

    yield open_file
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_every_picture_is_drawn_and_nothing_is_wider_than_the_screen(opened, file, width, theme):
    tab = opened(file, viewport={"width": width, "height": 844}, color_scheme=theme)
    drawn = tab.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => [svg.getBoundingClientRect().width,"
        " svg.getBoundingClientRect().height, svg.querySelectorAll('path, use').length])"
    )
    assert len(drawn) == len(figures.pictures(everything()))
    assert all(w > 300 and h > 20 and shapes > 0 for w, h, shapes in drawn)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if theme == "light" else "rgb(22, 25, 29)")
    ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink != paper


def test_words_of_a_picture_do_not_overlap(opened, file):
    tab = opened(file, viewport={"width": 390, "height": 844})
    overlapping = tab.evaluate(
        """[...document.querySelectorAll('figure svg')].flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
            const edge = svg.getBoundingClientRect();
            const out = boxes.filter(([, b]) => b.left < edge.left - 1 || b.right > edge.right + 1).map(([t]) => [t]);
            return out.concat(boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) =>
                a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4
            ).map(([other]) => [svg.closest('figure').id, one, other])));
        })"""
    )
    assert overlapping == []


def visible(tab, selector):
    return tab.eval_on_selector_all(selector, "nodes => nodes.filter(n => n.checkVisibility()).length")


def test_filters_leave_what_was_asked_for(opened, file):
    tab = opened(file)
    rows, figures_ = visible(tab, "#results tbody tr"), visible(tab, "figure")
    tab.select_option("select[name=model]", "gpt-neo-1.3b")
    models = tab.eval_on_selector_all(
        "#results tbody tr:not(.away) td:first-child", "cells => cells.map(c => c.textContent)"
    )
    assert set(models) == {"gpt-neo-1.3b"}
    assert 0 < visible(tab, "figure") < figures_
    assert not tab.locator("figure[data-model=opt-350m]:not(.away)").count()
    tab.select_option("select[name=outcome]", "out_of_memory")
    assert visible(tab, "#results tbody tr") == 1
    assert tab.text_content("output").startswith("1 of ")
    assert tab.locator(".mark.dim").count() > 0
    tab.select_option("select[name=method]", "lora")
    assert visible(tab, "#results tbody tr") == 0
    tab.click("text=Show all")
    tab.locator(".away, .dim").first.wait_for(state="detached")
    assert (visible(tab, "#results tbody tr"), visible(tab, "figure")) == (rows, figures_)


def test_links_lead_from_rows_to_records_and_pictures_and_back(opened, file):
    tab = opened(file)
    row = tab.locator("#results tbody tr").nth(1)
    number = row.get_attribute("data-cell")
    record_ = tab.locator(f"#record-{number}")
    assert not record_.is_visible()
    row.locator("a").first.click()
    record_.wait_for(state="visible")
    assert "train_loss" in record_.text_content()
    record_.locator("a").first.click()
    picture = tab.locator(tab.evaluate("location.hash"))
    assert picture.evaluate("node => node.tagName") == "FIGURE"
    assert picture.evaluate("node => Math.abs(node.getBoundingClientRect().top) < innerHeight")
    tab.locator("details.record").evaluate_all("nodes => nodes.forEach(n => n.open = false)")
    mark = picture.locator(f'a.mark[data-cell="{number}"]:has(text)').first
    assert mark.locator("title").first.text_content().startswith("opt-350m x lora")
    mark.locator("text").first.click()
    record_.wait_for(state="visible")


def test_a_link_to_what_a_filter_hides_shows_it(opened, file):
    tab = opened(file)
    tab.select_option("select[name=model]", "gpt-neo-1.3b")
    tab.evaluate("location.hash = '#row-0'")
    tab.locator("#row-0").wait_for(state="visible")


def test_the_keyboard_reaches_everything(opened, file):
    tab = opened(file)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "To the results"
    focused = set()
    for _ in range(120):
        tab.keyboard.press("Tab")
        focused.add(tab.evaluate("document.activeElement.tagName"))
    assert focused >= {"A", "SELECT", "BUTTON", "DIV", "SUMMARY"}
    tab.locator("#loss summary").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#loss table").is_visible()


def test_a_screen_reader_has_names_for_everything(opened, file):
    tab = opened(file)
    assert tab.evaluate(
        "[...document.querySelectorAll('svg')].every(s => s.getAttribute('role') == 'img' && s.ariaLabel)"
    )
    assert tab.evaluate("[...document.querySelectorAll('[role=region], form')].every(r => r.ariaLabel)")
    assert tab.evaluate("[...document.querySelectorAll('select')].every(s => s.labels.length == 1)")
    assert tab.evaluate("[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope]'))")
    levels = tab.eval_on_selector_all("h1, h2", "nodes => nodes.map(n => n.tagName)")
    assert levels[0] == "H1" and set(levels[1:]) == {"H2"}


def test_it_reads_without_its_script(browser, file):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(file.as_uri())
    assert tab.locator("figure svg").first.is_visible()
    tab.locator("#records summary").first.click()
    assert "train_loss" in tab.locator("#record-0").inner_text()
    context.close()


def test_hostile_text_runs_nothing(opened, tmp_path):
    path = tmp_path / "hostile.html"
    for hostile in HOSTILE:
        write.save(path, hostile_runs(hostile))
        tab = opened(path)
        assert tab.title() != "owned"
        tab.select_option("select[name=method]", index=1)
        assert tab.locator("figure svg").count() > 0
