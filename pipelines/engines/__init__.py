"""What decodes images and makes their views: one file an engine."""
