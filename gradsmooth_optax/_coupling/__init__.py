"""Arrays along depth. Knows no operator."""
