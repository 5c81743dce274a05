"""The short commands, a file each: its settings and its work."""
