"""Networks over packed streams."""
