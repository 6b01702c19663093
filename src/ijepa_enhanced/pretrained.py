"""Encoders in files: ours, released weights in other layouts, and the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import torch
from torch import Tensor

from ijepa_enhanced.card import card, edited_card
from ijepa_enhanced.devices import MEGABYTE, free_memory
from ijepa_enhanced.errors import EncoderError, NotFiniteError, first_sentence, unknown
from ijepa_enhanced.files import replacing
from ijepa_enhanced.hub import download
from ijepa_enhanced.models.config import Architecture
from ijepa_enhanced.models.convert.ijepa_checkpoint import PARTS, is_checkpoint
from ijepa_enhanced.models.convert.layouts import convert, is_foreign
from ijepa_enhanced.models.convert.reader import Reader
from ijepa_enhanced.models.preprocessing import Origin, Preprocessing, Record
from ijepa_enhanced.models.vit import VisionTransformer
from ijepa_enhanced.ops.positions import Resampling

if TYPE_CHECKING:
    from ijepa_enhanced.config import Config

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of config.json, raised whenever older files can no longer be read. Version 1 had no preprocessing, version 2
named the architecture by a variant."""

PICKLES = (".pth", ".pt", ".bin", ".tar")
"""Endings of files that `torch.load` reads. Only tensors and plain values are loaded from them."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
"""NAME/MODEL or NAME/MODEL@REVISION."""

UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that code raises if a file contains unexpected values or tensors. They include EncoderError."""

WhichEncoder = Literal["target", "context"]


@dataclass(frozen=True)
class Pretrained:
    """What an encoder is made of."""

    network: VisionTransformer
    preprocessing: Preprocessing
    origin: Origin | None
    """None: not from released weights."""
    record: Record


