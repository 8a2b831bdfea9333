"""Policy files: YAML read strictly, with all mistakes named at once."""
