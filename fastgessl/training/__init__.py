"""Training: the loop, what it depends on, and what it writes down."""
