"""Fine-tune an encoder as a classifier of labeled images, and export it as an ONNX file.

    python examples/finetune_and_export.py LABELED --weights facebook/dinov2-small --out classifier

LABELED is a folder with one subfolder of images for each class. Other files are skipped. Every fifth image is held out
to measure the accuracy. `classifier/encoder.onnx` turns one image of any size into its feature (docs/weights.md), and
`classifier/head.npz` turns a feature into the scores of the classes. The last lines of this script use both.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ijepa_enhanced import Encoder
from ijepa_enhanced.cli import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("labeled", type=Path, help="folder with one subfolder of images for each class")
parser.add_argument("--weights", required=True, help="a run, a folder, a weight file or a Hub id")
parser.add_argument("--out", type=Path, default="classifier", help="folder to write")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch", type=int, default=32, help="images per step")
arguments = parser.parse_args()

classes = sorted(folder.name for folder in arguments.labeled.iterdir() if folder.is_dir())
endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
paths = [path for path in sorted(arguments.labeled.glob("*/*")) if path.suffix.lower() in endings]
images = [(path, classes.index(path.parent.name)) for path in paths]
random.Random(0).shuffle(images)
val, train = images[::5], [image for number, image in enumerate(images) if number % 5]

encoder = Encoder.from_pretrained(arguments.weights).to("cuda" if torch.cuda.is_available() else "cpu")
head = torch.nn.Linear(encoder.width, len(classes)).to(encoder.device)
optimizer = torch.optim.AdamW(
    # The encoder is trained already, and the head is not.
    [{"params": encoder.network.parameters(), "lr": 2e-5}, {"params": head.parameters(), "lr": 1e-3}],
    weight_decay=0.05,
)


def scores(paths: list[Path]) -> torch.Tensor:
    """Return the scores of the classes for each image, [N, C]. Images keep their sizes: they are packed, not padded."""
    packs = (packed.to(encoder.device) for packed in encoder.packs(paths))
    return torch.cat([head(encoder.pool(encoder(packed), packed)) for packed in packs])


for epoch in range(arguments.epochs):
    encoder.train()
    random.Random(epoch).shuffle(train)
    for start in range(0, len(train), arguments.batch):
        paths, labels = zip(*train[start : start + arguments.batch], strict=True)
        loss = F.cross_entropy(scores(list(paths)), torch.tensor(labels, device=encoder.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    with torch.no_grad():
        right = sum(int(scores([path]).argmax()) == label for path, label in val)
    print(f"epoch {epoch + 1}: {right} of {len(val)} held-out images are classified correctly")

encoder.save_pretrained(arguments.out / "encoder")
np.savez(arguments.out / "head.npz", weight=head.weight.detach().cpu(), bias=head.bias.detach().cpu(), classes=classes)
if code := main(["export", "onnx", str(arguments.out / "encoder"), str(arguments.out / "encoder.onnx")]):
    raise SystemExit(code)

# What an application does: it needs numpy, Pillow and onnxruntime, and neither PyTorch nor this package.
session = onnxruntime.InferenceSession(arguments.out / "encoder.onnx")
facts, layer = session.get_modelmeta().custom_metadata_map, np.load(arguments.out / "head.npz")
photo = ImageOps.exif_transpose(Image.open(val[0][0])).convert("RGB")  # upright
patch, native = int(facts["patch_size"]), (photo.width * photo.height) ** 0.5
scale = int(facts.get("resolution", native)) / native  # without a resolution, images keep their size
size = [max(1, round(side * scale / patch)) * patch for side in photo.size]
pixels = np.asarray(photo.resize(size)).transpose(2, 0, 1)[None]
(feature,) = session.run(["feature"], {"images": pixels})
print(val[0][0], layer["classes"][(feature @ layer["weight"].T + layer["bias"]).argmax()])
