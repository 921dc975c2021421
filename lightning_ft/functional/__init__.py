"""Pure tensor mathematics, free of modules and of Lightning."""
