"""Parameter trees of many families of models, and who judges a reading of them."""
