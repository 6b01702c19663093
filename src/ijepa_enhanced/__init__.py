"""I-JEPA on images of any size: packed without padding, from one small GPU to many machines."""

__version__ = "0.1.0"
