"""Test README.md and the pages of docs: the parser knows their commands, their blocks run, and their files exist."""

import contextlib
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from ijepa_enhanced import Encoder, cli
from ijepa_enhanced.commands.flags import all_commands, options_of, parse
from ijepa_enhanced.config import find_config
from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.models.config import EncoderConfig
from ijepa_enhanced.models.preprocessing import Preprocessing
from source_files import samples, shard

ROOT = Path(__file__).parents[1]
# The log and the changelog can contain names that no longer exist.
SPEEDRUN = ROOT / "benchmarks" / "speedrun" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", SPEEDRUN, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md" and "_build" not in page.parts]
COMMANDS = dict(all_commands())
PLACEHOLDERS = {"N": "1", "S": "1", "STEPS": "1", "FLAGS": "", "...": ""}
"""Words of commands that stand for a number, or for further options."""


class Block(NamedTuple):
    """A block of code."""

    page: str
    line: int
    language: str
    text: str
    note: str
    """Text of the comment before the block that says how it runs. It is empty if the block runs here."""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def is_command(self) -> bool:
        """Whether it runs commands, which takes seconds, or needs files that a command wrote."""
        return self.language == "sh" or "ijepa_enhanced.cli" in self.text or '"embeddings"' in self.text


def note_of(token: Token) -> str:
    """Return the text of a comment, or an empty string for other lines."""
    comment = re.fullmatch(r"<!-- (.*) -->\n?", token.content, re.DOTALL)
    return comment[1] if comment else ""


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page. A comment before the first heading applies to all blocks."""
    tokens = MarkdownIt().parse(page.read_text())
    whole = note_of(tokens[0])
    for before, token in itertools.pairwise(tokens):
        if token.type in ("fence", "code_block"):
            name, line = page.relative_to(ROOT).as_posix(), token.map[0] + 1
            yield Block(name, line, token.info, token.content, note_of(before) or whole)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNABLE = [block for block in BLOCKS if block.language in ("sh", "python")]


def lines_of(block: Block) -> list[list[str]]:
    """Return the words of each shell command. `PLACEHOLDERS` become numbers or are left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return [[found for word in line if (found := PLACEHOLDERS.get(word, word))] for line in words if line]


def arguments_of(words: list[str]) -> list[str] | None:
    """Return the words after `ijepa` in a shell line, however it is called. Return None for other programs."""
    text = shlex.join(words)
    called = re.match(r"(\w+=\S+ )?(ijepa|(torchrun|python) (.* )?-m (-- )?ijepa_enhanced)( |$)", text)
    return shlex.split(text[called.end() :].partition(" '>' ")[0]) if called else None


def test_pages_are_found() -> None:
    assert len(PAGES) > 30
    assert len(RUNNABLE) > 60


def test_every_block_has_a_language() -> None:
    """A block that is only indented has no language."""
    known = ("sh", "python", "yaml", "json", "text")
    wrong = [block for block in BLOCKS if block.language not in known and not block.language.startswith("{")]
    assert [block.place for block in wrong] == []


def runs_or_says_why_not(block: Block) -> bool:
    """`<!-- not run: REASON -->`, or `<!-- run by FILE -->`; without either, all its lines are commands of `ijepa`."""
    if named := re.fullmatch(r"run by (\S+)", block.note):
        return (ROOT / named[1]).is_file()
    if block.note:
        return bool(re.match(r"not run: \w+( \S+){3}", block.note))
    return block.language == "python" or None not in map(arguments_of, lines_of(block))


def test_every_block_runs_or_says_why_not() -> None:
    assert [block.place for block in RUNNABLE if not runs_or_says_why_not(block)] == []


def test_commands_in_blocks_are_understood() -> None:
    """Their options, the values of options with fixed choices, and the recipes exist."""
    for block in BLOCKS:
        for arguments in filter(None, map(arguments_of, lines_of(block) if block.language == "sh" else [])):
            try:
                _, options = parse(arguments)
                config = getattr(options, "config", None)
                assert config is None or config.endswith(".yaml") or find_config(config)
            except RequestError as error:
                pytest.fail(f"{block.place}: {error}")


