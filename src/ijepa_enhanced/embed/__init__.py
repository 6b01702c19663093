"""Features of whole sources as files, and search in them."""
