"""Continue the training of an encoder on images of your own, without labels, and say whether it helped.

    python examples/continue_training.py PHOTOS --weights facebook/dinov2-small
    python examples/continue_training.py PHOTOS --weights WEIGHTS --labeled LABELED --steps 1000

With `--labeled`, a folder with one subfolder for each class, both encoders classify images by nearest neighbors and by
a linear probe. The table calls them `start` and `trained`. Without it, nothing says whether the new encoder is better:
the training loss does not.
"""

import argparse

from ijepa_enhanced.cli import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photos", help="folder of images, or any other source that `ijepa train` reads")
parser.add_argument("--weights", required=True, help="a run, a folder, a weight file or a Hub id")
parser.add_argument("--labeled", help="images with labels to score the encoders on")
parser.add_argument("--steps", type=int, default=500, help="number of training steps")
parser.add_argument("--run", default="runs/continued", help="folder of the run")
arguments = parser.parse_args()


def ijepa(*words: str) -> None:
    """Run a command, and exit with its code if it fails."""
    if code := main(words):
        raise SystemExit(code)


# The recipe `continue` is chosen because of --init. Any option of `ijepa train --help` can follow.
ijepa("train", arguments.photos, "--init", arguments.weights, "--run", arguments.run, "--steps", str(arguments.steps))
if arguments.labeled:
    ijepa("evaluate", arguments.run, "--data", arguments.labeled, "--baselines")
