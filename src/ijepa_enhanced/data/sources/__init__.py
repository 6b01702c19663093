"""Sources of images, one file per kind."""
