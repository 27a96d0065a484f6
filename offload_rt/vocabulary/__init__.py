"""What stands before and behind the layers: embedding, head and loss, by rows and by tiles."""