def save(folder: Path, pretrained: Pretrained, name: str | None = None) -> None:
    """Write `model.safetensors`, `README.md` and `config.json` into `folder`, and create it if needed.

    Args:
        folder: where.
        pretrained: what to save.
        name: what the model card calls it. None: the path of the folder, or the name of the folder if that is absolute.

    Raises:
        OSError: a file cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in pretrained.network.state_dict().items()}
    # Each file is written under a temporary name and renamed, so that a reader never sees half of one.
    with replacing(folder / "model.safetensors") as temporary:
        try:
            save_file(state, temporary)
        except SafetensorError as error:  # safetensors reports failed writes as its own errors
            raise OSError(f"{folder / 'model.safetensors'} cannot be written: {error}") from error
    describe(folder, pretrained, name)


def describe(folder: Path, pretrained: Pretrained, name: str | None = None) -> None:
    """Write the `README.md` and the `config.json` of an encoder folder; arguments and errors are those of `save`.

    A README.md that somebody wrote or edited is kept.
    """
    network, origin, record = pretrained.network, pretrained.origin, pretrained.record
    if edited_card(folder / "README.md") is None:
        # The folders above it may tell the user's name, and the card may be published.
        name = name or (folder.name if folder.is_absolute() else str(folder))
        text = record.card if record.card is not None else card(name, network, pretrained.preprocessing, origin, record)
        with replacing(folder / "README.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    config = {
        "format": FORMAT,
        "architecture": dataclasses.asdict(network.config),
        "preprocessing": dataclasses.asdict(pretrained.preprocessing),
        "origin": origin and dataclasses.asdict(origin),
        "training": record.training,
        "scores": record.scores,
    }
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def load(path: str | Path, encoder: WhichEncoder = "target") -> Pretrained:
    """Load an encoder on the CPU; arguments and errors are those of `Encoder.from_pretrained`."""
    place = find(path)
    folder = place if place.is_dir() else place.parent
    config = read_json(folder / "config.json")
    if not is_foreign(config) and (place.is_dir() or (config and place.name == "model.safetensors")):
        return load_ours(folder, config, encoder)
    weights = place if place.is_file() else weights_in(place)
    content, processor = read_weights(weights), read_json(folder / "preprocessor_config.json") or {}
    check_memory(weights, bytes_of(content, encoder))
    try:
        imported = convert(content, config if is_foreign(config) else None, processor, encoder)
        network = network_of(imported.architecture, imported.weights)
    except UNFIT as error:
        raise EncoderError(f"{path} cannot be loaded: {_reason(error)}") from error
    check_finite(network, place)
    if imported.note:
        logger.warning("%s: %s", path, imported.note)
    # A Hub id is not a path, and its files lie in a folder that is named by a hash.
    name = place.resolve().name if Path(path).exists() else str(path)
    which = encoder if imported.layout == "I-JEPA" else None
    origin = Origin(name, imported.layout, license_of(edited_card(folder / "README.md")) or imported.license, which)
    return Pretrained(network, imported.preprocessing, origin, Record())


def load_ours(folder: Path, config: dict[str, Any] | None, encoder: WhichEncoder) -> Pretrained:
    """Load an encoder that `save` wrote.

    Raises:
        EncoderError: the folder has no encoder, or one of an older version, or a damaged one.
        NotFiniteError: a weight is not finite.
    """
    if config is None or not (folder / "model.safetensors").is_file():
        needed = "config.json and model.safetensors must be in it or in its subfolder 'encoder'"
        raise EncoderError(f"{folder} contains no encoder: {needed}.")
    version = config.get("format", 1 if "patch_size" in config else None)  # version 1 was the architecture alone
    if not isinstance(version, int) or version > FORMAT:
        raise EncoderError(
            f"{folder} contains no encoder that can be loaded: its config.json is not of transformers or timm, and not "
            f"of this version of ijepa-enhanced or an older one (its format is {version}, not {FORMAT})."
        )
    if version != FORMAT:
        raise EncoderError(
            f"{folder} was saved by an older version of ijepa-enhanced. Train the encoder again, or rewrite "
            "config.json as docs/decisions.md describes."
        )
    try:
        origin = read_fields(Origin, "origin", config["origin"]) if config.get("origin") else None
        architecture = read_fields(Architecture, "architecture", config.get("architecture"))
        preprocessing = read_fields(Preprocessing, "preprocessing", config.get("preprocessing"))
        reader = Reader(read_weights(folder / "model.safetensors"))
        if architecture.depth != reader.count("blocks.layers.{}."):  # before blocks are made, of which there may be any
            raise EncoderError(f"architecture.depth is {architecture.depth} in config.json, but not in the weights.")
        with torch.device("meta"):
            expected = VisionTransformer(architecture).state_dict()
        state = {name: reader.take(name, *value.shape) for name, value in expected.items()}
        reader.finish()
        network = network_of(architecture, state)
        record = Record(config.get("training"), config.get("scores"), edited_card(folder / "README.md"))
        pretrained = Pretrained(network, preprocessing, origin, record)
    except UNFIT as error:
        raise EncoderError(f"The encoder in {folder} cannot be loaded: {_reason(error)}") from error
    if encoder == "context" and not (origin and origin.encoder == "context"):
        raise EncoderError(f"{folder} has no context encoder: only checkpoints of I-JEPA's own code have one.")
    check_finite(network, folder)
    return pretrained


def read_fields(cls: type[Config], name: str, values: Any) -> Config:
    """Return the dataclass whose fields are the object `name` of a config.json.

    Raises:
        RequestError: a field is unknown, missing, or of a wrong type.
    """
    from ijepa_enhanced.config import checked  # it needs PyYAML, which a bare GPU image lacks

    if not isinstance(values, dict):
        raise EncoderError(f"config.json must give {name} as an object, not {values!r}.")
    kinds = get_type_hints(cls, localns={"Resampling": Resampling})  # models/config.py imports it for type checks only
    if others := [key for key in values if key not in kinds]:
        raise EncoderError(unknown("field", f"{name}.{others[0]}", [f"{name}.{kind}" for kind in kinds], "config.json"))
    # A field that is missing is refused as null is, if it has no default.
    given = {each.name: None for each in dataclasses.fields(cls) if each.default is dataclasses.MISSING} | values  # type: ignore[arg-type]
    return cls(**{key: checked(f"{name}.{key}", kinds[key], value) for key, value in given.items()})


def network_of(architecture: Architecture, weights: dict[str, Tensor]) -> VisionTransformer:
    """Return a network in evaluation mode with these weights, which are not copied."""
    with torch.device("meta"):  # its own weights would be drawn in vain
        network = VisionTransformer(architecture)
    network.load_state_dict({name: value.contiguous() for name, value in weights.items()}, assign=True)
    return network.eval()


def check_finite(network: VisionTransformer, place: Path) -> None:
    """Raise NotFiniteError if a weight is not finite."""
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise NotFiniteError(
                f"The weights {name} in {place} contain NaN or infinite values, so this encoder cannot be used. "
                "Use an encoder from another run, or RUN/best if the run has one."
            )


def find(path: str | Path) -> Path:
    """Return the folder or file that a path, a run or a Hub id means.

    Raises:
        EncoderError: the path or the file does not exist.
    """
    place = Path(path)
    if (place / "encoder").is_dir():
        return place / "encoder"
    if place.exists():
        return place
    # The first half of a Hub id is a name. If there is a folder of this name, the path is meant.
    if HUB_ID.fullmatch(str(path)) and not place.parent.exists():
        return download(str(path))
    raise EncoderError(f"No such file or folder: {path}.")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no such file.

    Raises:
        EncoderError: it is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"an object is needed, not a {type(found).__name__}")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(f"The encoder in {path.parent} cannot be loaded: {path.name}: {_reason(error)}") from error


def weights_in(folder: Path) -> Path:
    """Return the file of a folder that has the weights, or that lists the files that have them.

    Raises:
        EncoderError: the path or the file does not exist.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise EncoderError(f"{folder} contains no weights: it needs {', '.join(names[:-1])} or {names[-1]}.")


