import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools.profiling.page import page
from tools.profiling.record import Ceilings, Point, Runs, Span, Verdict
from tools.profiling.style import COLOURS, STYLE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = ("meta", "br")


class Reader(HTMLParser):
    """Notes what is not closed, every attribute, and all text that a person sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if "style" in self.open else data


def parsed(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_says_what_binds_and_what_to_do(made_profile):
    found = parsed(page(made_profile()))
    verdict = made_profile().verdict
    for words in (verdict.sentence, *(advice.line for advice in verdict.advice), "80 %", "20 %", "Measured on a CPU"):
        assert words in found.text
    assert ("name", "viewport") in found.attributes
    assert found.tags.count("h1") == 1


def test_the_page_needs_nothing_but_itself(made_profile):
    text = page(made_profile())
    assert len(text) < 200_000
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"@import|url\(|<script|<link|<img|<iframe", text)
    assert {name for name, _ in parsed(text).attributes} & {"src", "href", "srcset", "onload"} == set()


def test_names_of_others_are_text_and_nothing_else(made_profile):
    evil = "<script>alert(1)</script>\"'&"
    stage = made_profile().stages[0].model_copy(update={"note": evil})
    advice = made_profile().verdict.advice[0].model_copy(update={"line": evil, "why": evil})
    profile = made_profile(
        title=evil,
        command=evil,
        commit=evil,
        machine={evil: evil, "cpu": evil},
        config={evil: [evil]},
        stages=(stage,),
        verdict=Verdict(binding="step", sentence=evil, advice=(advice,)),
        notes=(evil,),
    )
    found = parsed(page(profile))
    assert "script" not in found.tags
    assert found.text.count("<script>alert(1)</script>") >= 8


def test_every_plot_is_xml_and_no_id_stands_twice(made_profile):
    many = tuple(Point(count=n, images_per_s=(800.0 * n,)) for n in (1, 2))
    text = page(made_profile(scaling=many))
    drawn = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawn) == 10  # five, for wide and for narrow screens
    for svg in drawn:
        ET.fromstring(svg)
    ids = [value for name, value in parsed(text).attributes if name == "id"]
    assert len(ids) == len(set(ids)) == 20
    assert "Not drawn" not in text


def test_what_cannot_be_drawn_is_said(made_profile):
    nothing = Runs(real=(), synthetic=(), loader=(), wait=())
    text = page(made_profile(stages=(), runs=nothing, loader_scaling=(), scaling=(), timeline=(), config={}))
    found = parsed(text)
    assert "svg" not in found.tags
    assert "Not drawn" in found.text and "no stage was measured alone" in found.text
    assert found.text.count("not measured") >= 4


def test_one_process_has_no_curve_but_a_figure(made_profile):
    assert "Training by processes: measured with 1 alone, 800 images/s" in parsed(page(made_profile())).text


def test_the_step_in_pieces_says_what_of_the_run_it_lacks(made_profile):
    assert "Taken without" not in page(made_profile())
    many = page(made_profile(world_size=2))
    assert "Taken without the exchange of gradients." in many and "of the real run" not in many
    spans = [Span(lane="device", name=name, start=0.1, end=0.2) for name in ("ranks", "all-reduce")]
    whole = page(made_profile(world_size=2, timeline=(*made_profile().timeline, *spans)))
    assert "Taken without" not in whole and "Ranks: waiting until all of them are there." in whole
    graph = made_profile(world_size=2, device="cuda", config={"run": {"cuda_graphs": True}})
    assert "Taken without the exchange of gradients and the graph that the run replays." in page(graph)


def test_rates_above_the_measured_ones_are_shown_and_explained(made_profile):
    text = parsed(page(made_profile(ceilings=Ceilings(matmul_flops=3e10, copy_bytes=1e10)))).text
    assert "50.0 (167 %)" in text and "107 %" in text
    assert text.count("Above 100 %, so above the measured rate: teacher, student, backward, MFU;") == 2


def test_what_a_line_brings_is_a_bound(made_profile):
    assert "at most 1,000 images/s instead of 800" in parsed(page(made_profile())).text


def test_the_config_is_there_to_be_unfolded(made_profile):
    text = page(made_profile())
    assert "workers: 1" in text[text.index("<details>") : text.index("</details>")]


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def palettes() -> list[dict[str, str]]:
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in re.split("@media", STYLE)[:2])
    return [light, dark]


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_letters_are_easy_to_read_in_light_and_in_dark(palette: dict[str, str]):
    for letters in ("ink", "soft", "accent", "warn"):
        for paper in ("page", "card", "code"):
            assert contrast(palette[letters], palette[paper]) >= 4.5, (letters, paper)


@pytest.mark.parametrize("name", COLOURS)
def test_colours_of_stages_stand_out_and_carry_letters(name: str):
    inside = re.search(r"\.inside \{ fill: (#\w+)", STYLE)[1]
    assert contrast(COLOURS[name], inside) >= 4.5
    for palette in palettes():
        assert contrast(COLOURS[name], palette["card"]) >= 3
        assert contrast(COLOURS[name], palette["code"]) >= 2.5


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_phone_shows_the_page_without_scrolling_sideways(made_profile, tmp_path: Path):
    long = made_profile(title="a_config_with_a_very_long_name_" * 4, command="launch.py profile " + "x" * 200)
    (tmp_path / "page.html").write_text(page(long))
    (tmp_path / "phone.html").write_text(
        "<iframe id=f src=page.html style='width:360px;height:800px'></iframe><script>onload = () => {"
        "const root = document.getElementById('f').contentDocument.documentElement;"
        "document.title = root.scrollWidth + ' of ' + root.clientWidth }</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path}/profile", (tmp_path / "phone.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    wide, room = re.search(r"<title>(\d+) of (\d+)", dom).groups()
    assert int(wide) <= int(room) <= 360