def test_commands_in_the_text_are_understood() -> None:
    """`ijepa train --steps 300` in a sentence or a table is not complete, but its command and its options exist."""
    wrong = []
    for page in PAGES:
        for command in re.findall(r"`(ijepa [^`]*)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            words = command.split()
            owners = [name for name in COMMANDS if f"{command} ".startswith(f"{name} ")]
            groups = [name for name in COMMANDS if name.startswith(" ".join(words[:2]))]
            known = {option.shown for name in owners for option in options_of(COMMANDS[name].options)}
            unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known | {"--help"}]
            if unknown or not (groups or words[1] in ("COMMAND", "--help", "--version")):
                wrong.append((page.name, command))
    assert wrong == []


def test_files_that_the_code_names_exist() -> None:
    """`docs/data.md` in a docstring, a help text or a message; Sphinx checks the links between pages."""
    found = {
        (path.name, name)
        for folder in ("src", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"docs/[\w/]+\.md", path.read_text())
    }
    assert len(found) > 30
    assert [each for each in sorted(found) if not (ROOT / each[1]).is_file()] == []


def test_links_of_the_files_outside_docs_exist() -> None:
    """Sphinx checks those of docs."""
    for page in (*ROOT.glob("*.md"), SPEEDRUN):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with what the pages name: photos, and encoders in place of runs."""
    root, random = tmp_path_factory.mktemp("desk"), np.random.default_rng(0)
    places = [f"{name}.jpg" for name in ("a", "cat", "dog", "query", "QUERY", "photos/pets/cat1", "photos/beach/0001")]
    places += ["b.png", *(f"photos/{label}/{number}.png" for label in ("pets", "beach") for number in range(4))]
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (*random.integers(24, 60, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / place)
    for name in ("PHOTOS", "LABELED", "SOURCE", "TRAIN", "VAL"):
        (root / name).symlink_to("photos")
    for number in range(4):
        shard(root / f"train-{number:03}.tar", samples("cat", first=number))
    architecture = EncoderConfig(variant="Ti", depth=1, patch_size=8).architecture
    Encoder.random(architecture, Preprocessing(48), 0).save_pretrained(root / "WEIGHTS")
    for name in ("runs/photos", "runs/pets", "RUN"):
        shutil.copytree(root / "WEIGHTS", root / name / "encoder")
    return root


@pytest.fixture
def desk(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the folder, and run the test in the copy."""
    shutil.copytree(furnished, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs_here(page: Path) -> list[Block]:
    return [block for block in RUNNABLE if ROOT / block.page == page and not block.note]


def names(folder: Path) -> dict[str, object]:
    """Return the names that the Python code of a page may use without defining them."""
    return {"np": np, "encoder": Encoder.from_pretrained(folder / "runs/photos"), "images": ["a.jpg", "b.png"]}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not block.is_command for block in runs_here(page))],
    ids=lambda page: page.name,
)
def test_python_runs(page: Path, desk: Path) -> None:
    found = names(desk)
    for block in runs_here(page):
        if not block.is_command:
            exec(block.text, found)


TINY = "photos --config own-images-cpu --encoder.depth 1 --data.tokens_per_pack 1024 --data.workers 0 --steps 2"


@pytest.fixture(scope="module")
def trained(furnished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and a folder of embeddings."""
    root = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(furnished):
        assert cli.main(["train", *TINY.split(), "--run", str(root / "run")]) == 0
        assert cli.main(["embed", "photos", "--weights", "RUN", "--out", str(root / "embeddings")]) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.is_command for block in runs_here(page))], ids=lambda page: page.name
)
def test_commands_run(page: Path, desk: Path, trained: Path) -> None:
    """All commands of a page in order; `ijepa train` for two steps."""
    for run in ("runs/photos", "runs/pets", "RUN"):
        shutil.rmtree(run)
        shutil.copytree(trained / "run", run)
    shutil.copytree(trained / "embeddings", "embeddings")
    found = names(desk)
    for block in runs_here(page):
        if block.language == "python":
            exec(block.text, found)
            continue
        for arguments in map(arguments_of, lines_of(block)):
            assert arguments is not None
            if arguments[0] == "train":
                arguments = [*arguments, "--steps", "2"]
            for option, folder in itertools.pairwise(arguments):
                if (arguments[0], option) in (("train", "--run"), ("embed", "--out")):
                    shutil.rmtree(folder, ignore_errors=True)  # it must not exist
            assert cli.main(arguments) == 0, arguments
