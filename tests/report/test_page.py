"""The page on real runs: complete, self-contained, with nothing in it that a name could turn into markup; and
as a browser shows it.
"""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = '<img src=x onerror=alert(1)> & "quoted" </script>'


class Outline(HTMLParser):
    """Ids, tags, and every place that a browser would fetch from."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "action", "data") and not value.startswith("#"):
                self.sources.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page_of_two(two_runs, tmp_path_factory) -> Path:
    from fastgessl.report import write_report

    return write_report(two_runs, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def labelled_run(two_runs, tmp_path) -> Path:
    """A run whose data are image files; one class and one file have names that are markup."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("plain", NASTY.replace("/", "∕")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                file = folder / (f"{number}.png" if number else "<b>bold.png")
                Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    run = Path(shutil.copytree(two_runs[0], tmp_path / "run <i>"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {
        "name": "folder",
        "root": str(tmp_path / "photos"),
        "engine": "torchvision",
        "workers": 1,
    }
    config["recipe"] = NASTY
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_the_page_of_several_runs_has_every_section_and_fetches_nothing(page_of_two):
    outline = Outline(page_of_two.read_text())

    for section in (
        "comparison",
        "curves",
        "evaluation",
        "views",
        "map",
        "neighbors",
        "confusion",
        "throughput",
        "configuration",
    ):
        assert section in outline.ids, section
    assert outline.sources == []
    assert "@import" not in page_of_two.read_text() and not re.search(
        r"url\((?!data:)", page_of_two.read_text()
    )
    assert outline.tags.count("polyline") >= 10
    assert outline.tags.count("circle") == 2 * 599
    for words in ("± ", "PCA", "t-SNE", "effective rank", "learning rate", "images a second", "seed"):
        assert words in outline.text


def test_its_points_are_data_and_not_markup(page_of_two):
    embedded = re.search(
        r'<script type="application/json" id="points">(.*?)</script>', page_of_two.read_text()
    ).group(1)
    points = json.loads(embedded)

    assert len(points) == 599 and {point["label"] for point in points} == set("0123456789")
    assert not set("<>&") & set(embedded)


def test_names_of_classes_files_and_recipes_are_escaped(labelled_run, fastgessl):
    outcome = fastgessl("report", labelled_run)

    assert outcome.code == 0, outcome.err
    page = (labelled_run / "report.html").read_text()
    outline = Outline(page)
    assert "img" not in outline.tags and "i" not in outline.tags
    assert page.count("<script") == 2 and "onerror=alert(1)>" not in page
    assert "&lt;img src=x onerror" in page and "run &lt;i&gt;" in page
    points = json.loads(re.search(r'id="points">(.*?)</script>', page).group(1))
    assert "<b>bold.png" in {point["name"] for point in points}


@pytest.mark.filterwarnings("ignore:data.bad_files skip")
def test_a_skipped_file_moves_no_name_and_no_picture(labelled_run, tmp_path, fastgessl):
    from fastgessl.distributed import build_accelerator
    from fastgessl.evaluate.sources import open_source
    from fastgessl.evaluate.subject import base_config, open_subject
    from fastgessl.report.gallery import Gallery

    for number, file in enumerate(sorted((tmp_path / "photos" / "val").rglob("*.png"))):
        Image.new("RGB", (12, 12), (30 * number, 0, 0)).save(file.with_name(f"{30 * number:03d}.png"))
        file.unlink()
    (tmp_path / "photos" / "val" / "plain" / "150.png").write_bytes(b"no picture")
    config = base_config(str(labelled_run))
    config = config.model_copy(update={"data": config.data.model_copy(update={"bad_files": "skip"})})
    subject = open_subject(str(labelled_run), config)
    source = open_source("folder", tmp_path / "photos")
    gallery = Gallery(subject, source, build_accelerator(config, labelled_run))
    points = gallery.points()
    sheet = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^)]*)", gallery.styles())[1])))

    names = [point["name"] for point in points]
    assert len(points) == 7 and "150.png" not in names
    for number, name in enumerate(names):
        # A picture is as red as the number in its name says.
        red = sheet.getpixel((32 * number + 16, 16))[0]
        assert red == pytest.approx(int(name.removesuffix(".png")), abs=4)
    classes = {path.name: path.parent.name for path in source.test.paths}
    assert all(point["label"] == classes[point["name"]] for point in points)


def test_a_run_that_was_stopped_gets_its_curves_and_says_what_is_missing(two_runs, tmp_path, fastgessl):
    run = Path(shutil.copytree(two_runs[0], tmp_path / "run"))
    (run / "encoder.safetensors").unlink()
    (run / "evaluation.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19, "lo')

    assert fastgessl("report", run).code == 0

    outline = Outline((run / "report.html").read_text())
    assert "polyline" in outline.tags and "map" not in outline.ids
    assert "has not been trained to its end" in outline.text


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [("config.yaml", "not the folder of a run"), ("metrics.jsonl", "nothing to report")],
)
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(two_runs, tmp_path, fastgessl, spoil, expected):
    run = Path(shutil.copytree(two_runs[0], tmp_path / "run"))
    (run / spoil).unlink()
    (run / "evaluation.json").unlink()

    outcome = fastgessl("report", run)

    assert outcome.code == 2 and expected in outcome.err and outcome.err.count("\n") == 1


def chromium(page: Path, *options: str) -> str:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_runs_the_page_without_an_error(page_of_two, tmp_path):
    # The page's script is put under a pointer that moves over the first dot, and what the tooltip then shows
    # is read from the DOM.
    probe = """<script>window.onerror = message => document.documentElement.dataset.error = message;
    document.addEventListener("DOMContentLoaded", () => {
    const map = document.querySelector(".map"), dot = map.children[0];
    const box = dot.getBoundingClientRect(); map.dispatchEvent(new PointerEvent("pointermove",
    {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2}));
    const style = getComputedStyle(document.body);
    document.documentElement.dataset.wide = document.documentElement.scrollWidth - window.innerWidth;
    document.documentElement.dataset.background = style.backgroundColor; });</script></head>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page_of_two.read_text().replace("</head>", probe, 1))

    narrow, night = ("--dump-dom", "--window-size=500,900"), "--blink-settings=preferredColorScheme=0"
    light, dark = chromium(probed, *narrow), chromium(probed, *narrow, night)

    root = re.search(r"<html[^>]*>", light).group(0)
    assert 'data-ready="599"' in root and "data-error" not in root
    assert int(re.search(r'data-wide="(-?\d+)"', root).group(1)) <= 0  # nothing sticks out of a narrow screen
    tip = re.search(r'<div id="tip" style="([^"]*)">.*?<b>(\d)</b><span>image \d+</span>', light)
    assert tip and "display: block" in tip.group(1)
    backgrounds = [re.search(r'data-background="([^"]+)"', page).group(1) for page in (light, dark)]
    assert backgrounds[0] != backgrounds[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_paints_every_part_of_the_page(page_of_two, tmp_path):
    chromium(
        page_of_two, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=800,2400", "--hide-scrollbars"
    )

    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert pixels.shape[:2] == (2400, 800)
    assert all(len(np.unique(band.reshape(-1, 3), axis=0)) > 10 for band in np.array_split(pixels, 6))
