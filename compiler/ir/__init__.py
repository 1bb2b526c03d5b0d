"""The intermediate representation: programs, units, graphs, edits, and their plain-data forms."""
