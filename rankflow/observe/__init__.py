"""What is heard of a model while it trains: probes, hooks, averages, studies."""
