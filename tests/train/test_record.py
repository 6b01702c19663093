"""What a run tells about itself in the model card of its encoder."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from ijepa_enhanced.config import build, flatten
from ijepa_enhanced.train.config import TrainConfig
from ijepa_enhanced.train.record import hub_datasets, public_name, training_facts
from ijepa_enhanced.train.saved import FREE_ON_RESUME, read_train_config


def test_the_recipe_in_a_card_makes_the_same_run(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(training_facts(tiny, in_source=10, steps=20, images=30)["recipe"])
    again = flatten(dataclasses.asdict(build(TrainConfig, read_train_config(tmp_path / "recipe.yaml"))))
    before = flatten(dataclasses.asdict(tiny))
    assert {key for key, value in before.items() if value != again[key]} <= set(FREE_ON_RESUME)
    assert again["encoder.variant"] == before["encoder.variant"] != TrainConfig().encoder.variant


def test_settings_that_do_not_change_the_result_are_no_part_of_the_recipe() -> None:
    config = TrainConfig(init="/home/jane/weights", teacher="facebook/dinov2-small", log_every=3, seed=5)
    facts = training_facts(config, in_source=10, steps=20, images=30)
    assert yaml.safe_load(facts["recipe"]) == {"seed": 5}
    assert (facts["initial_weights"], facts["teacher"]) == ("weights", "facebook/dinov2-small")
    assert training_facts(TrainConfig(), 10, 20, 30)["recipe"] == ""


@pytest.mark.parametrize(
    ("source", "shown", "datasets"),
    [
        ("synthetic", "synthetic", []),
        ("photos/pets", "photos/pets", []),
        ("/home/jane/photos/", "photos", []),
        ("~/photos/train-*.tar@2 + hf://me/cats:train[:9]@1", "train-*.tar@2 + hf://me/cats:train[:9]@1", ["me/cats"]),
        ("hf://beans#image=photo", "hf://beans#image=photo", ["beans"]),
        ("hf:///home/jane/beans", "beans", []),
    ],
)
def test_a_card_names_sources_and_no_folders_of_the_user(source: str, shown: str, datasets: list[str]) -> None:
    assert public_name(source) == shown
    assert hub_datasets(source) == datasets
