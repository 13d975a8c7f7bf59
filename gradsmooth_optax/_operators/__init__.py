"""What is applied along depth."""
