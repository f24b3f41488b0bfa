"""The asv suite. Rules come from the registry, models from `models`, peers from `peers`."""
