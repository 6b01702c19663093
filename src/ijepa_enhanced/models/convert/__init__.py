"""Released weights in other layouts, one file each."""
