"""The systems that are measured, one module each; a module imports nothing of the others."""
