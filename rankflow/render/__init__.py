"""What a person sees: tables, HTML, pictures."""
