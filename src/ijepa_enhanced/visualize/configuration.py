"""The section of a report with the configuration of a run, or with what differs between several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from ijepa_enhanced.visualize.page import NOTHING, compared, note, table
from ijepa_enhanced.visualize.run import Run

Settings = Mapping[tuple[str, str], Any]
"""Values by group and name; the group is empty for settings that belong to none."""


def configuration_section(runs: Sequence[Run], defaults: Mapping[str, Any]) -> str:
    """Return the whole configuration of one run, marked where it is not the default, or the differences of several."""
    if len(runs) > 1:
        return _differences(runs)
    settings, usual = _flat(runs[0].written), _flat(defaults)
    groups = []
    for group in dict.fromkeys(group for group, _ in settings):
        names = [name for of, name in settings if of == group]
        values = [(_value(settings, (group, name)), _value(usual, (group, name))) for name in names]
        marked = [place for place, (value, default) in enumerate(values) if value != default]
        lines = [
            (name, value, "" if value == default else f"default {default}")
            for name, (value, default) in zip(names, values, strict=True)
        ]
        groups.append(f"<div><h3>{escape(group or 'run')}</h3>{table([''], lines, marked)}</div>")
    return note("Values in blue differ from the default.") + f'<div class="groups">{"".join(groups)}</div>'


def _differences(runs: Sequence[Run]) -> str:
    flat = [_flat(run.written) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(".".join(filter(None, key)), *(_value(settings, key) for settings in flat)) for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return note("All settings are the same.")
    return note("Settings that differ; all others are the same.") + compared([run.name for run in runs], differing)


def _flat(config: Mapping[str, Any]) -> Settings:
    flat: dict[tuple[str, str], Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {(name, inner): setting for inner, setting in value.items()}
        else:
            flat["", name] = value
    return flat


def _value(settings: Settings, key: tuple[str, str]) -> str:
    """Return a value as YAML writes it, or a dash if another version of the program did not have the setting."""
    return yaml.safe_dump(settings[key], width=math.inf).splitlines()[0] if key in settings else NOTHING
