"""One file a format that keeps an adapter in a single file."""
