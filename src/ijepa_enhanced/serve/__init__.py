"""An encoder behind HTTP, and a page to look through it."""
