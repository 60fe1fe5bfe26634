"""Where anybits meets other libraries: one file for each, the only one that imports it."""
