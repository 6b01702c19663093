"""Images that a CSV or JSONL file lists."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ijepa_enhanced.data.listing import Listing, Texts
from ijepa_enhanced.data.sources.base import CLASSES, class_names, fingerprint_of
from ijepa_enhanced.data.sources.folder import PathSource
from ijepa_enhanced.data.sources.labels import number_labels
from ijepa_enhanced.errors import SourceError

LISTS = (".csv", ".jsonl")


class ListSource(PathSource):
    """The images that a list names, in its order: CSV with the columns `path` and optionally `label`, or JSONL.

    Paths are relative to the list. Labels are class numbers from 0 or class names. The names are the lines of
    `classes.txt` beside the list; without it, class names are numbered in the order of the alphabet.
    """

    kind = "list of files"
    how_to_label = "Name the column of the labels 'label'. An empty label and numbers below 0 mean no label."

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self.root = path.parent

    def make_listing(self) -> Listing:
        """See `Source`."""
        images = self._lines()
        if not images:
            raise SourceError(
                f"No images in {self.path}. List one image per line. A CSV file must start with the line path,label."
            )
        for number, image in enumerate(images, start=1):
            if not image.get("path"):
                fields = ", ".join(str(name) for name in image) or "none"
                advice = "" if "path" in image else " If the column has another name, rename it to 'path'."
                raise SourceError(
                    f"Row {number} of {self.path} has no value for 'path'. Its columns are: {fields}. Every row needs "
                    f"a path.{advice}"
                )
        keys = Texts.of(str(image["path"]) for image in images)
        labels = (image.get("label") for image in images)
        return Listing(keys, *number_labels(labels, class_names(self.root), self.name))

    def _lines(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, newline="", encoding="utf-8-sig") as file:
                return [
                    *(json_lines(file, self.name) if self.path.suffix.lower() == ".jsonl" else csv.DictReader(file))
                ]
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path} is not valid UTF-8.") from error
        except csv.Error as error:
            raise SourceError(f"{self.path} cannot be read: {error}.") from error
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}.") from error

    def identity(self) -> tuple[str, ...]:
        """See `Source`."""
        return ("list", os.path.abspath(self.path))

    def fingerprint(self) -> str:
        """See `Source`; it knows the list, `classes.txt`, and size, time and some bytes of up to `SAMPLE` images."""
        return fingerprint_of([("", self.path), (CLASSES, self.root / CLASSES), *self._sampled(self.listing.keys)])


def json_lines(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    """Yield the object of each line that is not blank.

    Raises:
        SourceError: a line is not a JSON object.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(
                    f"Line {number} of {name} is not valid JSON: {error.msg} at column {error.colno}."
                ) from error
            except (ValueError, RecursionError) as error:
                raise SourceError(f"Line {number} of {name} has a number or a nesting that is too long.") from error
            if not isinstance(values, dict):
                raise SourceError(f'Line {number} of {name} is not of the form {{"path": ..., "label": ...}}.')
            yield values
