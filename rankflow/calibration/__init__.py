"""Statistics of data, for cuts that know about it."""
