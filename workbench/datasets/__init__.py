"""Where samples come from; no model in sight."""
