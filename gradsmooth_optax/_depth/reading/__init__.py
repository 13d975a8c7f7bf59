"""What a tree looks like: layers by their names, boxes and shapes."""
