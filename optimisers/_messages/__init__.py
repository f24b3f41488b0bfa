"""What is said to the user: how values are shown, what was meant, what to write instead."""
