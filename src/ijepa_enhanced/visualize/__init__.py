"""Pictures of masks, packs and curves."""
