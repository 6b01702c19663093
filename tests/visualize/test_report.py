"""The page says what the run's folder says, needs nothing but itself, and renders whatever is missing."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.config import DataConfig
from ijepa_enhanced.data.plan import Plan
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.evaluate.features import Features
from ijepa_enhanced.models.config import EncoderConfig, PredictorConfig
from ijepa_enhanced.train.config import OptimConfig, TrainConfig
from ijepa_enhanced.train.logging import read_log
from ijepa_enhanced.train.loop import train
from ijepa_enhanced.visualize.chart import MOST_POINTS, Line, chart, thinned, ticks
from ijepa_enhanced.visualize.curves import draw_curves
from ijepa_enhanced.visualize.logged import CURVES, NOT_CURVES
from ijepa_enhanced.visualize.report import write_report
from ijepa_enhanced.visualize.run import may_download
from ijepa_enhanced.visualize.samples import NEIGHBORS, SAMPLES, nearest

DEFAULTS = dataclasses.asdict(TrainConfig())
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """What a page holds; tags that do not close in their order are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.charts: dict[str, dict[str, Any]] = {}
        """What each chart draws, by its title."""
        self.sections: dict[str, list[str]] = {"": []}
        """The texts of each section, by its name."""
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections[values["id"] or ""] = []
        if data := values.get("data-chart"):
            title = (values["aria-label"] or "").removesuffix(" by step")
            self.charts[title] = json.loads(data, parse_constant=pytest.fail)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            list(self.sections.values())[-1].append(data.strip())

    def said(self, section: str = "") -> str:
        return " ".join(self.sections[section])

    def points(self, title: str, run: int = 0) -> list[tuple[int, float]]:
        return [(step, value) for step, value in self.charts[title]["lines"][run]["points"]]

    def rows(self, section: str) -> list[list[str]]:
        """The cells of all tables of a section."""
        html = self.text.partition(f'<section id="{section}">')[2].partition("</section>")[0]
        rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html)]
        return [row for row in rows if row]


