"""Functions on packed streams."""
