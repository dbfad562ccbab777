"""Models: loading, attention over prefix trees, samplers, encoders, reward models."""
