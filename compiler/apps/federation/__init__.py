"""Training on many machines that keep their data: what is sent, how it is put together, and the rounds."""
