"""What engines serve, what they get wrong, and how to write for them."""
