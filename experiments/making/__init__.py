"""What experiments.budget and experiments.limits share: chains as flags give them, and their models."""