def report(path: Path, *runs: Path) -> Page:
    write_report(runs, path, DEFAULTS)
    return Page(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of smooth images of many shapes, and among them one that is no image and one that is cut off."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for number in range(20):
        path = folder / ("left", "right")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((int(rng.integers(40, 90)), int(rng.integers(40, 90))), Image.Resampling.BICUBIC).save(path)
    (folder / "left" / "98.jpg").write_bytes(b"no image")
    whole = (folder / "left" / "00.jpg").read_bytes()
    (folder / "left" / "99.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    return folder


def config(photos: Path, **changes: Any) -> TrainConfig:
    tiny = TrainConfig(
        data=DataConfig(
            str(photos),
            tokens_per_pack=256,
            packs_per_step=2,
            min_resolution=32,
            max_resolution=48,
            workers=0,
            max_unreadable=0.5,
        ),
        encoder=EncoderConfig("Ti", 8, depth=1),
        predictor=PredictorConfig(32, 1, 2),
        steps=8,
        log_every=1,
    )
    return dataclasses.replace(tiny, **changes)


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(config(photos), folder)
    return folder


@pytest.fixture(scope="module")
def other(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "second"
    train(config(photos, optim=OptimConfig(lr=0.01), steps=6), folder)
    return folder


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(tmp_path_factory.mktemp("page") / "report.html", trained)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_page_is_whole_and_needs_nothing_else(page: Page) -> None:
    assert page.text.startswith("<!DOCTYPE html>")
    assert "//" not in re.sub(r'"data:image/\w+;base64,[^"]*"', "", page.text)
    for tag, values in page.tags:
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action"):
            if name in values:
                assert (values[name] or "").startswith(("data:", "#")), (tag, values[name])
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert len(page.text) < 2e6


def test_every_link_of_the_menu_leads_somewhere(page: Page) -> None:
    anchors = [values["href"] for tag, values in page.tags if tag == "a"]
    assert anchors == [f"#{values['id']}" for tag, values in page.tags if tag == "section"]
    assert anchors == [
        f"#{name}"
        for name in ("curves", "feature-maps", "nearest-neighbors", "masks", "data", "configuration", "versions")
    ]


def test_every_curve_has_the_values_of_the_log(page: Page, trained: Path) -> None:
    log = read_log(trained)
    titles = {name: curve.title for group in CURVES.values() for name, curve in group.items()}
    logged = [name for name in log[0] if name not in (*NOT_CURVES, "contrastive")]  # which this run does not have
    assert set(page.charts) == {titles[name] for name in logged}
    assert len(log) == 8
    for name in logged:
        assert page.points(titles[name]) == [(line["step"], line[name]) for line in log], name


def test_the_head_says_how_far_the_run_came(page: Page, trained: Path) -> None:
    log = read_log(trained)
    said = page.said()
    assert "first finished" in said
    assert "Steps 8 of 8" in said
    progress = json.loads((trained / "checkpoints/step-00000008/progress.json").read_text())
    assert f"Images seen {progress['images']}" in said
    assert f"Last loss {log[-1]['loss']:.4f}" in said
    assert f"Views/s (median) {np.median([line['views_per_second'] for line in log]):,.0f}" in said
    assert "warning" not in {values.get("class") for _, values in page.tags}


def test_settings_that_are_not_the_default_are_marked(page: Page) -> None:
    html = page.text.partition('<section id="configuration">')[2]
    marked = {
        name: (value, usual)
        for name, value, usual in re.findall(
            r'<tr class="marked"><th>(\w+)</th><td>(.*?)</td><td>default (.*?)</td>', html
        )
    }
    assert marked.keys() == {
        "source", "tokens_per_pack", "packs_per_step", "min_resolution", "max_resolution", "workers", "max_unreadable",
        "variant", "patch_size", "depth", "width", "heads", "steps", "log_every",
    }  # fmt: skip
    assert marked["tokens_per_pack"] == ("256", "16384")
    assert marked["steps"] == ("8", "null")
    assert ["lr", "0.001", ""] in page.rows("configuration")


def test_the_images_are_summed_up_and_the_unreadable_ones_named(page: Page) -> None:
    facts = {name: rest for name, *rest in page.rows("data")}
    assert facts["images"] == ["21"]
    assert facts["classes"] == ["2"]
    assert facts["unreadable"] == ["2"]
    assert facts["left/98.jpg"] == ["not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, HEIC or NumPy file"]
    assert "cannot be decoded" in facts["left/99.jpg"][0]


def test_feature_maps_and_neighbors_are_of_images_that_can_be_read(page: Page) -> None:
    html = page.text.partition('<section id="feature-maps">')[2].partition("</section>")[0]
    assert html.count("data:image/jpeg") == html.count("data:image/png") == SAMPLES
    assert "99.jpg" not in html
    html = page.text.partition('<section id="nearest-neighbors">')[2].partition("</section>")[0]
    assert html.count('class="near"') == SAMPLES
    assert html.count("<img") == SAMPLES * (NEIGHBORS + 1)
    for line in html.split('<div class="near">')[1:]:
        own, *others = re.findall(r"(left|right)(?: -?\d\.\d\d)?</figcaption>", line)
        green = re.findall(r'class="same">(left|right)', line)
        assert green == [label for label in others if label == own]


def test_a_map_is_beside_its_image_at_its_aspect_ratio(page: Page) -> None:
    html = page.text.partition('<section id="feature-maps">')[2].partition("</section>")[0]
    for pair in html.split("<figure>")[1:]:
        (width, height), (map_width, map_height) = re.findall(r'width="(\d+)" height="(\d+)"', pair)
        assert height == map_height
        assert int(map_width) == pytest.approx(int(width), rel=0.2)
        assert int(width) * int(height) == pytest.approx(150**2, rel=0.02)


def test_neighbors_are_those_a_loop_finds() -> None:
    values = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(30) * 3 + 1
    found = nearest(Features(values, None, rows, {}, 0.0), [1, 49, 88], 4)
    assert list(found) == [1, 49, 88]
    for row, neighbors in found.items():
        own = values[(row - 1) // 3].numpy()
        cosines = {
            int(rows[place]): float(own @ one / np.linalg.norm(own) / np.linalg.norm(one))
            for place, one in enumerate(values.numpy())
            if rows[place] != row
        }
        expected = sorted(cosines, key=lambda other: -cosines[other])[:4]
        assert [other for other, _ in neighbors] == expected
        assert [cosine for _, cosine in neighbors] == pytest.approx([cosines[other] for other in expected])


def test_fewer_images_than_neighbors_are_all_neighbors() -> None:
    features = Features(torch.eye(3), None, torch.tensor([2, 5, 9]), {}, 0.0)
    assert [row for row, _ in nearest(features, [5], 8)[5]] in ([2, 9], [9, 2])


def test_images_without_labels_and_of_native_size_are_shown_too(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in photos.glob("*/[01]*.jpg"):
        shutil.copy(path, tmp_path / "flat")
    shutil.rmtree(run / "checkpoints")
    reconfigure(run, "data", source=str(tmp_path / "flat"), min_resolution=None, max_resolution=None)
    encoder = json.loads((run / "encoder/config.json").read_text())
    encoder["preprocessing"]["resolution"] = None
    (run / "encoder/config.json").write_text(json.dumps(encoder))
    page = report(tmp_path / "report.html", run)
    assert {name: rest for name, *rest in page.rows("data")}["classes"] == ["none"]
    html = page.text.partition('<section id="nearest-neighbors">')[2].partition("</section>")[0]
    assert html.count("<img") == SAMPLES * (NEIGHBORS + 1)
    assert len(re.findall(r"<figcaption>-?[01]\.\d\d</figcaption>", html)) == SAMPLES * NEIGHBORS
    assert "Green" not in html
    grids = re.findall(r"feature map of [^\"]*, (\d+) x (\d+) patches", page.text)
    assert max(int(rows) * int(cols) for rows, cols in grids) > (48 / 8) ** 2 * 1.5


def test_the_page_is_the_same_every_time(page: Page, trained: Path, tmp_path: Path) -> None:
    again = report(tmp_path / "report.html", trained)
    times = r"Written on [\d: -]+"
    assert re.sub(times, "", again.text) == re.sub(times, "", page.text)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_is_logged_now_and_then_is_drawn_where_it_is(run: Path, tmp_path: Path) -> None:
    """By its own name if nobody knows it; words are no curve."""
    log = read_log(run)
    log[3] |= {"rankme": 12.5, "knn": 0.25, "new_thing": 3.0, "words": "are no curve"}
    log[6] |= {"rankme": 11.0, "knn": float("nan")}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    page = report(tmp_path / "report.html", run)
    assert page.points("RankMe") == [(4, 12.5), (7, 11.0)]
    assert page.points("kNN-20") == [(4, 0.25)]
    assert page.points("new_thing") == [(4, 3.0)]
    assert "words" not in page.charts


@pytest.mark.parametrize(
    ("alarms", "said"),
    [
        ([0.0, 1.0, 1.0], "the monitor first warned at step 4 and was still warning at the end."),
        ([1.0, 1.0, 0.0], "the monitor first warned at step 2 and last at step 4."),
        ([0.0, 0.0, 0.0], None),
    ],
)
def test_a_collapse_is_said_first(run: Path, tmp_path: Path, alarms: list[float], said: str | None) -> None:
    log = read_log(run)
    for step, alarm in zip((2, 4, 6), alarms, strict=True):
        log[step - 1] |= {"alarm": alarm, "best": 2, "monitor_seconds": 0.5}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    page = report(tmp_path / "report.html", run)
    assert ("The run collapsed" in page.said()) == (said is not None)
    assert (said or "") in page.said()
    assert "Best encoder (by the monitor) step 2" in page.said()
    assert page.points("Monitor check") == [(2, 0.5), (4, 0.5), (6, 0.5)]
    assert not {"alarm", "best"} & set(page.charts)


@pytest.mark.parametrize("skipped", [0, 2])
def test_skipped_steps_are_said(run: Path, tmp_path: Path, skipped: int) -> None:
    log = [line | {"skipped": skipped} for line in read_log(run)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    said = "Steps skipped because their loss or gradient was NaN or infinite: 2."
    assert (said in report(tmp_path / "report.html", run).said()) == bool(skipped)


def test_a_term_that_a_run_does_without_has_no_curve(run: Path, tmp_path: Path) -> None:
    assert {line["contrastive"] for line in read_log(run)} == {0.0}
    titles = report(tmp_path / "report.html", run).charts
    assert {"VICReg loss", "Prediction loss"} <= titles.keys()
    assert "Contrastive loss" not in titles


def test_beside_others_too_a_term_that_a_run_does_without_has_no_line(trained: Path, run: Path, tmp_path: Path) -> None:
    log = [line | {"vicreg": 0.0} for line in read_log(run)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    charts = report(tmp_path / "report.html", trained, run).charts
    assert [line["name"] for line in charts["VICReg loss"]["lines"]] == ["first"]
    assert [line["name"] for line in charts["Loss"]["lines"]] == ["first", "run"]


def test_a_line_without_losses_has_no_point_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe was due, but no image could be read since the line before."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, plot = {}, axes.plot

    def spy(self: Any, steps: Any, values: Any, label: str) -> Any:
        drawn[label] = [*zip(steps, values, strict=True)]
        return plot(self, steps, values, label=label)

    monkeypatch.setattr(axes, "plot", spy)
    log = [{"step": 2, "loss": 0.5, "lr": 1.0}, {"step": 3, "lr": 2.0}, {"step": 4, "loss": 0.25, "lr": 3.0}]
    assert draw_curves(log, tmp_path / "curves.png")
    assert drawn == {"loss": [(2, 0.5), (4, 0.25)], "lr": [(2, 1.0), (3, 2.0), (4, 3.0)]}


def test_a_chart_of_full_packs_is_not_called_budget_use(page: Page, trained: Path) -> None:
    """`fill` is the share of `tokens_per_pack`; budget use, which is in the table, compares packs with the largest."""
    assert page.points("Pack fill") == [(line["step"], line["fill"]) for line in read_log(trained)]
    facts = {name: rest for name, *rest in page.rows("data")}
    config = DataConfig(**yaml.safe_load((trained / "config.yaml").read_text())["data"])
    plan = Plan(open_catalog(open_source(config.source)), config, 8, 0).epoch(0)
    assert facts["pack balance"] == [f"{plan.budget_use:.2%} (mean / largest number of tokens per pack)"]
    assert f"{plan.fill:.2%} of data.tokens_per_pack" in facts["tokens per pack"][0]
    assert f"{plan.fill:.2%}" != f"{plan.budget_use:.2%}", "or this test shows nothing"


def test_saved_scores_are_shown(run: Path, tmp_path: Path) -> None:
    details = {"knn20_mean_per_class": 0.162, "linear_mean_per_class": 0.2, "linear_low": 0.19, "linear_high": 0.223}
    trained = {"knn20": 0.1693, "linear": 0.21, "linear_top5": 0.6, "rankme": 51.234, "lowshot1": 0.5, **details}
    scores = {"start": {"knn20": 0.109, "images_per_second": None}, "trained": trained}
    settings = {"train": "photos/<a>", "val": "photos/b", "resolution": 64, "merge_rate": 0.0, "seed": 0}
    (run / "evaluation.json").write_text(json.dumps({"settings": settings, "scores": scores}))
    page = report(tmp_path / "report.html", run)
    assert page.rows("evaluation") == [
        ["", "kNN-20", "images/s", "linear", "RankMe", "low-shot 1%"],
        ["start", "10.9%", "–", "–", "–", "–"],  # noqa: RUF001
        ["trained", "16.9% (16.2%)", "–", "21.0% (20.0%) [19.0%, 22.3%]", "51.23", "50.0%"],  # noqa: RUF001
    ]
    said = page.said("evaluation")
    assert "Scored on photos/b at a resolution of 64 px, with seed 0. Probes were trained on photos/<a>." in said
    assert "mIoU" not in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": None}, "Scored on b at native resolution. Probes"),
        ({"resolution": "native"}, "Scored on b at native resolution. Probes"),
        ({"resolution": 96, "merge_rate": 0.1}, "on b at a resolution of 96 px, with a merge rate of 0.1. Probes"),
        (
            {"data": "c", "resolution": 96, "seed": 1},
            "Scored on 20% of c at a resolution of 96 px, with seed 1. Probes were trained on the other 80%.",
        ),
    ],
)
def test_how_scores_were_found_is_said(run: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    sources = {} if "data" in settings else {"train": "a", "val": "b"}
    saved = {"settings": sources | settings, "scores": {"trained": {"dense_miou": 0.25}}}
    (run / "evaluation.json").write_text(json.dumps(saved))
    page = report(tmp_path / "report.html", run)
    assert said in page.said("evaluation")
    assert "dense mIoU: mean intersection over union" in page.said("evaluation")
    assert page.rows("evaluation")[1] == ["trained", "25.0%"]


def test_scores_without_settings_are_shown_with_a_word_about_it(run: Path, tmp_path: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps({"scores": {"trained": {"knn20": 0.5}}}))
    page = report(tmp_path / "report.html", run)
    assert "evaluation.json does not say how the scores were found." in page.said("evaluation")
    assert page.rows("evaluation")[1] == ["trained", "50.0%"]


@pytest.mark.parametrize("change", [{"resolution": 96}, {"seed": 1}, {"images": ["3", "4"]}])
def test_scores_that_do_not_compare_are_said_to(
    trained: Path, run: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    again = Path(shutil.copytree(trained, tmp_path / "again"))
    settings = {"train": "a", "val": "b", "resolution": 64, "seed": 0, "images": ["1", "2"]}
    for folder in (run, again):
        settings |= {"weights": str(folder)}
        saved = {"settings": settings, "scores": {"trained": {"knn20": 0.5}}}
        (folder / "evaluation.json").write_text(json.dumps(saved))
    said = report(tmp_path / "report.html", run, again).said("evaluation")
    assert said.count("at a resolution of 64 px") == 1
    assert "not comparable" not in said
    (again / "evaluation.json").write_text(json.dumps(saved | {"settings": settings | change}))
    said = report(tmp_path / "report.html", run, again).said("evaluation")
    assert "These scores are not comparable" in said
    assert "run: Scored on b at a resolution of 64 px, with seed 0." in said
    assert f"again: Scored on b at a resolution of {change.get('resolution', 64)} px, with seed" in said


def test_a_run_that_died_at_once_still_renders(run: Path, tmp_path: Path) -> None:
    for path in run.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(tmp_path / "report.html", run)
    said = page.said()
    assert "unfinished" in said
    assert "Steps 0 of 8" in said
    assert "No log: the run ended before it wrote one." in said
    assert "No checkpoint: the run ended before it saved one." in said
    assert "No encoder: it is saved with the first checkpoint." in said
    assert not page.charts
    assert list(page.sections) == ["", "masks", "data", "configuration", "versions"]


def test_a_log_that_was_cut_off_is_shown_up_to_there(run: Path, tmp_path: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    shutil.rmtree(run / "checkpoints")
    page = report(tmp_path / "report.html", run)
    assert [step for step, _ in page.points("Loss")] == [1, 2]
    assert "Steps 2 of 8" in page.said()


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("encoder/model.safetensors", "The encoder cannot be read: "),
        ("encoder/config.json", "The encoder cannot be read: "),
        ("checkpoints/step-00000008/progress.json", "The checkpoint step-00000008 cannot be read: "),
        ("evaluation.json", "The evaluation cannot be read: "),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(run: Path, tmp_path: Path, file: str, sentence: str) -> None:
    (run / "evaluation.json").write_text('{"scores": {"trained": {"knn20": 0.5}}}')
    damage(run / file)
    page = report(tmp_path / "report.html", run)
    assert sentence in page.said()
    assert len(page.points("Loss")) == 8
    assert ("feature-maps" in page.sections) == (not file.startswith("encoder"))


@pytest.mark.parametrize("text", ["[1, 2]", '{"scores": {"trained": 3}}', '{"scores": {"trained": {"knn20": "much"}}}'])
def test_an_evaluation_of_another_form_is_not_shown(run: Path, tmp_path: Path, text: str) -> None:
    (run / "evaluation.json").write_text(text)
    page = report(tmp_path / "report.html", run)
    assert "The evaluation cannot be read: " in page.said()
    assert "evaluation" not in page.sections


def reconfigure(run: Path, group: str, **changes: Any) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    (values[group] if group else values).update(changes)
    (run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def test_without_its_images_a_page_says_so_and_leaves_them_out(run: Path, tmp_path: Path) -> None:
    reconfigure(run, "data", source="/nowhere/photos")
    reconfigure(run, "", steps=None)
    page = report(tmp_path / "report.html", run)
    assert "The images are not shown: No such file or folder: /nowhere/photos." in page.said()
    assert "Steps 8 Training" in page.said()
    assert list(page.sections) == ["", "curves", "data", "configuration", "versions"]
    assert {name: rest for name, *rest in page.rows("data")}["unreadable"] == ["2"]


def test_images_that_changed_are_not_taken_for_those_of_the_run(run: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "left" / "00.jpg").unlink()
    reconfigure(run, "data", source=str(tmp_path / "photos"))
    page = report(tmp_path / "report.html", run)
    assert "The images are not shown: they, or the data settings, have changed since training." in page.said()
    assert "masks" not in page.sections


def test_the_length_of_a_run_of_epochs_is_known_from_its_images(run: Path, tmp_path: Path) -> None:
    reconfigure(run, "", steps=None, epochs=20.0)
    page = report(tmp_path / "report.html", run)
    packs = int({name: rest for name, *rest in page.rows("data")}["packs per epoch"][0])
    assert f"Steps 8 of {round(20 * packs / 2)}" in page.said()
    assert "unfinished" in page.said()


@pytest.mark.parametrize(
    "source", ["hf://someone/<photos>", "s3://bucket/train.tar", "photos@2 + hf://someone/photos@1"]
)
def test_remote_images_are_not_fetched_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr("ijepa_enhanced.visualize.run.open_source", lambda *_: pytest.fail("opened"))
    reconfigure(run, "data", source=source)
    page = report(tmp_path / "report.html", run)
    assert f"The images are not shown: {source} is remote." in page.said()
    assert list(page.sections) == ["", "curves", "data", "configuration", "versions"]


def test_a_local_path_is_not_remote_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:" / "b").mkdir(parents=True)
    assert not may_download("a://b")
    assert not may_download("photos + more")
    assert may_download("b://b")


@pytest.mark.parametrize(
    ("factor", "section", "said"),
    [
        (torch.nan, "", "The encoder cannot be read: The weights "),
        (1e30, "feature-maps", "Feature maps and nearest neighbors cannot be shown: The features of left/00.jpg"),
    ],
)
def test_weights_and_features_that_are_not_finite_are_said(
    run: Path, tmp_path: Path, factor: float, section: str, said: str
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(run / "encoder/model.safetensors")
    save_file({name: value * factor for name, value in weights.items()}, run / "encoder/model.safetensors")
    page = report(tmp_path / "report.html", run)
    assert said in page.said(section)
    assert "nearest-neighbors" not in page.sections


ODD = "<b>[red]&amp;'\""


def test_names_are_text_and_not_html(run: Path, photos: Path, tmp_path: Path) -> None:
    """Names of runs, sources, classes, images, subjects, settings, errors and keys of the log."""
    folder = tmp_path / ODD
    for path in photos.glob("*/[01]*.jpg"):
        (folder / f"{ODD}{path.parent.name}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{ODD}{path.parent.name}" / f"{ODD}{path.name}")
    (folder / f"{ODD}left" / f"{ODD}.jpg").write_bytes(b"no image")
    shutil.rmtree(run / "checkpoints")
    reconfigure(run, "data", source=str(folder))
    log = [line | {ODD: 1.0} for line in read_log(run)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    settings = {"train": ODD, "val": ODD, "resolution": 64}
    (run / "evaluation.json").write_text(json.dumps({"settings": settings, "scores": {ODD: {ODD: 0.5}}}))
    (tmp_path / "runs").mkdir()
    named = Path(shutil.copytree(run, tmp_path / "runs" / ODD))
    for runs in ([named], [named, run]):
        page = report(tmp_path / "report.html", *runs)
        assert not [tag for tag, _ in page.tags if tag == "b"]
        assert not [values for _, values in page.tags if any(name.startswith("[") for name in values)]
        assert ODD in page.charts
        for section in ("", "evaluation", "data", "feature-maps", "nearest-neighbors", "configuration"):
            if section != "configuration" or len(runs) == 1:
                assert ODD in page.said(section), section
        assert ODD in page.said("curves")
        assert any(ODD in (values.get("alt") or "") for _, values in page.tags)
        if len(runs) > 1:
            assert page.charts["Loss"]["lines"][0]["name"] == ODD


def test_several_runs_are_overlaid(trained: Path, other: Path, tmp_path: Path) -> None:
    page = report(tmp_path / "report.html", trained, other)
    assert "2 runs compared" in page.said()
    for place, folder in enumerate((trained, other)):
        expected = [(line["step"], line["loss"]) for line in read_log(folder)]
        assert page.points("Loss", place) == expected
        assert page.charts["Loss"]["lines"][place]["name"] == folder.name
    colors = [line["color"] for line in page.charts["Loss"]["lines"]]
    assert len(set(colors)) == 2
    legend = page.text.partition('<ul class="legend">')[2].partition("</ul>")[0]
    for folder, color in zip((trained, other), colors, strict=True):
        assert f'style="border-color: {color}"></span>{folder.name}</li>' in legend


def test_of_several_runs_only_what_differs_is_listed(trained: Path, other: Path, tmp_path: Path) -> None:
    page = report(tmp_path / "report.html", trained, other)
    assert page.rows("configuration") == [["", "first", "second"], ["optim.lr", "0.001", "0.01"], ["steps", "8", "6"]]
    assert "Steps 8 of 8 6 of 6" in page.said()
    assert "masks" not in page.sections


def test_several_runs_show_the_same_images(trained: Path, other: Path, tmp_path: Path) -> None:
    page = report(tmp_path / "report.html", trained, other)
    html = page.text.partition('<section id="feature-maps">')[2].partition("</section>")[0]
    assert (html.count("data:image/jpeg"), html.count("data:image/png")) == (SAMPLES, 2 * SAMPLES)
    html = page.text.partition('<section id="nearest-neighbors">')[2].partition("</section>")[0]
    assert html.count('class="near"') == 2 * SAMPLES


def test_a_run_beside_itself_differs_in_nothing(trained: Path, run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "elsewhere" / "first"))
    page = report(tmp_path / "report.html", trained, again)
    assert "All settings are the same." in page.said("configuration")
    assert [line["name"] for line in page.charts["Loss"]["lines"]] == [str(trained), str(again)]


def test_a_dead_run_beside_a_whole_one(trained: Path, run: Path, tmp_path: Path) -> None:
    for name in ("log.jsonl", "encoder", "checkpoints"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    page = report(tmp_path / "report.html", run, trained)
    assert "run: No log" in page.said()
    assert [line["name"] for line in page.charts["Loss"]["lines"]] == ["first"]
    html = page.text.partition('<section id="feature-maps">')[2].partition("</section>")[0]
    assert html.count("data:image/png") == SAMPLES


def test_a_folder_that_is_no_run_is_refused_and_the_old_page_stays(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(RequestError, match=r"config\.yaml"):
        write_report([trained, tmp_path], tmp_path / "report.html", DEFAULTS)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def test_a_long_line_is_thinned_but_keeps_its_spikes() -> None:
    rng = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(rng.normal(size=10_000))]
    points[1234] = (1234, 100.0)
    points[4321] = (4321, -100.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert {points[1234], points[4321], points[-1]} <= set(kept)
    # Nowhere is a stretch left out.
    assert max(np.diff([step for step, _ in kept])) < 10_000 / MOST_POINTS * 4
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize(
    ("low", "high", "options", "labels"),
    [
        (0.0, 1.0, {}, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.91, 0.995, {}, ["0.92", "0.94", "0.96", "0.98"]),
        (0.0, 0.25, {"percent": True}, ["0%", "5%", "10%", "15%", "20%", "25%"]),
        (0.9966, 0.9971, {"percent": True}, ["99.66%", "99.67%", "99.68%", "99.69%", "99.70%", "99.71%"]),
        (10, 100_000, {"whole": True}, ["20k", "40k", "60k", "80k", "100k"]),
        (0, 2.5e7, {}, ["0M", "5M", "10M", "15M", "20M", "25M"]),
        (1, 3, {"whole": True}, ["1", "2", "3"]),
        (0.0, 5e-5, {}, ["0", "1e-05", "2e-05", "3e-05", "4e-05", "5e-05"]),
        (-0.5, 0.5, {}, ["-0.4", "-0.2", "0.0", "0.2", "0.4"]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, options: dict[str, bool], labels: list[str]) -> None:
    found = ticks(low, high, **options)
    assert [text for _, text in found] == labels
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in found)


def test_points_are_drawn_where_their_values_are() -> None:
    """On a frame from (46, 8) to (206, 122), with y downwards."""
    html = chart("Thing", "m", [Line("run", 0, [(0, 1.0), (50, 3.0), (100, 2.0)])])
    assert 'd="M46.0 122.0L126.0 8.0L206.0 65.0"' in html


def test_long_numbers_have_room_beside_the_frame() -> None:
    """A character is at most 6.2 units wide, and the numbers end 5 units left of the frame."""
    html = chart("Thing", "", [Line("run", 0, [(0, 0.9966), (1, 0.99685)])], percent=True)
    numbers = re.findall(r'class="y" x="(\d+)" y="[\d.]+">([^<]+)<', html)
    assert "99.665%" in [text for _, text in numbers]
    assert all(float(end) >= 6.2 * len(text) for end, text in numbers)


@pytest.mark.parametrize("points", [[(5, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -3.0), (9, -3.0)]])
def test_a_flat_line_and_a_lone_point_have_room(points: list[tuple[int, float]]) -> None:
    html = chart("Thing", "", [Line("run", 0, points)])
    assert "nan" not in html
    heights = {
        y for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", html.partition('class="line"')[2].partition('"/>')[0])
    }
    assert heights == {"65.0"}


# In a browser.

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # neither the page nor the browser itself speaks to anyone
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
    "--dump-dom",
)
PROBE = """
<script>
addEventListener("load", () => {
  const svg = document.querySelector("svg[data-chart]"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1, clientY: box.top + box.height / 2}));
  document.body.dataset.found = JSON.stringify({
    tip: svg.parentNode.querySelector(".tip").innerText,
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    images: document.images.length,
    fetched: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !/^data:/.test(name)),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
  });
});
</script>
"""


@pytest.fixture
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine: apt-get install chromium")


def browse(chromium: str, html: str, folder: Path, width: int = 1200) -> tuple[str, list[str]]:
    """The page as the browser has it after its scripts, and what it said on its console."""
    page = folder / "browsed.html"
    page.write_text(html, encoding="utf-8")
    arguments = [
        chromium,
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},1000",
        page.as_uri(),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page_without_errors_and_requests(
    chromium: str, trained: Path, other: Path, page: Page, tmp_path: Path, width: int
) -> None:
    several = report(tmp_path / "report.html", trained, other)
    for one, runs in ((page, [trained]), (several, [trained, other])):
        shown, console = browse(chromium, one.text.replace("</body>", PROBE + "</body>"), tmp_path, width)
        assert console == []
        found = json.loads(Found(shown).value)
        assert found["fetched"] == []
        assert found["broken"] == 0
        assert found["images"] == len([tag for tag, _ in one.tags if tag == "img"])
        assert found["overflow"] <= 0
        assert found["height"] > 2000
        # At the right edge the pointer is at each run's last step.
        last = [read_log(run)[-1] for run in runs]
        names = [f"{run.name}, " if len(runs) > 1 else "" for run in runs]
        lines = [f"{name}step {line['step']}: " for name, line in zip(names, last, strict=True)]
        tips = found["tip"].splitlines()
        assert len(tips) == len(runs)
        for tip, start, line in zip(tips, lines, last, strict=True):
            assert tip.startswith(start)
            assert float(tip.removeprefix(start)) == pytest.approx(line["loss"], rel=1e-3)


class Found(HTMLParser):
    """What the probe left in the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.value = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.value = dict(attributes).get("data-found") or self.value


@pytest.mark.browser
@pytest.mark.parametrize(
    "bad",
    [
        "<script>missing();</script>",
        '<img src="http://127.0.0.1:9/x.png">',
        '<link rel="stylesheet" href="x.css">',
    ],
)
def test_the_browser_would_tell_of_errors_and_requests(chromium: str, page: Page, tmp_path: Path, bad: str) -> None:
    _, console = browse(chromium, page.text.replace("</body>", f"{bad}</body>"), tmp_path)
    assert len(console) == 1
