"""One technique a file, each a Lightning callback."""
