"""The optax face."""
