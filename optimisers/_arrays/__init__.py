"""Arrays of all libraries: whose they are, where they lie, how they are made and written."""
