"""The command line, the language server, and importers of foreign recipes."""
