"""What this machine is: packages, processor, memory."""
