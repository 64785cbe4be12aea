"""What the command does: one file a command."""
