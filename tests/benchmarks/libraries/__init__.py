"""The libraries that are measured, one file each; every file is run in its library's own environment."""