def read_weights(path: Path) -> Any:
    """Return what a file holds, without executing code from it: usually tensors by name.

    Raises:
        EncoderError: it is damaged, or in a format that is not known, or holds more than tensors and plain values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        files = [path]
        if path.name.endswith(".index.json"):
            files = [path.parent / name for name in sorted(set((read_json(path) or {})["weight_map"].values()))]
        # Only the parts of a checkpoint that are used are read from the disk, if its format allows it.
        mapped = path.suffix in PICKLES and zipfile.is_zipfile(path)
        if not mapped:
            check_memory(path, sum(file.stat().st_size for file in files))
        if files != [path]:
            return {name: value for file in files for name, value in load_file(file).items()}
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in PICKLES:
            raise EncoderError(f"{path} is no file of weights: these end in .safetensors, {', '.join(PICKLES)}.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what matters is an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (SafetensorError, pickle.UnpicklingError, struct.error, OSError, EOFError, MemoryError, *UNFIT) as error:
        if isinstance(error, EncoderError):
            raise
        if "GLOBAL" in str(error):  # as pickles call what they import
            raise EncoderError(
                f"{path} holds Python objects besides tensors, which could run any code when loaded, so it is not "
                "loaded. Save the tensors alone, for example as safetensors."
            ) from error
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {first_sentence(error)}"
        raise EncoderError(f"{path} is damaged or no file of weights{reason or '.'}") from error


def _reason(error: Exception) -> str:
    """Return what an error says, if that is sentences, or else its first line as one."""
    text = str(error)
    return text if text.endswith((".", "?")) and "\n" not in text else first_sentence(error)


def bytes_of(content: Any, encoder: WhichEncoder) -> int:
    """Return the size of the tensors to load: of one encoder, if the content of a file is a checkpoint of I-JEPA."""
    used = content.get(PARTS[encoder]) if is_checkpoint(content) else content
    return sum(value.nbytes for value in used.values() if isinstance(value, Tensor)) if isinstance(used, dict) else 0


def check_memory(path: Path, size: int) -> None:
    """Raise EncoderError if the weights of `path`, of `size` bytes, are larger than the free memory."""
    free = free_memory()["memory"]
    if size > free:
        raise EncoderError(
            f"{path} needs {size / MEGABYTE:,.0f} MB of memory, but only {free / MEGABYTE:,.0f} MB are free. Use a "
            "smaller model, or a machine with more memory."
        )


def license_of(card: str | None) -> str | None:
    """Return the license that a model card states in its header, or None."""
    import yaml

    header = re.match(r"---\n(.*?)\n---", card or "", re.DOTALL)
    try:
        values = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict):
        return None
    found = values.get("license")
    if found == "other":  # the Hub has no identifier for this license, but the card may name it
        found = values.get("license_name") or found
    return found if isinstance(found, str) else None
