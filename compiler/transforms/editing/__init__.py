"""What a pass calls to change a program, and to try a change before it is made."""
