"""`effc lsp`: what an editor is told of a recipe that it has open. It reads, and runs and fetches nothing."""
