"""Accuracy against speed at different resolutions and merge rates, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from ijepa_enhanced.evaluate.sweep import Point, choose, frontier
from ijepa_enhanced.visualize.plot import plot

SCORES = {"choosing_linear": "linear, half 1", "linear": "linear, half 2"}
"""Titles of the panels: the half of the validation images that chooses, and the half that shows how good it is."""
MARKS = "Labels: merge rate.  Filled points: no other setting is both more accurate and faster.  Ring: recommended."


def draw_frontier(points: Sequence[Point], path: Path) -> bool:
    """Write a PNG of a sweep: a line for each resolution, with the merge rate beside each point.

    Points are filled, and joined by a gray step line, if no other point is both more accurate and faster. A ring marks
    the setting to choose (`choose`). Returns False if matplotlib is missing.
    """
    with plot(path, 12, 4.5) as figure:
        if figure is None:
            return False
        chosen = choose(points)
        for axes, (score, title) in zip(figure.subplots(1, len(SCORES)), SCORES.items(), strict=True):
            best = frontier(points, score)[::-1]
            steps = [(point.network_images_per_second, 100 * getattr(point, score)) for point in best]
            axes.step(*zip(*steps, strict=True), where="pre", color="0.8", zorder=0)
            for resolution in dict.fromkeys(point.resolution for point in points):
                group = sorted(
                    (point for point in points if point.resolution == resolution), key=lambda point: point.merge_rate
                )
                at = [(point.network_images_per_second, 100 * getattr(point, score)) for point in group]
                (line,) = axes.plot(
                    *zip(*at, strict=True), label=f"resolution {'native' if resolution is None else resolution}"
                )
                for point, place in zip(group, at, strict=True):
                    inside = line.get_color() if point in best else "white"
                    axes.plot(*place, "o", color=line.get_color(), markerfacecolor=inside)
                    axes.annotate(f"{point.merge_rate:g}", place, (4, 5), textcoords="offset points", fontsize=8)
            axes.plot(
                chosen.network_images_per_second,
                100 * getattr(chosen, score),
                "o",
                color="black",
                fillstyle="none",
                ms=13,
            )
            axes.set(title=title, xlabel="images per second (network only)", ylabel="top-1 accuracy, %", xscale="log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
            axes.tick_params(which="minor", labelsize=8)
            axes.legend(frameon=False)
        figure.supxlabel(MARKS, fontsize=9, color="0.4")
    return True
