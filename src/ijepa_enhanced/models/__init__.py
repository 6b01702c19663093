"""Networks over packed streams; weights in and out."""
