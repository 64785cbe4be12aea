"""Tables of similarities in blocks: their losses and derivatives, never stored whole."""
