"""What every policy is made of; the policies themselves are in `methods`."""
