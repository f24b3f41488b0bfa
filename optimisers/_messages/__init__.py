"""Messages to the user: how values are shown, which name was meant, and the code to write."""
