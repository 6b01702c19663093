"""The loss of one pack, as `train.step.train_step` computes it, without the optimizer."""

from ijepa_enhanced.batch import MaskedBatch
from ijepa_enhanced.jepa import JEPA, Losses, StepSize


def pack_losses(model: JEPA, batch: MaskedBatch, target_tokens: int, packs: int = 1) -> Losses:
    """A pack's share of the loss of a step that has so many target tokens and packs."""
    batch = model.preprocess(batch)
    features = model.features(batch)
    size = StepSize(target_tokens, packs)
    return model.losses(model.predict(features, batch), model.targets(batch), features, batch, size)
