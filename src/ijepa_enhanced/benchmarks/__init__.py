"""Speed tables, one module a theme."""
