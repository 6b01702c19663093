"""Embed a folder of images with released weights, and print the most similar image of each.

    python examples/embed_folder.py PHOTOS
    python examples/embed_folder.py PHOTOS --weights runs/photos --merge-rate 0.05

The default weights, DINOv2 ViT-S/14, are downloaded from the Hugging Face Hub. Images keep their sizes and aspect
ratios: nothing is cropped, squashed or padded. Files that cannot be decoded are skipped.
"""

import argparse

import torch
import torch.nn.functional as F

from ijepa_enhanced import Encoder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photos", help="folder of images, or any other source that `ijepa train` reads")
parser.add_argument("--weights", default="facebook/dinov2-small", help="a run, a folder, a weight file or a Hub id")
parser.add_argument("--merge-rate", type=float, default=0.0, help="share of its tokens that each layer merges")
parser.add_argument("--out", default="embeddings.pt", help="file to write the keys and embeddings to")
arguments = parser.parse_args()

encoder = Encoder.from_pretrained(arguments.weights)
pairs = encoder.embed_iter(arguments.photos, on_error="skip", merge_rate=arguments.merge_rate)
keys, vectors = zip(*pairs, strict=True)
embeddings = torch.stack(vectors)  # [N, D]
torch.save({"keys": keys, "embeddings": embeddings}, arguments.out)

directions = F.normalize(embeddings)
similarity = directions @ directions.T  # [N, N]
similarity.fill_diagonal_(-1)  # an image is not its own neighbor
for key, (score, nearest) in zip(keys, zip(*similarity.max(dim=1), strict=True), strict=True):
    print(f"{key}  {keys[nearest]}  {score:.3f}")
