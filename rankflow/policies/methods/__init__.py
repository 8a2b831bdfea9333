"""One file a policy; its name is the word that users write in YAML."""
