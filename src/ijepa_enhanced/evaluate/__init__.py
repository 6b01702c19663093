"""Features extracted once, scored many ways."""
