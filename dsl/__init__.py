"""The language: text to a checked recipe. Imports lark, never torch."""
