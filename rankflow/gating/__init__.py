"""Gates between A and B: in the forward, trained, stored."""
