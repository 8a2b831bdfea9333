"""The surgeon, the only writer of a live model."""
