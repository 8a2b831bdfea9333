"""Files of adapters, read and written."""
