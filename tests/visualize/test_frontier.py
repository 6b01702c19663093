"""The plot of a sweep is drawn from its points."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_enhanced.evaluate.sweep import Point
from ijepa_enhanced.visualize.frontier import draw_frontier


def point(resolution: int | None, rate: float, linear: float, speed: float) -> Point:
    return Point(
        resolution, rate, linear, linear, linear, linear - 0.1, 0.4, 0.41, linear, 10.0, speed / 2, speed, 1.0, 100.0
    )


POINTS = [
    point(112, 0.0, 0.60, 900.0),
    point(112, 0.1, 0.55, 1300.0),
    point(None, 0.1, 0.699, 290.0),
    point(None, 0.0, 0.70, 200.0),
]


def test_a_sweep_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw_frontier(POINTS, tmp_path / "sweep.png")
    assert draw_frontier(POINTS[:1], tmp_path / "one.png")
    with Image.open(tmp_path / "sweep.png") as sweep, Image.open(tmp_path / "one.png") as one:
        assert sweep.format == "PNG"
        assert sweep.size == (1200, 450)
        assert (np.asarray(sweep) != np.asarray(one)).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "sweep.png"]


def test_the_plot_says_which_are_on_the_frontier_and_which_to_take(tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []

    class Kept(figures.Figure):
        def savefig(self, *arguments: object, **settings: object) -> None:
            drawn.append(self)
            super().savefig(*arguments, **settings)

    beaten = point(112, 0.2, 0.54, 1200.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure", Kept)
        assert draw_frontier([*POINTS, beaten], tmp_path / "sweep.png")
    linear, reported = drawn[0].axes
    assert (linear.get_title(), reported.get_title()) == ("linear, half 1", "linear, half 2")
    assert [text.get_text() for text in linear.get_legend().get_texts()] == ["resolution 112", "resolution native"]
    assert [text.get_text() for text in linear.texts] == ["0", "0.1", "0.2", "0", "0.1"]
    marks = {
        line.get_xdata()[0]: line for line in linear.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1
    }
    # The last drawn at a place is the ring around the chosen one.
    hollow = {speed for speed, line in marks.items() if line.get_markerfacecolor() == "white"}
    assert hollow == {1200.0}
    rings = [line for line in linear.lines if line.get_fillstyle() == "none"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(290.0, pytest.approx(69.9))]
    # What can be had at a speed is the accuracy of the next faster point on the frontier.
    (steps,) = [line for line in linear.lines if line.get_drawstyle() == "steps-pre"]
    assert steps.get_xdata().tolist() == [200.0, 290.0, 900.0, 1300.0]
    assert steps.get_ydata().tolist() == pytest.approx([70.0, 69.9, 60.0, 55.0])


def test_without_matplotlib_there_is_no_plot_but_a_word_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not draw_frontier(POINTS, tmp_path / "sweep.png")
    (message,) = caplog.messages
    assert message == "sweep.png was not written. Install matplotlib with: pip install 'ijepa-enhanced[plots]'"
    assert not (tmp_path / "sweep.png").exists()
