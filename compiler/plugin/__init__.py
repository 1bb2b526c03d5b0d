"""Plug-ins of recipes: base classes, headers, registry, context."""
