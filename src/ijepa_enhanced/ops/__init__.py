"""Functions on packed streams: attention, merging, pooling, positions, preprocessing, linear layers."""
