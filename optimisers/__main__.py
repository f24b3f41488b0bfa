"""``python -m optimisers``: what `show_versions` prints."""

from ._info import show_versions

show_versions()
