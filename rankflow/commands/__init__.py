"""The commands, by what they are about. Each imports what is heavy itself, so that --help answers at once."""
