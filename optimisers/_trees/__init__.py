"""Trees of parameters: paths, nodes, walks, ties; no numerics."""
