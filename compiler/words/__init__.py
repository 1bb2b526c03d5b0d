"""What a recipe can name: kinds of words, their headers, the shelves."""
