"""Two ranks find what one finds, and the main one has it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_enhanced import Encoder
from ijepa_enhanced.cli import main
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing

PROTOCOLS = """
import dataclasses, json, sys
import torch
from ijepa_enhanced import Encoder
from ijepa_enhanced.data.catalog import open_catalog
from ijepa_enhanced.data.sources.open import open_source
from ijepa_enhanced.distributed import ranks_of_run
from ijepa_enhanced.evaluate import attentive, finetune, features, knn, protocol
from ijepa_enhanced.evaluate.tokens import InferenceConfig, LabelledSource

def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))

encoder = Encoder.from_pretrained(sys.argv[1])
source = open_source(sys.argv[2])
images = LabelledSource(source, open_catalog(source))
for module in (attentive, finetune):  # logits tell more than scores
    module.classification = lambda name, logits, classes, labels: [(name, logits.tolist()), ("labels", labels.tolist())]
attentive.EPOCHS = attentive.LEAST_STEPS = 5
features.PACKS_PER_PART = 2
config = finetune.FinetuneConfig(epochs=3, packs_per_step=2, drop_path=0.0, flip=0.0, min_crop=1.0)
with ranks_of_run() as ranks:
    setting = InferenceConfig(32, tokens_per_pack=64, workers=0, ranks=ranks)
    found = {}
    for turn in ("made", "cached"):
        done = []
        extracted = features.extract(encoder, images, setting, done.append, cache=True, layers=4)
        if ranks.main:
            found[turn] = {
                "values": extracted.values.tolist(),
                "layers": extracted.layers.tolist(),
                "image_ids": extracted.image_ids.tolist(),
                "unreadable": extracted.unreadable,
                "done": done[-1],
            }
        else:
            assert not len(extracted.values)
    if ranks.main:
        extracted = dataclasses.replace(extracted, values=torch.cat([extracted.values] * 4) + noise(36, 192),
            labels=torch.cat([extracted.labels] * 4), image_ids=torch.arange(36))
    knn.QUERIES = 7
    answers = protocol.knn(extracted, extracted, protocol.Scoring(ranks=ranks))
    found |= {answer.name: answer.predicted.tolist() for answer in answers}
    scores = protocol.score(extracted, extracted, ("knn", "linear"), protocol.Scoring(ranks=ranks))
    assert bool(scores) == ranks.main
    found |= {"scores": scores} if ranks.main else {}
    for probe in (attentive.attentive, lambda *args: finetune.finetune(*args, training=config)):
        found |= dict(probe(encoder, images, images, setting))
    trained = []
    make = finetune.Classifier
    finetune.Classifier = lambda *args: trained.append(make(*args)) or trained[0]
    config = finetune.FinetuneConfig(epochs=3, packs_per_step=2, drop_path=0.5)
    for _ in finetune.finetune(encoder, images, images, setting, training=config):
        pass
    weights = torch.cat([value.flatten() for value in trained[0].parameters()]).tolist()
    dropped = trained[0].random.initial_seed()
    every = ranks.gather((weights, dropped))
    assert all(theirs == weights for theirs, _ in every), "the ranks have the same weights, whatever each drops"
    assert len({theirs for _, theirs in every}) == ranks.world
if ranks.main:
    print(json.dumps(found))
else:
    assert set(found) == set()
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    Encoder.random(
        EncoderConfig(variant="Ti", depth=2, patch_size=8).architecture, Preprocessing(32), 0
    ).save_pretrained(folder)
    return folder


def launch(ranks: int, cache: Path, *what: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program on some ranks, each of one thread."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    done = subprocess.run(
        (sys.executable, *launcher, *what),
        env=os.environ | {"OMP_NUM_THREADS": "1", "IJEPA_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def damage(pictures: Path, folder: Path) -> Path:
    """The pictures, one of them without its pixels."""
    for path in pictures.rglob("*.*"):
        copy = folder / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 500 if path.name == "2.png" and "light" in path.parts else None])
    return folder


def test_two_ranks_find_what_one_finds(encoder: Path, pictures: Path, tmp_path: Path) -> None:
    """Of packs of three images and fewer, so that one rank has more views of a step than the other, or all."""
    (tmp_path / "protocols.py").write_text(PROTOCOLS)
    images = damage(pictures, tmp_path / "images")
    found: list[dict[str, Any]] = []
    for ranks in (1, 2):
        what = (str(tmp_path / "protocols.py"), str(encoder), str(images))
        code, stdout, stderr = launch(ranks, tmp_path / f"cache{ranks}", *what)
        assert code == 0, stderr
        found.append(json.loads(stdout))
    one, two = found
    for turn in ("made", "cached"):
        assert two[turn] == one[turn], "packs are the same, and so is every bit"
    assert one["made"]["done"] == len(one["labels"]) == 9
    assert one["made"]["unreadable"].keys() == {"7"}
    assert two["labels"] == one["labels"]
    for answers in ("knn1", "knn5", "knn20", "scores"):
        assert two[answers] == one[answers]
    assert len(one["knn5"]) == 36
    assert set(one["knn5"]) == {0, 1}
    assert two["attentive"] == one["attentive"]
    # Gradients are summed in another order, and AdamW's first steps divide by their size.
    torch.testing.assert_close(torch.tensor(two["finetune"]), torch.tensor(one["finetune"]), rtol=1e-3, atol=1e-4)
    assert torch.tensor(one["finetune"]).std() > 0.01, "it has learned something that could differ"


def test_evaluate_under_torchrun_speaks_with_one_voice(
    encoder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate",
        str(encoder),
        "--train",
        str(pictures),
        "--val",
        str(pictures),
        "--resolution",
        "32",
        "--json",
    ]
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "alone"))
    assert main(arguments) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    code, stdout, stderr = launch(2, tmp_path / "together", "-m", "--", "ijepa_enhanced", *arguments)
    assert code == 0, stderr
    (line,) = (line for line in stdout.splitlines() if line.startswith("{"))
    assert {**json.loads(line), "images_per_second": 0} == {**expected, "images_per_second": 0}
    assert stderr.count("Scoring: trained") == 1
    assert stderr.count("is used for training and validation") == 1


DISAGREEING = """
import os, sys
from ijepa_enhanced.cli import main

sys.exit(main(["evaluate", sys.argv[1 + int(os.environ["RANK"])], *sys.argv[3:]]))
"""


def test_ranks_with_other_weights_are_refused(encoder: Path, pictures: Path, tmp_path: Path) -> None:
    other = Encoder.from_pretrained(encoder)
    with torch.no_grad():
        other.network.blocks.norm.bias[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "disagreeing.py").write_text(DISAGREEING)
    what = ("--train", str(pictures), "--val", str(pictures), "--resolution", "32")
    code, stdout, stderr = launch(
        2, tmp_path / "cache", str(tmp_path / "disagreeing.py"), str(encoder), str(tmp_path / "other"), *what
    )
    assert code == 1
    assert "ijepa: The processes of this run do not have the same encoder. All machines need" in stderr
    assert stdout == ""
