"""One file an optimizer family."""
