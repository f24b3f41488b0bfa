"""The flat vector: all parameters of a model in one array, and the way back."""
