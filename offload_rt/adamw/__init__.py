"""One AdamW step where the state lies: fast, plain and on a GPU."""
