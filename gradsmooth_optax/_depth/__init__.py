"""Which leaf is which layer. No arithmetic."""
