"""An artifact as one HTML page that needs nothing else: tables, charts and the recipe with what came of it."""
